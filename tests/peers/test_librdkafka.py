"""librdkafka's own test-runner against the embedded broker: each test that wants a broker in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from semel.broker.config import BrokerConfig
from semel.broker.security.settings import Listener, Security
from semel.processing.ports import free_ports
from tests.conftest import unavailable
from tests.peers.acquire import LIBRDKAFKA, Unavailable, kafka_home, librdkafka
from tests.peers.outcomes import State, Verdict, does_not_apply, settle
from tests.peers.serve import ConfiguredBroker
from tests.services.kafka import KafkaNode

pytestmark = [pytest.mark.peers, pytest.mark.timeout(3_000)]

AT_ONCE = 3
"""Most tests wait more than they work."""
PROCESS_SECONDS = 600
INITIAL_REBALANCE_DELAY_MS = 3_000
"""Kafka's default of group.initial.rebalance.delay.ms; ours is 0."""
BY_HAND = "noautocreate"
NO_AUTO_CREATE = ("0045_subscribe_update_topic_remove", "0045_subscribe_update_non_exist", "0107_", "0111_")
"""Tests of that scenario."""
ADMIN = "0081"
"""The admin test sets access rules that would lock out whoever is no super user. It ends at its first failure, so each
of its parts is run by itself."""
AUTHORIZED = ("0109", "0115", "0119")
"""Tests that want to be refused by access rules."""
WITH_LOGIN = ("0081/do_test_DescribeConsumerGroups_with_authorized_ops",)
"""Tests that want a SASL listener."""
_LOGIN = "security.protocol=sasl_plaintext\nsasl.mechanism=PLAIN\nsasl.username=semel\nsasl.password=semel-password\n"
ONLY_QUICK = ("0113",)
"""A thorough run takes a quarter of an hour."""
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_KAFKA_ACLS = {
    "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
    "allow.everyone.if.no.acl.found": "true",
}


class Runner:
    """The built test-runner. What one process can run is a number, which may stand for several tests."""

    def __init__(self, folder: Path, out: Path) -> None:
        self.tests = folder / "tests"
        self.out = out
        self.home = kafka_home()

    def names(self) -> dict[str, list[str]]:
        """For each process, the tests in it that want a broker. The admin test's parts are processes of their own."""
        table = (self.tests / "test.c").read_text().split("struct test tests[] = {")[1].split("\n};")[0]
        found: dict[str, list[str]] = {}
        for name, rest in re.findall(r"_TEST\((\w+),(.*?)(?=_TEST\(|\Z)", table, re.DOTALL):
            if "TEST_F_LOCAL" in rest or "TEST_F_MANUAL" in rest or name == "0081_admin":
                continue
            process = f"{name[:4]}/{BY_HAND}" if name.startswith(NO_AUTO_CREATE) else name[:4]
            found.setdefault(process, []).append(name)
        parts = re.findall(
            r"^(?:static void )?(do_test_\w+)\(", (self.tests / "0081-admin.c").read_text(), re.MULTILINE
        )
        for part in dict.fromkeys(parts):
            if part not in ("do_test_apis", "do_test_acls_count"):  # The caller of all, and a helper.
                found[f"0081/{part}"] = [f"0081_admin/{part}"]
        return found

    def run(self, process: str, tests: Sequence[str], bootstrap: str) -> dict[str, Verdict]:
        number, _, part = process.partition("/")
        log = self.out / f"{process.replace('/', '-')}.log"
        configuration = self.out / f"{bootstrap.replace(':', '-')}.conf"
        # The time-outs are those of an idle machine with four cores.
        login = _LOGIN if kind(process) == "login" else ""
        configuration.write_text(f"bootstrap.servers={bootstrap}\ntest.timeout.multiplier=2\n{login}")
        environment = os.environ | {
            "LD_LIBRARY_PATH": "../src:../src-cpp",
            "TESTS": number,
            "TEST_KAFKA_VERSION": "4.3.1",
            "RDKAFKA_TEST_CONF": str(configuration),
            "KAFKA_PATH": str(self.home),
            "BROKERS": bootstrap,
        }
        options = ["-p1", "-L"]
        if part == BY_HAND:
            options += ["-s", BY_HAND]
        elif part:
            environment["SUBTESTS"] = part
        if number in ONLY_QUICK:
            options.append("-Q")
        command = ["nice", "-n", "10", "./test-runner", *options]
        with log.open("wb") as output:
            process_ = subprocess.Popen(
                command,
                cwd=self.tests,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                process_.wait(PROCESS_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process_.pid, signal.SIGKILL)
                process_.wait()
        text = _ANSI.sub("", log.read_text(errors="replace"))
        found = {test: self._verdict(test.partition("/")[0], text) for test in tests}
        if number == ADMIN and not re.search(rf"\[ {part}:.*PASS \(", text):
            # The test passes, too, when none of its parts was run.
            found = {test: Verdict("failed", verdict.detail or "it did not run") for test, verdict in found.items()}
        return found

    @staticmethod
    def _verdict(name: str, text: str) -> Verdict:
        # A failure ends the runner by an assertion, mostly before its table is printed: read what each test said.
        problem = re.search(rf'^### Test "{name}[" ].*?failed at (.*?)\n(.*?)$', text, re.MULTILINE)
        if problem:
            return Verdict("failed", f"{problem[1]} {problem[2]}"[:400])
        if re.search(rf"= Test {name} PASSED =", text):
            return Verdict("passed")
        skipped = re.search(rf"^\|\s*{name}\s*\|\s*SKIPPED\s*\|[^|\n]*\|(.*)$", text, re.MULTILINE)
        if skipped:
            return Verdict("skipped", skipped[1].strip())
        return Verdict("failed", f"it did not end: {text[-300:]}")


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    try:
        return Runner(librdkafka(), tmp_path_factory.mktemp("librdkafka"))
    except Unavailable as why:
        unavailable("librdkafka's tests", str(why))
        raise


@pytest.fixture(scope="module")
def brokers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A broker as it comes, one that makes no topics by itself, and one with access rules."""
    folder = tmp_path_factory.mktemp("brokers")
    # Tests of rebalances want two members that join one after the other to be in the first generation together.
    plain = BrokerConfig(group_initial_rebalance_delay_ms=INITIAL_REBALANCE_DELAY_MS)
    rules = Security(authorize=True, allow_everyone_if_no_acl=True)
    configs = {
        "plain": plain,
        "by hand": replace(plain, auto_create_topics=False),
        "authorized": replace(plain, security=rules),
        "admin": replace(plain, security=replace(rules, super_users=("User:ANONYMOUS",))),
    }
    port = free_ports(1)[0]
    configs["login"] = replace(
        plain,
        listeners=(Listener("SASL_PLAINTEXT", "127.0.0.1", port),),
        security=Security(
            mechanisms=("PLAIN", "SCRAM-SHA-256"),
            users={"semel": "semel-password"},
            authorize=True,
            allow_everyone_if_no_acl=True,
            reauth_seconds=10,
        ),
    )
    started = {name: ConfiguredBroker(folder / name.replace(" ", "-"), config) for name, config in configs.items()}
    started["login"].port = port
    try:
        for broker in started.values():
            broker.start()
        yield {name: broker.bootstrap for name, broker in started.items()}
    finally:
        for broker in started.values():
            broker.stop()


def kind(process: str) -> str:
    """Which of the brokers a process of the runner wants."""
    if process.endswith(BY_HAND):
        return "by hand"
    if process in WITH_LOGIN:
        return "login"
    if process.startswith(ADMIN):
        return "admin"
    return "authorized" if process in AUTHORIZED else "plain"


class _Kafka:
    """Apache Kafka nodes like our three brokers, each started when something failed on ours."""

    def __init__(self) -> None:
        self._nodes: dict[str, KafkaNode] = {}

    def bootstrap(self, which: str) -> str:
        extra = {
            "by hand": {"auto.create.topics.enable": "false"},
            "authorized": _KAFKA_ACLS,
            "admin": _KAFKA_ACLS | {"super.users": "User:ANONYMOUS"},
        }.get(which, {})
        if which not in self._nodes:
            extra |= {"group.initial.rebalance.delay.ms": str(INITIAL_REBALANCE_DELAY_MS)}
            self._nodes[which] = KafkaNode(2, extra).start()
        return self._nodes[which].bootstrap

    def stop(self) -> None:
        for node in self._nodes.values():
            node.stop()


def _all(
    runner: Runner, processes: Mapping[str, list[str]], brokers: dict[str, str], at_once: int
) -> dict[str, Verdict]:
    found: dict[str, Verdict] = {}
    with ThreadPoolExecutor(at_once) as pool:
        for verdicts in pool.map(lambda item: runner.run(*item, brokers[kind(item[0])]), processes.items()):
            found |= verdicts
    return found


def test_librdkafka(runner: Runner, brokers: dict[str, str]) -> None:
    chosen = tuple(os.environ.get("LIBRDKAFKA_TESTS", "").split())
    processes = {name: tests for name, tests in runner.names().items() if not chosen or name.startswith(chosen)}
    verdicts = {
        test: Verdict("skipped", "not run")
        for tests in processes.values()
        for test in tests
        if does_not_apply("librdkafka", test)
    }
    wanted = {
        name: left for name, tests in processes.items() if (left := [test for test in tests if test not in verdicts])
    }
    verdicts |= _all(runner, wanted, brokers, AT_ONCE)
    # What failed beside others may have been too slow: alone, twice at most.
    retried: dict[str, str] = {}
    for _ in range(2):
        again = {
            name: left
            for name, tests in wanted.items()
            if (left := [test for test in tests if verdicts[test].state == "failed"])
        }
        second = _all(runner, again, brokers, 1)
        retried |= {test: verdicts[test].detail for test, verdict in second.items() if verdict.state == "passed"}
        verdicts |= second
    if chosen:
        problems = {test: verdict for test, verdict in verdicts.items() if verdict.state != "passed"}
        assert not problems, "\n".join(f"{test}: {verdict}" for test, verdict in problems.items())
        return
    of = {test: name for name, tests in processes.items() for test in tests}
    real = _Kafka()

    def on_kafka(test: str) -> State:
        return runner.run(of[test], [test], real.bootstrap(kind(of[test])))[test].state

    try:
        settle("librdkafka", LIBRDKAFKA, verdicts, retried=retried, on_kafka=on_kafka)
    finally:
        real.stop()

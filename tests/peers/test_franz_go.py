"""franz-go's own tests of its client, kgo, against the embedded broker: those that want a broker, each by itself."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from semel.broker.config import BrokerConfig
from tests.conftest import unavailable
from tests.peers.acquire import FRANZ_GO, Unavailable, franz_go
from tests.peers.outcomes import State, Verdict, does_not_apply, settle
from tests.peers.serve import ConfiguredBroker
from tests.services.kafka import KafkaNode

pytestmark = [pytest.mark.peers, pytest.mark.timeout(3_000)]

AT_ONCE = 2
PROCESS_SECONDS = 600
SETTINGS = {
    "KGO_TEST_RF": "1",
    # Half a million by default, through a chain of groups for each way to assign partitions: hours on two cores.
    "KGO_TEST_RECORDS": "20000",
    "KGO_TEST_UNSAFE": "true",
    "KGO_LOG_LEVEL": "none",
}
_RESULT = re.compile(r"^ *--- (PASS|FAIL|SKIP): (\S+)", re.MULTILINE)
_STATES: dict[str, State] = {"PASS": "passed", "FAIL": "failed", "SKIP": "skipped"}


def wants_a_broker(source: Path) -> list[str]:
    """The tests whose own text makes a client of the broker under test; the others bring a fake one, or none."""
    text = "\n".join(path.read_text() for path in sorted(source.glob("*_test.go")))
    functions = re.findall(r"^func (Test\w+)\((.*?)^}", text, re.MULTILINE | re.DOTALL)
    return [name for name, body in functions if "newTestClient(" in body]


def run(program: Path, source: Path, out: Path, test: str, bootstrap: str) -> dict[str, Verdict]:
    """One test and its subtests; a subtest stands for itself, and its parent only when it has none."""
    command = ["nice", "-n", "10", program, "-test.v", f"-test.run=^{test}$", f"-test.timeout={PROCESS_SECONDS}s"]
    environment = os.environ | SETTINGS | {"KGO_SEEDS": bootstrap}
    log = out / f"{test}.log"
    with log.open("w") as output:
        done = subprocess.run(
            command, cwd=source, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False
        )
    text = log.read_text(errors="replace")
    found = {name: Verdict(_STATES[state]) for state, name in _RESULT.findall(text)}
    for name in [name for name in found if any(other.startswith(f"{name}/") for other in found)]:
        if found.pop(name).state == "failed" and all(item.state != "failed" for item in found.values()):
            found[name] = Verdict("failed")
    if done.returncode and all(item.state != "failed" for item in found.values()):
        found[test] = Verdict("failed")
    said = re.findall(r"^ +\w+_test\.go:\d+: .*$", text, re.MULTILINE) or [text[-300:]]
    return {
        name: Verdict("failed", said[0].strip()) if item.state == "failed" else item for name, item in found.items()
    }


def test_franz_go(tmp_path: Path) -> None:
    try:
        program, source = franz_go()
    except Unavailable as why:
        unavailable("franz-go's tests", str(why))
        raise
    chosen = tuple(os.environ.get("FRANZ_GO_TESTS", "").split())
    tests = [test for test in wants_a_broker(source) if not chosen or test.startswith(chosen)]
    verdicts = {test: Verdict("skipped", "not run") for test in tests if does_not_apply("franz-go", test)}
    wanted = [test for test in tests if test not in verdicts]
    broker = ConfiguredBroker(tmp_path / "data", BrokerConfig())
    broker.start()

    def on_ours(names: Iterable[str], at_once: int) -> dict[str, Verdict]:
        found: dict[str, Verdict] = {}
        with ThreadPoolExecutor(at_once) as pool:
            for part in pool.map(lambda test: run(program, source, tmp_path, test, broker.bootstrap), names):
                found |= part
        return found

    try:
        verdicts |= on_ours(wanted, AT_ONCE)
        # What failed beside others may have been too slow: alone, once.
        failed = {name.partition("/")[0] for name, item in verdicts.items() if item.state == "failed"}
        second = on_ours(sorted(failed), 1)
        retried = {
            name: verdicts[name].detail
            for name, item in second.items()
            if item.state == "passed" and name in verdicts and verdicts[name].state == "failed"
        }
        verdicts |= second
    finally:
        broker.stop()
    if chosen:
        problems = {test: verdict for test, verdict in verdicts.items() if verdict.state != "passed"}
        assert not problems, "\n".join(f"{test}: {verdict}" for test, verdict in problems.items())
        return
    real: list[KafkaNode] = []

    def on_kafka(test: str) -> State:
        if not real:
            real.append(KafkaNode(2).start())
        found = run(program, source, tmp_path, test.partition("/")[0], real[0].bootstrap)
        return found.get(test, Verdict("failed")).state

    try:
        settle("franz-go", FRANZ_GO, verdicts, retried=retried, on_kafka=on_kafka)
    finally:
        for node in real:
            node.stop()

"""franz-go's own tests of its client, kgo, against the embedded broker: those that want a broker."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from semel.broker.config import BrokerConfig
from tests.conftest import unavailable
from tests.peers.acquire import FRANZ_GO, Unavailable, franz_go
from tests.peers.outcomes import State, Verdict, does_not_apply, settle
from tests.peers.serve import ConfiguredBroker
from tests.services.kafka import KafkaNode

pytestmark = [pytest.mark.peers, pytest.mark.timeout(3_000)]

PROCESS_SECONDS = 1_800
SETTINGS = {
    "KGO_TEST_RF": "1",
    # Half a million by default, through a chain of groups for each way to assign partitions: hours on two cores.
    "KGO_TEST_RECORDS": "20000",
    "KGO_TEST_UNSAFE": "true",
    "KGO_LOG_LEVEL": "none",
}
_FIRST = "TestIssue325"
"""The suite asks the broker what it can with the first topic that is made; a test that comes first may be too early."""
_RESULT = re.compile(r"^ *--- (PASS|FAIL|SKIP): (\S+)", re.MULTILINE)
_STATES: dict[str, State] = {"PASS": "passed", "FAIL": "failed", "SKIP": "skipped"}


def wants_a_broker(source: Path) -> list[str]:
    """The tests whose own text makes a client of the broker under test; the others bring a fake one, or none."""
    text = "\n".join(path.read_text() for path in sorted(source.glob("*_test.go")))
    functions = re.findall(r"^func (Test\w+)\((.*?)^}", text, re.MULTILINE | re.DOTALL)
    return [name for name, body in functions if "newTestClient(" in body]


def run(program: Path, source: Path, log: Path, tests: Sequence[str], bootstrap: str) -> dict[str, Verdict]:
    """These tests and their subtests; a test that has subtests is known by them."""
    pattern = f"^({'|'.join(tests)})$"
    command = ["nice", "-n", "10", program, "-test.v", f"-test.run={pattern}", f"-test.timeout={PROCESS_SECONDS}s"]
    environment = os.environ | SETTINGS | {"KGO_SEEDS": bootstrap}
    with log.open("w") as output:
        subprocess.run(command, cwd=source, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False)
    text = log.read_text(errors="replace")
    found = {test: Verdict("failed", f"it did not end: {text[-300:]}") for test in tests}
    for state, name in _RESULT.findall(text):
        said = re.search(rf"^=== NAME +{re.escape(name)}\n +(\w+\.go:\d+: .*)$", text, re.MULTILINE)
        found[name] = Verdict(_STATES[state], said[1] if said and state == "FAIL" else "")
    parents = [name for name in found if any(other.startswith(f"{name}/") for other in found)]
    return {name: verdict for name, verdict in found.items() if name not in parents}


def test_franz_go(tmp_path: Path) -> None:
    try:
        program, source = franz_go()
    except Unavailable as why:
        unavailable("franz-go's tests", str(why))
        raise
    chosen = tuple(os.environ.get("FRANZ_GO_TESTS", "").split())
    tests = [test for test in wants_a_broker(source) if not chosen or test.startswith(chosen)]
    verdicts = {test: Verdict("skipped", "not run") for test in tests if does_not_apply("franz-go", test)}
    broker = ConfiguredBroker(tmp_path / "data", BrokerConfig())
    broker.start()
    retried = {}
    try:
        verdicts |= run(
            program, source, tmp_path / "all.log", [test for test in tests if test not in verdicts], broker.bootstrap
        )
        failed = {name: verdict for name, verdict in verdicts.items() if verdict.state == "failed"}
        if failed:  # What failed beside others may have been too slow.
            again = sorted({_FIRST, *(name.partition("/")[0] for name in failed)})
            second = run(program, source, tmp_path / "again.log", again, broker.bootstrap)
            retried = {
                name: verdict.detail for name, verdict in failed.items() if second.get(name) == Verdict("passed")
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
        tests = [_FIRST, test.partition("/")[0]]
        found = run(program, source, tmp_path / "kafka.log", tests, real[0].bootstrap)
        return found.get(test, Verdict("failed")).state

    try:
        settle("franz-go", FRANZ_GO, verdicts, retried=retried, on_kafka=on_kafka)
    finally:
        for node in real:
            node.stop()

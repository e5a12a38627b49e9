"""The comparison finds in another client what it must find, and nothing in ours, under the same strikes."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from semel.errors import ConfigurationError
from semel.prove.compare.peers import PEERS, peers_named
from semel.prove.compare.reasons import reason_for
from semel.prove.compare.run import compare
from semel.prove.compare.strikes import FAULTS, faults_named
from semel.prove.compare.table import command, findings, markdown
from semel.prove.compare.trial import Trial, run_trial


def trial(peer: str, fault: str, times: int | None = None, kafka: str | None = None) -> Trial:
    strikes = FAULTS[fault] if times is None else replace(FAULTS[fault], times=times)
    # Of one process only: a rebalance in the middle of a single strike would let it miss.
    processes = 2 if times is None else 1
    return asyncio.run(run_trial(PEERS[peer], strikes, 1, kafka=kafka, say=lambda _line: None, processes=processes))


@pytest.mark.timeout(300)
def test_late_offsets_double_in_confluent_kafka_and_not_in_ours() -> None:
    """The position of transaction 1 arrives within transaction 2, and the process dies when that one is committed."""
    theirs = trial("confluent-kafka", "late-offsets", times=1)
    ours = trial("semel", "late-offsets", times=1)
    assert (theirs.struck, ours.struck) == (1, 1)
    assert theirs.notes == ["the broker answered NONE to the late copy"]
    assert theirs.counts()["doubled"] > 0
    assert theirs.counts()["lost"] == theirs.counts()["torn"] == theirs.unfinished == 0
    assert ours.verdict == "clean", ours
    assert "INVALID_PRODUCER_EPOCH" in ours.notes[0], "the broker must have refused the late copy of ours"


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"there is no 'kafkajs' here\. Known: semel, confluent-kafka"):
        peers_named("semel,kafkajs")
    with pytest.raises(ConfigurationError, match=r"there is no fault 'rain'\. Known: restart, kill"):
        faults_named("rain")
    assert [peer.name for peer in peers_named("all")] == list(PEERS)
    assert [fault.name for fault in faults_named("zombie, kill,zombie")] == ["zombie", "kill"]


def test_a_library_that_is_not_installed_is_named_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "absent", replace(PEERS["aiokafka"], name="absent", packages=("no-such-package",)))
    with pytest.raises(
        ConfigurationError, match=r"no-such-package is not installed here: pip install 'semel\[compare\]'"
    ):
        asyncio.run(compare("absent", "kill"))


def test_the_table_has_a_row_a_fault_and_each_finding_its_reason_and_command() -> None:
    clean = Trial("semel", "semel 0.1.0", "exactly-once", "zombie", 3, "embedded", inputs=10, struck=3)
    broken = Trial("aiokafka", "aiokafka 0.14.0", "exactly-once", "zombie", 3, "embedded", inputs=10, struck=3)
    broken.findings.add("E2", "input 4", "effect 0 again at (0, 9)")
    missed = Trial("aiokafka", "aiokafka 0.14.0", "exactly-once", "kill", 3, "embedded", inputs=10, struck=3)
    missed.unfinished = 4
    assert markdown([clean, broken, missed]).splitlines() == [
        "| fault | semel | aiokafka |",
        "| --- | --- | --- |",
        "| zombie | clean | 1 doubled |",
        "| kill | - | stuck |",
    ]
    told = findings([clean, broken, missed])
    assert "for example E2 doubled: input 4: effect 0 again at (0, 9)" in told
    assert reason_for(broken) in told
    assert command(broken) == "semel prove --compare aiokafka --faults zombie --seed 3"
    assert "semel prove --compare semel" not in told
    assert broken.as_json()["verdict"] == "1 doubled"


@pytest.mark.peers
@pytest.mark.timeout(1_800)
@pytest.mark.parametrize(
    ("peer", "fault"),
    [
        ("confluent-kafka", "late-commit"),
        ("aiokafka", "late-abort"),
        ("aiokafka", "zombie"),
        ("aiokafka", "late-offsets"),
    ],
)
def test_what_the_table_says_of_others_is_so_on_apache_kafka(kafka: object, peer: str, fault: str) -> None:
    address = str(kafka.bootstrap)  # type: ignore[attr-defined]
    found = trial(peer, fault, kafka=address)
    assert found.struck > 0
    assert sum(found.counts().values()) > 0, found
    assert reason_for(found), "a finding without a reason is news"


@pytest.mark.peers
@pytest.mark.timeout(1_800)
@pytest.mark.parametrize("fault", [name for name in FAULTS if not FAULTS[name].own_broker])
def test_ours_is_clean_on_apache_kafka(kafka: object, fault: str) -> None:
    found = trial("semel", fault, kafka=str(kafka.bootstrap))  # type: ignore[attr-defined]
    assert found.verdict in ("clean", "not struck"), found


@pytest.mark.soak
@pytest.mark.timeout(3_600)
def test_ours_is_clean_under_every_fault_on_the_embedded_broker() -> None:
    trials = asyncio.run(compare("semel", "all", seed=2))
    assert [item.fault for item in trials if item.verdict not in ("clean", "not struck")] == []

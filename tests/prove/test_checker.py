"""The checker is checked: valid runs have no finding, and one planted anomaly of any class is named, with its ids."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from semel.history import Unit
from semel.prove.check import CLASSES, check
from tests.prove.histories import World
from tests.prove.sabotage import KINDS, plant

FROM_THE_APP = {"E8", "E9"}
"""What only the app knows is compared by `totals` and by proof plans."""


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32), version=st.sampled_from([1, 2]), steps=st.integers(5, 250), records=st.integers(1, 12)
)
def test_a_valid_run_has_no_finding(seed: int, version: int, steps: int, records: int) -> None:
    findings = check(World(seed, version=version, unit_records=records).run(steps).evidence())
    assert findings.clean, [str(anomaly) for anomaly in findings.anomalies[:5]]
    assert not findings.notes


def test_valid_runs_have_everything_in_them() -> None:
    """A generator of runs in which nothing happens would find nothing."""
    world = World("everything").run(1_500)
    checked = check(world.evidence()).checked
    assert min(checked[name] for name in ("units", "batches", "inputs", "records", "reads", "ledger rows", "keys")) > 50
    outcomes = {(type(event).__name__, event.type) for event in world.events}
    assert {("Unit", kind) for kind in ("invoke", "ok", "fail", "info")} <= outcomes
    assert {("Batch", kind) for kind in ("invoke", "ok", "fail", "info")} <= outcomes
    assert {("Http", kind) for kind in ("invoke", "ok", "fail", "info")} <= outcomes
    assert world.parked
    assert any(unit.parked for unit in world.events if type(unit) is Unit)


def test_every_class_is_planted() -> None:
    assert {name.partition(" ")[0] for name in KINDS} == set(CLASSES) - FROM_THE_APP


def named(name: str, seed: int) -> None:
    """Plant one anomaly; the checker must find it, with exactly its ids, and nothing that does not follow from it."""
    evidence, planted = plant(name, seed)
    findings = check(evidence)
    told = [str(anomaly) for anomaly in findings.anomalies[:8]]
    found = {anomaly.ids for anomaly in findings.anomalies if anomaly.kind == planted.kind}
    assert found == planted.ids, (name, seed, told)
    assert set(findings.counts) - {planted.kind} <= planted.implied, (name, seed, told)


@pytest.mark.parametrize("name", KINDS)
def test_one_planted_anomaly_is_named(name: str) -> None:
    for seed in range(2):
        named(name, seed)


@pytest.mark.soak
@pytest.mark.parametrize("name", KINDS)
def test_a_thousand_planted_anomalies_are_named(name: str) -> None:
    for seed in range(1_000):
        named(name, seed)


@pytest.mark.soak
def test_thousands_of_valid_runs_have_no_finding() -> None:
    for seed in range(5_000):
        findings = check(World(f"valid:{seed}", version=1 + seed % 2, unit_records=1 + seed % 9).run(200).evidence())
        assert findings.clean, (seed, [str(anomaly) for anomaly in findings.anomalies[:5]])
        assert not findings.notes


def test_the_table_in_the_docs_has_every_class() -> None:
    text = (Path(__file__).parents[2] / "docs" / "proof.md").read_text()
    for name, (title, meaning) in CLASSES.items():
        assert f"| {name} | {title} | {meaning} |" in text
    assert f"in {len(KINDS)} ways" in text

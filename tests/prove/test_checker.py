"""The checker is checked: valid runs have no finding, and one planted anomaly of any class is named, with its ids."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from semel.history import Batch, BatchPart, Unit, UnitInput, UnitParked
from semel.prove.check import CLASSES, LedgerRow, check
from tests.prove.histories import Record, UnitSim, World
from tests.prove.sabotage import KINDS, finish, plant

FROM_THE_APP = {"E9"}
"""What only the app knows is compared by proof plans."""


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


# --- Parked records that are released ---


def parked_unit(world: World) -> UnitParked:
    """A record that a committed unit parked."""
    done = {event.a for event in world.events if type(event) is Unit and event.type == "ok"}
    return next(
        event.parked[0]
        for event in world.events
        if type(event) is Unit and event.type == "invoke" and event.parked and event.a in done
    )


def release(world: World, place: UnitParked, outputs: int) -> None:
    """A committed unit that releases a record: with so many outputs, or discarded when they are -1."""
    attempt = world.attempt("worker0")
    inputs = [] if outputs < 0 else [UnitInput(place.topic, place.partition, [place.offset], [outputs])]
    event = Unit(type="invoke", a=attempt, component="enrich", inputs=inputs, released=[place])
    world.note(event)
    position = world.positions["enrich", place.partition]
    unit = UnitSim(attempt, "enrich", place.partition, world.producers["enrich"], position, [], event, [place.offset])
    front = f"{attempt}|{place.topic}|{place.partition}|{place.offset}"
    if outputs > 0:
        proofs = [f"{front}|{number}|{outputs}" for number in range(outputs)]
        world.produce(unit, {("enriched", 0): [Record(b"k", b"late", proof) for proof in proofs]})
    finish(world, unit)


@pytest.mark.parametrize("outputs", [-1, 0, 1, 3])
def test_a_parked_record_that_was_released_or_discarded_is_no_anomaly(outputs: int) -> None:
    world = World("released").run(400)
    release(world, parked_unit(world), outputs)
    findings = check(world.evidence())
    assert findings.clean, [str(anomaly) for anomaly in findings.anomalies[:5]]
    assert not findings.notes


@pytest.mark.parametrize("outputs", [0, 2])
def test_a_record_that_was_released_twice_is_doubled(outputs: int) -> None:
    world = World("released twice").run(400)
    place = parked_unit(world)
    for _ in range(2):
        release(world, place, outputs)
    at = ("enrich (released)", f"{place.topic}-{place.partition}@{place.offset}")
    found = {(anomaly.kind, anomaly.ids) for anomaly in check(world.evidence()).anomalies}
    assert ("E2", at) in found


def test_a_record_that_was_released_and_never_parked_is_named() -> None:
    world = World("never parked").run(400)
    offset = next(
        event.inputs[0].offsets[0]
        for event in world.events
        if type(event) is Unit
        and event.type == "invoke"
        and event.component == "enrich"
        and event.inputs
        and event.inputs[0].partition == 0
    )
    release(world, UnitParked("feed", 0, offset), 1)
    assert "E10" in {anomaly.kind for anomaly in check(world.evidence()).anomalies}


@pytest.mark.parametrize("calls", [1, 2])
def test_a_sinks_parked_record_counts_once_when_it_is_released(calls: int) -> None:
    world = World("released in a sink").run(400)
    row = world.parked[0]
    for number in range(calls):
        attempt = world.attempt("sink")
        epoch, position = world.epochs[row.sink, row.partition], world.sinks[row.sink, row.partition]
        part = BatchPart(row.topic, row.partition, epoch, position, position, [row.offset], [], (row.offset,))
        world.note(Batch(type="invoke", a=attempt, component=row.sink, parts=[part]))
        ledger = LedgerRow(row.sink, row.topic, row.partition, epoch, attempt, [row.offset])
        world.commit_batch(row.sink, [part], [ledger], [])
        world.note(Batch(type="ok", a=attempt))
        if number == 0:
            world.parked.remove(row)
    kinds = {anomaly.kind for anomaly in check(world.evidence()).anomalies}
    assert kinds == ({"E2"} if calls == 2 else set())


def test_the_table_in_the_docs_has_every_class() -> None:
    text = (Path(__file__).parents[2] / "docs" / "proof.md").read_text()
    for name, (title, meaning) in CLASSES.items():
        assert f"| {name} | {title} | {meaning} |" in text
    assert f"in {len(KINDS)} ways" in text

"""One anomaly of every class, planted at a random place of a run that was valid until then.

`plant(kind, seed)` gives the evidence and what the checker must say of it: the class with its ids, and the classes
that follow from it by their definitions and may be named as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from semel.history import Batch, BatchPart, Http, Read, Send, Unit, UnitChange, UnitInput, UnitParked, digest
from semel.prove.check import Evidence, InDoubt, LedgerRow, ParkedRow
from tests.prove.histories import (
    CONTROL,
    GONE,
    INPUTS,
    OUTCOMES,
    REQUESTS,
    SINKS,
    TOPICS,
    VISIBLE,
    Record,
    UnitSim,
    World,
)

__all__ = ["KINDS", "Planted", "plant"]


class Planted(NamedTuple):
    """What must be found: one anomaly of this class with each of these ids, and nothing outside of `implied`."""

    kind: str
    ids: frozenset[tuple[str, ...]]
    implied: frozenset[str] = frozenset()


@dataclass
class Plan:
    """A way to spoil a run: while it runs (`during` gives None until it can), or in what it left behind (`after`)."""

    kind: str
    implied: tuple[str, ...] = ()
    during: Callable[[World], set[tuple[str, ...]] | None] | None = None
    after: Callable[[World, Evidence], tuple[Evidence, set[tuple[str, ...]]] | None] | None = None


PLANS: dict[str, Plan] = {}


def during(name: str, *implied: str) -> Callable[[Any], Any]:
    def add(function: Any) -> Any:
        PLANS[name] = Plan(name.partition(" ")[0], implied, during=function)
        return function

    return add


def after(name: str, *implied: str) -> Callable[[Any], Any]:
    def add(function: Any) -> Any:
        PLANS[name] = Plan(name.partition(" ")[0], implied, after=function)
        return function

    return add


def plant(name: str, seed: int) -> tuple[Evidence, Planted]:
    """A run with one anomaly. Seeds whose run has no room for it are passed over for the next."""
    plan = PLANS[name]
    for again in range(500):
        world = World(f"{name}:{seed}:{again}", version=1 + (seed + again) % 2)
        found: list[set[tuple[str, ...]]] = []
        if plan.during is not None:

            def spoil(plan: Plan = plan, world: World = world, found: list[set[tuple[str, ...]]] = found) -> bool:
                assert plan.during is not None
                ids = plan.during(world)
                if ids:
                    found.append(ids)
                return bool(ids)

            world.spoil = spoil
        evidence = world.run(120).evidence()
        if plan.after is not None:
            spoilt = plan.after(world, evidence)
            if spoilt is None:
                continue
            evidence, ids = spoilt
            found.append(ids)
        if found:
            return evidence, Planted(plan.kind, frozenset(found[0]), frozenset(plan.implied))
    raise AssertionError(f"no run has room for {name}")


# --- Units of work that go wrong ---


def unit_of(world: World, most: int = 4, *, component: str = "", wanted: Callable[..., bool] | None = None) -> Any:
    """(component, partition, inputs, position) of a unit that could be begun now; None if there is none."""
    choices = [(name, number) for name in INPUTS for number in range(TOPICS[INPUTS[name]])]
    world.rng.shuffle(choices)
    for name, number in choices:
        if (component and name != component) or name in world.open:
            continue
        inputs, position = world.next_inputs(name, number, most)
        if not inputs:
            continue
        outputs = {offset: world.outputs(name, number, offset) for offset in inputs}
        if wanted is None or wanted(inputs, outputs):
            return name, number, inputs, position
    return None


def has_outputs(inputs: Any, outputs: Any) -> bool:
    return any(outputs[offset] for offset in inputs)


def few_outputs(inputs: Any, outputs: Any) -> bool:
    return has_outputs(inputs, outputs) and all(len(outputs[offset] or ()) < 60 for offset in inputs)


def make(world: World, wanted: Any = few_outputs, **more: Any) -> UnitSim | None:
    found = unit_of(world, wanted=wanted, **more)
    if found is None:
        return None
    return world.make_unit(*found)


def finish(world: World, unit: UnitSim, told: str = "ok") -> None:
    world.end_markers(unit, commit=True)
    world.advance(unit)
    if told:
        world.note(Unit(type=told, a=unit.attempt))  # type: ignore[arg-type]


@during("L2 in a unit")
def output_twice(world: World) -> Any:
    unit = make(world)
    if unit is None:
        return None
    records = world.records_of(unit)
    at = world.rng.choice([at for at, batch in records.items() if any(record.proof for record in batch)])
    k = world.rng.choice([k for k, record in enumerate(records[at]) if record.proof])
    records[at].insert(k, replace(records[at][k]))
    base = world.logs[at].end
    sizes = records.pop(at)
    world.append(unit.producer, world.logs[at], sizes)
    unit.touched.append(world.logs[at])
    world.produce(unit, records)
    finish(world, unit)
    return {(f"{at[0]}-{at[1]}@{base + k + 1}",)}


@during("L2 from outside")
def sent_twice(world: World) -> Any:
    sends = [event for event in world.events if type(event) is Send and event.type == "ok"]
    if not sends:
        return None
    event = world.rng.choice(sends)
    base = world.logs["feed", event.partition].append([Record(b"k", b"v", event.a)])
    return {(f"feed-{event.partition}@{base}",)}


@during("L3", "L7", "E17", "E8")
def told_committed(world: World) -> Any:
    unit = make(world)
    if unit is None:
        return None
    world.produce(unit)
    world.end_markers(unit, commit=False)
    world.note(Unit(type="ok", a=unit.attempt))
    return {(unit.attempt,)}


@during("L4", "L7", "E17")
def told_failed(world: World) -> Any:
    unit = make(world)
    if unit is None:
        return None
    world.produce(unit)
    finish(world, unit, "fail")
    return {(unit.attempt,)}


@during("L6", "E1", "E4")
def half_committed(world: World) -> Any:
    # Not `requests`: its changelog would tell of the same transaction under its producer's name.
    unit = make(world, component=world.rng.choice(["reserve", "enrich"]))
    if unit is None:
        return None
    records = world.records_of(unit)
    proven = [at for at, batch in records.items() if any(record.proof for record in batch)]
    if len(proven) < 2:
        world.note(Unit(type="fail", a=unit.attempt))
        return None
    world.produce(unit, records)
    epoch = unit.producer.epoch + (world.version == 2)
    lost = world.rng.choice(proven)
    for log in unit.touched:
        log.mark(unit.producer.id, epoch, commit=(log.topic, log.partition) != lost)
    if world.version == 2:
        unit.producer.epoch = epoch
        unit.producer.sequences.clear()
    world.advance(unit)
    world.note(Unit(type="info", a=unit.attempt))
    return {(unit.attempt,)}


@during("L6 of a changelog", "E1", "E8")
def changelog_aborted(world: World) -> Any:
    if world.version == 1:
        return None
    unit = make(world, component="requests")
    if unit is None:
        return None
    world.produce(unit)
    producer = unit.producer
    for log in unit.touched:
        log.mark(producer.id, producer.epoch + 1, commit=log.topic != "app.semel.state.idempotency")
    name = f"producer {producer.id}, epoch {producer.epoch}"
    producer.epoch += 1
    producer.sequences.clear()
    world.advance(unit)
    world.note(Unit(type="ok", a=unit.attempt))
    return {(name,)}


@during("L7")
def marker_between(world: World) -> Any:
    unit = make(world)
    if unit is None:
        return None
    records = world.records_of(unit)
    at = next(
        (at for at, batch in records.items() if sum(bool(record.proof) for record in batch) > 1 and batch[0].proof),
        None,
    )
    if at is None:
        world.note(Unit(type="fail", a=unit.attempt))
        return None
    world.append(unit.producer, world.logs[at], records[at][:1])
    unit.touched.append(world.logs[at])
    world.end_markers(unit, commit=True)
    unit.touched.clear()
    world.produce(unit, {**records, at: records[at][1:]})
    finish(world, unit)
    return {(unit.attempt,)}


@during("L9")
def sequence_gap(world: World) -> Any:
    unit = make(world)
    if unit is None:
        return None
    records = world.records_of(unit)
    at = world.rng.choice(list(records))
    unit.producer.sequences[at] = unit.producer.sequences.get(at, 0) + world.rng.randint(1, 5)
    base = world.append(unit.producer, world.logs[at], records.pop(at))
    unit.touched.append(world.logs[at])
    world.produce(unit, records)
    finish(world, unit)
    return {(f"{at[0]}-{at[1]}@{base}",)}


@during("L8")
def zombie_append(world: World) -> Any:
    for (topic, number), log in world.logs.items():
        for producer in world.producers.values():
            if topic == "enriched" and producer.epoch and (topic, number) in producer.sequences:
                base = log.append([Record(b"z", b"zombie")], producer.id, producer.epoch - 1, 0)
                return {(f"{log}@{base}",)}
    return None


@during("L10")
def swapped(world: World) -> Any:
    unit = make(world)
    if unit is None:
        return None
    records = world.records_of(unit)
    for at, batch in records.items():
        if len(batch) > 1 and batch[-1].proof and batch[-2].proof:
            batch[-1], batch[-2] = batch[-2], batch[-1]
            world.append(unit.producer, world.logs[at], batch)
            unit.touched.append(world.logs[at])
            where = f"{world.logs[at]}@{world.logs[at].end - 1}"
            world.produce(unit, {other: rest for other, rest in records.items() if other != at})
            finish(world, unit)
            return {(where,)}
    world.note(Unit(type="fail", a=unit.attempt))
    return None


@during("E1 in a unit", "E14")
def skipped(world: World) -> Any:
    found = unit_of(world)
    if found is None:
        return None
    component, number, inputs, position = found
    if component == "requests":  # Nothing of it is stored then: another class says the same of the key.
        return None
    # Whether an attempt without outputs took effect is told by no log, so an input that has some is taken.
    done = [offset for offset in inputs if world.outputs(component, number, offset) != []]
    if not done:
        return None
    gone = world.rng.choice(done)
    rest = [offset for offset in inputs if offset != gone]
    unit = world.make_unit(component, number, rest, position)
    world.produce(unit)
    finish(world, unit)
    return {(component, f"{INPUTS[component]}-{number}@{gone}")}


@during("E2 in a unit", "E14")
def done_again(world: World) -> Any:
    done = [
        (component, number) for (component, number), at in world.positions.items() if at and component not in world.open
    ]
    if not done:
        return None
    component, number = world.rng.choice(done)
    log = world.logs[INPUTS[component], number]
    # Whether an attempt without outputs took effect is told by no log, so inputs that have some are taken.
    known = [
        offset
        for offset in range(world.positions[component, number])
        if log.kinds[offset] is VISIBLE and world.outputs(component, number, offset) != []
    ]
    if not known:
        return None
    low = world.rng.randrange(len(known))
    inputs = known[low : low + 3]
    unit = world.make_unit(component, number, inputs, world.positions[component, number])
    world.produce(unit)
    finish(world, unit)
    return {(component, f"{log}@{offset}") for offset in inputs}


@during("E3 in a log")
def ghost(world: World) -> Any:
    name = world.rng.choice(["ghost-0-1-1", ""])
    if not name:
        units = [event for event in world.events if type(event) is Unit and event.type == "invoke" and event.inputs]
        if not units:
            return None
        name = world.rng.choice(units).a
    log = world.logs["enriched", world.rng.randrange(2)]
    base = log.append([Record(b"k", b"v", f"{name}|nowhere|0|5|0|1")])
    return {(f"{log}@{base}",)}


@during("E3 of another's input", "E7")
def strangers_output(world: World) -> Any:
    units = [
        event
        for event in world.events
        if type(event) is Unit and event.type == "invoke" and event.component == "enrich" and event.inputs
    ]
    pairs = [
        (one, other)
        for one in units
        for other in units
        if one.inputs[0][:2] == other.inputs[0][:2] and one.a != other.a and is_committed(world, other.a)
    ]
    pairs = [(one, other) for one, other in pairs if is_committed(world, one.a)]
    for one, other in pairs:
        topic, number, offsets, counts = other.inputs[0]
        for offset, count in zip(offsets, counts, strict=True):
            if count and offset not in one.inputs[0].offsets:
                log = world.logs["enriched", world.rng.randrange(2)]
                log.append([Record(b"k", b"v", f"{one.a}|{topic}|{number}|{offset}|0|{count}")])
                return {(one.a,)}
    return None


@during("E3 beyond the outputs")
def too_many(world: World) -> Any:
    unit = make(world, component="enrich")
    if unit is None:
        return None
    records = world.records_of(unit)
    batch = next(batch for batch in records.values() if batch[-1].proof.count("|") == 5)
    front, _, n = batch[-1].proof.rsplit("|", 2)
    batch.append(Record(b"k", b"v", f"{front}|9|{n}"))
    world.produce(unit, records)
    finish(world, unit)
    return {(unit.attempt,), ("enrich", "-".join(front.split("|")[1:3]) + "@" + front.split("|")[3])}


@during("E4 in a unit", "L3", "L6", "E17")
def output_missing(world: World) -> Any:
    unit = make(world, lambda inputs, outputs: few_outputs(inputs, outputs) and len(outputs[inputs[-1]] or ()) > 1)
    if unit is None:
        return None
    records = world.records_of(unit)
    last = f"|{unit.partition}|{unit.inputs[-1]}|0|"
    for at, batch in records.items():
        for record in batch:
            if last in record.proof:
                batch.remove(record)
                if not batch:
                    del records[at]
                world.produce(unit, records)
                finish(world, unit)
                return {(unit.component, f"{INPUTS[unit.component]}-{unit.partition}@{unit.inputs[-1]}")}
    raise AssertionError("the first output was there")


@during("E6", "L6", "E7", "L3", "E17")
def in_two_parts(world: World) -> Any:
    found = unit_of(
        world, 1, component="reserve", wanted=lambda inputs, outputs: 1 < len(outputs[inputs[0]] or ()) < 60
    )
    if found is None:
        return None
    for part in (0, 1):
        unit = world.make_unit(*found)
        records = {
            at: [record for record in batch if (record.proof.split("|")[4] == "0") is (part == 0)]
            for at, batch in world.records_of(unit).items()
        }
        world.produce(unit, {at: batch for at, batch in records.items() if batch})
        finish(world, unit, "info")
    component, number, inputs, _ = found
    return {(component, f"{INPUTS[component]}-{number}@{inputs[0]}")}


@during("E7 in a log")
def wrong_order(world: World) -> Any:
    found = unit_of(world, 2, component="reserve")
    if found is None or len(found[2]) < 2:
        return None
    component, number, inputs, position = found
    first, second = (world.outputs(component, number, offset) or [] for offset in inputs)
    shared = {output[:2] for output in first} & {output[:2] for output in second}
    if not shared:
        return None
    ids = set()
    for offset in (inputs[1], inputs[0]):
        unit = world.make_unit(component, number, [offset], position)
        for at, batch in world.records_of(unit).items():
            base = world.append(unit.producer, world.logs[at], batch)
            unit.touched.append(world.logs[at])
            if offset == inputs[0] and at in shared:
                ids.add((f"{world.logs[at]}@{base}",))
        finish(world, unit)
    return ids


@during("E10 in a unit", "E7")
def parked_and_done(world: World) -> Any:
    found = unit_of(world, 1, component="enrich", wanted=lambda inputs, outputs: outputs[inputs[0]] is not None)
    if found is None:
        return None
    component, number, inputs, position = found
    unit = world.make_unit(*found)
    world.produce(unit)
    finish(world, unit)
    other = world.attempt("worker9")
    world.note(Unit(type="invoke", a=other, component=component, parked=[UnitParked("feed", number, inputs[0])]))
    again = UnitSim(other, component, number, unit.producer, position, [], unit.event, inputs)
    park = Record(b"k", b"v", f"{other}|feed|{number}|{inputs[0]}|0|1|parked")
    world.produce(again, {("app.enrich.parked", number): [park]})
    finish(world, again)
    return {(component, f"feed-{number}@{inputs[0]}")}


@during("L12")
def circle(world: World) -> Any:
    """A unit of `requests` also reads what `reserve` made of its own orders."""
    for event in world.events:
        if type(event) is not Unit or event.type != "invoke" or event.component != "reserve" or not event.inputs:
            continue
        topic, number, offsets, counts = event.inputs[0]
        if not sum(counts) or not is_committed(world, event.a):
            continue
        for source in world.events:
            if type(source) is Unit and source.type == "invoke" and source.component == "requests":
                writes = [at for at in offsets if writer_of(world, topic, number, at) == source.a]
                if writes and is_committed(world, source.a):
                    read = next(
                        (
                            (log.partition, at)
                            for log in world.logs.values()
                            if log.topic == "inventory"
                            for at, record in enumerate(log.records)
                            if record is not None
                            and record.proof.startswith(event.a + "|")
                            and log.kinds[at] is VISIBLE
                        ),
                        None,
                    )
                    if read is not None:
                        source.inputs.append(UnitInput("inventory", read[0], [read[1]], [0]))
                        return {tuple(sorted((source.a, event.a)))}
    return None


def writer_of(world: World, topic: str, number: int, offset: int) -> str:
    record = world.logs[topic, number].records[offset]
    return record.proof.partition("|")[0] if record is not None else ""


def is_committed(world: World, attempt: str) -> bool:
    return any(type(event) is Unit and event.type == "ok" and event.a == attempt for event in world.events)


# --- Sinks ---


def batch_of(world: World) -> tuple[str, BatchPart] | None:
    choices = [(sink, number) for sink in SINKS for number in range(TOPICS[SINKS[sink]])]
    world.rng.shuffle(choices)
    for sink, number in choices:
        part = world.next_part(sink, number)
        if part is not None and part.handed:
            return sink, part
    return None


def commit(world: World, sink: str, parts: list[BatchPart], rows: list[LedgerRow], told: str = "ok") -> str:
    attempt = world.attempt("sink")
    world.note(Batch(type="invoke", a=attempt, component=sink, parts=parts))
    world.commit_batch(sink, parts, [row._replace(attempt=attempt) for row in rows], ())
    if told:
        world.note(Batch(type=told, a=attempt))  # type: ignore[arg-type]
    return attempt


def row_of(sink: str, part: BatchPart, offsets: list[int] | None = None) -> LedgerRow:
    return LedgerRow(
        sink, part.topic, part.partition, part.owner_epoch, "", part.handed if offsets is None else offsets
    )


@during("E1 at a sink")
def not_handed(world: World) -> Any:
    found = batch_of(world)
    if found is None:
        return None
    sink, part = found
    gone = world.rng.choice(part.handed)
    part = part._replace(handed=[offset for offset in part.handed if offset != gone], parked=[])
    lost = [*found[1].parked, gone]
    commit(world, sink, [part], [row_of(sink, part)] if part.handed else [])
    return {(sink, f"{part.topic}-{part.partition}@{offset}") for offset in lost}


@during("E2 at a sink")
def applied_again(world: World) -> Any:
    rows = [row for row in world.rows if row.offsets]
    if not rows:
        return None
    row = world.rng.choice(rows)
    epoch = world.epochs[row.sink, row.partition]
    offsets = list(row.offsets)
    part = BatchPart(row.topic, row.partition, epoch, offsets[0], offsets[-1] + 1, offsets, [])
    before = world.sinks[row.sink, row.partition]
    commit(world, row.sink, [part], [row_of(row.sink, part)])
    world.sinks[row.sink, row.partition] = before
    return {(row.sink, f"{row.topic}-{row.partition}@{offset}") for offset in offsets}


@during("E3 at a sink")
def applied_nothing(world: World) -> Any:
    for (sink, number), at in world.sinks.items():
        log = world.logs[SINKS[sink], number]
        wrong = [offset for offset in range(at) if log.kinds[offset] in (CONTROL, GONE)]
        if wrong:
            offset = world.rng.choice(wrong)
            part = BatchPart(log.topic, number, world.epochs[sink, number], at, at, [offset], [])
            before = world.sinks[sink, number]
            commit(world, sink, [part], [row_of(sink, part)])
            world.sinks[sink, number] = before
            return {(sink, f"{log}@{offset}")}
    return None


PLANS["E3 at a sink"].implied = ("E7",)


@during("E4 at a sink", "E1")
def half_a_batch(world: World) -> Any:
    parts = [
        part
        for number in range(TOPICS[SINKS["app.totals"]])
        if (part := world.next_part("app.totals", number)) is not None and part.handed and not part.parked
    ]
    if len(parts) < 2:
        return None
    rows = [row_of("app.totals", part) for part in parts]
    return {(commit(world, "app.totals", parts, rows[: world.rng.randrange(1, len(rows))], "info"),)}


@during("E7 at a sink")
def applied_backwards(world: World) -> Any:
    found = batch_of(world)
    if found is None or len(found[1].handed) < 2 or found[1].parked:
        return None
    sink, part = found
    *first, last = part.handed
    commit(world, sink, [part], [row_of(sink, part, [last]), row_of(sink, part, first)])
    return (
        {(sink, f"{part.topic}-{part.partition}@{first[0]}")}
        if dense(first)
        else {(sink, f"{part.topic}-{part.partition}@{low}") for low in lows(first)}
    )


def dense(offsets: list[int]) -> bool:
    return offsets[-1] - offsets[0] + 1 == len(offsets)


def lows(offsets: list[int]) -> list[int]:
    return [offset for offset in offsets if offset - 1 not in offsets]


@during("E10 at a sink")
def applied_and_parked(world: World) -> Any:
    rows = [row for row in world.rows if row.offsets]
    if not rows:
        return None
    row = world.rng.choice(rows)
    offset = world.rng.choice(list(row.offsets))
    world.parked.append(ParkedRow(row.sink, row.topic, row.partition, offset))
    return {(row.sink, f"{row.topic}-{row.partition}@{offset}")}


@during("E12")
def old_owner(world: World) -> Any:
    for (sink, number), epoch in world.epochs.items():
        newest = max((row.owner_epoch for row in world.rows if (row.sink, row.partition) == (sink, number)), default=0)
        part = world.next_part(sink, number)
        if part is not None and part.handed and not part.parked and newest > 1 and epoch >= newest:
            old = part._replace(owner_epoch=world.rng.randrange(1, newest))
            commit(world, sink, [old], [row_of(sink, old)])
            return {(sink, f"{part.topic}-{number}@{part.handed[0]}")}
    return None


@during("E17 at a sink")
def batch_told_failed(world: World) -> Any:
    found = batch_of(world)
    if found is None or found[1].parked:
        return None
    sink, part = found
    return {(commit(world, sink, [part], [row_of(sink, part)], "fail"),)}


@during("E17 of nothing", "E1")
def batch_told_committed(world: World) -> Any:
    found = batch_of(world)
    if found is None or found[1].parked:
        return None
    sink, part = found
    return {(commit(world, sink, [part], []),)}


# --- What readers and the outside saw ---


def reads(world: World, least: int = 1) -> list[Read]:
    return [event for event in world.events if type(event) is Read and len(event.offsets) >= least]


@after("L1 of a reader")
def other_value(world: World, evidence: Evidence) -> Any:
    if not reads(world):
        return None
    event = world.rng.choice(reads(world))
    k = world.rng.randrange(len(event.offsets))
    event.digests[k] = "00000000deadbeef"
    return evidence, {(f"{event.topic}-{event.partition}@{event.offsets[k]}",)}


@after("L4 of a reader", "L11")
def read_aborted(world: World, evidence: Evidence) -> Any:
    return read_kind(world, evidence, GONE)


@after("L14")
def read_marker(world: World, evidence: Evidence) -> Any:
    return read_kind(world, evidence, CONTROL)


def read_kind(world: World, evidence: Evidence, kind: bytes) -> Any:
    """One more offset in the middle of what a reader was given."""
    choices = [
        (event, k, offset)
        for event in reads(world, 2)
        for k in range(1, len(event.offsets))
        for offset in range(event.offsets[k - 1] + 1, event.offsets[k])
        if world.logs[event.topic, event.partition].kinds[offset] is kind
    ]
    if not choices:
        return None
    event, k, offset = world.rng.choice(choices)
    event.offsets.insert(k, offset)
    record = world.logs[event.topic, event.partition].records[offset]
    event.digests.insert(k, digest(record.value if record else None))
    return evidence, {(f"{event.topic}-{event.partition}@{offset}",)}


@after("L5")
def read_early(world: World, evidence: Evidence) -> Any:
    begun = {event.a: event.t for event in world.events if type(event) is Unit and event.type == "invoke"}
    choices = []
    for event in reads(world):
        log = world.logs[event.topic, event.partition]
        first: dict[str, int] = {}
        for offset in event.offsets:
            record = log.records[offset]
            if record is not None and record.proof:
                first.setdefault(record.proof.partition("|")[0], offset)
        if first:
            choices.append((event, first))
    if not choices:
        return None
    event, first = world.rng.choice(choices)
    newest = max(first, key=lambda name: begun[name])
    event.t = begun[newest] - 1
    return evidence, {(f"{event.topic}-{event.partition}@{first[newest]}",)}


@after("L11 skip")
def read_skips(world: World, evidence: Evidence) -> Any:
    if not reads(world, 3):
        return None
    event = world.rng.choice(reads(world, 3))
    k = world.rng.randrange(1, len(event.offsets) - 1)
    gone = event.offsets.pop(k)
    event.digests.pop(k)
    return evidence, {(f"{event.topic}-{event.partition}@{gone}",)}


@after("L11 again")
def read_again(world: World, evidence: Evidence) -> Any:
    if not reads(world):
        return None
    event = world.rng.choice(reads(world))
    again = Read(**{name: getattr(event, name) for name in ("type", "a", "topic", "partition", "offsets", "digests")})
    again.t = event.t + 1
    world.events.insert(world.events.index(event) + 1, again)
    return evidence, {(f"{event.topic}-{event.partition}@{event.offsets[0]}",)}


@after("L17")
def read_vanished(world: World, evidence: Evidence) -> Any:
    if not world.readers:
        return None
    at = world.rng.choice(sorted(world.readers))
    offset = world.logs[at].end + world.rng.randint(0, 3)
    world.note_read(at, [offset])
    return evidence, {(f"{at[0]}-{at[1]}@{offset}",)}


@after("L1 of a sender")
def told_anothers_place(world: World, evidence: Evidence) -> Any:
    log = world.logs["feed", world.rng.randrange(2)]
    taken = {
        event.offset
        for event in world.events
        if type(event) is Send and event.type == "ok" and event.partition == log.partition
    }
    free = [offset for offset in range(log.end) if offset not in taken]
    if not free:
        return None
    offset = world.rng.choice(free)
    send(world, log.partition, offset)
    return evidence, {(f"{log}@{offset}",)}


@after("L16 acknowledged and gone")
def acknowledged_beyond(world: World, evidence: Evidence) -> Any:
    log = world.logs["feed", world.rng.randrange(2)]
    offset = log.end + world.rng.randint(0, 5)
    send(world, log.partition, offset)
    return evidence, {(f"{log}@{offset}",)}


def send(world: World, partition: int, offset: int) -> None:
    attempt = world.attempt("load")
    world.note(Send(type="invoke", a=attempt, id="x", topic="feed"))
    world.note(Send(type="ok", a=attempt, topic="feed", partition=partition, offset=offset))


@during("L4 from outside", "E17")
def sent_though_failed(world: World) -> Any:
    attempt = world.attempt("load")
    world.note(Send(type="invoke", a=attempt, id="x", topic="feed"))
    log = world.logs["feed", world.rng.randrange(2)]
    base = log.append([Record(b"k", b"v", attempt)])
    world.note(Send(type="fail", a=attempt))
    return {(f"{log}@{base}",)}


@after("L16 checksum")
def wrong_checksum(world: World, evidence: Evidence) -> Any:
    log = world.rng.choice([log for log in world.logs.values() if log.chunks])
    k = world.rng.randrange(len(log.chunks))
    data = bytearray(log.chunks[k])
    data[17] ^= 0xFF
    log.chunks[k] = bytes(data)
    return evidence, {(f"{log}@{int.from_bytes(data[:8], 'big')}",)}


@after("L15 in a log")
def left_open(world: World, evidence: Evidence) -> Any:
    log = world.logs["app.enrich.parked", world.rng.randrange(2)]
    base = log.append([Record(b"k", b"v")], 77, 0, 0, transactional=True)
    return world.evidence(), {(f"{log}@{base}",)}


@after("L15 at the coordinator")
def listed_open(world: World, evidence: Evidence) -> Any:
    return replace(evidence, in_doubt=[InDoubt("Kafka", "app.reserve.0", "Ongoing", False)]), {
        ("Kafka", "app.reserve.0")
    }


@after("E13")
def left_prepared(world: World, evidence: Evidence) -> Any:
    return replace(evidence, in_doubt=[InDoubt("PostgreSQL", "semel-7", "prepared", True)]), {("PostgreSQL", "semel-7")}


@after("E5 behind")
def position_behind(world: World, evidence: Evidence) -> Any:
    choices = [position for position in evidence.positions if position.next_offset > 2]
    if not choices:
        return None
    chosen = world.rng.choice(choices)
    back = world.rng.randrange(0, chosen.next_offset)
    log = world.logs[chosen.topic, chosen.partition]
    parked = {row.offset for row in evidence.parked if row[:3] == chosen[:3]}
    done = [
        offset for offset in range(back, chosen.next_offset) if log.kinds[offset] is VISIBLE and offset not in parked
    ]
    if not done:
        return None
    positions = [
        position._replace(next_offset=back) if position is chosen else position for position in evidence.positions
    ]
    return replace(evidence, positions=positions), {(chosen.component, f"{log}@{offset}") for offset in done}


@after("E5 beyond")
def position_beyond(world: World, evidence: Evidence) -> Any:
    chosen = world.rng.choice(list(evidence.positions))
    end = world.logs[chosen.topic, chosen.partition].end + world.rng.randint(1, 9)
    positions = [
        position._replace(next_offset=end) if position is chosen else position for position in evidence.positions
    ]
    return replace(evidence, positions=positions), {(chosen.component, f"{chosen.topic}-{chosen.partition}@{end}")}


@after("E16")
def never_done(world: World, evidence: Evidence) -> Any:
    log = world.logs["feed", world.rng.randrange(2)]
    attempt = world.attempt("load")
    world.note(Send(type="invoke", a=attempt, id="x", topic="feed"))
    base = log.append([Record(b"k", b"v", attempt)])
    world.note(Send(type="ok", a=attempt, topic="feed", partition=log.partition, offset=base))
    return world.evidence(), {("enrich", f"{log}@{base}")}


# --- Idempotency keys ---


def answers(world: World) -> list[Http]:
    return [event for event in world.events if type(event) is Http and event.type == "ok"]


def keys_by_attempt(world: World) -> dict[str, Http]:
    return {event.a: event for event in world.events if type(event) is Http and event.type == "invoke"}


@after("E14 two answers")
def two_answers(world: World, evidence: Evidence) -> Any:
    if not answers(world):
        return None
    asked = keys_by_attempt(world)[world.rng.choice(answers(world)).a]
    attempt = world.attempt("load")
    world.note(Http(type="invoke", a=attempt, key=asked.key, route=asked.route, body=asked.body))
    world.note(Http(type="ok", a=attempt, status=201, reply="0000000000000bad"))
    return evidence, {(asked.key,)}


@after("E14 two bodies")
def two_bodies(world: World, evidence: Evidence) -> Any:
    if not answers(world):
        return None
    answer = world.rng.choice(answers(world))
    asked = keys_by_attempt(world)[answer.a]
    attempt = world.attempt("load")
    world.note(Http(type="invoke", a=attempt, key=asked.key, route=asked.route, body="00000000000000cc"))
    world.note(Http(type="ok", a=attempt, status=201, reply=answer.reply))
    return evidence, {(asked.key,)}


@during("E14 two effects")
def two_effects(world: World) -> Any:
    """The same key runs a second time, as if its stored outcome had been forgotten."""
    log = world.logs[REQUESTS, world.rng.randrange(2)]
    firsts = [
        (key, at)
        for key, at in world.firsts.items()
        if at[0] == log.partition and at[1] < world.positions.get(("requests", log.partition), 0)
    ]
    if not firsts:
        return None
    key, first = world.rng.choice(firsts)
    base = log.append([Record(key, b"request")])
    del world.firsts[key]
    world.is_known(key, log.partition, base)
    return {(f"{log}@{first[1]}", f"{log}@{base}")}


@after("E1 of a key")
def answered_only(world: World, evidence: Evidence) -> Any:
    attempt, key = world.attempt("load"), "key-that-nobody-appended"
    world.note(Http(type="invoke", a=attempt, key=key, route="POST /orders", body="00000000000000dd"))
    world.note(Http(type="ok", a=attempt, status=201, reply="00000000000000ee"))
    return evidence, {(key,)}


@after("E17 of a refusal")
def refused_and_done(world: World, evidence: Evidence) -> Any:
    asked = keys_by_attempt(world)
    counts: dict[str, int] = {}
    for event in asked.values():
        counts[event.key] = counts.get(event.key, 0) + 1
    single = [event for event in answers(world) if counts[asked[event.a].key] == 1]
    if not single:
        return None
    event = world.rng.choice(single)
    event.type, event.status = "fail", 400
    return evidence, {(asked[event.a].key,)}


# --- State ---


def name_of(change: UnitChange) -> str:
    return f"idempotency-{change.partition}[0x{change.key.encode('latin-1').hex()}]"


@after("E8 of a lost update")
def stale(world: World, evidence: Evidence) -> Any:
    """A committed unit worked on state as if the one before it had never been."""
    done = {event.a for event in world.events if type(event) is Unit and event.type == "ok"}
    found = [
        (event, number)
        for event in world.events
        if type(event) is Unit and event.a in done
        for number, change in enumerate(event.changes)
        if change.before
    ]
    if not found:
        return None
    event, number = world.rng.choice(found)
    event.changes[number] = event.changes[number]._replace(before="")
    return evidence, {("requests", name_of(event.changes[number]))}


@after("E8 of a changelog")
def spoilt_changelog(world: World, evidence: Evidence) -> Any:
    """The last record of a key is not what its unit wrote there."""
    changes = [event.changes for event in world.events if type(event) is Unit and event.changes]
    change = world.rng.choice(changes)[0]
    if change.key not in world.stored:
        return None
    log = world.logs[OUTCOMES, change.partition]
    offset = log.append([Record(change.key.encode("latin-1"), b"spoilt")])
    return world.evidence(), {(f"{log}@{offset}", name_of(change))}


KINDS = sorted(PLANS)

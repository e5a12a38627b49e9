"""Attempts and inputs: what took effect, against what was told and what the positions say.

Columns that are as they should be are compared as a whole; only where they differ is an input looked at by itself, and
judged by `rules`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from math import inf

from semel.prove.check.evidence import Evidence, LedgerRow, ParkedRow, Position
from semel.prove.check.findings import Findings
from semel.prove.check.logs import ABORTED, COMMITTED, SPLIT, VISIBLE, LogFacts, LogPass
from semel.prove.check.model import (
    EXPECTED,
    FAIL,
    INFO,
    NARROW,
    OK,
    OPEN,
    PARKED,
    PARKED_BIT,
    RELEASED,
    WIDE,
    Attempts,
    Key,
    Lane,
    Model,
    Run,
    runs_of,
)
from semel.prove.check.rules import ATTEMPT_RULES, AttemptFate, InputFate, judged

__all__ = ["Facts", "judge_positions", "judge_units", "take_ledger"]

Facts = Mapping[tuple[str, int], LogFacts]

_COVER_MAX = 255
_SEEN = bytes(1 if kind == VISIBLE else 0 for kind in range(256))


# --- Units of work ---


def judge_units(model: Model, logs: LogPass, facts: Facts, findings: Findings) -> None:
    """Find out which units took effect, mark their inputs, and say which were not told the truth."""
    units = model.units
    horizon = _horizons(units, logs, facts)
    unsure = 0
    for number in range(1, len(units.names)):
        expected, visible = units.expected[number], units.visible[number]
        outcome, flags = units.outcome[number], units.flags[number]
        if visible == expected and not (outcome == FAIL and visible) and not flags & (ABORTED | SPLIT):
            if not expected and outcome == FAIL:
                continue
            if not expected and outcome != OK:
                _cover_possible(units, number)
                continue
            if _cover_whole(units, number):
                continue
        if not visible and outcome != OK and not flags & (COMMITTED | SPLIT):
            if not (expected and outcome in (OPEN, INFO) and _may_be_gone(units, number, horizon)):
                continue
            _cover_possible(units, number)
            unsure += 1
            continue
        if visible < expected and not flags & (ABORTED | SPLIT) and _may_be_gone(units, number, horizon):
            _cover_possible(units, number)
            unsure += 1
            continue
        fate = AttemptFate(units.names[number], _component(units, number), outcome, expected, visible, flags)
        findings.extend(found for rule in ATTEMPT_RULES if (found := rule(fate)) is not None)
        if visible or (not expected and outcome == OK):
            _cover_each(units, logs, number, findings)
    if unsure:
        findings.notes.append(
            f"{unsure} units of work could not be judged by their outputs: those stood in parts of topics that "
            "retention or compaction has taken away."
        )


def _component(units: Attempts, number: int) -> str:
    return units.components[units.component[number]]


def _cover_whole(units: Attempts, number: int) -> bool:
    """All outputs of all its inputs are there; False, and nothing is marked, when some of them are not."""
    counts = units.counts
    for run in units.runs(number):
        lane = units.lanes[run.lane]
        i = run.low - lane.low
        packed = counts[run.counts : run.counts + run.size]
        if WIDE in packed or lane.mask[i : i + run.size] != array("Q", [EXPECTED[byte] for byte in packed]):
            return False
    for run in units.runs(number):
        lane = units.lanes[run.lane]
        _add_cover(lane, run.low - lane.low, run.size)
    return True


def _add_cover(lane: Lane, i: int, size: int) -> bool:
    """Count these inputs as worked on; whether none of them was before."""
    if lane.cover.count(0, i, i + size) == size:
        lane.cover[i : i + size] = b"\1" * size
        return True
    for at in range(i, i + size):
        lane.cover[at] = min(lane.cover[at] + 1, _COVER_MAX)
    return False


def _cover_possible(units: Attempts, number: int) -> None:
    for run in units.runs(number):
        lane = units.lanes[run.lane]
        i = run.low - lane.low
        lane.possible[i : i + run.size] = b"\1" * run.size


def _cover_each(units: Attempts, logs: LogPass, number: int, findings: Findings) -> None:
    """An attempt that is not as it should be: which of its inputs have their outputs from it?"""
    name = units.names[number]
    for run in units.runs(number):
        lane = units.lanes[run.lane]
        for k in range(run.size):
            i = run.low - lane.low + k
            expected, found, extra = _outputs(units, lane, i, run, k)
            is_shared = (lane.number, i) in logs.conflicts
            is_own = lane.owner[i] == number
            item = InputFate(lane.component, *lane.place, lane.low + i, 1, True, True, attempts=(name,))
            if extra and is_own and not is_shared:
                is_parked = units.counts[run.counts + k] == PARKED
                why = "it was parked, and outputs of it can be read" if is_parked else f"{extra} outputs too many"
                findings.add(*item.found("E10" if is_parked else "E3", why))
            if expected and not (found and (is_own or is_shared)):
                continue
            _add_cover(lane, i, 1)
            if not is_shared:
                findings.extend(judged(item._replace(outputs=found, expected=expected)))


def _outputs(units: Attempts, lane: Lane, i: int, run: Run, k: int) -> tuple[int, int, int]:
    """How many outputs an input should have, how many of those are visible, and how many that it should not have."""
    byte = units.counts[run.counts + k]
    wide = lane.wide.get(i, 0) << NARROW
    if byte == WIDE:
        wanted = (1 << units.wide[run.counts + k]) - 1
        found = lane.mask[i] & ~PARKED_BIT | wide
    else:
        wanted, found = EXPECTED[byte], lane.mask[i] | wide << 1
    return wanted.bit_count(), (found & wanted).bit_count(), (found & ~wanted).bit_count()


def _horizons(units: Attempts, logs: LogPass, facts: Facts) -> list[float]:
    """For each lane, the input up to which outputs may have been deleted or compacted away; -1 where nothing was."""
    horizon = [-1.0] * len(units.lanes)
    cut = [item for item in facts.values() if item.cut >= 0 and item.log.topic not in logs.inert]
    if not cut:
        return horizon
    writers: dict[str, set[str]] = {}
    plain: set[str] = set()
    for item in facts.values():
        topic = item.log.topic
        numbers = set(item.writer)
        writers.setdefault(topic, set()).update(_component(units, number) for number in numbers if number)
        if VISIBLE in item.state:
            plain.add(topic)
    for item in cut:
        known = writers[item.log.topic]
        for lane in units.lanes:
            if lane.number in item.survivors:
                horizon[lane.number] = max(horizon[lane.number], item.survivors[lane.number])
            elif lane.component in known or (not known and item.log.topic not in plain):
                horizon[lane.number] = inf
    return horizon


def _may_be_gone(units: Attempts, number: int, horizon: list[float]) -> bool:
    """Whether what is missing of an attempt may have been taken by retention or compaction."""
    return any(run.low <= horizon[run.lane] for run in units.runs(number))


# --- Sinks ---


def take_ledger(model: Model, rows: Iterable[LedgerRow], facts: Facts, findings: Findings) -> dict[Key, Lane]:
    """Read the ledgers: which input was given to a handler how often, by whom, and in which order."""
    batches = model.batches
    lanes: dict[Key, Lane] = {}
    newest: dict[Key, list[int]] = {}
    unknown: set[str] = set()
    count = 0
    for sink, topic, partition, owner_epoch, attempt, offsets in rows:
        count += 1
        key = (sink, topic, partition)
        lane = lanes.get(key)
        if lane is None:
            lane = lanes[key] = _sink_lane(key, len(lanes), facts)
            newest[key] = [0, -1]
        held = newest[key]
        number = batches.index.get(attempt, 0)
        if number:
            batches.visible[number] += len(offsets)
        elif attempt not in unknown and not model.lost_lines:
            unknown.add(attempt)
            findings.add(
                "E3", (sink, attempt), f"the ledger has rows of an attempt that nobody began, at {topic}-{partition}"
            )
        if owner_epoch < held[0]:
            findings.add(
                "E12",
                (sink, f"{topic}-{partition}@{offsets[0]}" if offsets else f"{topic}-{partition}"),
                f"written by owner epoch {owner_epoch} after owner epoch {held[0]} had written",
                (attempt,),
            )
        held[0] = max(held[0], owner_epoch)
        for low, size in runs_of(offsets):
            _cover_ledger(lane, low, size, held, (attempt,), findings, is_release=number in model.releases)
    findings.checked["ledger rows"] += count
    for number in range(1, len(batches.names)):
        expected, visible, outcome = batches.expected[number], batches.visible[number], batches.outcome[number]
        if visible != expected or (visible and outcome == FAIL):
            if not visible and outcome != OK:
                continue
            fate = AttemptFate(batches.names[number], _component(batches, number), outcome, expected, visible, 0, True)
            findings.extend(found for rule in ATTEMPT_RULES if (found := rule(fate)) is not None)
    return lanes


def _sink_lane(key: Key, number: int, facts: Facts) -> Lane:
    lane = Lane(key, number)
    known = facts.get(key[1:])
    if known is not None:
        lane.low, lane.high = known.start, known.start + len(known.state) - 1
    lane.allocate(outputs=False)
    return lane


def _cover_ledger(
    lane: Lane,
    low: int,
    size: int,
    held: list[int],
    attempts: tuple[str, ...],
    findings: Findings,
    *,
    is_release: bool,
) -> None:
    i = low - lane.low
    if i < 0 or i + size > len(lane.cover):
        findings.add(
            "E3", (lane.component, f"{lane.topic}-{lane.partition}@{low}"), "its log has no such offset", attempts
        )
        return
    is_first = _add_cover(lane, i, size)
    if is_release:
        return  # They come when an operator lets them, behind later ones of other keys.
    if is_first and low < held[1]:
        why = f"applied after offset {held[1]}"
        findings.add("E7", (lane.component, f"{lane.topic}-{lane.partition}@{low}"), why, attempts)
    held[1] = max(held[1], low + size - 1)


# --- Positions ---


def judge_positions(
    evidence: Evidence, model: Model, logs: LogPass, facts: Facts, sinks: Mapping[Key, Lane], findings: Findings
) -> None:
    """Every input of every consumer: passed by its position and done once, or neither."""
    parked = _parked(evidence.parked)
    horizon = _horizons(model.units, logs, facts)
    seen = set()
    for position in evidence.positions:
        key = (position.component, position.topic, position.partition)
        known = facts.get(key[1:])
        if known is None:
            findings.notes.append(f"{position.topic}-{position.partition} was not read: its inputs are not judged.")
            continue
        seen.add(key)
        if position.is_sink:
            lane = sinks.get(key) or _sink_lane(key, 0, facts)
            _judge_lane(position, lane, known, findings, logs, parked.get(key, set()), -1)
        else:
            number = model.units.lane_numbers.get(key)
            lane = Lane(key, -1) if number is None else model.units.lanes[number]
            below = -1 if number is None else horizon[number]
            _judge_lane(position, lane, known, findings, logs, set(), below)
    _judge_released(model, findings)
    missing = [key for key in [*model.units.lane_numbers, *sinks] if key not in seen and not key[0].endswith(RELEASED)]
    if missing:
        names = ", ".join(f"{component} at {topic}-{partition}" for component, topic, partition in missing[:5])
        findings.notes.append(f"No position is known of {names}{' and others' if len(missing) > 5 else ''}.")


def _judge_released(model: Model, findings: Findings) -> None:
    """Records that were parked and worked on later: once, and not without having been parked."""
    units = model.units
    for key, number in units.lane_numbers.items():
        if not key[0].endswith(RELEASED):
            continue
        lane = units.lanes[number]
        parked = units.lane_numbers.get((key[0].removesuffix(RELEASED), *key[1:]))
        main = None if parked is None else units.lanes[parked]
        for i, count in enumerate(lane.cover):
            offset = lane.low + i
            at = (lane.component, f"{lane.topic}-{lane.partition}@{offset}")
            if count > 1:
                findings.add("E2", at, f"it was released {count} times")
            if count and (main is None or not _has_bit(main, offset, PARKED_BIT)):
                findings.add("E10", at, "it was released, and nothing says that it had been parked")


def _has_bit(lane: Lane, offset: int, bit: int) -> bool:
    i = offset - lane.low
    return 0 <= i < len(lane.mask) and bool(lane.mask[i] & bit)


def _parked(rows: Iterable[ParkedRow]) -> dict[Key, set[int]]:
    found: dict[Key, set[int]] = {}
    for sink, topic, partition, offset in rows:
        found.setdefault((sink, topic, partition), set()).add(offset)
    return found


def _judge_lane(
    position: Position,
    lane: Lane,
    log: LogFacts,
    findings: Findings,
    logs: LogPass,
    parked: set[int],
    horizon: float,
) -> None:
    """One component and one partition of its input."""
    end = log.start + len(log.state)
    begin, passed = max(position.begin, log.start), position.next_offset
    if passed > end:
        findings.add(
            "E5",
            (lane.component, f"{lane.topic}-{lane.partition}@{passed}"),
            f"the position is beyond the log's end {end}",
        )
    if lane.high >= end and any(lane.cover[max(0, end - lane.low) :]):
        at = f"{lane.topic}-{lane.partition}@{max(end, lane.low)}"
        findings.add("E3", (lane.component, at), f"inputs from here on have effects, and the log ends at {end}")
    # Everything is brought to the log's offsets from `begin` to its end.
    there = log.state[begin - log.start :].translate(_SEEN)
    cover = _aligned(lane.cover, lane, begin, end)
    findings.checked["inputs"] += there.count(1, 0, max(0, passed - begin))
    is_done = there if passed >= end else there[: max(0, passed - begin)] + bytes(len(there) - max(0, passed - begin))
    if not parked and cover == is_done:
        pass
    else:
        possible = _aligned(lane.possible, lane, begin, end)
        for i, (is_there, count, should) in enumerate(zip(there, cover, is_done, strict=True)):
            offset = begin + i
            if count == should and offset not in parked:
                continue
            if should and not count and (possible[i] or offset <= horizon):
                continue
            findings.extend(judged(_input(lane, offset, count, offset < passed, bool(is_there), logs, parked)))
    undone = [
        begin + i
        for i in range(max(0, passed - begin), len(there))
        if there[i] and not cover[i] and begin + i not in parked
    ]
    if undone:
        findings.add(
            "E16",
            (lane.component, f"{lane.topic}-{lane.partition}@{undone[0]}"),
            f"{len(undone)} inputs from here on were not worked on; the position is {passed} of {end}",
        )


def _aligned(column: bytearray, lane: Lane, begin: int, end: int) -> bytearray:
    """A lane's column from `begin` to `end`, with zeros where the lane has no offsets."""
    if not column:
        return bytearray(max(0, end - begin))
    front = max(0, lane.low - begin)
    inner = column[max(0, begin - lane.low) : max(0, end - lane.low)]
    return (bytearray(min(front, end - begin)) + inner).ljust(max(0, end - begin), b"\0")


def _input(
    lane: Lane, offset: int, count: int, is_passed: bool, is_there: bool, logs: LogPass, parked: set[int]
) -> InputFate:
    i = offset - lane.low
    is_parked, is_split = offset in parked, False
    if 0 <= i < len(lane.mask):
        conflict = logs.conflicts.get((lane.number, i))
        mask = lane.mask[i]
        is_parked = bool(mask & PARKED_BIT) and (bool(mask & ~PARKED_BIT) or (count > 1 and not conflict))
        is_split = conflict is False and count > 1
    return InputFate(
        lane.component, *lane.place, offset, count, is_passed, is_there, is_parked=is_parked, is_split=is_split
    )


assert array("Q").itemsize == 8, "a bit for each of 63 outputs, and one for a parked input"

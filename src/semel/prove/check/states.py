"""State is the fold of its inputs: every unit's changes, one after the other, must give what the changelog ends with.

Two things can be wrong. A unit that took effect found another value than the units before it left (a lost update: its
handler worked on state that was behind or ahead of its inputs). Or the changelog's last value of a key is not what the
last unit left there, and the next owner would restore something that nobody computed.

A unit whose end nobody knows may or may not have taken effect, so a key may have several possible values for a while.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from semel.errors import CorruptBatch
from semel.history import Unit, UnitChange, digest
from semel.prove.check.evidence import Evidence
from semel.prove.check.findings import Findings
from semel.prove.check.logs import VISIBLE, LogFacts
from semel.prove.check.model import FAIL, OK, Attempts, Model
from semel.wire.records import decode_records

__all__ = ["judge_states"]

_Key = tuple[str, int, str]
"""Store, partition and key, as in `UnitChange`."""
_Left = tuple[frozenset[str], str]
"""What a key may hold, as digests, and the attempt that wrote last."""


def judge_states(
    evidence: Evidence, model: Model, facts: Mapping[tuple[str, int], LogFacts], findings: Findings
) -> None:
    """E8: fold what the history says of every store, and hold it against itself and the changelogs."""
    logs = {
        (topic.rpartition(".state.")[2], partition): known
        for (topic, partition), known in facts.items()
        if topic in evidence.changelogs
    }
    if model.lost_lines:
        if logs:
            findings.notes.append("State is not judged: lines of the history are missing.")
        return
    fresh = {at for at, known in logs.items() if known.log.begin == 0}
    held = _fold(evidence, model.units, fresh, findings)
    if not held:
        return
    for at, known in logs.items():
        _compare(at, known, {key: left for key, left in held.items() if key[:2] == at}, findings)


def _fold(evidence: Evidence, units: Attempts, fresh: set[tuple[str, int]], findings: Findings) -> dict[_Key, _Left]:
    """What every key that was changed may hold at the end. Units of a partition begin in the order of their commits."""
    held: dict[_Key, _Left] = {}
    for event in evidence.events():
        if type(event) is not Unit or not event.changes:
            continue
        number = units.index[event.a]
        is_there = bool(units.visible[number]) or (units.outcome[number] == OK)
        if units.outcome[number] == FAIL and not is_there:
            continue
        findings.checked["state changes"] += len(event.changes)
        for change in event.changes:
            key = change[:3]
            before = held.get(key)
            if before is None and key[:2] in fresh:
                before = (frozenset(("",)), "")
            if not is_there:
                possible = before[0] if before is not None else frozenset((change.before,))
                held[key] = (possible | {change.after}, event.a)
                continue
            if before is not None and change.before not in before[0]:
                _stale(event, change, before, findings)
            held[key] = (frozenset((change.after,)), event.a)
    return held


def _stale(event: Unit, change: UnitChange, before: _Left, findings: Findings) -> None:
    attempts = tuple(filter(None, (before[1], event.a)))
    last = f"attempt {before[1]} left {_values(before[0])}" if before[1] else "it had none yet"
    findings.add(
        "E8",
        (event.component, _name(change[:3])),
        f"attempt {event.a} found {_values((change.before,))} in this key, and {last}",
        attempts,
    )


def _compare(at: tuple[str, int], known: LogFacts, held: dict[_Key, _Left], findings: Findings) -> None:
    """The last visible value of every key in a changelog against what was left there."""
    log, found = known.log, dict[str, tuple[str, int]]()
    try:
        _read(known, found)
    except CorruptBatch:
        return  # L16 says so.
    for key, (possible, attempt) in held.items():
        value, offset = found.get(key[2], ("", -1))
        if value not in possible:
            where = f"{log}@{offset}" if offset >= 0 else str(log)
            findings.add(
                "E8",
                (where, _name(key)),
                f"its changelog ends with {_values((value,))}, and attempt {attempt} left {_values(possible)}",
                (attempt,) if attempt else (),
            )
    for name, (_, offset) in found.items():
        if (*at, name) not in held and offset >= log.begin:
            findings.add("E8", (f"{log}@{offset}", _name((*at, name))), "its changelog has it, and no unit changed it")


def _read(known: LogFacts, found: dict[str, tuple[str, int]]) -> None:
    for batch in known.log.batches():
        if batch.header.is_control or batch.header.base_offset >= known.log.end:
            continue
        for record in decode_records(batch.buffer, batch.at, batch.header, "", 0):
            index = record.offset - known.start
            if 0 <= index < len(known.state) and known.state[index] == VISIBLE and record.key is not None:
                found[record.key.decode("latin-1")] = (digest(record.value), record.offset)


def _name(key: _Key) -> str:
    store, partition, name = key
    raw = name.encode("latin-1")
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = ""
    return f"{store}-{partition}[{text if text.isprintable() and text else '0x' + raw.hex()}]"


def _values(digests: Iterable[str]) -> str:
    return " or ".join(sorted(f"value {item}" if item else "nothing" for item in digests))

"""What is to be done with parked records where a handler notes effects: one record a step, each behind the fence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from semel import history
from semel.processing.faults import Fault, build_at_least
from semel.processing.parklog import Command, Failed, Outcome, ParkPolicy
from semel.sinks.noted.place import ParkedRecord
from semel.types import Record

__all__ = ["Done", "Handle", "Step", "due", "steps", "wanted"]

Handle = Callable[[Record], "Sequence[Any] | Exception"]
"""Handle a record again: its effects, or the error when it is still at fault."""


class Done(NamedTuple):
    """What came of one record: gone with these effects, or with a new fault."""

    offset: int
    key: bytes | None
    effects: Sequence[Any]
    released: bool = False
    discarded: bool = False
    fault: Fault | None = None


class Step(NamedTuple):
    """One part of a command. `done` is None where there was nothing (more) to do."""

    done: Done | None
    left: Command | None
    outcome: Outcome


def wanted(parked: dict[int, ParkedRecord], commands: list[Command], policy: ParkPolicy) -> list[int]:
    """Where every new build is to try: what failed under another one and is not asked for yet."""
    if policy.retry != "build" or any(command.by == f"build {policy.build}" for command in commands):
        return []
    return [offset for offset, item in parked.items() if item.fault is not None and item.fault.build != policy.build]


def due(commands: list[Command], policy: ParkPolicy) -> list[Command]:
    """What this build may carry out."""
    return [command for command in commands if build_at_least(policy.build, command.build)]


def steps(
    command: Command, before: Outcome, parked: dict[int, ParkedRecord], policy: ParkPolicy, handle: Handle,
    record_of: Callable[[int, ParkedRecord], Record],
) -> Iterator[Step]:  # fmt: skip
    """The steps of a command, one after the other; each is to be durable before the next one is asked for.

    A record's whole lane goes in order; where one of it fails, the rest of it stays. `parked` is kept up to date.
    """
    outcome = msgspec.structs.replace(before, command=command.id, by=command.by, build=policy.build)
    if command.verb == "edit" and policy.edit != "yes":
        refused = "edits are off: SEMEL_PARK_EDIT=yes on the workers allows them"
        yield Step(None, None, msgspec.structs.replace(outcome, refused=refused, finished=True))
        return
    todo = list(command.offsets)
    while todo:
        offset = todo[0]
        if offset not in parked:
            del todo[0]
            continue
        if command.verb == "discard":
            done = Done(offset, parked[offset].key, [], discarded=True)
            outcome = msgspec.structs.replace(outcome, discarded=[*outcome.discarded, offset])
            del todo[0]
        else:
            done, outcome, todo = _head_of_lane(command, offset, todo, parked, outcome, policy, handle, record_of)
        if done.fault is None:
            del parked[done.offset]
        left = msgspec.structs.replace(command, offsets=todo) if todo else None
        outcome = msgspec.structs.replace(outcome, finished=not todo)
        yield Step(done, left, outcome)
    if not outcome.finished:  # Nothing of what it names waits any more.
        yield Step(None, None, msgspec.structs.replace(outcome, finished=True))


def _head_of_lane(
    command: Command, offset: int, todo: list[int], parked: dict[int, ParkedRecord], outcome: Outcome,
    policy: ParkPolicy, handle: Handle, record_of: Callable[[int, ParkedRecord], Record],
) -> tuple[Done, Outcome, list[int]]:  # fmt: skip
    """Try the first record of the lane that `offset` waits in. While it succeeds, `todo` keeps naming the lane."""
    key = parked[offset].key
    lane = [offset] if key is None else [at for at, item in parked.items() if item.key == key]
    head = lane[0]
    given = came = record_of(head, parked[head])
    if command.verb == "edit" and head in command.offsets:
        given = came._replace(value=command.value)
        old, new = history.digest(came.value), history.digest(given.value)
        outcome = msgspec.structs.replace(outcome, old=old, new=new)
    found = handle(given)
    if isinstance(found, Exception):
        fault = Fault.of(found, policy.build)
        failed = [*outcome.failed, Failed(head, fault.short())]
        outcome = msgspec.structs.replace(outcome, failed=failed)
        return Done(head, key, [], fault=fault), outcome, [at for at in todo if at not in lane]
    outcome = msgspec.structs.replace(outcome, released=[*outcome.released, head])
    rest = [at for at in todo if at != head]
    if len(lane) > 1 and not set(lane[1:]) & set(rest):
        rest = [lane[1], *rest]  # The lane goes on, although none of its later records is named.
    elif len(lane) > 1:
        rest = [lane[1], *(at for at in rest if at != lane[1])]
    return Done(head, key, found, released=True), outcome, rest

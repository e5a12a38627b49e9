"""What is to be done with a sink's parked records: commands in the database, carried out by the partition's owner.

Every function runs inside a transaction that its caller begins, fences and ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec

from semel import history
from semel.databases.database import Database
from semel.processing.faults import Fault, build_at_least
from semel.processing.parklog import Command, Failed, Outcome, ParkPolicy
from semel.sinks.sql.positions import PositionKey
from semel.types import Header, Record

__all__ = [
    "RELEASE_RECORDS_MAX",
    "Released",
    "carry_out",
    "for_this_build",
    "insert_command",
    "is_asked",
    "read_outcome",
    "read_record",
]

RELEASE_RECORDS_MAX = 500
"""Parked records in one database transaction, each of which is a call of the handler."""

_WHERE = "sink = ? AND cluster_id = ? AND topic_id = ? AND part = ?"
_PENDING = f"""
SELECT id, verb, record_offsets, record_value, requested_by, reason, requested_at, least_build, outcome
FROM semel_park_command WHERE {_WHERE} AND finished_at IS NULL ORDER BY requested_at, id
"""  # noqa: S608 - our own text
_INSERT = """
INSERT INTO semel_park_command (sink, cluster_id, topic_id, part, id, verb, record_offsets, record_value, requested_by,
                                reason, requested_at, least_build)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
_PROGRESS = f"""
UPDATE semel_park_command SET record_offsets = ?, outcome = ?, finished_at = ? WHERE {_WHERE} AND id = ?
"""  # noqa: S608
_ROW = "SELECT record_offset, record_timestamp, record_key, record_value, headers, topic FROM semel_parked"
_ONE = f"{_ROW} WHERE {_WHERE} AND record_offset = ?"
_LANE = f"{_ROW} WHERE {_WHERE} AND record_key = ? ORDER BY record_offset LIMIT ?"
_LANE_OFFSETS = f"SELECT record_offset FROM semel_parked WHERE {_WHERE} AND record_key = ?"  # noqa: S608
_GONE = f"DELETE FROM semel_parked WHERE {_WHERE} AND record_offset = ?"  # noqa: S608
_FAILED = f"""
UPDATE semel_parked SET error_class = ?, error_message = ?, error_frames = ?, error_group = ?, error_build = ?
WHERE {_WHERE} AND record_offset = ?
"""  # noqa: S608
_OTHER_BUILDS = f"""
SELECT record_offset FROM semel_parked WHERE {_WHERE} AND error_class IS NOT NULL AND error_build <> ?
ORDER BY record_offset
"""  # noqa: S608

_headers = msgspec.json.Decoder(tuple[Header, ...]).decode
_offsets = msgspec.json.Decoder(list[int]).decode

Handle = Callable[[Record, bool], Exception | None]
"""Handle a record again, and with True also one that may have been applied; the error, when it is still at fault."""


class Released(NamedTuple):
    """What one transaction did."""

    released: list[int]
    discarded: list[int]
    failed: list[int]


def insert_command(database: Database, key: PositionKey, command: Command) -> None:
    """Leave a command beside the parked records."""
    offsets = msgspec.json.encode(command.offsets).decode()
    said = (command.by, command.reason, command.at_ms, command.build)
    database.execute(_INSERT, (*key, command.id, command.verb, offsets, command.value, *said))


def is_asked(database: Database, key: PositionKey, policy: ParkPolicy) -> bool:
    """Whether there may be something to do: asked without a transaction, by the owner."""
    if any(build_at_least(policy.build, row[7]) for row in database.query(_PENDING, key)):
        return True
    return policy.retry == "build" and bool(database.query(_OTHER_BUILDS, (*key, policy.build)))


def for_this_build(database: Database, key: PositionKey, policy: ParkPolicy, new_id: str, now_ms: int) -> None:
    """Where every new build is to try: ask for what failed under another one, once."""
    if policy.retry != "build":
        return
    if any(row[4] == _by(policy) for row in database.query(_PENDING, key)):
        return
    offsets = [offset for (offset,) in database.query(_OTHER_BUILDS, (*key, policy.build))]
    if offsets:
        command = Command(id=new_id, verb="retry", offsets=offsets, by=_by(policy), at_ms=now_ms)
        insert_command(database, key, command)


def _by(policy: ParkPolicy) -> str:
    return f"build {policy.build}"


def carry_out(
    database: Database,
    key: PositionKey,
    policy: ParkPolicy,
    handle: Handle,
    *,
    now_ms: int,
    limit: int = RELEASE_RECORDS_MAX,
    doomed: Mapping[int, Exception] | None = None,
) -> Released | None:
    """Do the next step of the oldest command; None when none is left that this build may carry out.

    `doomed` are records whose failure is known already, because only COMMIT told it.
    """
    for row in database.query(_PENDING, key):
        command = _command(row)
        if not build_at_least(policy.build, command.build):
            continue
        step = _Step(database, key, policy, command, handle, limit, doomed or {})
        if command.verb == "edit" and policy.edit != "yes":
            outcome = Outcome(refused="edits are off: SEMEL_PARK_EDIT=yes on the workers allows them", finished=True)
        else:
            outcome = step.take(_outcome(row))
        outcome = msgspec.structs.replace(outcome, command=command.id, by=command.by, at_ms=now_ms, build=policy.build)
        text = msgspec.json.encode(outcome).decode()
        todo = msgspec.json.encode(step.todo).decode()
        database.execute(_PROGRESS, (todo, text, now_ms if outcome.finished else None, *key, command.id))
        return step.done
    return None


def read_outcome(database: Database, command: str) -> Outcome | None:
    """What was done for a command so far; None for nothing."""
    rows = database.query("SELECT outcome FROM semel_park_command WHERE id = ?", (command,))
    return msgspec.json.decode(rows[0][0], type=Outcome) if rows and rows[0][0] is not None else None


def read_record(database: Database, key: PositionKey, offset: int) -> Record | None:
    """One parked record; None when it does not wait any more."""
    rows = database.query(_ONE, (*key, offset))
    return _record(key, rows[0]) if rows else None


class _Step:
    """One transaction's part of a command."""

    def __init__(
        self,
        database: Database,
        key: PositionKey,
        policy: ParkPolicy,
        command: Command,
        handle: Handle,
        limit: int,
        doomed: Mapping[int, Exception],
    ) -> None:
        self._database = database
        self._key = key
        self._policy = policy
        self._command = command
        self._handle = handle
        self._left = limit
        self._doomed = doomed
        self._faults: list[Failed] = []
        self._edited = ("", "")
        self.todo = list(command.offsets)
        """Records that name the lanes to come."""
        self.done = Released([], [], [])

    def take(self, before: Outcome) -> Outcome:
        """Go on as far as the limit allows; what the command has come to with this."""
        while self.todo and self._left > 0:
            self._take_lane(self.todo[0])
        old, new = self._edited
        return msgspec.structs.replace(
            before,
            released=before.released + self.done.released,
            discarded=before.discarded + self.done.discarded,
            failed=before.failed + self._faults,
            finished=not self.todo,
            old=old or before.old,
            new=new or before.new,
        )

    def _take_lane(self, offset: int) -> None:
        """The whole lane of a record, in order; for `discard`, and where it has no key, the record alone."""
        first = read_record(self._database, self._key, offset)
        if first is None:
            del self.todo[0]
            return
        if self._command.verb == "discard":
            self._gone(offset)
            self.done.discarded.append(offset)
            self._left -= 1
            del self.todo[0]
            return
        lane = [first]
        if first.key is not None:
            rows = self._database.query(_LANE, (*self._key, first.key, self._left + 1))
            lane = [_record(self._key, row) for row in rows]
        for record in lane:
            if self._left == 0:
                self.todo[0] = record.offset  # The lane goes on here the next time.
                return
            self._left -= 1
            if not self._again(record):
                self._leave(record)
                return
        del self.todo[0]

    def _again(self, record: Record) -> bool:
        given = record
        if self._command.verb == "edit" and record.offset in self._command.offsets:
            given = record._replace(value=self._command.value)
            self._edited = history.digest(record.value), history.digest(given.value)
        error = self._doomed.get(record.offset) or self._handle(given, self._command.verb == "assume")
        if error is None:
            self._gone(record.offset)
            self.done.released.append(record.offset)
            return True
        fault = Fault.of(error, self._policy.build)
        said = (fault.error, fault.message, fault.frames, fault.group, fault.build)
        self._database.execute(_FAILED, (*said, *self._key, record.offset))
        self.done.failed.append(record.offset)
        self._faults.append(Failed(record.offset, fault.short()))
        return False

    def _gone(self, offset: int) -> None:
        self._database.execute(_GONE, (*self._key, offset))

    def _leave(self, failed: Record) -> None:
        """Nothing of this lane is to be tried again by this command, whichever of its records are named."""
        lane = {failed.offset}
        if failed.key is not None:
            lane |= {at for (at,) in self._database.query(_LANE_OFFSETS, (*self._key, failed.key))}
        self.todo = [offset for offset in self.todo[1:] if offset not in lane]


def _command(row: tuple[Any, ...]) -> Command:
    return Command(
        id=row[0],
        verb=row[1],
        offsets=_offsets(row[2]),
        value=None if row[3] is None else bytes(row[3]),
        by=row[4],
        reason=row[5],
        at_ms=row[6],
        build=row[7],
    )


def _outcome(row: tuple[Any, ...]) -> Outcome:
    return Outcome() if row[8] is None else msgspec.json.decode(row[8], type=Outcome)


def _record(key: PositionKey, row: tuple[Any, ...]) -> Record:
    offset, timestamp, record_key, value, headers, topic = row
    return Record(
        topic,
        key.part,
        offset,
        timestamp,
        None if record_key is None else bytes(record_key),
        None if value is None else bytes(value),
        _headers(headers),
    )

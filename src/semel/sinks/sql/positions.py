"""Position rows: one for each sink and partition, with the fence in it.

Every function runs inside a transaction that its caller begins and ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from semel.databases.database import Database
from semel.databases.dialects import dialect_of
from semel.sinks.contract import Claim, Stop, StopReason

__all__ = ["PositionKey", "PositionRow", "advance", "begin_anew", "of_others", "owners", "read", "skip", "take_over"]


class PositionKey(NamedTuple):
    """The identity of a row. Topic ids, not names: a topic that is made again starts from offset 0 again."""

    sink: str
    cluster_id: str
    topic_id: str
    part: int


class PositionRow(NamedTuple):
    """The part of a row that moves."""

    next_offset: int
    owner_epoch: int
    owner: str


_ROW = "sink = ? AND cluster_id = ? AND topic_id = ? AND part = ?"

_TAKE_OVER = """
INSERT INTO semel_position (sink, cluster_id, topic_id, part, topic, next_offset, owner_epoch, owner, applied)
VALUES (?, ?, ?, ?, ?, ?, 1, ?, 0)
{on_conflict} owner_epoch = semel_position.owner_epoch + 1, owner = ?
RETURNING next_offset, owner_epoch, owner
"""

_ADVANCE = f"""
UPDATE semel_position SET next_offset = ?, applied = applied + ?
WHERE {_ROW} AND owner_epoch = ? AND next_offset = ?
"""  # noqa: S608 - our own text

_SKIP = f"""
UPDATE semel_position SET next_offset = ?, owner_epoch = owner_epoch + 1, owner = ?
WHERE {_ROW} AND next_offset = ?
"""  # noqa: S608 - our own text

_FORGET_OTHERS = """
DELETE FROM semel_position WHERE sink = ? AND cluster_id = ? AND topic = ? AND part = ? AND topic_id <> ?
"""

_BEGIN = """
INSERT INTO semel_position (sink, cluster_id, topic_id, part, topic, next_offset, owner_epoch, owner, applied)
VALUES (?, ?, ?, ?, ?, ?, 1, ?, 0)
"""

_OTHER_TOPIC = """
SELECT topic_id, next_offset FROM semel_position
WHERE sink = ? AND cluster_id = ? AND topic = ? AND part = ? AND topic_id <> ? ORDER BY topic_id
"""


def take_over(
    database: Database, sink: str, cluster_id: str, claims: Sequence[Claim], owner: str
) -> dict[Claim, PositionRow | Stop]:
    """Raise the owner epoch of each partition, and only then read its position; rows that are new are made.

    A partition that this sink knows under another topic id stops: its offsets say nothing about the new topic.
    """
    taken: dict[Claim, PositionRow | Stop] = {}
    on_conflict = dialect_of(database.title).on_conflict.format(key=", ".join(PositionKey._fields))
    statement = _TAKE_OVER.format(on_conflict=on_conflict)
    for claim in sorted(claims, key=lambda claim: (str(claim.topic_id), claim.partition.partition)):
        topic, part = claim.partition
        key = PositionKey(sink, cluster_id, str(claim.topic_id), part)
        if read(database, key) is None:
            others = database.query(_OTHER_TOPIC, (sink, cluster_id, topic, part, key.topic_id))
            if others:
                taken[claim] = _recreated(claim, *others[0])
                continue
        rows = database.query(statement, (*key, topic, claim.log_start_offset, owner, owner))
        taken[claim] = PositionRow(*rows[0])
    return taken


def _recreated(claim: Claim, old_id: str, next_offset: int) -> Stop:
    return Stop(
        StopReason.TOPIC_RECREATED,
        f"the sink was at offset {next_offset} of topic id {old_id}, but topic {claim.partition.topic} now has id "
        f"{claim.topic_id}: it was deleted and made again. If the new topic is to be read from its start, run "
        f"semel accept-gap; if the old records are in it once more, they would be applied twice.",
    )


def advance(
    database: Database, key: PositionKey, *, owner_epoch: int, from_offset: int, to_offset: int, records: int
) -> bool:
    """Move the position, if it is still `from_offset` and still ours. This is the fence, so it comes first."""
    return database.execute(_ADVANCE, (to_offset, records, *key, owner_epoch, from_offset)) == 1


def read(database: Database, key: PositionKey, *, lock: bool = False) -> PositionRow | None:
    """The row as it is committed. With `lock` a transaction that is just changing it is waited for."""
    suffix = database.lock_rows if lock else ""
    rows = database.query(
        f"SELECT next_offset, owner_epoch, owner FROM semel_position WHERE {_ROW}{suffix}",  # noqa: S608
        key,
    )
    return PositionRow(*rows[0]) if rows else None


def of_others(database: Database, key: PositionKey, topic: str) -> list[tuple[int, str]]:
    """Positions in topics of the same name that were there before this one, with their ids."""
    rows = database.query(_OTHER_TOPIC, (key.sink, key.cluster_id, topic, key.part, key.topic_id))
    return [(next_offset, topic_id) for topic_id, next_offset in rows]


def skip(database: Database, key: PositionKey, *, from_offset: int, to_offset: int, owner: str) -> bool:
    """An operator lets a sink go on behind records that are gone; whoever owns the row is fenced. Whether it was so."""
    return database.execute(_SKIP, (to_offset, owner, *key, from_offset)) == 1


def begin_anew(database: Database, key: PositionKey, topic: str, offset: int, owner: str) -> bool:
    """An operator lets a sink read a topic that was made again; what it knew of the old one is forgotten."""
    if read(database, key, lock=True) is not None:
        return False
    database.execute(_FORGET_OTHERS, (key.sink, key.cluster_id, topic, key.part, key.topic_id))
    return database.execute(_BEGIN, (*key, topic, offset, owner)) == 1


def owners(database: Database) -> set[str]:
    """Everybody who owns a row of any sink in this database."""
    return {owner for (owner,) in database.query("SELECT DISTINCT owner FROM semel_position")}

"""What operators do to an outbox: look, hold, release, publish again, say that the database was restored.

Each verb is one transaction of the database and leaves a row in `semel_outbox_audit`; with `dry_run` it is rolled back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from semel.databases.database import Database, without_password
from semel.errors import ConfigurationError
from semel.outbox.rows import MSG_ID_HEADER, SHARDS, encode_headers, lane_of, shard_of
from semel.outbox.tables import read_meta
from semel.types import Record

__all__ = ["REPUBLISH_MAX", "Operator", "Selection", "declare_restored", "hold", "release", "republish", "status"]

REPUBLISH_MAX = 10_000
"""Records of one `republish`: they are one transaction of the database."""
SUPERSEDES_HEADER = "semel-supersedes"

_MATCHES = (
    "(r.topic IS NULL OR r.topic = {table}.topic) AND (r.record_key IS NULL OR r.record_key = {table}.record_key)"
)
_STILL_HELD = "SELECT 1 FROM semel_outbox_hold r WHERE " + _MATCHES.format(table="semel_outbox")  # noqa: S608


@dataclass(frozen=True, slots=True)
class Operator:
    """Who does it, why, and when (milliseconds since 1970)."""

    name: str
    reason: str
    now_ms: int
    dry_run: bool = False


class Selection(NamedTuple):
    """Which rows: those of a topic, of a key, of both, or those of the key of one message."""

    topic: str | None = None
    key: bytes | None = None
    msg_id: str | None = None


def status(database: Database) -> list[dict[str, Any]]:
    """A line for each lane, and one for each hold."""
    meta = read_meta(database)
    rows = {lane: [0, 0, 0] for lane in range(meta.lanes)}
    found = database.query(
        "SELECT shard, COUNT(*), COUNT(held), MIN(CASE WHEN held IS NULL THEN created_at END) "
        "FROM semel_outbox GROUP BY shard"
    )
    for shard, count, held, oldest in found:
        lane = rows[lane_of(shard, meta.lanes)]
        lane[0] += count
        lane[1] += held
        lane[2] = min(lane[2] or oldest or 0, oldest or lane[2] or 0)
    lines: list[dict[str, Any]] = [
        {
            "what": f"lane {lane}",
            "owner": owner,
            "owner_epoch": epoch,
            "batch": batch,
            "rows": rows[lane][0],
            "held": rows[lane][1],
            "oldest_ms": rows[lane][2] or None,
        }
        for lane, owner, epoch, batch in database.query(
            "SELECT lane, owner, owner_epoch, batch FROM semel_outbox_lane ORDER BY lane"
        )
    ]
    rules = database.query(
        "SELECT hold_id, topic, record_key, reason, requested_by, requested_at FROM semel_outbox_hold "
        "ORDER BY requested_at, hold_id"
    )
    for _, topic, key, reason, who, at in rules:
        lines.append(
            {
                "what": "hold",
                "topic": topic,
                "key": None if key is None else bytes(key).decode(errors="backslashreplace"),
                "reason": reason,
                "requested_by": who,
                "requested_at": at,
            }
        )
    return lines


def hold(database: Database, chosen: Selection, operator: Operator) -> int:
    """Publish no rows of `chosen` from now on, not those that come later either; how many are there now.

    A row that a relay has read already may still go out. Raises `ConfigurationError` when nothing is named or there
    is no such message.
    """
    with _verb(database, "hold", chosen, operator) as audit:
        selected = _resolved(database, chosen)
        if selected.key is None and chosen.msg_id is not None:
            count = database.execute(
                "UPDATE semel_outbox SET held = ? WHERE msg_id = ?", (operator.reason, chosen.msg_id)
            )
        else:
            database.execute(
                "INSERT INTO semel_outbox_hold (hold_id, topic, record_key, reason, requested_by, requested_at) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (database.new_id(), selected.topic, selected.key, operator.reason, operator.name, operator.now_ms),
            )
            where, parameters = _where(selected)
            count = database.execute(
                f"UPDATE semel_outbox SET held = ? WHERE held IS NULL AND {where}",  # noqa: S608
                (operator.reason, *parameters),
            )
        audit(count)
    return count


def release(database: Database, chosen: Selection, operator: Operator) -> int:
    """Publish the rows of `chosen` again; how many there are. What another hold is about stays.

    Of a topic all holds go, also those of its keys. The rows of a key are published in their order.
    """
    with _verb(database, "release", chosen, operator) as audit:
        selected = _resolved(database, chosen)
        # Locked first: a relay that is just marking rows by these holds does it before or not at all.
        database.query(f"SELECT hold_id FROM semel_outbox_hold{database.lock_rows}")  # noqa: S608
        where, parameters = _where(selected)
        if selected.key is not None or chosen.msg_id is None:
            database.execute(f"DELETE FROM semel_outbox_hold WHERE {where}", parameters)  # noqa: S608
        else:
            where, parameters = "msg_id = ?", (chosen.msg_id,)
        count = database.execute(
            f"UPDATE semel_outbox SET held = NULL WHERE held IS NOT NULL AND {where} "  # noqa: S608
            f"AND NOT EXISTS ({_STILL_HELD})",
            parameters,
        )
        audit(count)
    return count


def republish(database: Database, records: Sequence[Record], operator: Operator) -> int:
    """Send records again that are in Kafka: as new ones, each of which names the one that it stands for.

    Raises `ConfigurationError` for more than `REPUBLISH_MAX`.
    """
    if len(records) > REPUBLISH_MAX:
        raise ConfigurationError(f"{len(records)} records are more than {REPUBLISH_MAX}: publish them in parts.")
    rows = []
    for record in records:
        own = [value for name, value in record.headers if name == MSG_ID_HEADER and value is not None]
        place = f"{record.topic}/{record.partition}/{record.offset}".encode()
        headers = [item for item in record.headers if item[0] not in (MSG_ID_HEADER, SUPERSEDES_HEADER)]
        headers.append((SUPERSEDES_HEADER, own[0] if own else place))
        msg_id = database.new_id()
        shard = shard_of(record.key, msg_id)
        text = encode_headers(headers)
        rows.append((shard, msg_id, record.topic, record.key, record.value, text, operator.now_ms))
    with _verb(database, "republish", Selection(records[0].topic if records else None), operator) as audit:
        database.executemany(
            "INSERT INTO semel_outbox (shard, msg_id, topic, record_key, record_value, headers, created_at) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            rows,
        )
        audit(len(rows))
    return len(rows)


def declare_restored(database: Database, operator: Operator) -> str:
    """Say that the database was put back to an earlier state; its new incarnation.

    Every lane is compared with its topics before anything is sent; relays that are at work notice with their next
    deletion, and take their lanes over anew.
    """
    with _verb(database, "declare-restored", Selection(), operator) as audit:
        incarnation = database.new_id()
        database.execute("UPDATE semel_outbox_meta SET incarnation = ?", (incarnation,))
        database.execute("UPDATE semel_outbox_lane SET owner_epoch = owner_epoch + 1")
        audit(SHARDS)
    return incarnation


@contextmanager
def _verb(database: Database, verb: str, chosen: Selection, operator: Operator) -> Iterator[Callable[[int], None]]:
    read_meta(database)
    details: dict[str, Any] = {
        "topic": chosen.topic,
        "key": None if chosen.key is None else chosen.key.decode(errors="backslashreplace"),
        "msg_id": chosen.msg_id,
    }

    def audit(count: int) -> None:
        database.execute(
            "INSERT INTO semel_outbox_audit (audit_id, verb, details, requested_by, reason, requested_at) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            (
                database.new_id(),
                verb,
                msgspec.json.encode(details | {"rows": count}).decode(),
                operator.name,
                operator.reason,
                operator.now_ms,
            ),
        )

    database.begin()
    try:
        yield audit
        if not operator.dry_run:
            database.commit()
    finally:
        database.rollback()


def _resolved(database: Database, chosen: Selection) -> Selection:
    """The topic and key of a message, where one is named."""
    if chosen.msg_id is None:
        if chosen.topic is None and chosen.key is None:
            raise ConfigurationError("Which rows? Name a topic, a key or a message.")
        return chosen
    rows = database.query("SELECT topic, record_key FROM semel_outbox WHERE msg_id = ?", (chosen.msg_id,))
    if not rows:
        raise ConfigurationError(
            f"no row of message {chosen.msg_id} is in the outbox of {without_password(database.url)}: it is in Kafka, "
            "or was never written."
        )
    topic, key = rows[0]
    return Selection(topic, None if key is None else bytes(key))


def _where(chosen: Selection) -> tuple[str, tuple[Any, ...]]:
    named = {"topic = ?": chosen.topic, "record_key = ?": chosen.key}
    conditions = {text: value for text, value in named.items() if value is not None}
    return " AND ".join(conditions), tuple(conditions.values())

"""The relay's statements, where the databases say them differently: lists of rows and numbers as parameters."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from semel.outbox.limits import READ_BYTES, SMALL_BYTES
from semel.outbox.manifest import RowId

__all__ = ["Statement", "delete_rows", "delete_rows_at", "hold_rows", "read_rows", "rows_in"]

Statement = tuple[str, tuple[Any, ...]]

_LIST_MAX = 500
"""Rows of one IN list, where a database takes no list as one parameter."""

_PLAIN = re.compile(r"[0-9a-zA-Z-]*")
_COLUMNS = "shard, seq, msg_id, topic, record_key, record_value, headers, created_at"
_ADDRESS = {"PostgreSQL": "ctid::text"}

_RULED = """
    CASE WHEN h.rules > 0 AND EXISTS (
      SELECT 1 FROM semel_outbox_hold r
      WHERE (r.topic IS NULL OR r.topic = o.topic) AND (r.record_key IS NULL OR r.record_key = o.record_key)
    ) THEN 1 ELSE 0 END AS is_ruled
"""
_FROM = """
  FROM (
    SELECT {columns}, {address} AS address,
      COALESCE(LENGTH(record_value), 0) + COALESCE(LENGTH(record_key), 0) + LENGTH(headers) AS size
    FROM semel_outbox WHERE {shards} AND held IS NULL{without} ORDER BY shard, seq LIMIT ?
  ) o CROSS JOIN (SELECT COUNT(*) AS rules FROM semel_outbox_hold) h
"""
_READ_SMALL = f"""
SELECT shard, seq, msg_id, topic, CASE WHEN size <= {SMALL_BYTES} THEN record_key END,
  CASE WHEN size <= {SMALL_BYTES} THEN record_value END, CASE WHEN size <= {SMALL_BYTES} THEN headers ELSE '' END,
  created_at, size, {_RULED}, address {_FROM}
ORDER BY shard, seq
"""
_READ = f"""
SELECT {{columns}}, size, is_ruled, address FROM (
  SELECT o.*, {_RULED}, SUM(o.size) OVER (ORDER BY o.shard, o.seq) AS total {_FROM}
) x WHERE total - size < {READ_BYTES} ORDER BY shard, seq
"""  # noqa: S608
# `is_ruled` comes from the same snapshot as the row. Asked for apart, a hold that was released in between would let a
# row overtake those of its key that were held until then.


def read_rows(title: str, shards: Sequence[int], without: Collection[int], limit: int, *, is_small: bool) -> Statement:
    """The next rows of these shards, in order, as the fields of `OutboxRow`; at most `limit`.

    With `is_small` those of more than `SMALL_BYTES` come without key, value and headers. Else so many come that all but
    the last have less than `READ_BYTES`, for which the database has to add up every row's size: that is slower.
    """
    where, parameters = rows_in(title, "shard", shards)
    excluded = ""
    if without:
        inside, more = rows_in(title, "seq", sorted(without))
        excluded, parameters = f" AND NOT ({inside})", parameters + more
    sql = (_READ_SMALL if is_small else _READ).format(
        columns=_COLUMNS, address=_ADDRESS.get(title, "''"), shards=where, without=excluded
    )
    return sql, (*parameters, limit)


def rows_in(title: str, column: str, numbers: Sequence[int]) -> Statement:
    """The condition that a column is one of these numbers."""
    if title == "PostgreSQL":
        # As text: psycopg takes over 2 us for each element of a list.
        return f"{column} = ANY(?::bigint[])", (f"{{{','.join(map(str, numbers))}}}",)
    if title == "SQLite":
        return f"{column} IN (SELECT value FROM json_each(?))", (json.dumps(list(numbers)),)  # noqa: S608
    return f"{column} IN ({', '.join('?' * len(numbers))})", tuple(numbers)


_DELETE_AT = """
DELETE FROM semel_outbox WHERE ctid = ANY(?::tid[]) AND seq + 0 = ANY(?::bigint[]) AND msg_id = ANY(?::text[])
"""  # seq + 0: an index on numbers is of no use here.


def delete_rows_at(addresses: Sequence[str], rows: Sequence[RowId]) -> Statement | None:
    """PostgreSQL: delete exactly these rows where they were when they were read, in the order of the table's pages.

    Rows that were moved since are left. There is no statement when an id is none of ours. A number is given once while
    a session lasts: so a row whose number is in the list has the id that belongs to it.
    """
    ids = [row.msg_id for row in rows]
    if not _PLAIN.fullmatch("".join(ids)):
        return None
    places = ",".join([f'"{address}"' for address in addresses])
    numbers = ",".join([str(row.seq) for row in rows])
    return _DELETE_AT, (f"{{{places}}}", f"{{{numbers}}}", f"{{{','.join(ids)}}}")


def delete_rows(title: str, rows: Sequence[RowId]) -> Iterator[Statement]:
    """Delete exactly these rows: the number and the id have to be theirs. Never a range."""
    yield from _on_rows(title, rows, "DELETE FROM semel_outbox", ())


def hold_rows(title: str, rows: Sequence[RowId], reason: str) -> Iterator[Statement]:
    """Mark exactly these rows as held."""
    yield from _on_rows(title, rows, "UPDATE semel_outbox SET held = ?", (reason,))


def _on_rows(title: str, rows: Sequence[RowId], verb: str, first: tuple[Any, ...]) -> Iterator[Statement]:
    if title == "PostgreSQL":
        listed = "SELECT (r ->> 0)::smallint, (r ->> 1)::bigint, r ->> 2 FROM json_array_elements(?::json) r"
        yield f"{verb} WHERE (shard, seq, msg_id) IN ({listed})", (*first, json.dumps(rows))
    elif title == "SQLite":
        listed = "SELECT value ->> 0, value ->> 1 FROM json_each(?)"
        pairs = json.dumps([(row.seq, row.msg_id) for row in rows])
        yield f"{verb} WHERE (seq, msg_id) IN ({listed})", (*first, pairs)
    else:
        for start in range(0, len(rows), _LIST_MAX):
            part = rows[start : start + _LIST_MAX]
            listed = ", ".join(["(?, ?, ?)"] * len(part))
            yield (
                f"{verb} WHERE (shard, seq, msg_id) IN ({listed})",
                (*first, *(field for row in part for field in row)),
            )

"""Answers as plain values that two brokers can be compared by.

What each broker makes up by itself (producer ids, topic ids, member ids, its clock) stands in an answer under the name
that the program gave it when it first saw it; a value that no step ever gave a name is "?".
"""

from __future__ import annotations

import time
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from semel.errors import CorruptBatch
from semel.wire.records import decode_records, iter_batches

__all__ = ["Names", "plain"]

HOUR_MS = 3_600_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_CLOCK = {
    "log_append_time",
    "timestamp",
    "last_timestamp",
    "transaction_start_time",
    "base_timestamp",
    "max_timestamp",
}
_LEFT_OUT = {"throttle_time", "error_message", "batch_index_error_message", "cluster_id", "host", "port", "rack"}
"""Its own words for an error, and its address, are each broker's own business."""


def _number(value: Any) -> Any:
    if isinstance(value, timedelta):
        return round(value / timedelta(milliseconds=1))
    if isinstance(value, datetime):
        return round((value - _EPOCH) / timedelta(milliseconds=1))
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    return int(value)


def plain(value: Any) -> Any:
    """A decoded message as dicts, lists, numbers, strings, bytes and UUIDs; record batches decoded."""
    if is_dataclass(value):
        found = {item.name: plain(getattr(value, item.name)) for item in fields(value)}
        if found.get("records") is not None:
            found["records"] = _batches(found["records"])
        return found
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return _number(value)


def _batches(data: bytes) -> tuple[Any, ...]:
    """Every whole batch, in order: header fields and records. A tuple, because here the order counts."""
    found = []
    for at, header in iter_batches(data):
        item: dict[str, Any] = {
            name: getattr(header, name)
            for name in (
                "base_offset",
                "partition_leader_epoch",
                "attributes",
                "last_offset_delta",
                "base_timestamp",
                "max_timestamp",
                "producer_id",
                "producer_epoch",
                "base_sequence",
                "record_count",
            )
        }
        try:
            item["content"] = tuple(
                (record.offset, {"timestamp": record.timestamp_ms}, record.key, record.value, record.headers)
                for record in decode_records(data, at, header, "", 0)
            )
        except CorruptBatch as problem:
            item["content"] = f"unreadable: {problem}"
        found.append(item)
    return tuple(found)


class Names:
    """What one broker made up during one program, and how the program calls it."""

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._names: dict[tuple[str, Any], str] = {}

    def give(self, kind: str, value: Any, name: str) -> None:
        """Call `value` so from now on, unless it has a name."""
        self._names.setdefault((kind, value), name)

    def _name(self, kind: str, value: Any) -> str:
        return self._names.get((kind, value), f"?{kind}")

    def of(self, answer: Any) -> Any:
        """The answer with names in it; arrays are sorted, because their order is nobody's promise."""
        return self._of("", answer)

    def _of(self, field: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self._of(name, item) for name, item in value.items() if name not in _LEFT_OUT}
        if isinstance(value, list):
            return sorted((self._of(field, item) for item in value), key=repr)
        if isinstance(value, tuple):
            return tuple(self._of(field, item) for item in value)
        if isinstance(value, UUID):
            return self._name("topic", value)
        if isinstance(value, str):
            return self._text(field, value)
        if isinstance(value, int):
            return self._int(field, value)
        return value

    def _int(self, field: str, value: int) -> Any:
        if field.endswith("producer_id") and value > 0:
            return self._name("producer", value)
        if field == "session_id" and value > 0:
            return self._name("session", value)
        if field in _CLOCK and abs(value - time.time() * 1000) < HOUR_MS:
            return "now"
        return value

    def _text(self, field: str, value: str) -> str:
        if value and field in ("member_id", "leader"):
            return self._name("member", value)
        return value.replace(self._mark, "~")

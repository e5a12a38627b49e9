"""The Produce request, and the Produce and Fetch responses, walked by hand.

These three carry record batches; everywhere else `semel.wire.messages` is fast enough. Reading by hand leaves the
batches where they were received, and writing by hand leaves them in their files. Layouts: ProduceRequest.json,
ProduceResponse.json, FetchResponse.json of Apache Kafka 4.3.1.
"""

from __future__ import annotations

import struct
from functools import cache
from struct import Struct
from typing import NamedTuple
from uuid import UUID

from semel.broker.exchange import Parts
from semel.errors import ProtocolError
from semel.log.log import Slice

__all__ = [
    "FetchedPartition",
    "ProducePartition",
    "ProduceRequest",
    "ProducedPartition",
    "fetch_response",
    "produce_response",
    "read_produce_request",
]

_I16 = Struct(">h")
_I32 = Struct(">i")
_ACKS_TIMEOUT = Struct(">hi")
_ZERO_UUID = bytes(16)


class ProducePartition(NamedTuple):
    """One partition of a Produce request; `records` is a view of the request's own bytes, None where it was null."""

    partition: int
    records: memoryview | None


class ProduceRequest(NamedTuple):
    """A Produce request. Topics are given by name up to v12 and by id from v13 on."""

    transactional_id: str | None
    acks: int
    topics: list[tuple[str | UUID | None, list[ProducePartition]]]


class ProducedPartition(NamedTuple):
    """One partition of a Produce response."""

    partition: int
    error: int
    base_offset: int = -1
    log_append_time_ms: int = -1
    log_start_offset: int = -1
    message: str | None = None
    faulty_records: tuple[int, ...] = ()
    """Indexes in the batch; a client fails these for good and may send the others again (KIP-467)."""


class FetchedPartition(NamedTuple):
    """One partition of a Fetch response. `aborted` is None for read_uncommitted: null on the wire, not empty."""

    partition: int
    error: int
    high_watermark: int = -1
    last_stable_offset: int = -1
    log_start_offset: int = -1
    aborted: list[tuple[int, int]] | None = None
    slices: tuple[Slice, ...] = ()


class _Walker:
    """Positions in a request; every read checks that it stays inside."""

    __slots__ = ("at", "flexible", "view")

    def __init__(self, view: memoryview, at: int, flexible: bool) -> None:
        self.view = view
        self.at = at
        self.flexible = flexible

    def uvarint(self) -> int:
        value = shift = 0
        while True:
            byte = self.view[self.at]
            self.at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 28:
                raise ProtocolError("a varint of a Produce request is too long")

    def i32(self) -> int:
        value: int = _I32.unpack_from(self.view, self.at)[0]
        self.at += 4
        return value

    def count(self) -> int:
        """Number of elements; null counts as none. Each element has at least 4 bytes, which bounds it."""
        count = self.uvarint() - 1 if self.flexible else self.i32()
        if count > (len(self.view) - self.at) // 4:
            raise ProtocolError(f"a Produce request announces {count} elements in {len(self.view) - self.at} bytes")
        return max(count, 0)

    def take(self, size: int) -> memoryview | None:
        if size < 0:
            return None
        end = self.at + size
        if end > len(self.view):
            raise ProtocolError("a field of a Produce request runs past the end of the frame")
        taken = self.view[self.at : end]
        self.at = end
        return taken

    def string(self) -> str | None:
        if self.flexible:
            size = self.uvarint() - 1
        else:
            size = _I16.unpack_from(self.view, self.at)[0]
            self.at += 2
        taken = self.take(size)
        return None if taken is None else str(taken, "utf-8")

    def records(self) -> memoryview | None:
        return self.take(self.uvarint() - 1 if self.flexible else self.i32())

    def uuid(self) -> UUID | None:
        taken = bytes(self.view[self.at : self.at + 16])
        self.at += 16
        return None if taken == _ZERO_UUID else UUID(bytes=taken)

    def tags(self) -> None:
        if self.flexible:
            for _ in range(self.uvarint()):
                self.uvarint()
                self.take(self.uvarint())


def read_produce_request(view: memoryview, at: int, version: int) -> ProduceRequest:
    """Read a Produce request whose body begins at `at`. Raises `ProtocolError`."""
    walker = _Walker(view, at, version >= 9)
    try:
        transactional_id = walker.string()
        acks, _ = _ACKS_TIMEOUT.unpack_from(view, walker.at)
        walker.at += _ACKS_TIMEOUT.size
        topics: list[tuple[str | UUID | None, list[ProducePartition]]] = []
        for _ in range(walker.count()):
            topic = walker.uuid() if version >= 13 else walker.string()
            partitions = []
            for _ in range(walker.count()):
                index = walker.i32()
                partitions.append(ProducePartition(index, walker.records()))
                walker.tags()
            walker.tags()
            topics.append((topic, partitions))
        walker.tags()
    except (struct.error, IndexError, ValueError) as error:
        raise ProtocolError(f"a Produce request of version {version} cannot be read: {error}") from error
    return ProduceRequest(transactional_id, acks, topics)


def _uvarint(value: int) -> bytes:
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _count(count: int, flexible: bool) -> bytes:
    return _uvarint(count + 1) if flexible else _I32.pack(count)


def _string(text: str | None, flexible: bool) -> bytes:
    if text is None:
        return b"\0" if flexible else b"\xff\xff"
    data = text.encode()
    return (_uvarint(len(data) + 1) if flexible else _I16.pack(len(data))) + data


def _topic(topic: str | UUID | None, flexible: bool) -> bytes:
    if isinstance(topic, str):
        return _string(topic, flexible)
    return _ZERO_UUID if topic is None else topic.bytes


def _head(correlation_id: int, flexible: bool) -> bytes:
    return _I32.pack(correlation_id) + (b"\0" if flexible else b"")


_PRODUCED_V2 = Struct(">ihqq")  # Index, error, base offset, log append time.
_PRODUCED_V5 = Struct(">ihqqq")  # The same and the log start offset.


def _faulty_records(item: ProducedPartition, flexible: bool) -> bytes:
    if not item.faulty_records:
        return _count(0, flexible)
    one = _string(item.message, flexible) + (b"\0" if flexible else b"")
    records = [_I32.pack(index) + one for index in item.faulty_records]
    return _count(len(records), flexible) + b"".join(records)


def produce_response(
    version: int, correlation_id: int, topics: list[tuple[str | UUID | None, list[ProducedPartition]]]
) -> bytes:
    """A whole Produce response frame."""
    flexible = version >= 9
    out = [_head(correlation_id, flexible), _count(len(topics), flexible)]
    for topic, partitions in topics:
        out += (_topic(topic, flexible), _count(len(partitions), flexible))
        for item in partitions:
            if version >= 5:
                out.append(_PRODUCED_V5.pack(*item[:5]))
            else:
                out.append(_PRODUCED_V2.pack(*item[:4]))
            if version >= 8:
                out += (_faulty_records(item, flexible), _string(item.message, flexible))
            if flexible:
                out.append(b"\0")
        if flexible:
            out.append(b"\0")
    out.append(b"\0\0\0\0\0" if flexible else b"\0\0\0\0")  # No throttling, and no tags.
    body = b"".join(out)
    return _I32.pack(len(body)) + body


_FETCHED_V4 = Struct(">ihqq")  # Index, error, high watermark, last stable offset.
_FETCHED_V5 = Struct(">ihqqq")  # The same and the log start offset.
_ERROR_SESSION = Struct(">hi")
_ABORTED = Struct(">qq")
_NO_REPLICA = _I32.pack(-1)


@cache
def _nothing(version: int, is_null: bool) -> bytes:
    """No aborted transactions, null or an empty list, and no records: what most partitions have to say."""
    flexible = version >= 12
    aborted = (b"\0" if flexible else b"\xff\xff\xff\xff") if is_null else _count(0, flexible)
    return aborted + (_NO_REPLICA if version >= 11 else b"") + _count(0, flexible)


def _fetched(item: FetchedPartition, version: int) -> bytes:
    head = _FETCHED_V5.pack(*item[:5]) if version >= 5 else _FETCHED_V4.pack(*item[:4])
    if not item.slices and not item.aborted:
        return head + _nothing(version, item.aborted is None)
    flexible = version >= 12
    out = [head]
    if item.aborted is None:
        out.append(b"\0" if flexible else b"\xff\xff\xff\xff")
    else:
        out.append(_count(len(item.aborted), flexible))
        for producer_id, first_offset in item.aborted:
            out.append(_ABORTED.pack(producer_id, first_offset))
            if flexible:
                out.append(b"\0")
    if version >= 11:
        out.append(_NO_REPLICA)
    size = sum(part.length for part in item.slices)
    out.append(_uvarint(size + 1) if flexible else _I32.pack(size))
    return b"".join(out)


def fetch_response(
    version: int,
    correlation_id: int,
    topics: list[tuple[str | UUID | None, list[FetchedPartition]]],
    *,
    error: int = 0,
    session_id: int = 0,
) -> Parts:
    """A whole Fetch response frame; the records stay in their files."""
    flexible = version >= 12
    parts: Parts = []
    total = 0
    pending = [_head(correlation_id, flexible), b"\0\0\0\0"]
    if version >= 7:
        pending.append(_ERROR_SESSION.pack(error, session_id))
    pending.append(_count(len(topics), flexible))
    for topic, partitions in topics:
        pending += (_topic(topic, flexible), _count(len(partitions), flexible))
        for item in partitions:
            pending.append(_fetched(item, version))
            if item.slices:
                data = b"".join(pending)
                pending = []
                parts.append(data)
                parts += item.slices
                total += len(data) + sum(part.length for part in item.slices)
            if flexible:
                pending.append(b"\0")
        if flexible:
            pending.append(b"\0")
    if flexible:
        pending.append(b"\0")
    data = b"".join(pending)
    total += len(data)
    if data:
        parts.append(data)
    first = parts[0]
    assert isinstance(first, bytes)
    parts[0] = _I32.pack(total) + first
    return parts

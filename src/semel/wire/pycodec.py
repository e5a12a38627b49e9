"""The record codec in pure Python: the reference, and what runs where the one in C (`_codec.c`) could not be built.

Varints come from a table, each record is one join; in the decoder the varints of one and two bytes, which is most of
them, are read in line, because a call for each would double the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from struct import unpack_from
from typing import NoReturn

from semel.errors import CorruptBatch
from semel.types import Header, Record

__all__ = ["decode", "encode", "encode_record", "murmur2", "partition"]

Buffer = bytes | bytearray | memoryview

Output = tuple[int | None, bytes | None, bytes | None, int, Sequence[Header]]
"""A record to encode: partition (None: its key decides), key, value, milliseconds since 1970, headers."""
Body = tuple[int, int, int, int, bytes]
"""Encoded records of one batch: partition, number of records, first and newest timestamp, bytes."""

_BATCH_OVERHEAD = 61
_MIN_RECORD_BYTES = 7
"""Length, attributes, timestamp delta, offset delta, key length, value length, header count: one byte each."""
_TOO_LONG = "timestamps and their differences must fit in 64 bits"

# --- Encoding ---


def _varint(value: int) -> bytes:
    """A zig-zag varint of up to 64 bits. Raises `ValueError` for numbers that need more."""
    if not -(1 << 63) <= value < 1 << 63:
        raise ValueError(_TOO_LONG)
    rest = value << 1 if value >= 0 else ~(value << 1)
    encoded = bytearray()
    while rest > 0x7F:
        encoded.append(rest & 0x7F | 0x80)
        rest >>= 7
    encoded.append(rest)
    return bytes(encoded)


_VARINTS: list[bytes] = [
    *(bytes((n << 1,)) for n in range(1 << 6)),
    *(bytes((n << 1 & 0x7F | 0x80, n >> 6)) for n in range(1 << 6, 1 << 13)),
]
"""Most numbers are a look-up: the varints of one and two bytes. Those of three would cost every start 20 ms."""
_NULL = b"\x01"
"""The varint of -1: the length of a key or value that is None."""


def _number(value: int) -> bytes:
    return _VARINTS[value] if 0 <= value < len(_VARINTS) else _varint(value)


def _check(field: object) -> None:
    if not (field is None or isinstance(field, bytes)):
        raise TypeError("keys and values are bytes or None")


def _encode_headers(headers: Sequence[Header]) -> bytes:
    parts = [_number(len(headers))]
    for header in headers:
        if len(tuple(header)) != 2:
            raise ValueError("a header is a key and a value")
        key, value = header
        if not isinstance(key, str):
            raise TypeError("the key of a header is a str")
        name = key.encode()
        _check(value)
        parts += (_number(len(name)), name)
        parts += (_NULL,) if value is None else (_number(len(value)), value)
    return b"".join(parts)


def encode_record(
    timestamp_delta: int, offset_delta: int, key: bytes | None, value: bytes | None, headers: Sequence[Header]
) -> bytes:
    """One record with its length in front.

    Raises `ValueError` for a number of more than 64 bits or a header that is no pair, `TypeError` for a key or value
    that is not bytes.
    """
    tail = _encode_headers(headers) if headers else b"\0"
    varints = _VARINTS
    try:
        if type(key) is not bytes or type(value) is not bytes or timestamp_delta < 0:
            raise IndexError
        # One join a record beats adding up the lengths of its pieces.
        record = b"".join(
            (
                *(b"\0", varints[timestamp_delta], varints[offset_delta]),
                *(varints[len(key)], key, varints[len(value)], value, tail),
            )
        )
    except IndexError:  # None, what is not bytes, or a number that is negative or beyond the table.
        _check(key)
        _check(value)
        parts = [b"\0", _number(timestamp_delta), _number(offset_delta)]
        for field in (key, value):
            parts += (_NULL,) if field is None else (_number(len(field)), field)
        parts.append(tail)
        record = b"".join(parts)
    return _number(len(record)) + record


class _Body:
    """Records of one partition on their way into one batch."""

    __slots__ = ("base_timestamp", "max_timestamp", "partition", "parts", "size")

    def __init__(self, partition: int, timestamp_ms: int) -> None:
        self.partition = partition
        self.base_timestamp = self.max_timestamp = timestamp_ms
        self.parts: list[bytes] = []
        self.size = _BATCH_OVERHEAD


def encode(records: list[Output], partitions: int, limit: int) -> list[Body]:
    """Many records of one topic, each in the last batch of its partition: batches in the order in which they began.

    A batch, header included, has at most `limit` bytes or one record. Raises as `encode_record`, and `ValueError` for
    a record that has neither key nor partition, or a partition that is not among `partitions`.
    """
    if partitions < 1 or limit < 0:
        raise ValueError("partitions are counted from 1, bytes from 0")
    bodies: list[_Body] = []
    latest: dict[int, _Body] = {}
    for number, key, value, timestamp_ms, headers in records:
        if number is None:
            if key is None:
                raise ValueError("a record without a key needs a partition")
            number = partition(key, partitions)
        elif not 0 <= number < partitions:
            raise ValueError(f"there is no partition {number} among {partitions}")
        if not -(1 << 63) <= timestamp_ms < 1 << 63:
            raise ValueError(_TOO_LONG)
        body = latest.get(number)
        if body is not None:
            encoded = encode_record(timestamp_ms - body.base_timestamp, len(body.parts), key, value, headers)
        if body is None or body.size + len(encoded) > limit:
            encoded = encode_record(0, 0, key, value, headers)
            body = latest[number] = _Body(number, timestamp_ms)
            bodies.append(body)
        body.parts.append(encoded)
        body.size += len(encoded)
        if timestamp_ms > body.max_timestamp:
            body.max_timestamp = timestamp_ms
    return [
        (body.partition, len(body.parts), body.base_timestamp, body.max_timestamp, b"".join(body.parts))
        for body in bodies
    ]


# --- Keys to partitions ---

_SEED = 0x9747B28C
_M = 0x5BD1E995
_MASK = 0xFFFFFFFF


def murmur2(key: bytes) -> int:
    """MurmurHash2 with Kafka's seed, as an unsigned 32-bit number (`Utils.murmur2` in Java gives the signed one)."""
    if not isinstance(key, bytes):
        raise TypeError("a key that decides a partition is bytes")
    length = len(key)
    h = _SEED ^ length
    words = length // 4
    for k in unpack_from(f"<{words}I", key):
        k = k * _M & _MASK
        k ^= k >> 24
        h = (h * _M ^ k * _M) & _MASK
    tail = key[words * 4 :]
    if tail:
        h = (h ^ int.from_bytes(tail, "little")) * _M & _MASK
    h ^= h >> 13
    h = h * _M & _MASK
    return h ^ (h >> 15)


@lru_cache(maxsize=65_536)  # Keys repeat.
def partition(key: bytes, partitions: int) -> int:
    """The partition (from 0) of a record with this key."""
    if partitions < 1:
        raise ValueError("partitions are counted from 1")
    return (murmur2(key) & 0x7FFFFFFF) % partitions


# --- Decoding ---


def _corrupt(what: str) -> NoReturn:
    raise CorruptBatch(f"a record batch cannot be read: {what}")


def _long_varint(data: bytes, at: int) -> tuple[int, int]:
    """The raw (not yet zig-zag decoded) varint at `at`, and the position after it. Up to 64 bits."""
    raw = shift = 0
    while True:
        byte = data[at]
        at += 1
        raw |= (byte & 0x7F) << shift
        if byte < 0x80:
            if raw >> 64:
                _corrupt("a varint has more than 64 bits")
            return raw, at
        shift += 7
        if shift > 63:
            _corrupt("a varint has more than 10 bytes")


def _read_field(data: bytes, at: int, stop: int) -> tuple[bytes | None, int]:
    """A length and that many bytes; the length -1 stands for None."""
    raw, at = _long_varint(data, at)
    if raw & 1:
        if raw != 1:
            _corrupt("a length is negative")
        return None, at
    end = at + (raw >> 1)
    if end > stop:
        _corrupt("a field runs past the end of its record")
    return data[at:end], end


def _read_headers(data: bytes, at: int, stop: int) -> tuple[tuple[Header, ...], int]:
    raw, at = _long_varint(data, at)
    if raw & 1 or raw > stop - at:  # Each header has two bytes or more, and `raw` is twice their number.
        _corrupt("the number of headers is impossible")
    headers: list[Header] = []
    for _ in range(raw >> 1):
        name, at = _read_field(data, at, stop)
        if name is None:
            _corrupt("a header has no key")
        value, at = _read_field(data, at, stop)
        headers.append((name.decode(), value))
    return tuple(headers), at


def decode(
    buffer: Buffer,
    start: int,
    stop: int,
    count: int,
    base_offset: int,
    base_timestamp: int,
    append_time: int | None,
    last_offset_delta: int,
    topic: str,
    partition: int,
) -> list[Record]:
    """The `count` records that are encoded in `buffer[start:stop]`, uncompressed.

    `append_time` is every record's timestamp, None when each has its own. Raises `CorruptBatch`, or
    `UnicodeDecodeError` for the key of a header.
    """
    if start < 0 or stop < start or stop > len(buffer):
        raise ValueError("the records do not lie in the buffer")
    data = bytes(memoryview(buffer)[start:stop])
    if not 0 <= count * _MIN_RECORD_BYTES <= len(data):
        _corrupt(f"{count} records cannot be in {len(data)} bytes")
    try:
        return _decode(data, count, base_offset, base_timestamp, append_time, last_offset_delta, topic, partition)
    except IndexError:
        _corrupt("it ends within a record")


def _decode(
    data: bytes,
    count: int,
    base_offset: int,
    base_timestamp: int,
    append_time: int | None,
    last_offset_delta: int,
    topic: str,
    partition: int,
) -> list[Record]:
    records: list[Record] = []
    add, new = records.append, tuple.__new__
    at, size, last_delta = 0, len(data), -1
    key: bytes | None
    value: bytes | None
    for _ in range(count):
        raw = data[at]
        if raw < 0x80:
            at += 1
        elif (high := data[at + 1]) < 0x80:
            raw = raw & 0x7F | high << 7
            at += 2
        else:
            raw, at = _long_varint(data, at)
        stop = at + (raw >> 1)
        if raw & 1 or stop > size:
            _corrupt("a record runs past the end of its batch")

        raw = data[at + 1]  # Behind the record's attributes, which are unused.
        if raw < 0x80:
            at += 2
        else:
            raw, at = _long_varint(data, at + 1)
        timestamp = append_time if append_time is not None else base_timestamp + ((raw >> 1) ^ -(raw & 1))

        raw = data[at]
        if raw < 0x80:
            at += 1
        elif (high := data[at + 1]) < 0x80:
            raw = raw & 0x7F | high << 7
            at += 2
        else:
            raw, at = _long_varint(data, at)
        delta = raw >> 1
        if raw & 1 or delta <= last_delta:
            _corrupt("offsets do not increase")
        last_delta = delta

        raw = data[at]
        if raw < 0x80 and not raw & 1:
            begin = at + 1
            at = begin + (raw >> 1)
            if at > stop:
                _corrupt("a field runs past the end of its record")
            key = data[begin:at]
        else:
            key, at = _read_field(data, at, stop)

        raw = data[at]
        if raw >= 0x80 and (high := data[at + 1]) < 0x80 and not raw & 1:
            begin = at + 2
            at = begin + ((raw & 0x7F | high << 7) >> 1)
            if at > stop:
                _corrupt("a field runs past the end of its record")
            value = data[begin:at]
        else:
            value, at = _read_field(data, at, stop)

        headers: tuple[Header, ...] = ()
        if data[at]:
            headers, at = _read_headers(data, at, stop)
        else:
            at += 1
        if at != stop:
            _corrupt("a record does not end where its length says")
        add(new(Record, (topic, partition, base_offset + delta, timestamp, key, value, headers)))
    if at != size:
        _corrupt("bytes are left after its last record")
    if last_delta > last_offset_delta:
        _corrupt("a record's offset lies beyond its batch")
    return records

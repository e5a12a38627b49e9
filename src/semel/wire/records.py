"""Record batches, version 2: the unit in which records travel and lie in a log (KIP-98).

A batch is a header of 61 bytes and its records, which may be compressed as one block. The checksum (CRC-32C) covers
the bytes from 21 on, so a broker sets the base offset and the leader epoch without touching the rest.

Encoding is the hot path of every producer: varints come from a table, the pieces of all records are collected in one
list, and joined once when the batch is built.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from struct import Struct, error, pack_into
from typing import NamedTuple, NoReturn

from crc32c import crc32c

from semel.errors import CorruptBatch
from semel.types import Header, Record
from semel.wire.compression import MAX_DECOMPRESSED_BYTES, compress, decompress

__all__ = [
    "BATCH_OVERHEAD",
    "NO_PRODUCER_ID",
    "BatchBuilder",
    "BatchHeader",
    "check_crc",
    "control_batch",
    "decode_records",
    "empty_batch",
    "iter_batches",
    "patch_base_offset",
    "read_control",
    "read_header",
    "rewrite_batch",
    "set_log_append_time",
]

Buffer = bytes | bytearray | memoryview

BATCH_OVERHEAD = 61
"""Bytes of a batch before its first record."""
NO_PRODUCER_ID = -1

MAGIC = 2
_CODEC_MASK = 0x07
_LOG_APPEND_TIME = 0x08
_TRANSACTIONAL = 0x10
_CONTROL = 0x20
_DELETE_HORIZON = 0x40

_HEADER = Struct(">qiibIhiqqqhii")
_BEFORE_CRC = Struct(">qiibI")
_AFTER_CRC = Struct(">hiqqqhii")
_CRC_START = 21
_LENGTH_START = 12
"""`batch_length` counts the bytes after itself, that is from here."""
_MIN_RECORD_BYTES = 7
"""Length, attributes, timestamp delta, offset delta, key length, value length, header count: one byte each."""

_CONTROL_KEY = Struct(">hh")
_CONTROL_VALUE = Struct(">hi")


class BatchHeader(NamedTuple):
    """The fixed part of a batch, field by field as it stands in the bytes. Timestamps are milliseconds since 1970."""

    base_offset: int
    batch_length: int
    partition_leader_epoch: int
    magic: int
    crc: int
    attributes: int
    last_offset_delta: int
    base_timestamp: int
    max_timestamp: int
    producer_id: int
    producer_epoch: int
    base_sequence: int
    record_count: int

    @property
    def size(self) -> int:
        """Bytes of the whole batch."""
        return _LENGTH_START + self.batch_length

    @property
    def codec(self) -> int:
        """0 none, 1 gzip, 2 snappy, 3 lz4, 4 zstd."""
        return self.attributes & _CODEC_MASK

    @property
    def is_transactional(self) -> bool:
        return bool(self.attributes & _TRANSACTIONAL)

    @property
    def is_control(self) -> bool:
        """Whether this is a marker, which applications never see."""
        return bool(self.attributes & _CONTROL)

    @property
    def log_append_time(self) -> bool:
        """Whether `max_timestamp` is the broker's clock and holds for every record."""
        return bool(self.attributes & _LOG_APPEND_TIME)

    @property
    def delete_horizon_ms(self) -> int | None:
        """When compaction may drop this batch's tombstones, or the marker that it is; None until it says so (KIP-534).

        It takes the place of the base timestamp, from which the records' timestamps count.
        """
        return self.base_timestamp if self.attributes & _DELETE_HORIZON else None

    @property
    def last_offset(self) -> int:
        return self.base_offset + self.last_offset_delta

    @property
    def next_offset(self) -> int:
        return self.base_offset + self.last_offset_delta + 1


# --- Headers ---


def read_header(buffer: Buffer, at: int = 0) -> BatchHeader:
    """The header of the batch at `at`. Raises `CorruptBatch` when it is cut short or its length is impossible.

    Neither that the whole batch is in the buffer nor its magic byte is checked here.
    """
    if at < 0 or len(buffer) - at < BATCH_OVERHEAD:
        raise CorruptBatch(f"{max(len(buffer) - at, 0)} bytes are left, fewer than a batch header's {BATCH_OVERHEAD}")
    header = BatchHeader._make(_HEADER.unpack_from(buffer, at))
    if header.batch_length < BATCH_OVERHEAD - _LENGTH_START:
        raise CorruptBatch(f"a batch of length {header.batch_length} is shorter than its own header")
    return header


def check_crc(buffer: Buffer, at: int, header: BatchHeader) -> bool:
    """Whether the whole batch is there and its checksum is right."""
    end = at + header.size
    return end <= len(buffer) and crc32c(memoryview(buffer)[at + _CRC_START : end]) == header.crc


def iter_batches(buffer: Buffer, at: int = 0, end: int | None = None) -> Iterator[tuple[int, BatchHeader]]:
    """Position and header of each whole batch in `buffer[at:end]`; a partial last one is left out.

    Brokers cut a fetch at a byte limit, so a partial batch is not an error. Raises `CorruptBatch` as `read_header`.
    """
    stop = len(buffer) if end is None else min(end, len(buffer))
    while stop - at >= BATCH_OVERHEAD:
        header = read_header(buffer, at)
        if at + header.size > stop:
            return
        yield at, header
        at += header.size


def patch_base_offset(buffer: bytearray | memoryview, at: int, base_offset: int, leader_epoch: int) -> None:
    """Give the batch at `at` its place in the log. The checksum does not cover these fields."""
    pack_into(">q", buffer, at, base_offset)
    pack_into(">i", buffer, at + 12, leader_epoch)


def set_log_append_time(buffer: bytearray | memoryview, at: int, timestamp_ms: int) -> None:
    """Stamp the batch at `at` with the broker's time; the checksum is computed anew.

    The base timestamp stays, as in Kafka: readers take `max_timestamp` for every record.
    """
    header = read_header(buffer, at)
    pack_into(">h", buffer, at + 21, header.attributes | _LOG_APPEND_TIME)
    pack_into(">q", buffer, at + 35, timestamp_ms)
    with memoryview(buffer) as view:
        pack_into(">I", buffer, at + 17, crc32c(view[at + _CRC_START : at + header.size]))


def _seal(
    body: bytes,
    attributes: int,
    base_timestamp: int,
    max_timestamp: int,
    producer: tuple[int, int, int],
    last_offset_delta: int,
    count: int,
    base_offset: int,
) -> bytes:
    """Header and checksum in front of encoded records."""
    after = _AFTER_CRC.pack(attributes, last_offset_delta, base_timestamp, max_timestamp, *producer, count)
    crc = crc32c(body, crc32c(after))
    length = BATCH_OVERHEAD - _LENGTH_START + len(body)
    # The leader epoch (-1 here) is the broker's to set: see `patch_base_offset`.
    return b"".join((_BEFORE_CRC.pack(base_offset, length, -1, MAGIC, crc), after, body))


# --- Encoding ---


def _varint(value: int) -> bytes:
    """A zig-zag varint of up to 64 bits. Raises `ValueError` for numbers that need more."""
    if not -(1 << 63) <= value < 1 << 63:
        raise ValueError(f"{value} does not fit in 64 bits")
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


def _encode_headers(headers: Sequence[Header]) -> bytes:
    parts = [_number(len(headers))]
    for key, value in headers:
        name = key.encode()
        parts += (_number(len(name)), name)
        parts += (_NULL,) if value is None else (_number(len(value)), value)
    return b"".join(parts)


def _encode_record(delta: int, count: int, key: bytes | None, value: bytes | None, tail: bytes) -> bytes:
    """Any record, without the length in front; `tail` are its headers."""
    parts = [b"\0", _number(delta), _number(count)]
    for field in (key, value):
        parts += (_NULL,) if field is None else (_number(len(field)), field)
    parts.append(tail)
    return b"".join(parts)


class BatchBuilder:
    """Collects records and builds them into one batch, as often as asked.

    `build` may be called again with another producer id, epoch or sequence: the records are encoded (and compressed)
    once. `size` is the number of bytes of the batch before compression.
    """

    __slots__ = ("_base_timestamp", "_body", "_parts", "codec", "count", "max_timestamp", "size")

    def __init__(self, codec: int = 0) -> None:
        self.codec = codec
        self.count = 0
        self.size = BATCH_OVERHEAD
        self.max_timestamp = -1
        self._base_timestamp = -1
        self._parts: list[bytes] = []
        self._body: bytes | None = None

    def __repr__(self) -> str:
        return f"<BatchBuilder {self.count} records, {self.size} bytes>"

    def append(
        self,
        key: bytes | None,
        value: bytes | None,
        timestamp_ms: int,
        headers: Sequence[Header] = (),
    ) -> None:
        """Add one record. Raises `ValueError` for a timestamp that does not fit in 64 bits."""
        count = self.count
        if count:
            delta = timestamp_ms - self._base_timestamp
            if timestamp_ms > self.max_timestamp:
                self.max_timestamp = timestamp_ms
        else:
            _varint(timestamp_ms)
            self._base_timestamp = self.max_timestamp = timestamp_ms
            delta = 0
        tail = _encode_headers(headers) if headers else b"\0"
        varints = _VARINTS
        if key is None or value is None or delta < 0:
            record = _encode_record(delta, count, key, value, tail)
        else:
            try:
                # One join a record beats adding up the lengths of its pieces, and leaves two pieces in the list.
                record = b"".join(
                    (b"\0", varints[delta], varints[count], varints[len(key)], key, varints[len(value)], value, tail)
                )
            except IndexError:  # A number beyond the table.
                record = _encode_record(delta, count, key, value, tail)
        size = len(record)
        prefix = varints[size] if size < len(varints) else _varint(size)
        self._parts += (prefix, record)
        self._body = None
        self.size += len(prefix) + size
        self.count = count + 1

    def build(
        self,
        *,
        producer_id: int = NO_PRODUCER_ID,
        producer_epoch: int = -1,
        base_sequence: int = -1,
        transactional: bool = False,
        base_offset: int = 0,
    ) -> bytes:
        """The batch as bytes. Raises `ValueError` when there is no record in it.

        `ConfigurationError` when the codec needs a package that is not installed.
        """
        if not self.count:
            raise ValueError("a batch without records cannot be built")
        if self._body is None:
            self._body = compress(self.codec, b"".join(self._parts))
        return _seal(
            self._body,
            self.codec | (_TRANSACTIONAL if transactional else 0),
            self._base_timestamp,
            self.max_timestamp,
            (producer_id, producer_epoch, base_sequence),
            self.count - 1,
            self.count,
            base_offset,
        )


# --- Compaction ---


def rewrite_batch(header: BatchHeader, records: Sequence[Record], delete_horizon_ms: int | None = None) -> bytearray:
    """The batch of `header` with only these of its records; its offsets, sequences, producer and codec stay.

    `delete_horizon_ms` sets the delete horizon. Raises `ValueError` when there is no record, or when a timestamp is so
    far from the horizon that 64 bits do not hold the difference; `ConfigurationError` as `BatchBuilder.build`.
    """
    if not records:
        raise ValueError("a batch without records is an empty_batch")
    attributes, base_timestamp = header.attributes, header.base_timestamp
    if delete_horizon_ms is not None:
        attributes, base_timestamp = attributes | _DELETE_HORIZON, delete_horizon_ms
    parts: list[bytes] = []
    for record in records:
        tail = _encode_headers(record.headers)
        encoded = _encode_record(
            record.timestamp_ms - base_timestamp, record.offset - header.base_offset, record.key, record.value, tail
        )
        parts += (_number(len(encoded)), encoded)
    newest = max(record.timestamp_ms for record in records)
    return _in_place(header, compress(header.codec, b"".join(parts)), attributes, base_timestamp, newest, len(records))


def empty_batch(header: BatchHeader) -> bytearray:
    """The batch of `header` without its records: it still says which offsets and sequences its producer wrote.

    It is in no transaction, so that no marker needs to stay for it.
    """
    return _in_place(header, b"", header.attributes & _LOG_APPEND_TIME, header.max_timestamp, header.max_timestamp, 0)


def _in_place(
    header: BatchHeader, body: bytes, attributes: int, base_timestamp: int, max_timestamp: int, count: int
) -> bytearray:
    batch = bytearray(
        _seal(
            body,
            attributes,
            base_timestamp,
            max_timestamp,
            (header.producer_id, header.producer_epoch, header.base_sequence),
            header.last_offset_delta,
            count,
            header.base_offset,
        )
    )
    patch_base_offset(batch, 0, header.base_offset, header.partition_leader_epoch)
    return batch


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


def decode_records(
    buffer: Buffer,
    at: int,
    header: BatchHeader,
    topic: str,
    partition: int,
    max_bytes: int = MAX_DECOMPRESSED_BYTES,
) -> list[Record]:
    """The records of one batch, decompressed, with their offsets in the log; a marker's one record too.

    Raises `CorruptBatch` for anything that is not a well-formed batch, or has more than `max_bytes` bytes once
    decompressed; `ConfigurationError` when its codec needs a package that is not installed. The checksum is not
    looked at: see `check_crc`.
    """
    end = at + header.size
    if end > len(buffer):
        _corrupt(f"it has {header.size} bytes, of which {len(buffer) - at} are there")
    if header.magic != MAGIC:
        _corrupt(f"its format is version {header.magic}, not {MAGIC}")
    data = bytes(memoryview(buffer)[at + BATCH_OVERHEAD : end])
    if header.codec:
        data = decompress(header.codec, data, max_bytes)
    if not 0 <= header.record_count * _MIN_RECORD_BYTES <= len(data):
        _corrupt(f"{header.record_count} records cannot be in {len(data)} bytes")
    try:
        return _decode(data, header, topic, partition)
    except (IndexError, UnicodeDecodeError) as problem:
        raise CorruptBatch(f"a record batch cannot be read: {problem}") from problem


def _decode(data: bytes, header: BatchHeader, topic: str, partition: int) -> list[Record]:
    """The records in decompressed bytes.

    Most varints have one or two bytes; those are read in line, because a call for each would double the time. Every
    length is 0 or more, so a record that ends where its length says had all its fields inside. IndexError: cut short.
    """
    base_offset, base_timestamp = header.base_offset, header.base_timestamp
    append_time = header.max_timestamp if header.log_append_time else None
    records: list[Record] = []
    add, new = records.append, tuple.__new__
    at, size, last_delta = 0, len(data), -1
    key: bytes | None
    value: bytes | None
    for _ in range(header.record_count):
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
            key = data[begin:at]
        else:
            key, at = _read_field(data, at, stop)

        raw = data[at]
        if raw >= 0x80 and (high := data[at + 1]) < 0x80 and not raw & 1:
            begin = at + 2
            at = begin + ((raw & 0x7F | high << 7) >> 1)
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
    if last_delta > header.last_offset_delta:
        _corrupt("a record's offset lies beyond its batch")
    return records


# --- Control batches ---


def control_batch(
    *,
    producer_id: int,
    producer_epoch: int,
    commit: bool,
    coordinator_epoch: int,
    timestamp_ms: int,
    base_offset: int = 0,
) -> bytes:
    """The marker that ends a transaction in one partition: 78 bytes."""
    record = b"".join(
        (
            b"\x20\0\0\0\x08",  # 16 bytes follow; no attributes, both deltas 0; a key of 4 bytes
            _CONTROL_KEY.pack(0, 1 if commit else 0),
            b"\x0c",  # a value of 6 bytes
            _CONTROL_VALUE.pack(0, coordinator_epoch),
            b"\0",
        )
    )
    return _seal(
        record,
        _TRANSACTIONAL | _CONTROL,
        timestamp_ms,
        timestamp_ms,
        (producer_id, producer_epoch, -1),
        0,
        1,
        base_offset,
    )


def read_control(buffer: Buffer, at: int, header: BatchHeader) -> tuple[bool, int]:
    """What a marker says: whether the transaction committed, and its coordinator's epoch. Raises `CorruptBatch`."""
    records = decode_records(buffer, at, header, "", 0)
    if not header.is_control or len(records) != 1:
        _corrupt("it is not a transaction marker")
    key, value = records[0].key, records[0].value
    try:
        _, kind = _CONTROL_KEY.unpack_from(key or b"")
        _, coordinator_epoch = _CONTROL_VALUE.unpack_from(value or b"")
    except error as problem:
        raise CorruptBatch(f"a transaction marker cannot be read: {problem}") from problem
    if kind not in (0, 1):
        _corrupt(f"a control record of type {kind} is not a transaction marker")
    return kind == 1, coordinator_epoch

"""Record batches, version 2: the unit in which records travel and lie in a log (KIP-98).

A batch is a header of 61 bytes and its records, which may be compressed as one block. The checksum (CRC-32C) covers
the bytes from 21 on, so a broker sets the base offset and the leader epoch without touching the rest.

What is inside of the records is the work of `semel.wire.codec`, in C where it could be built.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from struct import Struct, error, pack_into
from typing import NamedTuple, NoReturn

from crc32c import crc32c

from semel.errors import CorruptBatch
from semel.types import Header, Record
from semel.wire import codec
from semel.wire.compression import MAX_DECOMPRESSED_BYTES, compress, decompress
from semel.wire.pycodec import Buffer, Output

__all__ = [
    "BATCH_OVERHEAD",
    "NO_PRODUCER_ID",
    "BatchBuilder",
    "BatchHeader",
    "check_crc",
    "control_batch",
    "decode_records",
    "empty_batch",
    "encode_batches",
    "iter_batches",
    "patch_base_offset",
    "read_control",
    "read_header",
    "rewrite_batch",
    "set_log_append_time",
]

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
        """Add one record.

        Raises `ValueError` for a timestamp that does not fit in 64 bits, `TypeError` for a key or value that is not
        bytes. For many records at once see `encode_batches`.
        """
        if not -(1 << 63) <= timestamp_ms < 1 << 63:
            raise ValueError("timestamps and their differences must fit in 64 bits")
        if self.count:
            record = codec.in_use.encode_record(timestamp_ms - self._base_timestamp, self.count, key, value, headers)
            if timestamp_ms > self.max_timestamp:
                self.max_timestamp = timestamp_ms
        else:
            record = codec.in_use.encode_record(0, 0, key, value, headers)
            self._base_timestamp = self.max_timestamp = timestamp_ms
        self._parts.append(record)
        self._body = None
        self.size += len(record)
        self.count += 1

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


def encode_batches(
    records: list[Output], partitions: int, limit: int, compression: int = 0
) -> list[tuple[int, BatchBuilder]]:
    """Many records of one topic in one call, each in the last batch of its partition: partitions and their batches.

    A record is (partition or None, key, value, milliseconds since 1970, headers); without a partition its key decides,
    as in Java's client. Batches come in the order in which they began, and have at most `limit` bytes before
    compression, or one record. Raises as `BatchBuilder.append`, and `ValueError` for a record that has neither key nor
    partition or whose partition is not among `partitions`: then there is no batch at all.
    """
    batches = []
    for partition, count, base_timestamp, max_timestamp, body in codec.in_use.encode(records, partitions, limit):
        builder = BatchBuilder(compression)
        builder.count = count
        builder.size += len(body)
        builder.max_timestamp = max_timestamp
        builder._base_timestamp = base_timestamp
        builder._parts.append(body)
        batches.append((partition, builder))
    return batches


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
        since, offset_delta = record.timestamp_ms - base_timestamp, record.offset - header.base_offset
        parts.append(codec.in_use.encode_record(since, offset_delta, record.key, record.value, record.headers))
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
    start = at + BATCH_OVERHEAD
    if header.codec:
        buffer = decompress(header.codec, bytes(memoryview(buffer)[start:end]), max_bytes)
        start, end = 0, len(buffer)
    append_time = header.max_timestamp if header.log_append_time else None
    try:
        return codec.in_use.decode(
            *(buffer, start, end, header.record_count, header.base_offset, header.base_timestamp),
            *(append_time, header.last_offset_delta, topic, partition),
        )
    except UnicodeDecodeError as problem:
        raise CorruptBatch(f"a record batch cannot be read: {problem}") from problem


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

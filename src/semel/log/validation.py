"""Is this a batch that a client may append? Codes and their order as measured on Apache Kafka 4.3.1. No IO.

Kafka walks every record, also inside compressed batches. Here batches are opaque: the header is trusted once the
checksum is right, and records are looked at only in compacted topics, where each needs a key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from semel.errors import ConfigurationError, CorruptBatch, ErrorCode
from semel.log.errors import LogError
from semel.wire.records import BATCH_OVERHEAD, BatchHeader, check_crc, decode_records, read_header

__all__ = ["LogConfig", "check_only_batch", "read_first_batch", "validate"]

_CONTROL = 0x20
_TRANSACTIONAL = 0x10
_CODEC = 0x07
_LAST_CODEC = 4


@dataclass(frozen=True, slots=True)
class LogConfig:
    """Settings of one partition's log, with Kafka's defaults."""

    segment_bytes: int = 1 << 30
    max_message_bytes: int = 1_048_588
    """Largest batch, as sent, header included."""
    timestamp_type: Literal["CreateTime", "LogAppendTime"] = "CreateTime"
    cleanup_policy: str = "delete"
    """`delete`, `compact` or `compact,delete`."""
    retention_ms: int = 604_800_000
    """Age at which `PartitionLog.tend` drops a segment; -1 for never."""
    retention_bytes: int = -1
    """Size above which it drops the oldest segments; -1 for none."""
    segment_ms: int = 604_800_000
    """Age at which the growing segment is closed, so that retention and compaction can have it."""
    delete_retention_ms: int = 86_400_000
    """How long compaction leaves tombstones, and markers of transactions without data, to those who read along."""
    min_cleanable_dirty_ratio: float = 0.5
    min_compaction_lag_ms: int = 0
    """Records younger than this are not compacted."""
    max_compaction_lag_ms: int = (1 << 63) - 1
    """Records older than this are compacted, whatever the dirty ratio."""
    fsync: Literal["os", "always"] = "os"
    """`os`: an acknowledged append survives the end of the process. `always`: also a loss of power."""
    timestamp_after_max_ms: int = 3_600_000
    """How far a record's timestamp may lie in the future."""

    @property
    def is_compacted(self) -> bool:
        return "compact" in self.cleanup_policy

    @property
    def is_deleting(self) -> bool:
        """Whether retention applies."""
        return "delete" in self.cleanup_policy

    @property
    def is_log_append_time(self) -> bool:
        return self.timestamp_type == "LogAppendTime"


def read_first_batch(batch: bytearray | memoryview) -> BatchHeader:
    """The header of the whole batch that `batch` begins with; nothing else is asked first. Raises `LogError`."""
    try:
        header = read_header(batch)
    except CorruptBatch as problem:
        raise _invalid(f"no record batch was sent: {problem}") from problem
    size = header.size
    if size > len(batch):
        raise _invalid(f"a batch of {size} bytes was announced, {len(batch)} were sent")
    if header.magic != 2:
        raise _invalid(f"the batch has format version {header.magic}; version 2 is supported")
    return header


def check_only_batch(batch: bytearray | memoryview, header: BatchHeader) -> None:
    """Raise `LogError` when another batch follows; other bytes after the batch are ignored, as Kafka does."""
    if len(batch) > header.size and _holds_batch(batch, header.size):
        raise _invalid("more than one batch was sent for one partition")


def validate(batch: bytearray | memoryview, config: LogConfig, now_ms: int) -> BatchHeader:
    """The header of the one batch in `batch`. Raises `LogError` with Kafka's code for what is wrong with it."""
    header = read_first_batch(batch)
    check_only_batch(batch, header)
    size = header.size
    if header.base_offset != 0:
        raise _invalid(f"the batch has base offset {header.base_offset}; clients send 0")
    if size > config.max_message_bytes:
        raise LogError(
            ErrorCode.MESSAGE_TOO_LARGE,
            f"the batch has {size} bytes; max.message.bytes is {config.max_message_bytes}",
        )
    if not check_crc(batch, 0, header):
        raise LogError(ErrorCode.CORRUPT_MESSAGE, "the batch's checksum is wrong")
    _validate_fields(header)
    if header.log_append_time and (config.is_log_append_time or header.max_timestamp == -1):
        raise LogError(
            ErrorCode.INVALID_TIMESTAMP,
            "the time of append is the broker's to set",
            tuple(range(header.record_count)),
        )
    latest_ms = now_ms + config.timestamp_after_max_ms
    late = not config.is_log_append_time and header.max_timestamp > latest_ms
    if late or config.is_compacted:
        _check_records(batch, header, config, latest_ms if late else None)
    return header


def _validate_fields(header: BatchHeader) -> None:
    attributes = header.attributes
    if header.record_count <= 0 or header.last_offset_delta + 1 != header.record_count:
        raise _invalid(f"{header.record_count} records cannot have a last offset delta of {header.last_offset_delta}")
    if attributes & _CONTROL:
        raise _invalid("clients cannot append control batches")
    if header.producer_id >= 0:
        if header.base_sequence < 0:
            raise _invalid(f"producer {header.producer_id} sent a batch without a sequence")
    elif attributes & _TRANSACTIONAL:
        raise _invalid("a transactional batch needs a producer id")
    if attributes & _CODEC > _LAST_CODEC:
        raise LogError(
            ErrorCode.UNSUPPORTED_COMPRESSION_TYPE, f"compression codec {attributes & _CODEC} does not exist"
        )


def _holds_batch(batch: bytearray | memoryview, at: int) -> bool:
    """Whether a second whole batch follows."""
    if len(batch) - at < BATCH_OVERHEAD:
        return False
    try:
        return at + read_header(batch, at).size <= len(batch)
    except CorruptBatch:
        return False


def _check_records(
    batch: bytearray | memoryview, header: BatchHeader, config: LogConfig, latest_ms: int | None
) -> None:
    """What only the records themselves tell: whether each has its key, and which are later than `latest_ms`."""
    try:
        records = decode_records(batch, 0, header, "", 0)
    except CorruptBatch as problem:
        raise _invalid(str(problem)) from problem
    except ConfigurationError as problem:
        raise LogError(ErrorCode.UNSUPPORTED_COMPRESSION_TYPE, str(problem)) from problem
    keyless = [index for index, record in enumerate(records) if config.is_compacted and record.key is None]
    late = [
        index
        for index, record in enumerate(records)
        if latest_ms is not None and record.timestamp_ms > latest_ms and index not in keyless
    ]
    faulty = tuple(sorted(keyless + late))
    if late or (latest_ms is not None and not keyless):
        what = f"timestamp {header.max_timestamp} is later than {latest_ms}, the latest that this topic takes now"
        raise LogError(ErrorCode.INVALID_TIMESTAMP, what, faulty)
    if keyless:
        raise LogError(ErrorCode.INVALID_RECORD, "a compacted topic takes no record without a key", faulty)


def _invalid(what: str) -> LogError:
    return LogError(ErrorCode.INVALID_RECORD, what)

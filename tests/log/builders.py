"""What the tests of the log room share: batches, logs, and everything that can be seen of a log."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import UUID

from semel.log.log import LogConfig, PartitionLog
from semel.wire.records import BatchBuilder, decode_records, iter_batches

TOPIC_ID = UUID("6f3c1a52-0d0b-4f1e-9a63-0d6f9a1f2b11")
NOW = 1_750_000_000_000


def batch(
    count: int = 1,
    *,
    pid: int = -1,
    epoch: int = 0,
    seq: int = 0,
    txn: bool = False,
    value: bytes = b"value",
    key: bytes | None = b"key",
    ts: int = NOW,
    codec: int = 0,
) -> bytearray:
    """A batch as a client sends it; record n has the timestamp `ts` + n."""
    builder = BatchBuilder(codec)
    for number in range(count):
        builder.append(key, value, ts + number)
    if pid < 0:
        return bytearray(builder.build())
    return bytearray(builder.build(producer_id=pid, producer_epoch=epoch, base_sequence=seq, transactional=txn))


def open_log(directory: Path, now_ms: int = NOW, **config: Any) -> PartitionLog:
    """Open (or open again, as after kill -9: nothing needs to be closed) the log in `directory`."""
    return PartitionLog.open(directory, "t", 0, TOPIC_ID, LogConfig(**config), now_ms)


def read_all(log: PartitionLog, upper: int | None = None) -> bytes:
    """Every byte that a consumer gets from the log's start on."""
    return log.read_bytes(log.log_start_offset, 1 << 40, log.high_watermark if upper is None else upper)


def values(log: PartitionLog) -> list[tuple[int, bytes | None]]:
    """(offset, value) of every data record."""
    data = read_all(log)
    return [
        (record.offset, record.value)
        for at, header in iter_batches(data)
        if not header.is_control
        for record in decode_records(data, at, header, "t", 0)
    ]


def seen(log: PartitionLog) -> dict[str, Any]:
    """Everything that users of a log can see."""
    end = log.log_end_offset
    return {
        "offsets": (log.log_start_offset, end, log.high_watermark, log.last_stable_offset),
        "open": log.open_transactions(),
        "producers": sorted(log.producers()),
        "aborted": log.aborted_transactions(log.log_start_offset, end),
        "newest": log.max_timestamp_offset(),
        "bytes": read_all(log),
    }


def log_file(directory: Path) -> Path:
    """The segment that is appended to."""
    return max(directory.glob("*.log"))

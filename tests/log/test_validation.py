"""kafka_facts 2.1: what a broker answers to a batch, as measured on Apache Kafka 4.3.1."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from struct import pack_into

import pytest
from crc32c import crc32c

from semel.errors import ErrorCode
from semel.log.log import LogError
from semel.wire.records import check_crc, control_batch, iter_batches, read_header
from tests.log.builders import NOW, batch, open_log, read_all, values

HOUR = 3_600_000
AT = {"attributes": (21, ">h"), "last_offset_delta": (23, ">i"), "record_count": (57, ">i"), "sequence": (53, ">i")}


def with_field(data: bytearray, name: str, value: int) -> bytearray:
    """Change a field below the checksum and make the checksum right again."""
    at, layout = AT[name]
    pack_into(layout, data, at, value)
    pack_into(">I", data, 17, crc32c(bytes(data[21:])))
    return data


def with_byte(data: bytearray, at: int, value: int) -> bytearray:
    data[at] = value
    return data


REFUSED: dict[str, tuple[Callable[[], bytearray], ErrorCode]] = {
    "empty": (bytearray, ErrorCode.INVALID_RECORD),
    "header cut": (lambda: batch()[:60], ErrorCode.INVALID_RECORD),
    "records cut": (lambda: batch()[:-1], ErrorCode.INVALID_RECORD),
    "negative length": (lambda: with_byte(batch(), 8, 0xFF), ErrorCode.INVALID_RECORD),
    "two batches": (lambda: batch() + batch(), ErrorCode.INVALID_RECORD),
    "magic 1": (lambda: with_byte(batch(), 16, 1), ErrorCode.INVALID_RECORD),
    "base offset 1": (lambda: with_byte(batch(), 7, 1), ErrorCode.INVALID_RECORD),
    "too large": (lambda: batch(value=bytes(1_048_588)), ErrorCode.MESSAGE_TOO_LARGE),
    "checksum": (lambda: with_byte(batch(), 65, 0xEE), ErrorCode.CORRUPT_MESSAGE),
    "record count 0": (lambda: with_field(batch(), "record_count", 0), ErrorCode.INVALID_RECORD),
    "record count off": (lambda: with_field(batch(2), "record_count", 3), ErrorCode.INVALID_RECORD),
    "offset delta off": (lambda: with_field(batch(2), "last_offset_delta", 5), ErrorCode.INVALID_RECORD),
    "control": (
        lambda: bytearray(
            control_batch(producer_id=1, producer_epoch=0, commit=True, coordinator_epoch=0, timestamp_ms=NOW)
        ),
        ErrorCode.INVALID_RECORD,
    ),
    "no sequence": (lambda: with_field(batch(pid=1), "sequence", -1), ErrorCode.INVALID_RECORD),
    "transactional without producer": (lambda: with_field(batch(), "attributes", 0x10), ErrorCode.INVALID_RECORD),
    "future": (lambda: batch(ts=NOW + HOUR + 1), ErrorCode.INVALID_TIMESTAMP),
    "codec 5": (lambda: with_field(batch(), "attributes", 5), ErrorCode.UNSUPPORTED_COMPRESSION_TYPE),
    # The order of the checks, where two things are wrong.
    "magic before base offset and size": (
        lambda: with_byte(with_byte(batch(value=bytes(2_000_000)), 16, 0), 7, 1),
        ErrorCode.INVALID_RECORD,
    ),
    "size before checksum": (lambda: with_byte(batch(value=bytes(2_000_000)), 65, 1), ErrorCode.MESSAGE_TOO_LARGE),
    "checksum before count": (lambda: with_byte(batch(), 60, 9), ErrorCode.CORRUPT_MESSAGE),
    "count before timestamp": (
        lambda: with_field(batch(ts=NOW + 2 * HOUR), "record_count", 0),
        ErrorCode.INVALID_RECORD,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_batch_gets_kafkas_code_and_changes_nothing(tmp_path: Path, name: str) -> None:
    make, code = REFUSED[name]
    log = open_log(tmp_path)
    log.append(batch(value=b"before"), NOW)
    with pytest.raises(LogError) as refused:
        log.append(make(), NOW)
    assert refused.value.code == code
    assert log.producers() == []
    log.append(batch(value=b"after"), NOW)
    assert values(log) == [(0, b"before"), (1, b"after")]
    assert values(open_log(tmp_path)) == [(0, b"before"), (1, b"after")]


ACCEPTED: dict[str, Callable[[], bytearray]] = {
    "trailing bytes that are no batch": lambda: batch() + b"\0" * 200,
    "a trailing half batch": lambda: batch() + batch()[:70],
    "any leader epoch": lambda: with_byte(batch(), 15, 77),
    "timestamp -1": lambda: batch(ts=-1),
    "timestamp 1970": lambda: batch(ts=0),
    "one hour ahead": lambda: batch(ts=NOW + HOUR),
    "producer epoch -1": lambda: batch(pid=5, epoch=-1),
    "no key": lambda: batch(key=None),
    "the log append time bit": lambda: with_field(batch(), "attributes", 8),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_kafka_takes_is_taken_as_one_sound_batch(tmp_path: Path, name: str) -> None:
    log = open_log(tmp_path)
    log.append(batch(), NOW)
    result = log.append(ACCEPTED[name](), NOW)
    assert result[:3] == (1, 1, -1)
    stored = read_all(log)
    (_, _), (at, header) = iter_batches(stored)
    assert (header.base_offset, header.partition_leader_epoch, header.attributes) == (1, 0, 0)
    assert check_crc(stored, at, header)
    assert at + header.size == len(stored)


def test_the_largest_batch_is_counted_with_its_header(tmp_path: Path) -> None:
    size = len(batch())
    open_log(tmp_path / "fits", max_message_bytes=size).append(batch(), NOW)
    with pytest.raises(LogError) as refused:
        open_log(tmp_path / "one less", max_message_bytes=size - 1).append(batch(), NOW)
    assert refused.value.code == ErrorCode.MESSAGE_TOO_LARGE


def test_log_append_time_replaces_the_clients_and_keeps_the_checksum_right(tmp_path: Path) -> None:
    log = open_log(tmp_path, timestamp_type="LogAppendTime")
    sent = batch(3, ts=NOW + 5 * HOUR)  # The client's clock does not matter here.
    result = log.append(sent, NOW)
    assert result == (0, 2, NOW, 0, False)
    stored = read_all(log)
    header = read_header(stored)
    assert (header.attributes, header.base_timestamp, header.max_timestamp) == (8, NOW + 5 * HOUR, NOW)
    assert check_crc(stored, 0, header)
    assert log.offset_for_timestamp(NOW) == (0, NOW, 0)


@pytest.mark.parametrize("codec", [0, 1])
def test_a_compacted_topic_refuses_records_without_a_key(tmp_path: Path, codec: int) -> None:
    log = open_log(tmp_path, cleanup_policy="compact")
    log.append(batch(2, codec=codec), NOW)
    with pytest.raises(LogError) as refused:
        log.append(batch(key=None, codec=codec), NOW)
    assert refused.value.code == ErrorCode.INVALID_RECORD
    assert log.log_end_offset == 2

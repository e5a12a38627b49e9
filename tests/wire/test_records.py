"""Record batches: what goes in comes out, and nothing else is ever taken for a record."""

from __future__ import annotations

import struct

import pytest
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from semel.errors import CorruptBatch
from semel.types import Record
from semel.wire.compression import CODECS, compress
from semel.wire.records import (
    BATCH_OVERHEAD,
    BatchBuilder,
    check_crc,
    control_batch,
    decode_records,
    iter_batches,
    patch_base_offset,
    read_control,
    read_header,
    set_log_append_time,
)

pytestmark = pytest.mark.usefixtures("each_codec")

INT64 = st.integers(-(2**62), 2**62)
CLOSE = st.integers(1_780_000_000_000, 1_780_000_100_000)
BYTES = st.none() | st.binary(max_size=40) | st.integers(60, 20_000).map(lambda n: b"v" * n)
HEADERS = st.lists(st.tuples(st.text(max_size=20), st.none() | st.binary(max_size=80)), max_size=5).map(tuple)
RECORDS = st.lists(st.tuples(BYTES, BYTES, CLOSE | INT64, HEADERS), min_size=1, max_size=30)
MARKER = bytes.fromhex(
    "0000000000000002 00000042 00000000 02 be7c36d2 0030 00000000 000001a1fd335b57 000001a1fd335b57 000000000000004b"
    "0001 ffffffff 00000001 2000000008 00000001 0c 000000000000 00"
)
"""A commit marker captured from Apache Kafka 4.3.1."""


def batch_of(*values: bytes | None, codec: int = 0, base_offset: int = 0) -> bytes:
    builder = BatchBuilder(codec)
    for value in values:
        builder.append(b"key", value, 1_780_000_000_000, (("h", b"1"),))
    return builder.build(base_offset=base_offset)


def with_body(body: bytes, count: int, attributes: int = 0, magic: int = 2) -> bytes:
    """A batch with a right length and checksum around any body."""
    after = struct.pack(">hiqqqhii", attributes, max(count - 1, 0), 0, 0, -1, -1, -1, count)
    return struct.pack(">qiibI", 0, 49 + len(body), -1, magic, crc32c(after + body)) + after + body


def decode(batch: bytes, **options: int) -> list[Record]:
    return decode_records(batch, 0, read_header(batch), "t", 3, **options)


# --- Round trips ---


@given(RECORDS, st.integers(0, 4), st.integers(0, 2**62), st.booleans())
@settings(max_examples=150, deadline=None)
def test_what_goes_in_comes_out(records, codec: int, base_offset: int, transactional: bool) -> None:
    builder = BatchBuilder(codec)
    for record in records:
        builder.append(*record)
    batch = builder.build(
        producer_id=77, producer_epoch=5, base_sequence=9, transactional=transactional, base_offset=base_offset
    )
    header = read_header(batch)
    assert check_crc(batch, 0, header)
    assert header.size == len(batch)
    assert header.codec == codec
    assert header.is_transactional == transactional
    assert not header.is_control
    assert (header.producer_id, header.producer_epoch, header.base_sequence) == (77, 5, 9)
    assert (header.record_count, header.next_offset) == (len(records), base_offset + len(records))
    assert header.max_timestamp == builder.max_timestamp == max(timestamp for _, _, timestamp, _ in records)
    if codec == 0:
        assert builder.size == len(batch)
    assert decode_records(batch, 0, header, "t", 3) == [
        Record("t", 3, base_offset + index, timestamp, key, value, headers)
        for index, (key, value, timestamp, headers) in enumerate(records)
    ]


def test_lengths_around_every_varint_size() -> None:
    sizes = [0, 1, 63, 64, 65, 8_191, 8_192, 8_193, 65_535, 65_536, 1_048_575, 1_048_576, 1_100_000]
    for size in sizes:
        builder = BatchBuilder()
        builder.append(b"k" * size, b"v" * size, 1, (("h" * size, b"x" * size),))
        assert [(r.key, r.value, r.headers) for r in decode(builder.build())] == [
            (b"k" * size, b"v" * size, (("h" * size, b"x" * size),))
        ]


def test_more_records_than_the_table_of_varints() -> None:
    builder = BatchBuilder()
    for number in range(70_000):
        builder.append(None, b"", number)
    records = decode(builder.build(base_offset=5))
    assert [r.offset for r in records] == list(range(5, 70_005))
    assert [r.timestamp_ms for r in records] == list(range(70_000))


def test_a_resend_with_another_identity_has_the_same_records() -> None:
    builder = BatchBuilder(1)
    builder.append(b"k", b"v", 5)
    first = builder.build(producer_id=1, producer_epoch=0, base_sequence=0, transactional=True)
    again = builder.build(producer_id=9, producer_epoch=3, base_sequence=100, transactional=True)
    header = read_header(again)
    assert (header.producer_id, header.producer_epoch, header.base_sequence) == (9, 3, 100)
    assert check_crc(again, 0, header)
    assert decode(again) == decode(first)
    builder.append(b"k", b"more", 6)
    assert [r.value for r in decode(builder.build())] == [b"v", b"more"]


def test_an_empty_builder_and_impossible_timestamps_are_refused() -> None:
    builder = BatchBuilder()
    with pytest.raises(ValueError, match="without records"):
        builder.build()
    with pytest.raises(ValueError, match="64 bits"):
        builder.append(b"k", b"v", 2**63)
    builder.append(b"k", b"v", -(2**63))
    with pytest.raises(ValueError, match="64 bits"):
        builder.append(b"k", b"v", 2**62)
    assert [r.timestamp_ms for r in decode(builder.build())] == [-(2**63)]
    assert builder.count == 1


# --- Markers and patches ---


def test_a_marker_is_byte_for_byte_kafkas() -> None:
    header = read_header(MARKER)
    assert header.is_control
    assert header.is_transactional
    assert check_crc(MARKER, 0, header)
    assert read_control(MARKER, 0, header) == (True, 0)
    ours = bytearray(
        control_batch(
            producer_id=75,
            producer_epoch=1,
            commit=True,
            coordinator_epoch=0,
            timestamp_ms=header.base_timestamp,
            base_offset=2,
        )
    )
    patch_base_offset(ours, 0, 2, 0)
    assert bytes(ours) == MARKER
    abort = control_batch(producer_id=75, producer_epoch=1, commit=False, coordinator_epoch=8, timestamp_ms=1)
    assert read_control(abort, 0, read_header(abort)) == (False, 8)


def test_data_is_not_taken_for_a_marker() -> None:
    data = batch_of(b"v")
    with pytest.raises(CorruptBatch, match="not a transaction marker"):
        read_control(data, 0, read_header(data))
    leader_change = with_body(bytes.fromhex("2000000008000000020c00000000000000"), 1, attributes=0x20)
    with pytest.raises(CorruptBatch, match="type 2"):
        read_control(leader_change, 0, read_header(leader_change))
    short_key = with_body(bytes.fromhex("1000000004000001000000")[:9], 1, attributes=0x20)
    with pytest.raises(CorruptBatch):
        read_control(short_key, 0, read_header(short_key))


def test_a_place_in_the_log_needs_no_new_checksum() -> None:
    buffer = bytearray(b"before" + batch_of(b"a", b"b") + b"after")
    patch_base_offset(buffer, 6, 2**40, 17)
    header = read_header(buffer, 6)
    assert (header.base_offset, header.last_offset, header.partition_leader_epoch) == (2**40, 2**40 + 1, 17)
    assert check_crc(buffer, 6, header)
    assert buffer.startswith(b"before")
    assert buffer.endswith(b"after")


def test_log_append_time_holds_for_every_record() -> None:
    buffer = bytearray(b"..." + batch_of(b"a", b"b"))
    set_log_append_time(buffer, 3, 1_790_000_000_123)
    header = read_header(buffer, 3)
    assert header.log_append_time
    assert (header.base_timestamp, header.max_timestamp) == (1_780_000_000_000, 1_790_000_000_123)
    assert check_crc(buffer, 3, header)
    assert {r.timestamp_ms for r in decode_records(buffer, 3, header, "t", 0)} == {1_790_000_000_123}
    buffer += b"grows"  # No view of the buffer may be left behind.


# --- Several batches ---


def test_a_cut_last_batch_is_left_for_the_next_fetch() -> None:
    batches = [batch_of(b"%d" % n * n, base_offset=n) for n in range(1, 5)]
    data = b"".join(batches)
    for end in range(len(data) + 1):
        whole, at = [], 0
        for batch in batches:
            at += len(batch)
            if at <= end:
                whole.append(at - len(batch))
        assert [at for at, _ in iter_batches(memoryview(data), 0, end)] == whole
        assert [at for at, _ in iter_batches(data[:end])] == whole
    assert [header.base_offset for _, header in iter_batches(data, len(batches[0]))] == [2, 3, 4]


def test_a_batch_that_says_it_is_shorter_than_its_header_stops_everything() -> None:
    bad = bytearray(batch_of(b"v"))
    for length in (0, -1, -(2**31), 48):
        struct.pack_into(">i", bad, 8, length)
        with pytest.raises(CorruptBatch, match="shorter than its own header"):
            list(iter_batches(bad))
        with pytest.raises(CorruptBatch):
            read_header(bad)


# --- Damage ---


@pytest.mark.parametrize("codec", range(5), ids=CODECS)
def test_every_truncation_is_found(codec: int) -> None:
    batch = batch_of(b"value" * 30, None, b"", codec=codec)
    header = read_header(batch)
    for size in range(len(batch)):
        cut = batch[:size]
        assert not check_crc(cut, 0, header)
        with pytest.raises(CorruptBatch):
            decode_records(cut, 0, header, "t", 0)
        if size < BATCH_OVERHEAD:
            with pytest.raises(CorruptBatch):
                read_header(cut)


@pytest.mark.parametrize("codec", range(5), ids=CODECS)
def test_a_truncated_body_under_a_right_checksum_is_found(codec: int) -> None:
    body = batch_of(b"value" * 30, None, b"", codec=codec)[BATCH_OVERHEAD:]
    for size in range(len(body)):
        with pytest.raises(CorruptBatch):
            decode(with_body(body[:size], 3, attributes=codec))


def test_every_flipped_bit_under_the_checksum_is_found() -> None:
    batch = batch_of(b"value", None)
    header = read_header(batch)
    for position in range(21, len(batch)):
        for bit in range(8):
            damaged = bytearray(batch)
            damaged[position] ^= 1 << bit
            assert not check_crc(damaged, 0, read_header(damaged)), (position, bit)
    assert check_crc(batch, 0, header)


@given(st.binary(max_size=200), st.integers(-(2**31), 2**31 - 1) | st.integers(0, 5), st.integers(0, 7))
@settings(max_examples=400, deadline=None)
def test_any_body_under_a_right_checksum_decodes_or_is_corrupt(body: bytes, count: int, codec: int) -> None:
    batch = with_body(body, 0, attributes=codec)
    header = read_header(batch)._replace(record_count=count)
    try:
        records = decode_records(batch, 0, header, "t", 0)
    except CorruptBatch:
        return
    assert len(records) == count


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_any_changed_bytes_in_a_body_decode_or_are_corrupt(data) -> None:
    body = bytearray(batch_of(b"value" * 30, None, b"", b"x" * 70)[BATCH_OVERHEAD:])
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        records = decode(with_body(bytes(body), 4))
    except CorruptBatch:
        return
    assert len(records) == 4
    assert [r.offset for r in records] == sorted({r.offset for r in records})
    taken = sum(len(r.key or b"") + len(r.value or b"") + sum(len(v or b"") for _, v in r.headers) for r in records)
    assert taken <= len(body)


# A record is: length, attributes, timestamp delta, offset delta, key length, value length, number of headers.
@pytest.mark.parametrize(
    ("body", "count", "reason"),
    [
        ("0c 00 00 00 01 01 00", 2, "2 records cannot be in 7 bytes"),
        ("0c 00 00 00 01 01 00", -1, "-1 records"),
        ("0c 00 00 00 01 01 00", 2**31 - 1, "cannot be in"),
        ("0c 00 00 00 01 01 00 00", 1, "bytes are left"),
        ("0e 00 00 00 01 01 00", 1, "runs past the end of its batch"),
        ("0b 00 00 00 01 01 00", 1, "runs past the end of its batch"),
        ("0c 00 00 00 03 01 00", 1, "a length is negative"),
        ("0c 00 00 00 01 03 00", 1, "a length is negative"),
        ("0c 00 00 00 20 01 00", 1, "a field runs past"),
        ("0c 00 00 00 01 20 00", 1, "a field runs past"),
        ("0c 00 00 00 01 01 20", 1, "number of headers is impossible"),
        ("0c 00 00 00 01 01 01", 1, "number of headers is impossible"),
        ("10 00 00 00 01 01 02 01 01", 1, "a header has no key"),
        ("14 00 00 00 01 01 02 04 ff fe 01", 1, "utf-8"),
        ("0c 00 00 02 01 01 00 0c 00 00 02 01 01 00", 2, "offsets do not increase"),
        ("0c 00 00 01 01 01 00", 1, "offsets do not increase"),
        ("0c 00 00 02 01 01 00", 1, "lies beyond its batch"),
        ("8080808080808080808000 00 00 00 01 01 00", 1, "more than 10 bytes"),
        ("0c 00 ffffffffffffffffff7f 00 01 01 00", 1, "more than 64 bits"),
        ("1a 00 00 00 ffffffff0f 01 00 000000", 1, "a length is negative"),
    ],
)
def test_structure_is_checked(body: str, count: int, reason: str) -> None:
    with pytest.raises(CorruptBatch, match=reason):
        decode(with_body(bytes.fromhex(body), count))


def test_another_format_is_refused_by_its_number() -> None:
    with pytest.raises(CorruptBatch, match="version 1, not 2"):
        decode(with_body(b"", 0, magic=1))


def test_a_batch_that_compaction_emptied_has_no_records() -> None:
    assert decode(with_body(b"", 0)) == []


def test_gaps_that_compaction_leaves_keep_their_offsets() -> None:
    body = bytes.fromhex("0c 00 00 04 01 01 00 0c 00 00 0a 01 01 00")
    header = read_header(with_body(body, 2))._replace(last_offset_delta=9, base_offset=100)
    assert [r.offset for r in decode_records(with_body(body, 2), 0, header, "t", 0)] == [102, 105]


@pytest.mark.parametrize("codec", range(1, 5), ids=CODECS[1:])
def test_a_small_batch_cannot_fill_the_memory(codec: int) -> None:
    bomb = with_body(compress(codec, bytes(5_000_000)), 1, attributes=codec)
    assert len(bomb) < 300_000
    with pytest.raises(CorruptBatch):
        decode(bomb, max_bytes=1_000_000)

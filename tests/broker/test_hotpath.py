"""What is walked by hand says the same as the schemas, in every version."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semel.broker.apis.hotpath import (
    FetchedPartition,
    ProducedPartition,
    fetch_response,
    produce_response,
    read_produce_request,
)
from semel.errors import ProtocolError
from semel.log.log import Slice
from semel.wire.messages import decode_request_header, decode_response, encode_request

TOPIC_ID = uuid4()
names = st.text("abc.-_", min_size=1, max_size=200)


def _request(version: int, **fields: Any) -> memoryview:
    return memoryview(bytearray(encode_request(0, version, 3, "c" * 140, **fields)))[4:]


def _topic(version: int, name: str) -> dict[str, Any]:
    return {"topic_id": TOPIC_ID} if version >= 13 else {"name": name}


@given(
    version=st.integers(3, 13),
    transactional_id=st.none() | st.text(max_size=300),
    acks=st.sampled_from([-1, 0, 1]),
    name=names,
    records=st.lists(st.none() | st.binary(max_size=400), max_size=4),
)
def test_produce_request(
    version: int, transactional_id: str | None, acks: int, name: str, records: list[bytes | None]
) -> None:
    partitions = [{"index": index, "records": data} for index, data in enumerate(records)]
    frame = _request(
        version,
        transactional_id=transactional_id,
        acks=acks,
        timeout=5,
        topic_data=[_topic(version, name) | {"partition_data": partitions}],
    )
    read = read_produce_request(frame, decode_request_header(frame).body, version)
    assert read.transactional_id == transactional_id
    assert read.acks == acks
    [(asked, items)] = read.topics
    assert asked == (TOPIC_ID if version >= 13 else name)
    assert [(item.partition, None if item.records is None else bytes(item.records)) for item in items] == list(
        enumerate(records)
    )


@pytest.mark.parametrize("version", range(3, 14))
def test_no_cut_or_flipped_byte_of_a_produce_request_gets_past_the_reader(version: int) -> None:
    topic = _topic(version, "orders") | {"partition_data": [{"index": 0, "records": b"r" * 70}]}
    frame = _request(version, transactional_id="id", acks=-1, timeout=5, topic_data=[topic])
    body = decode_request_header(frame).body
    for end in range(body, len(frame)):
        with pytest.raises(ProtocolError):
            read_produce_request(frame[:end], body, version)
    for at in range(body, len(frame)):
        damaged = bytearray(frame)
        damaged[at] ^= 0xFF
        try:  # Either it still is a request, or it is refused as one: nothing else may be raised.
            read_produce_request(memoryview(damaged), body, version)
        except ProtocolError:
            continue


@pytest.mark.parametrize("version", range(3, 14))
def test_produce_response(version: int) -> None:
    topic: str | UUID = TOPIC_ID if version >= 13 else "orders"
    items = [ProducedPartition(0, 0, 12, -1, 3), ProducedPartition(7, 47, message="a stale epoch")]
    frame = produce_response(version, 99, [(topic, items), (topic, [])])
    assert int.from_bytes(frame[:4], "big") == len(frame) - 4
    assert int.from_bytes(frame[4:8], "big") == 99
    answer = decode_response(0, version, frame[4:])
    first, second = answer.responses[0].partition_responses
    assert (first.index, first.error_code, first.base_offset) == (0, 0, 12)
    assert (second.index, second.error_code, second.base_offset) == (7, 47, -1)
    if version >= 5:
        assert first.log_start_offset == 3
    if version >= 8:
        assert second.error_message == "a stale epoch"
    assert answer.responses[1].partition_responses == ()


@pytest.mark.parametrize("version", range(4, 19))
@pytest.mark.parametrize("sizes", [(), (70,), (70, 200_000)])
def test_fetch_response(version: int, sizes: tuple[int, ...]) -> None:
    topic: str | UUID = TOPIC_ID if version >= 13 else "orders"
    slices = tuple(Slice(-1, 0, size) for size in sizes)  # type: ignore[arg-type]
    items = [
        FetchedPartition(0, 0, 50, 40, 2, [(7, 11), (8, 12)], slices),
        FetchedPartition(1, 0, 50, 40, 2, None, ()),
        FetchedPartition(2, 3),
    ]
    parts = fetch_response(version, 99, [(topic, items)])
    frame = b"".join(bytes(part.length) if isinstance(part, Slice) else part for part in parts)
    assert int.from_bytes(frame[:4], "big") == len(frame) - 4
    answer = decode_response(1, version, frame[4:])
    first, second, third = answer.responses[0].partitions
    assert (first.high_watermark, first.last_stable_offset) == (50, 40)
    assert [(item.producer_id, item.first_offset) for item in first.aborted_transactions] == [(7, 11), (8, 12)]
    assert len(first.records or b"") == sum(sizes)
    assert second.aborted_transactions is None, "read_uncommitted wants null, not an empty list"
    assert third.error_code == 3

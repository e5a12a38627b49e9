"""The walk over a message must go exactly where kio goes, and stop before kio reserves memory that is not there."""

from __future__ import annotations

import subprocess
import sys
from io import BytesIO
from random import Random

import pytest
from kio.serial import entity_reader, entity_writer

from semel.errors import ProtocolError
from semel.wire import bounds
from semel.wire.bounds import checked, skip_tags
from semel.wire.messages import (
    RequestHeader,
    _entity,
    decode_request,
    decode_request_header,
    decode_response,
    encode_request,
    encode_response,
)
from tests.wire.random_messages import SCHEMAS, random_message

PRODUCE, METADATA, INIT_PRODUCER_ID = 0, 3, 22


def test_the_walk_ends_where_kio_ends_for_every_schema() -> None:
    rng = Random(11)
    for schema in SCHEMAS:
        entity = _entity(*schema)
        for _ in range(2):
            message = random_message(entity, rng)
            buffer = BytesIO()
            entity_writer(entity)(buffer, message)
            data = buffer.getvalue()
            assert checked(entity, data, 0) is data, schema
            assert bounds._entity(entity)(data, 0, []) == len(data), schema
            assert entity_reader(entity)(data, 0) == (message, len(data)), schema


def test_hostile_bytes_raise_nothing_else_and_never_lead_kio_elsewhere() -> None:
    rng = Random(5)
    read = 0
    likely = (0, 0, 0, 0, 1, 1, 2, 3, 4, 127, 128, 129, 255)
    for _ in range(60_000):
        key, version, kind = rng.choice(SCHEMAS)
        entity = _entity(key, version, kind)
        size = rng.choice((2, 4, 8, 12, 30, 80, 200))
        data = bytes(rng.choices(likely, k=size)) if rng.random() < 0.8 else rng.randbytes(size)
        try:
            if kind == "request":
                decode_request(RequestHeader(key, version, 1, None, 0), data)
            else:
                decode_response(key, version, bytes(4) + data)
        except ProtocolError:
            continue
        read += 1
        at = skip_tags(data, 0) if kind == "response" and entity.__flexible__ and key != 18 else 0
        frame = checked(entity, data, at)
        cuts: bounds.Cuts = []
        end = bounds._entity(entity)(frame, at, cuts)
        assert at + entity_reader(entity)(frame, at)[1] == end, (key, version, kind, data.hex())
        assert not cuts
    assert read > 1_000


@pytest.mark.parametrize(
    ("key", "version", "body"),
    [
        (METADATA, 1, "7fffffff"),
        (METADATA, 8, "7fffffff 0001 61"),
        (METADATA, 12, "ffffffff0f 00"),
        (METADATA, 12, "feffffff07 00"),
        (PRODUCE, 9, "00 ffff 00007530 ffffffff0f"),
        (PRODUCE, 9, "00 ffff 00007530 02 0274 8080808008"),
    ],
)
def test_a_few_bytes_cannot_reserve_gigabytes(key: int, version: int, body: str) -> None:
    # In another process with 1 GiB: without the check kio's allocation fails outside Python and ends the process.
    program = f"""
import resource
from semel.errors import ProtocolError
from semel.wire.messages import RequestHeader, decode_request
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
try:
    decode_request(RequestHeader({key}, {version}, 1, None, 0), bytes.fromhex("{body}"))
except ProtocolError as error:
    assert "an array of" in str(error), error
else:
    raise SystemExit("it was read")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]


def test_tagged_fields_of_a_newer_peer_are_passed_over() -> None:
    frame = encode_request(INIT_PRODUCER_ID, 4, 9, "c", transactional_id="t", transaction_timeout=1_000, producer_id=5)
    assert frame.endswith(b"\0")
    newer = frame[4:-1] + b"\x02\x07\x03abc\xc8\x01\x00"  # Tags 7 and 200.
    header = decode_request_header(newer)
    assert decode_request(header, newer) == decode_request(header, frame[4:])


def test_unknown_tags_between_and_inside_known_ones() -> None:
    def answer(leader: bytes, after: bytes, count: int) -> bytes:
        """A Produce v10 response whose partition has a leader (tag 0), and more tags."""
        partition = bytes.fromhex("00000000 0006 0000000000000001 ffffffffffffffff ffffffffffffffff 01 00")
        tags = bytes([count, 0, len(leader)]) + leader + after
        return bytes(5) + b"\x02\x02t\x02" + partition + tags + b"\0" + bytes(4) + b"\0"

    plain = answer(bytes.fromhex("00000007 00000009 00"), b"", 1)
    expected = decode_response(PRODUCE, 10, plain)
    assert expected.responses[0].partition_responses[0].current_leader.leader_epoch == 9
    inside = bytes.fromhex("00000007 00000009 01 05 02 ffff")
    for odd in (
        answer(bytes.fromhex("00000007 00000009 00"), b"\x09\x01x", 2),
        answer(inside, b"", 1),
        answer(inside, b"\x09\x00\x0a\x00", 3),
    ):
        assert decode_response(PRODUCE, 10, odd) == expected
    for bad, reason in (
        (answer(bytes.fromhex("00000007 00000009 00 00"), b"", 1), "does not have the 10 bytes"),
        (answer(bytes.fromhex("00000007 00000009"), b"", 1), "does not have the 8 bytes"),
        (answer(bytes.fromhex("00000007 00000009 00"), b"\0\x09" + bytes(9), 2), "field 0 comes after 0"),
        (answer(bytes.fromhex("00000007 00000009 00"), b"\x09\x7fx", 2), "ends before"),
    ):
        with pytest.raises(ProtocolError, match=reason):
            decode_response(PRODUCE, 10, bad)


def test_a_varint_that_is_longer_than_needed_does_not_move_the_walk() -> None:
    # 0x80 0x00 is a null string in two bytes.
    body = b"\x80\x00" + bytes.fromhex("000003e8 0000000000000005 0003 00")
    request = decode_request(RequestHeader(INIT_PRODUCER_ID, 4, 1, None, 0), body)
    assert (request.transactional_id, request.producer_id, request.producer_epoch) == (None, 5, 3)
    for bad in (b"\xff\xff\xff\xff\x7f", b"\x80\x80\x80\x80\x80\x00"):
        with pytest.raises(ProtocolError, match="a varint has more than"):
            decode_request(RequestHeader(INIT_PRODUCER_ID, 4, 1, None, 0), bad + bytes(30))


def test_header_tags() -> None:
    assert skip_tags(b"\x01\x05\x02ab!", 0) == 5
    assert skip_tags(b"\0", 0) == 1
    for cut in (b"", b"\x01", b"\x01\x05", b"\x01\x05\x02a"):
        with pytest.raises(ProtocolError, match="past the end"):
            skip_tags(cut, 0)


def test_every_truncation_of_a_response_is_refused() -> None:
    frame = encode_response(
        METADATA,
        12,
        1,
        brokers=[{"node_id": 1, "host": "localhost", "port": 9092, "rack": None}],
        cluster_id="c",
        controller_id=1,
        topics=[],
    )[4:]
    assert decode_response(METADATA, 12, frame).brokers[0].host == "localhost"
    for size in range(5, len(frame)):
        with pytest.raises(ProtocolError):
            decode_response(METADATA, 12, frame[:size])

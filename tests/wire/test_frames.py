"""Frames come out whole and in order however the stream is cut; a wrong length is refused before it costs memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semel.errors import ProtocolError
from semel.wire.frames import MAX_FRAME_BYTES, PIECES_MAX, FrameReader


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


@given(st.lists(st.binary(max_size=40), max_size=12), st.data())
def test_any_cut_of_the_stream_gives_the_same_frames(bodies: list[bytes], data) -> None:
    stream = b"".join(map(framed, bodies))
    reader = FrameReader()
    received: list[bytes] = []
    at = 0
    while at < len(stream):
        size = data.draw(st.integers(1, len(stream) - at))
        received += reader.receive_data(stream[at : at + size])
        at += size
    assert received == bodies
    assert reader.receive_data(b"") == []


def test_the_rest_of_a_frame_is_waited_for() -> None:
    reader = FrameReader()
    assert reader.receive_data(framed(b"first") + b"\0\0\0\x06sec") == [b"first"]
    assert "7 bytes pending" in repr(reader)
    assert reader.receive_data(memoryview(b"ond" + framed(b""))) == [b"second", b""]


def test_a_frame_in_very_many_pieces_is_put_together() -> None:
    reader, body = FrameReader(), bytes(range(256)) * (PIECES_MAX // 100)
    stream = framed(body) + framed(b"next")
    assert [frame for at in range(len(stream)) for frame in reader.receive_data(stream[at : at + 1])] == [body, b"next"]


@pytest.mark.parametrize("size", [-1, -(2**31), 101, 2**31 - 1])
def test_an_impossible_length_is_refused_at_once(size: int) -> None:
    reader = FrameReader(max_frame_bytes=100)
    assert reader.receive_data(framed(b"x" * 100)) == [b"x" * 100]
    with pytest.raises(ProtocolError, match=f"a frame of {size} bytes"):
        reader.receive_data(size.to_bytes(4, "big", signed=True))


def test_text_of_another_protocol_is_refused() -> None:
    with pytest.raises(ProtocolError):
        FrameReader().receive_data(b"GET / HTTP/1.1\r\n\r\n")
    assert int.from_bytes(b"GET ", "big") > MAX_FRAME_BYTES

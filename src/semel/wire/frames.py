"""Frames: a four-byte length and that many bytes, in both directions of a connection.

`FrameReader` cuts a byte stream into frames and refuses a length above its limit before anything is allocated for it.
"""

from __future__ import annotations

from semel.errors import ProtocolError

__all__ = ["MAX_FRAME_BYTES", "FrameReader"]

MAX_FRAME_BYTES = 104_857_600
"""Kafka's socket.request.max.bytes."""


class FrameReader:
    """Collect received bytes; give back whole frames without their length prefix."""

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max = max_frame_bytes
        self._buffer = bytearray()

    def __repr__(self) -> str:
        return f"<FrameReader {len(self._buffer)} bytes pending>"

    def receive_data(self, data: bytes | bytearray | memoryview) -> list[bytes]:
        """Take bytes; return the frames they complete, in order.

        Raises `ProtocolError` when a frame announces a negative or too large size: close the connection then.
        """
        buffer = self._buffer
        buffer += data
        frames: list[bytes] = []
        start, end = 0, len(buffer)
        while end - start >= 4:
            size = int.from_bytes(buffer[start : start + 4], "big", signed=True)
            if size < 0 or size > self._max:
                raise ProtocolError(f"a frame of {size} bytes was announced; the limit is {self._max}")
            if end - start - 4 < size:
                break
            frames.append(bytes(memoryview(buffer)[start + 4 : start + 4 + size]))
            start += 4 + size
        if start:
            del buffer[:start]
        return frames

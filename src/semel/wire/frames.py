"""Frames: a four-byte length and that many bytes, in both directions of a connection.

`FrameReader` cuts a byte stream into frames and refuses a length above its limit before anything is allocated for it.
"""

from __future__ import annotations

from semel.errors import ProtocolError

__all__ = ["MAX_FRAME_BYTES", "FrameReader"]

MAX_FRAME_BYTES = 104_857_600
"""Kafka's socket.request.max.bytes."""


PIECES_MAX = 1_000
"""So many pieces of a frame are kept as they came: more of them would take more memory than what they hold."""


class FrameReader:
    """Collect received bytes; give back whole frames without their length prefix.

    What comes is kept as it came and put together once: a large fetch is not copied again with every piece of it.
    """

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max = max_frame_bytes
        self._prefix = b""
        """What is there of the length of the next frame."""
        self._size = -1
        """The length of the frame that is being read; -1 before it is known."""
        self._pieces: list[bytes] = []
        self._missing = 0

    def __repr__(self) -> str:
        pending = len(self._prefix) if self._size < 0 else 4 + self._size - self._missing
        return f"<FrameReader {pending} bytes pending>"

    def receive_data(self, data: bytes | bytearray | memoryview) -> list[bytes]:
        """Take bytes; return the frames they complete, in order.

        Raises `ProtocolError` when a frame announces a negative or too large size: close the connection then.
        """
        frames: list[bytes] = []
        view, at = memoryview(data), 0
        while self._size >= 0 or at < len(view):
            if self._size < 0:
                at = self._read_prefix(view, at)
                continue
            piece = view[at : at + self._missing]
            at += len(piece)
            self._missing -= len(piece)
            self._pieces.append(data if isinstance(data, bytes) and len(piece) == len(data) else bytes(piece))
            if self._missing:
                if len(self._pieces) >= PIECES_MAX:
                    self._pieces = [b"".join(self._pieces)]
                break
            frames.append(b"".join(self._pieces))
            self._pieces, self._size = [], -1
        return frames

    def _read_prefix(self, view: memoryview, at: int) -> int:
        """Take of the length what is there; returns where the rest begins."""
        wanted = 4 - len(self._prefix)
        self._prefix += view[at : at + wanted]
        if len(self._prefix) == 4:
            size = int.from_bytes(self._prefix, "big", signed=True)
            if size < 0 or size > self._max:
                raise ProtocolError(f"a frame of {size} bytes was announced; the limit is {self._max}")
            self._prefix, self._size, self._missing = b"", size, size
        return at + wanted

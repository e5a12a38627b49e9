"""Cuts a stream of Kafka frames as it passes: most bytes go on in the pieces in which they came."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from semel.wire.frames import MAX_FRAME_BYTES

__all__ = ["FrameStream", "Mode"]


class Mode(Enum):
    """What becomes of one frame: on as it comes, into our hands whole, or nowhere."""

    PASS = "as it comes"  # noqa: S105 - a frame that passes, no password
    WHOLE = "whole"
    SKIP = "skip"


class FrameStream:
    """One direction of a connection.

    `begin(data, at)` looks at a frame's first `head` bytes and chooses its mode, `whole(frame)` gets a frame with its
    length prefix, `out` takes what passes. `halt()` keeps everything behind the present frame until `go()`.
    """

    def __init__(
        self,
        head: int,
        begin: Callable[[bytes, int], Mode],
        whole: Callable[[bytes], None],
        out: Callable[[bytes | memoryview], None],
    ) -> None:
        self._head = head
        self._begin, self._whole, self._out = begin, whole, out
        self._stash = b""
        self._left = 0
        self._mode = Mode.PASS
        self._parts: list[bytes] = []
        self._between: list[Callable[[], None]] = []
        self.halted = False
        self.is_opaque = False
        """These are no frames: everything passes."""

    def between_frames(self, action: Callable[[], None]) -> None:
        """Do this now, or as soon as the frame that is passing has passed."""
        if self._left and self._mode is Mode.PASS:
            self._between.append(action)
        else:
            action()

    def halt(self) -> None:
        """Pass nothing on behind the present frame."""
        self.halted = True

    def go(self) -> None:
        """Go on, with what was kept."""
        self.halted = False
        self.feed(b"")

    def feed(self, data: bytes) -> None:
        """Take bytes as they came."""
        if self._stash:
            data, self._stash = self._stash + data, b""
        keep = at = 0  # What lies between them is to go on as it is.
        end = len(data)
        while at < end and not self.halted:
            if self.is_opaque:
                at = end
                break
            if not self._left:
                if end - at < self._head:
                    break
                size = int.from_bytes(data[at : at + 4], "big", signed=True)
                if not self._head - 4 <= size <= MAX_FRAME_BYTES:
                    self.is_opaque = True
                    continue
                self._mode = self._begin(data, at)
                self._left = size + 4
                if self._mode is not Mode.PASS and at > keep:
                    self._out(data[keep:at])
            step = min(self._left, end - at)
            at += step
            self._left -= step
            if self._mode is not Mode.PASS:
                keep = at
                if self._mode is Mode.WHOLE:
                    self._collect(data[at - step : at])
            elif self._between and not self._left:
                self._out(data[keep:at])
                keep = at
                self._run_between()
        if at > keep:
            self._out(data if at - keep == end else memoryview(data)[keep:at])
        self._stash = data[at:]

    def _collect(self, part: bytes) -> None:
        self._parts.append(part)
        if not self._left:
            frame = b"".join(self._parts)
            self._parts.clear()
            self._whole(frame)

    def _run_between(self) -> None:
        actions, self._between = self._between, []
        for action in actions:
            action()

"""The child's half of supervision: a byte down a pipe several times a second, written by the event loop.

An event loop that hangs writes nothing, and the supervisor ends the process. A supervisor that is gone leaves a pipe
that nobody reads, and the child ends itself: nobody would restart it, and its successor would be its twin.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from semel.errors import ConfigurationError

__all__ = ["HEARTBEAT_VARIABLE", "Heartbeat"]

HEARTBEAT_VARIABLE = "SEMEL_HEARTBEAT_FD"
INTERVAL_SECONDS = 0.25
_EXIT_ORPHANED = 70


def _end_orphan() -> None:
    """End at once: whatever is open, a successor finds and finishes."""
    os._exit(_EXIT_ORPHANED)


class Heartbeat:
    """Beats while the event loop runs; does nothing in a process that has no supervisor."""

    def __init__(self, fd: int | None, on_orphaned: Callable[[], None] = _end_orphan) -> None:
        self._fd = fd
        self._on_orphaned = on_orphaned
        self._task: asyncio.Task[None] | None = None
        if fd is not None:
            os.set_blocking(fd, False)
            os.set_inheritable(fd, False)

    def __repr__(self) -> str:
        return f"<Heartbeat fd={self._fd} {'beating' if self._task else 'idle'}>"

    @classmethod
    def from_environment(cls) -> Heartbeat:
        """The heartbeat that the supervisor gave this process. Its variable is removed: it is not for our children."""
        text = os.environ.pop(HEARTBEAT_VARIABLE, "")
        if not text:
            return cls(None)
        try:
            fd = int(text)
            os.fstat(fd)
            return cls(fd)
        except (ValueError, OSError):
            raise ConfigurationError(
                f"{HEARTBEAT_VARIABLE}={text} is no open pipe: only the supervisor sets it. Unset it."
            ) from None

    def start(self) -> None:
        """Begin to beat; call it inside the event loop that does the work."""
        if self._fd is not None and self._task is None:
            self.beat()
            self._task = asyncio.create_task(self._run(), name="heartbeat")

    async def stop(self) -> None:
        """Beat no more. The pipe stays open: its end tells the supervisor that the process is gone."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL_SECONDS)
            self.beat()

    def beat(self) -> None:
        """Say that all is well; from any thread, while something holds the event loop that may."""
        if self._fd is None:
            return
        try:
            os.write(self._fd, b".")
        except BlockingIOError:
            return  # The supervisor has many of our beats to read; one more says nothing new.
        except OSError:
            self._on_orphaned()

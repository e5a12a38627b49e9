"""A server that tests start, signal and kill: a child process with a folder of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

__all__ = ["Killable", "Server"]


class Killable(Protocol):
    """A server that can be killed, and started again with what it had on the disk."""

    def kill(self) -> None: ...

    def start(self) -> object: ...


class Server:
    """`title` is what it is called in errors. A subclass has `start`."""

    title: str

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the process that was started last."""
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        """What the server wrote."""
        path = self.folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def _launch(self, command: Sequence[str], is_ready: Callable[[], bool], seconds: float = 60) -> None:
        """Start it, and wait until it is ready."""
        self._begin(command)
        if not self._wait(is_ready, time.monotonic() + seconds):
            raise RuntimeError(f"{self.title} did not start:\n{self.log[-4000:]}")

    def _begin(self, command: Sequence[str]) -> None:
        """Start the process, in a session of its own."""
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd="/",
                env=self._environment(),
                start_new_session=True,
            )

    def _environment(self) -> dict[str, str]:
        return dict(os.environ)

    def _wait(self, is_ready: Callable[[], bool], deadline: float) -> bool:
        """False when it has ended, or is not ready in time."""
        assert self._process is not None
        while self._process.poll() is None and time.monotonic() < deadline:
            if is_ready():
                return True
            time.sleep(0.02)
        return False

    def signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL; returns when the server is really gone: until it is reaped it holds its port and its folder."""
        self.signal(signal.SIGKILL)
        assert self._process is not None
        self._process.wait()

    def stop(self) -> None:
        """Kill the server and remove its folder."""
        if self._process is not None and self._process.poll() is None:
            self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

"""The processes of a trial: loops that are started again whenever they end, and the embedded broker."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from semel.errors import SemelError
from semel.processing.ports import free_ports

__all__ = ["Broker", "Loops"]

_RESTART_SECONDS = 0.5
_STOP_SECONDS = 15.0
"""How long a loop may take to end after SIGTERM; then it is killed."""
_START_SECONDS = 120.0


class Loops:
    """The same loop in several processes. Whatever ends is started again, as any supervisor would."""

    def __init__(self, argv: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]], folder: Path) -> None:
        self._argv, self._environments, self._folder = argv, environments, folder
        self._running: list[asyncio.subprocess.Process | None] = [None] * len(argv)
        self._keepers: list[asyncio.Task[None]] = []
        self._paused: set[int] = set()
        self.ended = 0
        """How many ended that nobody had killed."""

    def __len__(self) -> int:
        return len(self._argv)

    def start(self) -> None:
        self._keepers = [asyncio.create_task(self._keep(slot)) for slot in range(len(self))]

    async def _keep(self, slot: int) -> None:
        while True:
            with (self._folder / f"loop-{slot}.log").open("ab") as log:
                process = await asyncio.create_subprocess_exec(
                    *self._argv[slot], env={**os.environ, **self._environments[slot]}, stdout=log, stderr=log
                )
            self._running[slot] = process
            try:
                self.ended += await process.wait() != -signal.SIGKILL
            finally:
                self._running[slot] = None
            await asyncio.sleep(_RESTART_SECONDS)

    def signal(self, slot: int, number: int) -> bool:
        """Whether there was a process to signal."""
        process = self._running[slot]
        if process is None or process.returncode is not None:
            return False
        with suppress(ProcessLookupError):
            process.send_signal(number)
        return True

    def kill(self) -> None:
        """Kill -9 every one of them."""
        for slot in range(len(self)):
            self.signal(slot, signal.SIGKILL)

    async def stop(self) -> None:
        """End all with SIGTERM, and with SIGKILL those that do not listen."""
        processes = [process for process in self._running if process is not None]
        for task in self._keepers:
            task.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        for process in processes:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.terminate()
        for process in processes:
            try:
                await asyncio.wait_for(process.wait(), _STOP_SECONDS)
            except TimeoutError:
                with suppress(ProcessLookupError):
                    process.kill()
                await process.wait()

    def last_words(self) -> str:
        """The last line that the loops wrote, for a message to people."""
        for slot in range(len(self)):
            with suppress(OSError):
                lines = (self._folder / f"loop-{slot}.log").read_text(errors="replace").strip().splitlines()
                if lines:
                    return lines[-1][:300]
        return ""


class Broker:
    """The embedded broker in a process of its own, on a port and data that survive a kill."""

    def __init__(self, folder: Path) -> None:
        self.bootstrap = f"127.0.0.1:{free_ports(1)[0]}"
        self._log = folder / "broker.log"
        self._argv = [sys.executable, "-m", "semel", "broker", "--data", str(folder / "broker")]
        self._argv += ["--listen", self.bootstrap]
        self._process: subprocess.Popen[bytes] | None = None

    def _spawn(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(self._argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    async def start(self) -> None:
        """Return when it answers."""
        self._process = self._spawn()
        host, _, port = self.bootstrap.rpartition(":")
        deadline = time.monotonic() + _START_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                _, writer = await asyncio.open_connection(host, int(port))
                writer.close()
                return
            except OSError:
                await asyncio.sleep(0.02)
        raise SemelError(f"the embedded broker did not start: {self._log.read_text(errors='replace')[-500:]}")

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()

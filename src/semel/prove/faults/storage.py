"""Faults of the embedded broker's disk: no room, and a sync that fails."""

from __future__ import annotations

import asyncio
import resource
import signal
from contextlib import suppress
from random import Random

from semel.prove.faults.contract import NotNow, Outcome, Targets
from semel.prove.faults.limits import Limit
from semel.prove.faults.processes import Process

__all__ = ["Disk"]

_PATIENCE_SECONDS = 1.0
"""How long a sync is waited for; a broker that acknowledges before it syncs has few of them."""
_POLL_SECONDS = 0.02
_KIB = 1 << 10


class Disk(Limit):
    """The broker's disk is full (RLIMIT_FSIZE: a short write, then EFBIG), or a sync fails with EIO."""

    kind = "disk"
    does = (
        "the embedded broker can write no file beyond a length (RLIMIT_FSIZE: a short write, then an error, as on a "
        "full disk), or one of its syncs fails with EIO, after which it is killed, as its operator would"
    )
    promise = "what was refused is nowhere, what was acknowledged stays; a log whose sync failed takes nothing more"
    limit = resource.RLIMIT_FSIZE

    def __init__(self, targets: Targets) -> None:
        super().__init__(targets)
        self._failing: str = ""

    @classmethod
    def refusal(cls, targets: Targets) -> str:
        if not cls.aims(targets):
            return "Kafka is not ours here, and its disk cannot be reached."
        return super().refusal(targets)

    @classmethod
    def aims(cls, targets: Targets) -> list[str]:
        return targets.of_role("broker")

    def choose(self, _pid: int, rng: Random) -> tuple[int, str]:
        sizes = [path.stat().st_size for path in (self.targets.folder / "broker").rglob("*") if path.is_file()]
        # From "nothing can be written" to "only the longest file cannot grow much".
        length = rng.choice([0, rng.randrange(4 * _KIB), max(sizes, default=0) + rng.randrange(64 * _KIB)])
        return length, f"no file may grow beyond {length:,} bytes"

    async def strike(self, target: str, rng: Random) -> Outcome:
        if target in self.targets.pages and rng.random() < 0.5 and (done := await self._fail_sync(target)):
            return done
        return await super().strike(target, rng)

    async def _fail_sync(self, target: str) -> Outcome | None:
        page = self.targets.pages[target]
        before = page.failed_syncs
        self._failing = target
        page.failing_syncs = 1
        with suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE_SECONDS):
                while page.failed_syncs == before:
                    await asyncio.sleep(_POLL_SECONDS)
                return Outcome(f"{target}: a sync failed with EIO; it is killed half a second later", 0.5)
        page.failing_syncs, self._failing = 0, ""
        return None

    async def heal(self) -> None:
        await super().heal()
        if self._failing:
            target, self._failing = self._failing, ""
            self.targets.pages[target].failing_syncs = 0
            # The broker holds on to its refusal until it is started again, and reads what really is on the disk.
            with suppress(NotNow, ProcessLookupError):
                process = Process(self.targets.running(target))
                try:
                    process.signal(signal.SIGKILL)
                finally:
                    process.close()

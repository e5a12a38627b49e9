"""Limits that the kernel sets on a running process: memory, descriptors, the length of files.

`prlimit` needs no privilege on a process of one's own, as long as only the soft limit is moved; that is how all of
this heals.
"""

from __future__ import annotations

import os
import resource
from abc import abstractmethod
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import ClassVar

from semel.prove.faults.contract import Fault, NotNow, Outcome, Targets

__all__ = ["Descriptors", "Limit", "Memory", "set_soft_limit"]

_KIB, _MIB = 1 << 10, 1 << 20


def set_soft_limit(pid: int, limit: int, value: int) -> int:
    """Set a process' soft limit, as far as its hard one allows; returns the limit as it was.

    Raises `NotNow` when the process is gone.
    """
    try:
        soft, hard = resource.prlimit(pid, limit)
        resource.prlimit(pid, limit, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
    except ProcessLookupError:
        raise NotNow(f"process {pid} has just ended.") from None
    return soft


class Limit(Fault):
    """A soft limit of one process, lowered for a while."""

    limit: ClassVar[int]

    def __init__(self, targets: Targets) -> None:
        super().__init__(targets)
        self._lowered: tuple[int, int] | None = None

    @classmethod
    def refusal(cls, targets: Targets) -> str:
        if not hasattr(resource, "prlimit"):
            return "this system cannot limit another process while it runs: prlimit is Linux' own."
        return super().refusal(targets)

    @classmethod
    def aims(cls, targets: Targets) -> list[str]:
        return targets.of_role("worker", "http", "broker")

    @abstractmethod
    def choose(self, pid: int, rng: Random) -> tuple[int, str]:
        """The new limit, and what it means in words. Raises OSError when the process is gone."""

    async def strike(self, target: str, rng: Random) -> Outcome:
        pid = self.targets.running(target)
        seconds = rng.uniform(0.5, 4.0)
        try:
            value, what = self.choose(pid, rng)
        except OSError:
            raise NotNow(f"{target} has just ended.") from None
        self._lowered = pid, set_soft_limit(pid, self.limit, value)
        return Outcome(f"{target} (pid {pid}): {what} for {seconds:.1f} s", seconds)

    async def heal(self) -> None:
        if self._lowered is not None:
            (pid, before), self._lowered = self._lowered, None
            with suppress(NotNow):
                set_soft_limit(pid, self.limit, before)


class Memory(Limit):
    """RLIMIT_AS a little above what the process has: its next larger allocations fail."""

    kind = "memory"
    does = "no more address space than a process has just now, and up to 8 MiB (RLIMIT_AS): allocations fail"
    promise = "a process without memory fails or dies, and is started again; it never does half of a unit"
    limit = resource.RLIMIT_AS

    def choose(self, pid: int, rng: Random) -> tuple[int, str]:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
        more = rng.choice([0, 64 * _KIB, _MIB, 8 * _MIB])
        return pages * resource.getpagesize() + more, f"{more // _KIB} KiB of memory more and no further"


class Descriptors(Limit):
    """RLIMIT_NOFILE at what the process has open: it can open and accept nothing."""

    kind = "descriptors"
    does = "no file or connection can be opened or accepted (RLIMIT_NOFILE), those that are open go on"
    promise = "what cannot be opened is tried again; nothing is given up, nothing is lost"
    limit = resource.RLIMIT_NOFILE

    def choose(self, pid: int, rng: Random) -> tuple[int, str]:
        highest = max((int(name) for name in os.listdir(f"/proc/{pid}/fd")), default=2)
        more = rng.choice([0, 0, 1, 3])
        return highest + 1 + more, f"room for {more} descriptors above the {highest + 1} first ones"

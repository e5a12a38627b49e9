"""Kills and pauses: what a process cannot prevent, and what it cannot notice."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from random import Random

from semel.failpoints import FAILPOINTS
from semel.prove.faults.contract import Fault, NotNow, Outcome, Targets, role_of

__all__ = ["Kill", "Pause", "Process", "points_of"]

_NTH = (1, 1, 1, 2, 3, 10, 40)
"""Which pass of an armed failpoint acts: some are passed once in a process' life, others at every record."""
_TORN_BYTES = 200


class Process:
    """One process, and never another one that got its number later."""

    def __init__(self, pid: int) -> None:
        try:
            self._file = os.pidfd_open(pid)
        except ProcessLookupError:
            raise NotNow(f"process {pid} has just ended.") from None
        self.pid = pid

    def __repr__(self) -> str:
        return f"<Process {self.pid}>"

    def signal(self, number: int) -> None:
        """Send a signal. Raises `ProcessLookupError` when the process is gone."""
        signal.pidfd_send_signal(self._file, number)

    def close(self) -> None:
        """Forget the process; it goes on."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def points_of(role: str) -> list[str]:
    """The failpoints that a process of this role passes."""
    return [name for name, point in FAILPOINTS.items() if point.role == role]


def _trap(role: str, rng: Random) -> str:
    """A failpoint for the next start, as SEMEL_FAILPOINT takes it; for every second start there is none."""
    points = points_of(role)
    if not points or rng.random() < 0.5:
        return ""
    name = rng.choice(points)
    action = f"torn={rng.randrange(_TORN_BYTES)}" if FAILPOINTS[name].writes and rng.random() < 0.5 else "kill"
    return f"{name}:{action}:{rng.choice(_NTH)}"


class Kill(Fault):
    """SIGKILL; every second time the process that comes back is armed to die at a named line."""

    kind = "kill"
    does = "kill -9 at a random moment, or at a named line of the protocol in the process that comes back"
    promise = "nothing lost, nothing doubled; what was open is aborted or finished by the successor"

    @classmethod
    def aims(cls, targets: Targets) -> list[str]:
        return targets.of_role("worker", "http", "broker")

    async def strike(self, target: str, rng: Random) -> Outcome:
        pid = self.targets.running(target)
        trap = _trap(role_of(target), rng)
        process = Process(pid)
        try:
            # Before the kill: the keeper may start the successor at once.
            if trap:
                self.targets.armed[target] = trap
            process.signal(signal.SIGKILL)
        except ProcessLookupError:
            self.targets.armed.pop(target, None)
            raise NotNow(f"{target} has just ended.") from None
        finally:
            process.close()
        return Outcome(f"{target} (pid {pid}) killed" + (f"; its successor dies at {trap}" if trap else ""))


class Pause(Fault):
    """SIGSTOP until the others have given the process up, then SIGCONT: it goes on as if nothing had happened."""

    kind = "pause"
    does = "SIGSTOP until sessions have timed out (a broker: for up to 3 s), then SIGCONT"
    promise = "the zombie is fenced: nothing it still sends counts, and its error says so"

    def __init__(self, targets: Targets) -> None:
        super().__init__(targets)
        self._stopped: Process | None = None

    @classmethod
    def aims(cls, targets: Targets) -> list[str]:
        return targets.of_role("worker", "http", "broker")

    async def strike(self, target: str, rng: Random) -> Outcome:
        pid = self.targets.running(target)
        # A worker becomes a zombie. The others have no session: their clients wait, or give up and ask again.
        is_member = role_of(target) == "worker"
        seconds = self.targets.session_seconds * rng.uniform(1.2, 2.0) if is_member else rng.uniform(0.3, 3.0)
        self._stopped = Process(pid)
        try:
            self._stopped.signal(signal.SIGSTOP)
        except ProcessLookupError:
            raise NotNow(f"{target} has just ended.") from None
        return Outcome(f"{target} (pid {pid}) stopped for {seconds:.1f} s", seconds)

    async def heal(self) -> None:
        if self._stopped is not None:
            with suppress(ProcessLookupError):
                self._stopped.signal(signal.SIGCONT)
            self._stopped.close()
            self._stopped = None

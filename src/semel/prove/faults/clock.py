"""A wall clock that jumps: the app's own one, in one process, while it runs.

Setting the machine's clock needs root and strikes everybody on it; a time namespace moves only clocks that never
jump; a preloaded library would be a compiler's work on the user's machine. So the clock that jumps is the one that
Semel itself asks, `Env.wall_ms`, through the process' fault page - and that is what the report says.
"""

from __future__ import annotations

from random import Random

from semel.prove.faults.contract import Fault, Outcome, Targets

__all__ = ["Clock"]

_JUMPS_SECONDS = (-3_600, -60, -1, 1, 60, 3_600)
"""Within an hour: what is kept for a day for retries of clients is not to expire."""


class Clock(Fault):
    """One process' wall clock is off for a while."""

    kind = "clock"
    does = "the wall clock that Semel reads in one process jumps by up to an hour, forward or back, and later back"
    promise = (
        "no safety decision reads a wall clock: transactions and sessions may end early, nothing is lost or doubled"
    )

    def __init__(self, targets: Targets) -> None:
        super().__init__(targets)
        self._target = ""

    @classmethod
    def refusal(cls, targets: Targets) -> str:
        return "" if targets.pages else "the processes were started without fault pages, so their clocks are right."

    @classmethod
    def aims(cls, targets: Targets) -> list[str]:
        return list(targets.pages)

    async def strike(self, target: str, rng: Random) -> Outcome:
        self.targets.running(target)
        jump, seconds = rng.choice(_JUMPS_SECONDS), rng.uniform(1.0, 6.0)
        self._target = target
        self.targets.pages[target].clock_off_ms = jump * 1_000
        return Outcome(f"{target}: wall clock {jump:+,} s for {seconds:.1f} s", seconds)

    async def heal(self) -> None:
        if self._target:
            self.targets.pages[self._target].clock_off_ms = 0

"""The faults of a campaign: planned by the seed, struck at their times, and all of them healed at the end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import count
from random import Random
from typing import NamedTuple

from semel.prove.faults.contract import Fault, NotNow, Targets, inflict

__all__ = ["Planned", "Striker", "plan_strikes"]

log = logging.getLogger("semel.prove")

FIRST_SECONDS = 2.0
AT_ONCE_MAX = 3
"""Faults that last at one moment: more, and nothing is left that could make progress."""
LATE_SECONDS = 10.0
"""A fault that cannot strike for so long (its target is being started again, is struck by another one, sends nothing of
the kind that is waited for) is given up: a queue of them would outlast the load."""
TRY_SECONDS = 0.25


class Planned(NamedTuple):
    """Strike `target` with `kind` so many seconds after the load began; `seed` decides what the fault leaves open."""

    at: float
    kind: str
    target: str
    seed: str


def plan_strikes(
    kinds: Sequence[type[Fault]], targets: Targets, seed: int, seconds: float, every: float
) -> list[Planned]:
    """Faults over so many seconds, one each `every` seconds on average; each kind comes as often as any other."""
    rng = Random(f"{seed}:strikes")
    wanted = max(len(kinds), int((seconds - FIRST_SECONDS) / every))
    planned = []
    order: list[type[Fault]] = []
    for number in range(wanted):
        if not order:
            order = list(kinds)
            rng.shuffle(order)
        fault = order.pop()
        at = FIRST_SECONDS + max(0.0, seconds - FIRST_SECONDS) * (number + rng.random()) / wanted
        planned.append(Planned(at, fault.kind, rng.choice(sorted(fault.aims(targets))), f"{seed}:{number}"))
    return sorted(planned)


class Striker:
    """Strikes what was planned. `now` says what is broken at this moment."""

    def __init__(
        self,
        planned: Sequence[Planned],
        kinds: Sequence[type[Fault]],
        targets: Targets,
        *,
        late_seconds: float = LATE_SECONDS,
    ) -> None:
        self._planned = planned
        self._late_seconds = late_seconds
        self._kinds = {fault.kind: fault for fault in kinds}
        self._targets = targets
        self._busy: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._room = asyncio.Semaphore(AT_ONCE_MAX)
        self.counts: Counter[str] = Counter()
        """Faults that struck, by kind."""
        self.missed: Counter[str] = Counter()
        """Planned ones that could not strike within ten seconds."""
        self.now: dict[str, str] = {}
        """What is being broken: target to kind."""
        self.failed: list[str] = []
        """Faults that could not be healed, or broke in another way than they are to."""

    def __repr__(self) -> str:
        return f"<Striker {self.counts.total()} of {len(self._planned)} struck>"

    async def run(self) -> None:
        """Strike everything; returns when the last fault is healed. Heals also when it is cancelled."""
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for planned in self._planned:
                await asyncio.sleep(max(0.0, began + planned.at - time.monotonic()))
                group.create_task(self._strike(planned, time.monotonic() + self._late_seconds))

    async def _strike(self, planned: Planned, latest: float) -> None:
        async with self._busy[planned.target], self._room:
            for number in count():
                if time.monotonic() > latest:
                    break
                self.now[planned.target] = planned.kind
                try:
                    if await self._inflict(planned, Random(f"{planned.seed}:{number}")):
                        return
                finally:
                    self.now.pop(planned.target, None)
                await asyncio.sleep(TRY_SECONDS)
            self.missed[planned.kind] += 1

    async def _inflict(self, planned: Planned, rng: Random) -> bool:
        """False when the target was not there."""
        fault = self._kinds[planned.kind](self._targets)
        try:
            await inflict(fault, planned.target, rng)
        except NotNow:
            return False
        except Exception as error:  # A fault that fails is told at the end; the others go on.
            log.exception("%s of %s failed", planned.kind, planned.target)
            self.failed.append(f"{planned.kind} of {planned.target}: {type(error).__name__}: {error}")
        else:
            self.counts[planned.kind] += 1
        return True

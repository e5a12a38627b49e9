"""The plan of strikes: decided by the seed, every kind, in time."""

from __future__ import annotations

import asyncio
from collections import Counter
from random import Random
from typing import ClassVar

from semel.prove.faults.contract import Fault, NotNow, Outcome, Targets
from semel.prove.faults.processes import Kill, Pause
from semel.prove.striker import AT_ONCE_MAX, Striker, plan_strikes

TARGETS = Targets(names=["broker-0", "http-0", "http-1", "worker-0", "worker-1"])


def test_the_seed_decides_the_plan() -> None:
    planned = plan_strikes([Kill, Pause], TARGETS, 3, 160.0, 1.2)
    assert planned == plan_strikes([Kill, Pause], TARGETS, 3, 160.0, 1.2)
    assert planned != plan_strikes([Kill, Pause], TARGETS, 4, 160.0, 1.2)
    assert Counter(strike.kind for strike in planned) in ({"kill": 66, "pause": 65}, {"kill": 65, "pause": 66})
    assert {strike.target for strike in planned} == set(TARGETS.names)
    assert all(2.0 <= strike.at <= 160.0 for strike in planned)
    assert [strike.at for strike in planned] == sorted(strike.at for strike in planned)


def test_a_short_run_still_meets_every_kind_once() -> None:
    assert {strike.kind for strike in plan_strikes([Kill, Pause], TARGETS, 1, 1.0, 1.2)} == {"kill", "pause"}


class Slow(Fault):
    kind = "slow"
    does = promise = ""
    at_once = most = healed = 0
    busy: ClassVar[Counter[str]] = Counter()

    @classmethod
    def aims(cls, targets: Targets) -> list[str]:
        return list(targets.names)

    async def strike(self, target: str, rng: Random) -> Outcome:
        assert not Slow.busy[target], "one target has two faults at once"
        Slow.busy[target] += 1
        Slow.at_once += 1
        Slow.most = max(Slow.most, Slow.at_once)
        self.target = target
        if rng.random() < 0.1:
            raise OSError("the machine has no such thing")
        return Outcome("slow", 0.01)

    async def heal(self) -> None:
        Slow.busy[self.target] -= 1
        Slow.at_once -= 1
        Slow.healed += 1


class Away(Slow):
    kind = "away"

    async def strike(self, target: str, rng: Random) -> Outcome:
        raise NotNow(f"{target} is away")

    async def heal(self) -> None: ...


def test_strikes_do_not_pile_up_and_all_are_healed() -> None:
    planned = [strike._replace(at=strike.at / 100) for strike in plan_strikes([Slow], TARGETS, 1, 60.0, 1.0)]
    striker = Striker(planned, [Slow], TARGETS)
    asyncio.run(striker.run())
    assert Slow.healed == len(planned) == striker.counts["slow"] + len(striker.failed)
    assert striker.failed[0].endswith("OSError: the machine has no such thing")
    assert 1 < Slow.most <= AT_ONCE_MAX
    assert striker.now == {}


def test_a_target_that_stays_away_is_counted_as_missed() -> None:
    planned = plan_strikes([Away], TARGETS, 1, 1.0, 1.0)
    striker = Striker([strike._replace(at=0.0) for strike in planned], [Away], TARGETS, late_seconds=0.1)
    asyncio.run(striker.run())
    assert striker.missed == {"away": len(planned)}
    assert not striker.counts

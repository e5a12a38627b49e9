"""Every request several times at once: what impatient clients and repeating gateways do."""

from __future__ import annotations

from random import Random

from semel.prove.faults.contract import Fault, Outcome, Targets

__all__ = ["Duplicate"]


class Duplicate(Fault):
    """The load posts each request in several copies at the same moment, to whichever instances."""

    kind = "duplicate"
    does = "each request is posted 2 to 16 times at the same moment with the same Idempotency-Key, to all instances"
    promise = "one effect, and the same answer to every copy"

    @classmethod
    def aims(cls, targets: Targets) -> list[str]:
        return ["requests"] if targets.copies is not None else []

    async def strike(self, target: str, rng: Random) -> Outcome:
        assert self.targets.copies is not None
        copies, seconds = rng.choice([2, 4, 8, 16]), rng.uniform(1.0, 5.0)
        self.targets.copies(copies)
        return Outcome(f"{target} posted {copies} times at once for {seconds:.1f} s", seconds)

    async def heal(self) -> None:
        if self.targets.copies is not None:
            self.targets.copies(1)

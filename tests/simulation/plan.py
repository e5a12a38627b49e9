"""What a seed stands for: who takes part, with which settings, and what goes wrong when."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

__all__ = ["CHAIN_FAULTS", "DATABASE_FAULTS", "FAULTS", "LATE", "Fault", "Plan", "stream"]

HORIZON = 1.5
"""Seconds of virtual time in which faults begin; clients are busy for about as long."""

FAULTS = (
    *("cut",) * 2,
    *("hold",) * 2,
    *("late request",) * 3,
    "swallow",
    "refuse",
    *("kill broker",) * 2,
    *("crash at operation",) * 3,
    "lose power",
    "kill client",
    "pause client",
    *("twin",) * 2,
    "jump clock",
    "fill disk",
    "fail sync",
)
"""What can go wrong; what stands here more often happens more often."""
LATE = (0, 0, 24, 25, 26, 26, 26, 28)
"""APIs whose requests come late: Produce, AddPartitionsToTxn, AddOffsetsToTxn, EndTxn, TxnOffsetCommit."""

CHAIN_HORIZON = 3.0
"""The chain's sessions are a second long, and what ends with one takes longer."""
DATABASE_FAULTS = ("end session", "cut database", "restart database", "break COMMIT", "late COMMIT")
CHAIN_FAULTS = (
    *("cut",) * 2,
    "hold",
    *("late request",) * 2,
    "swallow",
    *("kill broker",) * 2,
    *("crash at operation",) * 2,
    "lose power",
    *("kill client",) * 2,
    "pause client",
    *("zombie",) * 5,
    *("kill at point",) * 3,
    *("twin",) * 2,
    "jump clock",
    "fill disk",
    "fail sync",
    *DATABASE_FAULTS,
    "break COMMIT",
)
DUAL_FAULTS = (
    *("cut",) * 2,
    "hold",
    *("late request",) * 2,
    "swallow",
    *("kill broker",) * 2,
    *("crash at operation",) * 2,
    "lose power",
    "kill client",
    *("pause client",) * 2,
    *("zombie",) * 5,
    *("kill at point",) * 5,
    "jump clock",
    *DATABASE_FAULTS,
    *("break COMMIT",) * 2,
    *("late COMMIT",) * 2,
)


def stream(seed: int, name: str) -> random.Random:
    """Random numbers for one purpose: what one part draws does not move another's."""
    return random.Random(f"{seed}/{name}")


COUNTS = (
    *("writers", "idempotent", "processors", "readers"),
    *("workers", "feeders", "gateways", "callers", "sinks", "copiers"),
    "payers",
)
"""What shrinking takes away one by one."""
MINIMA = {("chain", "workers"): 1, ("dual", "payers"): 1}


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong at a time; `draw` in [0, 1) picks its victim and its size."""

    at: float
    kind: str
    draw: float
    seconds: float

    def __str__(self) -> str:
        return f"{self.at:.4f} {self.kind} (draw {self.draw:.3f}, {self.seconds:.3f} s)"


@dataclass(frozen=True)
class Plan:
    """A whole run. Equal plans run equally, in every process and on every machine."""

    seed: int
    transaction_version: int
    fsync: str
    writers: int
    idempotent: int
    processors: int
    readers: int
    admin: bool
    operations: int
    faults: tuple[Fault, ...]
    knobs: dict[str, Any] = field(default_factory=dict)
    world: str = "broker"
    """`broker`: clients of all kinds. `chain`: Semel's own workers, gateways and sinks on it. `dual`: a bank that
    writes to its database and to the broker at once."""
    workers: int = 0
    feeders: int = 0
    gateways: int = 0
    callers: int = 0
    sinks: int = 0
    """Whether the workers have a sink."""
    copiers: int = 0
    """Whether they have a plain processor beside the one with state."""
    payers: int = 0
    quick: bool = False
    """Whether plain processors have the inner loop in C."""

    @classmethod
    def of(cls, seed: int, world: str = "broker") -> Plan:
        """The plan of a seed; the worlds' plans of one seed have their settings in common."""
        plan = cls._broker(seed)
        return plan._chain() if world == "chain" else plan._dual() if world == "dual" else plan

    @classmethod
    def _broker(cls, seed: int) -> Plan:
        rng = stream(seed, "plan")
        fsync = rng.choice(("os", "always"))
        faults = _faults(rng, FAULTS, fsync, HORIZON, (0.02, 0.2, 1.0))
        knobs = {
            "latency": rng.choice((0.0001, 0.001, 0.01)),
            "jitter": rng.choice((0.0001, 0.002, 0.03)),
            "split": rng.choice((0.0, 0.1, 0.5)),
            "window": rng.choice((700, 262_144, 262_144)),
            "segment bytes": rng.choice((200, 1000, 1 << 30)),
            "snapshot batches": rng.choice((1, 5, 4096)),
            "checkpoint bytes": rng.choice((400, 4 << 20)),
            "epoch max": rng.choice((4, 32_766, 32_766)),
            "transaction timeout ms": rng.choice((300, 2000)),
            "think": rng.choice((0.0, 0.01, 0.05)),
        }
        # A time-out below what a large answer takes on this network would be met for ever.
        slow = knobs["jitter"] > 0.01 or knobs["window"] < 1000
        knobs["socket timeout ms"] = 1000 if slow else rng.choice((150, 1000))
        knobs["markers late"] = stream(seed, "markers").choice((0.0, 0.0, 0.01, 0.08))
        return cls(
            seed=seed,
            transaction_version=rng.choice((1, 2)),
            fsync=fsync,
            writers=rng.choice((0, 1, 1, 2)),
            idempotent=rng.choice((0, 0, 1)),
            processors=rng.choice((0, 1)),
            readers=rng.choice((0, 1, 1)),
            admin=rng.random() < 0.3,
            operations=rng.choice((2, 5, 9)),
            faults=faults,
            knobs=knobs,
        )

    def _chain(self) -> Plan:
        rng = stream(self.seed, "chain")
        knobs = self.knobs | {
            # A rebalance, a restored state and a reopened database are many round trips, one after the other.
            "latency": rng.choice((0.0001, 0.001, 0.003)),
            "jitter": rng.choice((0.0001, 0.002, 0.005)),
            "window": 262_144,
            "socket timeout ms": rng.choice((300, 1000)),
            "transaction timeout ms": rng.choice((1000, 3000)),
            "session timeout ms": 1000,
            "commit interval ms": rng.choice((20, 50)),
            "poison": rng.choice((0, 0, 17)),
            "handler trouble": rng.choice((0.0, 0.05)),
        }
        by_http = rng.random() < 0.5
        plain = stream(self.seed, "plain")
        return replace(
            self,
            world="chain",
            writers=0,
            idempotent=0,
            processors=0,
            readers=0,
            admin=False,
            workers=rng.choice((1, 2, 2, 3)),
            feeders=int(not by_http),
            gateways=rng.choice((1, 2)) if by_http else 0,
            callers=rng.choice((1, 2)) if by_http else 0,
            sinks=rng.choice((0, 1, 1)),
            copiers=plain.choice((0, 1)),
            quick=plain.random() < 0.7,
            operations=rng.choice((3, 6, 10)),
            faults=_faults(rng, CHAIN_FAULTS, self.fsync, CHAIN_HORIZON, (0.05, 0.5, 2.0)),
            knobs=knobs,
        )

    def _dual(self) -> Plan:
        rng = stream(self.seed, "dual")
        knobs = self.knobs | {
            "latency": rng.choice((0.0001, 0.001, 0.003)),
            "jitter": rng.choice((0.0001, 0.002, 0.005)),
            "window": 262_144,
            "socket timeout ms": rng.choice((300, 1000)),
            "suspicion": rng.choice((0.0, 0.05, 0.3)),
            "think": rng.choice((0.05, 0.3)),
        }
        return replace(
            self,
            world="dual",
            transaction_version=2,
            writers=0,
            idempotent=0,
            processors=0,
            readers=0,
            admin=False,
            payers=rng.choice((1, 2, 2, 3)),
            operations=rng.choice((6, 12, 20)),
            faults=_faults(rng, DUAL_FAULTS, self.fsync, CHAIN_HORIZON, (0.05, 0.5, 2.0)),
            knobs=knobs,
        )

    def faults_are_within(self, kinds: set[str]) -> bool:
        """Whether nothing else goes wrong."""
        return all(fault.kind in kinds for fault in self.faults)

    def smaller(self) -> list[tuple[str, Plan]]:
        """Plans with one thing less; the ones with the largest bite first."""
        found: list[tuple[str, Plan]] = []
        half = len(self.faults) // 2
        if half > 1:
            found.append(("second half of the faults", replace(self, faults=self.faults[:half])))
            found.append(("first half of the faults", replace(self, faults=self.faults[half:])))
        found += [
            (f"fault {fault}", replace(self, faults=self.faults[:at] + self.faults[at + 1 :]))
            for at, fault in enumerate(self.faults)
        ]
        if self.admin:
            found.append(("the administrator", replace(self, admin=False)))
        for name in COUNTS:
            if getattr(self, name) > MINIMA.get((self.world, name), 0):
                found.append((f"one of the {name}", replace(self, **{name: getattr(self, name) - 1})))
        if self.operations > 1:
            found.append(("half of the operations", replace(self, operations=self.operations // 2)))
            found.append(("one operation", replace(self, operations=self.operations - 1)))
        return found


def _faults(
    rng: random.Random, mix: tuple[str, ...], fsync: str, horizon: float, sizes: tuple[float, ...]
) -> tuple[Fault, ...]:
    allowed = [kind for kind in dict.fromkeys(mix) if rng.random() < 0.55]
    if fsync == "os":  # Promises nothing about a loss of power, nor about a sync.
        allowed = [kind for kind in allowed if kind not in ("lose power", "fail sync")]
    kinds = [kind for kind in mix if kind in allowed]
    faults = [
        Fault(rng.uniform(0.0, horizon), rng.choice(kinds), rng.random(), rng.choice(sizes) * rng.random())
        for _ in range(rng.choice((0, 2, 4, 8)) if kinds else 0)
    ]
    return tuple(sorted(faults, key=lambda fault: fault.at))

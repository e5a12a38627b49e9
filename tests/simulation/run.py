"""`python -m tests.simulation.run`: many seeds on all cores, or one again.

--seeds N [--start S] [--world W]    N seeds from S on, of both worlds in turn or of one; without --start a start that
                                     was never used, which is printed
--world W --seed S [--faults 0,2 --writers 1 ...]   one run, with its last events; shrinking prints the options
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from tests.simulation.plan import COUNTS, Plan
from tests.simulation.world import Outcome
from tests.simulation.worlds import WORLDS, run

__all__ = ["Report", "campaign", "command", "explain", "fresh_start", "shrink"]

SHRINK_RUNS = 150
_COUNTS = (*COUNTS, "operations")


def fresh_start() -> int:
    """A first seed that nobody has run."""
    return random.SystemRandom().randrange(1 << 48)


def shrink(outcome: Outcome) -> Outcome:
    """The smallest plan found that breaks the same promise, by leaving out one thing after another."""
    assert outcome.problem is not None
    best = outcome
    runs = 0
    while runs < SHRINK_RUNS:
        for _, plan in best.plan.smaller():
            runs += 1
            found = run(plan)
            if found.problem is not None and found.problem.kind == outcome.problem.kind:
                best = found
                break
            if runs >= SHRINK_RUNS:
                return best
        else:
            return best
    return best


def command(plan: Plan) -> str:
    """What runs this plan again."""
    whole = Plan.of(plan.seed, plan.world)
    parts = [f"python -m tests.simulation.run --world {plan.world} --seed {plan.seed}"]
    if plan.faults != whole.faults:
        kept = [str(number) for number, fault in enumerate(whole.faults) if fault in plan.faults]
        parts.append(f"--faults {','.join(kept) or 'none'}")
    parts += [f"--{name} {getattr(plan, name)}" for name in _COUNTS if getattr(plan, name) != getattr(whole, name)]
    if plan.admin != whole.admin:
        parts.append("--no-admin")
    return " ".join(parts)


def explain(outcome: Outcome) -> str:
    """A failure for its reader: what broke, the plan, the last events, how to see it again."""
    plan = outcome.plan
    values = {item.name: getattr(plan, item.name) for item in fields(plan) if item.name not in ("faults", "knobs")}
    lines = [
        f"broken promise: {outcome.problem}",
        f"plan: {values} {plan.knobs}",
        *(f"  fault at {fault}" for fault in plan.faults),
        f"the last {len(outcome.trace)} of its events:",
        *(f"  {line}" for line in outcome.trace),
        f"again: {command(plan)}",
    ]
    return "\n".join(lines)


@dataclass
class Report:
    """What a campaign did."""

    runs: int = 0
    steps: int = 0
    virtual_seconds: float = 0.0
    restarts: int = 0
    transactions: int = 0
    records: int = 0
    zombies: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[Plan, str]] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.runs += 1
        self.steps += outcome.steps
        self.virtual_seconds += outcome.seconds
        self.restarts += outcome.restarts
        self.transactions += outcome.transactions
        self.records += outcome.records
        self.zombies += outcome.zombies
        self.faults.update(fault.kind for fault in outcome.plan.faults)
        if outcome.problem is not None:
            self.failures.append((outcome.plan, str(outcome.problem)))

    def merge(self, other: Report) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Counter):
                value.update(getattr(other, item.name))
            else:
                setattr(self, item.name, value + getattr(other, item.name))

    def __str__(self) -> str:
        return (
            f"{self.runs} seeds, {self.steps} steps, {self.virtual_seconds / 3600:.1f} h of virtual time, "
            f"{self.restarts} restarts of the broker, {self.transactions} transactions, {self.records} records read, "
            f"{self.zombies} zombies, "
            f"{sum(self.faults.values())} faults {dict(sorted(self.faults.items()))}, {len(self.failures)} failures"
        )


def _some(seeds: list[tuple[int, str]]) -> Report:
    report = Report()
    for seed, world in seeds:
        report.add(run(Plan.of(seed, world)))
    return report


def campaign(
    start: int, count: int, jobs: int = 1, worlds: Sequence[str] = tuple(WORLDS), chunk: int = 50
) -> Iterator[Report]:
    """Run seeds, each in the next of the worlds; the report so far after every few of them."""
    total = Report()
    seeds = [(start + number, worlds[number % len(worlds)]) for number in range(count)]
    chunks = [seeds[at : at + chunk] for at in range(0, count, chunk)]
    if jobs == 1:
        for some in chunks:
            total.merge(_some(some))
            yield total
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for report in pool.imap_unordered(_some, chunks):
            total.merge(report)
            yield total


def _one(options: Any) -> int:
    plan = Plan.of(options.seed, options.world or "broker")
    if options.faults is not None:
        kept = [] if options.faults == "none" else [int(number) for number in options.faults.split(",")]
        plan = replace(plan, faults=tuple(plan.faults[number] for number in kept))
    plan = replace(plan, **{name: getattr(options, name) for name in _COUNTS if getattr(options, name) is not None})
    if options.no_admin:
        plan = replace(plan, admin=False)
    outcome = run(plan)
    if outcome.problem is None:
        print(f"seed {plan.seed} keeps every promise: {outcome.steps} steps, events {outcome.digest}")
        return 0
    print(explain(outcome if options.whole else shrink(outcome)))
    return 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.run")
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--start", type=int)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--world", choices=tuple(WORLDS))
    parser.add_argument("--whole", action="store_true", help="do not shrink a failure")
    parser.add_argument("--faults")
    parser.add_argument("--no-admin", action="store_true")
    for name in _COUNTS:
        parser.add_argument(f"--{name}", type=int)
    options = parser.parse_args()
    if options.seed is not None:
        return _one(options)
    start = fresh_start() if options.start is None else options.start
    print(f"{options.seeds} seeds from {start} on", flush=True)
    began = time.monotonic()
    report, told, shown = Report(), began, 0
    worlds = (options.world,) if options.world else tuple(WORLDS)
    for report in campaign(start, options.seeds, options.jobs, worlds):
        for plan, problem in report.failures[shown:]:
            print(f"{plan.world} seed {plan.seed}: {problem}\n  again: {command(plan)}", flush=True)
        shown = len(report.failures)
        if time.monotonic() - told > 60:
            told = time.monotonic()
            print(f"{told - began:.0f} s: {report}", flush=True)
    print(f"{time.monotonic() - began:.0f} s: {report}")
    for plan, _ in report.failures[:3]:
        print(explain(shrink(run(plan))))
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())

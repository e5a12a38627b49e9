"""Run one program on both brokers, say where they part, and make it smaller."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from pprint import pformat
from typing import Any

from tests.differential import steps_admin, steps_groups, steps_records, steps_transactions  # noqa: F401
from tests.differential.deliberate import Deliberate, explain
from tests.differential.program import Program, Step, make_program, run_step
from tests.differential.world import World

__all__ = ["Difference", "Outcome", "compare", "shrink"]

_run = f"{os.getpid():x}{os.urandom(3).hex()}"
_numbers = itertools.count()


@dataclass(frozen=True)
class Difference:
    """Where two brokers parted, and what led there."""

    program: Program
    at: int
    ours: Any
    kafka: Any

    def __str__(self) -> str:
        steps = "\n".join(f"    {step!r}," for step in self.program[: self.at + 1])
        found = "\n".join(differing(self.ours, self.kafka))
        return f"after\n{steps}\nours / Apache Kafka differ in\n{found}"


@dataclass(frozen=True)
class Outcome:
    """What became of one program."""

    compared: int
    """Steps whose answers were compared."""
    used: list[Deliberate]
    """Deliberate differences that were met."""
    difference: Difference | None


def differing(ours: Any, kafka: Any, path: str = "") -> list[str]:
    """The places where two answers differ, one a line."""
    if ours == kafka:
        return []
    if isinstance(ours, dict) and isinstance(kafka, dict) and ours.keys() == kafka.keys():
        return [line for name in ours for line in differing(ours[name], kafka[name], f"{path}.{name}")]
    if isinstance(ours, list | tuple) and isinstance(kafka, list | tuple) and len(ours) == len(kafka):
        pairs = enumerate(zip(ours, kafka, strict=True))
        return [line for at, (one, other) in pairs for line in differing(one, other, f"{path}[{at}]")]
    if isinstance(ours, list) and isinstance(kafka, list):
        ours, kafka = ([item for item in one if item not in other] for one, other in ((ours, kafka), (kafka, ours)))
    return [f"  {path or 'the answer'}: {pformat(ours, width=150)}\n      / {pformat(kafka, width=150)}"]


def _run_on(
    bootstrap: str, mark: str, program: Program, joins: list[set[str]] | None
) -> tuple[list[Any], list[set[str]]]:
    world = World(bootstrap, mark, joins)
    answers: list[Any] = []
    try:
        answers.extend(world.names.of(run_step(world, step)) for step in program)
        _tidy(world)
    except IndexError:
        if joins is None:  # The first side waits for what it gets; the second may run out of what to expect.
            raise
    finally:
        world.close()
    return answers, world.harvests


def _tidy(world: World) -> None:
    """Leave no topics and no fetch session behind: thousands of programs run on one broker."""
    for session in world.sessions:
        fields = {"session_id": session, "session_epoch": -1, "topics": [], "forgotten_topics_data": []}
        world.once(1, 12, max_wait=0, min_bytes=0, max_bytes=1, isolation_level=0, **fields)
    topics = [{"name": world.topic(index), "topic_id": None} for index in world.topic_ids]
    if topics:
        world.once(20, 6, topics=topics, timeout=20_000)


def compare(ours: str, kafka: str, program: Program) -> Outcome:
    """Run `program` on both brokers and compare answer by answer, up to the first real difference."""
    mark = f"d{_run}-{next(_numbers)}"
    our_answers, joins = _run_on(ours, mark, program, None)
    kafka_answers, _ = _run_on(kafka, mark, program, joins)
    used = []
    for at, (one, other) in enumerate(zip(our_answers, kafka_answers, strict=False)):
        reason = explain(program, at, one, other)
        if reason is None and one == other:
            continue
        if reason is None:
            return Outcome(at + 1, used, Difference(program, at, one, other))
        used.append(reason)
        if reason.parts:
            return Outcome(at + 1, used, None)
    return Outcome(len(kafka_answers), used, None)


def shrink(ours: str, kafka: str, found: Difference, attempts: int = 60) -> Difference:
    """A shorter program with a difference of the same kind of step; chunks first, then single steps."""
    best = found
    steps: list[Step] = found.program[: found.at + 1]
    size = max(len(steps) // 2, 1)
    while size and attempts > 0:
        at = 1  # The first step makes the topics.
        while at < len(steps) - 1 and attempts > 0:
            smaller = steps[:at] + steps[at + size :] if at + size < len(steps) else steps[:at] + steps[-1:]
            attempts -= 1
            again = compare(ours, kafka, smaller).difference
            if again is not None and again.program[again.at][0] == found.program[found.at][0]:
                best, steps = again, smaller[: again.at + 1]
            else:
                at += size
        size //= 2
    return best


def run_seed(ours: str, kafka: str, seed: int) -> Outcome:
    """One seed's program. A difference is believed when it comes back."""
    program = make_program(seed)
    outcome = compare(ours, kafka, program)
    if outcome.difference is None:
        return outcome
    again = compare(ours, kafka, program)
    return again if again.difference is None else outcome

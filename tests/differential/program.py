"""Programs: short lists of abstract steps, made from a seed.

A step names things by slots ("the current identity of x0", "one past it"), never by what a broker made up, so the same
program means the same on both brokers. Parameters are plain values: a program can be printed, and run again from print.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.differential.world import World

__all__ = ["KINDS", "THEMES", "Program", "Step", "kind", "make_program", "often"]

Step = tuple[str, dict[str, Any]]
Program = list[Step]
Draw = Callable[[Random], dict[str, Any]]
Run = Callable[..., Any]

THEMES = ("transactions", "idempotence", "batches", "reading", "groups", "offsets", "admin")
"""What a program is mostly about: deep sequences find more than an even mix does."""


@dataclass(frozen=True)
class Kind:
    """A kind of step: how its parameters are drawn, and how it is run in a `World`, giving what is compared."""

    draw: Draw
    run: Run
    weights: dict[str, int]


KINDS: dict[str, Kind] = {}


def kind(draw: Draw, **weights: int) -> Callable[[Run], Run]:
    """Register a function as a kind of step, with its weight in each theme; `mixed` is its weight in all others."""
    assert weights.keys() <= {*THEMES, "mixed"}

    def add(run: Run) -> Run:
        KINDS[run.__name__] = Kind(draw, run, weights)
        return run

    return add


def often(rng: Random, usual: Any, *rare: Any, share: float = 0.85) -> Any:
    """Mostly `usual`, else one of the others."""
    return usual if rng.random() < share else rng.choice(rare)


def _draw(name: str, rng: Random) -> Step:
    return name, KINDS[name].draw(rng)


def make_program(seed: int) -> Program:
    """The program of a seed."""
    rng = Random(seed)
    theme = rng.choice(THEMES)
    names = list(KINDS)
    weights = [item.weights.get(theme, item.weights.get("mixed", 0)) for item in KINDS.values()]
    steps = [_draw("topic", rng)]
    if theme in ("transactions", "idempotence", "offsets"):
        steps.append(_draw("init", rng))
    for name in rng.choices(names, weights, k=rng.randrange(8, 36)):
        step = _draw(name, rng)
        # A step that stands for several is drawn as one, so that what belongs together stays together.
        steps += step[1].get("steps", [step])
    return steps


def run_step(world: World, step: Step) -> Any:
    name, parameters = step
    return KINDS[name].run(world, **parameters)

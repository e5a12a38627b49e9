"""Which world a plan asks for."""

from __future__ import annotations

from tests.simulation.chain import ChainWorld
from tests.simulation.dualwriting import DualWorld
from tests.simulation.plan import Plan
from tests.simulation.world import Outcome, World
from tests.simulation.world import run as run_in

__all__ = ["WORLDS", "run"]

WORLDS: dict[str, type[World]] = {"broker": World, "chain": ChainWorld, "dual": DualWorld}


def run(plan: Plan) -> Outcome:
    """Run a plan to its end or to the first broken promise."""
    return run_in(plan, WORLDS[plan.world])

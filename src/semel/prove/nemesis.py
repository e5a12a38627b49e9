"""Faults for the demo: who is killed or paused, and after how many orders. The seed decides everything.

Half of the kills of workers, HTTP instances and the broker strike at a random moment. The other half is laid as a trap:
the process that comes back is armed with a failpoint, so that it dies at a named line of the protocol.
"""

from __future__ import annotations

import random
from typing import NamedTuple

__all__ = ["Fault", "plan_faults"]

FULL_INPUT = 69_659
_KILLS, _BROKER_KILLS, _PAUSES = 26, 4, 4
_POINTS = {
    "worker": [
        "unit.before_produce",
        "unit.after_produce",
        "unit.before_end_transaction",
        "unit.after_end_transaction",
        "sink.before_effects",
        "sink.before_db_commit",
        "sink.after_db_commit",
    ],
    "http": ["ingress.before_append", "ingress.after_append"],
    "broker": [
        "broker.before_append",
        "broker.after_append",
        "broker.before_prepare",
        "broker.after_prepare",
        "broker.between_markers",
        "broker.after_markers",
    ],
}


class Fault(NamedTuple):
    """Strike when `after` orders are answered. `failpoint` arms the process that comes back, or is empty."""

    after: int
    action: str
    """`kill` or `pause`."""
    role: str
    """`worker`, `http` or `broker`."""
    slot: int
    failpoint: str = ""


def plan_faults(orders: int, seed: int, *, slots: int = 2, failpoints_in_broker: bool = True) -> list[Fault]:
    """Faults in proportion to the orders: at least three kills, one of them the broker's, and one pause.

    `failpoints_in_broker` is False for a broker that is not ours: it knows no failpoints.
    """
    rng = random.Random(f"{seed}:faults")
    share = orders / FULL_INPUT
    brokers = max(1, round(_BROKER_KILLS * share))
    kills = max(3, round(_KILLS * share)) - brokers
    pauses = max(1, round(_PAUSES * share))
    roles = ["broker"] * brokers + ["worker" if number % 3 else "http" for number in range(kills)]
    faults: list[Fault] = []
    for number, role in enumerate(roles):
        armed = number % 2 == 1 and (role != "broker" or failpoints_in_broker)
        point = f"{rng.choice(_POINTS[role])}:kill:{rng.randint(1, 60)}" if armed else ""
        slot = 0 if role == "broker" else rng.randrange(slots)
        faults.append(Fault(int(orders * rng.uniform(0.04, 0.92)), "kill", role, slot, point))
    # A pause outlasts the session: spread them, so that each one meets a running system.
    for number in range(pauses):
        spread = (number + rng.uniform(0.2, 0.8)) / pauses
        faults.append(Fault(int(orders * (0.05 + 0.85 * spread)), "pause", "worker", rng.randrange(slots)))
    return sorted(faults)

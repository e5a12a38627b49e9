"""The fault plan: seeded, in proportion, and never less than the issue of a small run demands."""

from __future__ import annotations

import pytest

from semel.failpoints import FAILPOINTS
from semel.prove.nemesis import FULL_INPUT, plan_faults


@pytest.mark.parametrize("seed", range(10))
def test_the_full_run_has_enough_of_every_fault(seed: int) -> None:
    faults = plan_faults(FULL_INPUT, seed)
    kills = [fault for fault in faults if fault.action == "kill"]
    assert len(kills) >= 20
    assert sum(fault.role == "broker" for fault in kills) >= 3
    assert sum(fault.action == "pause" for fault in faults) >= 3
    assert faults == plan_faults(FULL_INPUT, seed)


@pytest.mark.parametrize("orders", [1, 50, 1_000, 5_000])
def test_a_small_run_still_kills_three_times_once_the_broker(orders: int) -> None:
    kills = [fault for fault in plan_faults(orders, 3) if fault.action == "kill"]
    assert len(kills) >= 3
    assert sum(fault.role == "broker" for fault in kills) >= 1
    assert all(0 <= fault.after < max(orders, 1) for fault in kills)


def test_armed_failpoints_exist_and_a_foreign_broker_gets_none() -> None:
    for seed in range(10):
        for fault in plan_faults(FULL_INPUT, seed):
            assert not fault.failpoint or fault.failpoint.split(":")[0] in FAILPOINTS
        foreign = plan_faults(FULL_INPUT, seed, failpoints_in_broker=False)
        assert not any(fault.failpoint for fault in foreign if fault.role == "broker")

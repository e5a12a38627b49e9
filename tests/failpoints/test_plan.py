"""Every failpoint has its cases: a new one fails here until a counted run has come by it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from semel.failpoints import FAILPOINTS, arm_failpoints
from tests.failpoints.plan import POINTS, SCENES, actions_of, cases, hits_of

PASSES = Path(__file__).with_name("passes.json")
"""What `tests.failpoints.run` counted; take over its file after a change of points or scenes."""


def passes() -> dict[str, int]:
    found: dict[str, int] = json.loads(PASSES.read_text())
    return found


def test_a_process_comes_by_every_failpoint() -> None:
    counted = passes()
    assert set(counted) == set(POINTS), "count anew: python -m tests.failpoints.run --results FOLDER --only -"
    assert all(times > 0 for times in counted.values())


def test_every_point_has_a_case_for_every_action_and_hit() -> None:
    found = {(case.point, case.action, case.which) for case in cases(passes())}
    for name, point in POINTS.items():
        actions = {action for at, action, _ in found if at == name}
        kinds = {action.partition("=")[0] for action in actions}
        assert kinds == {action.partition("=")[0] for action in point.actions}
        for action in actions - {action for action in actions if action.startswith("delay")}:
            hits = {which for at, of, which in found if (at, of) == (name, action)}
            assert hits == set(hits_of(passes()[name])), (name, action)


@pytest.mark.parametrize(
    ("times", "hits"),
    [
        (1, {"first": 1}),
        (2, {"first": 1, "second": 2}),
        (3, {"first": 1, "second": 2, "last": 3}),
        (80, {"first": 1, "second": 2, "last": 80}),
    ],
)
def test_first_second_and_last_are_different_passes(times: int, hits: dict[str, int]) -> None:
    assert hits_of(times) == hits


def test_every_case_and_every_scene_can_be_armed() -> None:
    try:
        for case in cases(passes()):
            arm_failpoints(case.spec)
        for name, scene in SCENES.items():
            assert name in FAILPOINTS
            for spec in (scene.also, scene.before, *scene.others.values()):
                arm_failpoints(spec)
    finally:
        arm_failpoints("")


def test_torn_writes_leave_different_parts() -> None:
    for name, point in FAILPOINTS.items():
        sizes = {action for action in actions_of(name) if action.startswith("torn")}
        assert len(sizes) == (2 if point.writes else 0)

"""A program is killed, fails, is cancelled or stands still at every step of the dual write: rows and records are both
there, or neither is. These are the cases of the failpoints `dual.*`."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from semel.errors import SemelError
from semel.failpoints import FAILPOINTS, FailpointRaised, arm_failpoints
from tests.dualwrite.world import World, in_a_child

POINTS = {name: point for name, point in FAILPOINTS.items() if point.role == "dual"}
NAMES = [name for name, point in POINTS.items() if not point.what.startswith("conditional recipe")]
"""The others are those of `test_conditional_crashes.py`, which comes by these, too."""
TRANSACTIONS = 4
RECOVERY = ("dual.claim.before_complete", "dual.claim.after_complete", "dual.claim.before_release")
DECIDED = (
    "dual.after_commit",
    "dual.before_complete",
    "dual.after_complete",
    "dual.settle.before",
    "dual.settle.after",
)
"""Points behind the COMMIT of the transaction that comes by."""


@pytest.fixture(autouse=True)
def _disarmed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SEMEL_KAFKA", "")
    yield
    arm_failpoints("")


def program(world: World, spec: str, account: str = "account") -> Callable[[Any], None]:
    """Four accounts, one transaction each. A failpoint's exceptions are the caller's to bear."""

    def work(told: Any) -> None:
        point = spec.partition(":")[0]
        if point in RECOVERY:
            world.connect()  # The parent's connection is the parent's.
            arm_failpoints(spec)
            world.recover(excused=FailpointRaised)
            return
        bank = world.new_bank()
        if point.startswith("dual.settle"):
            writer = bank.app.writer(world.spec().name)
            writer.prepare()
            session = writer.pool.borrow()
            world.lose_answers(session)
            writer.pool.give_back(session)
        arm_failpoints(spec)
        for number in range(TRANSACTIONS):
            try:
                bank.open_account(f"{account}-{number}", number)
            except SemelError as error:
                told(f"# {account}-{number}: {error}")
            else:
                told(f"{account}-{number}")
        bank.app.close()

    return work


def leave_behind(world: World, done: Path, point: str) -> None:
    """What the point needs: a slot whose owner died before it told Kafka, or one that was given back."""
    if point in RECOVERY:
        pid = in_a_child(program(world, "dual.before_complete:kill:1", "left"), done)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    elif point == "dual.claim.after_reserve":
        world.bank.open_account("first", 1)
        world.bank.app.close()
        world._bank = None


CASES = [
    pytest.param(name, action, marks=() if action == "kill" else pytest.mark.soak, id=f"{name}-{action}")
    for name in NAMES
    for action in ("kill", "raise", "cancel")
    if action in {known.partition("=")[0] for known in FAILPOINTS[name].actions}
]


def hits(point: str) -> list[int]:
    return [1] if ".claim." in point else [2]


def run(world: World, done: Path, point: str, action: str, hit: int) -> int:
    leave_behind(world, done, point)
    pid = in_a_child(program(world, f"{point}:{action}:{hit}"), done)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize(("point", "action"), CASES)
def test_rows_and_records_are_both_there_or_neither(any_world: World, tmp_path: Path, point: str, action: str) -> None:
    world, done = any_world, tmp_path / "done"
    [hit] = hits(point)
    code = run(world, done, point, action, hit)
    error = done.with_suffix(".error")
    assert code == (-signal.SIGKILL if action == "kill" else 0), error.read_text() if error.exists() else ""
    found = world.check()
    successes = {line for line in done.read_text().splitlines() if not line.startswith("#")}
    assert successes <= set(found), "a caller was told of success, and it is not there"
    if point in DECIDED:
        assert f"account-{hit - 1}" in found  # The database had decided.
    if point in RECOVERY:
        assert set(found) == {"left-0"}
    elif action != "kill":
        assert f"account-{TRANSACTIONS - 1}" in successes  # The program went on.

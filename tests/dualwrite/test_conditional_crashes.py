"""The conditional recipe on Apache Kafka 4.3.1, which keeps no prepared transaction for a successor: a program is
killed at every step, and as long as somebody recovers in time, rows and records are both there, or neither is."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from semel.errors import ConfigurationError, TwoPhaseCommitUnavailable
from semel.failpoints import arm_failpoints
from tests.conftest import unavailable
from tests.dualwrite.test_crashes import DECIDED, POINTS, RECOVERY, program, run
from tests.dualwrite.world import Bank, World, in_a_child
from tests.services.kafka import KafkaNode, missing_tools

OF_RECOVERY = (*RECOVERY, "dual.claim.after_ended", "dual.claim.after_old_fence")


@pytest.fixture(autouse=True)
def _disarmed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SEMEL_KAFKA", "")
    yield
    arm_failpoints("")


@pytest.fixture
def world(kafka: Any, tmp_path: Path) -> Iterator[World]:
    found = World(f"sqlite:///{tmp_path}/dual.db", kafka.bootstrap, dual_write="conditional")
    yield found
    found.close()


ALWAYS = (
    "dual.claim.after_fence",
    "dual.before_mark",
    "dual.before_commit",
    "dual.after_commit",
    "dual.after_complete",
)
"""Where the two recipes differ most; the others are in `make soak`."""


@pytest.mark.parametrize(
    "point",
    [
        pytest.param(name, marks=() if name in ALWAYS else pytest.mark.soak)
        for name in POINTS
        if name not in OF_RECOVERY
    ],
)
def test_a_program_that_is_killed_leaves_both_or_neither(world: World, tmp_path: Path, point: str) -> None:
    done = tmp_path / "done"
    hit = 1 if ".claim." in point else 2
    assert run(world, done, point, "kill", hit) == -signal.SIGKILL
    found = world.check()
    assert set(done.read_text().splitlines()) <= set(found), "a caller was told of success, and it is not there"
    if point in DECIDED:
        assert f"account-{hit - 1}" in found


@pytest.mark.parametrize("point", OF_RECOVERY)
def test_a_recovery_that_is_killed_is_taken_up(world: World, tmp_path: Path, point: str) -> None:
    done = tmp_path / "done"
    pid = in_a_child(program(world, "dual.before_complete:kill:2", "left"), done)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL

    def recover(_: Any) -> None:
        arm_failpoints(f"{point}:kill")
        world.recover()

    pid = in_a_child(recover, tmp_path / "recovery")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert {"left-0", "left-1"} <= set(world.check())


def test_what_was_begun_on_condition_is_ended_by_the_full_recipe(embedded: Any, tmp_path: Path) -> None:
    """Kafka is upgraded to one with keepPreparedTxn: the app declares dual_write=True, and finds what is left."""
    world = World(f"sqlite:///{tmp_path}/dual.db", embedded.bootstrap, dual_write="conditional")
    try:
        pid = in_a_child(program(world, "dual.before_complete:kill:2", "left"), tmp_path / "done")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        world.declared["dual_write"] = True
        assert {"left-0", "left-1"} <= set(world.check())
    finally:
        world.close()


def test_v1_is_refused_before_anything_happens(embedded_v1: Any, tmp_path: Path) -> None:
    world = World(f"sqlite:///{tmp_path}/dual.db", embedded_v1.bootstrap, dual_write="conditional")
    try:
        with pytest.raises(TwoPhaseCommitUnavailable, match=r"transaction\.version"):
            world.bank.open_account("a", 1)
        assert world.balances() == {}
    finally:
        world.close()
    with pytest.raises(ConfigurationError, match="'conditional'"):
        Bank(world).app.database("sqlite:///other.db", name="other", dual_write="perhaps")  # type: ignore[arg-type]


@pytest.mark.soak
@pytest.mark.parametrize("point", ["dual.before_mark", "dual.after_commit", "dual.after_complete"])
def test_kafka_is_killed_too_before_anybody_recovers(tmp_path: Path, point: str) -> None:
    if missing_tools():
        unavailable("Apache Kafka", f"{' and '.join(missing_tools())} not found")
    node = KafkaNode()
    try:
        node.start()
        world = World(f"sqlite:///{tmp_path}/dual.db", node.bootstrap, dual_write="conditional")
        try:
            assert run(world, tmp_path / "done", point, "kill", 2) == -signal.SIGKILL
            node.kill()
            node.start()
            found = world.check()
            assert ("account-1" in found) is (point in DECIDED)
        finally:
            world.close()
    finally:
        node.stop()


@pytest.mark.soak
@pytest.mark.parametrize("server", [pytest.param("postgres", marks=pytest.mark.postgres), "mariadb"])
def test_twenty_kills_in_a_row(request: pytest.FixtureRequest, kafka: Any, tmp_path: Path, server: str) -> None:
    """One slot after the other changes hands, again and again, on the databases that have several."""
    url = str(request.getfixturevalue(server).new_database())
    world = World(url, kafka.bootstrap, dual_write="conditional")
    try:
        names = [name for name in POINTS if not name.startswith("dual.settle") and name not in OF_RECOVERY]
        for number in range(20):
            point = names[number % len(names)]
            hit = 1 if ".claim." in point else 2
            pid = in_a_child(program(world, f"{point}:kill:{hit}", f"round{number}"), tmp_path / "done")
            os.waitpid(pid, 0)
        world.check()
    finally:
        world.close()

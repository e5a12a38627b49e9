"""Fifty times at every step of the dual write: its process stands still there, two others recover its slot at once,
and it wakes up. Rows and records are both there or neither is, and whoever lost a slot is told so."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from semel.databases.postgres import _SESSION
from semel.dualwrite.keeping import make_keeper
from semel.env import Env
from semel.errors import Retriable, SemelError
from semel.failpoints import FAILPOINTS, arm_failpoints
from semel.processing.metrics import Metrics
from semel.settings import Settings
from tests.conftest import Address
from tests.dualwrite.world import World, in_a_child
from tests.services.postgres import PostgresServer

RUNS, TRANSACTIONS = 50, 5
PATIENCE_SECONDS = 60.0
POINTS = [
    name
    for name, point in FAILPOINTS.items()
    # A COMMIT without an answer and a sweep come by other ways; tests/simulation stops processes there, too.
    if point.role == "dual" and not name.startswith(("dual.settle", "dual.claim"))
] + ["dual.claim.after_init", "dual.claim.before_fence", "dual.claim.after_fence"]
DECIDED = ("dual.after_commit", "dual.before_complete", "dual.after_complete")


async def recover_twice(world: World) -> None:
    """Two processes at once, until no slot has an owner. One of them may be refused, and looks again."""
    made = [
        make_keeper(world.name, world.spec(), {}, Settings(kafka=world.bootstrap), Env(), Metrics()) for _ in range(2)
    ]
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await asyncio.gather(*(keeper.open() for keeper, _ in made))
            while world.owners():
                found = await asyncio.gather(*(keeper.sweep() for keeper, _ in made), return_exceptions=True)
                assert all(item is None or isinstance(item, Retriable) for item in found), found
    finally:
        for keeper, close in made:
            await keeper.abandon()
            await close()


def zombie(world: World, point: str, run: int) -> Callable[[Callable[[str], object]], None]:
    def work(told: Callable[[str], object]) -> None:
        bank = world.new_bank()
        # Some stop in their first transaction, with the slot just claimed; some in a later one.
        arm_failpoints(f"{point}:stop:{1 if '.claim.' in point else 1 + run % 3}")
        for number in range(3 * TRANSACTIONS):
            name = f"{point}-{run}-{number}"
            try:
                bank.open_account(name, run)
            except (SemelError, psycopg.Error) as error:
                told(f"# {type(error).__name__} {' '.join(str(error).split())}")
            else:
                told(name)
                if number >= TRANSACTIONS - 1:
                    break
        bank.app.close()

    return work


@pytest.mark.soak
@pytest.mark.postgres
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("point", POINTS)
def test_fifty_zombies_tear_nothing(
    postgres: PostgresServer, embedded: Address, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    url = postgres.new_database()
    # The server ends a transaction whose client stands still: here after one second instead of ten.
    monkeypatch.setitem(_SESSION, "idle_in_transaction_session_timeout", "1s")
    monkeypatch.setenv("SEMEL_KAFKA", embedded.bootstrap)
    world, errors = World(url, embedded.bootstrap), Counter[str]()
    successes: set[str] = set()
    for run in range(RUNS):
        done = tmp_path / "done"
        pid = in_a_child(zombie(world, point, run), done)
        assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1]), done.read_text()
        with monkeypatch.context() as patch:
            patch.setattr("semel.dualwrite.keeper.LEASE_SECONDS", 0.0)
            asyncio.run(recover_twice(world))
        assert world.open_in_kafka() == []
        os.kill(pid, signal.SIGCONT)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, done.with_suffix(".error").read_text()
        lines = done.read_text().splitlines()
        successes |= {line for line in lines if not line.startswith("#")}
        errors.update(line.split()[1] for line in lines if line.startswith("#"))
        assert all("another process" in line for line in lines if line.startswith("# Fenced")), lines
        assert lines[-1] in successes, lines  # It goes on with another slot.
    found = world.check()
    assert successes <= set(found)
    stopped_in = {f"{point}-{run}-{run % 3}" for run in range(RUNS)}
    if point in DECIDED:
        assert stopped_in <= set(found)
    print(f"{point}: {RUNS} zombies, {len(found)} accounts, told {dict(errors)}")
    world.close()

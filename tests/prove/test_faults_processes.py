"""Kills and pauses hit the process they were meant for, are told of, and are healed whatever happens."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from semel import history
from semel.errors import ConfigurationError
from semel.history import Strike
from semel.prove.faults.catalogue import KINDS, kinds_named
from semel.prove.faults.contract import Fault, NotNow, Outcome, Targets, inflict
from semel.prove.faults.processes import Kill, Pause, points_of


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "print(end='', flush=True); import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def state_of(pid: int) -> str:
    """`T` when it is stopped; the letter behind the program's name in /proc."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]


def aimed_at(process: subprocess.Popen[bytes], name: str = "worker-0") -> Targets:
    return Targets(
        names=[name], pid=lambda _name: process.pid if process.poll() is None else None, session_seconds=0.05
    )


def test_a_killed_process_is_gone_and_half_of_the_successors_are_trapped(child: subprocess.Popen[bytes]) -> None:
    targets, notes = aimed_at(child), list[Strike]()
    with history.captured() as events:
        outcome = asyncio.run(inflict(Kill(targets), "worker-0", Random(1), notes.append))
    assert events == notes
    assert child.wait(10) == -signal.SIGKILL
    assert [(note.type, note.kind, note.target) for note in notes] == [
        ("invoke", "kill", "worker-0"),
        ("ok", "kill", "worker-0"),
    ]
    assert notes[1].detail == outcome.done
    trap = targets.armed.get("worker-0")
    assert (trap is not None) == ("its successor dies at" in outcome.done)
    with pytest.raises(NotNow, match="worker-0 does not run"):
        asyncio.run(inflict(Kill(targets), "worker-0", Random(1), notes.append))
    assert notes[-1].type == "fail"


def test_every_role_has_failpoints_of_its_own() -> None:
    points = {role: set(points_of(role)) for role in ("worker", "http", "broker")}
    assert all(points.values())
    assert not points["broker"] & (points["worker"] | points["http"])
    assert "unit.before_produce" in points["worker"]
    assert points_of("unknown") == []


def test_a_pause_lasts_longer_than_a_session_and_ends(child: subprocess.Popen[bytes]) -> None:
    states, held = [], []

    async def hold(seconds: float) -> None:
        while state_of(child.pid) != "T":
            await asyncio.sleep(0.001)
        states.append(state_of(child.pid))
        held.append(seconds)

    targets = aimed_at(child)
    asyncio.run(inflict(Pause(targets), "worker-0", Random(2), sleep=hold))
    assert states == ["T"]
    assert held[0] > targets.session_seconds
    while state_of(child.pid) == "T":
        pass


def test_a_cancelled_pause_is_healed(child: subprocess.Popen[bytes]) -> None:
    notes: list[Strike] = []

    async def run() -> None:
        targets = aimed_at(child)
        targets.session_seconds = 600
        task = asyncio.create_task(inflict(Pause(targets), "worker-0", Random(3), notes.append))
        while state_of(child.pid) != "T":
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())
    while state_of(child.pid) == "T":
        pass
    assert notes[-1].type == "ok"
    assert "CancelledError" in notes[-1].outcome


def test_a_pause_that_outlives_its_process_heals_in_peace(child: subprocess.Popen[bytes]) -> None:
    async def killed(_seconds: float) -> None:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()

    asyncio.run(inflict(Pause(aimed_at(child)), "worker-0", Random(4), sleep=killed))


def test_kinds_are_chosen_by_name() -> None:
    assert kinds_named("pause, kill,pause") == [Pause, Kill]
    assert kinds_named("all") == list(KINDS.values())
    for wrong in ("", "kill,earthquake"):
        with pytest.raises(ConfigurationError, match="Known: kill, pause"):
            kinds_named(wrong)


def test_what_is_not_there_is_refused_in_words() -> None:
    for fault in KINDS.values():
        assert fault.refusal(Targets()).endswith(".")
        assert fault.does
        assert fault.promise


def test_a_strike_that_fails_is_healed_and_told() -> None:
    healed: list[bool] = []
    notes: list[Strike] = []

    class Broken(Fault):
        kind = "broken"

        @classmethod
        def aims(cls, targets: Targets) -> list[str]:
            return ["it"]

        async def strike(self, target: str, rng: Random) -> Outcome:
            raise OSError("half of it was done")

        async def heal(self) -> None:
            healed.append(True)

    with pytest.raises(OSError, match="half"):
        asyncio.run(inflict(Broken(Targets()), "it", Random(5), notes.append))
    assert healed == [True]
    assert notes[-1].outcome == "ended early by OSError: half of it was done"


def test_every_kind_is_described_where_the_proof_is() -> None:
    page = (Path(__file__).parents[2] / "docs" / "proof.md").read_text()
    assert [fault.kind for fault in KINDS.values() if f"\n| `{fault.kind}` |" not in page] == []

"""A worker: SIGTERM drains every engine, and the first failure ends all."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from semel.errors import ConfigurationError, Fatal, Fenced
from semel.processing import worker as worker_module
from semel.processing.heartbeat import Heartbeat
from semel.processing.worker import Worker


class Steady:
    """Runs until drained; takes its time to finish."""

    def __init__(self, finish_seconds: float = 0.0) -> None:
        self.draining = asyncio.Event()
        self.finish_seconds = finish_seconds
        self.is_finished = False

    async def run(self) -> None:
        await self.draining.wait()
        await asyncio.sleep(self.finish_seconds)
        self.is_finished = True

    async def drain(self) -> None:
        self.draining.set()


class Failing(Steady):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    async def run(self) -> None:
        await asyncio.sleep(0.01)
        raise self.error


def worker_of(**runnables: Steady) -> Worker:
    return Worker(runnables, drain_seconds=5, heartbeat=Heartbeat(None))


def test_sigterm_lets_every_engine_finish() -> None:
    engines = {"a": Steady(0.1), "b": Steady(0.2)}

    async def main() -> None:
        asyncio.get_running_loop().call_later(0.05, os.kill, os.getpid(), signal.SIGTERM)
        await worker_of(**engines).run()

    asyncio.run(main())
    assert all(engine.is_finished for engine in engines.values())


def test_an_engine_that_does_not_finish_is_dropped() -> None:
    stuck = Steady(60)

    async def main() -> None:
        worker = Worker({"stuck": stuck}, drain_seconds=0.1, heartbeat=Heartbeat(None))
        asyncio.get_running_loop().call_later(0.05, worker.drain)
        async with asyncio.timeout(5):
            await worker.run(handle_signals=False)

    asyncio.run(main())
    assert not stuck.is_finished


@pytest.mark.parametrize("error", [Fenced("twin"), ConfigurationError("wrong"), Fatal("no"), ZeroDivisionError()])
def test_the_first_failure_drains_the_others_and_is_raised(error: Exception) -> None:
    other = Steady(0.05)
    with pytest.raises(type(error)):
        asyncio.run(worker_of(bad=Failing(error), other=other).run())
    assert other.is_finished


def test_fenced_wins_over_other_failures_because_it_decides_about_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "FAILED_DRAIN_SECONDS", 1.0)
    with pytest.raises(Fenced):
        asyncio.run(worker_of(a=Failing(RuntimeError()), b=Failing(Fenced("twin"))).run())

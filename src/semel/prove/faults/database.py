"""Faults of a database: of the way to PostgreSQL, above all at COMMIT; a lock that somebody else holds on SQLite."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from urllib.parse import quote

from semel.prove.faults.contract import Fault, NotNow, Outcome, Targets
from semel.prove.faults.net import strike_wire
from semel.prove.faults.postgres_proxy import PostgresProxy
from semel.prove.faults.rules import Action, Cut, Hold, Trap

__all__ = ["DatabaseFault"]

_PATIENCE_SECONDS = 3.0
"""How long a COMMIT is waited for; an idle sink has none."""
_LONGEST_SECONDS = 6.0
"""A lock or a silence of a little more than the 5 s after which a sink gives a batch back."""
_LOCK_TRIES, _LOCK_WAIT_SECONDS = 20, 0.1
_ANSWER_BYTES = 18
"""CommandComplete and ReadyForQuery of a COMMIT: 12 and 6 bytes."""


class DatabaseFault(Fault):
    """The way of one process to PostgreSQL, or one SQLite file."""

    kind = "database"
    does = (
        "PostgreSQL: the connection cut before COMMIT arrives, after it and before its answer, or within the answer; "
        "COMMIT stalled; the way silent, reset, refused or slow. SQLite: the write lock held by another process"
    )
    promise = "a COMMIT without an answer is read, not guessed: its batch is applied once"

    def __init__(self, targets: Targets) -> None:
        super().__init__(targets)
        self._proxy: PostgresProxy | None = None
        self._trap: Trap | None = None
        self._lock: sqlite3.Connection | None = None

    @classmethod
    def refusal(cls, targets: Targets) -> str:
        if cls.aims(targets):
            return ""
        reasons = targets.links.database_refusals.values() if targets.links is not None else ()
        return next(iter(reasons), "this deployment has no database that could be struck.")

    @classmethod
    def aims(cls, targets: Targets) -> list[str]:
        behind = [] if targets.links is None else [name for name in targets.links.postgres if name.startswith("worker")]
        return behind + [str(path) for path in targets.sqlite_files]

    async def strike(self, target: str, rng: Random) -> Outcome:
        if target in map(str, self.targets.sqlite_files):
            return await self._hold_lock(Path(target), rng.uniform(0.3, _LONGEST_SECONDS))
        assert self.targets.links is not None
        self.targets.running(target)
        proxy = self._proxy = rng.choice(self.targets.links.postgres[target])
        if not proxy.connections:
            raise NotNow(f"{target} has no connection to the database at this moment.")
        if rng.random() < 0.3:
            outcome = strike_wire(proxy, rng, _LONGEST_SECONDS)
            return outcome._replace(done=f"{target} to PostgreSQL: {outcome.done}")
        what, action = _choose(rng)
        trap = self._trap = proxy.on_commit(Trap(action, on=rng.randint(1, 3)))
        try:
            await asyncio.wait_for(trap.struck.wait(), _PATIENCE_SECONDS)
        except TimeoutError:
            raise NotNow(f"{target} sent no COMMIT within {_PATIENCE_SECONDS:.0f} s.") from None
        return Outcome(f"{target}: {what}", (action.seconds or 0.0) if isinstance(action, Hold) else 0.0)

    async def _hold_lock(self, path: Path, seconds: float) -> Outcome:
        try:
            lock = self._lock = sqlite3.connect(
                f"file:{quote(str(path))}?mode=rw",
                uri=True,
                timeout=_LOCK_WAIT_SECONDS,
                isolation_level=None,
                check_same_thread=False,
            )
        except sqlite3.OperationalError:
            raise NotNow(f"{path.name} is not there yet.") from None
        for _ in range(_LOCK_TRIES):
            with suppress(sqlite3.OperationalError):
                await asyncio.to_thread(lock.execute, "BEGIN IMMEDIATE")
                return Outcome(f"{path.name}: write lock held by another process for {seconds:.1f} s", seconds)
            await asyncio.sleep(_LOCK_WAIT_SECONDS)
        raise NotNow(f"{path.name} was locked by somebody else all the time.")

    async def heal(self) -> None:
        if self._lock is not None:
            lock, self._lock = self._lock, None
            await asyncio.to_thread(lock.close)  # Nothing was written: its transaction ends with it.
        if self._proxy is not None:
            if self._trap is not None:
                self._proxy.remove(self._trap)
            was_silent = self._proxy.is_silent
            self._proxy.restore()
            if was_silent:
                # A server that is cut off for good answers no keepalive, and the client notices; the proxy's kernel
                # answers them. So this kind of silence ends as the client's own would.
                self._proxy.reset()


def _choose(rng: Random) -> tuple[str, Action]:
    """What is to become of a COMMIT, in words and as an action."""
    seconds = rng.uniform(0.2, _LONGEST_SECONDS)
    at = rng.randrange(1, _ANSWER_BYTES)
    choices: list[Callable[[], tuple[str, Action]]] = [
        lambda: ("connection cut before COMMIT reached PostgreSQL", Cut("request")),
        lambda: ("connection reset before COMMIT reached PostgreSQL", Cut("request", reset=True)),
        lambda: ("COMMIT done, connection cut before its answer", Cut("response")),
        lambda: ("COMMIT done, connection reset before its answer", Cut("response", reset=True)),
        lambda: (f"COMMIT done, its answer cut at byte {at}", Cut("response", at)),
        lambda: (f"COMMIT held for {seconds:.1f} s", Hold("request", seconds)),
        lambda: (f"COMMIT done, its answer held for {seconds:.1f} s", Hold("response", seconds)),
    ]
    return rng.choice(choices)()

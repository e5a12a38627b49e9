"""Recovery beside what a worker runs: slots of dead processes are found although nobody writes to the database."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from functools import partial

from semel.client.cluster import Backoff
from semel.databases.spec import DatabaseSpec
from semel.dualwrite.keeper import Keeper
from semel.dualwrite.keeping import component_name, make_keeper
from semel.dualwrite.limits import BACKOFF_SECONDS
from semel.env import Env
from semel.errors import Retriable, TwoPhaseCommitUnavailable
from semel.processing.metrics import Metrics
from semel.settings import Settings

__all__ = ["Recovery"]

log = logging.getLogger("semel.dualwrite")


class Recovery:
    """Recovers one database's slots until it is drained; it owns none itself.

    `run` raises `ConfigurationError` where the dual write cannot be done as things are set up. Where the app has an
    outbox for that case, there is nothing to recover, and it waits to be drained.
    """

    def __init__(
        self,
        app: str,
        database: DatabaseSpec,
        codecs: Mapping[str, int],
        settings: Settings,
        env: Env,
        metrics: Metrics,
    ) -> None:
        self.name = component_name(database.name)
        self._spec = database
        self._env = env
        self._make = partial(make_keeper, app, database, codecs, settings, env, metrics)
        self._draining = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Recovery {self.name}>"

    async def drain(self) -> None:
        """Ask `run` to return."""
        self._draining.set()

    async def run(self) -> None:
        """Recover until drained."""
        keeper, close = self._make()
        working = asyncio.create_task(self._recover(keeper), name=self.name)
        drained = asyncio.create_task(self._draining.wait(), name=f"{self.name} drain")
        try:
            await asyncio.wait({working, drained}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
                await drained
        finally:
            for task in (working, drained):
                task.cancel()
            await asyncio.gather(working, drained, return_exceptions=True)
            await keeper.abandon()
            await close()

    async def _recover(self, keeper: Keeper) -> None:
        backoff = Backoff(self._env, *BACKOFF_SECONDS)
        while True:
            try:
                await keeper.open()
                break
            except TwoPhaseCommitUnavailable as error:
                if not self._spec.outbox:
                    raise
                log.info("%s has nothing to recover: the outbox is used. %s", self.name, error)
                return
            except Retriable as error:
                log.debug("%s waits: %s", self.name, error)
                await asyncio.sleep(backoff.next())
        await keeper.run()

"""Rebalance storms: members that come and go every 200 ms."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from random import Random

from semel.client.admin import Admin
from semel.client.cluster import KafkaClient
from semel.client.consumer import Consumer
from semel.errors import OutcomeUnknown, Retriable, SemelError
from semel.prove.faults.contract import Fault, NotNow, Outcome, Targets
from semel.prove.faults.processes import Process
from semel.types import TopicPartition

__all__ = ["Rebalance"]

log = logging.getLogger("semel.prove")

_BEAT_SECONDS = 0.2
_POLL_RECORDS = 10
_GUEST_SESSION_MS = 6_000
_SETTINGS = {"delivery.timeout.ms": 10_000}
_WORKERS = "workers"


class Rebalance(Fault):
    """A group whose membership never rests, or workers that are told to stop one after the other."""

    kind = "rebalance"
    does = "a stranger joins and leaves a group every 200 ms, or workers get SIGTERM one after the other"
    promise = "a partition has one owner at a time whose work counts; what another one began is begun anew"

    def __init__(self, targets: Targets) -> None:
        super().__init__(targets)
        self._guests: list[_Guest] = []
        self._leaving: list[asyncio.Task[None]] = []

    @classmethod
    def aims(cls, targets: Targets) -> list[str]:
        groups = [] if targets.intake is None else [f"group {name}" for name in targets.intake.groups]
        return groups + ([_WORKERS] if len(targets.of_role("worker")) > 1 else [])

    async def strike(self, target: str, rng: Random) -> Outcome:
        beats = rng.randint(5, 20)
        if target == _WORKERS:
            return await self._stop_workers(beats)
        group = target.partition(" ")[2]
        intake = self.targets.intake
        assert intake is not None
        settings = {**intake.settings, **_SETTINGS}
        try:
            starts = await _starts(intake.bootstrap, settings, group, intake.groups[group])
        except (Retriable, OutcomeUnknown) as error:
            raise NotNow(f"Kafka does not answer at this moment: {error}") from error
        joined = 0
        for beat in range(beats):
            if beat % 2 == 0:
                guest = _Guest(intake.bootstrap, settings, group, intake.groups[group], starts)
                self._guests.append(guest)
                await guest.join()
                joined += 1
            await asyncio.sleep(_BEAT_SECONDS)
            if beat % 2:
                # Not awaited: in a group that never rests a goodbye takes seconds, and the next one is to join now.
                self._leaving.append(asyncio.create_task(self._guests.pop(0).leave()))
        return Outcome(f"group {group}: {joined} strangers joined and left within {beats * _BEAT_SECONDS:.1f} s")

    async def _stop_workers(self, beats: int) -> Outcome:
        workers, stopped = self.targets.of_role("worker"), 0
        for beat in range(beats):
            with suppress(NotNow, ProcessLookupError):
                process = Process(self.targets.running(workers[beat % len(workers)]))
                try:
                    process.signal(signal.SIGTERM)
                    stopped += 1
                finally:
                    process.close()
            await asyncio.sleep(_BEAT_SECONDS)
        if not stopped:
            raise NotNow("no worker runs at this moment.")
        return Outcome(f"workers told to stop {stopped} times within {beats * _BEAT_SECONDS:.1f} s")

    async def heal(self) -> None:
        self._leaving += [asyncio.create_task(guest.leave()) for guest in self._guests]
        self._guests.clear()
        await asyncio.gather(*self._leaving)


async def _starts(
    bootstrap: str, settings: Mapping[str, object], group: str, topics: Sequence[str]
) -> dict[TopicPartition, int]:
    """Where a member would go on: the committed offsets, and the ends where there are none."""
    async with KafkaClient(bootstrap, client_id="semel-rebalance", settings=settings) as client:
        admin = Admin(client)
        infos = [(name, await client.topic(name)) for name in topics]
        partitions = [TopicPartition(name, number) for name, info in infos for number in range(info.partitions)]
        return await admin.list_offsets(partitions, "stable") | await admin.committed_offsets(group, partitions)


class _Guest:
    """A member that takes what it is given, works on nothing and commits nothing."""

    def __init__(
        self,
        bootstrap: str,
        settings: Mapping[str, object],
        group: str,
        topics: Sequence[str],
        starts: Mapping[TopicPartition, int],
    ) -> None:
        self._starts = starts
        self._consumer = Consumer(
            bootstrap,
            group=group,
            topics=topics,
            instance_id=None,
            events=self,
            session_timeout_ms=_GUEST_SESSION_MS,
            settings=settings,
        )
        self._polling: asyncio.Task[None] | None = None

    async def join(self) -> None:
        await self._consumer.start()
        self._polling = asyncio.create_task(self._poll())

    async def leave(self) -> None:
        if self._polling is not None:
            self._polling.cancel()
            await asyncio.gather(self._polling, return_exceptions=True)
        await self._consumer.close()

    async def _poll(self) -> None:
        try:
            while True:
                await self._consumer.poll(_POLL_RECORDS, _BEAT_SECONDS)
        except SemelError as error:
            log.debug("a stranger in the group was told: %s", error)

    async def on_assigned(self, partitions: list[TopicPartition]) -> Mapping[TopicPartition, int]:
        return {at: self._starts.get(at, 0) for at in partitions}

    async def on_revoked(self, partitions: list[TopicPartition]) -> None:
        """There is nothing to finish."""

    async def on_lost(self, partitions: list[TopicPartition]) -> None:
        """There is nothing to drop."""

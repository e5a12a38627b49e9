"""Looks now and then whether a transaction is open for too long, and whether readers of committed records stand still.

A prepared transaction never ends by itself, and one that hangs has nobody who would end it: until somebody does,
readers stop below it at the last stable offset, with no error anywhere. One worker of a deployment looks, for all. One
kind it ends: a transaction of the app that is decided, and whose marker Kafka gave up (`client/markers.py`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress

from semel.app import App
from semel.client.admin import Admin, DescribedTransaction
from semel.client.cluster import KafkaClient
from semel.client.markers import OFFSETS_TOPIC, behind, finish
from semel.client.two_phase import NO_TIMEOUT_MS
from semel.env import Env
from semel.errors import ConfigurationError, SemelError
from semel.ops.gathering import OPEN
from semel.processing.metrics import Metrics
from semel.settings import Settings
from semel.types import TopicPartition

__all__ = ["ALARM_SECONDS", "LOOK_SECONDS", "YOUNG_MS", "StandStill", "TransactionAlarm", "watching"]

log = logging.getLogger("semel.alarm")

LOOK_SECONDS = 15.0
"""Between two looks: a few requests each."""
YOUNG_MS = 5_000
"""A transaction that is open for less is not asked about: a busy cluster has hundreds of them at any moment."""
ALARM_SECONDS = 60.0
"""A transaction that is open for longer is told. The engine's end after 10 s, and a dead owner's slot is recovered
within 20."""
REPEAT_SECONDS = 600.0
"""Between two lines about the same transaction."""
COMPONENT = "kafka"


class StandStill:
    """How long the last stable offset of each partition has stood below the end. Sans-IO; monotonic seconds."""

    def __init__(self) -> None:
        self._since: dict[TopicPartition, tuple[int, float]] = {}

    def look(self, offsets: Mapping[TopicPartition, int], now: float) -> dict[TopicPartition, float]:
        """Give it the last stable offset of every partition where it is below the end; how long each has stood there.

        An offset counts from the first look at it on: a partition whose transactions come and go is no case.
        """
        since: dict[TopicPartition, tuple[int, float]] = {}
        for at, stable in offsets.items():
            known = self._since.get(at)
            since[at] = known if known is not None and known[0] == stable else (stable, now)
        self._since = since
        return {at: now - began for at, (_, began) in since.items()}


class TransactionAlarm:
    """The gauges, the warnings, and the missing markers.

    `belongs` says of a topic whether its readers are watched, and `owns` of a transactional id whether it is the app's.
    """

    def __init__(
        self, client: KafkaClient, metrics: Metrics, belongs: Callable[[str], bool], owns: Callable[[str], bool]
    ) -> None:
        self._client = client
        self._admin = Admin(client)
        self._belongs = belongs
        self._owns = owns
        self._still = StandStill()
        self._told: dict[str, float] = {}
        self._open = metrics.gauge(
            "semel_cluster_open_transaction_age_seconds",
            "Age of the oldest open transaction of the cluster; 0 below 5 s.",
            ("component",),
        )
        self._prepared = metrics.gauge(
            "semel_cluster_prepared_transaction_age_seconds",
            "Age of the oldest open transaction of the cluster that never times out.",
            ("component",),
        )
        self._stable = metrics.gauge(
            "semel_last_stable_offset_age_seconds",
            "For how long readers of committed records stand still in some partition of the app.",
            ("component",),
        )

    def __repr__(self) -> str:
        return f"<TransactionAlarm {len(self._told)} told>"

    async def look(self) -> None:
        """One look at coordinators and partitions. Raises `Retriable` and the like when Kafka does not answer."""
        now, wall_ms = self._client.env.monotonic(), self._client.env.wall_ms()
        listed = await self._admin.list_transactions(states=OPEN, longer_than_ms=YOUNG_MS)
        found = await self._admin.describe_transactions([item.transactional_id for item in listed])
        ages = {item: max(0.0, (wall_ms - item.start_ms) / 1000) for item in found if item.state in OPEN}
        never = [age for item, age in ages.items() if item.timeout_ms == NO_TIMEOUT_MS]
        self._open.set(max(ages.values(), default=0.0), component=COMPONENT)
        self._prepared.set(max(never, default=0.0), component=COMPONENT)
        watched = await behind(self._admin, lambda name: self._belongs(name) or name == OFFSETS_TOPIC)
        stand = self._still.look(watched, now)
        still = {at: age for at, age in stand.items() if at.topic != OFFSETS_TOPIC}
        self._stable.set(max(still.values(), default=0.0), component=COMPONENT)
        texts = self._texts(ages, still)
        try:
            # What stood still from one look to the next is asked about; a transaction that ends meanwhile is no case.
            await finish(self._client, [at for at, age in stand.items() if age], self._owns)
        except ConfigurationError as error:
            texts["markers"] = str(error)
        finally:
            self._warn(texts, now)

    def _texts(
        self, ages: Mapping[DescribedTransaction, float], still: Mapping[TopicPartition, float]
    ) -> dict[str, str]:
        texts = {}
        held_up: set[TopicPartition] = set()
        for item, age in ages.items():
            if age >= ALARM_SECONDS:
                held_up.update(item.partitions)
                never = " and never times out" if item.timeout_ms == NO_TIMEOUT_MS else ""
                texts[item.transactional_id] = (
                    f"transaction {item.producer_id}:{item.producer_epoch} of {item.transactional_id} is open for "
                    f"{age:.0f} s{never}: readers of committed records of {_some(item.partitions)} stand still. "
                    f"`semel doctor txn explain {item.transactional_id}` says which end is right, and why."
                )
        for at, age in still.items():
            if age >= ALARM_SECONDS and at not in held_up:
                texts[str(at)] = (
                    f"readers of committed records of {at} stand still for {age:.0f} s, and no long transaction is "
                    "known to be open there: one may hang. `semel doctor txn list` finds it."
                )
        return texts

    def _warn(self, texts: Mapping[str, str], now: float) -> None:
        self._told = {name: at for name, at in self._told.items() if name in texts}
        for name, text in texts.items():
            if now - self._told.get(name, -REPEAT_SECONDS) >= REPEAT_SECONDS:
                self._told[name] = now
                log.warning("%s", text)


def _some(partitions: tuple[TopicPartition, ...]) -> str:
    more = f" and {len(partitions) - 3} more" if len(partitions) > 3 else ""
    return ", ".join(map(str, partitions[:3])) + more


@asynccontextmanager
async def watching(app: App, settings: Settings, env: Env, metrics: Metrics) -> AsyncIterator[None]:
    """Look for as long as the block lasts. A Kafka that is away, or refuses to tell, is somebody else's news."""
    client = KafkaClient(settings.kafka, client_id=f"{app.name}.alarm", env=env, settings=settings.kafka_client)
    own = f"{app.name}.semel."
    alarm = TransactionAlarm(
        client,
        metrics,
        lambda name: name in app.topics or name.startswith(own),
        lambda name: name.startswith(f"{app.name}."),
    )

    async def look_for_ever() -> None:
        while True:
            with suppress(SemelError):
                await alarm.look()
            await asyncio.sleep(LOOK_SECONDS)

    task = asyncio.create_task(look_for_ever(), name="transaction alarm")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await client.close()

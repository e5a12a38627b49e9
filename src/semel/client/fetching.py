"""Keeps one Fetch in flight at every broker that leads something we read: the shell around `client/fetcher.py`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any
from uuid import UUID

from semel.client.cluster import KafkaClient
from semel.client.fetcher import Fetcher, FetchRequest
from semel.client.outage import Outage
from semel.env import Env, comes
from semel.errors import AbortTransaction, ErrorCode, Fatal, OutcomeUnknown, Retriable, SemelError
from semel.types import TopicPartition

__all__ = ["FetchLoop"]

FETCH, OFFSET_FOR_LEADER_EPOCH = 1, 23
_EPOCHS_SINCE = 2
"""The version of OffsetForLeaderEpoch that says when it was asked under an old leader epoch (KIP-320)."""
_LATER = (Retriable, OutcomeUnknown)


class FetchLoop:
    """Fetches for one consumer, in its event loop. `on_news` is called when there may be something to take."""

    def __init__(
        self, client: KafkaClient, fetcher: Fetcher, outage: Outage, env: Env, on_news: Callable[[], None]
    ) -> None:
        self._client = client
        self._fetcher = fetcher
        self._outage = outage
        self._now = env.monotonic
        self._patience = client.settings.socket_timeout + fetcher.limits.wait_ms / 1000
        self._on_news = on_news
        self._stirred = asyncio.Event()
        self._in_flight: dict[int, asyncio.Future[Any]] = {}
        self._connecting: dict[int, asyncio.Task[None]] = {}
        self._is_over = False

    def __repr__(self) -> str:
        return f"<FetchLoop {len(self._in_flight)} in flight, {self._fetcher!r}>"

    @property
    def is_waiting(self) -> bool:
        """Whether an answer is due."""
        return bool(self._in_flight)

    def stir(self) -> None:
        """Partitions or positions changed."""
        self.refill()
        self._stirred.set()

    def refill(self) -> None:
        """There is room in the buffer: ask whoever is not being asked."""
        for node_id in self._fetcher.nodes():
            self._send(node_id)

    async def run(self) -> None:
        """Go on until cancelled, or until nothing can be read any more (`Fetcher.failure`)."""
        try:
            while self._fetcher.failure is None:
                self._stirred.clear()
                await self._find_leaders()
                await self._check_epochs()
                for node_id in self._fetcher.nodes():
                    self._send(node_id)
                look_at = self._fetcher.next_look()
                await comes(self._stirred, None if look_at is None else max(0.0, look_at - self._now()))
        except Fatal as error:
            self._fetcher.failure = self._fetcher.failure or error
        finally:
            self._is_over = True
            for task in self._connecting.values():
                task.cancel()
        self._on_news()

    # --- Leaders ---

    async def _find_leaders(self) -> None:
        topics = self._fetcher.unled(self._now())
        if not topics:
            return
        found: dict[str, tuple[UUID | None, dict[int, tuple[int, int]]]] = {}
        try:
            for topic in topics:
                self._client.invalidate(topic=topic)
            await self._client.refresh_metadata(*sorted(topics))
            self._outage.back()
        except _LATER as error:
            self._outage.lost(str(error))
        except AbortTransaction as error:  # We have no right to see the topic, which may change.
            self._outage.trouble("not allowed", str(error))
        for topic in topics:
            found[topic] = self._leaders(topic)
        for topic, (topic_id, leaders) in found.items():
            self._fetcher.led_by(topic, topic_id, leaders, self._now())
        if self._fetcher.failure is not None:
            self._on_news()

    def _leaders(self, topic: str) -> tuple[UUID | None, dict[int, tuple[int, int]]]:
        info = self._client.known_topic(topic)
        if info is None:
            self._outage.trouble("no topic", f"there is no topic {topic!r} now")
            return None, {}
        leaders = {}
        for number in range(info.partitions):
            at = TopicPartition(topic, number)
            leader = self._client.known_leader(at)
            if leader is not None:
                leaders[number] = (leader, self._client.leader_epoch(at))
        return (info.topic_id if info.topic_id.int else None), leaders

    async def _check_epochs(self) -> None:
        for node_id, partitions in self._fetcher.unchecked().items():
            by_topic: dict[str, list[dict[str, int]]] = {}
            for at, (current, epoch) in partitions.items():
                by_topic.setdefault(at.topic, []).append(
                    {"partition": at.partition, "current_leader_epoch": current, "leader_epoch": epoch}
                )
            try:
                connection = await self._client.connection(node_id)
                if not connection.offers(OFFSET_FOR_LEADER_EPOCH, _EPOCHS_SINCE):
                    raise Fatal(f"Kafka at {connection.address} does not check leader epochs: it is older than 2.1.")
                answer = await connection.send(
                    OFFSET_FOR_LEADER_EPOCH,
                    connection.version_of(OFFSET_FOR_LEADER_EPOCH),
                    replica_id=-1,
                    topics=[{"topic": topic, "partitions": items} for topic, items in by_topic.items()],
                )
            except _LATER as error:
                self._away(node_id, error)
                continue
            for topic in answer.topics:
                for item in topic.partitions:
                    at = TopicPartition(topic.topic, item.partition)
                    if at in partitions:
                        self._fetcher.checked(
                            at, partitions[at], item.error_code, item.leader_epoch, item.end_offset, self._now()
                        )
        if self._fetcher.failure is not None:
            self._on_news()

    def _away(self, node_id: int, error: SemelError) -> None:
        self._outage.trouble(f"broker {node_id}", str(error))
        self._fetcher.lost(node_id, self._now())
        self._stirred.set()

    # --- Fetches ---

    def _send(self, node_id: int) -> None:
        """Ask this broker for what is wanted of it, unless it is being asked."""
        if self._is_over or node_id in self._in_flight or node_id in self._connecting:
            return
        connection = self._client.open_connection(node_id)
        if connection is None:
            task = asyncio.get_running_loop().create_task(self._connect(node_id))
            self._connecting[node_id] = task
            return
        request = self._fetcher.next_request(node_id, connection.versions.get(FETCH, (0, -1))[1])
        if request is None:
            return
        try:
            answer = connection.send(FETCH, request.version, patience=self._patience, **request.fields)
        except Retriable as error:
            self._fetcher.failed(request, self._now())
            self._outage.trouble(f"broker {node_id}", str(error))
            self._stirred.set()
            return
        self._in_flight[node_id] = answer
        answer.add_done_callback(partial(self._answered, request))

    async def _connect(self, node_id: int) -> None:
        try:
            await self._client.connection(node_id)
        except _LATER as error:
            self._away(node_id, error)
        except Fatal as error:
            self._fetcher.failure = self._fetcher.failure or error
            self._on_news()
        finally:
            del self._connecting[node_id]
            self._stirred.set()

    def _answered(self, request: FetchRequest, future: asyncio.Future[Any]) -> None:
        self._in_flight.pop(request.node_id, None)
        if future.cancelled() or self._is_over:
            return
        error = future.exception()
        if error is not None:
            self._fetcher.failed(request, self._now())
            self._outage.trouble(f"broker {request.node_id}", str(error))
            self._stirred.set()
            return
        self._outage.back()
        troubles = self._fetcher.answered(request, future.result(), self._now())
        for at, code in troubles:
            self._outage.trouble(f"{at} {code}", f"fetching {at}: {_name(code)}")
        if troubles:
            self._stirred.set()
        self._send(request.node_id)
        if self._fetcher.has_ready or self._fetcher.failure is not None:
            self._on_news()


def _name(code: int) -> str:
    try:
        return ErrorCode(code).name
    except ValueError:
        return f"error code {code}"

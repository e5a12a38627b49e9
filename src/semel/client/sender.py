"""What both producers share: when to send, to whom, and how a Produce request looks.

Batches are written synchronously on an open connection, so that their order on the wire is the order of the calls;
finding a leader or connecting happens beside it and then starts the next round.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, NamedTuple

from semel.client.batches import Batch
from semel.client.cluster import Backoff, KafkaClient
from semel.client.connection import Connection
from semel.errors import OutcomeUnknown, Retriable, SemelError
from semel.failpoints import failpoint
from semel.types import TopicPartition

__all__ = ["Answer", "Sender"]

log = logging.getLogger("semel.client")

PRODUCE = 0
ALL_REPLICAS = -1


class Answer(NamedTuple):
    """The broker's answer for one batch; `timestamp_ms` is -1 where the records keep their own."""

    code: int
    base_offset: int
    timestamp_ms: int
    message: str


class Sender:
    """Rounds of sending for one producer: `round` is called whenever something may have become possible."""

    def __init__(
        self, client: KafkaClient, round_: Callable[[], None], on_refused: Callable[[object, SemelError], None]
    ) -> None:
        """`on_refused(topic or node id, error)`: its leader, or a connection to it, will not be had by trying again."""
        self.client = client
        self._on_refused = on_refused
        self.last_reason = "nothing was answered yet"
        self._round = round_
        self._in_flight: Counter[int] = Counter()
        self._backoff = Backoff(client.env, client.settings.retry_backoff, client.settings.retry_backoff_max)
        self._paused: asyncio.TimerHandle | None = None
        self._scheduled: asyncio.Handle | None = None
        self._preparing: set[object] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiters: dict[asyncio.Future[None], Callable[[], bool]] = {}
        """What each waits for, which is looked at after every round."""
        self.closed = False

    # --- Rounds ---

    def schedule(self) -> None:
        """Start a round soon; many calls make one round. A pause delays it."""
        if self._scheduled is None and self._paused is None and not self.closed:
            self._scheduled = asyncio.get_running_loop().call_soon(self._run)

    def _run(self) -> None:
        self._scheduled = None
        if self.closed:
            return
        if self._paused is None:
            self._round()
        self.notify()

    def pause(self, reason: str) -> None:
        """Something failed in a way that passes: wait a little, longer each time, before the next round."""
        self.last_reason = reason
        if self._paused is None and not self.closed:
            self._paused = asyncio.get_running_loop().call_later(self._backoff.next(), self._resume)

    def _resume(self) -> None:
        self._paused = None
        self.schedule()

    @property
    def is_paused(self) -> bool:
        """Whether a failure's back-off is running."""
        return self._paused is not None

    def succeeded(self) -> None:
        """Something was answered well: the next failure waits the shortest time again."""
        self._backoff.reset()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a task that belongs to this producer; `close` cancels it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a producer's task failed", exc_info=task.exception())
        if self._scheduled is None:
            self._run()  # A round that is scheduled has all of this; else what follows need not wait for a turn.

    # --- Waiting ---

    def notify(self) -> None:
        """Wake everybody whose condition holds now; all of them when nothing more will happen."""
        for waiter, condition in list(self._waiters.items()):
            if self.closed or condition():
                _wake(waiter)

    async def wait(self, condition: Callable[[], bool], deadline: float) -> bool:
        """Wait until the condition holds (True) or the deadline is over (False)."""
        loop = asyncio.get_running_loop()
        while not condition():
            left = deadline - self.client.env.monotonic()
            if left <= 0 or self.closed:
                return False
            waiter: asyncio.Future[None] = loop.create_future()
            self._waiters[waiter] = condition
            timer = loop.call_later(left, _wake, waiter)
            try:
                await waiter
            finally:
                timer.cancel()
                del self._waiters[waiter]
        return True

    # --- Produce ---

    def route(self, partition: TopicPartition) -> tuple[int, Connection] | None:
        """The leader's open connection with room on it; None starts whatever is missing."""
        node_id = self.client.known_leader(partition)
        if node_id is None:
            self.prepare(partition.topic, self.client.leader(*partition))
            return None
        connection = self.client.open_connection(node_id)
        if connection is None:
            self.prepare(node_id, self.client.connection(node_id))
            return None
        if self._in_flight[node_id] >= self.client.settings.max_in_flight:
            return None
        return node_id, connection

    def prepare(self, key: object, work: Coroutine[Any, Any, Any]) -> None:
        """Do what a round lacks, once at a time for each key; the next round comes when it is done."""
        if key in self._preparing:
            work.close()
            return
        self._preparing.add(key)
        self.spawn(self._prepared(key, work))

    async def _prepared(self, key: object, work: Coroutine[Any, Any, Any]) -> None:
        try:
            await work
        except (Retriable, OutcomeUnknown) as error:
            self.pause(str(error))
        except SemelError as error:
            self.last_reason = str(error)
            self._on_refused(key, error)
        finally:
            self._preparing.discard(key)

    def write(
        self,
        node_id: int,
        connection: Connection,
        batches: Sequence[Batch],
        on_answer: Callable[[Batch, Answer], None],
        on_lost: Callable[[Batch, str, bool], None],
        *,
        transactional_id: str | None = None,
        newest: int = 12,
    ) -> None:
        """Write one Produce request, at most one batch a partition.

        Each batch is reported once: `on_answer`, or `on_lost(batch, reason, unanswered)`.
        """
        by_key = {batch.partition: batch for batch in batches}
        assert len(by_key) == len(batches)
        topics: dict[str, list[dict[str, Any]]] = {}
        for batch in batches:
            data = batch.encode(transactional=transactional_id is not None)
            topics.setdefault(batch.partition.topic, []).append({"index": batch.partition.partition, "records": data})
        try:
            answer = connection.send(
                PRODUCE,
                min(connection.version_of(PRODUCE), newest),
                transactional_id=transactional_id,
                acks=ALL_REPLICAS,
                timeout=self.client.settings.request_timeout_ms,
                topic_data=[{"name": name, "partition_data": items} for name, items in topics.items()],
            )
        except Retriable as error:
            for batch in batches:
                on_lost(batch, str(error), False)
            self.pause(str(error))
            return
        self._in_flight[node_id] += 1
        failpoint("producer.after_send")

        def answered(future: asyncio.Future[Any]) -> None:
            self._in_flight[node_id] -= 1
            if self.closed:
                return
            error = future.exception() if not future.cancelled() else OutcomeUnknown("cancelled")
            waiting = dict(by_key)
            if error is None:
                failpoint("producer.after_answer")
                for key, item in _answers(future.result()):
                    batch = waiting.pop(key, None)
                    if batch is not None:
                        on_answer(batch, item)
                error = OutcomeUnknown("the broker left the partition out of its answer") if waiting else None
            for batch in waiting.values():
                on_lost(batch, str(error), True)
            if waiting:
                self.client.invalidate(topic=next(iter(waiting)).topic)
                self.pause(str(error))
            self._run()

        answer.add_done_callback(answered)

    async def close(self) -> None:
        """Stop all rounds and tasks."""
        self.closed = True
        for handle in (self._paused, self._scheduled):
            if handle is not None:
                handle.cancel()
        self._paused = self._scheduled = None
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks))
        self.notify()


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _answers(response: Any) -> Iterator[tuple[TopicPartition, Answer]]:
    for topic in response.responses:
        for item in topic.partition_responses:
            appended = item.log_append_time
            timestamp_ms = -1 if appended is None else round(appended.timestamp() * 1000)
            message = getattr(item, "error_message", None) or ""
            yield (
                TopicPartition(topic.name, item.index),
                Answer(int(item.error_code), item.base_offset, timestamp_ms, message),
            )

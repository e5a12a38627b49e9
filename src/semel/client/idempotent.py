"""The idempotent producer without transactions: each record once and in order, as long as its answer comes in time.

Records for one partition that wait together are sent together. What cannot be known is said: a record whose batch was
written and never answered raises `OutcomeUnknown`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from semel.client.batches import Batch, Identity, Lane, Payload
from semel.client.cluster import KafkaClient
from semel.client.connection import check_not_forked
from semel.client.reactions import Reaction, reaction_to
from semel.client.sender import Answer, Sender
from semel.errors import ErrorCode, Fatal, OutcomeUnknown, Retriable, SemelError, kafka_error
from semel.types import Header, TopicPartition
from semel.wire.records import BatchBuilder

__all__ = ["Producer", "RecordMetadata"]

INIT_PRODUCER_ID = 22
_LOST_SEQUENCE = frozenset({Reaction.OUT_OF_ORDER, Reaction.FENCED})
_PERHAPS_WRITTEN = frozenset(
    {
        ErrorCode.NOT_ENOUGH_REPLICAS_AFTER_APPEND,
        ErrorCode.REQUEST_TIMED_OUT,
        ErrorCode.NOT_LEADER_OR_FOLLOWER,
        ErrorCode.REPLICA_NOT_AVAILABLE,
        ErrorCode.KAFKA_STORAGE_ERROR,
        ErrorCode.NETWORK_EXCEPTION,
        ErrorCode.UNKNOWN_SERVER_ERROR,
    }
)
"""Answers that a leader also gives after it appended, while it waits for the replicas (Kafka's DelayedProduce)."""


class RecordMetadata(NamedTuple):
    """Where a record landed; `offset` is -1 when the broker only knows that it has it."""

    offset: int
    timestamp_ms: int


class _Delivery(Batch):
    """A batch and those who wait for each of its records, in order."""

    __slots__ = ("timestamps", "waiters")

    def __init__(self, partition: TopicPartition, payload: Payload, deadline: float) -> None:
        super().__init__(partition, payload, deadline)
        self.waiters: list[asyncio.Future[RecordMetadata]] = []
        self.timestamps: list[int] = []

    def written(self, answer: Answer) -> None:
        offset = answer.base_offset
        for index, (waiter, timestamp) in enumerate(zip(self.waiters, self.timestamps, strict=True)):
            if not waiter.done():
                at = answer.timestamp_ms if answer.timestamp_ms >= 0 else timestamp
                waiter.set_result(RecordMetadata(offset + index if offset >= 0 else -1, at))

    def failed(self, error: SemelError) -> None:
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_exception(error)


class _Filling:
    """The records of one partition that wait to become a batch."""

    __slots__ = ("builder", "deadline", "opened", "timestamps", "waiters")

    def __init__(self, opened: float, deadline: float, codec: int) -> None:
        self.builder = BatchBuilder(codec)
        self.waiters: list[asyncio.Future[RecordMetadata]] = []
        self.timestamps: list[int] = []
        self.opened = opened
        self.deadline = deadline


class Producer:
    """Idempotent, not transactional. `codec` is the record batch's compression (0 none, 3 lz4, ...)."""

    def __init__(
        self,
        client: KafkaClient,
        *,
        linger_ms: int = 0,
        max_in_flight: int = 5,
        delivery_timeout_ms: int | None = None,
        codec: int = 0,
    ) -> None:
        self._client = client
        self._linger = linger_ms / 1000
        self._max_in_flight = min(max_in_flight, client.settings.max_in_flight)
        self._delivery_timeout = (
            client.settings.delivery_timeout if delivery_timeout_ms is None else delivery_timeout_ms / 1000
        )
        self._codec = codec
        self._sender = Sender(client, self._round, self._refused)
        self._identity: Identity | None = None
        self._asking = False
        self._lanes: dict[TopicPartition, Lane] = {}
        self._filling: dict[TopicPartition, _Filling] = {}
        self._waiting_bytes = 0
        self._linger_timer: asyncio.TimerHandle | None = None
        self._failure: SemelError | None = None
        self._pid = os.getpid()

    def __repr__(self) -> str:
        waiting = sum(len(lane.batches) for lane in self._lanes.values())
        return f"<Producer {self._identity or 'no producer id yet'} {waiting} batches, {self._waiting_bytes} bytes>"

    async def start(self) -> None:
        """Get a producer id. Raises `Retriable` when no broker answers in time, `Fatal` when it is not allowed."""
        deadline = self._client.env.monotonic() + self._delivery_timeout
        self._sender.schedule()
        if not await self._sender.wait(lambda: self._identity is not None or self._failure is not None, deadline):
            raise Retriable(
                f"no producer id within {self._delivery_timeout:g} s; the last reason: {self._sender.last_reason}"
            )
        if self._failure is not None:
            raise self._failure

    async def send(
        self,
        topic: str,
        partition: int,
        key: bytes | None,
        value: bytes | None,
        headers: Sequence[Header] = (),
        timestamp_ms: int | None = None,
    ) -> RecordMetadata:
        """Append one record and wait for the broker's answer.

        Raises `Retriable` (not written), `OutcomeUnknown` (it may be in the log) or `Fatal` (it can never be).
        """
        check_not_forked(self._pid, "the producer")
        if self._failure is not None:
            raise self._failure
        if self._sender.closed:
            raise Fatal("the producer is closed; make a new one.")
        env = self._client.env
        deadline = env.monotonic() + self._delivery_timeout
        limit = self._client.settings.buffer_bytes_max
        if self._waiting_bytes >= limit and not await self._sender.wait(lambda: self._waiting_bytes < limit, deadline):
            raise Retriable(f"{limit} bytes wait to be sent; the last reason: {self._sender.last_reason}")
        where = TopicPartition(topic, partition)
        filling = self._filling.get(where)
        if filling is not None and filling.builder.size >= self._client.settings.batch_bytes_max:
            self._close_batch(where)
            filling = None
        if filling is None:
            filling = self._filling[where] = _Filling(env.monotonic(), deadline, self._codec)
            self._waiting_bytes += filling.builder.size
        timestamp = env.wall_ms() if timestamp_ms is None else timestamp_ms
        before = filling.builder.size
        filling.builder.append(key, value, timestamp, headers)
        self._waiting_bytes += filling.builder.size - before
        waiter: asyncio.Future[RecordMetadata] = asyncio.get_running_loop().create_future()
        filling.waiters.append(waiter)
        filling.timestamps.append(timestamp)
        self._linger_or_send()
        return await waiter

    async def send_batch(self, topic: str, partition: int, batch: BatchBuilder) -> int:
        """Append records that are encoded already, as one batch, and wait for the broker's answer: the first offset.

        Batches of one partition are written in the order of the calls. Raises what `send` raises, for all of them.
        """
        check_not_forked(self._pid, "the producer")
        if self._failure is not None:
            raise self._failure
        if self._sender.closed:
            raise Fatal("the producer is closed; make a new one.")
        where = TopicPartition(topic, partition)
        if where in self._filling:
            self._close_batch(where)
        delivery = _Delivery(where, batch, self._client.env.monotonic() + self._delivery_timeout)
        waiter: asyncio.Future[RecordMetadata] = asyncio.get_running_loop().create_future()
        delivery.waiters, delivery.timestamps = [waiter], [-1]
        self._waiting_bytes += delivery.size
        self._lane(where).add(delivery)
        self._sender.schedule()
        return (await waiter).offset

    async def flush(self) -> None:
        """Wait until every record handed over is written or has failed."""
        deadline = self._client.env.monotonic() + self._delivery_timeout + self._client.settings.socket_timeout
        for where in list(self._filling):
            self._close_batch(where)
        self._sender.schedule()
        if not await self._sender.wait(lambda: not any(lane.batches for lane in self._lanes.values()), deadline):
            raise Retriable(f"not everything was delivered; the last reason: {self._sender.last_reason}")

    async def close(self) -> None:
        """Stop; what is still waiting fails, as `OutcomeUnknown` where it was sent. Flush first to keep it."""
        for where in list(self._filling):
            self._close_batch(where)
        for lane in self._lanes.values():
            for batch in lane.batches:
                self._fail(batch, "the producer was closed", unanswered=batch.unanswered or batch.in_flight)
        if self._linger_timer is not None:
            self._linger_timer.cancel()
        await self._sender.close()

    # --- Rounds ---

    def _linger_or_send(self) -> None:
        if self._linger <= 0:
            self._sender.schedule()
        elif self._linger_timer is None:
            self._linger_timer = asyncio.get_running_loop().call_later(self._linger, self._linger_over)

    def _linger_on(self, now: float) -> None:
        """Come back for batches that were begun while the timer ran for others: nobody else may ever ask."""
        if not self._linger or self._linger_timer is not None:
            return
        left = [rest for filling in self._filling.values() if (rest := filling.opened + self._linger - now) > 0]
        if left:
            self._linger_timer = asyncio.get_running_loop().call_later(min(left), self._linger_over)

    def _linger_over(self) -> None:
        self._linger_timer = None
        self._sender.schedule()

    def _round(self) -> None:
        now = self._client.env.monotonic()
        self._expire(now)
        if self._identity is None and not self._asking and self._may_renew():
            self._asking = True
            self._sender.spawn(self._renew())
        for where, filling in list(self._filling.items()):
            lane = self._lanes.get(where)
            if lane is None or (len(lane.batches) < self._max_in_flight and filling.opened + self._linger <= now):
                self._close_batch(where)
        self._linger_on(now)
        while self._write_batches():
            continue

    def _close_batch(self, where: TopicPartition) -> None:
        filling = self._filling.pop(where)
        batch = _Delivery(where, filling.builder, filling.deadline)
        batch.waiters, batch.timestamps = filling.waiters, filling.timestamps
        self._lane(where).add(batch)

    def _lane(self, where: TopicPartition) -> Lane:
        lane = self._lanes.get(where)
        if lane is None:
            lane = self._lanes[where] = Lane(self._max_in_flight)
        return lane

    def _write_batches(self) -> bool:
        requests: dict[int, tuple[Any, list[Batch]]] = {}
        for where, lane in self._lanes.items():
            if len(lane.batches) <= lane.in_flight or not self._may_send(lane):
                continue
            route = self._sender.route(where)
            if route is None:
                continue
            node_id, connection = route
            batch = lane.peek(node_id)
            if batch is not None and (batch.identity is not None or self._identity is not None):
                lane.send(batch, node_id, self._identity or Identity())
                requests.setdefault(node_id, (connection, []))[1].append(batch)
        for node_id, (connection, batches) in requests.items():
            self._sender.write(node_id, connection, batches, self._answered, self._lost)
        return bool(requests) and not self._sender.is_paused

    def _may_send(self, lane: Lane) -> bool:
        """While a new identity is due, only batches that may be in the log are sent again, to learn their fate."""
        return self._identity is not None or any(batch.unanswered for batch in lane.batches)

    # --- Outcomes ---

    def _answered(self, batch: Batch, answer: Answer) -> None:
        assert isinstance(batch, _Delivery)
        lane = self._lanes[batch.partition]
        reaction = reaction_to("Produce", answer.code)
        if reaction is Reaction.DONE:
            lane.written(batch)
            self._waiting_bytes -= batch.size
            batch.written(answer)
            self._sender.succeeded()
            return
        name = f"Produce to {batch.partition}: error {answer.code}"
        lane.undone(batch, name, unanswered=answer.code in _PERHAPS_WRITTEN)
        if reaction in (Reaction.RETRY, Reaction.REFRESH) or (
            reaction is Reaction.OUT_OF_ORDER and not lane.is_first(batch)
        ):
            if reaction is Reaction.REFRESH:
                self._client.invalidate(topic=batch.partition.topic)
            self._sender.pause(name)
        elif reaction in _LOST_SEQUENCE or answer.code == ErrorCode.UNKNOWN_PRODUCER_ID:
            # The broker lost our place, or a batch before this one was given up: start over with a new producer id.
            self._identity = None
            if batch.unanswered:
                self._give_up(batch, name, unanswered=True)
            self._sender.pause(name)
        else:
            error = kafka_error(answer.code, f"a batch for {batch.partition} of {batch.size} bytes", cls=Fatal)
            self._give_up(batch, str(error), unanswered=batch.unanswered, error=None if batch.unanswered else error)

    def _lost(self, batch: Batch, reason: str, unanswered: bool) -> None:
        self._lanes[batch.partition].undone(batch, reason, unanswered=unanswered)

    def _refused(self, key: object, error: SemelError) -> None:
        """The topic, or our login at a broker, is refused: what waits for it is not written, and will not be."""
        refusal = Fatal(str(error))
        refusal.code = error.code
        for lane in self._lanes.values():
            for batch in [item for item in lane.batches if not item.in_flight]:
                if not isinstance(key, str) or batch.partition.topic == key:
                    self._give_up(
                        batch, str(error), unanswered=batch.unanswered, error=None if batch.unanswered else refusal
                    )

    def _expire(self, now: float) -> None:
        for lane in self._lanes.values():
            while lane.batches and not lane.batches[0].in_flight and lane.batches[0].deadline <= now:
                batch = lane.batches[0]
                reason = f"not delivered within {self._delivery_timeout:g} s ({batch.reason})"
                self._give_up(batch, reason, unanswered=batch.unanswered)

    def _give_up(self, batch: Batch, reason: str, *, unanswered: bool = False, error: SemelError | None = None) -> None:
        self._lanes[batch.partition].drop(batch)
        if batch.identity is not None:
            self._identity = None  # Its sequence numbers are used up; the broker would wait for them for ever.
        self._waiting_bytes -= batch.size
        self._fail(batch, reason, unanswered=unanswered, error=error)

    def _fail(self, batch: Batch, reason: str, *, unanswered: bool, error: SemelError | None = None) -> None:
        assert isinstance(batch, _Delivery)
        what = f"{batch.count} records for {batch.partition}: {reason}"
        if error is None:
            error = OutcomeUnknown(f"{what}. They may be in the log.") if unanswered else Retriable(what)
        batch.failed(error)

    # --- The identity ---

    def _may_renew(self) -> bool:
        """Whether no batch may still land in the log under the old identity."""
        return not any(
            lane.in_flight or any(batch.unanswered for batch in lane.batches) for lane in self._lanes.values()
        )

    async def _renew(self) -> None:
        try:
            answer = await self._client.call(
                INIT_PRODUCER_ID, None, transactional_id=None, transaction_timeout=0, producer_id=-1, producer_epoch=-1
            )
            if answer.error_code != ErrorCode.NONE:
                raise kafka_error(answer.error_code, "getting a producer id")
        except (Retriable, OutcomeUnknown) as error:
            self._sender.pause(str(error))
        except SemelError as error:
            self._failure = error
        else:
            self._identity = Identity(answer.producer_id, answer.producer_epoch)
            self._sender.succeeded()
            for lane in self._lanes.values():
                lane.restart()
        finally:
            self._asking = False

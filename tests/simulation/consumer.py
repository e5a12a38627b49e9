"""`Consumer` and `Reader` of the simulated world: what `semel.client.consumer` does with librdkafka, over our client.

They stand in the places of those two, so that everything above them is the real thing. What is told to
`ConsumerEvents`, when, and what a poll, a seek and a pause mean is as there; the protocol of the group is
`membership.py`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from semel.client.cluster import GROUP, KafkaClient
from semel.client.consumer import Batch, ConsumerEvents
from semel.env import Env
from semel.errors import ErrorCode, Fatal, Fenced, OutcomeUnknown, Retriable, SemelError
from semel.types import GroupMetadata, Record, TopicPartition
from semel.wire.records import decode_records, iter_batches, read_control
from tests.simulation.membership import (
    HEARTBEAT,
    JOIN_GROUP,
    LEAVE_GROUP,
    SYNC_GROUP,
    Change,
    Membership,
    State,
)

__all__ = ["GroupConsumer", "PartitionReader"]

FETCH = 1
_FETCH_VERSION = 12
_LATER = (Retriable, OutcomeUnknown)
_BUFFER_RECORDS = 200
"""Fetched ahead of the polls; small, so that a seek finds something to drop."""
_FETCH_WAIT_MS = 400
_PAUSE_SECONDS = 0.05
_POLL_TAKES_SECONDS = 0.0002


class _Position:
    """Where one partition is read."""

    def __init__(self, offset: int) -> None:
        self.fetched = offset
        self.told_end = -1
        self.is_paused = False


class _Source:
    """Fetches partitions ahead of polls. What a seek or a revocation made worthless is never delivered."""

    def __init__(self, bootstrap: str, settings: Mapping[str, object] | None, env: Env, name: str) -> None:
        self._env = env
        self._name = name
        # An empty fetch is answered late; librdkafka, too, wants its time-out above that.
        own = dict(settings or {})
        patient = {"socket.timeout.ms": int(str(own.get("socket.timeout.ms", 1000))) + _FETCH_WAIT_MS}
        self._client = KafkaClient(bootstrap, client_id=name, env=env, settings={**own, **patient})
        self._positions: dict[TopicPartition, _Position] = {}
        self._ready: deque[tuple[TopicPartition, Record | int]] = deque()
        """Records, and ends of partitions as offsets, in the order in which they came."""
        self._version = 0
        self._stirred = asyncio.Event()
        self._failure: SemelError | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._polling: asyncio.Task[Batch] | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._name} {len(self._positions)} partitions>"

    def _begin(self, *work: Any) -> None:
        for item in work:
            task = asyncio.create_task(item)
            task.add_done_callback(self._ended)
            self._tasks.append(task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A task that ends by a mistake of ours must not leave a consumer that stands still."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = Fatal(f"the consumer {self._name} cannot go on: {error!r}")
            self._stirred.set()

    def _assign(self, offsets: Mapping[TopicPartition, int]) -> None:
        self._version += 1
        self._positions = {at: _Position(offset) for at, offset in offsets.items()}
        self._ready.clear()
        self._stirred.set()

    async def seek(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Deliver these partitions from these offsets on."""
        self._check()
        if self._polling is not None:
            with suppress(SemelError):
                batch = await asyncio.shield(self._polling)
                self._polling = asyncio.create_task(_done(_without(batch, offsets)))
        self._version += 1
        for at, offset in offsets.items():
            if at not in self._positions:
                raise Retriable(f"{at} is not assigned")
            position = self._positions[at]
            position.fetched, position.told_end = offset, -1
        self._ready = deque(item for item in self._ready if item[0] not in offsets)
        self._stirred.set()

    async def pause(self, partitions: Iterable[TopicPartition]) -> None:
        self._hold(partitions, True)

    async def resume(self, partitions: Iterable[TopicPartition]) -> None:
        self._hold(partitions, False)

    def _hold(self, partitions: Iterable[TopicPartition], is_paused: bool) -> None:
        self._check()
        for at in partitions:
            if at in self._positions:
                self._positions[at].is_paused = is_paused
        self._stirred.set()

    async def poll(self, max_records: int, timeout: float) -> Batch:
        """As the real one: a cancelled poll goes on, and the next one gives what it found."""
        self._check()
        if self._polling is None:
            self._polling = asyncio.create_task(self._poll(max_records, timeout))
        polling = self._polling
        try:
            return await asyncio.shield(polling)
        finally:
            if polling.done() and self._polling is polling:
                self._polling = None

    async def _poll(self, max_records: int, timeout: float) -> Batch:
        deadline = self._env.monotonic() + timeout
        await asyncio.sleep(_POLL_TAKES_SECONDS)  # So that time passes, also for whoever polls without waiting.
        while True:
            await self._serve()
            self._check()
            batch = self._take(max_records)
            left = deadline - self._env.monotonic()
            if batch.records or batch.end_offsets or left <= 0:
                return batch
            self._stirred.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stirred.wait(), left)

    async def _serve(self) -> None:
        """Let the owner know of what changed."""

    def _take(self, max_records: int) -> Batch:
        records: list[Record] = []
        ends: dict[TopicPartition, int] = {}
        kept: deque[tuple[TopicPartition, Record | int]] = deque()
        while self._ready and len(records) < max_records:
            at, item = self._ready.popleft()
            if self._positions[at].is_paused:
                kept.append((at, item))
            elif isinstance(item, int):
                ends[at] = item
            else:
                records.append(item)
        self._ready.extendleft(reversed(kept))
        self._stirred.set()
        return Batch(records, ends)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise Fatal(f"the consumer {self._name} is closed.")

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.close()

    # --- Fetching ---

    async def _fetch_for_ever(self) -> None:
        while True:
            flowing = [at for at, position in self._positions.items() if not position.is_paused]
            if not flowing or len(self._ready) >= _BUFFER_RECORDS:
                self._stirred.clear()
                await self._stirred.wait()
                continue
            try:
                await self._fetch(flowing)
            except _LATER:
                await asyncio.sleep(_PAUSE_SECONDS)
            except SemelError as error:
                self._failure = error
                self._stirred.set()
                return

    async def _fetch(self, flowing: Sequence[TopicPartition]) -> None:
        version = self._version
        node_id = await self._client.leader(*flowing[0])
        if version != self._version:
            return
        by_topic: dict[str, list[dict[str, int]]] = {}
        for at in flowing:
            item = {"partition": at.partition, "fetch_offset": self._positions[at].fetched}
            by_topic.setdefault(at.topic, []).append(item | {"partition_max_bytes": 1 << 20})
        answer = await self._client.call(
            FETCH,
            node_id,
            _FETCH_VERSION,
            replica_id=-1,
            max_wait=_FETCH_WAIT_MS,
            min_bytes=1,
            max_bytes=1 << 20,
            isolation_level=1,
            topics=[{"topic": topic, "partitions": items} for topic, items in by_topic.items()],
            forgotten_topics_data=[],
        )
        if version != self._version:
            return
        for topic in answer.responses:
            for item in topic.partitions:
                self._arrived(TopicPartition(topic.topic, item.partition_index), item)

    def _arrived(self, at: TopicPartition, item: Any) -> None:
        position = self._positions[at]
        if item.error_code == ErrorCode.OFFSET_OUT_OF_RANGE:
            raise Fatal(f"{at}: the position {position.fetched} is not in the log any more.")
        if item.error_code:
            self._client.invalidate(topic=at.topic)
            raise Retriable(f"fetching {at}: error {item.error_code}")
        records, after = _committed(bytes(item.records or b""), at, position.fetched, item.aborted_transactions)
        self._ready.extend((at, record) for record in records)
        position.fetched = after
        if after >= item.last_stable_offset and position.told_end != after:
            position.told_end = after
            self._ready.append((at, after))
        self._stirred.set()


def _committed(data: bytes, at: TopicPartition, offset: int, aborted: Any) -> tuple[list[Record], int]:
    """The committed records from `offset` on, and the next offset."""
    starts = sorted(((item.first_offset, item.producer_id) for item in aborted or ()), reverse=True)
    skipped: set[int] = set()
    found: list[Record] = []
    for place, header in iter_batches(data):
        while starts and starts[-1][0] <= header.last_offset:
            skipped.add(starts.pop()[1])
        if header.is_control:
            if not read_control(data, place, header)[0]:
                skipped.discard(header.producer_id)
        elif not (header.is_transactional and header.producer_id in skipped):
            found += [record for record in decode_records(data, place, header, *at) if record.offset >= offset]
        offset = max(offset, header.next_offset)
    return found, offset


class PartitionReader(_Source):
    """In the place of `semel.client.consumer.Reader`."""

    def __init__(self, bootstrap: str, *, env: Env, settings: Mapping[str, object] | None = None) -> None:
        super().__init__(bootstrap, settings, env, "reader")

    async def start(self, offsets: Mapping[TopicPartition, int]) -> None:
        self._assign(offsets)
        self._begin(self._connect(), self._fetch_for_ever())

    async def _connect(self) -> None:
        while True:
            try:
                await self._client.start()
                return
            except _LATER:
                await asyncio.sleep(_PAUSE_SECONDS)


class GroupConsumer(_Source):
    """In the place of `semel.client.consumer.Consumer`. The group has a client of its own: joining takes long."""

    def __init__(
        self,
        bootstrap: str,
        *,
        group: str,
        topics: Sequence[str],
        instance_id: str | None,
        events: ConsumerEvents,
        session_timeout_ms: int,
        env: Env,
        settings: Mapping[str, object] | None = None,
        on_assigned: Callable[[str, Sequence[TopicPartition]], None] = lambda group, partitions: None,
    ) -> None:
        super().__init__(bootstrap, settings, env, f"{group} fetching")
        # A join is answered when all have joined, so its connection must not be given up before.
        patient = {"socket.timeout.ms": 4 * session_timeout_ms, "request.timeout.ms": 4 * session_timeout_ms}
        self._coordinator = KafkaClient(bootstrap, client_id=group, env=env, settings={**(settings or {}), **patient})
        self._member = Membership(group, topics, instance_id, session_timeout_ms, 3 * session_timeout_ms)
        self._events = events
        self._on_assigned = on_assigned
        self._interval = session_timeout_ms / 4000
        self._session_seconds = session_timeout_ms / 1000
        self._heard_at = 0.0
        self._change = Change.NOTHING
        self._given: list[TopicPartition] | None = None
        """An assignment that the owner has not been told of yet."""
        self._served = asyncio.Event()
        self._metadata: GroupMetadata | None = None

    async def start(self) -> None:
        self._begin(self._be_a_member(), self._fetch_for_ever())

    def group_metadata(self) -> GroupMetadata:
        """As the last poll or event left it."""
        if self._metadata is None:
            raise Retriable(f"no member of group {self._member.group!r} now")
        return self._metadata

    def _remember(self) -> None:
        try:
            self._metadata = self._member.metadata
        except Retriable:
            self._metadata = None

    async def close(self) -> None:
        if self._closed:
            return
        if self._positions and self._failure is None:
            with suppress(*_LATER):
                await self._give_up(Change.REVOKED if self._change is Change.NOTHING else self._change)
        await super().close()
        request = self._member.leave_request()
        if request is not None and self._failure is None:
            with suppress(SemelError):
                await self._ask(LEAVE_GROUP, request)
        await self._coordinator.close()

    # --- What the owner of the partitions is told, within polls ---

    async def _serve(self) -> None:
        try:
            if self._change is not Change.NOTHING:
                change, self._change = self._change, Change.NOTHING
                await self._give_up(change)
                self._served.set()
            if self._given is not None:
                given, self._given = self._given, None
                self._remember()
                self._on_assigned(self._member.group, given)
                offsets = dict(await self._events.on_assigned(list(given))) if given else {}
                assert set(offsets) >= set(given), f"on_assigned gave no offset for some of {given}"
                self._assign({at: offsets[at] for at in given})
                self._served.set()
        except SemelError as error:
            self._failure = self._failure or error
            raise
        self._remember()

    async def _give_up(self, change: Change) -> None:
        partitions = list(self._positions)
        self._remember()
        self._assign({})
        if partitions:
            event = self._events.on_lost if change is Change.LOST else self._events.on_revoked
            await event(partitions)

    # --- The group ---

    async def _ask(self, api_key: int, request: dict[str, Any]) -> Any:
        node_id = await self._coordinator.coordinator(self._member.group, GROUP)
        return await self._coordinator.call(api_key, node_id, **request)

    async def _be_a_member(self) -> None:
        while True:
            try:
                await self._coordinator.start()
                break
            except _LATER:
                await asyncio.sleep(_PAUSE_SECONDS)
        while True:
            try:
                if self._member.state is State.STABLE:
                    await self._stay()
                else:
                    await self._join()
            except _LATER:
                self._coordinator.invalidate(group=self._member.group)
                await self._end_session()
                await asyncio.sleep(_PAUSE_SECONDS)
            except (Fenced, Fatal) as error:
                self._failure = error
                self._stirred.set()
                return

    async def _join(self) -> None:
        if not self._member.joined(await self._ask(JOIN_GROUP, self._member.join_request())):
            return
        self._heard_at = self._env.monotonic()
        topics = self._member.wanted_topics
        partitions = {topic: (await self._coordinator.topic(topic)).partitions for topic in sorted(topics)}
        given = self._member.synced(await self._ask(SYNC_GROUP, self._member.sync_request(partitions)))
        if given is not None:
            self._heard_at = self._env.monotonic()
            self._given = given
            self._stirred.set()

    async def _stay(self) -> None:
        await asyncio.sleep(self._interval)
        answer = await self._ask(HEARTBEAT, self._member.heartbeat_request())
        change = self._member.heartbeat_answered(answer.error_code)
        self._heard_at = self._env.monotonic()
        if change is not Change.NOTHING:
            await self._tell(change)
            if change is Change.REVOKED:
                self._member.given_back()

    async def _tell(self, change: Change) -> None:
        """Have the owner told of it in his next poll, and go on when he has finished with it."""
        self._served.clear()
        if self._given is not None:  # He has not even heard of what is taken away again.
            self._given = None
        self._change = change
        self._stirred.set()
        waiting = asyncio.ensure_future(self._served.wait())
        try:
            while not waiting.done():
                await asyncio.wait((waiting,), timeout=self._interval)
                if not waiting.done() and change is Change.REVOKED:
                    change = await self._beat_on(change)
        finally:
            waiting.cancel()

    async def _beat_on(self, change: Change) -> Change:
        """While the owner still finishes his work the session must not end."""
        try:
            answer = await self._ask(HEARTBEAT, self._member.heartbeat_request())
            found = self._member.heartbeat_answered(answer.error_code)
            self._heard_at = self._env.monotonic()
        except _LATER:
            self._coordinator.invalidate(group=self._member.group)
            return change
        if found is Change.LOST and self._change is Change.REVOKED:
            self._change = Change.LOST
        return Change.LOST if found is Change.LOST else change

    async def _end_session(self) -> None:
        """Nobody answered for a whole session: the group has given our partitions to others by now."""
        if self._member.state in (State.JOINED, State.STABLE) and (
            self._env.monotonic() - self._heard_at >= self._session_seconds
        ):
            self._member.over()
            await self._tell(Change.LOST)


async def _done(batch: Batch) -> Batch:
    return batch


def _without(batch: Batch, partitions: Iterable[TopicPartition]) -> Batch:
    gone = set(partitions)
    return Batch(
        [record for record in batch.records if (record.topic, record.partition) not in gone],
        {at: offset for at, offset in batch.end_offsets.items() if at not in gone},
    )

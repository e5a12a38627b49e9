"""The read-process-write loop of one component in one worker.

Records are worked on first, with nothing open at the broker; then one Kafka transaction takes the outputs, the
changelog records and the position in the input; only when Kafka answered "committed" does local state change. A
transaction that was aborted, or whose end nobody knows, is thrown away with everything it would have changed, and the
committed offsets say where to go on.

Whatever moves the consumer (rebalances, seeks) and whatever touches the unit of work take turns through one lock.
`seek` and `pause` are called outside of it: the consumer's thread may be waiting in `on_revoked` for the lock.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from semel.client.cluster import Backoff
from semel.env import Env
from semel.errors import (
    AbortTransaction,
    ConfigurationError,
    ErrorCode,
    Fatal,
    Fenced,
    OutcomeUnknown,
    Retriable,
    SemelError,
)
from semel.failpoints import failpoint
from semel.processing.component import Component
from semel.processing.effects import perform
from semel.processing.identity import instance_id, transactional_id
from semel.processing.limits import (
    IDLE_COMMIT_SECONDS,
    POLL_PAUSE_SECONDS,
    POLL_RECORDS_MAX,
    POLL_RECORDS_SLOW,
    SLICE_SECONDS,
)
from semel.processing.measures import Measures
from semel.processing.metrics import Metrics
from semel.processing.parking import ParkedKeys, park
from semel.processing.restore import take_over
from semel.processing.seams import BatchSeam, Kafka, RealKafka
from semel.processing.shortage import Shortages
from semel.processing.stores import Stores
from semel.processing.topics import DataError
from semel.processing.unit import RecordScope, UnitOfWork, check_parked
from semel.processing.watermarks import Watermarks
from semel.settings import Settings
from semel.types import Record, TopicPartition

__all__ = ["Engine"]

log = logging.getLogger("semel.engine")

IDLE_POLL_SECONDS = 0.5
BACKOFF_SECONDS = (0.05, 5.0)
OWNER_SECONDS = 5.0
"""How long an engine that fails may ask whether it has a successor."""
LAG_SECONDS = 5.0

_WAIT = (Retriable, OutcomeUnknown, ConnectionError, TimeoutError)
"""The world is at fault, not the record: try again."""

_REFUSED_DATA = frozenset(
    {
        ErrorCode.MESSAGE_TOO_LARGE,
        ErrorCode.RECORD_LIST_TOO_LARGE,
        ErrorCode.INVALID_RECORD,
        ErrorCode.INVALID_TIMESTAMP,
    }
)
"""The broker would refuse the same output again, so its input is at fault."""


@dataclass(slots=True)
class _Input:
    """One partition that is ours."""

    position: int
    """The next offset to work on."""
    committed: int
    parked: ParkedKeys = field(default_factory=ParkedKeys)
    stopped: str = ""
    """Why the partition is not worked on; empty when it is."""


@dataclass(slots=True)
class _Recovery:
    """What has to be put in order before the loop goes on."""

    abort: bool = False
    """The producer has a transaction that must end."""
    rebuild: bool = False
    """Local state may lack a transaction that was committed after all."""


class Engine:
    """Runs one component until it is drained. `slot` numbers the workers of one host, from 0.

    `run` raises `Fenced` when another process took over our transactional id, and `Fatal` when a person must look.
    """

    def __init__(
        self,
        component: Component,
        bootstrap: str,
        settings: Settings,
        env: Env,
        metrics: Metrics,
        *,
        slot: int = 0,
        kafka: Kafka | None = None,
        watermarks: Watermarks | None = None,
    ) -> None:
        self.component = component
        self.identity = transactional_id(component.app, component.name, instance_id(settings, env), slot)
        self._settings = settings
        self._env = env
        self._kafka = kafka or RealKafka(bootstrap, settings, env, client_id=self.identity)
        self._producer = self._kafka.producer(self.identity)
        self._consumer = self._kafka.consumer(component.group, component.inputs, self.identity, self)
        self._measures = Measures(metrics, component.name)
        self._turn = asyncio.Lock()
        self._draining = asyncio.Event()
        self._closed = False
        self._backoff = Backoff(env, *BACKOFF_SECONDS)
        self._stores = Stores()
        self._scope = RecordScope(self._stores, frozenset(component.stores))
        self._watermarks = watermarks or Watermarks()
        self._topics: dict[str, str] = {}
        self._partition_counts: dict[str, int] = {}
        self._unit = UnitOfWork(self._partition_counts, env.wall_ms())
        self._inputs: dict[tuple[str, int], _Input] = {}
        self._pending: deque[Record] = deque()
        self._ends: dict[TopicPartition, int] = {}
        self._to_pause: set[TopicPartition] = set()
        self._recovery: _Recovery | None = None
        self._failure: SemelError | None = None
        self._gone_in_poll: set[TopicPartition] = set()
        self._is_gap_possible = False
        self._is_rejoining = False
        self._careful = 0
        self._refused: dict[tuple[str, int, int], Exception] = {}
        self._shortages = Shortages(env.monotonic)
        self._last_commit = self._last_poll = env.monotonic()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "recovering" if self._recovery else f"{len(self._inputs)} partitions"
        return f"<Engine {self.identity} [{state}] {self._unit!r}>"

    # --- Life ---

    async def run(self) -> None:
        """Work until `drain` is called. Raises `Fenced` or `Fatal`; a broker that is away is waited for."""
        lag: asyncio.Task[None] | None = None
        try:
            await self._insist(self._kafka.start, "connecting to Kafka")
            failpoint("engine.before_identity")
            await self._insist(self._producer.init_transactions, f"taking over {self.identity}")
            failpoint("engine.after_identity")
            await self._insist(self._consumer.start, f"joining group {self.component.group}")
            lag = asyncio.create_task(self._watch_lag(), name=f"lag {self.identity}")
            while not self._draining.is_set():
                await self._step()
        except Fenced as error:
            raise self._explain(error) from error
        except Fatal as error:
            try:
                await self._blame_successor()
            except Fenced as fenced:
                raise self._explain(fenced) from error
            raise
        finally:
            if lag is not None:
                lag.cancel()
            await self._close()

    async def drain(self) -> None:
        """Finish the unit of work in hand, commit it, and let `run` return."""
        self._draining.set()

    async def _close(self) -> None:
        self._closed = self._closed or self._recovery is not None
        with suppress(*_WAIT, SemelError):
            await self._consumer.close()
        self._closed = True
        if self._recovery is not None and self._recovery.abort:
            with suppress(*_WAIT, SemelError):
                await self._producer.abort()
        with suppress(*_WAIT, SemelError):
            await self._producer.close()
        await self._kafka.close()
        self._measures.close()

    async def _insist(self, call: Callable[[], Awaitable[None]], what: str) -> None:
        """Repeat a call until it succeeds or we drain."""
        while not self._draining.is_set():
            try:
                await call()
                self._backoff.reset()
                return
            except _WAIT as error:
                await self._wait(f"{what}: {error}")

    async def _wait(self, why: str, level: int = logging.WARNING) -> None:
        """Back off for a while; a drain ends it."""
        seconds = self._backoff.next()
        log.log(level, "%s waits %.2f s: %s", self.identity, seconds, why)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._draining.wait(), seconds)

    def _explain(self, error: Fenced) -> Fenced:
        self._closed = True
        self._measures.transaction("fenced")
        return Fenced(
            f"transactional id {self.identity} belongs to another process now: {error} "
            "Two processes run with the same instance id and slot. Stop one of them, or give each host its own "
            "SEMEL_INSTANCE (a copied data folder copies the instance id: remove its file 'instance')."
        )

    async def _blame_successor(self) -> None:
        """Who stood still long enough finds the records gone that its successor is through with: say that instead.

        Raises `Fenced` when another process has our identity; a Kafka that cannot be asked leaves the error as it is.
        """
        try:
            async with asyncio.timeout(OWNER_SECONDS):
                await self._producer.check_owner()
        except Fenced:
            raise
        except (*_WAIT, SemelError):
            return

    # --- One unit of work ---

    async def _step(self) -> None:
        """Poll, work, commit: once, or repair what went wrong."""
        if self._failure is not None:
            raise self._failure
        if self._recovery is not None:
            await self._recover(self._recovery)
            return
        await self._pause_stopped()
        if not self._pending:
            batch = await self._poll(IDLE_POLL_SECONDS)
        elif self._env.monotonic() - self._last_poll > POLL_PAUSE_SECONDS:
            batch = await self._poll(0, POLL_RECORDS_SLOW)
        deadline = self._env.monotonic() + self._settings.commit_interval_ms / 1000
        while await self._work(deadline):
            batch = await self._poll(0)
            if batch is None or not batch.records:
                break
        async with self._turn:
            self._reach_ends()
            await self._commit()

    async def _poll(self, timeout: float, max_records: int = POLL_RECORDS_MAX) -> BatchSeam | None:
        """Take what the consumer has; None when Kafka is away."""
        self._gone_in_poll.clear()
        failpoint("consume.before_poll")
        try:
            batch = await self._consumer.poll(max_records, timeout)
            self._last_poll = self._env.monotonic()
        except _WAIT as error:
            await self._wait(f"polling: {error}")
            return None
        except Fatal as error:
            await self._rejoin(error)
            return None
        if self._is_gap_possible:
            # What the poll brought may be of before, or have been dropped as such: only a seek is sure.
            self._is_gap_possible = False
            self._need("partitions went and came back within one poll", level=logging.INFO)
        if self._recovery is None:
            self._pending.extend(batch.records)
            self._ends.update(batch.end_offsets)
        if batch.records:
            failpoint("consume.after_poll")
        return batch

    async def _steer(self, move: Awaitable[None]) -> bool:
        """Seek or pause; False when the consumer is of no further use and we join with another one."""
        try:
            await move
        except Fatal as error:
            await self._rejoin(error)
            return False
        return True

    async def _rejoin(self, error: Fatal) -> None:
        """The consumer is of no further use: what it was to read next is not in the log any more.

        A process that was stopped for long finds that its successor has worked on it, and that it was deleted then.
        Taking over anew tells, and stops a partition that misses records which nobody has worked on. A second failure
        before anything was committed is not of that kind.
        """
        if self._is_rejoining or isinstance(error, ConfigurationError):
            raise error
        await self._blame_successor()
        self._is_rejoining = True
        log.error("%s joins its group anew: %s", self.identity, error)
        with suppress(*_WAIT, SemelError):
            await self._consumer.close()
        await self.on_lost([TopicPartition(*at) for at in self._inputs])
        self._consumer = self._kafka.consumer(self.component.group, self.component.inputs, self.identity, self)
        await self._insist(self._consumer.start, f"joining group {self.component.group} anew")

    async def _work(self, deadline: float) -> bool:
        """Work on what was polled; whether the unit may take more."""
        async with self._turn:
            if self._unit.records == 0:
                self._unit.now_ms = self._env.wall_ms()
            slice_end = self._env.monotonic() + SLICE_SECONDS
            while self._pending and self._recovery is None:
                record = self._pending[0]
                held = self._inputs.get((record.topic, record.partition))
                if held is not None and not held.stopped and record.offset >= held.position:
                    if not await self._handle(record, held):
                        continue
                    held.position = record.offset + 1
                self._pending.popleft()
                now = self._env.monotonic()
                if self._unit.is_full or self._careful or now >= deadline:
                    return False
                if now >= slice_end:
                    await asyncio.sleep(0)
                    slice_end = self._env.monotonic() + SLICE_SECONDS
            return self._recovery is None and self._env.monotonic() < deadline

    async def _handle(self, record: Record, held: _Input) -> bool:
        """Take one record into the unit of work; False when it has to wait or its partition stopped."""
        at = (record.topic, record.partition)
        in_unit = self._unit.parked.get(at)
        if record.key is not None and (
            record.key in held.parked.keys or (in_unit is not None and record.key in in_unit.keys)
        ):
            return self._park(record, held, None)
        refused = self._refused.get((*at, record.offset))
        if refused is not None:
            return self._park(record, held, refused)
        scope = self._scope
        scope.begin(self._unit, record.partition)
        failpoint("handler.before")
        try:
            answer = await perform(self.component.handle(record, scope), scope.emit)
            if answer is not None:
                raise TypeError(f"the handler returned {answer!r:.80}, which is not an effect")
            for write in scope.writes:
                if write.topic not in self._partition_counts:
                    await self._learn(write.topic)
            scope.check_partitions(self._partition_counts)
        except Fenced:
            raise
        except _WAIT as error:
            self._need(f"the handler of {self.component.name} at {record.topic}-{record.partition}: {error!r}")
            return False
        except Exception as error:
            if self._shortages.may_pass((*at, record.offset), error):
                self._need(f"the handler of {self.component.name} at {record.topic}-{record.partition}: {error!r}")
                return False
            return self._park(record, held, error)
        failpoint("handler.after")
        self._unit.add(record, scope)
        return True

    async def _learn(self, topic: str) -> None:
        try:
            self._partition_counts[topic] = await self._kafka.partitions(topic)
        except Fatal as error:
            raise Retriable(str(error)) from error

    def _park(self, record: Record, held: _Input, error: Exception | None) -> bool:
        """Let a record wait in the park topic, or stop its partition where that cannot be; False when it stopped."""
        where = f"{record.topic}-{record.partition}@{record.offset}"
        topic = self.component.parks.get(record.topic)
        if topic is None:
            return self._stop(record, held, f"{where} cannot be processed: {error!r}", error)
        full = held.parked.full(self._unit.parked.get((record.topic, record.partition)))
        if full:
            return self._stop(record, held, f"{where} cannot be processed ({error!r}) nor parked: {full}", error)
        write = park(topic, self.component.name, record, error)
        try:
            check_parked(write)
        except DataError as too_large:
            return self._stop(record, held, f"{where} cannot be processed ({error!r}) nor parked: {too_large}", error)
        if error is not None:
            log.error("%s parks the key of %s: %r", self.component.name, where, error, exc_info=error)
        failpoint("handler.before_park")
        self._unit.park(record, write, error)
        return True

    def _stop(self, record: Record, held: _Input, why: str, error: Exception | None) -> bool:
        held.stopped = why
        self._to_pause.add(TopicPartition(record.topic, record.partition))
        self._measures.stopped(sum(1 for item in self._inputs.values() if item.stopped))
        log.error(
            "%s stops reading %s-%d: %s. The other partitions go on. Mend the handler or the data and restart.",
            self.component.name,
            record.topic,
            record.partition,
            why,
            exc_info=error,
        )
        return False

    async def _pause_stopped(self) -> None:
        if self._to_pause:
            partitions = [at for at in self._to_pause if at in self._inputs]
            self._to_pause.clear()
            await self._steer(self._consumer.pause(partitions))

    def _reach_ends(self) -> None:
        """Move positions past what no record stands for: markers and aborted records at a partition's end."""
        if self._pending or self._recovery is not None:
            return
        for at, end in self._ends.items():
            held = self._inputs.get(at)
            if held is not None and not held.stopped and end > held.position:
                held.position = end
        self._ends.clear()

    # --- The transaction ---

    async def _commit(self) -> None:
        """Make the unit of work real; the caller has the turn. What fails here is repaired by `_recover`."""
        unit = self._unit
        if self._recovery is not None and not unit.records:
            return
        moved = {
            TopicPartition(*at): held.position for at, held in self._inputs.items() if held.position != held.committed
        }
        idle = self._env.monotonic() - self._last_commit < IDLE_COMMIT_SECONDS
        if not moved or (not unit.records and idle):
            return
        self._unit = UnitOfWork(self._partition_counts, self._env.wall_ms())
        try:
            await self._transact(unit, moved)
        except (Fenced, Fatal) as error:
            self._failure = error
            self._need(f"it cannot go on: {error}")
        except AbortTransaction as error:
            self._measures.transaction("aborted")
            self._suspect(unit, error)
            self._need(f"a transaction was aborted: {error}", abort=True)
        except SemelError as error:
            self._measures.transaction("unknown")
            self._need(f"the end of a transaction is unknown: {error}", abort=True, rebuild=True)
        except BaseException:
            self._need("a transaction was interrupted", abort=True, rebuild=True)
            raise
        else:
            self._committed(unit, moved)

    async def _transact(self, unit: UnitOfWork, offsets: dict[TopicPartition, int]) -> None:
        with unit.told(self.component.name, self.identity):
            failpoint("unit.before_produce")
            self._producer.begin()
            self._measures.transaction_began(self._env.monotonic)
            try:
                for partition, batch in unit.seal(self.component.changelogs):
                    await self._producer.produce(partition.topic, partition.partition, batch)
                    failpoint("unit.between_batches")
                failpoint("unit.after_produce")
                await self._producer.send_offsets(offsets, self._consumer.group_metadata())
                failpoint("unit.before_end_transaction")
                unit.is_ending = True
                await self._producer.end_transaction(True)
                failpoint("unit.after_end_transaction")
            finally:
                self._measures.transaction_ended()

    def _committed(self, unit: UnitOfWork, offsets: dict[TopicPartition, int]) -> None:
        self._stores.apply(unit.changes)
        failpoint("unit.after_state")
        for at, parked in unit.parked.items():
            self._inputs[at].parked.add(parked)
        for at, offset in offsets.items():
            self._inputs[at].committed = offset
            self._watermarks.note(self.component.group, self._topics[at.topic], at.partition, offset)
        self._careful = max(0, self._careful - unit.records)
        for key in [key for key in self._refused if key[2] < self._inputs[key[:2]].position]:
            del self._refused[key]
        self._backoff.reset()
        self._is_rejoining = False
        self._last_commit = self._env.monotonic()
        self._measures.committed(unit.records)
        self._measures.parked(self._parked_counts())

    def _parked_counts(self) -> dict[str, int]:
        return {f"{topic}-{number}": len(held.parked.keys) for (topic, number), held in self._inputs.items()}

    def _suspect(self, unit: UnitOfWork, error: AbortTransaction) -> None:
        """The broker refused what was in a unit: find the record that it came from, one by one, and park that."""
        if error.code not in _REFUSED_DATA or unit.last is None:
            return
        if unit.records > 1:
            self._careful = unit.records
            return
        record = unit.last
        held = self._inputs.get((record.topic, record.partition))
        if unit.parked and held is not None:
            self._stop(record, held, f"offset {record.offset} cannot be parked: {error}", error)
            return
        self._careful = 1
        self._refused[record.topic, record.partition, record.offset] = error

    def _need(self, why: str, *, abort: bool = False, rebuild: bool = False, level: int = logging.WARNING) -> None:
        """Ask for a recovery before anything else is done."""
        log.log(level, "%s goes back to its committed offsets: %s", self.identity, why)
        before = self._recovery or _Recovery()
        self._recovery = _Recovery(abort or before.abort, rebuild or before.rebuild)

    async def _recover(self, recovery: _Recovery) -> None:
        """End what is open, and go back to the committed offsets of every partition that is ours."""
        await self._wait("before it goes on", logging.DEBUG)  # Why was said when it was needed.
        try:
            failpoint("unit.before_recovery")
            if recovery.abort:
                await self._producer.abort()
            failpoint("unit.after_abort")
            recovery = self._recovery = _Recovery(False, recovery.rebuild)
            before = dict(self._inputs)
            partitions = sorted(TopicPartition(*at) for at in before)
            taken = await take_over(self._kafka, self.component, partitions, self._watermarks, restore=recovery.rebuild)
            # The group may have moved partitions meanwhile: those were set right when they were assigned.
            offsets = {at: offset for at, offset in taken.starts.items() if self._inputs.get(at) is before[at]}
            if offsets and not await self._steer(self._consumer.seek(offsets)):
                return
        except _WAIT as error:
            log.warning("%s cannot recover yet: %s", self.identity, error)
            await self._poll(0)
            self._pending.clear()
            return
        async with self._turn:
            self._pending.clear()
            self._ends.clear()
            self._topics.update(taken.topics)
            self._unit = UnitOfWork(self._partition_counts, self._env.wall_ms())
            mine = {at: before[at] for at in offsets if self._inputs.get(at) is before[at]}
            for at, held in mine.items():
                held.position = held.committed = taken.offsets[at]
                if at in taken.stopped and not held.stopped:
                    self._hold(at, held, taken.stopped[at])
                held.parked = taken.parked.get(at, held.parked)
            for (store, partition), table in taken.tables.items():
                if (self.component.inputs[0], partition) in mine:
                    self._stores.replace(store, partition, table)
            if self._recovery is recovery:
                self._recovery = None
        failpoint("unit.after_recovery")

    # --- Partitions come and go (client.consumer.ConsumerEvents) ---

    async def on_assigned(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        """Take over partitions; returns where to start reading. Nothing of them is delivered before this is done."""
        failpoint("consume.before_assign")
        while True:
            try:
                taken = await take_over(self._kafka, self.component, partitions, self._watermarks, restore=True)
                break
            except _WAIT as error:
                if self._draining.is_set():
                    raise
                await self._wait(f"taking over {len(partitions)} partitions: {error}")
        async with self._turn:
            self._is_gap_possible |= not self._gone_in_poll.isdisjoint(partitions)
            self._topics.update(taken.topics)
            for at in partitions:
                offset = taken.offsets[at]
                held = self._inputs[at] = _Input(offset, offset, taken.parked.get(at, ParkedKeys()))
                if at in taken.stopped:
                    self._hold(at, held, taken.stopped[at])
            for (store, partition), table in taken.tables.items():
                self._stores.replace(store, partition, table)
            self._measures.stopped(sum(1 for item in self._inputs.values() if item.stopped))
            self._measures.parked(self._parked_counts())
        failpoint("consume.after_assign")
        log.info("%s took over %s", self.identity, ", ".join(f"{at}@{taken.offsets[at]}" for at in partitions))
        return taken.starts

    def _hold(self, at: TopicPartition, held: _Input, why: str) -> None:
        """Do not work on a partition whose log does not have what comes next."""
        held.stopped = why
        self._to_pause.add(at)
        log.error("%s stops reading %s: %s", self.component.name, at, why)

    async def on_revoked(self, partitions: Sequence[TopicPartition]) -> None:
        """Give partitions back: commit what is in hand while the group still knows us, then forget them."""
        async with self._turn:
            failpoint("consume.before_revoke")
            if not self._closed:
                await self._commit()
            failpoint("consume.after_revoke")
            self._forget(partitions)
        log.info("%s gave back %s", self.identity, ", ".join(map(str, partitions)))

    async def on_lost(self, partitions: Sequence[TopicPartition]) -> None:
        """Partitions are already someone else's: throw away what is in hand."""
        async with self._turn:
            if self._unit.records:
                self._unit = UnitOfWork(self._partition_counts, self._env.wall_ms())
                self._need("partitions were lost with work in hand")
            self._forget(partitions)
        log.warning("%s lost %s", self.identity, ", ".join(map(str, partitions)))

    def _forget(self, partitions: Sequence[TopicPartition]) -> None:
        gone = set(partitions)
        self._gone_in_poll |= gone
        self._pending = deque(record for record in self._pending if (record.topic, record.partition) not in gone)
        self._stores.drop(at.partition for at in partitions)
        self._refused = {key: error for key, error in self._refused.items() if key[:2] not in gone}
        for at in partitions:
            self._inputs.pop(at, None)
            self._ends.pop(at, None)
            self._to_pause.discard(at)
            self._measures.forget(at)

    # --- Lag ---

    async def _watch_lag(self) -> None:
        """Measure every few seconds how many offsets of our partitions are not worked on yet."""
        while True:
            partitions = sorted(TopicPartition(*at) for at in self._inputs)
            if partitions:
                with suppress(*_WAIT, SemelError):
                    ends = await self._kafka.admin.list_offsets(partitions, at="high_watermark")
                    for at in partitions:
                        held = self._inputs.get(at)
                        if held is not None:
                            self._measures.lag(at, max(0, ends[at] - held.committed))
            await asyncio.sleep(LAG_SECONDS)

"""The read-process-write loop of one component in one worker.

Records are worked on first, with nothing open at the broker; then one Kafka transaction takes the outputs, the
changelog records and the position in the input; only when Kafka answered "committed" does local state change. A
transaction that was aborted, or whose end nobody knows, is thrown away with everything it would have changed, and the
committed offsets say where to go on.

While one unit of work is on its way to Kafka (`_Flight`), the next one is read, handled and encoded in memory, over
what is committed and what the first one changes. Nothing of it is sent before the first one landed. When that failed,
both are thrown away.

Whatever moves the consumer (rebalances, seeks) and whatever touches the unit of work take turns through one lock; the
flight itself needs no turn. `seek` and `pause` are called outside of it: the consumer's thread may be waiting in
`on_revoked` for the lock.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from semel.client.cluster import Backoff
from semel.disk import disk
from semel.env import Env, comes
from semel.errors import (
    AbortTransaction,
    ConfigurationError,
    Fatal,
    Fenced,
    SemelError,
)
from semel.failpoints import failpoint
from semel.processing.blame import WAIT
from semel.processing.component import Component
from semel.processing.handling import Handling
from semel.processing.identity import instance_id, transactional_id
from semel.processing.inputs import Input, Inputs
from semel.processing.limits import (
    IDLE_COMMIT_SECONDS,
    PARK_LOOK_SECONDS,
    POLL_PAUSE_SECONDS,
    POLL_RECORDS_MAX,
    POLL_RECORDS_SLOW,
    RELEASE_RECORDS_MAX,
)
from semel.processing.measures import Measures
from semel.processing.metrics import Metrics
from semel.processing.overdue import Overdue
from semel.processing.pace import FixedPace, LatencyPace, Pace
from semel.processing.parking import ParkedKeys
from semel.processing.release import Releases
from semel.processing.repeats import YIELD_INSTEAD, handlers_repeat
from semel.processing.restore import Taken, take_over
from semel.processing.seams import BatchSeam, Kafka, RealKafka
from semel.processing.stores import Stores
from semel.processing.tables import Tables
from semel.processing.unit import UnitOfWork
from semel.processing.watermarks import Watermarks
from semel.settings import Settings
from semel.types import GroupMetadata, TopicPartition

__all__ = ["Engine"]

log = logging.getLogger("semel.engine")

IDLE_POLL_SECONDS = 0.5
BACKOFF_SECONDS = (0.05, 5.0)
OWNER_SECONDS = 5.0
"""How long an engine that fails may ask whether it has a successor."""
LAG_SECONDS = 5.0
OVERLAP_POLL_SECONDS = 0.01
"""While a transaction is on its way and nothing is there to work on, the consumer is asked this often."""


@dataclass(slots=True)
class _Recovery:
    """What has to be put in order before the loop goes on."""

    abort: bool = False
    """The producer has a transaction that must end."""
    rebuild: bool = False
    """Local state may lack a transaction that was committed after all."""


@dataclass(frozen=True, slots=True)
class _Flight:
    """One unit of work on its way to Kafka."""

    unit: UnitOfWork
    offsets: dict[TopicPartition, int]
    task: asyncio.Task[SemelError | None]
    """Gives what went wrong; None when the transaction is committed."""
    launched: float


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
        tables: Tables | None = None,
        overdue: Overdue | None = None,
    ) -> None:
        self.component = component
        self.identity = transactional_id(component.app, component.name, instance_id(settings, env), slot)
        self._settings = settings
        self._env = env
        self._kafka = kafka or RealKafka(bootstrap, settings, env, client_id=self.identity)
        self._producer = (
            self._kafka.producer(self.identity)
            if component.delivery == "exactly-once"
            else self._kafka.plain_producer(self.identity, component.delivery)
        )
        self._consumer = self._kafka.consumer(component.group, component.inputs, self.identity, self)
        self._pace: Pace = (
            FixedPace(settings.commit_interval_ms / 1000)
            if component.latency is None
            else LatencyPace(component.latency)
        )
        self._measures = Measures(metrics, component.name)
        self._measures.pace(self._pace)
        self._turn = asyncio.Lock()
        self._draining = asyncio.Event()
        self._closed = False
        self._backoff = Backoff(env, *BACKOFF_SECONDS)
        self._stores = Stores(lambda: (disk.boot_id(), env.boot_seconds()), tables, component.state_options)
        self._inputs = Inputs(component.name, self._measures)
        self._handling = Handling(
            component,
            self._kafka,
            env,
            self._inputs,
            self._stores,
            build=settings.build,
            may_work=lambda: self._recovery is None,
            may_commit=lambda: not self._is_flying,
            later=self._need,
            overdue=overdue,
        )
        self._unit = self._handling.new_unit()
        self._flight: _Flight | None = None
        self._releases = Releases(self._kafka, component, settings, env)
        self._release_backoff = Backoff(env, *BACKOFF_SECONDS)
        self._release_at = 0.0
        self._last_end = 0.0
        self._watermarks = watermarks or Watermarks()
        self._topics: dict[str, str] = {}
        self._recovery: _Recovery | None = None
        self._failure: SemelError | None = None
        self._gone_in_poll: set[TopicPartition] = set()
        self._is_gap_possible = False
        self._is_rejoining = False
        self._last_commit = self._last_poll = env.monotonic()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "recovering" if self._recovery else f"{len(self._inputs)} partitions"
        return f"<Engine {self.identity} [{state}] {self._unit!r}>"

    @property
    def stopped(self) -> set[TopicPartition]:
        """Partitions that are not worked on any more until a person has looked."""
        return {TopicPartition(*at) for at, held in self._inputs.items() if held.stopped}

    # --- Life ---

    async def run(self) -> None:
        """Work until `drain` is called. Raises `Fenced` or `Fatal`; a broker that is away is waited for."""
        watches: list[asyncio.Task[None]] = []
        if self.component.delivery == "exactly-once":
            handlers_repeat(self.component.name, YIELD_INSTEAD)
        try:
            await self._insist(self._kafka.start, "connecting to Kafka")
            failpoint("engine.before_identity")
            await self._insist(self._producer.init_transactions, f"taking over {self.identity}")
            failpoint("engine.after_identity")
            await self._insist(self._consumer.start, f"joining group {self.component.group}")
            watches.append(asyncio.create_task(self._watch_lag(), name=f"lag {self.identity}"))
            watches.append(asyncio.create_task(self._watch_parks(), name=f"park {self.identity}"))
            while not self._draining.is_set():
                await self._step()
        except asyncio.CancelledError:
            if self._flight is not None:
                self._flight.task.cancel()
            raise
        except Fenced as error:
            raise self._explain(error) from error
        except Fatal as error:
            try:
                await self._blame_successor()
            except Fenced as fenced:
                raise self._explain(fenced) from error
            raise
        finally:
            for watch in watches:
                watch.cancel()
            await self._close()

    async def drain(self) -> None:
        """Finish the unit of work in hand, commit it, and let `run` return."""
        self._draining.set()

    async def _close(self) -> None:
        with suppress(asyncio.CancelledError):  # The flight's: it was interrupted, which the recovery remembers.
            async with self._turn:
                await self._land()
        self._closed = self._closed or self._recovery is not None
        with suppress(*WAIT, SemelError):
            await self._consumer.close()
        self._closed = True
        self._stores.close()
        if self._recovery is not None and self._recovery.abort:
            with suppress(*WAIT, SemelError):
                await self._producer.abort()
        with suppress(*WAIT, SemelError):
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
            except WAIT as error:
                await self._wait(f"{what}: {error}")

    async def _wait(self, why: str, level: int = logging.WARNING) -> None:
        """Back off for a while; a drain ends it."""
        seconds = self._backoff.next()
        log.log(level, "%s waits %.2f s: %s", self.identity, seconds, why)
        await comes(self._draining, seconds)

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
        except (*WAIT, SemelError):
            return

    # --- One unit of work ---

    async def _step(self) -> None:
        """Poll, work, commit: once, or repair what went wrong."""
        if self._failure is not None:
            raise self._failure
        if self._recovery is not None:
            async with self._turn:
                await self._land()
            await self._recover(self._recovery)
            return
        to_pause = self._inputs.to_pause()
        if to_pause:
            await self._steer(self._consumer.pause(to_pause))
        to_resume = self._inputs.to_resume()
        if to_resume:
            await self._steer(self._consumer.resume(to_resume))
        if not await self._release():
            return
        idle = self._handling.idle_seconds(IDLE_POLL_SECONDS)
        if idle:
            batch = await self._poll(0 if self._is_flying else idle)
        elif self._env.monotonic() - self._last_poll > POLL_PAUSE_SECONDS:
            batch = await self._poll(0, POLL_RECORDS_SLOW)
        while await self._work():
            batch = await self._poll(0)
            if batch is None:
                break
            if self._is_flying and self._unit.records:
                failpoint("unit.under_way")
            if not batch.records:
                if not await self._may_wait():
                    break
                await self._poll(0)  # What came meanwhile belongs to this unit, also when its time is over.
        async with self._turn:
            await self._land()
            if not (self._handling.pending or self._handling.has_waiting) and self._recovery is None:
                self._inputs.pass_ends()
            self._launch()
            self._stores.write_due()

    async def _may_wait(self) -> bool:
        """Nothing is there to work on. Wait a moment if the unit may take more of what comes; whether that was so.

        It may while another one is on its way, and where a latency is stated as long as that allows.
        """
        if self._flight is not None and not self._flight.task.done():
            await asyncio.wait({self._flight.task}, timeout=OVERLAP_POLL_SECONDS)
            return True
        left = self._deadline() - self._env.monotonic()
        if self._pace.objective is None or not self._unit.records or left <= 0 or self._draining.is_set():
            return False
        await comes(self._draining, min(left, OVERLAP_POLL_SECONDS))
        return True

    def _deadline(self) -> float:
        """When the unit has gathered long enough."""
        arrived = self._unit.arrived
        return (self._env.monotonic() if arrived is None else arrived) + self._pace.interval

    async def _poll(self, timeout: float, max_records: int = POLL_RECORDS_MAX) -> BatchSeam | None:
        """Take what the consumer has; None when Kafka is away."""
        self._gone_in_poll.clear()
        failpoint("consume.before_poll")
        try:
            batch = await self._consumer.poll(max_records, timeout)
            self._last_poll = self._env.monotonic()
        except WAIT as error:
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
            if batch.records and self._unit.arrived is None:
                self._unit.arrived = self._last_poll
            self._handling.pending.extend(batch.records)
            self._inputs.reached(batch.end_offsets)
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
        async with self._turn:
            await self._land()
        if self._is_rejoining or isinstance(error, ConfigurationError):
            raise error
        await self._blame_successor()
        self._is_rejoining = True
        log.error("%s joins its group anew: %s", self.identity, error)
        with suppress(*WAIT, SemelError):
            await self._consumer.close()
        await self.on_lost(self._inputs.partitions())
        self._consumer = self._kafka.consumer(self.component.group, self.component.inputs, self.identity, self)
        await self._insist(self._consumer.start, f"joining group {self.component.group} anew")

    async def _work(self) -> bool:
        """Work on what was polled; whether the unit may take more."""
        async with self._turn:
            before, began = self._unit.records, self._env.monotonic()
            may_take_more = await self._handling.work(self._unit, self._deadline(), self._pace.records)
            self._pace.handled(self._unit.records - before, self._env.monotonic() - began)
            return may_take_more

    # --- Parked records ---

    async def _release(self) -> bool:
        """Do what is asked for about parked records; False when something has to be put in order first.

        Nothing else is in hand when this is called, and what is on its way has landed before anything is read.
        """
        if self._env.monotonic() < self._release_at or not any(held.is_asked for held in self._inputs.values()):
            return True
        async with self._turn:
            await self._land()
        for at, held in list(self._inputs.items()):
            if self._recovery is not None or not held.is_asked:
                continue
            partition = TopicPartition(*at)
            try:
                await self._release_some(partition, held)
                self._release_backoff.reset()
            except (*WAIT, Fatal) as error:
                self._release_at = self._env.monotonic() + self._release_backoff.next()
                log.warning("%s releases nothing of %s now: %s", self.identity, partition, error)
                break
        return self._recovery is None

    async def _release_some(self, at: TopicPartition, held: Input) -> None:
        """One unit of work, as large as fits. What cannot be done now leaves everything as it is."""
        limit = 1 if self._handling.is_careful else RELEASE_RECORDS_MAX
        job = await self._releases.next_job(at, held.park_log, limit)
        if job is None:
            held.is_asked = False
            return
        async with self._turn:
            if self._inputs.get(at) is not held or self._recovery is not None:
                return
            failpoint("release.asked")
            # In a unit of its own: a half of it must not be committed by whoever takes the partition from us.
            unit = self._handling.new_unit()
            await self._releases.perform(job, at, unit, self._handling.replay)
            failpoint("release.handled")
            self._unit = unit
            self._launch()
            await self._land()
            if self._recovery is not None or not held.is_full:
                return
            self._inputs.go_on(at)
        await self._steer(self._consumer.seek({at: held.position}))

    # --- The transaction ---

    @property
    def _is_flying(self) -> bool:
        return self._flight is not None and not self._flight.task.done()

    def _launch(self) -> None:
        """Send the unit of work on its way; the caller has the turn, and the one before has landed."""
        assert self._flight is None, "two transactions at once"
        unit = self._unit
        has_work = bool(unit.records or unit.parked)
        if self._recovery is not None and not has_work:
            return
        # A partition whose parked records are released has its position in the transaction too: it is the fence.
        moved = self._inputs.moved(also=unit.parked)
        idle = self._env.monotonic() - self._last_commit < IDLE_COMMIT_SECONDS
        if not moved or (not has_work and idle):
            return
        self._unit = self._handling.new_unit()
        try:
            # As the member that we are now: what the group gave us after that is not what this unit was worked on as.
            group = self._consumer.group_metadata()
        except SemelError as error:
            self._need(f"its group does not know it: {error}")
            return
        self._unit.beneath = unit
        now = self._env.monotonic()
        if self._handling.pending:
            self._unit.arrived = now
        task = asyncio.create_task(self._fly(unit, moved, group), name=f"transaction {self.identity}")
        self._flight = _Flight(unit, moved, task, now)

    async def _fly(
        self, unit: UnitOfWork, offsets: dict[TopicPartition, int], group: GroupMetadata
    ) -> SemelError | None:
        """Make a unit of work real. What fails here is repaired by `_recover`; until then nothing more is worked on."""
        try:
            await self._transact(unit, offsets, group)
        except (Fenced, Fatal) as error:
            self._failure = error
            self._need(f"it cannot go on: {error}")
            return error
        except AbortTransaction as error:
            self._measures.transaction("aborted")
            self._need(f"a transaction was aborted: {error}", abort=True)
            return error
        except SemelError as error:
            self._measures.transaction("unknown")
            self._need(f"the end of a transaction is unknown: {error}", abort=True, rebuild=True)
            return error
        except BaseException:
            self._need("a transaction was interrupted", abort=True, rebuild=True)
            raise
        self._last_end = self._env.monotonic()
        return None

    async def _land(self) -> None:
        """Wait for the unit of work that is on its way; the caller has the turn.

        If it is real, local state changes. If it is not, the unit that was begun over it is thrown away, too.
        """
        flight = self._flight
        if flight is None:
            return
        self._flight = None
        try:
            error = await flight.task
        except BaseException:
            self._unit = self._handling.new_unit()
            raise
        failpoint("unit.before_landing")
        if error is None:
            self._unit.beneath = None
            self._committed(flight.unit, flight.offsets)
            if flight.unit.arrived is not None:
                self._pace.landed(self._last_end - flight.launched, self._last_end - flight.unit.arrived)
            return
        self._unit = self._handling.new_unit()
        if isinstance(error, AbortTransaction):
            self._handling.suspect(flight.unit, error)

    async def _transact(self, unit: UnitOfWork, offsets: dict[TopicPartition, int], group: GroupMetadata) -> None:
        with unit.told(self.component.name, self.identity, is_atomic=self.component.delivery == "exactly-once"):
            failpoint("unit.before_produce")
            if self.component.delivery == "exactly-once":  # Only then its commit proves that nobody else has written.
                unit.began = self._env.boot_seconds()
            self._producer.begin()
            self._measures.transaction_began(self._env.monotonic)
            try:
                for partition, batch in unit.seal(self.component.changelogs):
                    await self._producer.produce(partition.topic, partition.partition, batch)
                    failpoint("unit.between_batches")
                failpoint("unit.after_produce")
                await self._producer.send_offsets(offsets, group)
                failpoint("unit.before_end_transaction")
                unit.is_ending = True
                await self._producer.end_transaction(True)
                unit.ends = self._producer.written
                failpoint("unit.after_end_transaction")
            finally:
                self._measures.transaction_ended()

    def _committed(self, unit: UnitOfWork, offsets: dict[TopicPartition, int]) -> None:
        self._stores.apply(unit.changes, unit.written(self.component.changelogs), unit.began)
        failpoint("unit.after_state")
        if self._stores.trouble:
            self._need(self._stores.trouble)
        for at, parked in unit.parked.items():
            self._inputs[at].parked.add(parked)
        for at, offset in offsets.items():
            self._inputs[at].committed = offset
            self._watermarks.note(self.component.group, self._topics[at.topic], at.partition, offset)
        self._handling.committed(unit)
        self._backoff.reset()
        self._is_rejoining = False
        self._last_commit = self._env.monotonic()
        self._measures.committed(unit.records)
        self._inputs.measure()

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
            partitions = self._inputs.partitions()
            restore = recovery.rebuild or bool(self._stores.trouble)
            taken = await self._take_over(partitions, restore=restore)
            # The group may have moved partitions meanwhile: those were set right when they were assigned.
            offsets = {at: offset for at, offset in taken.starts.items() if self._inputs.get(at) is before[at]}
            if offsets and not await self._steer(self._consumer.seek(offsets)):
                return
        except WAIT as error:
            log.warning("%s cannot recover yet: %s", self.identity, error)
            await self._poll(0)
            self._handling.clear()
            return
        async with self._turn:
            self._handling.clear()
            self._inputs.forget_ends()
            self._topics.update(taken.topics)
            self._unit = self._handling.new_unit()
            mine = {at: before[at] for at in offsets if self._inputs.get(at) is before[at]}
            for at, held in mine.items():
                held.position = held.committed = taken.offsets[at]
                if at in taken.stopped and not held.stopped:
                    self._inputs.stop(at, taken.stopped[at])
                if at in taken.parked:
                    held.park_log, held.parked = taken.parked[at], ParkedKeys(*taken.parked[at].counts())
                    held.is_asked = self._releases.may_be_asked(held.park_log)
            if self._recovery is recovery:
                self._recovery = None
        failpoint("unit.after_recovery")

    async def _take_over(self, partitions: Sequence[TopicPartition], *, restore: bool) -> Taken:
        return await take_over(
            self._kafka, self.component, partitions, self._watermarks, self._stores, self._measures, restore=restore
        )

    # --- Partitions come and go (client.consumer.ConsumerEvents) ---

    async def on_assigned(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        """Take over partitions; returns where to start reading. Nothing of them is delivered before this is done."""
        failpoint("consume.before_assign")
        while True:
            try:
                taken = await self._take_over(partitions, restore=True)
                break
            except WAIT as error:
                if self._draining.is_set():
                    raise
                await self._wait(f"taking over {len(partitions)} partitions: {error}")
        async with self._turn:
            self._is_gap_possible |= not self._gone_in_poll.isdisjoint(partitions)
            self._topics.update(taken.topics)
            for at in partitions:
                offset = taken.offsets[at]
                held = self._inputs[at] = Input(offset, offset, taken.parked[at])
                held.is_asked = self._releases.may_be_asked(held.park_log)
                if at in taken.stopped:
                    self._inputs.stop(at, taken.stopped[at])
            self._inputs.measure()
        failpoint("consume.after_assign")
        log.info("%s took over %s", self.identity, ", ".join(f"{at}@{taken.offsets[at]}" for at in partitions))
        return taken.starts

    async def on_revoked(self, partitions: Sequence[TopicPartition]) -> None:
        """Give partitions back: commit what is in hand while the group still knows us, then forget them."""
        async with self._turn:
            failpoint("consume.before_revoke")
            await self._land()
            if not self._closed:
                self._launch()
                await self._land()
            failpoint("consume.after_revoke")
            self._forget(partitions)
        log.info("%s gave back %s", self.identity, ", ".join(map(str, partitions)))

    async def on_lost(self, partitions: Sequence[TopicPartition]) -> None:
        """Partitions are already someone else's: throw away what is in hand."""
        async with self._turn:
            await self._land()
            if self._unit.records:
                self._unit = self._handling.new_unit()
                self._need("partitions were lost with work in hand")
            self._forget(partitions)
        log.warning("%s lost %s", self.identity, ", ".join(map(str, partitions)))

    def _forget(self, partitions: Sequence[TopicPartition]) -> None:
        gone = set(partitions)
        self._gone_in_poll |= gone
        self._handling.forget(gone)
        self._stores.drop(at.partition for at in partitions)
        self._inputs.forget(partitions)

    # --- Lag and commands ---

    async def _watch_parks(self) -> None:
        """Look every second whether something new stands beside what is parked: it may be a command."""
        while True:
            await asyncio.sleep(PARK_LOOK_SECONDS)
            waiting = {TopicPartition(*at): held.park_log for at, held in self._inputs.items() if held.parked.records}
            with suppress(*WAIT, SemelError):
                for at in await self._releases.moved(waiting) if waiting else ():
                    if at in self._inputs:
                        self._inputs[at].is_asked = True

    async def _check_topic(self, topic: str) -> None:
        """A topic that was deleted and made again has other records at our offsets: taking over anew tells."""
        identity = await self._kafka.topic_identity(topic)
        async with self._turn:
            if self._topics.get(topic, identity) != identity:
                await self._land()
                self._unit = self._handling.new_unit()
                self._need(f"topic {topic} is {identity} now, and was {self._topics[topic]}", level=logging.ERROR)

    async def _watch_lag(self) -> None:
        """Measure every few seconds how many offsets of our partitions are not worked on yet."""
        while True:
            partitions = self._inputs.partitions()
            if partitions:
                with suppress(*WAIT, SemelError):
                    for topic in {at.topic for at in partitions}:
                        await self._check_topic(topic)
                    ends = await self._kafka.admin.list_offsets(partitions, at="high_watermark")
                    for at in partitions:
                        held = self._inputs.get(at)
                        if held is not None:
                            self._measures.lag(at, max(0, ends[at] - held.committed))
            await asyncio.sleep(LAG_SECONDS)

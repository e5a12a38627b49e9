"""The loop of one sink in one worker: take over partitions, poll, apply, go on.

The position in the target is the truth; what the consumer has fetched is only a convenience. So every failure is
handled in one way: drop what was fetched, and when the target works again go on from its positions. While it does not,
the partitions are paused and polling goes on, so that the group keeps us.

In a backlog the next batch is polled and decoded while the database works. Two rules keep that apart from everything
else: partitions come and go only between two batches (`_hand`), and whatever a poll ahead brought is worked off before
anything is tended, which alone lets a partition flow again that failed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, TypeVar
from uuid import UUID

from semel.client.cluster import Backoff
from semel.databases.spec import CacheSpec, SearchSpec
from semel.env import Env, comes
from semel.errors import ConfigurationError, Fatal, OutcomeUnknown, Retriable, SemelError
from semel.failpoints import failpoint
from semel.processing.identity import instance_id, transactional_id
from semel.processing.limits import PARK_LOOK_SECONDS
from semel.processing.metrics import Metrics
from semel.processing.parklog import ParkPolicy
from semel.processing.repeats import handlers_repeat
from semel.settings import Settings
from semel.sinks.contract import (
    Applied,
    Claim,
    PartitionsLost,
    PartitionsStopped,
    Sink,
    Slice,
    Stop,
    StopReason,
    Unavailable,
)
from semel.sinks.cutting import Cut, cut
from semel.sinks.dedup import Inbox, check_window
from semel.sinks.measures import Measures
from semel.sinks.source import Bounds, RealSource, Source, SourceConsumer
from semel.sinks.spec import SinkHandler, SinkSpec
from semel.sinks.sql import SqlSink
from semel.types import TopicPartition

__all__ = ["SinkEngine"]

log = logging.getLogger("semel.sinks")

_INSTEAD = (
    "Write with what the handler is given, and send with enqueue_in(db, record): that is done together with the "
    "position of what it was given to read."
)

P = ParamSpec("P")
T = TypeVar("T")

POLL_SECONDS = 0.5
BACKOFF_SECONDS = (0.05, 10.0)
TELL_SECONDS = 10.0
IDLE_MOVE_SECONDS = 1.0
"""A position that only moves past markers is written when nothing else came for so long."""
STOPPED_RETRY_SECONDS = 30.0
"""How often a stopped partition is looked at again: a person may have mended what stopped it."""
LAG_SECONDS = 5.0

_KAFKA_AWAY = (Retriable, OutcomeUnknown, ConnectionError, TimeoutError)


@dataclass(slots=True)
class _Partition:
    """A partition that the group gave us. `mine`: its fence is raised, and we may apply."""

    mine: bool = False
    topic_id: UUID | None = None
    """The topic that we took it over from."""
    retry_at: float = 0.0
    """When to try again to take it over."""
    stop: Stop | None = None
    is_stale: bool = False
    """What the consumer fetched does not follow on our position: seek first."""
    is_paused: bool = False


class SinkEngine:
    """Runs one sink until it is drained. `slot` numbers the workers of one host, from 0.

    `run` raises `Fenced` when another process joined the group as us, and `ConfigurationError` when the database
    cannot work as it is set up. `source` and `make_sink` stand in for Kafka and the database in tests; `executor` runs
    the sink's calls one at a time, by default in a thread of its own.
    """

    def __init__(
        self,
        app: str,
        spec: SinkSpec,
        bootstrap: str,
        settings: Settings,
        env: Env,
        metrics: Metrics,
        *,
        slot: int = 0,
        source: Source | None = None,
        make_sink: Callable[[str], Sink] | None = None,
        executor: Executor | None = None,
    ) -> None:
        spec = self._spec = replace(spec, handler=self._told(spec.handler))
        self.group = spec.identity(app)
        member = transactional_id(app, spec.name, instance_id(settings, env), slot)
        self._source = source or RealSource(
            bootstrap, settings, env, group=self.group, topic=spec.topic.name, member=member
        )
        self._make_sink = make_sink or (
            lambda cluster_id: _sink_of(spec, self.group, cluster_id, settings, env, member)
        )
        self._env = env
        self._fence_seconds = 2 * settings.session_timeout_ms / 1000
        self._measures = Measures(metrics, spec.name)
        self._thread = executor or ThreadPoolExecutor(1, thread_name_prefix=f"semel sink {self.group}")
        self._draining = asyncio.Event()
        self._partitions: dict[TopicPartition, _Partition] = {}
        self._ends: dict[TopicPartition, int] = {}
        self._outage = "not connected to Kafka and the database yet"
        self._told_at: float | None = None
        """When it was last told what we wait for; None when we do not wait."""
        self._probe_at = 0.0
        self._park_look_at = 0.0
        self._backoff = Backoff(env, *BACKOFF_SECONDS)
        self._applied_at = env.monotonic()
        self._was_full = False
        """The last batch was as large as one may be: the next one is not waited for."""
        self._hand = asyncio.Lock()
        """Held while a batch is worked off."""
        self._begun = asyncio.Event()
        """The handler has a part of the batch in hand."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_rejoining = False
        self._has_moved = False
        self._sink: Sink
        self._consumer: SourceConsumer

    def __repr__(self) -> str:
        mine = sum(partition.mine for partition in self._partitions.values())
        state = self._outage or f"{mine} of {len(self._partitions)} partitions"
        return f"<SinkEngine {self.group} [{state}]>"

    @property
    def problems(self) -> list[str]:
        """Why the sink does not do all of its work now; empty when it does."""
        stops = [f"{at}: {item.stop}" for at, item in sorted(self._partitions.items()) if item.stop is not None]
        return ([self._outage] if self._outage else []) + stops

    # --- Life ---

    async def run(self) -> None:
        """Apply records until `drain` is called. Kafka and the database may be away at any time."""
        lag: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        try:
            if not await self._insist(self._source.start, "Kafka is away"):
                return
            if not await self._insist(self._check_window, "Kafka is away"):
                return
            self._sink = self._make_sink(self._source.cluster_id)
            if not await self._insist(lambda: self._call(self._sink.open), "the database is away"):
                return
            self._recovered()
            await self._join()
            lag = asyncio.create_task(self._watch(), name=f"lag {self.group}")
            while not self._draining.is_set():
                await self._step()
            await self._move_past_markers()
        finally:
            if lag is not None:
                lag.cancel()
            await self._close()

    async def _check_window(self) -> None:
        """Raise `ConfigurationError` when ids are kept for a shorter time than a message may come again in."""
        inbox, topic = self._spec.dedup, self._spec.topic.name
        if not isinstance(inbox, Inbox):
            return
        retention_ms = await self._source.retention_ms()
        if retention_ms is None:
            log.warning("%s may not see the settings of topic %s: that its window is long enough is not checked. "
                        "Grant DESCRIBE_CONFIGS on the topic.", self.group, topic)  # fmt: skip
            return
        check_window(inbox, self.group, topic, retention_ms)

    async def drain(self) -> None:
        """Finish the transaction in hand and let `run` return."""
        self._draining.set()

    async def _join(self) -> None:
        self._consumer = self._source.consumer(self)
        await self._consumer.start()

    async def _close(self) -> None:
        if hasattr(self, "_consumer"):
            with suppress(SemelError):
                await self._consumer.close()
        if hasattr(self, "_sink"):
            await self._call(self._sink.close)
        self._thread.shutdown(wait=False)
        with suppress(SemelError):
            await self._source.close()

    async def _insist(self, call: Callable[[], Awaitable[None]], what: str) -> bool:
        """Repeat a call until it succeeds; False when we drain first."""
        while not self._draining.is_set():
            try:
                await call()
                self._told_at = None
                return True
            except _KAFKA_AWAY as error:
                wait = self._backoff.next()
                self._outage = f"{what}: {error}"
                self._tell_outage(self._outage, wait)
                await self._pause_for(wait)
        return False

    async def _pause_for(self, seconds: float) -> None:
        """Wait, but not longer than until we drain."""
        if seconds > 0:
            await comes(self._draining, seconds)

    async def _call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a method of the sink in its thread, which alone touches the connection."""

        def call() -> T:
            handlers_repeat(self._spec.name, _INSTEAD)
            return function(*args, **kwargs)

        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    # --- The loop ---

    async def _step(self) -> None:
        """One poll, and the transactions for what it gave; again at once while there is a backlog and nothing else."""
        await self._tend()
        if not self._was_full:
            await self._pause_for(self._applied_at + self._spec.linger_ms / 1000 - self._env.monotonic())
        batch = await self._poll(self._polling())
        self._was_full = False
        while batch is not None:
            self._was_full = batch.total >= self._spec.max_records
            self._begun.clear()
            ahead = asyncio.create_task(self._poll_ahead()) if self._was_full and self._is_calm() else None
            try:
                async with self._hand:
                    await self._work_off(batch)
            except BaseException:
                if ahead is not None:
                    ahead.cancel()
                raise
            self._begun.set()
            batch = None if ahead is None else await self._poll(ahead)

    async def _work_off(self, batch: Cut) -> None:
        for slices in self._transactions(batch):
            if self._outage:
                return
            if slices:
                await self._apply(slices)
        if not batch.total and self._env.monotonic() - self._applied_at >= IDLE_MOVE_SECONDS:
            await self._move_past_markers()

    def _is_calm(self) -> bool:
        """Nothing is to be tended, and nobody wants us to end."""
        is_due = self._env.monotonic() >= self._park_look_at or self._draining.is_set() or bool(self._outage)
        return not is_due and all(item.mine and not item.is_stale for item in self._partitions.values())

    def _told(self, handler: SinkHandler) -> SinkHandler:
        """The handler, which says in the loop that it was called: what comes next is the database's work.

        A poll that begins any earlier would only have this thread wait for the interpreter.
        """

        def told(records: Sequence[Any], target: Any) -> None:
            if self._loop is not None:
                with suppress(RuntimeError):  # It is closed: we are to end, and this transaction may be the last thing.
                    self._loop.call_soon_threadsafe(self._begun.set)
            handler(records, target)

        return told

    async def _poll_ahead(self) -> Cut:
        await self._begun.wait()
        batch, topic = await self._polling(), self._spec.topic
        # A format may ask its schema registry, which only the sink's thread may wait for.
        return batch if topic.bound is not None else batch.decoded(topic.decode_all)

    async def _polling(self) -> Cut:
        batch = await self._consumer.poll(self._spec.max_records, self._poll_seconds())
        return cut(batch.records, batch.end_offsets, self._spec.max_bytes)

    async def _poll(self, polling: Awaitable[Cut]) -> Cut | None:
        """What a poll gives; None for one that failed."""
        try:
            batch = await polling
        except _KAFKA_AWAY as error:
            log.warning("%s cannot poll: %s", self.group, error)
            await self._pause_for(self._backoff.next())
            return None
        except ConfigurationError:
            raise
        except Fatal as error:
            await self._rejoin(error)
            return None
        if self._has_moved:
            self._log_assignment()
        if batch.total:
            failpoint("sink.after_poll")
        return batch

    async def _rejoin(self, error: Fatal) -> None:
        """The consumer is of no further use, as when retention deleted what it was to read next.

        Taking over anew finds out which partition it was, and stops that one only. A second failure before anything
        was applied is not of that kind.
        """
        if self._is_rejoining:
            raise error
        self._is_rejoining = True
        log.error("%s joins its group anew: %s", self.group, error)
        await self._consumer.close()
        self._partitions.clear()
        self._ends.clear()
        await self._join()

    def _poll_seconds(self) -> float:
        """How long a poll may wait: not beyond the next thing to tend."""
        now = self._env.monotonic()
        due = [item.retry_at for item in self._partitions.values() if not item.mine]
        if self._outage:
            due = [self._probe_at]
        elif self._ends:
            due.append(self._applied_at + IDLE_MOVE_SECONDS)
        return max(0.0, min([POLL_SECONDS, *(at - now for at in due)]))

    def _transactions(self, batch: Cut) -> Iterator[list[Slice]]:
        """What may be applied of each transaction when its turn has come; ends without records are kept for later."""
        for slices in batch.transactions[:-1]:
            yield [piece for piece in slices if self._is_current(piece.partition)]
        for at, end in batch.ends.items():
            if self._is_current(at):
                self._ends[at] = end
        for slices in batch.transactions[-1:]:
            ours = [piece for piece in slices if self._is_current(piece.partition)]
            yield [piece._replace(end=max(piece.end, self._ends.pop(piece.partition, 0))) for piece in ours]

    def _is_current(self, at: TopicPartition) -> bool:
        partition = self._partitions.get(at)
        return partition is not None and partition.mine and not partition.is_stale

    async def _move_past_markers(self) -> None:
        """Write positions that moved without records; else retention past a trailing marker looks like lost data."""
        slices = [
            Slice(at, (), end)
            for at, end in self._ends.items()
            if self._is_current(at) and end > (self._sink.position(at) or 0)
        ]
        self._ends.clear()
        if slices and not self._outage:
            await self._apply(slices)

    async def _apply(self, slices: Sequence[Slice]) -> None:
        """Have the slices applied; what cannot be leaves its partition waiting, and the rest goes on."""
        self._applied_at = self._env.monotonic()
        if await self._insist_on(lambda: self._sink.apply(slices), counts=bool(slices)):
            failpoint("sink.after_apply")

    async def _carry_out(self) -> None:
        """What operators asked for about parked records: the sink looks for it now and then, where there are any."""
        now = self._env.monotonic()
        if now < self._park_look_at:
            return
        self._park_look_at = now + PARK_LOOK_SECONDS
        await self._insist_on(self._sink.carry_out, counts=False)
        self._count_parked()

    async def _insist_on(self, call: Callable[[], Applied], *, counts: bool) -> bool:
        """Let the sink do it; False when the target does not work. What it did counts as progress if `counts`."""
        while True:
            try:
                applied = await self._call(call)
            except PartitionsLost as lost:
                self._measures.failed("fenced")
                for at, reason in lost.reasons.items():
                    log.error("%s Nothing more is written for it here.", reason)
                    self._wait_for(at, self._fence_seconds)
                continue
            except PartitionsStopped as stopped:
                self._measures.failed("failed")
                await self._call(self._sink.release, stopped.stops)
                for at, stop in stopped.stops.items():
                    self._stop(at, stop)
                continue
            except Unavailable as error:
                self._measures.failed("failed")
                self._began_outage(error)
                return False
            if counts or applied.transactions:
                self._is_rejoining = False
                self._backoff.reset()
            self._measures.applied(applied)
            if applied.parked:
                self._count_parked()
            return True

    # --- Failures ---

    def _began_outage(self, error: Unavailable) -> None:
        """The target does not work: nothing is applied before a probe succeeds."""
        now = self._env.monotonic()
        if now - self._probe_at > BACKOFF_SECONDS[1]:
            self._backoff.reset()  # It is no longer the last outage.
        wait = self._backoff.next()
        self._probe_at = now + wait
        self._outage = f"the database does not do its work: {error}"
        self._measures.database_up(False)
        for partition in self._partitions.values():
            partition.is_stale = True
        self._ends.clear()
        self._tell_outage(str(error), wait)

    def _tell_outage(self, why: str, wait: float) -> None:
        """Warn once in a while, however often it is tried."""
        now = self._env.monotonic()
        is_due = self._told_at is None or now - self._told_at >= TELL_SECONDS
        if is_due:
            self._told_at = now
        text = "%s waits, nothing is lost: %s. Trying again in %.1f s."
        log.log(logging.WARNING if is_due else logging.DEBUG, text, self.group, why, wait)

    def _recovered(self) -> None:
        log.info("%s: the database answers", self.group)
        self._outage, self._told_at = "", None
        self._measures.database_up(True)

    def _wait_for(self, at: TopicPartition, seconds: float) -> None:
        """Take a partition over again after so long, if the group leaves it with us."""
        partition = self._partitions.get(at)
        if partition is not None:
            partition.mine = False
            partition.retry_at = self._env.monotonic() + seconds
        self._ends.pop(at, None)

    def _stop(self, at: TopicPartition, stop: Stop) -> None:
        self._wait_for(at, STOPPED_RETRY_SECONDS)
        if at in self._partitions:
            if self._partitions[at].stop != stop:
                log.error("%s stops reading %s: %s The other partitions go on.", self.group, at, stop)
            self._partitions[at].stop = stop
        self._count_stopped()

    def _count_stopped(self) -> None:
        self._measures.stopped(sum(item.stop is not None for item in self._partitions.values()))

    async def _tend(self) -> None:
        """Bring partitions and consumer in line with what we know: probe, take over, seek, pause, resume."""
        now = self._env.monotonic()
        if self._outage and now >= self._probe_at:
            self._recovered()
            await self._apply(())
        if not self._outage:
            due = [at for at, item in self._partitions.items() if not item.mine and now >= item.retry_at]
            if due:
                await self._take_later(due)
                self._park_look_at = 0.0  # What stopped because nothing more may be parked has room after a release.
        if not self._outage:
            await self._carry_out()
        if not self._outage:
            await self._go_on()
        await self._hold_back()

    async def _take_later(self, due: Sequence[TopicPartition]) -> None:
        try:
            await self._take(due)
        except Unavailable as error:
            self._began_outage(error)
        except _KAFKA_AWAY as error:
            log.warning("%s cannot take over %s: %s", self.group, _names(due), error)
            for at in due:
                self._wait_for(at, self._backoff.next())

    async def _go_on(self) -> None:
        """Seek where the consumer is elsewhere, and let those partitions flow."""
        stale = {at: item for at, item in self._partitions.items() if item.mine and item.is_stale}
        positions = {at: self._sink.position(at) for at in stale}
        offsets = {at: offset for at, offset in positions.items() if offset is not None}
        if not offsets:
            return
        failpoint("sink.before_seek")
        try:
            await self._consumer.seek(offsets)
            await self._consumer.resume([at for at in offsets if stale[at].is_paused])
        except _KAFKA_AWAY as error:
            log.warning("%s cannot seek: %s", self.group, error)
            return
        for at in offsets:
            stale[at].is_stale = stale[at].is_paused = False

    async def _hold_back(self) -> None:
        """Pause what is not applied now; records of it that came already are dropped, and read again later."""
        idle = [
            at
            for at, item in self._partitions.items()
            if not item.is_paused and (self._outage or not item.mine or item.is_stale)
        ]
        if idle:
            await self._consumer.pause(idle)
            for at in idle:
                self._partitions[at].is_paused = True

    # --- Partitions come and go (client.consumer.ConsumerEvents) ---

    async def on_assigned(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        """Take over partitions; returns where to start. One that cannot be taken over yet starts anywhere: what is
        read of it is dropped, and we seek when it is ours."""
        async with self._hand:
            return await self._take_first(partitions)

    async def _take_first(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        for at in partitions:
            self._partitions[at] = _Partition()
        while True:
            try:
                if not self._outage:
                    try:
                        await self._take(partitions)
                    except Unavailable as error:
                        self._began_outage(error)
                bounds = await self._source.bounds(partitions)
                break
            except _KAFKA_AWAY as error:
                if self._draining.is_set():
                    raise
                log.warning("%s cannot take over %s: %s", self.group, _names(partitions), error)
                await self._pause_for(self._backoff.next())
        offsets: dict[TopicPartition, int] = {}
        for at in partitions:
            position = self._sink.position(at) if self._partitions[at].mine else None
            self._partitions[at].is_stale = position is None
            offsets[at] = bounds[at].end if position is None else position
        self._has_moved = True
        return offsets

    async def on_revoked(self, partitions: list[TopicPartition]) -> None:
        """Give partitions back, when nothing of them is in hand."""
        await self._forget(partitions)

    async def on_lost(self, partitions: list[TopicPartition]) -> None:
        """Partitions are someone else's; the fence in the target keeps us out."""
        log.warning("%s lost %s", self.group, _names(partitions))
        await self._forget(partitions)

    async def _forget(self, partitions: Iterable[TopicPartition]) -> None:
        async with self._hand:
            for at in partitions:
                self._partitions.pop(at, None)
                self._ends.pop(at, None)
            await self._call(self._sink.release, partitions)
            self._count_stopped()
            self._has_moved = True

    def _log_assignment(self) -> None:
        """Said after the poll that brought it, when the generation is known."""
        self._has_moved = False
        with suppress(SemelError):
            generation = self._consumer.group_metadata().generation_id
            log.info("group %s generation %d assigned %s", self.group, generation, _names(self._partitions) or "-")

    async def _take(self, partitions: Sequence[TopicPartition]) -> None:
        """Raise the fences, then read the positions and hold them against the logs."""
        failpoint("sink.before_take_over")
        claims = await self._source.claims(partitions)
        answers = await self._call(self._sink.take_over, claims)
        failpoint("sink.after_fence")
        # Asked only now: the owner before us may have moved the position until its fence was raised.
        bounds = await self._source.bounds(partitions)
        taken = []
        for at, topic_id, *_ in claims:
            answer = answers[at]
            stop = answer if isinstance(answer, Stop) else _misplaced(at, answer, bounds[at])
            if stop is not None:
                await self._call(self._sink.release, [at])
                self._stop(at, stop)
                continue
            partition = self._partitions[at]
            partition.mine = partition.is_stale = True
            partition.stop, partition.topic_id = None, topic_id
            taken.append(f"{at}@{answer}")
        if taken:
            log.info("%s took over %s", self.group, ", ".join(taken))
        self._count_stopped()

    # --- What others see ---

    async def _watch(self) -> None:
        """Every few seconds: measure lag and parked keys, and look whether the topic is still the same one."""
        while True:
            mine = self._count_parked()
            with suppress(*_KAFKA_AWAY, SemelError):
                await self._check_topic(await self._source.claims(mine) if mine else [])
                bounds = await self._source.bounds(mine) if mine else {}
                positions = {at: self._sink.position(at) for at in mine}
                self._measures.lag(
                    {at: max(0, bounds[at].end - offset) for at, offset in positions.items() if offset is not None}
                )
            await asyncio.sleep(LAG_SECONDS)

    def _count_parked(self) -> list[TopicPartition]:
        """Show the parked keys of every partition that is ours; which those are."""
        mine = [at for at, item in self._partitions.items() if item.mine]
        self._measures.parked({at: self._sink.parked_keys(at) for at in mine})
        return mine

    async def _check_topic(self, claims: Iterable[Claim]) -> None:
        """A topic that was deleted and made again has new records at old offsets: take over anew, which tells."""
        for at, topic_id, *_ in claims:
            partition = self._partitions.get(at)
            if partition is not None and partition.mine and partition.topic_id != topic_id:
                self._wait_for(at, 0)
                await self._call(self._sink.release, [at])


def _misplaced(at: TopicPartition, offset: int, bounds: Bounds) -> Stop | None:
    """Why a position cannot be gone on from; None when it can."""
    if offset < bounds.start:
        return Stop(
            StopReason.DATA_GAP,
            f"the next offset to apply is {offset}, but the log of {at} begins at {bounds.start}: "
            f"{bounds.start - offset} offsets were deleted before they were applied. Restore them or the database; "
            "or accept the loss: semel accept-gap (a cache or search index: set next_offset in its position).",
        )
    if offset > bounds.end:
        return Stop(
            StopReason.OFFSET_AHEAD,
            f"the next offset to apply is {offset}, but the log of {at} ends at {bounds.end}: it lost records that are "
            "applied already (a truncated or restored log). New records would get offsets that count as applied. "
            "Check the rows behind them, then set next_offset in semel_position to where to go on.",
        )
    return None


def _names(partitions: Iterable[TopicPartition]) -> str:
    return ", ".join(map(str, sorted(partitions)))


def _sink_of(spec: SinkSpec, group: str, cluster_id: str, settings: Settings, env: Env, member: str) -> Sink:
    """The sink for the kind of store that the spec names."""
    policy = ParkPolicy(settings.build, settings.park_retry, settings.park_edit)
    if isinstance(spec.database, CacheSpec):
        from semel.sinks.valkey.sink import ValkeySink  # Its driver is there only where it is used.

        return ValkeySink(spec, group, cluster_id, env=env, owner=member, policy=policy)
    is_dev = settings.profile == "dev"
    if isinstance(spec.database, SearchSpec):
        from semel.sinks.search.sink import SearchSink

        return SearchSink(spec, group, cluster_id, env=env, create_indexes=is_dev, owner=member, policy=policy)
    return SqlSink(spec, group, cluster_id, env=env, create_tables=is_dev, owner=member, policy=policy)

"""The relay of one outbox in one process: takes lanes over, reads rows, publishes them with their manifests, deletes.

The consumer group of the manifest topic shares the lanes out; it decides who tries. Who may commit is decided by Kafka:
each lane has a transactional id of its own. So every failure is handled in one way: the lane is given up and taken
over anew, which finds out what happened.

Statements are few: one SELECT reads for all lanes that have room, one transaction deletes what all of them published.
They go over two connections, for neither has to wait for the other: what is read is not what is deleted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import groupby
from typing import ParamSpec, TypeVar

from semel.client.cluster import Backoff
from semel.client.consumer import Consumer
from semel.databases import open_database
from semel.databases.database import Cause
from semel.databases.spec import DatabaseSpec
from semel.env import Env, comes
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
from semel.outbox.limits import BYTES_IN_HAND_MAX, CHECK_SECONDS, READ_ROWS, TRANSACTIONS_MAX
from semel.outbox.link import Link
from semel.outbox.measures import Measures
from semel.outbox.rows import OutboxRow, lane_of
from semel.outbox.store import Reading, Settlement, Store
from semel.outbox.sweep import Sweep
from semel.outbox.takeover import Owned, close, take
from semel.outbox.waking import Listener, Pace
from semel.processing.identity import instance_id, transactional_id
from semel.processing.metrics import Metrics
from semel.settings import Settings
from semel.types import TopicPartition

__all__ = ["Relay", "component_name"]

log = logging.getLogger("semel.outbox")

P = ParamSpec("P")
T = TypeVar("T")

BACKOFF_SECONDS = (0.05, 10.0)
TELL_SECONDS = 10.0
GIVE_UP_SECONDS = 5.0
"""How long a lane that goes to another relay may take to end what it has begun; after that it is fenced anyway."""
NOTE_BATCHES = 50
"""How often a lane notes how far it wrote its topics: a comparison after a restore begins there."""

_ENVELOPE = 256
"""More than a batch of one record has beside key and value, with the message id."""
_KAFKA_AWAY = (Retriable, OutcomeUnknown, ConnectionError, TimeoutError)
_REFUSED_RECORD = frozenset(
    {
        ErrorCode.MESSAGE_TOO_LARGE,
        ErrorCode.RECORD_LIST_TOO_LARGE,
        ErrorCode.INVALID_RECORD,
        ErrorCode.INVALID_TIMESTAMP,
    }
)
_REFUSED_TOPIC = frozenset(
    {
        ErrorCode.TOPIC_AUTHORIZATION_FAILED,
        ErrorCode.INVALID_TOPIC_EXCEPTION,
        ErrorCode.UNKNOWN_TOPIC_OR_PARTITION,
    }
)


def component_name(database: str) -> str:
    """The relay's name in the app."""
    return "outbox" if database == "database" else f"outbox-{database}"


class Relay:
    """Publishes one database's outbox until it is drained. `slot` numbers the workers of one host, from 0, and `kind`
    tells those apart that are no workers.

    `run` raises `Fenced` when another process joined the group as us, and `ConfigurationError` when the outbox cannot
    be worked with. `wake` may be called after a COMMIT, from any thread.
    """

    def __init__(
        self,
        app: str,
        database: DatabaseSpec,
        bootstrap: str,
        settings: Settings,
        env: Env,
        metrics: Metrics,
        *,
        slot: int = 0,
        kind: str = "",
    ) -> None:
        self.name = component_name(database.name)
        self._app = app
        self._env = env
        part = f"{self.name}-{kind}" if kind else self.name
        self._member = transactional_id(app, part, instance_id(settings, env), slot)
        self._create_tables = settings.profile == "dev"
        self._link = Link(app, bootstrap, settings, env, self._member)
        self._store = Store(open_database(database.url))
        # SQLite has one writer: a second connection would only wait for the first, or keep it waiting.
        is_alone = self._store.database.title == "SQLite"
        self._deleter = self._store if is_alone else Store(open_database(database.url))
        self._listener = Listener(open_database(database.url), self.wake)
        self._measures = Measures(metrics, self.name)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"semel {self.name}")
        self._deleting = (
            self._thread if is_alone else ThreadPoolExecutor(1, thread_name_prefix=f"semel {self.name} deletes")
        )
        self._fence_seconds = 2 * settings.session_timeout_ms / 1000
        self._draining = asyncio.Event()
        self._news = asyncio.Event()
        """Something may be to be read: rows were written, a lane has room, or came."""
        self._published = asyncio.Event()
        """Something is to be deleted."""
        self._claims = asyncio.Event()
        """A lane is to be taken over."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._due: dict[int, float] = {}
        """Lanes that the group gave us and that are not ours: when to try to take them over."""
        self._owned: dict[int, Owned] = {}
        self._sweep = Sweep()
        self._pace = Pace()
        self._transactions = asyncio.Semaphore(TRANSACTIONS_MAX)
        self._backoff = Backoff(env, *BACKOFF_SECONDS)
        self._outage = "not connected to Kafka and the database yet"
        self._told_at = -TELL_SECONDS
        self._is_open = False
        self._failure: BaseException | None = None
        self._unpaused: list[TopicPartition] = []
        self._consumer: Consumer

    def __repr__(self) -> str:
        return f"<Relay {self._member} [{self._outage or f'{len(self._owned)} lanes'}]>"

    @property
    def problems(self) -> list[str]:
        """Why the relay does not do all of its work now; empty when it does."""
        return [self._outage] if self._outage else []

    @property
    def statements(self) -> int:
        """How many statements it ran, for the benches."""
        return sum(store.statements for store in {self._store, self._deleter})

    def wake(self) -> None:
        """Rows were committed: look now."""
        loop = self._loop
        if loop is not None:
            with suppress(RuntimeError):  # It is over.
                loop.call_soon_threadsafe(self._look)

    def _look(self) -> None:
        self._sweep.add(self._owned)
        self._pace.woken()
        self._news.set()

    # --- Life ---

    async def run(self) -> None:
        """Publish until `drain` is called. Kafka and the database may be away at any time."""
        self._loop = asyncio.get_running_loop()
        tasks: list[asyncio.Task[None]] = []
        try:
            if not await self._insist(self._link.start) or not await self._insist(self._open):
                return
            self._consumer = self._link.consumer(f"{self._app}.semel.{self.name}", self)
            await self._consumer.start()
            work = (self._membership, self._keep, self._turns, self._deletions, self._watch)
            tasks = [asyncio.create_task(item(), name=f"{self.name} {item.__name__}") for item in work]
            self._listener.start()
            # When we drain the turns are the first to end, with nothing in hand any more; the others only fail.
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._close()

    async def drain(self) -> None:
        """Finish what is in hand and let `run` return."""
        self._draining.set()
        self._news.set()

    async def _close(self) -> None:
        self._listener.stop()
        if hasattr(self, "_consumer"):
            with suppress(SemelError):
                await self._consumer.close()
        await self._drop(list(self._owned))
        await self._call(self._store.close)
        await self._call_deleter(self._deleter.close)
        self._thread.shutdown(wait=False)
        self._deleting.shutdown(wait=False)
        with suppress(SemelError):
            await self._link.close()

    async def _open(self) -> None:
        meta = await self._call(self._store.open, self._app, self._link.cluster_id, create_tables=self._create_tables)
        if self._deleter is not self._store:
            await self._call_deleter(self._deleter.open, self._app, self._link.cluster_id)
        await self._link.prepare(meta.lanes)
        self._is_open = True
        self._recovered()

    async def _insist(self, call: Callable[[], Awaitable[None]]) -> bool:
        """Repeat a call until it succeeds; False when we drain first."""
        while not self._draining.is_set():
            try:
                await call()
                return True
            except Exception as error:
                wait = self._failed(error)
                await self._pause_for(wait)
        return False

    def _failed(self, error: Exception) -> float:
        """What failed is told and tried again after so many seconds; what trying again cannot mend is raised."""
        if not self._is_passing(error):
            raise error
        wait = self._backoff.next()
        self._outage = f"{type(error).__name__}: {error}"
        now = self._env.monotonic()
        is_due = now - self._told_at >= TELL_SECONDS
        if is_due:
            self._told_at = now
        text = "%s waits, nothing is lost: %s. Trying again in %.1f s."
        log.log(logging.WARNING if is_due else logging.DEBUG, text, self._member, " ".join(str(error).split()), wait)
        return wait

    def _is_passing(self, error: Exception) -> bool:
        if isinstance(error, ConfigurationError | Fenced):
            return False
        return isinstance(error, _KAFKA_AWAY) or self._is_of_database(error)

    def _is_of_database(self, error: Exception) -> bool:
        return self._store.database.driver_cause(error) not in (None, Cause.DATA)

    def _recovered(self) -> None:
        self._outage = ""
        self._backoff.reset()
        self._measures.database_up(True)

    async def _pause_for(self, seconds: float) -> None:
        await comes(self._draining, seconds)

    async def _call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a method of the store in its thread, which alone touches the connection."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: function(*args, **kwargs))

    async def _call_deleter(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The same for the connection that deletes."""
        return await asyncio.get_running_loop().run_in_executor(self._deleting, lambda: function(*args, **kwargs))

    # --- Lanes come and go (client.consumer.ConsumerEvents) ---

    async def _membership(self) -> None:
        """Stay in the group. What comes in the topic is our own, and is not looked at."""
        while not self._draining.is_set():
            try:
                await self._consumer.poll(1, 0.5)
                if self._unpaused:
                    paused, self._unpaused = self._unpaused, []
                    await self._consumer.pause([at for at in paused if at.partition in {*self._due, *self._owned}])
            except _KAFKA_AWAY as error:
                log.debug("%s cannot poll: %s", self._member, error)
                await self._pause_for(self._backoff.next())
        await asyncio.Event().wait()  # The turns end the run; the group keeps us until then.

    async def on_assigned(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        """Lanes are to be ours. They are taken over beside this; the topic is not read on."""
        now = self._env.monotonic()
        self._due.update(dict.fromkeys((at.partition for at in partitions), now))
        self._unpaused += partitions
        self._claims.set()
        while True:
            try:
                return await self._link.ends(partitions)
            except _KAFKA_AWAY:
                if self._draining.is_set():
                    raise
                await self._pause_for(self._backoff.next())

    async def on_revoked(self, partitions: list[TopicPartition]) -> None:
        """Lanes go to another relay: end what was begun, so that it does not have to be found out."""
        lanes = [at.partition for at in partitions]
        for lane in lanes:
            self._due.pop(lane, None)
        ending = [own.task for lane in lanes if (own := self._owned.get(lane)) is not None and own.task is not None]
        if ending:
            await asyncio.wait(ending, timeout=GIVE_UP_SECONDS)
        await self._drop(lanes)

    async def on_lost(self, partitions: list[TopicPartition]) -> None:
        """Lanes are another relay's already; the fence keeps us out."""
        log.warning("%s lost %d lanes", self._member, len(partitions))
        for at in partitions:
            self._due.pop(at.partition, None)
        await self._drop([at.partition for at in partitions])

    async def _drop(self, lanes: Iterable[int]) -> None:
        """These lanes are not ours any more, whatever is in hand: who takes them over finds out."""
        gone = [own for lane in lanes if (own := self._owned.pop(lane, None)) is not None]
        self._measures.lanes(len(self._owned))
        current = asyncio.current_task()
        tasks = [own.task for own in gone if own.task is not None and own.task is not current]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await close(own.producer for own in gone)

    async def _give_up(self, lanes: Iterable[int], seconds: float) -> None:
        """Take these lanes over anew after so long, if the group leaves them with us."""
        lanes = list(lanes)
        at = self._env.monotonic() + seconds
        self._due.update({lane: at for lane in lanes if lane in self._owned})
        await self._drop(lanes)
        self._claims.set()

    async def _keep(self) -> None:
        """Take over what is due."""
        while not self._draining.is_set():
            self._claims.clear()
            now = self._env.monotonic()
            lanes = [lane for lane, at in self._due.items() if at <= now]
            if lanes:
                await self._take(lanes)
                continue
            next_at = min(self._due.values(), default=now + 60.0)
            await comes(self._claims, max(0.01, next_at - now))
        await asyncio.Event().wait()

    async def _take(self, lanes: list[int]) -> None:
        try:
            if not self._is_open:
                await self._open()
            owned, lost = await take(self._link, self._store, self._call, lanes, self._app, self._member)
        except Exception as error:
            seconds = self._fence_seconds if isinstance(error, Fenced) else self._failed(error)
            if self._is_of_database(error):
                self._lose_database()
            self._due.update({lane: self._env.monotonic() + seconds for lane in lanes if lane in self._due})
            return
        self._recovered()
        mine = {lane: own for lane, own in owned.items() if lane in self._due}
        await close(own.producer for lane, own in owned.items() if lane not in mine)
        for lane in lanes:
            self._due.pop(lane, None)
        self._due.update(dict.fromkeys(lost, self._env.monotonic() + self._fence_seconds))
        self._owned.update(mine)
        self._sweep.restart(mine)
        self._measures.lanes(len(self._owned))
        if mine:
            log.info("%s took over lanes %s", self._member, ", ".join(map(str, sorted(mine))))
        failpoint("outbox.after_take_over")
        self._news.set()

    # --- The database ---

    async def _turns(self) -> None:
        """Read what is next, again and again."""
        while True:
            self._news.clear()
            if self._failure is not None:
                raise self._failure
            if await self._try(self._turn):
                continue
            if self._draining.is_set() and not any(own.lane.in_hand for own in self._owned.values()):
                return
            await self._wait_for_news()

    async def _deletions(self) -> None:
        """Delete what was published, again and again."""
        while True:
            self._published.clear()
            if not await self._try(self._settle):
                await self._published.wait()

    async def _try(self, work: Callable[[], Awaitable[bool]]) -> bool:
        """Work with the database; False when there was nothing to do."""
        try:
            return await work()
        except Exception as error:
            wait = self._failed(error)
            if self._is_of_database(error) or isinstance(error, OutcomeUnknown):
                self._lose_database()
                await self._give_up(list(self._owned), 0)
            await self._pause_for(wait)
            return True

    def _lose_database(self) -> None:
        """It may come back as another one: lanes are taken over anew from its first word on."""
        self._is_open = False
        self._measures.database_up(False)

    async def _wait_for_news(self) -> None:
        """Wait for a commit, here or there, or until it is time to look anyway."""
        if not await comes(self._news, self._pace.seconds(is_called=self._listener.is_listening)):
            self._sweep.add(self._owned)

    async def _turn(self) -> bool:
        """One SELECT; whether there was anything to ask for, and may be more."""
        if self._draining.is_set() or sum(own.lane.size for own in self._owned.values()) >= BYTES_IN_HAND_MAX:
            return False
        ready = {lane: own for lane, own in self._owned.items() if own.lane.has_room}
        ask = self._sweep.ask(ready, self._store.meta.lanes)
        if ask is None:
            return False
        readers = {lane: (ready[lane], ready[lane].lane.aborts) for lane in ask.lanes}
        without = set().union(*(ready[lane].lane.numbers(ask.shards[0]) for lane in ask.lanes))
        try:
            reading = await self._call(self._store.read, ask.shards, without, READ_ROWS)
            is_whole = await self._distribute(reading, readers)
        except BaseException:
            self._sweep.failed(ask)
            raise
        self._sweep.answered(ask, reading.last, is_full=reading.is_full, is_whole=is_whole)
        return True

    async def _settle(self) -> bool:
        """One transaction that deletes what is committed in Kafka; whether there was anything."""
        settlements = []
        for lane, own in sorted(self._owned.items()):
            done = own.lane.undeleted
            if not done:
                continue
            number, positions = done[-1].number, None
            if own.noted is not None and own.noted[0] <= number:
                positions, own.noted = own.noted[1], None
            rows = [row for batch in done for row in batch.ids]
            addresses = [row.address for batch in done for row in batch.rows if row.address]
            settlements.append(Settlement(lane, own.lane.owner_epoch, number, rows, positions, addresses))
        if not settlements:
            return False
        lost = await self._call_deleter(self._deleter.settle, settlements)
        failpoint("outbox.after_delete")
        for item in settlements:
            current = self._owned.get(item.lane)
            if current is not None and current.lane.owner_epoch == item.owner_epoch:
                current.lane.settled(item.number)
        if lost:
            log.warning("%s: lanes %s have another owner", self._member, lost)
            await self._give_up(lost, self._fence_seconds)
        self._news.set()
        return True

    async def _distribute(self, reading: Reading, readers: Mapping[int, tuple[Owned, int]]) -> bool:
        """Rows to their lanes; what cannot be published is held, and with it what comes after it of its key.

        Rows that were read for a lane which failed meanwhile are dropped: what it had in hand comes before them.
        False when rows were left that may be published later.
        """
        if reading.ruled:
            await self._call(self._store.mark, reading.ruled)
        if not reading.rows:
            return True
        self._pace.busy()
        failpoint("outbox.after_read")
        unfit, rows = await self._unfit(reading.rows), reading.rows
        if unfit:
            rows = [row for row in rows if not (row.topic in unfit or (row.topic, row.key) in unfit)]
        is_whole, lanes = not unfit, self._store.meta.lanes
        for lane, items in groupby(rows, lambda row: lane_of(row.shard, lanes)):
            own, aborts = readers[lane]
            if self._owned.get(lane) is own and own.lane.aborts == aborts:
                mine = list(items)
                own.lane.read(mine, sum([row.size for row in mine]))
                self._publish_beside(own)
            else:
                is_whole = False
        return is_whole

    async def _unfit(self, rows: Sequence[OutboxRow]) -> set[object]:
        """Hold rows that can never be published; their topics, and pairs of topic and key, are not published now."""
        unfit: set[object] = set()
        limits = {topic: await self._link.limits(topic) for topic in {row.topic for row in rows}}
        for topic, known in limits.items():
            if known is None:
                first = next(row for row in rows if row.topic == topic)
                await self._hold(first, f"there is no topic {topic}, or none that we may write to", whole_topic=True)
                unfit.add(topic)
        for row in rows:
            found = limits[row.topic]
            if found is None or (row.headers == "[]" and row.size + _ENVELOPE <= found.bytes_max):
                continue
            if (row.topic, row.key) in unfit:
                continue
            reason = self._link.fits(row, found)
            if reason:
                await self._hold(row, reason)
                unfit.add((row.topic, row.key))
        return unfit

    async def _hold(self, row: OutboxRow, reason: str, *, whole_topic: bool = False) -> None:
        log.error(
            "row %d (id %s, topic %s) cannot be published and is held%s: %s. See semel outbox status.",
            row.seq,
            row.msg_id,
            row.topic,
            ", with its topic" if whole_topic else ", with what comes after it of its key" if row.key else "",
            reason,
        )
        await self._call(self._store.hold, row, reason, self._env.wall_ms(), whole_topic=whole_topic)
        failpoint("outbox.after_hold")

    # --- Kafka ---

    def _publish_beside(self, own: Owned) -> None:
        if own.task is None or own.task.done():
            own.task = asyncio.create_task(self._publish(own), name=f"{self.name} lane {own.lane.number}")
            own.task.add_done_callback(lambda task: self._ended(own, task))

    def _ended(self, own: Owned, task: asyncio.Task[None]) -> None:
        """A mistake of ours, or somebody's cancelling, must not leave a lane that stands still."""
        if task.cancelled():
            if self._owned.get(own.lane.number) is own:
                self._failure = Fatal(f"the task of lane {own.lane.number} was cancelled from outside")
        else:
            self._failure = task.exception() or self._failure
        if self._failure is not None:
            self._news.set()

    async def _publish(self, own: Owned) -> None:
        """Publish what was read for a lane, one transaction after the other."""
        lane = own.lane
        while (begun := lane.begin()) is not None:
            batch, manifest = begun
            try:
                async with self._transactions:
                    await self._link.write(own.producer, batch.rows, manifest, own.positions)
            except AbortTransaction as error:
                self._measures.failed("failed")
                if not await self._refused(own, error):
                    return
            except (Fenced, Fatal, *_KAFKA_AWAY) as error:
                await self._lane_failed(own, error)
                return
            else:
                lane.committed()
                own.failures = 0
                if batch.number % NOTE_BATCHES == 1:
                    own.noted = batch.number, own.positions.encode()
                self._measures.committed(len(batch.rows))
                self._published.set()

    async def _lane_failed(self, own: Owned, error: SemelError | ConnectionError | TimeoutError) -> None:
        """How the transaction ended is not known, or it can have no other: the lane is taken over anew."""
        number = own.lane.number
        if self._owned.get(number) is not own:
            return
        if isinstance(error, Fenced):
            self._measures.failed("fenced")
            log.warning("%s: lane %d has another owner: %s", self._member, number, error)
            await self._give_up([number], self._fence_seconds)
            return
        self._measures.failed("failed")
        if isinstance(error, Fatal):
            log.error("%s: lane %d stands still: %s", self._member, number, error)
            await self._give_up([number], BACKOFF_SECONDS[1])
            return
        await self._give_up([number], self._failed(error))

    async def _refused(self, own: Owned, error: AbortTransaction) -> bool:
        """Nothing of the transaction is there. Find the row whose data is at fault, if that is the reason."""
        try:
            await own.producer.abort()
        except (Fenced, Fatal, *_KAFKA_AWAY) as failure:
            await self._lane_failed(own, failure)
            return False
        failpoint("outbox.after_abort")
        is_refused = error.code in _REFUSED_RECORD or error.code in _REFUSED_TOPIC
        culprit = own.lane.aborted(is_refused=is_refused)
        self._sweep.restart([own.lane.number])
        if culprit is not None:
            row = culprit.rows[0]
            try:
                await self._hold(row, str(error), whole_topic=error.code in _REFUSED_TOPIC)
            except Exception as failure:
                wait = self._failed(failure)
                await self._give_up([own.lane.number], wait)
                return False
            self._link.forget(row.topic)
        elif not is_refused:
            own.failures += 1
            await self._pause_for(min(BACKOFF_SECONDS[1], BACKOFF_SECONDS[0] * 2 ** min(own.failures, 10)))
            log.warning("%s: lane %d tries again: %s", self._member, own.lane.number, error)
        self._news.set()
        return True

    # --- What others see ---

    async def _watch(self) -> None:
        """Every few seconds: measure age and depth, and keep the tables small."""
        while not self._draining.is_set():
            if self._is_open:
                try:
                    depth = await self._call(self._store.depth)
                    self._measures.depth(depth, self._env.wall_ms())
                    if 0 in self._owned:  # One relay is enough.
                        await self._call(self._store.tidy)
                except Exception as error:
                    if not self._is_passing(error):
                        raise
                    log.debug("%s cannot measure: %s", self._member, error)
            await self._pause_for(CHECK_SECONDS)
        await asyncio.Event().wait()

"""From records to a unit of work: the handler runs, and what it says is taken in in the order of the input.

Whose fault a failure is decides what happens. A target that is away (`WAIT`) is the world's: the record is tried
again later, and nothing behind it is worked on. Anything else is the record's: its key is parked, in order, and the
others go on.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from typing import Any

from semel.env import Env
from semel.errors import AbortTransaction, ErrorCode, Fatal, Fenced, Retriable
from semel.failpoints import failpoint, is_armed
from semel.processing.blame import WAIT, Blame, Kind, classify
from semel.processing.component import Component
from semel.processing.effects import begin, perform, take
from semel.processing.inputs import Input, Inputs
from semel.processing.limits import BATCH_RECORDS_MAX, SLICE_SECONDS, UNIT_BYTES_MAX, UNIT_RECORDS_MAX
from semel.processing.overdue import LIVES, Overdue, overdue
from semel.processing.parking import park
from semel.processing.quick import Unfinished, quick_way
from semel.processing.scope import RecordScope
from semel.processing.seams import Kafka
from semel.processing.stores import Stores
from semel.processing.topics import DataError
from semel.processing.unit import UnitOfWork, check_parked
from semel.processing.waiting import Later, Waiting
from semel.processing.window import Window
from semel.types import Record, TopicPartition

__all__ = ["WAIT", "Handling"]

log = logging.getLogger("semel.engine")

_REFUSED_DATA = frozenset(
    {
        ErrorCode.MESSAGE_TOO_LARGE,
        ErrorCode.RECORD_LIST_TOO_LARGE,
        ErrorCode.INVALID_RECORD,
        ErrorCode.INVALID_TIMESTAMP,
    }
)
"""The broker would refuse the same output again, so its input is at fault."""


PROBES_MAX = 20
"""Other records that are tried at once, to find out whether one that fails for an unknown reason is the only one."""


unarmed = failpoint
"""The simulation and tests put another function in the place of `failpoint`, which the quick way then calls, too."""

_UNFINISHED = Exception("the handler's call has to be awaited")
"""Stands for a call that did not come to its end."""


class Handling:
    """What was polled and not worked on yet, and how it is worked on.

    `later` is told why a record has to wait: from then on `may_work` must be false until everything was read again.
    A unit takes more, beyond its time, as long as `may_commit` is false.
    """

    def __init__(
        self,
        component: Component,
        kafka: Kafka,
        env: Env,
        inputs: Inputs,
        stores: Stores,
        *,
        build: str = "",
        may_work: Callable[[], bool],
        may_commit: Callable[[], bool],
        later: Callable[[str], None],
        overdue: Overdue | None = None,
    ) -> None:
        self._component = component
        self._kafka = kafka
        self._env = env
        self._inputs = inputs
        self._build = build
        self._may_work = may_work
        self._may_commit = may_commit
        self._later = later
        self._stores = stores
        self._scope = self._new_scope()
        self._partition_counts: dict[str, int] = {}
        self._most = UNIT_RECORDS_MAX
        self._quick = quick_way(component, env.monotonic)
        self._careful = 0
        self._refused: dict[tuple[str, int, int], Exception] = {}
        self._blame = Blame(env.monotonic)
        self._overdue = overdue or Overdue()
        self._waiting = Waiting(component.name, env, inputs)
        self._probed = 0
        self._is_troubled = False
        """Something failed that was not the record's fault for certain, and not all of it is over: at least as long as
        any partition waits."""
        self.pending: deque[Record] = deque()
        """What was polled and not worked on yet."""

    def __repr__(self) -> str:
        return f"<Handling of {self._component.name}: {len(self.pending)} pending>"

    def _new_scope(self) -> RecordScope:
        return RecordScope(self._stores, self._component.state_options)

    @property
    def is_careful(self) -> bool:
        """Whether a record at a time is worked on, to find the one whose output the broker refuses."""
        return self._careful > 0

    async def replay(self, record: Record, lane: bytes | int, unit: UnitOfWork) -> Exception | None:
        """Handle a parked record again and release it in the unit; the error, when the record is still at fault.

        Raises `Retriable` when the world is.
        """
        refused = self._refused.get((record.topic, record.partition, record.offset))
        if refused is not None:
            return refused
        try:
            error = await self._attempt(unit, (record,), self._scope)
        except Later as later:
            raise Retriable(str(later)) from later
        if error is None:
            unit.release(record, lane, scope=self._scope)
        else:
            log.error("%s-%d@%d fails again: %r", *record[:3], error, exc_info=error)
        return error

    @property
    def refused(self) -> Mapping[tuple[str, int, int], Exception]:
        """Records whose outputs the broker refused, by topic, partition and offset."""
        return self._refused

    def new_unit(self) -> UnitOfWork:
        """An empty unit of work."""
        return UnitOfWork(self._partition_counts, self._env.wall_ms(), self._component.codecs)

    async def work(self, unit: UnitOfWork, deadline: float, most: int) -> bool:
        """Take what is pending into the unit; whether the unit may take more.

        It takes more until `deadline`, of the monotonic clock, and until it has `most` records.
        """
        self._most = most
        if unit.records == 0:
            unit.now_ms = self._env.wall_ms()
        try:
            if self._component.concurrency > 1:
                await self._work_at_once(unit, deadline)
            else:
                await self._work_in_turn(unit, deadline)
        except Later as later:
            self._later(str(later))
        return self._may_work() and not self._is_enough(unit, self._env.monotonic(), deadline)

    def _is_enough(self, unit: UnitOfWork, now: float, deadline: float) -> bool:
        return unit.is_full or (
            unit.records > 0
            and (self._careful > 0 or ((now >= deadline or unit.records >= self._most) and self._may_commit()))
        )

    # --- Partitions that wait ---

    @property
    def has_waiting(self) -> bool:
        """Whether records were read that are tried again later."""
        return bool(self._waiting)

    def idle_seconds(self, limit: float) -> float:
        """How long there is nothing to work on; 0 when there is something, at most `limit`."""
        return 0.0 if self.pending else self._waiting.idle_seconds(limit)

    def clear(self) -> None:
        """Forget what was polled: it is read again."""
        self.pending.clear()
        self._waiting.clear()

    async def _put_off(self, unit: UnitOfWork, later: Later) -> None:
        """The next record cannot be worked on now."""
        record = self.pending[0]
        is_repeated = (record.topic, record.partition) in self._waiting
        self._is_troubled = True
        self._waiting.hold(record, later)
        if is_repeated and self._blame.is_suspected(record[:3]):
            await self._probe(unit, record)

    def _flows(self, at: tuple[str, int]) -> None:
        """A record of this partition succeeded."""
        self._blame.succeeded()
        self._waiting.flows(at)
        self._is_troubled = bool(self._waiting) or self._blame.has_suspects

    async def _probe(self, unit: UnitOfWork, suspect: Record) -> None:
        """Try records of other keys, and keep nothing of it: if one succeeds, the suspect is at fault."""
        others = []
        for record in self.pending:
            held = self._inputs.get((record.topic, record.partition))
            if held is not None and record.key != suspect.key and not self._is_held_up(unit, record, held):
                others.append(record)
        first = self._probed % max(1, len(others))
        for record in (others[first:] + others[:first])[:PROBES_MAX]:
            self._probed += 1
            with suppress(Later):
                if await self._attempt(unit, (record,), self._new_scope()) is None:
                    self._waiting.try_at_once((suspect.topic, suspect.partition))
                    return

    # --- One call after the other ---

    async def _work_in_turn(self, unit: UnitOfWork, deadline: float) -> None:
        """One call after the other."""
        monotonic = self._env.monotonic
        is_batch, inputs = self._component.batch, self._inputs
        self._waiting.bring_back(self.pending)
        now = monotonic()
        slice_end = now + SLICE_SECONDS
        while self.pending and self._may_work() and not self._is_enough(unit, now, deadline):
            record = self.pending[0]
            held = inputs.get((record.topic, record.partition))
            if held is None or held.stopped or record.offset < held.position:
                self.pending.popleft()
                continue
            if self._is_troubled and self._waiting.keeps(record, now):
                self.pending.popleft()
                continue
            try:
                if is_batch:
                    await self._next_batch(unit, record, held)
                else:
                    until = min(deadline, slice_end) if now < deadline else slice_end
                    await self._next_records(unit, held, until)
            except Later as later:
                await self._put_off(unit, later)
            now = monotonic()
            if now >= slice_end:
                await asyncio.sleep(0)
                slice_end = monotonic() + SLICE_SECONDS

    async def _next_records(self, unit: UnitOfWork, held: Input, until: float) -> None:
        """Work on the first pending record, or in the quick way on as many as there are, up to the time `until`."""
        given: Unfinished | None = None
        error: Exception | None = None
        if self._quick is not None and self._is_plain(unit, held):
            reached = failpoint if is_armed() or failpoint is not unarmed else None
            rest = self._quick.work(self.pending, held, unit, self._partition_counts, until, self._most, reached)
            if rest is True:
                return
            given = rest or None
            if given is not None and given.error is not None:
                error = self._at_fault((self.pending[0],), given.error)
        record, scope = self.pending[0], self._scope
        if error is None and not self._is_held_up(unit, record, held):
            error = self._begin(unit, (record,), scope, given)
            if error is _UNFINISHED:
                error = await self._finish((record,), scope)
            if given is not None and self._quick is not None:
                self._quick.learn(given.effects)
        if self._take(unit, (record,), held, scope, error):
            self.pending.popleft()

    def _is_plain(self, unit: UnitOfWork, held: Input) -> bool:
        """Whether nothing is expected of a record but its outputs."""
        is_in_trouble = self._is_troubled or self._careful or self._refused or self._overdue.has_suspects
        return not (is_in_trouble or held.parked.keys or unit.has_parked)

    async def _next_batch(self, unit: UnitOfWork, first: Record, held: Input) -> None:
        """Work on the pending records of the first one's partition, up to the next one of another partition.

        A batch that fails is halved until the record is found whose fault it is: two calls for each record at most.
        """
        parts: list[list[Record]] = [self._batch(first, max(1, self._most - unit.records))]
        while parts:
            part = parts.pop()
            free = list(takewhile(lambda record: not self._is_held_up(unit, record, held), part))
            rest = part[max(1, len(free)) :]
            if rest:
                parts.append(rest)
                part = part[: -len(rest)]
            error = await self._attempt(unit, part, self._scope) if free else None
            if error is not None and len(part) > 1:
                middle = len(part) // 2
                parts += [part[middle:], part[:middle]]
            elif not self._take(unit, part, held, self._scope, error):
                return

    def _batch(self, first: Record, most: int) -> list[Record]:
        batch: list[Record] = []
        size = 0
        for record in self.pending:
            if record[:2] != first[:2] or len(batch) == min(most, BATCH_RECORDS_MAX) or size >= UNIT_BYTES_MAX:
                break
            batch.append(record)
            size += len(record.value or b"")
            if self._careful or (self._overdue.has_suspects and self._ended_others(record) is not None):
                break
        return batch

    def _ended_others(self, record: Record) -> int | None:
        return self._overdue.lives(self._component.name, record)

    async def _work_at_once(self, unit: UnitOfWork, deadline: float) -> None:
        """Several calls at once, taken into the unit in the order of the input; none is left running.

        A call begins when the unit has those before it of its key, or of its partition where it may read state.
        """

        async def run(record: Record) -> tuple[RecordScope, Exception | None]:
            scope = self._new_scope()
            held = self._inputs[record.topic, record.partition]
            if held.stopped or self._is_held_up(unit, record, held):
                return scope, None
            return scope, await self._attempt(unit, (record,), scope)

        window = Window(self._component.concurrency, run, self._lane)
        try:
            while True:
                self._admit(window, unit, deadline)
                if not window or not self._may_work():
                    return
                record, (scope, error) = await window.take()
                held = self._inputs[record.topic, record.partition]
                if not held.stopped:
                    self._take(unit, (record,), held, scope, error)
                window.taken()
        finally:
            await window.close()

    def _admit(self, window: Window[Record, Any], unit: UnitOfWork, deadline: float) -> None:
        now = self._env.monotonic()
        while self.pending and window.has_room and not self._is_enough(unit, now, deadline):
            record = self.pending.popleft()
            held = self._inputs.get((record.topic, record.partition))
            if held is not None and not held.stopped and record.offset >= held.position:
                window.admit(record)
                if self._careful:
                    return

    def _lane(self, record: Record) -> Hashable:
        if self._component.stores:
            return record.topic, record.partition
        return None if record.key is None else (record.topic, record.partition, record.key)

    # --- One call of the handler ---

    def _is_held_up(self, unit: UnitOfWork, record: Record, held: Input) -> bool:
        """Whether this record waits with others of its key, or was refused by the broker: it is not tried."""
        if self._refused and (record.topic, record.partition, record.offset) in self._refused:
            return True
        return record.key is not None and (record.key in held.parked.keys or unit.holds_back(record))

    async def _attempt(self, unit: UnitOfWork, records: Sequence[Record], scope: RecordScope) -> Exception | None:
        """Call the handler. None when all its effects are in the scope, an error when the records are at fault.

        Raises `Later` when the world is.
        """
        error = self._begin(unit, records, scope)
        return await self._finish(records, scope) if error is _UNFINISHED else error

    def _begin(
        self, unit: UnitOfWork, records: Sequence[Record], scope: RecordScope, given: Unfinished | None = None
    ) -> Exception | None:
        """Call the handler as `_attempt`, without the price of a coroutine; `_UNFINISHED` when something is awaited.

        A call that was begun in the quick way is `given`.
        """
        scope.begin(unit, records[-1], unit.now_ms)
        if given is None:
            failpoint("handler.before")
        component = self._component
        if self._overdue.has_suspects and (lives := self._ended_others(records[0]) or 0) >= LIVES:
            return overdue(component.name, records, f"it ended {lives} processes, which its deadline cut off")
        try:
            if component.deadline is not None:
                self._overdue.begin(component.name, records, component.deadline)
            scope.expire()
            scope.rest = begin(self._call(records, scope, given), scope.emit)
            if scope.rest is not None or not scope.check_partitions(self._partition_counts):
                return _UNFINISHED
        except Fenced:
            raise
        except Exception as error:
            return self._at_fault(records, error)
        finally:
            if component.deadline is not None:
                self._overdue.done()
        failpoint("handler.after")
        if self._is_troubled:
            self._flows(records[0][:2])
        return None

    def _call(self, records: Sequence[Record], scope: RecordScope, given: Unfinished | None) -> Any:
        """What the handler's call gives, or is still to give after the effects that the quick way got of it."""
        if given is None:
            return self._component.handle(records if self._component.batch else records[0], scope)
        for effect in given.effects[:-1]:  # These were taken, and their failpoints passed.
            scope.emit(effect)
        for effect in given.effects[-1:]:
            take(effect, scope.emit)
        return given.result

    async def _finish(self, records: Sequence[Record], scope: RecordScope) -> Exception | None:
        """What `_begin` left to be awaited."""
        try:
            answer = await self._in_time(records, scope)
            if answer is not None:
                raise TypeError(f"the handler returned {answer!r:.80}, which is not an effect")
            while not scope.check_partitions(self._partition_counts):
                for write in scope.writes:
                    if write.topic not in self._partition_counts:
                        await self._learn(write.topic)
        except Fenced:
            raise
        except Exception as error:
            return self._at_fault(records, error)
        failpoint("handler.after")
        if self._is_troubled:
            self._flows(records[0][:2])
        return None

    async def _in_time(self, records: Sequence[Record], scope: RecordScope) -> Any:
        """What `_begin` left, to its end or to the deadline: then it is cancelled."""
        seconds = self._component.deadline
        if seconds is None:
            return await perform(scope.rest, scope.emit)
        try:
            async with asyncio.timeout(seconds) as limit:
                return await perform(scope.rest, scope.emit)
        except TimeoutError as error:
            if not limit.expired():
                raise  # Its own.
            why = f"it took longer than its deadline of {seconds:g} s and was cancelled"
            raise overdue(self._component.name, records, why) from error

    def _at_fault(self, records: Sequence[Record], error: Exception) -> Exception:
        """The error itself when it is the records'; raises `Later` when it is the world's.

        Of many records whose fault is not known one is found first, as of those that are at fault for certain.
        """
        record = records[0]
        is_one_of_many = len(records) > 1 and classify(error) is Kind.UNKNOWN
        if is_one_of_many or self._blame.is_the_records(record[:3], error):
            return error
        self._is_troubled = True
        where = f"{record.topic}-{record.partition}@{record.offset}"
        after = error.after if isinstance(error, Retriable) else 0.0
        raise Later(f"the handler of {self._component.name} at {where}: {error!r}", after) from error

    def _take(
        self, unit: UnitOfWork, records: Sequence[Record], held: Input, scope: RecordScope, error: Exception | None
    ) -> bool:
        """Let the unit have what a call gave, or the record that is to wait; False when the partition stopped."""
        record = records[0]
        if error is None and not self._is_held_up(unit, record, held):
            unit.add(records, scope)
        else:
            refused = self._refused.get((record.topic, record.partition, record.offset))
            if not self._park(unit, record, held, error or refused):
                return False
        held.position = records[-1].offset + 1
        if self._overdue.has_suspects:
            self._overdue.passed(self._component.name, records)
        if self._is_troubled:
            for passed in records:
                self._blame.passed(passed[:3])
        return True

    async def _learn(self, topic: str) -> None:
        try:
            self._partition_counts[topic] = await self._kafka.partitions(topic)
        except Fatal as error:
            raise Retriable(str(error)) from error

    # --- What cannot be processed ---

    def _park(self, unit: UnitOfWork, record: Record, held: Input, error: Exception | None) -> bool:
        """Let a record wait in the park topic, or stop its partition where that cannot be; False when it stopped."""
        where = f"{record.topic}-{record.partition}@{record.offset}"
        topic = self._component.parks.get(record.topic)
        if topic is None:
            return self._stop(record, f"{where} cannot be processed: {error!r}", error)
        full = held.parked.full(unit.parked_at((record.topic, record.partition)))
        if full:
            held.is_full = True
            return self._stop(record, f"{where} cannot be processed ({error!r}) nor parked: {full}", error)
        write = park(topic, self._component.name, record, error, self._build)
        try:
            check_parked(write)
        except DataError as too_large:
            return self._stop(record, f"{where} cannot be processed ({error!r}) nor parked: {too_large}", error)
        if error is not None:
            log.error("%s parks the key of %s: %r", self._component.name, where, error, exc_info=error)
        failpoint("handler.before_park")
        unit.park(record, write, error)
        return True

    def _stop(self, record: Record, why: str, error: Exception | None) -> bool:
        self._inputs.stop_at(record, why, error)
        return False

    def suspect(self, unit: UnitOfWork, error: AbortTransaction) -> None:
        """The broker refused what was in a unit: find the record that it came from, one by one, and park that."""
        if error.code not in _REFUSED_DATA or unit.last is None:
            return
        if unit.records > 1:
            self._careful = unit.records
            return
        record = unit.last
        if (
            any(parked.records > 0 for parked in unit.parked.values())
            and (record.topic, record.partition) in self._inputs
        ):
            self._stop(record, f"offset {record.offset} cannot be parked: {error}", error)
            return
        self._careful = 1
        self._refused[record.topic, record.partition, record.offset] = error

    # --- What became of it ---

    def committed(self, unit: UnitOfWork) -> None:
        """A unit is real: what was refused before its positions is parked."""
        self._careful = max(0, self._careful - unit.records)
        for key in [key for key in self._refused if key[2] < self._inputs[key[:2]].committed]:
            del self._refused[key]

    def forget(self, partitions: set[TopicPartition]) -> None:
        """These partitions are not ours any more."""
        self.pending = deque(record for record in self.pending if (record.topic, record.partition) not in partitions)
        self._waiting.forget(partitions)
        self._refused = {key: error for key, error in self._refused.items() if key[:2] not in partitions}

"""From records to a unit of work: the handler runs, and what it says is taken in in the order of the input.

Whose fault a failure is decides what happens. A target that is away (`WAIT`) is the world's: the record is tried
again later, and nothing behind it is worked on. Anything else is the record's: its key is parked, in order, and the
others go on.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping

from semel.env import Env
from semel.errors import AbortTransaction, ErrorCode, Fatal, Fenced, OutcomeUnknown, Retriable
from semel.failpoints import failpoint
from semel.processing.component import Component
from semel.processing.effects import perform
from semel.processing.inputs import Input, Inputs
from semel.processing.limits import SLICE_SECONDS
from semel.processing.parking import park
from semel.processing.seams import Kafka
from semel.processing.shortage import Shortages
from semel.processing.stores import Stores
from semel.processing.topics import DataError
from semel.processing.unit import RecordScope, UnitOfWork, check_parked
from semel.types import Record, TopicPartition

__all__ = ["WAIT", "Handling"]

log = logging.getLogger("semel.engine")

WAIT = (Retriable, OutcomeUnknown, ConnectionError, TimeoutError)
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


class Handling:
    """What was polled and not worked on yet, and how it is worked on.

    `later` is told why a record has to wait: from then on `may_work` must be false until everything was read again.
    """

    def __init__(
        self,
        component: Component,
        kafka: Kafka,
        env: Env,
        inputs: Inputs,
        stores: Stores,
        *,
        may_work: Callable[[], bool],
        later: Callable[[str], None],
    ) -> None:
        self._component = component
        self._kafka = kafka
        self._env = env
        self._inputs = inputs
        self._may_work = may_work
        self._later = later
        self._scope = RecordScope(stores, frozenset(component.stores))
        self._partition_counts: dict[str, int] = {}
        self._careful = 0
        self._refused: dict[tuple[str, int, int], Exception] = {}
        self._shortages = Shortages(env.monotonic)
        self.pending: deque[Record] = deque()
        """What was polled and not worked on yet."""

    def __repr__(self) -> str:
        return f"<Handling of {self._component.name}: {len(self.pending)} pending>"

    @property
    def refused(self) -> Mapping[tuple[str, int, int], Exception]:
        """Records whose outputs the broker refused, by topic, partition and offset."""
        return self._refused

    def new_unit(self) -> UnitOfWork:
        """An empty unit of work."""
        return UnitOfWork(self._partition_counts, self._env.wall_ms())

    async def work(self, unit: UnitOfWork, deadline: float) -> bool:
        """Take what is pending into the unit; whether the unit may take more. `deadline` is of the monotonic clock."""
        if unit.records == 0:
            unit.now_ms = self._env.wall_ms()
        slice_end = self._env.monotonic() + SLICE_SECONDS
        while self.pending and self._may_work():
            record = self.pending[0]
            held = self._inputs.get((record.topic, record.partition))
            if held is not None and not held.stopped and record.offset >= held.position:
                if not await self._handle(unit, record, held):
                    continue
                held.position = record.offset + 1
            self.pending.popleft()
            now = self._env.monotonic()
            if unit.is_full or self._careful or now >= deadline:
                return False
            if now >= slice_end:
                await asyncio.sleep(0)
                slice_end = self._env.monotonic() + SLICE_SECONDS
        return self._may_work() and self._env.monotonic() < deadline

    async def _handle(self, unit: UnitOfWork, record: Record, held: Input) -> bool:
        """Take one record into the unit of work; False when it has to wait or its partition stopped."""
        at = (record.topic, record.partition)
        in_unit = unit.parked.get(at)
        if record.key is not None and (
            record.key in held.parked.keys or (in_unit is not None and record.key in in_unit.keys)
        ):
            return self._park(unit, record, held, None)
        refused = self._refused.get((*at, record.offset))
        if refused is not None:
            return self._park(unit, record, held, refused)
        scope = self._scope
        scope.begin(unit, record.partition)
        failpoint("handler.before")
        try:
            answer = await perform(self._component.handle(record, scope), scope.emit)
            if answer is not None:
                raise TypeError(f"the handler returned {answer!r:.80}, which is not an effect")
            for write in scope.writes:
                if write.topic not in self._partition_counts:
                    await self._learn(write.topic)
            scope.check_partitions(self._partition_counts)
        except Fenced:
            raise
        except WAIT as error:
            self._wait(record, error)
            return False
        except Exception as error:
            if self._shortages.may_pass((*at, record.offset), error):
                self._wait(record, error)
                return False
            return self._park(unit, record, held, error)
        failpoint("handler.after")
        unit.add(record, scope)
        return True

    def _wait(self, record: Record, error: Exception) -> None:
        self._later(f"the handler of {self._component.name} at {record.topic}-{record.partition}: {error!r}")

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
        full = held.parked.full(unit.parked.get((record.topic, record.partition)))
        if full:
            return self._stop(record, f"{where} cannot be processed ({error!r}) nor parked: {full}", error)
        write = park(topic, self._component.name, record, error)
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
        if unit.parked and (record.topic, record.partition) in self._inputs:
            self._stop(record, f"offset {record.offset} cannot be parked: {error}", error)
            return
        self._careful = 1
        self._refused[record.topic, record.partition, record.offset] = error

    # --- What became of it ---

    def committed(self, unit: UnitOfWork) -> None:
        """A unit is real: what was refused before its positions is parked."""
        self._careful = max(0, self._careful - unit.records)
        for key in [key for key in self._refused if key[2] < self._inputs[key[:2]].position]:
            del self._refused[key]

    def forget(self, partitions: set[TopicPartition]) -> None:
        """These partitions are not ours any more."""
        self.pending = deque(record for record in self.pending if (record.topic, record.partition) not in partitions)
        self._refused = {key: error for key, error in self._refused.items() if key[:2] not in partitions}

"""A sink whose handler notes effects: they are sent when it has returned, and each partition has steps of its own.

What a store does with noted effects is its own (`sinks/valkey`, `sinks/search`). What is here holds for all: how
records go to the handler, whose fault a failure is, what is parked, what becomes of a step whose answer did not come.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import msgspec

from semel import history
from semel.databases.processes import ProcessIdentity
from semel.env import Env
from semel.errors import ConfigurationError, Retriable
from semel.failpoints import failpoint
from semel.processing.parklog import Command, Outcome, ParkPolicy
from semel.processing.shortage import Shortages
from semel.sinks.contract import Applied, Claim, PartitionsLost, PartitionsStopped, Slice, Stop, Unavailable, total
from semel.sinks.noted.notes import Notes
from semel.sinks.noted.place import Change, ParkedRecord, Place
from semel.sinks.noted.release import Done, Step, due, steps, wanted
from semel.sinks.spec import SinkSpec
from semel.sinks.sql.judgement import Judgement, Poison
from semel.sinks.sql.parking import Parked, Parking
from semel.types import Record, TopicPartition

__all__ = ["Doubt", "Item", "NotingSink", "Owned", "Undecided"]

log = logging.getLogger("semel.sinks")


class Item(NamedTuple):
    """A record with its decoded view, or with the error that decoding or handling gave."""

    record: Record
    view: Any
    error: Exception | None


class Doubt(NamedTuple):
    """A step whose answer did not come."""

    end: int
    applied: Applied


@dataclass(slots=True)
class Owned:
    """A partition that is ours: what its position says, as this owner last read or wrote it."""

    place: Place
    next_offset: int
    epoch: int
    parked: Parked
    doubt: Doubt | None = None


class Undecided(Unavailable):
    """Nobody knows yet whether a record is at fault; it waits, and its partition with it."""


class NotingSink(ABC):
    """`semel.sinks.contract.Sink`, but for what each store does in its own way: the abstract methods.

    `owner` goes into the positions beside the identity of this process.
    """

    def __init__(
        self, spec: SinkSpec, identity: str, cluster_id: str, *, env: Env, owner: str, policy: ParkPolicy | None
    ) -> None:
        self._spec = spec
        self._identity = identity
        self._cluster_id = cluster_id
        self._env = env
        self._policy = policy or ParkPolicy()
        self._owner = f"semel {owner} {ProcessIdentity.current()} {env.new_id()}"
        self._owned: dict[TopicPartition, Owned] = {}
        self._known: set[Place] = set()
        """What had a position while this sink lived: where it is gone, the data is."""
        self._done = Applied()
        """What was done and not told yet."""
        self._shortages = Shortages(env.monotonic)
        self._judgement = Judgement(env, lambda _: None)

    # What a store does.

    @abstractmethod
    def open(self) -> None:
        """See `Sink.open`."""

    @abstractmethod
    def close(self) -> None:
        """See `Sink.close`."""

    @abstractmethod
    def _take_over(self, claim: Claim) -> int | Stop:
        """Raise the fence of a partition, then own it from its position on; or why not."""

    @abstractmethod
    def _notes(self, items: Sequence[Item]) -> Notes:
        """What the handler gets for these records."""

    @abstractmethod
    def _write(self, owned: Owned, partition: TopicPartition, change: Change, applied: Applied) -> None:
        """Make a change durable, the position last or with it. Raises `Poison`, and then the position is as it was."""

    @abstractmethod
    def _renew(self, owned: Owned) -> list[str]:
        """Raise our epoch, so that what is still on its way does nothing: "ok", next offset, epoch; or another word
        that `_refused` knows, and what belongs to it."""

    @abstractmethod
    def _refused(self, owned: Owned, partition: TopicPartition, word: str, rest: Sequence[str]) -> None:
        """Raise what a word other than "ok" means."""

    @abstractmethod
    def _waiting(self, owned: Owned, partition: TopicPartition) -> tuple[list[Command], dict[int, ParkedRecord]]:
        """What is asked for about a partition's parked records, and these, in order; nothing of either if nothing is
        asked for and no build tries by itself."""

    @abstractmethod
    def _outcome(self, owned: Owned, command: str) -> Outcome | None:
        """What was done for a command so far."""

    @abstractmethod
    def _load_parked(self, owned: Owned) -> Parked:
        """What is parked of a partition, read again: an operator may have changed it."""

    @abstractmethod
    def _try_effects(self, owned: Owned, partition: TopicPartition, effects: Sequence[Any]) -> None:
        """Raises `Poison` where these effects of a parked record cannot be done."""

    # What holds for all.

    def _check_history(self, store: str) -> None:
        if history.on():
            raise ConfigurationError(
                f"sink {self._spec.name} writes to {store}, where no ledger of a history can be kept. Leave "
                "SEMEL_HISTORY out."
            )

    def position(self, partition: TopicPartition) -> int | None:
        """The next offset of a partition that is ours."""
        owned = self._owned.get(partition)
        return None if owned is None else owned.next_offset

    def parked_keys(self, partition: TopicPartition) -> int:
        """How many keys of a partition that is ours are parked."""
        owned = self._owned.get(partition)
        return 0 if owned is None else len(owned.parked.keys)

    def release(self, partitions: Iterable[TopicPartition]) -> None:
        """Forget partitions."""
        for partition in partitions:
            self._owned.pop(partition, None)

    def take_over(self, claims: Sequence[Claim]) -> dict[TopicPartition, int | Stop]:
        """Raise the epochs, a step for each partition."""
        self.release(claim.partition for claim in claims)
        return {claim.partition: self._take_over(claim) for claim in claims}

    # Applying.

    def apply(self, slices: Sequence[Slice]) -> Applied:
        """Partition by partition; where a record is at fault, the records of its partition one by one."""
        lost: dict[TopicPartition, str] = {}
        stops: dict[TopicPartition, Stop] = {}
        undecided: Undecided | None = None
        doubtful = [partition for partition, owned in self._owned.items() if owned.doubt is not None]
        for work in (*(partial(self._settle, partition) for partition in doubtful),
                     *(partial(self._apply_slice, piece) for piece in slices)):  # fmt: skip
            try:
                work()
            except PartitionsLost as error:  # The other partitions may go on.
                self.release(error.reasons)
                lost |= error.reasons
            except PartitionsStopped as error:
                stops |= error.stops
            except Undecided as error:
                if self._judgement.is_outage:
                    raise
                undecided = error
        if lost:
            raise PartitionsLost(lost)
        if stops:
            raise PartitionsStopped(stops)
        if undecided is not None:
            raise undecided
        return self._told()

    def _count(self, applied: Applied) -> None:
        self._done = total((self._done, applied))

    def _told(self) -> Applied:
        """What was done since it was last told: a call that raises tells nothing."""
        done, self._done = self._done, Applied()
        return done

    def _apply_slice(self, piece: Slice) -> None:
        partition, records, end, views = piece
        owned = self._owned.get(partition)
        if owned is None or end <= owned.next_offset:
            return
        if views is None:
            items = [self._decode(record) for record in records if record.offset >= owned.next_offset]
        else:
            seen = zip(records, views, strict=True)
            items = [Item(record, view, None) for record, view in seen if record.offset >= owned.next_offset]
        if owned.parked.keys and any(item.record.key in owned.parked.keys for item in items):
            owned.parked = self._load_parked(owned)  # An operator may have emptied it.
        try:
            if not self._judgement.is_outage or not items:
                self._together(owned, partition, items, end)
                return
        except Poison as poison:
            log.info("%s: a batch failed and is tried record by record: %s", self._identity, poison)
        self._one_by_one(owned, partition, items, end)

    def _one_by_one(self, owned: Owned, partition: TopicPartition, items: Sequence[Item], end: int) -> None:
        """A step for each record."""
        for number, item in enumerate(items, 1):
            to = end if number == len(items) else item.record.offset + 1
            try:
                self._together(owned, partition, [item], to)
            except Poison as poison:
                if not self._judgement.is_the_records(item.record, poison.error):
                    self._look_at_others(items[number:], item)
                    raise self._undecided(item, poison.error) from poison.error
                self._together(owned, partition, [self._at_fault(item, poison.error)], to)

    def _undecided(self, item: Item, error: Exception) -> Undecided:
        at = TopicPartition(item.record.topic, item.record.partition)
        return Undecided(
            f"{self._identity}: the handler failed at {at}@{item.record.offset}, and whether the record is at fault is "
            f"not known yet: {error!r}"
        )

    def _at_fault(self, item: Item, error: Exception) -> Item:
        log.warning("%s: %s-%d offset %d is parked: %s: %s", self._identity, *item.record[:3],
                    type(error).__name__, error)  # fmt: skip
        return item._replace(error=error)

    def _look_at_others(self, others: Sequence[Item], failed: Item) -> None:
        """See how the handler fares with other keys; what it notes is thrown away."""
        held = {failed.record.key}
        for item in others:
            if self._judgement.is_outage:
                return
            if item.error is not None or item.record.key in held:
                continue
            try:
                self._handle([item])
            except Poison as poison:
                if not self._judgement.is_the_records(item.record, poison.error):
                    held.add(item.record.key)
            else:
                self._judgement.succeeded()

    def _decode(self, record: Record) -> Item:
        try:
            return Item(record, self._spec.topic.decode(record), None)
        except Retriable as error:  # A schema registry that is away.
            raise Unavailable(str(error)) from error
        except Exception as error:  # Whatever else the decoder raises is this record's fault.
            return Item(record, None, error)

    def _together(self, owned: Owned, partition: TopicPartition, items: Sequence[Item], end: int) -> None:
        """One step for these records and the position behind them. Raises `Poison`; the position has not moved then."""
        good, parking = self._sorted_out(owned, partition, items)
        failpoint("sink.before_effects")
        effects = self._handle(good) if good else []
        self._finish(owned, partition, items, end, effects, parking)
        if good:
            self._judgement.succeeded()

    def _sorted_out(self, owned: Owned, partition: TopicPartition, items: Sequence[Item]) -> tuple[list[Item], Parking]:
        """The records that the handler is to see, and the others, which are parked."""
        parking = Parking(
            {partition: owned.parked},
            keys_max=self._spec.max_parked_keys,
            records_max=self._spec.max_parked_records,
            build=self._policy.build,
        )
        good = []
        for item in items:
            if parking.blocks(item.record):
                parking.add(item.record, None)
            elif item.error is not None:
                parking.add(item.record, item.error)
            else:
                good.append(item)
        return good, parking

    def _finish(
        self, owned: Owned, partition: TopicPartition, items: Sequence[Item], end: int, effects: Sequence[Any],
        parking: Parking,
    ) -> None:  # fmt: skip
        """Write what is parked, these effects and the position."""
        now_ms = self._env.wall_ms()
        parked = [(record.offset, ParkedRecord.of(record, fault, now_ms)) for record, fault in parking.rows]
        applied = Applied(len(items), len(parked), 1)
        self._write(owned, partition, Change(owned.epoch, owned.next_offset, end, len(items), effects, parked), applied)
        parking.accept()
        self._judgement.passed(item.record for item in items)

    def _handle(self, items: Sequence[Item]) -> Sequence[Any]:
        """The effects of the handler. Raises `Poison` when the data is at fault, `Unavailable` when not."""
        notes = self._notes(items)
        try:
            self._spec.handler([item.view for item in items], notes)
        except Exception as error:
            first = items[0].record
            if isinstance(error, Retriable | ConnectionError | TimeoutError) or self._shortages.may_pass(
                (first.topic, first.partition, first.offset), error
            ):
                raise Unavailable(f"{self._identity}: the handler could not work: {error!r}") from error
            raise Poison(error) from error
        finally:
            notes.end()
        return notes.noted

    def _settle(self, partition: TopicPartition) -> None:
        """Find out what a step did whose answer did not come, and fence what may still be on its way."""
        owned = self._owned[partition]
        doubt = owned.doubt
        assert doubt is not None
        failpoint("sink.before_settle")
        word, *rest = self._renew(owned)
        failpoint("sink.after_settle")
        if word != "ok":
            owned.doubt = None
            self._refused(owned, partition, word, rest)
        is_done = int(rest[0]) == doubt.end
        if not is_done and int(rest[0]) != owned.next_offset:  # It is ours, and not where we left it.
            self._refused(owned, partition, "fenced", (rest[0], str(owned.epoch), self._owner))
        owned.epoch = int(rest[1])
        owned.parked = self._load_parked(owned)
        owned.doubt = None
        # A release moves no position: what it did is seen in what is still asked for.
        is_move = doubt.end != owned.next_offset
        owned.next_offset = int(rest[0])
        log.warning("%s: the step for %s up to %d that was not answered was %s", self._identity, partition, doubt.end,
                    "done" if is_done else "not done")  # fmt: skip
        if is_done and is_move:
            self._count(doubt.applied)

    def _fenced(self, owned: Owned, partition: TopicPartition, store: str, rest: Sequence[str]) -> PartitionsLost:
        """What a position in `rest` (next offset, epoch, owner) means that is not as we left it."""
        next_offset, epoch, owner = rest
        what = f"{self._identity}: {partition}"
        if int(epoch) > owned.epoch:
            reason = f"{what} was taken over by {owner} (owner epoch {epoch}, ours was {owned.epoch})."
        else:
            reason = (
                f"{what}: its position says offset {next_offset} in owner epoch {epoch}, we had written "
                f"{owned.next_offset} in {owned.epoch}: {store} was set back, as by a fail-over or a backup."
            )
        return PartitionsLost({partition: reason})

    # Parked records.

    def carry_out(self) -> Applied:
        """Command after command, record after record, each behind its position's fence."""
        try:
            for partition, owned in list(self._owned.items()):
                if owned.doubt is not None:
                    self._settle(partition)
                if owned.parked.records:
                    self._carry_out(partition, owned)
        except PartitionsLost as error:
            self.release(error.reasons)
            raise
        return self._told()

    def _carry_out(self, partition: TopicPartition, owned: Owned) -> None:
        commands, parked = self._waiting(owned, partition)
        for_build = wanted(parked, commands, self._policy)
        if for_build:
            name, by = str(self._env.new_id()), f"build {self._policy.build}"
            commands.append(Command(id=name, verb="retry", offsets=for_build, by=by, at_ms=self._env.wall_ms()))

        def handle(record: Record) -> Sequence[Any] | Exception:
            return self._tried(owned, partition, record)

        for command in due(commands, self._policy):
            before = self._outcome(owned, command.id) or Outcome()
            for step in steps(
                command, before, parked, self._policy, handle, lambda at, item: item.record(owned.place, at)
            ):
                failpoint("sink.before_release")
                released = step.done is not None and step.done.released
                self._write(owned, partition, self._change(owned, step, parked), Applied(int(released), 0, 1))
            owned.parked = self._load_parked(owned)

    def _tried(self, owned: Owned, partition: TopicPartition, record: Record) -> Sequence[Any] | Exception:
        """The effects of a parked record, which can be done as far as the store can tell; or what is still wrong."""
        item = self._decode(record)
        if item.error is not None:
            return item.error
        try:
            effects = self._handle([item])
            self._try_effects(owned, partition, effects)
        except Poison as poison:
            return poison.error
        return effects

    def _change(self, owned: Owned, step: Step, parked: dict[int, ParkedRecord]) -> Change:
        now_ms = self._env.wall_ms()
        outcome = msgspec.structs.replace(step.outcome, at_ms=now_ms)
        change = Change(
            owned.epoch, owned.next_offset, owned.next_offset, command=(outcome.command, step.left, outcome)
        )
        done: Done | None = step.done
        if done is None:
            return change
        if done.fault is not None:
            failed = msgspec.structs.replace(parked[done.offset], fault=done.fault, parked_at=now_ms)
            parked[done.offset] = failed
            return change._replace(failed=[(done.offset, failed)])
        return change._replace(effects=done.effects, released=[(done.offset, done.key)])

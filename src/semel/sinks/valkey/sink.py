"""The Valkey sink: the effects of a batch, its parked records and the position behind it in one Lua script.

A partition is one script, and partitions are independent of each other. A script without an answer is settled before
anything else: our epoch is raised, which fences a script that may still be on its way, and the position tells the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import msgspec

from semel import history
from semel.databases.database import Cause
from semel.databases.processes import ProcessIdentity
from semel.databases.valkey.effects import CacheEffects, EffectRefused
from semel.env import Env
from semel.errors import ConfigurationError, Retriable, SemelError
from semel.failpoints import failpoint
from semel.processing.parklog import Command, Outcome, ParkPolicy
from semel.processing.shortage import Shortages
from semel.sinks.contract import (
    Applied,
    Claim,
    PartitionsLost,
    PartitionsStopped,
    Slice,
    Stop,
    StopReason,
    Unavailable,
)
from semel.sinks.spec import SinkSpec
from semel.sinks.sql.judgement import Judgement
from semel.sinks.sql.parking import Parked, Parking
from semel.sinks.valkey.release import Done, Step, due, steps, wanted
from semel.sinks.valkey.store import Change, ParkedRecord, Place, ValkeyStore
from semel.types import Record, TopicPartition

__all__ = ["ValkeySink"]

log = logging.getLogger("semel.sinks")


class _Item(NamedTuple):
    """A record with its decoded view, or with the error that decoding gave."""

    record: Record
    view: Any
    error: Exception | None


class _Doubt(NamedTuple):
    """A script whose answer did not come."""

    end: int
    applied: Applied


@dataclass(slots=True)
class _Owned:
    """A partition that is ours: what its position says, as this owner last read or wrote it."""

    place: Place
    next_offset: int
    epoch: int
    parked: Parked
    doubt: _Doubt | None = None


class _Poison(SemelError):
    """The data is at fault; nothing was written."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class _Undecided(Unavailable):
    """Nobody knows yet whether a record is at fault; it waits, and its partition with it."""


class ValkeySink:
    """`semel.sinks.contract.Sink` for Valkey and Redis.

    `owner` goes into the positions beside the identity of this process.
    """

    def __init__(
        self,
        spec: SinkSpec,
        identity: str,
        cluster_id: str,
        *,
        env: Env,
        owner: str = "",
        store: ValkeyStore | None = None,
        policy: ParkPolicy | None = None,
    ) -> None:
        self._spec = spec
        self._identity = identity
        self._cluster_id = cluster_id
        self._env = env
        self._policy = policy or ParkPolicy()
        self._owner = f"semel {owner} {ProcessIdentity.current()} {env.new_id()}"
        self._store = store or ValkeyStore(spec.database.url)
        self._owned: dict[TopicPartition, _Owned] = {}
        self._known: set[Place] = set()
        """What had a position while this sink lived: where it is gone, the data is."""
        self._done = Applied()
        """What was done and not told yet."""
        self._shortages = Shortages(env.monotonic)
        self._judgement = Judgement(env, _cause)

    def __repr__(self) -> str:
        return f"<ValkeySink {self._identity} {len(self._owned)} partitions, {self._store!r}>"

    def open(self) -> None:
        """Connect, and check that the server keeps what it is given."""
        if history.on():
            raise ConfigurationError(
                f"sink {self._spec.name} writes to Valkey, where no ledger of a history can be kept. Leave "
                "SEMEL_HISTORY out."
            )
        self._store.check()

    def close(self) -> None:
        """Close the connection."""
        self._store.close()

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

    # Taking over.

    def take_over(self, claims: Sequence[Claim]) -> dict[TopicPartition, int | Stop]:
        """Raise the epochs, a script for each partition."""
        self.release(claim.partition for claim in claims)
        return {claim.partition: self._take_over(claim) for claim in claims}

    def _take_over(self, claim: Claim) -> int | Stop:
        place = Place(self._identity, self._cluster_id, *claim.partition)
        start: int | None = claim.log_start_offset
        if place in self._known or (start and not self._store.is_start_accepted(self._identity)):
            start = None
        failpoint("sink.before_fence_commit")
        word, *rest = self._store.take_over(place, str(claim.topic_id), start, self._owner)
        if word == "gone":
            return _data_gone(place, claim.log_start_offset, place in self._known)
        if word == "torn":
            return _torn(place, rest[0])
        if word == "recreated":
            return _recreated(place, claim, *rest)
        self._known.add(place)
        self._owned[claim.partition] = _Owned(place, int(rest[0]), int(rest[1]), self._load_parked(place))
        return int(rest[0])

    def _load_parked(self, place: Place) -> Parked:
        return Parked(*self._store.parked_keys(place))

    # Applying.

    def apply(self, slices: Sequence[Slice]) -> Applied:
        """A script for each partition; where a record is at fault, one for each record of its partition."""
        lost: dict[TopicPartition, str] = {}
        stops: dict[TopicPartition, Stop] = {}
        undecided: _Undecided | None = None
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
            except _Undecided as error:
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
        self._done = Applied(*map(sum, zip(self._done, applied, strict=True)))

    def _told(self) -> Applied:
        """What was done since it was last told: a call that raises tells nothing."""
        done, self._done = self._done, Applied()
        return done

    def _apply_slice(self, piece: Slice) -> None:
        partition, records, end = piece
        owned = self._owned.get(partition)
        if owned is None or end <= owned.next_offset:
            return
        items = [self._decode(record) for record in records if record.offset >= owned.next_offset]
        if owned.parked.keys and any(item.record.key in owned.parked.keys for item in items):
            owned.parked = self._load_parked(owned.place)  # An operator may have emptied it.
        try:
            if not self._judgement.is_outage or not items:
                self._together(owned, partition, items, end)
                return
        except _Poison as poison:
            log.info("%s: a batch failed and is tried record by record: %s", self._identity, poison)
        for number, item in enumerate(items, 1):
            to = end if number == len(items) else item.record.offset + 1
            try:
                self._together(owned, partition, [item], to)
            except _Poison as poison:
                if not self._judgement.is_the_records(item.record, poison.error):
                    self._look_at(items[number:], item)
                    raise _Undecided(
                        f"{self._identity}: the handler failed at {partition}@{item.record.offset}, and whether the "
                        f"record is at fault is not known yet: {poison.error!r}"
                    ) from poison.error
                log.warning("%s: %s-%d offset %d is parked: %s: %s", self._identity, *item.record[:3],
                            type(poison.error).__name__, poison.error)  # fmt: skip
                self._together(owned, partition, [item._replace(error=poison.error)], to)

    def _look_at(self, others: Sequence[_Item], failed: _Item) -> None:
        """See how the handler fares with other keys; what it notes is thrown away."""
        held = {failed.record.key}
        for item in others:
            if self._judgement.is_outage:
                return
            if item.error is not None or item.record.key in held:
                continue
            try:
                self._handle([item])
            except _Poison as poison:
                if not self._judgement.is_the_records(item.record, poison.error):
                    held.add(item.record.key)
            else:
                self._judgement.succeeded()

    def _decode(self, record: Record) -> _Item:
        try:
            return _Item(record, self._spec.topic.decode(record), None)
        except Retriable as error:  # A schema registry that is away.
            raise Unavailable(str(error)) from error
        except Exception as error:  # Whatever else the decoder raises is this record's fault.
            return _Item(record, None, error)

    def _together(self, owned: _Owned, partition: TopicPartition, items: Sequence[_Item], end: int) -> None:
        """One script for these records and the position behind them. Raises `_Poison`, and then nothing was written."""
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
        failpoint("sink.before_effects")
        effects = self._handle(good) if good else []
        now_ms = self._env.wall_ms()
        parked = [(record.offset, ParkedRecord.of(record, fault, now_ms)) for record, fault in parking.rows]
        applied = Applied(len(items), len(parked), 1)
        self._write(owned, partition, Change(owned.epoch, owned.next_offset, end, len(items), effects, parked), applied)
        parking.accept()
        if good:
            self._judgement.succeeded()
        self._judgement.passed(item.record for item in items)

    def _handle(self, items: Sequence[_Item]) -> list[tuple[bytes, ...]]:
        """The effects of the handler. Raises `_Poison` when the data is at fault, `Unavailable` when not."""
        effects = CacheEffects()
        try:
            self._spec.handler([item.view for item in items], effects)
        except Exception as error:
            first = items[0].record
            if isinstance(error, Retriable | ConnectionError | TimeoutError) or self._shortages.may_pass(
                (first.topic, first.partition, first.offset), error
            ):
                raise Unavailable(f"{self._identity}: the handler could not work: {error!r}") from error
            raise _Poison(error) from error
        finally:
            effects.end()
        return effects.commands

    def _write(self, owned: _Owned, partition: TopicPartition, change: Change, applied: Applied) -> None:
        """Carry the script out. Until its answer is here, nobody knows what it did."""
        failpoint("sink.before_db_commit")
        owned.doubt = _Doubt(change.end, applied)
        word, *rest = self._store.apply(owned.place, change)
        failpoint("sink.after_db_commit")
        owned.doubt = None
        if word == "ok":
            owned.next_offset = change.end
            self._count(applied)
        else:
            self._refused(owned, partition, word, rest)

    def _refused(self, owned: _Owned, partition: TopicPartition, word: str, rest: Sequence[str]) -> None:
        if word == "bad":
            raise _Poison(EffectRefused(f"command {rest[0]} of the effects: {rest[1]}"))
        if word == "gone":
            raise PartitionsStopped({partition: _data_gone(owned.place, 0, is_known=True)})
        if word == "torn":
            raise PartitionsStopped({partition: _torn(owned.place, rest[0])})
        next_offset, epoch, owner = rest
        what = f"{self._identity}: {partition}"
        if int(epoch) > owned.epoch:
            reason = f"{what} was taken over by {owner} (owner epoch {epoch}, ours was {owned.epoch})."
        else:
            reason = (
                f"{what}: its position says offset {next_offset} in owner epoch {epoch}, we had written "
                f"{owned.next_offset} in {owned.epoch}: Valkey was set back, as by a fail-over or a backup."
            )
        raise PartitionsLost({partition: reason})

    def _settle(self, partition: TopicPartition) -> None:
        """Find out what a script did whose answer did not come."""
        owned = self._owned[partition]
        doubt = owned.doubt
        assert doubt is not None
        failpoint("sink.before_settle")
        word, *rest = self._store.renew(owned.place, self._owner)
        failpoint("sink.after_settle")
        if word != "ok":
            owned.doubt = None
            self._refused(owned, partition, word, rest)
        is_done = int(rest[0]) == doubt.end
        if not is_done and int(rest[0]) != owned.next_offset:  # It is ours, and not where we left it.
            self._refused(owned, partition, "fenced", (rest[0], str(owned.epoch), self._owner))
        owned.epoch = int(rest[1])
        owned.parked = self._load_parked(owned.place)
        owned.doubt = None
        # A release moves no position: what it did is seen in what is still asked for.
        is_move = doubt.end != owned.next_offset
        owned.next_offset = int(rest[0])
        log.warning("%s: the script for %s up to %d that was not answered was %s", self._identity, partition, doubt.end,
                    "done" if is_done else "not done")  # fmt: skip
        if is_done and is_move:
            self._count(doubt.applied)

    # Parked records.

    def carry_out(self) -> Applied:
        """Command after command, record after record, each with its position's fence in one script."""
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

    def _carry_out(self, partition: TopicPartition, owned: _Owned) -> None:
        commands = self._store.commands(owned.place)
        if not commands and self._policy.retry != "build":
            return
        parked = self._store.parked(owned.place)
        for_build = wanted(parked, commands, self._policy)
        if for_build:
            name, by = str(self._env.new_id()), f"build {self._policy.build}"
            commands.append(Command(id=name, verb="retry", offsets=for_build, by=by, at_ms=self._env.wall_ms()))

        def handle(record: Record) -> list[tuple[bytes, ...]] | Exception:
            return self._tried(owned, partition, record)

        for command in due(commands, self._policy):
            before = self._store.outcome(owned.place, command.id) or Outcome()
            for step in steps(
                command, before, parked, self._policy, handle, lambda at, item: item.record(owned.place, at)
            ):
                failpoint("sink.before_release")
                released = step.done is not None and step.done.released
                self._write(owned, partition, self._change(owned, step, parked), Applied(int(released), 0, 1))
            owned.parked = self._load_parked(owned.place)

    def _tried(self, owned: _Owned, partition: TopicPartition, record: Record) -> list[tuple[bytes, ...]] | Exception:
        """The effects of a parked record, looked at by the server; or what is still wrong with it."""
        item = self._decode(record)
        if item.error is not None:
            return item.error
        try:
            effects = self._handle([item])
            look = Change(owned.epoch, owned.next_offset, owned.next_offset, effects=effects)
            word, *rest = self._store.look(owned.place, look)
            if word != "ok":
                self._refused(owned, partition, word, rest)
        except _Poison as poison:
            return poison.error
        return effects

    def _change(self, owned: _Owned, step: Step, parked: dict[int, ParkedRecord]) -> Change:
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


def _cause(error: Exception) -> Cause | None:
    """What was noted and cannot be done is the record's fault, as a database's constraint is."""
    return Cause.DATA if isinstance(error, EffectRefused) else None


def _data_gone(place: Place, log_start: int, is_known: bool) -> Stop:
    key = place.key("position").decode()
    if is_known:
        why = (
            f"the sink's position ({key}) is gone, so Valkey lost data (FLUSHALL, a fail-over to an empty replica, "
            "eviction) and nobody knows what else. To build everything anew: delete what is left of the sink's keys, "
            "and start the workers again; they read the topic from its beginning."
        )
    else:
        why = (
            f"there is no position ({key}), and the log begins at offset {log_start}. Either the sink is new, or "
            "Valkey lost its data, and then what was made of the records before cannot be made again."
        )
    if log_start or not is_known:
        why += f" To begin at the start of the log: valkey-cli SET semel:accept_start:{place.sink} yes EX 600"
    return Stop(StopReason.DATA_GAP, why)


def _torn(place: Place, text: str) -> Stop:
    return Stop(
        StopReason.EFFECTS_TORN,
        f"a command failed in the middle of a script, and Valkey undoes nothing: {text}. Mend the cause (a right that "
        "is missing, above all), put right by hand or build anew what those commands changed, and then: "
        f"valkey-cli HDEL {place.key('position').decode()} torn",
    )


def _recreated(place: Place, claim: Claim, old_id: str, next_offset: str) -> Stop:
    return Stop(
        StopReason.TOPIC_RECREATED,
        f"the sink was at offset {next_offset} of topic id {old_id}, but topic {place.topic} now has id "
        f"{claim.topic_id}: it was deleted and made again. If the new topic is to be read from its start, delete "
        f"{place.key('position').decode()}; if the old records are in it once more, they would be applied twice.",
    )

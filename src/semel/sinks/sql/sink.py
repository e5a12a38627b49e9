"""The SQL sink: a batch's effects, its parked records and its positions in one database transaction.

The order inside: the positions first, which is the fence (a zombie fails before it does work); then the handler; then
the parked records; then COMMIT. A COMMIT without an answer is settled by reading the rows before anything else.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import repeat
from typing import Any, TypeVar

from semel import history
from semel.databases.database import Cause, Database, is_missing_table, open_database, without_password
from semel.databases.processes import ProcessIdentity, end_stopped
from semel.env import Env
from semel.errors import ConfigurationError, OutcomeUnknown, Retriable
from semel.failpoints import failpoint
from semel.processing.parklog import ParkPolicy
from semel.processing.shortage import Shortages
from semel.sinks.contract import Applied, Claim, PartitionsLost, Slice, Stop, Unavailable, total
from semel.sinks.dedup import Unprovable
from semel.sinks.spec import SinkSpec
from semel.sinks.sql import positions
from semel.sinks.sql.audit import Audit, Given
from semel.sinks.sql.dedup import Conflict, guard_of
from semel.sinks.sql.effects import Effects
from semel.sinks.sql.judgement import Judgement, Poison, Undecided
from semel.sinks.sql.moves import Item, Move, Owned, all_stay, parts_of
from semel.sinks.sql.parking import Parked, Parking, load_parked
from semel.sinks.sql.positions import PositionKey, PositionRow
from semel.sinks.sql.release import RELEASE_RECORDS_MAX, Released, carry_out, for_this_build, is_asked
from semel.sinks.sql.tables import check_tables, migrate_connected, schema_sql
from semel.types import Record, TopicPartition

__all__ = ["SqlSink"]

log = logging.getLogger("semel.sinks")

T = TypeVar("T")

CONFLICT_TRIES = 5
"""Deadlocks and serialization failures are tried again at once this often, then the batch waits a while."""


_Work = Callable[[Parking, Sequence[Move]], None]


class SqlSink:
    """`semel.sinks.contract.Sink` for SQLite, PostgreSQL and MariaDB.

    All calls come from one thread, as SQLite demands. `create_tables` makes what is missing; without it `open` says
    how to. `owner` goes into the position rows beside the identity of this process.
    """

    def __init__(
        self,
        spec: SinkSpec,
        identity: str,
        cluster_id: str,
        *,
        env: Env,
        create_tables: bool,
        owner: str = "",
        database: Database | None = None,
        policy: ParkPolicy | None = None,
    ) -> None:
        self._policy = policy or ParkPolicy()
        self._spec = spec
        self._identity = identity
        self._cluster_id = cluster_id
        self._env = env
        self._create_tables = create_tables
        self._owner = f"semel {owner} {ProcessIdentity.current()}"
        self._database = database or open_database(spec.database.url)
        self._owned: dict[TopicPartition, Owned] = {}
        self._doubt: tuple[Sequence[Move], Parking, Audit | None] | None = None
        self._owing: list[Move] = []
        """With `at-most-once`: records behind the positions whose effects are still to be written."""
        self._guard = guard_of(spec.dedup, identity, env.wall_ms)
        self._judgement = Judgement(env, self._database.driver_cause)
        self._shortages = Shortages(env.monotonic)
        self._is_audited = history.on()
        self._audit: Audit | None = None
        """The ledger of the transaction in hand."""

    def __repr__(self) -> str:
        doubt = ", outcome of the last COMMIT unknown" if self._doubt else ""
        return f"<SqlSink {self._identity} {len(self._owned)} partitions, {self._database!r}{doubt}>"

    def open(self) -> None:
        """Connect, and make or check the tables."""
        try:
            self._database.connect()
            self._prepare()
        except ConfigurationError:
            raise
        except Exception as error:
            if self._database.cause(error) is not Cause.LOCKED or not self._end_stopped_writer():
                raise self._unavailable(error) from error
            raise Unavailable("the process that had locked the database was ended; trying again") from error

    def _prepare(self) -> None:
        guard = self._guard
        if self._create_tables:
            migrate_connected(self._database, schema_sql(self._database.title, audit=self._is_audited))
            if self._spec.database.schema:
                migrate_connected(self._database, self._spec.database.schema)
        else:
            check_tables(self._database, audit=self._is_audited, more=guard.tables if guard else ())
        if guard is not None:
            guard.open(self._database)

    def close(self) -> None:
        """Close the connection; what was open is rolled back."""
        self.release([move.partition for move in self._owing])
        self._database.close()

    def position(self, partition: TopicPartition) -> int | None:
        """The next offset of a partition that is ours."""
        owned = self._owned.get(partition)
        return None if owned is None else owned.next_offset

    def parked_keys(self, partition: TopicPartition) -> int:
        """How many keys of a partition that is ours are parked."""
        owned = self._owned.get(partition)
        return 0 if owned is None else len(owned.parked.keys)

    def release(self, partitions: Iterable[TopicPartition]) -> None:
        """Forget partitions, and with `at-most-once` what is owed of them."""
        for partition in partitions:
            self._owned.pop(partition, None)
            for move in [move for move in self._owing if move.partition == partition]:
                self._owing.remove(move)
                log.error(
                    "%s: %s is given away after its position was written: the effects of %d records from offset %d "
                    "are lost (delivery at-most-once)",
                    self._identity, partition, len(move.items), move.items[0].record.offset,
                )  # fmt: skip

    # Taking over.

    def take_over(self, claims: Sequence[Claim]) -> dict[TopicPartition, int | Stop]:
        """Raise the epochs and COMMIT; a process that is stopped with SQLite's write lock in hand is ended for that."""
        self._connect()
        self.release(claim.partition for claim in claims)
        taken = self._insist_on(claims)
        answers: dict[TopicPartition, int | Stop] = {}
        for claim, (row, parked) in taken.items():
            if isinstance(row, Stop):
                answers[claim.partition] = row
                continue
            self._owned[claim.partition] = Owned(self._key(claim), row.next_offset, row.owner_epoch, parked)
            answers[claim.partition] = row.next_offset
        return answers

    def _insist_on(self, claims: Sequence[Claim]) -> dict[Claim, tuple[PositionRow | Stop, Parked]]:
        for attempt in range(CONFLICT_TRIES):
            try:
                return self._take_over(claims)
            except Exception as error:
                cause = self._database.cause(error)
                if cause is Cause.CONFLICT:
                    self._step_aside(attempt)
                elif cause is not Cause.LOCKED or not self._end_stopped_writer():
                    raise self._unavailable(error) from error
        raise Unavailable(f"{CONFLICT_TRIES} times in a row somebody else was in the way of taking over.")

    def _take_over(self, claims: Sequence[Claim]) -> dict[Claim, tuple[PositionRow | Stop, Parked]]:
        database = self._database
        try:
            database.begin()
            rows = positions.take_over(database, self._identity, self._cluster_id, claims, self._owner)
            parked = {claim: load_parked(database, self._key(claim)) for claim in rows}
            failpoint("sink.before_fence_commit")
            database.commit()
        finally:
            database.rollback()
        return {claim: (row, parked[claim]) for claim, row in rows.items()}

    def _end_stopped_writer(self) -> bool:
        """End the process that holds SQLite's write lock, if it is stopped and owns rows here; whether it was ended."""
        holder = self._database.write_lock_holder()
        if holder is None or not end_stopped(holder, self._owners()):
            return False
        log.warning(
            "process %d was stopped while it held the write lock of %s, so nobody could write: killed it. Its "
            "unfinished transaction is rolled back, and its partitions are being taken over.",
            holder,
            self._database.url,
        )
        return True

    def _owners(self) -> set[str]:
        try:
            return positions.owners(self._database)
        except Exception as error:
            if is_missing_table(error):
                return set()
            raise self._unavailable(error) from error

    def _key(self, claim: Claim) -> PositionKey:
        return PositionKey(self._identity, self._cluster_id, str(claim.topic_id), claim.partition.partition)

    # Applying.

    def apply(self, slices: Sequence[Slice]) -> Applied:
        """One transaction for all slices; where a record is at fault, one more that finds and parks it."""
        self._connect()
        done = [self._settle(), self._pay()]
        moves = self._moves(slices)
        if moves and self._spec.delivery == "at-most-once":
            done.append(self._move(moves))
            done.append(self._pay())
        elif moves:
            done.append(self._apply(moves))
        return total(done)

    def _move(self, moves: Sequence[Move]) -> Applied:
        """With `at-most-once`: write the positions, and owe the effects."""

        def attempt() -> Applied:
            self._audit = None
            return self._commit(moves, self._filled(moves, lambda *_: None))

        return self._undisturbed(attempt)

    def _pay(self) -> Applied:
        """With `at-most-once`: the effects of records that the positions are behind already, each of them once at most.

        What was not tried, or failed for certain, is still owed after an error; what may have been committed is not.
        """
        return self._apply(self._owing) if self._owing else Applied()

    def _moves(self, slices: Sequence[Slice]) -> list[Move]:
        """What is still to be done of the slices, in (topic id, partition) order so that owners cannot deadlock."""
        moves = []
        for partition, records, end, views in slices:
            owned = self._owned.get(partition)
            if owned is None or end <= owned.next_offset:
                continue
            if records and records[0].offset < owned.next_offset:
                records, views = [record for record in records if record.offset >= owned.next_offset], None
            items = self._decode_all(records, views)
            moves.append(Move(partition, owned.key, owned.owner_epoch, owned.next_offset, end, items))
        return sorted(moves, key=lambda move: move.key)

    def _decode_all(self, records: Sequence[Record], views: Sequence[Any] | None) -> list[Item]:
        guard = self._guard
        try:
            views = self._spec.topic.decode_all(records) if views is None else views
            marks = map(guard.mark, records, views) if guard is not None else repeat(None)
            return list(map(tuple.__new__, repeat(Item), zip(records, views, repeat(None), marks)))
        except Exception:  # One of them is at fault, or a schema registry is away.
            return [self._decode(record) for record in records]

    def _decode(self, record: Record) -> Item:
        try:
            view = self._spec.topic.decode(record)
            return Item(record, view, None, self._guard.mark(record, view) if self._guard else None)
        except Retriable as error:  # A schema registry that is away.
            raise Unavailable(str(error)) from error
        except Exception as error:  # Whatever else the decoder raises is this record's fault.
            return Item(record, None, error)

    def _apply(self, moves: Sequence[Move]) -> Applied:
        """Together; else one by one in one transaction; else, when only COMMIT tells, in one transaction each.

        N bad records cost at most two calls of the handler each, in the last case three. Where nobody can say whether a
        record is bad, what is before it is applied, and `Unavailable` is raised for the rest.
        """
        try:
            if not self._judgement.is_outage:
                return self._transaction(moves, self._together)
        except Poison as poison:
            log.info("%s: a batch failed and is tried record by record: %s", self._identity, poison)
        try:
            return self._transaction(moves, self._one_by_one)
        except Undecided as undecided:
            before = [part for move in moves if (part := move.up_to(undecided.offsets.get(move.partition)))]
            with suppress(Undecided, Poison):
                if before:
                    self._transaction(before, partial(self._one_by_one, is_evidence=False))
            raise Unavailable(f"{self._identity}: the handler failed: {undecided}") from undecided
        except Poison as poison:
            log.info("%s: the batch failed again and gets a transaction for each record: %s", self._identity, poison)
        return total([self._apply_single(single) for move in moves for single in move.singles()])

    def _apply_single(self, move: Move) -> Applied:
        try:
            return self._transaction([move], self._one_by_one)
        except Undecided as undecided:
            raise Unavailable(f"{self._identity}: the handler failed: {undecided}") from undecided
        except Poison as poison:
            (item,) = move.items
            return self._transaction([replace(move, items=(item._replace(error=poison.error),))], self._together)

    def _transaction(self, moves: Sequence[Move], work: _Work) -> Applied:
        return self._undisturbed(lambda: self._attempt(moves, work))

    def _undisturbed(self, transaction: Callable[[], Applied]) -> Applied:
        """Try again while others are in the way."""
        for attempt in range(CONFLICT_TRIES):
            try:
                return transaction()
            except Conflict as conflict:
                log.debug("%s: %s; trying again", self._identity, conflict)
                self._step_aside(attempt)
        raise Unavailable(f"{CONFLICT_TRIES} transactions in a row met others (deadlock or serialization failure).")

    def _step_aside(self, attempt: int) -> None:
        """Wait a moment of random length, so as not to meet the same transaction again."""
        time.sleep(self._env.rng.random() * 0.01 * 2**attempt)

    def _attempt(self, moves: Sequence[Move], work: _Work) -> Applied:
        """One transaction. With `at-least-once` the effects are committed first and the position in a second one, which
        also parks: a record is parked once, whatever happens to the effects."""
        self._audit = Audit(self._identity) if self._is_audited else None
        guard = self._guard
        if guard is not None:
            self._read(lambda: guard.prepare(self._database))

        def park(parking: Parking, moves: Sequence[Move]) -> None:
            failpoint("sink.before_park")
            parking.write(self._database, {move.partition: move.key for move in moves}, self._env.wall_ms())

        if self._spec.delivery == "at-least-once" and not all_stay(moves):
            parking = self._filled([replace(move, stays_at=move.from_offset) for move in moves], work)
            self._commit_effects(moves, parking)
            self._filled(moves, park, parking)
        else:

            def both(parking: Parking, moves: Sequence[Move]) -> None:
                work(parking, moves)
                park(parking, moves)

            parking = self._filled(moves, both)
        return self._commit(moves, parking)

    def _filled(self, moves: Sequence[Move], work: _Work, parking: Parking | None = None) -> Parking:
        """A transaction that is ready for COMMIT: the fence first, then the work. What it parks goes to `parking`."""
        database = self._database
        failpoint("sink.before_begin")
        try:
            database.begin()
            failpoint("sink.before_advance")
            self._advance(moves)
            failpoint("sink.before_effects")
            parking = self._parking(moves) if parking is None else parking
            work(parking, moves)
            failpoint("sink.before_db_commit")
        except Exception as error:
            database.rollback()
            raise self._translated(error) from error
        return parking

    def _commit_effects(self, moves: Sequence[Move], parking: Parking) -> None:
        """The first step of `at-least-once`: where nobody knows how it ended, it is done again."""
        if self._audit is not None:
            self._audit.begin(parts_of(moves, parking, self._audit))
        try:
            self._database.commit()
        except OutcomeUnknown as error:
            raise Unavailable(f"{error}. Its effects will be written again (delivery at-least-once).") from error
        except Exception as error:
            self._database.rollback()
            raise self._translated(error) from error

    def _advance(self, moves: Sequence[Move]) -> None:
        lost: dict[TopicPartition, str] = {}
        for move in moves:
            stays = move.stays_at
            if not positions.advance(
                self._database,
                move.key,
                owner_epoch=move.owner_epoch,
                from_offset=move.from_offset if stays is None else stays,
                to_offset=move.to_offset if stays is None else stays,
                records=len(move.items) if stays is None else 0,
            ):
                lost[move.partition] = self._why_lost(move, positions.read(self._database, move.key))
        if lost:
            self.release(lost)
            raise PartitionsLost(lost)

    def _why_lost(self, move: Move, row: PositionRow | None) -> str:
        what = f"{self._identity}: {move.partition}"
        if row is None:
            return f"{what}: its row in semel_position is gone."
        if row.owner_epoch > move.owner_epoch:
            return f"{what} was taken over by {row.owner} (owner epoch {row.owner_epoch}, ours was {move.owner_epoch})."
        return (
            f"{what}: the row says offset {row.next_offset} in owner epoch {row.owner_epoch}, we had written "
            f"{move.from_offset} in {move.owner_epoch}: the database was set back, as by restoring a backup."
        )

    def _parking(self, moves: Sequence[Move]) -> Parking:
        """What is parked of these partitions; read again where it matters, since an operator may have emptied it."""
        for move in moves:
            owned = self._owned[move.partition]
            if owned.parked.keys and any(item.record.key in owned.parked.keys for item in move.items):
                owned.parked = load_parked(self._database, move.key)
        return Parking(
            {move.partition: self._owned[move.partition].parked for move in moves},
            keys_max=self._spec.max_parked_keys,
            records_max=self._spec.max_parked_records,
            build=self._policy.build,
        )

    def _together(self, parking: Parking, moves: Sequence[Move]) -> None:
        items: list[Item] = []
        for move in moves:
            if not parking.has_keys(move.partition) and all(item.error is None for item in move.items):
                items += move.items
                continue
            for item in move.items:
                if parking.blocks(item.record):
                    parking.add(item.record, None)
                elif item.error is not None:
                    parking.add(item.record, item.error)
                else:
                    items.append(item)
        items = self._admit(items, parking)
        if items:
            self._handle(items)

    def _admit(self, items: list[Item], parking: Parking) -> list[Item]:
        """Those that are not known yet; the others are passed over, and their effects are in the database already."""
        if self._guard is None or not items:
            return items
        news = self._guard.admit(self._database, [item.mark for item in items])
        copies = [item.record for item, is_new in zip(items, news, strict=True) if not is_new]
        parking.copies += len(copies)
        if copies and self._audit is not None:
            self._audit.passed_over(self._database, copies)
        return [item for item, is_new in zip(items, news, strict=True) if is_new]

    def _one_by_one(self, parking: Parking, moves: Sequence[Move], *, is_evidence: bool = True) -> None:
        """Each record in a savepoint. Raises `Undecided`, after it has looked how others fare, and then all is undone.

        What succeeded a moment ago and is done again `is_evidence` of nothing.
        """
        self._database.check_constraints_now()
        undecided: dict[TopicPartition, int] = {}
        held: set[tuple[TopicPartition, bytes | None]] = set()
        last: Exception | None = None
        for move in moves:
            for item in move.items:
                error, lane = item.error, (move.partition, item.record.key)
                if parking.blocks(item.record):
                    parking.add(item.record, None)
                    continue
                if lane in held:
                    continue
                if error is None:
                    error = self._handle_one(item, parking)
                if error is None:
                    if is_evidence:
                        self._judgement.succeeded()
                elif item.error is None and not self._judgement.is_the_records(item.record, error):
                    undecided.setdefault(move.partition, item.record.offset)
                    held.add(lane)
                    last = error
                    if self._judgement.is_outage:
                        # What was not looked at is not tried, either.
                        for other in moves:
                            undecided.setdefault(other.partition, other.from_offset)
                        raise Undecided(undecided, error)
                else:
                    log.warning("%s: %s-%d offset %d is parked: %s: %s", self._identity, *item.record[:3],
                                type(error).__name__, error)  # fmt: skip
                    parking.add(item.record, error)
        if last is not None:
            raise Undecided(undecided, last)

    def _handle_one(self, item: Item, parking: Parking | None) -> Exception | None:
        """Run the handler on one record inside a savepoint; the error for which the record is to be parked.

        Without `parking` it is not asked whether the record is a copy.
        """
        database = self._database
        database.execute("SAVEPOINT semel_record")
        try:
            if parking is None or self._admit([item], parking):
                self._handle([item])
        except Poison as poison:
            if not database.in_transaction:
                raise
            database.execute("ROLLBACK TO SAVEPOINT semel_record")
            database.execute("RELEASE SAVEPOINT semel_record")
            return poison.error
        database.execute("RELEASE SAVEPOINT semel_record")
        return None

    def _handle(self, items: Sequence[Item]) -> None:
        """Call the handler; raises `Poison` when the data is at fault, `Conflict` and `Unavailable` when not."""
        effects = Effects(self._database)
        with self._audited(items):
            try:
                self._spec.handler([item.view for item in items], effects)
            except Exception as error:
                first = items[0].record
                if self._shortages.may_pass((first.topic, first.partition, first.offset), error):
                    raise Unavailable(f"{self._identity}: the handler found nothing to work with: {error!r}") from error
                raise self._translated(effects.failure or error, by_handler=True) from error
            finally:
                effects.end()
            if effects.failure is not None:
                raise self._translated(effects.failure) from effects.failure

    def _audited(self, items: Sequence[Item]) -> AbstractContextManager[None]:
        """Around a call of the handler: the ledger has what it is given."""
        if self._audit is None:
            return nullcontext()
        offsets: dict[TopicPartition, list[int]] = {}
        for item in items:
            offsets.setdefault(TopicPartition(item.record.topic, item.record.partition), []).append(item.record.offset)
        given = [Given(at, self._owned[at].owner_epoch, numbers) for at, numbers in offsets.items()]
        return self._audit.call(self._database, given)

    # Parked records.

    def carry_out(self) -> Applied:
        """Command after command, a transaction for each step; its position row is in it, as the fence."""
        if self._doubt is None and not any(owned.parked.records for owned in self._owned.values()):
            return Applied()
        self._connect()
        done = self._settle()
        for partition, owned in list(self._owned.items()):
            while owned.parked.records and partition in self._owned:
                if not self._read(lambda: is_asked(self._database, owned.key, self._policy)):  # noqa: B023
                    break
                step = self._carry_out(partition, owned)
                owned.parked = self._read(lambda: load_parked(self._database, owned.key))  # noqa: B023
                if step is None:
                    break
                done = total((done, Applied(records=len(step.released), transactions=1)))
        return done

    def _carry_out(self, partition: TopicPartition, owned: Owned) -> Released | None:
        """One step; where a record fails only at COMMIT, the next record alone; where that fails, it stays parked."""
        try:
            return self._release(partition, owned, RELEASE_RECORDS_MAX, None)
        except Poison as poison:
            log.info("%s: a release failed and goes on record by record: %s", self._identity, poison)
        try:
            return self._release(partition, owned, 1, None)
        except Poison as poison:
            return self._release(partition, owned, 1, poison.error)

    def _release(self, partition: TopicPartition, owned: Owned, limit: int, doom: Exception | None) -> Released | None:
        move = Move(partition, owned.key, owned.owner_epoch, owned.next_offset, owned.next_offset, ())
        done: list[Released | None] = [None]

        def work(parking: Parking, _: Sequence[Move]) -> None:
            def handle(record: Record, assume: bool) -> Exception | None:
                if doom is not None:
                    return doom
                item = self._decode(record)
                if assume and isinstance(item.error, Unprovable):
                    return self._handle_one(Item(record, self._spec.topic.decode(record), None), None)
                return item.error or self._handle_one(item, parking)

            database, now_ms = self._database, self._env.wall_ms()
            database.check_constraints_now()
            failpoint("sink.before_release")
            for_this_build(database, owned.key, self._policy, str(self._env.new_id()), now_ms)
            done[0] = carry_out(database, owned.key, self._policy, handle, now_ms=now_ms, limit=limit)
            if done[0] is not None:
                parking.released = [*done[0].released, *done[0].discarded]

        self._transaction([move], work)
        return done[0]

    def _read(self, query: Callable[[], T]) -> T:
        """A question outside of any transaction."""
        try:
            return query()
        except Exception as error:
            raise self._unavailable(error) from error

    # The end of a transaction.

    def _commit(self, moves: Sequence[Move], parking: Parking) -> Applied:
        audit = self._audit
        self._doubt = (moves, parking, audit)  # Until we know: an exception anywhere below leaves it to be settled.
        try:
            with nullcontext() if audit is None else audit.told(parts_of(moves, parking, audit)):
                self._database.commit()
        except OutcomeUnknown as error:
            raise Unavailable(f"{error}. Whether it was committed will be read from the position rows.") from error
        except Exception as error:
            self._database.rollback()
            self._doubt = None
            raise self._translated(error) from error
        failpoint("sink.after_db_commit")
        return self._accept(moves, parking)

    def _accept(self, moves: Sequence[Move], parking: Parking) -> Applied:
        self._doubt = None
        records = sum(len(move.items) for move in moves)
        for move in moves:
            owned = self._owned.get(move.partition)
            if move.stays_at is not None:
                self._paid(move)
            elif owned is not None and owned.owner_epoch == move.owner_epoch:
                owned.next_offset = move.to_offset
                if self._spec.delivery == "at-most-once" and move.items:
                    self._owing.append(replace(move, stays_at=move.to_offset))
                    records -= len(move.items)
        parking.accept()
        self._judgement.passed(item.record for move in moves for item in move.items)
        return Applied(records, len(parking), 1, parking.copies)

    def _paid(self, move: Move) -> None:
        """The effects up to there are written, or may be: either way not again."""
        rest = [replace(owed, items=[item for item in owed.items if item.record.offset >= move.to_offset])
                if owed.partition == move.partition else owed for owed in self._owing]  # fmt: skip
        self._owing = [owed for owed in rest if owed.items]

    def _settle(self) -> Applied:
        """Find out how the transaction ended whose COMMIT was not answered.

        Reading a row waits for a session that is still committing. Our epoch at the new offset: committed. Our epoch
        at the old one: not. Anything else: not ours any more.
        """
        if self._doubt is None:
            return Applied()
        moves, parking, audit = self._doubt
        failpoint("sink.before_settle")
        ours = [move for move in moves if self._is_current(move)]
        is_owed = any(move.stays_at is not None for move in moves)
        try:
            self._database.begin()
            rows = [positions.read(self._database, move.key, lock=True) for move in ours]
        except Exception as error:
            raise self._unavailable(error) from error
        finally:
            self._database.rollback()
        failpoint("sink.after_settle")
        lost: dict[TopicPartition, str] = {}
        committed = []
        for move, row in zip(ours, rows, strict=True):
            if row is None or row.owner_epoch != move.owner_epoch:
                lost[move.partition] = self._why_lost(move, row)
            elif move.stays_at is not None:
                self._paid(move)
                self._owned[move.partition].parked = self._read(lambda: load_parked(self._database, move.key))  # noqa: B023
            elif row.next_offset == move.to_offset:
                committed.append(move)
            elif row.next_offset != move.from_offset:
                lost[move.partition] = self._why_lost(move, row)
        said = "carried out" if committed else "lost with its owner" if lost else "not carried out"
        if is_owed and not lost:
            said = "perhaps carried out: its effects are not written again (delivery at-most-once)"
        log.warning(
            "%s: the unanswered COMMIT of %s was %s",
            self._identity,
            ", ".join(f"{move.partition} {move.from_offset}..{move.to_offset}" for move in moves),
            said,
        )
        self._doubt = None
        # A release moves no position: whether it was committed is seen in what is still asked for, and told by nobody.
        is_release = all(move.from_offset == move.to_offset for move in moves)
        if audit is not None and len(lost) < len(ours) and not (is_release or is_owed):
            audit.end("ok" if committed else "fail")
        self.release(lost)
        settled = self._accept(committed, parking) if committed and not is_release else Applied()
        if lost:
            raise PartitionsLost(lost)
        return settled

    def _is_current(self, move: Move) -> bool:
        owned = self._owned.get(move.partition)
        return owned is not None and owned.owner_epoch == move.owner_epoch

    # Errors.

    def _connect(self) -> None:
        """What was right when we opened is only away now, so even a folder that is gone is waited for."""
        if not self._database.connected:
            try:
                self._database.connect()
                if self._guard is not None:
                    self._guard.forget()
            except Exception as error:
                raise self._unavailable(error) from error

    def _translated(self, error: Exception, *, by_handler: bool = False) -> Exception:
        """What an exception inside a transaction means for the batch; one of our own stays as it is."""
        cause = self._database.cause(error) if by_handler else self._database.driver_cause(error)
        if cause is None:
            return error
        if cause is Cause.CONFLICT:
            return Conflict(str(error))
        if cause is Cause.DATA:
            return Poison(error)
        return self._unavailable(error)

    def _unavailable(self, error: Exception) -> Unavailable:
        if isinstance(error, Unavailable):
            return error
        if self._database.driver_cause(error) is Cause.INFRASTRUCTURE:
            self._database.close()  # The next call starts from a fresh connection.
        text = " ".join(str(error).split())
        return Unavailable(f"{without_password(self._database.url)}: {type(error).__name__}: {text}")

"""The transactional producer as a state machine. Sans-IO: it says what to send next and is told what came of it.

The shell (`client/producer.py`) asks `next_request()` and `take_batches()`, writes what they give, and reports every
copy exactly once: its answer, or `unanswered` (written, no answer), or `not_sent`. Nothing is ever assumed.

Two protocols, chosen by the finalized feature transaction.version:

* V2 (KIP-890): Produce v12 and TxnOffsetCommit v5 add partitions implicitly; EndTxn v5 raises the epoch with every
  transaction, so a late copy of anything is refused by the broker.
* V1: AddPartitionsToTxn and AddOffsetsToTxn first; the epoch stays. A late copy of EndTxn would end the next
  transaction (KAFKA-17754). So once any copy of any request of a transaction went unanswered, even if a retry was
  answered, EndTxn is repeated until it is answered and InitProducerId raises the epoch before the next transaction.

A commit is asked for only when every batch and every offset was acknowledged: what could not be delivered makes the
transaction abortable, never shorter (librdkafka #3575, dotnet#1568).

Two-phase commit (KIP-939, V2 only): `prepare` closes the transaction to further writes and names it; whoever holds that
name says later how it ends. A producer that takes over with `keep_prepared` gets the predecessor's transaction in the
same state.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import replace

from semel.client.batches import Batch, Identity, Lane
from semel.client.reactions import Reaction, reaction_to
from semel.client.transaction_state import MOVES, Kind, Request, State, TransactionView
from semel.client.two_phase import NO_TIMEOUT_MS, NOTHING_PREPARED, PreparedState, TwoPhaseMode
from semel.errors import (
    AbortTransaction,
    ConfigurationError,
    ErrorCode,
    Fatal,
    Fenced,
    OutcomeUnknown,
    SemelError,
    TwoPhaseCommitUnavailable,
    kafka_error,
)
from semel.types import GroupMetadata, TopicPartition

__all__ = ["TransactionProtocol"]


_OPEN = (State.InTransaction, State.Prepared)
_NOTHING_DECIDED = (ErrorCode.COORDINATOR_LOAD_IN_PROGRESS, ErrorCode.CONCURRENT_TRANSACTIONS)
"""EndTxn was refused before anything was written. Any other code that is to be tried again may follow a decision
that is in the transaction log and could not be synced or replicated; who reads that log back carries it out."""
_NO_TWO_PHASE = (ErrorCode.TRANSACTIONAL_ID_AUTHORIZATION_FAILED, ErrorCode.UNSUPPORTED_VERSION)


class TransactionProtocol:
    """One transactional id's producer. Times are the caller's, in seconds; nothing here reads a clock."""

    def __init__(
        self, transactional_id: str, *, max_in_flight: int = 5, two_phase: bool = False, times_out: bool = False
    ) -> None:
        self.transactional_id = transactional_id
        self.two_phase = two_phase
        """Whether transactions are open until they are told how to end."""
        self.prepares = two_phase or times_out
        """Whether they may be prepared: also where they time out, when whoever decides knows that and is in time."""
        self.prepared = NOTHING_PREPARED
        """The name of the prepared transaction, until its end was answered."""
        self.state = State.Uninitialized
        self.identity = Identity()
        self.transaction_version = 0
        self.failure: SemelError | None = None
        """Why the transaction cannot be committed, or why nothing can be done any more."""
        self.needs_init = False
        """InitProducerId comes before anything else is written."""
        self._lanes: dict[TopicPartition, Lane] = {}
        self._max_in_flight = max_in_flight
        self._added: set[TopicPartition] = set()
        self._offsets: dict[GroupMetadata, dict[TopicPartition, int]] = {}
        self._groups_added: set[str] = set()
        self._busy: Request | None = None
        self._produces_in_flight = 0
        self._started = False
        self._unanswered = False
        self._sequence_gap = False
        self._end_in_doubt = False
        self._commit = False
        self._was_aborting = False
        self._keep = False
        self._took_over = False

    def __repr__(self) -> str:
        flags = [name for name in ("needs_init",) if getattr(self, name)]
        flags += ["unanswered"] if self._unanswered else []
        more = f" {' '.join(flags)}" if flags else ""
        return f"<Transaction {self.transactional_id!r} {self.identity} [{self.state}] V{self.protocol}{more}>"

    @property
    def protocol(self) -> int:
        """1 or 2: which of the two protocols the open transaction speaks."""
        return 2 if self.transaction_version >= 2 else 1

    # --- What the caller wants ---

    def initialize(self, transaction_version: int, *, keep_prepared: bool = False) -> None:
        """Get an identity, and with it the end of whatever was open under this id.

        The first call takes the id over from any predecessor; with `keep_prepared` its open transaction is not ended
        but becomes ours, prepared. Later calls keep our identity, so that a newer owner is not thrown out: an EndTxn
        without an answer is repeated first, an open transaction is aborted. A prepared one is only ended by `complete`
        or `end`.
        """
        if self.state in (State.Fenced, State.Prepared):
            raise self.error()
        self._check_version(transaction_version)
        self._keep = keep_prepared
        if self.state is State.Unknown:
            self._move(State.Committing if self._commit else State.Aborting)
        elif self.state in (State.InTransaction, State.Abortable):
            self.end(commit=False)
        elif self.state is State.Failed:
            self._reset()
            self._move(State.Uninitialized)
            self.identity, self.failure, self.needs_init = Identity(), None, True
            self.transaction_version = transaction_version
        elif self.state is State.Uninitialized:
            self.needs_init = True
            self.transaction_version = transaction_version

    def begin(self, transaction_version: int) -> None:
        """Open a transaction, here only. `transaction_version` is the cluster's finalized feature."""
        if self.state is not State.Ready:
            raise self.error()
        self._check_version(transaction_version)
        if (transaction_version >= 2) != (self.transaction_version >= 2):
            self.needs_init = True  # An epoch must not be used by both protocols (Java does the same).
        self.transaction_version = transaction_version
        self._took_over = False
        self._move(State.InTransaction)

    def _check_version(self, transaction_version: int) -> None:
        if self.prepares and transaction_version < 2:
            raise TwoPhaseCommitUnavailable(
                f"transactional id {self.transactional_id!r} cannot have two-phase commit. "
                f"{TwoPhaseMode.TRANSACTIONS_V1.meaning}"
            )

    def produce(self, batch: Batch) -> None:
        """Queue a batch. Raises what makes the transaction uncommittable, if anything does."""
        if self.state is not State.InTransaction:
            raise self.error()
        lane = self._lanes.get(batch.partition)
        if lane is None:
            lane = self._lanes[batch.partition] = Lane(self._max_in_flight)
        lane.add(batch)

    def send_offsets(self, offsets: Mapping[TopicPartition, int], group: GroupMetadata) -> None:
        """Queue offsets (the next to read) of a group; they become visible with the commit."""
        if self.state is not State.InTransaction:
            raise self.error()
        if offsets:
            self._offsets.setdefault(group, {}).update(offsets)

    def prepare(self) -> PreparedState:
        """Close the open transaction to further writes; the name by which `complete` knows it.

        Everything must be acknowledged. A transaction to which nothing was written has no name: the broker does not
        know it and its identity goes on to the next one, so a database must not remember it as decided.
        """
        if not self.prepares:
            raise ConfigurationError(
                f"the producer of transactional id {self.transactional_id!r} has no two-phase commit: its transaction "
                "times out, so it cannot be prepared. Make it with two_phase_commit=True."
            )
        if self.state is not State.InTransaction or not self.is_delivered:
            raise self.error()
        self.prepared = PreparedState(*self.identity) if self._started else NOTHING_PREPARED
        self._move(State.Prepared)
        return self.prepared

    def complete(self, decided: PreparedState) -> bool:
        """Ask for the end that the database decided: commit if it remembers this transaction, abort if another.

        False when nothing is prepared because the predecessor left nothing open: then there is nothing to do.
        """
        if self._took_over and self.state is State.Ready:
            return False
        if self.state is not State.Prepared:
            raise self.error()
        self.end(commit=decided == self.prepared)
        return True

    def end(self, *, commit: bool) -> None:
        """Ask for the end. A commit waits until everything is acknowledged; an abort drops what was not sent."""
        allowed = {State.InTransaction, State.Prepared} if commit else {*_OPEN, State.Abortable}
        if self.state not in allowed:
            raise self.error()
        self._commit = commit
        self._end_in_doubt = False
        self._move(State.Committing if commit else State.Aborting)
        if not commit:
            self.failure = None
            self._drop_unsent()
        self._settle()

    def give_up(self, waited: float) -> SemelError:
        """The caller's patience ended while EndTxn had no answer that decides; returns what to raise."""
        what = "commit" if self._commit else "abort"
        never_asked = not self._end_in_doubt and not self._is_busy_with(Kind.EndTxn)
        if self.state is State.Committing and never_asked and not self.prepared.is_transaction:
            left = next(iter(self.batches()), None)
            reason = f"; records for {left.partition} were not delivered ({left.reason})" if left else ""
            self._fail(f"not everything was acknowledged within {waited:g} s{reason}")
        if self.state in (State.Committing, State.Aborting):
            self._unanswered = True
            self._move(State.Unknown)
            return OutcomeUnknown(
                f"the {what} of transaction {self.transactional_id!r} ({self.identity}) was not answered within "
                f"{waited:g} s: it may have happened. Call init_transactions(), then go on from the committed offsets."
            )
        return self.error()

    def error(self) -> SemelError:
        """What to raise for a call that this state does not allow."""
        if self.failure is not None:
            return self.failure
        if self.state is State.Unknown:
            return OutcomeUnknown(
                f"the end of transaction {self.transactional_id!r} has no answer yet. Call init_transactions() first."
            )
        if self.state is State.Prepared:
            return Fatal(
                f"transaction {self.transactional_id!r} ({self.prepared}) is prepared: it takes no more records. Call "
                "complete() with what the database holds."
            )
        return Fatal(f"the producer of transactional id {self.transactional_id!r} is {self.state}: wrong call order.")

    # --- What to send ---

    @property
    def is_delivered(self) -> bool:
        """Whether every batch and offset handed over was acknowledged."""
        return not self._offsets and not any(lane.batches for lane in self._lanes.values())

    @property
    def is_idle(self) -> bool:
        """Whether the last `initialize` or `end` came to its end."""
        return self.state in (State.Ready, State.Prepared, State.Abortable, State.Fenced, State.Failed)

    def batches(self) -> Iterable[Batch]:
        """Every batch that is not known to be written."""
        for lane in self._lanes.values():
            yield from lane.batches

    def next_request(self) -> Request | None:
        """The next request to a coordinator; one is out at a time. Report its outcome before asking again."""
        if self._busy is not None:
            return None
        request = self._choose()
        if request is not None:
            self._busy = request
            transactional = request.kind not in (Kind.InitProducerId, Kind.DescribeTransactions)
            self._started = self._started or transactional
        return request

    def _choose(self) -> Request | None:
        if self.state is State.Suspect:
            return self._request(Kind.DescribeTransactions)
        if self.state in (State.Committing, State.Aborting) and self._may_end():
            return self._request(Kind.EndTxn, commit=self._commit)
        if self.needs_init and self.state in (State.Uninitialized, State.Ready, State.InTransaction, State.Committing):
            if self._produces_in_flight:
                return None  # Of a transaction that failed: their answers are for the old identity.
            request = self._request(Kind.InitProducerId)
            first = self.identity == Identity()
            return replace(request, two_phase=self.two_phase, keep_prepared=first and self._keep)
        if self.state not in (State.InTransaction, State.Committing):
            return None
        if self.protocol == 1:
            waiting = frozenset(key for key, lane in self._lanes.items() if lane.batches and key not in self._added)
            if waiting:
                return self._request(Kind.AddPartitionsToTxn, partitions=waiting)
        for group, offsets in self._offsets.items():
            if self.protocol == 1 and group.group_id not in self._groups_added:
                return self._request(Kind.AddOffsetsToTxn, group=group)
            return self._request(Kind.TxnOffsetCommit, group=group, offsets=dict(offsets))
        return None

    def _may_end(self) -> bool:
        return self._started and self._produces_in_flight == 0 and (not self._commit or self.is_delivered)

    def _request(
        self,
        kind: Kind,
        *,
        partitions: frozenset[TopicPartition] = frozenset(),
        group: GroupMetadata | None = None,
        offsets: Mapping[TopicPartition, int] | None = None,
        commit: bool = False,
    ) -> Request:
        return Request(kind, self.identity, self.protocol, partitions, group, offsets or {}, commit)

    def sendable(self) -> list[TopicPartition]:
        """Partitions with queued batches that may be written now."""
        if self.needs_init or self.state not in (State.InTransaction, State.Committing):
            return []
        return [
            key
            for key, lane in self._lanes.items()
            if len(lane.batches) > lane.in_flight and (self.protocol == 2 or key in self._added)
        ]

    def take_batch(self, partition: TopicPartition, node: Hashable) -> Batch | None:
        """The partition's next batch for a Produce request to `node`, stamped and counted as in flight; or None."""
        lane = self._lanes[partition]
        batch = lane.peek(node)
        if batch is not None:
            lane.send(batch, node, self.identity)
            self._started = True
            self._produces_in_flight += 1
        return batch

    # --- What came of it ---

    def batch_answered(self, batch: Batch, code: int, message: str = "") -> Reaction:
        """A Produce answer for one batch."""
        self._produces_in_flight -= 1
        lane = self._lanes[batch.partition]
        reaction = reaction_to(Kind.Produce, code)
        if reaction is Reaction.OUT_OF_ORDER:
            reaction = Reaction.ABORT if lane.is_first(batch) else Reaction.RETRY
        if reaction is Reaction.DONE:
            lane.written(batch)
        else:
            lane.undone(batch, _name(code))
            self._react(reaction, f"Produce to {batch.partition}", code, message)
        if self.state not in (State.InTransaction, State.Committing):
            self._drop_unsent()
        self._settle()
        return reaction

    def batch_unanswered(self, batch: Batch, reason: str) -> None:
        """A Produce request was written and its answer is lost."""
        self._unanswered = True
        self.batch_not_sent(batch, reason, unanswered=True)

    def batch_not_sent(self, batch: Batch, reason: str, *, unanswered: bool = False) -> None:
        """A Produce request could not be written."""
        self._produces_in_flight -= 1
        self._lanes[batch.partition].undone(batch, reason, unanswered=unanswered)
        if self.state not in (State.InTransaction, State.Committing):
            self._drop_unsent()
        self._settle()

    def expire(self, now: float, reason: str = "") -> None:
        """Fail the transaction if a batch is past its deadline and not in flight; `reason` says what held it up."""
        if self.state not in (State.InTransaction, State.Committing):
            return
        for lane in self._lanes.values():
            if lane.batches and not lane.batches[0].in_flight and lane.batches[0].deadline <= now:
                batch = lane.batches[0]
                why = batch.reason if batch.identity is not None or not reason else reason
                self._fail(f"{batch.count} records for {batch.partition} were not delivered in time ({why})")
                return

    def broken(self, request: Request, error: SemelError) -> None:
        """The request can never be written (no common version, no permission): nothing can be done any more."""
        if self._busy is request:
            self._free(request)
        if State.Failed in MOVES[self.state]:
            self.failure = error
            self._move(State.Failed)

    def refused(self, error: SemelError) -> None:
        """Our records have nowhere to go: a topic or our login is refused, which trying again does not change."""
        if isinstance(error, AbortTransaction):
            self._fail(str(error), error.code or 0)
        elif State.Failed in MOVES[self.state]:
            self.failure = error
            self._move(State.Failed)

    def unanswered(self, request: Request) -> None:
        """The request was written and its answer is lost. It will be sent again."""
        self._free(request)
        if request.kind not in (Kind.InitProducerId, Kind.DescribeTransactions):
            self._unanswered = True
        if request.kind is Kind.EndTxn:
            self._end_in_doubt = True

    def not_sent(self, request: Request) -> None:
        """The request could not be written. It will be sent again."""
        self._free(request)

    def init_answered(
        self, request: Request, code: int, identity: Identity, ongoing: PreparedState = NOTHING_PREPARED
    ) -> Reaction:
        """InitProducerId was answered; `ongoing` names the transaction that was handed over to us."""
        self._free(request)
        reaction = reaction_to(request.kind, code)
        if reaction is Reaction.DONE:
            self.needs_init = False
            self._adopt(identity)
            if self.state is State.Uninitialized:
                self._take_over(request, ongoing)
            return reaction
        what = f"InitProducerId of {request.identity}"
        if request.two_phase and code in _NO_TWO_PHASE:
            self.failure = kafka_error(
                code,
                f"transactional id {self.transactional_id!r}: {what} with two-phase commit",
                "Nothing happened. `semel txn prepared` says what this Kafka offers and why.",
                cls=TwoPhaseCommitUnavailable,
            )
            self._move(State.Failed)
            return Reaction.FATAL
        self._react(reaction, what, code)
        return reaction

    def _take_over(self, request: Request, ongoing: PreparedState) -> None:
        self._took_over = request.keep_prepared
        if ongoing.is_transaction:
            self.prepared = ongoing
            self._started = True
            self._move(State.Prepared)
        else:
            self._move(State.Ready)

    def partitions_answered(self, request: Request, codes: Mapping[TopicPartition, int]) -> Reaction:
        """AddPartitionsToTxn was answered, partition by partition."""
        self._free(request)
        # OPERATION_NOT_ATTEMPTED only says that another partition of the same request was refused.
        telling = [item for item in codes.items() if item[1] != ErrorCode.OPERATION_NOT_ATTEMPTED]
        if len(telling) == len(codes) and not any(codes.values()):
            self._added.update(codes)
            return Reaction.DONE
        partition, code = next((item for item in telling if item[1]), next(iter(codes.items())))
        reaction = reaction_to(request.kind, code)
        self._react(reaction, f"AddPartitionsToTxn of {partition}", code)
        return reaction

    def offsets_added(self, request: Request, code: int) -> Reaction:
        """AddOffsetsToTxn was answered."""
        self._free(request)
        assert request.group is not None
        reaction = reaction_to(request.kind, code)
        if reaction is Reaction.DONE:
            self._groups_added.add(request.group.group_id)
        else:
            self._react(reaction, f"AddOffsetsToTxn of group {request.group.group_id!r}", code)
        return reaction

    def offsets_answered(self, request: Request, codes: Mapping[TopicPartition, int]) -> Reaction:
        """TxnOffsetCommit was answered, partition by partition."""
        self._free(request)
        assert request.group is not None
        refused = {partition: code for partition, code in codes.items() if code}
        pending = self._offsets.get(request.group, {})
        for partition, offset in request.offsets.items():
            if partition not in refused and pending.get(partition) == offset:
                del pending[partition]
        if not pending:
            self._offsets.pop(request.group, None)
        worst = Reaction.DONE
        for partition, code in refused.items():
            reaction = reaction_to(request.kind, code)
            self._react(reaction, f"TxnOffsetCommit of {partition} for group {request.group.group_id!r}", code)
            worst = max(worst, reaction)
        self._settle()
        return worst

    def end_answered(self, request: Request, code: int, identity: Identity) -> Reaction:
        """EndTxn was answered; V2 answers carry the identity of the next transaction."""
        self._free(request)
        reaction = reaction_to(request.kind, code)
        decision = "commit" if request.commit else "abort"
        if self.state not in (State.Committing, State.Aborting, State.Unknown):
            return reaction
        if reaction is Reaction.NOT_OPEN:
            # Nothing of this transaction is open at the coordinator, and no commit of it ever happened there.
            if request.commit and self.prepared.is_transaction:
                self._lose_prepared(f"EndTxn was answered {_name(code)}")
                return Reaction.FATAL
            if request.commit:
                self._unanswered = True
                self._fail("the coordinator says that it is not open: it timed out, or nothing of it arrived", code)
                return Reaction.DONE
            self._sequence_gap = True
            reaction = Reaction.DONE
        if reaction is Reaction.ABORT and not request.commit:
            reaction = Reaction.FATAL  # An abort that cannot be aborted: nothing sensible is left to send.
        if reaction is Reaction.DONE:
            self._ended(identity)
            return reaction
        if code not in _NOTHING_DECIDED:
            self._end_in_doubt = True
        self._react(reaction, f"EndTxn ({decision})", code)
        return reaction

    def diagnosed(self, request: Request, view: TransactionView | None) -> None:
        """DescribeTransactions was answered (None: it could not be asked): is it a time-out or another owner?"""
        self._free(request)
        reason = str(self.failure)
        own = self.identity
        if view is None:
            self._fence(f"{reason}. Another process took the id over, or the transaction timed out")
            return
        aborted = view.state in ("PrepareAbort", "CompleteAbort")
        if aborted and self.prepared.is_transaction and self._commit:
            self._lose_prepared(f"state {view.state}, {view.identity}")
            return
        timed_out = view.timeout_ms != NO_TIMEOUT_MS and (
            (view.identity == own and (aborted or view.state == "Ongoing"))
            or (view.identity == Identity(own.producer_id, own.epoch + 1) and aborted)
        )
        if not timed_out:
            in_doubt = self._end_in_doubt and self._commit
            doubt = "; whether the last commit happened is unknown here" if in_doubt else ""
            self._fence(f"{reason}. Another process owns the id now as {view.identity} ({view.state}){doubt}")
        elif self.protocol == 2 and not self._was_aborting and not self.needs_init:
            self._move(State.Abortable)
            self.failure = AbortTransaction(
                f"the coordinator aborted transaction {self.transactional_id!r} ({own}): "
                f"it was open longer than its time-out of {view.timeout_ms} ms. Abort, then go on."
            )
        else:
            self._fence(
                f"{reason}. The coordinator aborted the transaction, which was open longer than its time-out of "
                f"{view.timeout_ms} ms; with transaction.version below 2 the producer cannot go on"
            )

    # --- Rules ---

    def _react(self, reaction: Reaction, what: str, code: int, message: str = "") -> None:
        detail = f"{what} was answered {_name(code)}" + (f" ({message})" if message else "")
        if reaction is Reaction.FENCED:
            self._suspect(detail)
        elif reaction is Reaction.ABORT:
            self._fail(detail, code)
        elif reaction is Reaction.FATAL and State.Failed in MOVES[self.state]:
            self.failure = kafka_error(code, f"transactional id {self.transactional_id!r}: {what}", cls=Fatal)
            self._move(State.Failed)

    def _suspect(self, detail: str) -> None:
        if self.state in (State.Suspect, State.Fenced, State.Failed):
            return
        self._was_aborting = self.state is State.Aborting or (self.state is State.Unknown and not self._commit)
        self._move(State.Suspect)
        self._drop_unsent()
        self.failure = Fenced(f"transactional id {self.transactional_id!r} ({self.identity}): {detail}")

    def _fence(self, text: str) -> None:
        self._move(State.Fenced)
        self.failure = Fenced(f"{text}. Stop this process; the work belongs to the other owner.")

    def _lose_prepared(self, found: str) -> None:
        self.failure = Fatal(
            f"prepared transaction {self.prepared} of {self.transactional_id!r} cannot be committed ({found}): "
            f"{'' if self.two_phase else 'it timed out, or '}somebody else ended it, an operator for example. "
            "If a database committed it, its records are missing in Kafka: write them again in a new transaction."
        )
        self._move(State.Failed)

    def _fail(self, what: str, code: int = 0) -> None:
        if self.state not in (State.InTransaction, State.Committing):
            return
        if self.prepared.is_transaction:
            self._lose_prepared(what)
            return
        error = AbortTransaction(
            f"transaction {self.transactional_id!r} ({self.identity}) must be aborted: {what}. "
            "Nothing of it is committed."
        )
        if code:
            error.code = ErrorCode(code) if code in ErrorCode._value2member_map_ else ErrorCode.UNKNOWN_SERVER_ERROR
        self.failure = error
        self._move(State.Abortable)
        self._drop_unsent()

    def _drop_unsent(self) -> None:
        self._offsets.clear()
        for lane in self._lanes.values():
            for batch in [item for item in lane.batches if not item.in_flight]:
                self._sequence_gap = self._sequence_gap or batch.identity is not None
                lane.drop(batch)

    def _settle(self) -> None:
        """End a transaction of which nothing was ever written, without asking anybody."""
        if self.state in (State.Committing, State.Aborting) and not self._started and self.is_delivered:
            self._ended(self.identity)

    def _ended(self, identity: Identity) -> None:
        if self.protocol == 1 and (self._unanswered or self._sequence_gap):
            self.needs_init = True
        if self.protocol == 2 and self._started:
            if identity.producer_id >= 0:
                self._adopt(identity)
            else:
                self.needs_init = True  # The coordinator had nothing open and so raised no epoch.
        self._reset()
        self._move(State.Ready)

    def _adopt(self, identity: Identity) -> None:
        self.identity = identity
        for lane in self._lanes.values():
            lane.restart()

    def _reset(self) -> None:
        self._added.clear()
        self._groups_added.clear()
        self._offsets.clear()
        self._started = self._unanswered = self._sequence_gap = self._end_in_doubt = False
        self._was_aborting = self._took_over = False
        self.prepared = NOTHING_PREPARED
        self.failure = None

    def _is_busy_with(self, kind: Kind) -> bool:
        return self._busy is not None and self._busy.kind is kind

    def _free(self, request: Request) -> None:
        assert self._busy is request, f"{request.kind} was reported twice or never given out"
        self._busy = None

    def _move(self, state: State) -> None:
        assert state in MOVES[self.state], f"{self.state} -> {state} is not a move"
        self.state = state
        if state is State.Failed:
            self._drop_unsent()  # Or the next transaction would begin with what this one could not send.


def _name(code: int) -> str:
    try:
        return ErrorCode(code).name
    except ValueError:
        return f"error code {code}"

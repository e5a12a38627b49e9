"""The transaction coordinator: who may write under a transactional id, and what became of each transaction.

Theory of operation. Per transactional id there is one `TransactionMetadata`, an immutable value. A request never
changes it: it is compared with the value and gets an `Answer`, which may carry a `transition`, the value that should
replace it. The caller appends the transition to the transaction log and only then calls `complete`; if the append
did not happen it calls `cancel`. From the moment a transition is handed out until then, the id is *pending*: every
other change to it is answered CONCURRENT_TRANSACTIONS, and the identity that a decision ends can write no more.

    end_transaction -> PrepareCommit | PrepareAbort -> complete -> markers in every partition -> finish -> complete

An *identity* is a pair (producer id, producer epoch). Transactions V1 (TV1) keep the identity over transactions;
transactions V2 (TV2, KIP-890 part 2) give every transaction its own: PrepareX already stores epoch + 1, which is the
epoch of the markers and, once complete, the identity of the next transaction. At the last epoch the producer id
rotates: PrepareX stores (old id, 32767) and `next_producer_id`, CompleteX stores (next id, 0).

Two-phase commit (KIP-939): a transaction of a producer with it never times out, so a database can decide its outcome.
InitProducerId with keepPreparedTxn hands the open transaction over instead of ending it: the answer has a new client
identity and names the transaction by the identity that wrote it. The new identity alone may end it, and nothing more
is written into it.

The answers follow Apache Kafka 4.3.1. On purpose different:
- InitProducerId against an open transaction compares the epoch too, so a zombie with a stale identity gets
  PRODUCER_FENCED and cannot abort the transaction of its successor.
- A decision under way is CONCURRENT_TRANSACTIONS for the identity that follows it, also between PrepareX and markers.
- A produce request is checked here every time, so nothing is appended under an identity whose EndTxn was decided.
- `last_producer_epoch` is in the log, so a retried InitProducerId is known again after a restart (KAFKA-20357); the
  first partition of a transaction ends the retry, or a late duplicate could wipe out a decision (TV1).
- A commit with the identity of a transaction that was aborted gets PRODUCER_FENCED, as in trunk (KAFKA-20785).
- keepPreparedTxn works; 4.3.1 answers UNSUPPORTED_VERSION (the rules are the KIP's and those of Kafka's pull request
  21735). Where the KIP leaves a cell open, the answer is the one that cannot tear a transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import NamedTuple

from semel.coordinator.transaction_state import (
    COMPLETE_ABORT,
    COMPLETE_COMMIT,
    DEAD,
    EMPTY,
    EPOCH_MAX,
    IDLE,
    NO_TIMEOUT_MS,
    ONGOING,
    PREPARE_ABORT,
    PREPARE_COMMIT,
    PREPARED,
    TRANSITIONS,
    TransactionMetadata,
    TransactionState,
    completed,
    decided,
    kept,
)
from semel.errors import ErrorCode
from semel.types import TopicPartition

__all__ = [
    "EPOCH_MAX",
    "MAX_PARTITIONS_PER_TRANSACTION",
    "MAX_TRANSACTIONAL_IDS",
    "NO_TIMEOUT_MS",
    "TRANSITIONS",
    "Answer",
    "TransactionCoordinator",
    "TransactionMetadata",
    "TransactionState",
]

MAX_TRANSACTIONAL_IDS = 100_000
"""Apache Kafka has no limit and relies on expiry after 7 days; random ids from a crash loop must not fill memory."""
MAX_PARTITIONS_PER_TRANSACTION = 50_000
"""Keeps one value of the log near 250 kB, well below the 1 MB that a record batch may have by default."""
MAX_TRANSACTIONAL_ID_BYTES = 32_767
"""The length of a string in the log's key is an int16."""
IMPLICIT_ADD_PRODUCE_VERSION = 12
"""From this version on Produce adds the partition to the transaction by itself (KIP-890 part 2)."""


class Answer(NamedTuple):
    """The reply to a request, and the change that must be durable before a reply without error may be sent."""

    error: ErrorCode
    producer_id: int = -1
    producer_epoch: int = -1
    transition: TransactionMetadata | None = None
    ongoing: tuple[int, int] = (-1, -1)
    """From InitProducerId that keeps an open transaction: the identity that wrote it."""


OK = Answer(ErrorCode.NONE)
BUSY = Answer(ErrorCode.CONCURRENT_TRANSACTIONS)
INVALID_STATE = Answer(ErrorCode.INVALID_TXN_STATE)
UNKNOWN = Answer(ErrorCode.INVALID_PRODUCER_ID_MAPPING)
FENCED = Answer(ErrorCode.PRODUCER_FENCED)
RETRY_OK = "retry"
"""In the tables below: the request was already carried out, answer it as then."""

# What EndTxn does when no decision is left to make. Keys: state, commit?; `RETRY_OK` or the error.
_END_V1: dict[tuple[TransactionState, bool], Answer | str] = {
    (EMPTY, True): INVALID_STATE,
    (EMPTY, False): INVALID_STATE,
    (PREPARE_COMMIT, True): BUSY,
    (PREPARE_COMMIT, False): INVALID_STATE,
    (PREPARE_ABORT, True): INVALID_STATE,
    (PREPARE_ABORT, False): BUSY,
    (COMPLETE_COMMIT, True): RETRY_OK,
    (COMPLETE_COMMIT, False): INVALID_STATE,
    (COMPLETE_ABORT, True): INVALID_STATE,
    (COMPLETE_ABORT, False): RETRY_OK,
}
# The same for TV2, where the request carries the identity that the decision ended (epoch - 1).
_END_V2_RETRY: dict[tuple[TransactionState, bool], Answer | str] = {
    (PREPARE_COMMIT, True): BUSY,
    (PREPARE_COMMIT, False): INVALID_STATE,
    # Kafka says INVALID_TXN_STATE, which kills a Kafka Streams thread; asked again it learns that it was fenced.
    (PREPARE_ABORT, True): BUSY,
    (PREPARE_ABORT, False): BUSY,
    (COMPLETE_COMMIT, True): RETRY_OK,
    (COMPLETE_COMMIT, False): INVALID_STATE,
    (COMPLETE_ABORT, True): FENCED,
    (COMPLETE_ABORT, False): RETRY_OK,
}


class TransactionCoordinator:
    """All transactional ids of one broker.

    `new_producer_id` gives producer ids that were never given before, over restarts too. `transaction_version` is
    the broker's finalized feature: it rules the aborts that the coordinator decides itself; a client's EndTxn is
    ruled by the version of the request. `two_phase_commit` lets clients have transactions that never time out.
    """

    def __init__(
        self,
        *,
        new_producer_id: Callable[[], int],
        transaction_version: int = 2,
        two_phase_commit: bool = True,
        max_timeout_ms: int = 900_000,
        max_ids: int = MAX_TRANSACTIONAL_IDS,
    ) -> None:
        self._new_producer_id = new_producer_id
        self._transaction_version = transaction_version
        self._two_phase_commit = two_phase_commit
        self._max_timeout_ms = max_timeout_ms
        self._max_ids = max_ids
        self._current: dict[str, TransactionMetadata] = {}
        self._pending: dict[str, TransactionMetadata] = {}
        """Transitions handed out and not yet completed or cancelled."""

    def __repr__(self) -> str:
        return f"<TransactionCoordinator TV{self._transaction_version} {len(self._current)} ids>"

    # -- Two-step change ----------------------------------------------------------------------------------------

    def complete(self, transition: TransactionMetadata) -> None:
        """Apply a transition that the log now has."""
        transactional_id = transition.transactional_id
        assert self._pending.get(transactional_id) is transition, f"{transactional_id}: not the pending transition"
        del self._pending[transactional_id]
        if transition.state is DEAD:
            del self._current[transactional_id]
        else:
            self._current[transactional_id] = transition

    def cancel(self, transition: TransactionMetadata) -> None:
        """Forget a transition whose record certainly is not in the log.

        When that is not certain the log must stop instead: a decision that may be durable cannot be taken back.
        """
        transactional_id = transition.transactional_id
        assert self._pending.get(transactional_id) is transition, f"{transactional_id}: not the pending transition"
        del self._pending[transactional_id]

    def restore(self, transactional_id: str, metadata: TransactionMetadata | None) -> None:
        """Take one value of the log at start-up, in log order; None is a tombstone."""
        if metadata is None:
            self._current.pop(transactional_id, None)
        else:
            self._current[transactional_id] = metadata

    def _propose(self, target: TransactionMetadata) -> TransactionMetadata:
        """Make `target` the pending transition of its id; the pair to `complete`."""
        transactional_id = target.transactional_id
        assert transactional_id not in self._pending, f"{transactional_id}: a change is pending"
        current = self._current.get(transactional_id)
        if current is None:
            assert target.state is EMPTY, f"{transactional_id}: begins as {target.state}"
        else:
            allowed = TRANSITIONS[current.state]
            assert target.state in allowed, f"{transactional_id}: {current.state} cannot become {target.state}"
        self._pending[transactional_id] = target
        return target

    # -- InitProducerId -----------------------------------------------------------------------------------------

    def init_producer_id(
        self,
        transactional_id: str | None,
        timeout_ms: int,
        producer_id: int,
        producer_epoch: int,
        now_ms: int,
        api_version: int,
        *,
        enable_two_phase: bool = False,
        keep_prepared: bool = False,
    ) -> Answer:
        """Give an identity and fence every earlier one.

        `producer_id` and `producer_epoch` are -1 from a new producer; with both given the caller continues as that
        identity (KIP-360). An open transaction is aborted first: the answer is CONCURRENT_TRANSACTIONS *with* a
        transition to PrepareAbort, which the caller carries through to `finish`; the client asks again.

        `enable_two_phase` sets no time-out, whatever `timeout_ms` says. With `keep_prepared` (only from a new producer)
        an open transaction stays open and is named in `Answer.ongoing`.
        """
        if (producer_id == -1) != (producer_epoch == -1):
            return Answer(ErrorCode.INVALID_REQUEST)
        if transactional_id is None:
            return Answer(ErrorCode.NONE, self._new_producer_id(), 0)
        if not 0 < len(transactional_id.encode()) <= MAX_TRANSACTIONAL_ID_BYTES:
            return Answer(ErrorCode.INVALID_REQUEST)
        if enable_two_phase and not self._two_phase_commit:
            return Answer(ErrorCode.TRANSACTIONAL_ID_AUTHORIZATION_FAILED)
        if keep_prepared and self._transaction_version < 2:
            return Answer(ErrorCode.UNSUPPORTED_VERSION)  # With TV1 one identity stands for many transactions.
        if keep_prepared and producer_id != -1:
            return Answer(ErrorCode.INVALID_REQUEST)
        if enable_two_phase:
            timeout_ms = NO_TIMEOUT_MS
        elif not 0 < timeout_ms <= self._max_timeout_ms:
            return Answer(ErrorCode.INVALID_TRANSACTION_TIMEOUT)
        if transactional_id in self._pending:
            return BUSY
        current = self._current.get(transactional_id)
        if current is None:
            return self._init_unknown(transactional_id, timeout_ms, now_ms)
        expected = None if producer_id == -1 else (producer_id, producer_epoch)
        if current.state in PREPARED:
            return BUSY
        if current.state is not ONGOING:
            return self._init_idle(current, expected, timeout_ms, now_ms, api_version)
        if expected is not None and expected != current.client_identity:
            return _fenced(api_version < 4)
        if not keep_prepared:
            return BUSY._replace(transition=self._propose(self._fence(current, now_ms)))
        taken_over = kept(current, now_ms, self._next_identity(current), endless=enable_two_phase)
        return self._hand_out(taken_over)._replace(ongoing=current.identity)

    def _init_unknown(self, transactional_id: str, timeout_ms: int, now_ms: int) -> Answer:
        if len(self._current) >= self._max_ids:
            return Answer(ErrorCode.POLICY_VIOLATION)
        first = TransactionMetadata(
            transactional_id=transactional_id,
            producer_id=self._new_producer_id(),
            producer_epoch=0,
            timeout_ms=timeout_ms,
            last_update_ms=now_ms,
        )
        return self._hand_out(first)

    def _init_idle(
        self,
        current: TransactionMetadata,
        expected: tuple[int, int] | None,
        timeout_ms: int,
        now_ms: int,
        api_version: int,
    ) -> Answer:
        """The rows Empty and CompleteX of the InitProducerId table: bump, rotate, repeat an answer, or fence."""
        empty = replace(
            current,
            state=EMPTY,
            partitions=frozenset(),
            start_ms=-1,
            timeout_ms=timeout_ms,
            last_update_ms=now_ms,
        )
        if expected is not None and expected != current.identity:
            if expected in _retry_identities(current):
                return self._hand_out(empty)
            return _fenced(api_version < 4)
        last_epoch = -1 if expected is None else current.producer_epoch
        identity = self._next_identity(current)
        return self._hand_out(
            replace(
                empty,
                producer_id=identity[0],
                producer_epoch=identity[1],
                previous_producer_id=current.producer_id,
                last_producer_epoch=last_epoch,
            )
        )

    def _hand_out(self, target: TransactionMetadata) -> Answer:
        return Answer(ErrorCode.NONE, *target.client_identity, self._propose(target))

    def _next_identity(self, current: TransactionMetadata) -> tuple[int, int]:
        """One epoch above the client's; the producer id rotates at the last one."""
        producer_id, epoch = current.client_identity
        return (self._new_producer_id(), 0) if epoch >= EPOCH_MAX else (producer_id, epoch + 1)

    # -- Partitions and produce ---------------------------------------------------------------------------------

    def add_partitions(
        self,
        transactional_id: str,
        producer_id: int,
        producer_epoch: int,
        partitions: Collection[TopicPartition],
        now_ms: int,
        *,
        api_version: int,
        implicit: bool = False,
    ) -> Answer:
        """Open the transaction or widen it: AddPartitionsToTxn, AddOffsetsToTxn, and the implicit add of TV2.

        `partitions` are existing ones; the caller has answered the others. `implicit` says that Produce v12+ or
        TxnOffsetCommit v5 asks, whose word for a stale epoch is INVALID_PRODUCER_EPOCH (KAFKA-10687). An answer
        without error and without transition means that all partitions are in the open transaction already.
        """
        current = self._current.get(transactional_id)
        if current is None:
            return UNKNOWN
        identity = producer_id, producer_epoch
        pending = self._pending.get(transactional_id)
        if self._is_closing(current, identity):
            return BUSY
        if current.is_kept:
            return INVALID_STATE if identity == current.client_identity else _fenced(implicit or api_version < 2)
        if current.producer_id != producer_id:
            return UNKNOWN
        if identity != current.client_identity:
            return _fenced(implicit or api_version < 2)
        if current.state is ONGOING and current.partitions.issuperset(partitions):
            return OK
        if pending is not None:
            return BUSY
        already = current.partitions if current.state is ONGOING else frozenset()
        wanted = already.union(partitions)
        if len(wanted) > MAX_PARTITIONS_PER_TRANSACTION:
            return Answer(ErrorCode.POLICY_VIOLATION)
        target = replace(
            current,
            state=ONGOING,
            partitions=wanted,
            previous_producer_id=current.producer_id,
            # Who writes under an identity has received it: the request that gave it cannot be repeated any more.
            last_producer_epoch=-1,
            start_ms=current.start_ms if current.state is ONGOING else now_ms,
            last_update_ms=now_ms,
            client_version=2 if implicit else 0,
        )
        return Answer(ErrorCode.NONE, transition=self._propose(target))

    def check_produce(
        self,
        transactional_id: str,
        producer_id: int,
        producer_epoch: int,
        partition: TopicPartition,
        produce_version: int,
    ) -> ErrorCode:
        """May this identity append to this partition now? Ask immediately before the append, every time.

        For Produce v12+ ask after `add_partitions(implicit=True)` is complete. A transaction whose decision is
        pending or made is closed: the answer is retriable until the decision is durable, final from then on.
        """
        explicit = produce_version < IMPLICIT_ADD_PRODUCE_VERSION
        busy = ErrorCode.NOT_ENOUGH_REPLICAS if explicit else ErrorCode.CONCURRENT_TRANSACTIONS
        current = self._current.get(transactional_id)
        if current is None:
            return ErrorCode.INVALID_PRODUCER_ID_MAPPING
        identity = producer_id, producer_epoch
        if self._is_closing(current, identity):
            return busy
        if current.is_kept:
            own = identity == current.client_identity
            return ErrorCode.INVALID_TXN_STATE if own else ErrorCode.INVALID_PRODUCER_EPOCH
        if current.producer_id != producer_id:
            return ErrorCode.INVALID_PRODUCER_ID_MAPPING
        if identity != current.client_identity:
            return ErrorCode.INVALID_PRODUCER_EPOCH
        if current.state is ONGOING and partition in current.partitions:
            return ErrorCode.NONE
        if not explicit:
            return ErrorCode.CONCURRENT_TRANSACTIONS
        return ErrorCode.TRANSACTION_ABORTABLE if produce_version == 11 else ErrorCode.INVALID_TXN_STATE

    def _is_closing(self, current: TransactionMetadata, identity: tuple[int, int]) -> bool:
        """Whether a change is being written that takes the right to write away, or a decision keeps it waiting."""
        pending = self._pending.get(current.transactional_id)
        if pending is not None and (pending.state is not ONGOING or pending.is_kept):
            return True
        return current.state in PREPARED and identity == current.client_identity

    # -- EndTxn -------------------------------------------------------------------------------------------------

    def end_transaction(
        self,
        transactional_id: str,
        producer_id: int,
        producer_epoch: int,
        commit: bool,
        now_ms: int,
        api_version: int,
    ) -> Answer:
        """Decide the open transaction. The transition is a PrepareX: from now on its identity writes nothing more.

        v0-4 keep the identity (TV1), v5 answers with the identity of the next transaction (TV2). A repeated request
        gets its first answer again; the opposite decision never does.
        """
        if not transactional_id:
            return Answer(ErrorCode.INVALID_REQUEST)
        current = self._current.get(transactional_id)
        if current is None:
            return UNKNOWN
        identity = producer_id, producer_epoch
        if api_version >= 5:
            return self._end_v2(current, identity, commit, now_ms)
        if current.is_kept:
            # The next identity does not fit into the answer, and without it the client could not go on.
            return INVALID_STATE if identity == current.client_identity else _fenced(api_version < 2)
        if current.producer_id != producer_id:
            return UNKNOWN
        if identity != current.client_identity:
            return _fenced(api_version < 2)
        if transactional_id in self._pending:
            return BUSY
        if current.state is ONGOING:
            return Answer(ErrorCode.NONE, transition=self._propose(self._decided(current, commit, now_ms, 0)))
        return _repeated(_END_V1[current.state, commit], OK)

    def _end_v2(self, current: TransactionMetadata, identity: tuple[int, int], commit: bool, now_ms: int) -> Answer:
        # First of all, because a rotation may be in flight and the request may carry the producer id to come.
        if current.transactional_id in self._pending:
            return BUSY
        if current.state is ONGOING:
            if identity != current.client_identity:
                return FENCED if current.is_kept or identity[0] == current.producer_id else UNKNOWN
        elif identity == current.ended_identity:
            again = Answer(ErrorCode.NONE, *current.identity)
            return _repeated(_END_V2_RETRY[current.state, commit], again)
        elif current.state in PREPARED and identity == current.client_identity:
            # The client has the answer to its last EndTxn and is faster than our markers (KAFKA-18464).
            return BUSY
        elif identity[0] != current.producer_id:
            return UNKNOWN
        elif identity != current.client_identity:
            return FENCED
        elif commit:
            return INVALID_STATE
        # In an idle state this is the empty abort: the client may not know whether its first write arrived.
        target = self._decided(current, commit, now_ms, 2)
        return Answer(ErrorCode.NONE, *target.client_identity, transition=self._propose(target))

    def finish(self, transactional_id: str, now_ms: int) -> TransactionMetadata:
        """The CompleteX transition, once every partition of the PrepareX has its marker. Log it, then `complete`."""
        current = self._current[transactional_id]
        assert current.state in PREPARED, f"{transactional_id}: finish in {current.state}"
        return self._propose(completed(current, now_ms))

    @staticmethod
    def marker_epoch(metadata: TransactionMetadata) -> int:
        """The producer epoch of the markers of a PrepareX: with TV2, and after a fence, one above the writer's."""
        assert metadata.state in PREPARED, f"{metadata.transactional_id}: markers in {metadata.state}"
        return metadata.producer_epoch

    def _fence(self, current: TransactionMetadata, now_ms: int) -> TransactionMetadata:
        """The coordinator's own abort of an open transaction: its writer must learn of it, so the epoch rises."""
        if self._transaction_version >= 2 or current.is_kept:
            return self._decided(current, False, now_ms, 2)
        target = self._decided(current, False, now_ms, self._transaction_version)
        return replace(target, producer_epoch=current.producer_epoch + 1, last_producer_epoch=-1)

    def _decided(self, current: TransactionMetadata, commit: bool, now_ms: int, version: int) -> TransactionMetadata:
        return decided(current, commit, now_ms, version=version, new_producer_id=self._new_producer_id)

    # -- Sweeps and recovery ------------------------------------------------------------------------------------

    def expired(self, now_ms: int) -> list[str]:
        """Ids whose transaction is open for longer than its timeout; call `time_out` with each."""
        return [
            transactional_id
            for transactional_id, current in self._current.items()
            if current.is_overdue(now_ms) and transactional_id not in self._pending
        ]

    def time_out(self, transactional_id: str, now_ms: int) -> Answer:
        """Abort an overdue transaction: a PrepareAbort transition, carried through as for EndTxn."""
        current = self._current.get(transactional_id)
        if current is None:
            return UNKNOWN
        if transactional_id in self._pending:
            return BUSY
        if not current.is_overdue(now_ms):
            return INVALID_STATE
        return Answer(ErrorCode.NONE, transition=self._propose(self._fence(current, now_ms)))

    def idle(self, now_ms: int, expiration_ms: int) -> list[str]:
        """Ids without a transaction that nobody used for `expiration_ms`; call `forget` with each."""
        return [
            transactional_id
            for transactional_id, current in self._current.items()
            if current.state in IDLE
            and current.timeout_ms != NO_TIMEOUT_MS
            and current.last_update_ms + expiration_ms <= now_ms
            and transactional_id not in self._pending
        ]

    def forget(self, transactional_id: str, now_ms: int) -> TransactionMetadata:
        """The transition to Dead, whose record is a tombstone."""
        current = self._current[transactional_id]
        assert current.state in IDLE, f"{transactional_id}: forget in {current.state}"
        return self._propose(replace(current, state=DEAD, partitions=frozenset(), last_update_ms=now_ms))

    def unfinished(self) -> list[TransactionMetadata]:
        """Decisions without a CompleteX: after a restart write their missing markers, then `finish` each."""
        return [
            current
            for current in self._current.values()
            if current.state in PREPARED and current.transactional_id not in self._pending
        ]

    def open_identities(self) -> frozenset[tuple[int, int]]:
        """Identities that may have an open transaction in a log; after a restart any other one is an orphan."""
        found: set[tuple[int, int]] = set()
        for current in self._current.values():
            if current.state is ONGOING or current.state in PREPARED:
                found.add(current.identity)
            if current.state in PREPARED:
                found.add((current.producer_id, current.producer_epoch - 1))
        return frozenset(found)

    # -- Looking in ---------------------------------------------------------------------------------------------

    def get(self, transactional_id: str) -> TransactionMetadata | None:
        """The durable value, without what is pending."""
        return self._current.get(transactional_id)

    def is_pending(self, transactional_id: str) -> bool:
        return transactional_id in self._pending

    def describe(self, transactional_id: str) -> tuple[ErrorCode, TransactionMetadata | None]:
        """DescribeTransactions for one id (KIP-664)."""
        if not transactional_id:
            return ErrorCode.INVALID_REQUEST, None
        current = self._current.get(transactional_id)
        return (ErrorCode.NONE, current) if current else (ErrorCode.TRANSACTIONAL_ID_NOT_FOUND, None)

    def list_transactions(
        self,
        now_ms: int,
        *,
        states: Iterable[str] = (),
        producer_ids: Iterable[int] = (),
        duration_ms: int = -1,
    ) -> tuple[list[TransactionMetadata], list[str]]:
        """ListTransactions (KIP-664): the matching values, and the names among `states` that are no state.

        An empty filter matches everything. `duration_ms` >= 0 wants transactions that are open for at least as long.
        """
        wanted = set(states)
        unknown = sorted(wanted - set(TransactionState))
        ids = set(producer_ids)
        found = [
            current
            for current in self._current.values()
            if (not wanted or current.state in wanted)
            and (not ids or current.producer_id in ids)
            and (duration_ms < 0 or current.open_for_ms(now_ms) >= duration_ms)
        ]
        return found, unknown


def _fenced(old_word: bool) -> Answer:
    """A stale identity: PRODUCER_FENCED, or INVALID_PRODUCER_EPOCH for requests that do not know that code."""
    return Answer(ErrorCode.INVALID_PRODUCER_EPOCH) if old_word else FENCED


def _repeated(cell: Answer | str, first_answer: Answer) -> Answer:
    return cell if isinstance(cell, Answer) else first_answer


def _retry_identities(current: TransactionMetadata) -> list[tuple[int, int]]:
    """Identities whose InitProducerId may be a retry of the call that made `current`, so that its answer repeats."""
    last = current.last_producer_epoch
    if last < 0:
        return []
    if last >= EPOCH_MAX:
        return [(current.previous_producer_id, last)] if current.producer_epoch == 0 else []
    return [(current.producer_id, last)]

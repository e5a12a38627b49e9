"""The shell around the transaction coordinator: its decisions made durable, in the order that survives a crash.

1. A partition is in the transaction log as part of an open transaction before data is appended there.
2. EndTxn: the coordinator fences the identity in memory, then the decision (PrepareX) is written. From here on the
   transaction ends this way, whatever happens.
3. Markers go into every partition, the staged offsets are applied, then CompleteX is written.

All of it happens before EndTxn is answered, so clients never see CONCURRENT_TRANSACTIONS for markers under way. After
a crash `open` finishes every decision without CompleteX: markers are idempotent. A transaction that is open in a log
but not in the coordinator's belongs to nobody and is aborted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from functools import partial
from typing import NamedTuple

from semel.broker.config import BrokerConfig
from semel.broker.groups import OFFSETS_TOPIC, Groups
from semel.broker.internal import Change, InternalLog
from semel.broker.metadata import MetadataStore
from semel.broker.topics import Partition, Topics
from semel.coordinator.transaction import (
    NO_TIMEOUT_MS,
    Answer,
    TransactionCoordinator,
    TransactionMetadata,
    TransactionState,
)
from semel.coordinator.transaction_log import decode_transaction, decode_transactional_id, encode_transaction
from semel.env import Env
from semel.errors import ErrorCode
from semel.failpoints import failpoint
from semel.log.log import LogError
from semel.types import TopicPartition

__all__ = ["TRANSACTIONS_TOPIC", "Marker", "Transactions"]

log = logging.getLogger("semel.broker")

TRANSACTIONS_TOPIC = "__transaction_state"
COORDINATOR_EPOCH = 0
MAX_EPOCH = (1 << 15) - 1
"""One node, one log: no other coordinator ever existed."""
ID_EXPIRATION_MS = 604_800_000
"""Kafka's transactional.id.expiration.ms: a week without use."""


class Marker(NamedTuple):
    """A marker that an operator wants written; `transaction_version` 2 demands an epoch above the transaction's."""

    producer_id: int
    producer_epoch: int
    commit: bool
    coordinator_epoch: int
    transaction_version: int


class Transactions:
    """Requests about transactions; each call leaves the log and the coordinator agreeing."""

    def __init__(self, topics: Topics, metadata: MetadataStore, config: BrokerConfig, env: Env) -> None:
        self._topics = topics
        self._env = env
        self.coordinator = TransactionCoordinator(
            new_producer_id=metadata.new_producer_id,
            transaction_version=config.transaction_version,
            two_phase_commit=config.two_phase_commit,
            max_timeout_ms=config.transaction_max_timeout_ms,
        )
        self._log = InternalLog(topics, TRANSACTIONS_TOPIC, self._snapshot)
        self._held_up: set[str] = set()
        """Ids whose decision waits for a log that refuses; one transaction each."""
        self._apply_offsets: Callable[[int, bool, int], None] = lambda *_: None

    def __repr__(self) -> str:
        return f"<Transactions {self.coordinator!r}>"

    def open(self, groups: Groups) -> None:
        """Read the log back, finish what was decided, abort what belongs to nobody."""
        self._apply_offsets = groups.end_transaction
        for key, value in self._log.open():
            self.coordinator.restore(decode_transactional_id(key), decode_transaction(key, value))
        self._finish_decided()
        self._abort_orphans(groups)

    # --- Requests ---

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
        """Hand out an identity. An open transaction of the id is aborted first, within this call, or kept (KIP-939).

        Raises `LogError` when the log refuses: nothing happened then.
        """
        ask = partial(
            self.coordinator.init_producer_id,
            *(transactional_id, timeout_ms, producer_id, producer_epoch, now_ms, api_version),
            enable_two_phase=enable_two_phase,
            keep_prepared=keep_prepared,
        )
        answer = ask()
        if answer.error is ErrorCode.CONCURRENT_TRANSACTIONS and answer.transition is not None:
            before = self.coordinator.get(answer.transition.transactional_id)
            if before is not None and before.timeout_ms == NO_TIMEOUT_MS:
                # A database may have committed it: who looks for lost records has to find this.
                log.warning(
                    "transaction %d:%d of %s, which had no time-out, is aborted", *before.identity, transactional_id
                )
            self._decide(answer.transition, now_ms)
            answer = ask()
        if answer.transition is not None:
            failpoint("broker.before_init")
            self._persist(answer.transition, now_ms)
            failpoint("broker.after_init")
        return answer

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
    ) -> ErrorCode:
        """Open or widen a transaction; durable when this returns without an error.

        A log that refuses gives COORDINATOR_NOT_AVAILABLE, which clients retry: nothing happened then.
        """
        answer = self.coordinator.add_partitions(
            transactional_id,
            producer_id,
            producer_epoch,
            partitions,
            now_ms,
            api_version=api_version,
            implicit=implicit,
        )
        if answer.transition is not None:
            try:
                self._persist(answer.transition, now_ms)
            except LogError as error:
                log.error("transaction of %s cannot be opened: %s", transactional_id, error)
                return ErrorCode.COORDINATOR_NOT_AVAILABLE
            failpoint("broker.after_join")
        return answer.error

    def end_transaction(
        self, transactional_id: str, producer_id: int, producer_epoch: int, commit: bool, now_ms: int, api_version: int
    ) -> Answer:
        """Decide the transaction and carry the decision out. Raises `LogError` when the decision cannot be written."""
        failpoint("broker.before_prepare")
        answer = self.coordinator.end_transaction(
            transactional_id, producer_id, producer_epoch, commit, now_ms, api_version
        )
        if answer.transition is not None:
            self._decide(answer.transition, now_ms)
        return answer

    def write_marker(self, partition: Partition, marker: Marker, now_ms: int) -> ErrorCode:
        """End a hanging transaction in one partition. One that the coordinator knows is refused: it has other ways."""
        where = TopicPartition(partition.log.topic, partition.log.partition)
        known, _ = self.coordinator.list_transactions(now_ms, producer_ids=[marker.producer_id])
        if any(where in item.partitions for item in known):
            return ErrorCode.INVALID_TXN_STATE
        if marker.coordinator_epoch > COORDINATOR_EPOCH:
            return ErrorCode.TRANSACTION_COORDINATOR_FENCED
        if where.topic == TRANSACTIONS_TOPIC:
            return ErrorCode.INVALID_TOPIC_EXCEPTION
        try:
            if where.topic == OFFSETS_TOPIC:
                self._apply_offsets(marker.producer_id, marker.commit, now_ms)
            else:
                partition.log.append_marker(
                    *marker[:4], now_ms, transaction_version=marker.transaction_version, unless_written=True
                )
        except LogError as error:
            log.warning("no marker in %s-%d: %s", *where, error)
            return error.code
        log.warning("%s-%d has an operator's marker for producer %d", *where, marker.producer_id)
        if partition.waiters:
            partition.advanced()
        return ErrorCode.NONE

    # --- Timer ---

    def sweep(self, now_ms: int) -> None:
        """Abort transactions past their timeout, go on with decisions that could not be carried out, forget old ids."""
        for transactional_id in self.coordinator.expired(now_ms):
            failpoint("broker.before_time_out")
            self._time_out(transactional_id, now_ms)
        self._finish_decided()
        for transactional_id in self.coordinator.idle(now_ms, ID_EXPIRATION_MS):
            self._persist(self.coordinator.forget(transactional_id, now_ms), now_ms)
        self._log.checkpoint_if_due(now_ms)

    def _time_out(self, transactional_id: str, now_ms: int) -> None:
        """Abort one transaction. A log that refuses holds up none of the others: the next sweep tries again."""
        answer = self.coordinator.time_out(transactional_id, now_ms)
        if answer.transition is None:
            return
        try:
            self._decide(answer.transition, now_ms)
        except LogError as error:
            if transactional_id not in self._held_up:
                log.error("transaction of %s timed out, to abort it is tried again: %s", transactional_id, error)
                self._held_up.add(transactional_id)
        else:
            log.warning("transaction of %s timed out and is aborted", transactional_id)

    # --- Steps ---

    def _decide(self, prepared: TransactionMetadata, now_ms: int) -> None:
        self._settle(prepared)
        self._persist(prepared, now_ms)
        failpoint("broker.after_prepare")
        self._carry_out(prepared, now_ms, first_time=True)

    def _settle(self, prepared: TransactionMetadata) -> None:
        """A client need not have waited for its last batches: no decision on the disk without what it is about."""
        try:
            for item in sorted(prepared.partitions):
                partition = self._topics.partition(*item)
                if partition is not None:
                    partition.log.settle()
        except LogError:
            self.coordinator.cancel(prepared)
            raise

    def _persist(self, transition: TransactionMetadata, now_ms: int) -> None:
        """Write a transition, then apply it.

        When the log refuses it, nothing happened. Any other failure, a failed sync too, leaves the id pending, that is
        answered 51: whether the record is in the file is for the next start to find out.
        """
        had_stopped = self._log.has_stopped
        try:
            self._log.append([encode_transaction(transition)], now_ms)
        except LogError:
            if had_stopped or not self._log.has_stopped:
                self.coordinator.cancel(transition)
            raise
        self.coordinator.complete(transition)

    def _carry_out(self, prepared: TransactionMetadata, now_ms: int, *, first_time: bool) -> None:
        """Markers, offsets, CompleteX. What cannot be written is left to the next sweep.

        One log that refuses holds up none of the others: their readers wait for the marker.
        """
        commit = prepared.state is TransactionState.PREPARE_COMMIT
        epoch = self.coordinator.marker_epoch(prepared)
        refusals: list[LogError | OSError] = []
        for number, item in enumerate(sorted(prepared.partitions)):
            if number:
                failpoint("broker.between_markers")
            partition = self._topics.partition(*item)
            if partition is not None:  # Deleted meanwhile: there is nothing to end.
                try:
                    self._end_in(partition, prepared.producer_id, epoch, commit, now_ms, first_time)
                except (LogError, OSError) as error:
                    refusals.append(error)
        failpoint("broker.after_markers")
        if not refusals:
            try:
                self._persist(self.coordinator.finish(prepared.transactional_id, now_ms), now_ms)
                failpoint("broker.after_complete")
            except (LogError, OSError) as error:
                refusals.append(error)
        self._report(prepared, refusals)

    def _report(self, prepared: TransactionMetadata, refusals: list[LogError | OSError]) -> None:
        """Say once, not with every sweep, that a decision waits for its logs."""
        name = prepared.transactional_id
        if refusals and name not in self._held_up:
            log.error("%s of %s is decided and not complete, it is tried again: %s", prepared.state, name, refusals[0])
            self._held_up.add(name)
        elif not refusals and name in self._held_up:
            log.info("%s of %s is complete", prepared.state, name)
            self._held_up.discard(name)

    def _end_in(
        self, partition: Partition, producer_id: int, epoch: int, commit: bool, now_ms: int, first_time: bool
    ) -> None:
        if partition.log.topic == OFFSETS_TOPIC:
            self._apply_offsets(producer_id, commit, now_ms)
            return
        try:
            partition.log.append_marker(
                producer_id, epoch, commit, COORDINATOR_EPOCH, now_ms, unless_written=not first_time
            )
        except LogError as error:
            if error.code is not ErrorCode.INVALID_PRODUCER_EPOCH:
                raise
            # The partition has seen a later epoch: this transaction ended there long ago.
            log.error("no marker is written: %s", error)
        if partition.waiters:
            partition.advanced()

    def _finish_decided(self) -> None:
        for prepared in self.coordinator.unfinished():
            failpoint("broker.before_finish")
            if prepared.transactional_id not in self._held_up:
                log.info("finishing %s of %s", prepared.state, prepared.transactional_id)
            self._carry_out(prepared, self._env.wall_ms(), first_time=False)

    def _abort_orphans(self, groups: Groups) -> None:
        known = self.coordinator.open_identities()
        now_ms = self._env.wall_ms()
        for topic in self._topics:
            for partition in topic.partitions:
                for producer_id, epoch, first_offset in partition.log.open_transactions():
                    if (producer_id, epoch) not in known:
                        log.warning(
                            "aborting the transaction of producer %d, epoch %d, open in %s-%d since offset %d: "
                            "the coordinator does not know it",
                            *(producer_id, epoch, topic.info.name, partition.log.partition, first_offset),
                        )
                        failpoint("broker.before_orphan")
                        # With the next epoch: its producer may be alive, and would go on where the marker stands in
                        # the middle of what it takes for one transaction.
                        self._end_in(partition, producer_id, min(epoch + 1, MAX_EPOCH), False, now_ms, False)
        for producer_id in groups.coordinator.pending_producers() - {producer_id for producer_id, _ in known}:
            log.warning("dropping offsets of producer %d: the coordinator knows no transaction of it", producer_id)
            groups.end_transaction(producer_id, False, now_ms)

    def _snapshot(self) -> list[Change]:
        found, _ = self.coordinator.list_transactions(0)
        return [encode_transaction(metadata) for metadata in found]

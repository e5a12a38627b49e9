"""A model of one transactional id on a Kafka broker, small enough to be read: the oracle of the protocol's tests.

It follows the tables that were measured on Apache Kafka 4.3.1 (facts 2.2, 2.4 to 2.7, 2.11), with markers written at
once. Requests are plain calls, so that a test decides whether an answer arrives, is lost, or comes much too late.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from semel.client.batches import Identity
from semel.client.transaction_state import Kind, Request
from semel.errors import ErrorCode as E
from semel.types import TopicPartition


@dataclass(frozen=True)
class Copy:
    """One copy of a Produce batch on the wire."""

    partition: TopicPartition
    identity: Identity
    base_sequence: int
    count: int
    label: str
    transaction_version: int


@dataclass
class _Writer:
    epoch: int
    batches: list[tuple[int, int, str]] = field(default_factory=list)


class ModelBroker:
    """Coordinator, logs and offsets of one transactional id."""

    def __init__(self, transaction_version: int, first_epoch: int = 0) -> None:
        self.version = transaction_version
        self.identity = Identity(7, first_epoch - 1)
        self.last_epoch = -1
        self.state = "Empty"
        self.partitions: set[TopicPartition] = set()
        self.has_group = False
        self.open: dict[TopicPartition, list[str]] = {}
        self.committed: dict[TopicPartition, list[str]] = {}
        self.writers: dict[tuple[TopicPartition, int], _Writer] = {}
        self.previous = Identity()
        self.pending_offset: int | None = None
        self.offset = 0
        self.known = False

    # --- Coordinator ---

    def handle(self, request: Request) -> tuple[int, Identity]:
        """One request to the coordinator; the answer's code and identity."""
        match request.kind:
            case Kind.InitProducerId:
                return self._init(request.identity)
            case Kind.EndTxn:
                if request.transaction_version == 2:
                    return self._end_v2(request.identity, request.commit)
                return self._end_v1(request.identity, request.commit), Identity()
            case Kind.AddPartitionsToTxn:
                return self._add(request.identity, request.partitions, group=False), Identity()
            case Kind.AddOffsetsToTxn:
                return self._add(request.identity, frozenset(), group=True), Identity()
            case Kind.TxnOffsetCommit:
                return self._commit_offset(request), Identity()
            case _:
                raise AssertionError(request.kind)

    def _bump(self) -> None:
        if self.identity.epoch >= 32_766:
            self.identity = Identity(self.identity.producer_id + 1, 0)
        else:
            self.identity = Identity(self.identity.producer_id, self.identity.epoch + 1)

    def _init(self, asked: Identity) -> tuple[int, Identity]:
        current = self.identity
        own = asked in (Identity(), current)
        retry = asked == Identity(current.producer_id, self.last_epoch)
        if self.known and self.state == "Ongoing":
            if not own and not retry:
                return E.PRODUCER_FENCED, Identity()
            self._finish(commit=False)
            self._bump()
            self.last_epoch = asked.epoch if own and asked != Identity() and self.version == 2 else -1
            self.state = "CompleteAbort"
            return E.CONCURRENT_TRANSACTIONS, Identity()
        if self.known and asked != Identity() and asked.epoch >= 0 and retry:
            return E.NONE, current
        if self.known and not own:
            return E.PRODUCER_FENCED, Identity()
        self.known = True
        self.last_epoch = asked.epoch if asked != Identity() else -1
        self._bump()
        self.state = "Empty"
        return E.NONE, self.identity

    def _add(self, identity: Identity, partitions: frozenset[TopicPartition], *, group: bool) -> int:
        if identity.producer_id != self.identity.producer_id:
            return E.INVALID_PRODUCER_ID_MAPPING
        if identity != self.identity:
            return E.PRODUCER_FENCED
        self.state = "Ongoing"
        self.partitions |= partitions
        self.has_group = self.has_group or group
        return E.NONE

    def _end_v1(self, identity: Identity, commit: bool) -> int:
        if identity.producer_id != self.identity.producer_id:
            return E.INVALID_PRODUCER_ID_MAPPING
        if identity != self.identity:
            return E.PRODUCER_FENCED
        if self.state == "Ongoing":
            self._finish(commit)
            return E.NONE
        return E.NONE if self.state == ("CompleteCommit" if commit else "CompleteAbort") else E.INVALID_TXN_STATE

    def _end_v2(self, identity: Identity, commit: bool) -> tuple[int, Identity]:
        done = "CompleteCommit" if commit else "CompleteAbort"
        if identity == self.identity:
            if self.state == "Ongoing":
                self._finish(commit)
            elif commit:
                return E.INVALID_TXN_STATE, Identity()
            else:
                self.state = "CompleteAbort"
            self.previous = self.identity
            self._bump()
            return E.NONE, self.identity
        if self.state.startswith("Complete") and identity == self.previous:
            return (E.NONE, self.identity) if self.state == done else (E.INVALID_TXN_STATE, Identity())
        return E.PRODUCER_FENCED, Identity()

    def time_out(self) -> None:
        """The coordinator's own abort of an open transaction."""
        if self.state == "Ongoing":
            self._finish(commit=False)
            self.previous = self.identity
            self.last_epoch = self.identity.epoch if self.version == 2 else -1
            self._bump()

    def _finish(self, commit: bool) -> None:
        for partition in self.partitions:
            labels = self.open.pop(partition, [])
            if commit:
                self.committed.setdefault(partition, []).extend(labels)
            writer = (partition, self.identity.producer_id)
            if self.version == 2 and writer in self.writers:
                self.writers[writer] = _Writer(self.identity.epoch + 1)
        if self.has_group and commit and self.pending_offset is not None:
            self.offset = self.pending_offset
        self.pending_offset = None
        self.partitions, self.has_group = set(), False
        self.state = "CompleteCommit" if commit else "CompleteAbort"

    # --- Logs and offsets ---

    def _commit_offset(self, request: Request) -> int:
        if request.identity != self.identity:
            return E.INVALID_PRODUCER_EPOCH
        if request.transaction_version == 2:
            self.state, self.has_group = "Ongoing", True
        elif not self.has_group:
            return E.INVALID_TXN_STATE
        (self.pending_offset,) = request.offsets.values()
        return E.NONE

    def produce(self, copy: Copy) -> int:
        """One copy of a batch arrives."""
        if copy.identity != self.identity:
            return E.INVALID_PRODUCER_EPOCH
        key = (copy.partition, copy.identity.producer_id)
        writer = self.writers.get(key)
        if writer is None or writer.epoch < copy.identity.epoch:
            if writer is not None and copy.base_sequence != 0:
                return E.OUT_OF_ORDER_SEQUENCE_NUMBER
            writer = _Writer(copy.identity.epoch)
        last = copy.base_sequence + copy.count - 1
        if (copy.base_sequence, last) in [(first, end) for first, end, _ in writer.batches[-5:]]:
            return E.NONE
        if copy.partition not in self.partitions:
            if copy.transaction_version == 1:
                return E.INVALID_TXN_STATE
            if not writer.batches and copy.base_sequence != 0:
                return E.OUT_OF_ORDER_SEQUENCE_NUMBER
            self.state = "Ongoing"
            self.partitions.add(copy.partition)
        if writer.batches and copy.base_sequence != writer.batches[-1][1] + 1:
            return E.OUT_OF_ORDER_SEQUENCE_NUMBER
        self.writers[key] = writer
        writer.batches.append((copy.base_sequence, last, copy.label))
        self.open.setdefault(copy.partition, []).append(copy.label)
        return E.NONE

"""Committed and pending offsets against a model that keeps the whole log and reads it as Kafka's rules say."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from semel.coordinator.group_log import (
    CommittedOffset,
    LogRecord,
    OffsetKey,
    PendingKey,
    decode_key,
    encode_offset,
    encode_offset_key,
    encode_pending,
)
from semel.coordinator.offsets import OffsetStore
from semel.types import TopicPartition

GROUPS = ["g", "h"]
PARTITIONS = [TopicPartition("t", 0)]
PRODUCERS = [1, 2]


class OffsetMachine(RuleBasedStateMachine):
    """The model: every commit with its place in the log; the newest that counts is the committed offset."""

    def __init__(self) -> None:
        super().__init__()
        self.store = OffsetStore()
        self.log: list[LogRecord] = []
        self.place = 0
        self.stable: dict[tuple[str, TopicPartition], tuple[int, int]] = {}
        self.pending: dict[tuple[int, str, TopicPartition], tuple[int, int]] = {}

    def write(self, records: list[LogRecord]) -> None:
        self.log += records
        apply_all(self.store, records)

    @rule(group=st.sampled_from(GROUPS), partition=st.sampled_from(PARTITIONS), offset=st.integers(0, 99))
    def commit(self, group: str, partition: TopicPartition, offset: int) -> None:
        self.place += 1
        self.stable[group, partition] = self.place, offset
        self.write([encode_offset(group, partition, CommittedOffset(offset))])

    @rule(
        producer=st.sampled_from(PRODUCERS),
        group=st.sampled_from(GROUPS),
        partition=st.sampled_from(PARTITIONS),
        offset=st.integers(0, 99),
    )
    def commit_in_transaction(self, producer: int, group: str, partition: TopicPartition, offset: int) -> None:
        self.place += 1
        self.pending[producer, group, partition] = self.place, offset
        self.write([encode_pending(producer, group, partition, CommittedOffset(offset))])

    @rule(producer=st.sampled_from(PRODUCERS), commit=st.booleans(), write_fails=st.booleans())
    def end(self, producer: int, commit: bool, write_fails: bool) -> None:
        records = self.store.end_transaction(producer, commit)
        if write_fails:
            return
        for key in [key for key in self.pending if key[0] == producer]:
            place, offset = self.pending.pop(key)
            if commit and self.stable.get(key[1:], (0, 0))[0] < place:
                self.stable[key[1], key[2]] = place, offset
        self.write(records)
        assert self.store.end_transaction(producer, commit) == [], "asked again there is nothing left to do"

    @rule(group=st.sampled_from(GROUPS), partition=st.sampled_from(PARTITIONS))
    def delete(self, group: str, partition: TopicPartition) -> None:
        self.stable.pop((group, partition), None)
        for producer in PRODUCERS:
            self.pending.pop((producer, group, partition), None)
        self.write([(encode_offset_key(group, partition), None)])

    @rule()
    def restart(self) -> None:
        self.store = OffsetStore()
        apply_all(self.store, self.log)

    @rule(old_log_stays=st.booleans())
    def checkpoint(self, old_log_stays: bool) -> None:
        """The log's beginning is deleted after the snapshot, or a crash left both."""
        snapshot = self.store.snapshot()
        self.log = self.log + snapshot if old_log_stays else snapshot
        self.restart()

    @invariant()
    def the_store_says_what_the_model_says(self) -> None:
        for group in GROUPS:
            for partition in PARTITIONS:
                value = self.store.get(group, partition)
                expected = self.stable.get((group, partition))
                assert (None if value is None else value.offset) == (None if expected is None else expected[1])
                waiting = any(key[1:] == (group, partition) for key in self.pending)
                assert self.store.is_pending(group, partition) is waiting
            known = {partition for other, partition in self.stable if other == group}
            known |= {partition for _, other, partition in self.pending if other == group}
            assert self.store.partitions(group) == sorted(known)
        assert self.store.pending_producers() == {producer for producer, _, _ in self.pending}

    @invariant()
    def nothing_empty_is_kept(self) -> None:
        assert self.store.group_ids() == {group for group in GROUPS if self.store.partitions(group)}


OffsetMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestOffsetMachine = OffsetMachine.TestCase


def apply_all(store: OffsetStore, records: list[LogRecord]) -> None:
    for key, value in records:
        parsed = decode_key(key)
        assert isinstance(parsed, OffsetKey | PendingKey)
        store.apply(parsed, value)


def test_a_plain_commit_after_the_pending_one_wins_although_the_transaction_ends_later():
    store = OffsetStore()
    partition = PARTITIONS[0]
    apply_all(store, [encode_pending(1, "g", partition, CommittedOffset(5))])
    apply_all(store, [encode_offset("g", partition, CommittedOffset(3))])
    apply_all(store, store.end_transaction(1, commit=True))
    assert store.get("g", partition) == CommittedOffset(3)


def test_a_retried_commit_in_a_transaction_overwrites_the_first_one():
    store = OffsetStore()
    partition = PARTITIONS[0]
    for offset in (5, 6):
        apply_all(store, [encode_pending(1, "g", partition, CommittedOffset(offset))])
    apply_all(store, store.end_transaction(1, commit=True))
    assert store.get("g", partition) == CommittedOffset(6)


def test_of_two_transactions_the_later_commit_counts_in_whatever_order_they_end():
    partition = PARTITIONS[0]
    for order in ((1, 2), (2, 1)):
        store = OffsetStore()
        log = [
            encode_pending(1, "g", partition, CommittedOffset(5)),
            encode_pending(2, "g", partition, CommittedOffset(6)),
        ]
        apply_all(store, log)
        for producer in order:
            records = store.end_transaction(producer, commit=True)
            log += records
            store = OffsetStore()
            apply_all(store, log)
        assert store.get("g", partition) == CommittedOffset(6), f"ended in the order {order}"


def test_the_topics_of_a_group_are_kept_apart():
    store = OffsetStore()
    first, second = TopicPartition("t", 0), TopicPartition("u", 0)
    apply_all(
        store, [encode_offset("g", second, CommittedOffset(2)), encode_pending(1, "g", first, CommittedOffset(1))]
    )
    assert store.partitions("g") == [first, second]
    assert (store.is_pending("g", first), store.is_pending("g", second)) == (True, False)
    assert list(store.committed("g")) == [(second, CommittedOffset(2))]

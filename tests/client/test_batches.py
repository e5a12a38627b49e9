"""Order and sequence numbers of one partition's batches."""

from __future__ import annotations

import pytest

from semel.client.batches import SEQUENCES, Batch, Identity, Lane
from semel.client.transaction import TransactionProtocol
from semel.client.transaction_state import State
from semel.errors import Fatal
from semel.types import GroupMetadata, TopicPartition
from semel.wire.records import BatchBuilder, check_crc, read_header

OWN = Identity(7, 3)


def batch(count: int = 1) -> Batch:
    builder = BatchBuilder()
    for number in range(count):
        builder.append(None, b"%d" % number, 1_700_000_000_000)
    return Batch(TopicPartition("t", 0), builder, deadline=10.0)


def filled(*counts: int) -> Lane:
    lane = Lane(max_in_flight=5)
    for count in counts:
        lane.add(batch(count))
    return lane


def send_all(lane: Lane, node: int = 1) -> list[Batch]:
    sent = []
    while (item := lane.peek(node)) is not None:
        lane.send(item, node, OWN)
        sent.append(item)
    return sent


def test_sequences_follow_the_record_counts_and_five_are_in_flight() -> None:
    lane = filled(1, 2, 3, 1, 1, 1, 1)
    sent = send_all(lane)
    assert [item.base_sequence for item in sent] == [0, 1, 3, 6, 7]
    lane.written(sent[0])
    assert [item.base_sequence for item in send_all(lane)] == [8]


def test_a_copy_sent_again_carries_the_same_sequence_after_all_came_back() -> None:
    lane = filled(2, 2, 2)
    first, second, third = send_all(lane)
    lane.undone(first, "NOT_LEADER_OR_FOLLOWER")
    assert lane.peek(1) is None, "the two behind are still on their way"
    lane.undone(second, "OUT_OF_ORDER_SEQUENCE_NUMBER")
    assert lane.peek(1) is None
    lane.undone(third, "OUT_OF_ORDER_SEQUENCE_NUMBER")
    again = send_all(lane, node=2)
    assert again == [first, second, third]
    assert [item.base_sequence for item in again] == [0, 2, 4]


def test_batches_in_flight_to_one_broker_hold_back_those_for_another() -> None:
    """A new leader without our state would take a later batch first."""
    lane = filled(1, 1)
    lane.send(lane.peek(1), 1, OWN)
    assert lane.peek(2) is None
    assert lane.peek(1) is not None


def test_sequences_wrap_at_two_to_the_31() -> None:
    lane = filled(3, 1)
    lane.next_sequence = SEQUENCES - 2
    first, second = send_all(lane)
    assert (first.base_sequence, second.base_sequence) == (SEQUENCES - 2, 1)


def test_a_new_identity_restamps_what_is_queued_but_never_what_may_be_in_the_log() -> None:
    lane = filled(2)
    (item,) = send_all(lane)
    before = item.encode(transactional=True)
    lane.undone(item, "refused")
    lane.restart()
    lane.send(lane.peek(1), 1, Identity(7, 4))
    header = read_header(item.encode(transactional=True))
    assert (header.producer_epoch, header.base_sequence) == (4, 0)
    assert header.is_transactional
    assert check_crc(item.encode(transactional=True), 0, header)
    assert read_header(before).producer_epoch == 3
    lane.undone(item, "connection lost", unanswered=True)
    lane.restart()
    with pytest.raises(AssertionError, match="may be in the log"):
        lane.send(lane.peek(1), 1, Identity(7, 5))


ITEMS = TopicPartition("items", 0)


def initialized(protocol: TransactionProtocol, epoch: int) -> None:
    """The next request is InitProducerId, and its answer opens the way for a transaction."""
    request = protocol.next_request()
    assert request is not None
    protocol.init_answered(request, 0, Identity(1, epoch))
    protocol.begin(2)


def broken_by_its_offsets(protocol: TransactionProtocol, *, in_flight: bool = False) -> Batch | None:
    """A transaction with one batch, queued or in flight, whose offsets can never be written."""
    protocol.initialize(2)
    initialized(protocol, 3)
    builder = BatchBuilder()
    builder.append(None, b"first", 1)
    protocol.produce(Batch(ITEMS, builder, 1e9))
    batch = protocol.take_batch(ITEMS, "node") if in_flight else None
    protocol.send_offsets({TopicPartition("in", 0): 5}, GroupMetadata("g", 1, "m", None))
    request = protocol.next_request()
    assert request is not None
    protocol.broken(request, Fatal("refused"))
    return batch


def test_a_transaction_after_a_failure_begins_with_nothing_of_the_failed_one() -> None:
    """Found by a failpoint: what was queued when a request could never be written was sent in the next transaction."""
    protocol = TransactionProtocol("t")
    broken_by_its_offsets(protocol)
    protocol.initialize(2)
    initialized(protocol, 4)
    assert protocol.sendable() == []
    assert list(protocol.batches()) == []


@pytest.mark.parametrize("answer", [0, 29, 47, None])
@pytest.mark.parametrize("is_early", [True, False])
def test_a_new_identity_waits_for_what_a_failed_transaction_has_in_flight(answer: int | None, is_early: bool) -> None:
    """The old batch is answered before or after the next start. 29: not allowed, 47: old epoch, None: never."""
    protocol = TransactionProtocol("t")
    batch = broken_by_its_offsets(protocol, in_flight=True)
    assert batch is not None
    if not is_early:
        protocol.initialize(2)
        assert protocol.next_request() is None
    if answer is None:
        protocol.batch_unanswered(batch, "the connection is gone")
    else:
        protocol.batch_answered(batch, answer)
    if is_early:
        protocol.initialize(2)
    elif answer == 47:
        assert protocol.state is State.Suspect, "somebody else may own the id: that is looked into first"
        return
    initialized(protocol, 4)
    assert protocol.sendable() == []
    assert list(protocol.batches()) == []

"""The answer tables of the transaction coordinator, one test a table."""

from __future__ import annotations

from dataclasses import replace

import pytest

from semel.coordinator.transaction import (
    EPOCH_MAX,
    MAX_PARTITIONS_PER_TRANSACTION,
    NO_TIMEOUT_MS,
    TransactionCoordinator,
    TransactionMetadata,
    TransactionState,
)
from semel.errors import ErrorCode
from semel.types import TopicPartition

from .drivers import ID, P0, P1, Transactions

S = TransactionState
E = ErrorCode
PID, OTHER = 7, 99
C = 5
"""The current epoch of the tables, `c` in kafka_facts; the last one, `l`, is C - 1."""
NEW = 1000
"""The first producer id that the coordinator gives."""


def metadata(state: TransactionState, **changes: object) -> TransactionMetadata:
    """Producer id 7, epoch 5, last epoch 4, as TV2 leaves it."""
    is_open = state in (S.ONGOING, S.PREPARE_COMMIT, S.PREPARE_ABORT)
    base = TransactionMetadata(
        transactional_id=ID,
        producer_id=PID,
        producer_epoch=C,
        previous_producer_id=PID,
        last_producer_epoch=C - 1,
        state=state,
        partitions=frozenset({P0}) if is_open else frozenset(),
        start_ms=1_000 if is_open else -1,
        last_update_ms=1_000,
        client_version=2,
    )
    return replace(base, **changes)


def at(state: TransactionState, version: int = 2, **changes: object) -> Transactions:
    txn = Transactions(version)
    txn.place(metadata(state, **changes))
    return txn


IDLE = [S.EMPTY, S.COMPLETE_COMMIT, S.COMPLETE_ABORT]
PREPARED = [S.PREPARE_COMMIT, S.PREPARE_ABORT]


# -- InitProducerId ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", IDLE)
@pytest.mark.parametrize(
    ("request_identity", "error", "identity", "last"),
    [
        ((-1, -1), E.NONE, (PID, C + 1), -1),
        ((PID, C), E.NONE, (PID, C + 1), C),
        ((PID, C - 1), E.NONE, (PID, C), C - 1),
        ((PID, C - 2), E.PRODUCER_FENCED, None, None),
        ((PID, C + 1), E.PRODUCER_FENCED, None, None),
        ((OTHER, C), E.PRODUCER_FENCED, None, None),
        ((OTHER, EPOCH_MAX), E.PRODUCER_FENCED, None, None),
    ],
)
def test_init_of_an_idle_id(state, request_identity, error, identity, last):
    txn = at(state)
    answer = txn.init(*request_identity)
    assert answer.error is error
    if identity is None:
        assert answer.transition is None
        assert txn.current == metadata(state), "a refused zombie changed something"
    else:
        assert (answer.producer_id, answer.producer_epoch) == identity == txn.current.identity
        assert (txn.current.state, txn.current.last_producer_epoch) == (S.EMPTY, last)


@pytest.mark.parametrize("version", [0, 3, 4, 6])
def test_a_stale_identity_gets_the_word_that_its_request_version_knows(version):
    assert at(S.EMPTY).init(PID, C - 2, version).error is (
        E.INVALID_PRODUCER_EPOCH if version < 4 else E.PRODUCER_FENCED
    )


@pytest.mark.parametrize("state", IDLE)
@pytest.mark.parametrize(
    ("request_identity", "last"), [((-1, -1), -1), ((PID, EPOCH_MAX), EPOCH_MAX)], ids=["new", "known"]
)
def test_the_producer_id_rotates_at_the_last_epoch(state, request_identity, last):
    txn = at(state, producer_epoch=EPOCH_MAX, last_producer_epoch=EPOCH_MAX - 1)
    answer = txn.init(*request_identity)
    assert (answer.error, answer.producer_id, answer.producer_epoch) == (E.NONE, NEW, 0)
    assert (txn.current.previous_producer_id, txn.current.last_producer_epoch) == (PID, last)
    assert txn.init(PID, EPOCH_MAX - 1).error is E.PRODUCER_FENCED


def test_a_rotation_can_be_asked_for_again_and_again_also_after_a_restart():
    txn = at(S.EMPTY, producer_epoch=EPOCH_MAX, last_producer_epoch=-1)
    assert txn.init(PID, EPOCH_MAX)[:3] == (E.NONE, NEW, 0)
    assert txn.init(PID, EPOCH_MAX)[:3] == (E.NONE, NEW, 0)
    txn.restart()
    assert txn.init(PID, EPOCH_MAX)[:3] == (E.NONE, NEW, 0)
    txn.add(NEW, 0)
    txn.end(NEW, 0, True)
    assert txn.init(PID, EPOCH_MAX).error is E.PRODUCER_FENCED


def test_a_retried_init_is_known_again_after_a_restart():
    txn = at(S.EMPTY)
    assert txn.init(PID, C)[:3] == (E.NONE, PID, C + 1)
    txn.restart()
    assert txn.init(PID, C)[:3] == (E.NONE, PID, C + 1)


def test_who_wrote_under_an_identity_cannot_ask_for_it_again():
    txn = at(S.EMPTY, version=1)
    txn.init(PID, C)
    txn.add(PID, C + 1)
    txn.end(PID, C + 1, True)
    assert txn.init(PID, C).error is E.PRODUCER_FENCED
    assert txn.end(PID, C + 1, True).error is E.NONE, "the late duplicate took the outcome away"


@pytest.mark.parametrize("request_identity", [(-1, -1), (OTHER, 3)])
def test_init_of_an_unknown_id_gives_a_new_producer_id(request_identity):
    txn = Transactions()
    answer = txn.init(*request_identity)
    assert answer[:3] == (E.NONE, NEW, 0)
    assert (txn.current.state, txn.current.last_producer_epoch) == (S.EMPTY, -1)


@pytest.mark.parametrize("state", PREPARED)
@pytest.mark.parametrize("request_identity", [(-1, -1), (PID, C), (PID, C - 1), (PID, 0), (OTHER, C)])
def test_init_waits_for_a_decision_under_way(state, request_identity):
    txn = at(state)
    answer = txn.init(*request_identity)
    assert (answer.error, answer.transition) == (E.CONCURRENT_TRANSACTIONS, None)


@pytest.mark.parametrize(
    ("version", "request_identity", "after_abort", "second"),
    [
        (2, (-1, -1), (C + 1, C), (E.NONE, PID, C + 2)),
        (2, (PID, C), (C + 1, C), (E.NONE, PID, C + 1)),
        (1, (-1, -1), (C + 1, -1), (E.NONE, PID, C + 2)),
        (1, (PID, C), (C + 1, -1), (E.PRODUCER_FENCED, -1, -1)),
    ],
)
def test_init_aborts_an_open_transaction_and_lets_ask_again(version, request_identity, after_abort, second):
    txn = at(S.ONGOING, version)
    answer = txn.init(*request_identity)
    assert answer.error is E.CONCURRENT_TRANSACTIONS
    assert txn.current.state is S.PREPARE_ABORT
    assert txn.coordinator.marker_epoch(txn.current) == C + 1
    txn.finish()
    assert txn.current.state is S.COMPLETE_ABORT
    assert (txn.current.producer_epoch, txn.current.last_producer_epoch) == after_abort
    assert txn.init(*request_identity)[:3] == second
    assert txn.produce(PID, C) is E.INVALID_PRODUCER_EPOCH


@pytest.mark.parametrize("request_identity", [(PID, C - 1), (PID, C - 2), (PID, C + 1), (OTHER, C)])
@pytest.mark.parametrize("version", [1, 2])
def test_a_zombie_cannot_abort_the_transaction_of_its_successor(version, request_identity):
    txn = at(S.ONGOING, version)
    answer = txn.init(*request_identity)
    assert (answer.error, answer.transition) == (E.PRODUCER_FENCED, None)
    assert txn.produce(PID, C) is E.NONE


@pytest.mark.parametrize("version", [1, 2])
def test_a_fence_at_the_last_epoch_rotates(version):
    txn = at(S.ONGOING, version, producer_epoch=EPOCH_MAX, last_producer_epoch=EPOCH_MAX - 1)
    txn.init()
    assert txn.coordinator.marker_epoch(txn.current) == EPOCH_MAX + 1
    txn.finish()
    answer = txn.init()
    assert (answer.error, answer.producer_epoch) == (E.NONE, 1 if version == 2 else 0)
    assert answer.producer_id >= NEW
    assert txn.produce(PID, EPOCH_MAX) is E.INVALID_PRODUCER_ID_MAPPING


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("", 60_000, -1, -1), E.INVALID_REQUEST),
        (("x" * 32_768, 60_000, -1, -1), E.INVALID_REQUEST),
        ((ID, 60_000, 7, -1), E.INVALID_REQUEST),
        ((ID, 60_000, -1, 7), E.INVALID_REQUEST),
        ((ID, 0, -1, -1), E.INVALID_TRANSACTION_TIMEOUT),
        ((ID, -5, -1, -1), E.INVALID_TRANSACTION_TIMEOUT),
        ((ID, 900_001, -1, -1), E.INVALID_TRANSACTION_TIMEOUT),
        ((ID, 900_000, -1, -1), E.NONE),
        ((None, 0, -1, -1), E.NONE),
        ((None, 60_000, 7, -1), E.INVALID_REQUEST),
    ],
)
def test_what_init_refuses_before_it_looks_at_the_state(arguments, error):
    coordinator = Transactions().coordinator
    assert coordinator.init_producer_id(*arguments, 0, 6).error is error


def test_a_producer_without_transactions_gets_an_id_of_its_own_each_time():
    coordinator = Transactions().coordinator
    answers = [coordinator.init_producer_id(None, 0, 7, 7, 0, 6) for _ in range(2)]
    assert [answer[1:4] for answer in answers] == [(NEW, 0, None), (NEW + 1, 0, None)]


def test_the_number_of_ids_is_bounded():
    coordinator = TransactionCoordinator(new_producer_id=lambda: 1, max_ids=1)
    first = coordinator.init_producer_id("a", 1_000, -1, -1, 0, 6)
    assert first.transition is not None
    coordinator.complete(first.transition)
    assert coordinator.init_producer_id("b", 1_000, -1, -1, 0, 6).error is E.POLICY_VIOLATION
    assert coordinator.init_producer_id("a", 1_000, -1, -1, 0, 6).error is E.NONE


# -- AddPartitionsToTxn, AddOffsetsToTxn, implicit add ----------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "identity", "api_version", "implicit", "error"),
    [
        (S.EMPTY, (PID, C), 3, False, E.NONE),
        (S.COMPLETE_COMMIT, (PID, C), 3, False, E.NONE),
        (S.COMPLETE_ABORT, (PID, C), 12, True, E.NONE),
        (S.ONGOING, (PID, C), 3, False, E.NONE),
        (S.EMPTY, (OTHER, C), 3, False, E.INVALID_PRODUCER_ID_MAPPING),
        (S.ONGOING, (OTHER, C), 12, True, E.INVALID_PRODUCER_ID_MAPPING),
        (S.ONGOING, (PID, C - 1), 0, False, E.INVALID_PRODUCER_EPOCH),
        (S.ONGOING, (PID, C - 1), 1, False, E.INVALID_PRODUCER_EPOCH),
        (S.ONGOING, (PID, C - 1), 2, False, E.PRODUCER_FENCED),
        (S.ONGOING, (PID, C + 1), 4, False, E.PRODUCER_FENCED),
        (S.ONGOING, (PID, C - 1), 12, True, E.INVALID_PRODUCER_EPOCH),
        (S.PREPARE_COMMIT, (PID, C), 3, False, E.CONCURRENT_TRANSACTIONS),
        (S.PREPARE_ABORT, (PID, C), 12, True, E.CONCURRENT_TRANSACTIONS),
        (S.PREPARE_COMMIT, (PID, C - 1), 12, True, E.INVALID_PRODUCER_EPOCH),
        (S.PREPARE_COMMIT, (PID, C - 1), 3, False, E.PRODUCER_FENCED),
    ],
)
def test_adding_partitions(state, identity, api_version, implicit, error):
    txn = at(state)
    answer = txn.coordinator.add_partitions(ID, *identity, [P1], 2_000, api_version=api_version, implicit=implicit)
    assert answer.error is error
    assert (answer.transition is not None) is (error is E.NONE)


def test_partitions_of_an_unknown_id_are_refused():
    assert Transactions().add(1, 0).error is E.INVALID_PRODUCER_ID_MAPPING


def test_the_first_partition_opens_the_transaction_and_later_ones_do_not_move_its_start():
    txn = Transactions()
    txn.init()
    txn.now = 5_000
    txn.add(NEW, 0, P0)
    txn.now = 6_000
    assert txn.add(NEW, 0, P1).transition is not None
    assert txn.add(NEW, 0, P0, P1).transition is None, "nothing new: nothing to write"
    assert (txn.current.state, txn.current.start_ms, txn.current.last_update_ms) == (S.ONGOING, 5_000, 6_000)
    assert txn.current.partitions == {P0, P1}


def test_a_new_transaction_does_not_inherit_partitions():
    txn = Transactions()
    txn.init()
    txn.add(NEW, 0, P0)
    txn.end(NEW, 0, True)
    txn.add(NEW, 1, P1)
    assert txn.current.partitions == {P1}


def test_the_partitions_of_a_transaction_are_bounded():
    txn = at(S.ONGOING)
    many = [TopicPartition("t", number) for number in range(MAX_PARTITIONS_PER_TRANSACTION)]
    assert txn.add(PID, C, *many).error is E.POLICY_VIOLATION
    assert txn.current.partitions == {P0}


# -- Produce ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "identity", "partition", "version", "error"),
    [
        (S.ONGOING, (PID, C), P0, 10, E.NONE),
        (S.ONGOING, (PID, C), P0, 11, E.NONE),
        (S.ONGOING, (PID, C), P0, 12, E.NONE),
        (S.ONGOING, (PID, C), P1, 10, E.INVALID_TXN_STATE),
        (S.ONGOING, (PID, C), P1, 11, E.TRANSACTION_ABORTABLE),
        (S.ONGOING, (PID, C), P1, 12, E.CONCURRENT_TRANSACTIONS),
        (S.EMPTY, (PID, C), P0, 10, E.INVALID_TXN_STATE),
        (S.COMPLETE_COMMIT, (PID, C), P0, 11, E.TRANSACTION_ABORTABLE),
        (S.ONGOING, (PID, C - 1), P0, 9, E.INVALID_PRODUCER_EPOCH),
        (S.ONGOING, (PID, C + 1), P0, 13, E.INVALID_PRODUCER_EPOCH),
        # The epoch is compared before the partition (KAFKA-19690).
        (S.EMPTY, (PID, C - 1), P1, 10, E.INVALID_PRODUCER_EPOCH),
        (S.ONGOING, (OTHER, C), P0, 12, E.INVALID_PRODUCER_ID_MAPPING),
        (S.PREPARE_COMMIT, (PID, C - 1), P0, 12, E.INVALID_PRODUCER_EPOCH),
        (S.PREPARE_COMMIT, (PID, C), P0, 12, E.CONCURRENT_TRANSACTIONS),
        (S.PREPARE_ABORT, (PID, C), P0, 10, E.NOT_ENOUGH_REPLICAS),
        (S.PREPARE_ABORT, (PID, C), P0, 11, E.NOT_ENOUGH_REPLICAS),
    ],
)
def test_produce(state, identity, partition, version, error):
    assert at(state).produce(*identity, partition, version) is error


def test_produce_under_an_unknown_id():
    assert Transactions().produce(1, 0) is E.INVALID_PRODUCER_ID_MAPPING


# -- EndTxn -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", range(5))
@pytest.mark.parametrize(
    ("state", "commit", "error", "target"),
    [
        (S.ONGOING, True, E.NONE, S.PREPARE_COMMIT),
        (S.ONGOING, False, E.NONE, S.PREPARE_ABORT),
        (S.PREPARE_COMMIT, True, E.CONCURRENT_TRANSACTIONS, None),
        (S.PREPARE_COMMIT, False, E.INVALID_TXN_STATE, None),
        (S.PREPARE_ABORT, True, E.INVALID_TXN_STATE, None),
        (S.PREPARE_ABORT, False, E.CONCURRENT_TRANSACTIONS, None),
        (S.COMPLETE_COMMIT, True, E.NONE, None),
        (S.COMPLETE_COMMIT, False, E.INVALID_TXN_STATE, None),
        (S.COMPLETE_ABORT, True, E.INVALID_TXN_STATE, None),
        (S.COMPLETE_ABORT, False, E.NONE, None),
        (S.EMPTY, True, E.INVALID_TXN_STATE, None),
        (S.EMPTY, False, E.INVALID_TXN_STATE, None),
    ],
)
def test_end_transaction_v1(state, commit, error, target, version):
    txn = at(state, client_version=0)
    answer = txn.decide(PID, C, commit, version)
    assert answer[:3] == (error, -1, -1)
    assert txn.current.state is (target or state)
    assert txn.current.producer_epoch == C
    if target is not None:
        assert txn.coordinator.marker_epoch(txn.current) == C


@pytest.mark.parametrize("version", range(5))
def test_end_transaction_v1_of_another_identity(version):
    txn = at(S.ONGOING)
    fenced = E.INVALID_PRODUCER_EPOCH if version < 2 else E.PRODUCER_FENCED
    assert txn.decide(PID, C - 1, True, version).error is fenced
    assert txn.decide(OTHER, C, True, version).error is E.INVALID_PRODUCER_ID_MAPPING
    assert txn.current.state is S.ONGOING


BUSY, WRONG, FENCED = E.CONCURRENT_TRANSACTIONS, E.INVALID_TXN_STATE, E.PRODUCER_FENCED


@pytest.mark.parametrize(
    ("state", "epoch", "commit_error", "abort_error", "answered_epoch"),
    [
        (S.ONGOING, C, E.NONE, E.NONE, C + 1),
        (S.ONGOING, C - 1, FENCED, FENCED, None),
        (S.ONGOING, C + 1, FENCED, FENCED, None),
        (S.PREPARE_COMMIT, C - 1, BUSY, WRONG, None),
        (S.PREPARE_ABORT, C - 1, BUSY, BUSY, None),
        # The next transaction of a client that is faster than our markers (KAFKA-18464).
        (S.PREPARE_COMMIT, C, BUSY, BUSY, None),
        (S.PREPARE_ABORT, C, BUSY, BUSY, None),
        (S.PREPARE_COMMIT, C - 2, FENCED, FENCED, None),
        (S.COMPLETE_COMMIT, C - 1, E.NONE, WRONG, C),
        (S.COMPLETE_COMMIT, C, WRONG, E.NONE, C + 1),
        (S.COMPLETE_COMMIT, C - 2, FENCED, FENCED, None),
        (S.COMPLETE_COMMIT, C + 1, FENCED, FENCED, None),
        (S.COMPLETE_ABORT, C - 1, FENCED, E.NONE, C),
        (S.COMPLETE_ABORT, C, WRONG, E.NONE, C + 1),
        (S.COMPLETE_ABORT, C - 2, FENCED, FENCED, None),
        (S.EMPTY, C, WRONG, E.NONE, C + 1),
        (S.EMPTY, C - 1, FENCED, FENCED, None),
        (S.EMPTY, C + 1, FENCED, FENCED, None),
    ],
)
def test_end_transaction_v2(state, epoch, commit_error, abort_error, answered_epoch):
    for commit, error in ((True, commit_error), (False, abort_error)):
        txn = at(state)
        answer = txn.decide(PID, epoch, commit, 5)
        assert answer.error is error, f"commit={commit}"
        expected = (PID, answered_epoch) if error is E.NONE else (-1, -1)
        assert answer[1:3] == expected
        changes = error is E.NONE and epoch == C
        assert (answer.transition is not None) is changes
        txn.finish()
        if changes:
            assert txn.current.identity == expected
            assert txn.current.state is (S.COMPLETE_COMMIT if commit else S.COMPLETE_ABORT)


def test_end_transaction_v2_of_another_producer_id_or_an_unknown_id():
    assert at(S.ONGOING).decide(OTHER, C, True, 5).error is E.INVALID_PRODUCER_ID_MAPPING
    assert Transactions().decide(OTHER, C, True, 5).error is E.INVALID_PRODUCER_ID_MAPPING
    coordinator = Transactions().coordinator
    assert coordinator.end_transaction("", 1, 0, True, 0, 5).error is E.INVALID_REQUEST


@pytest.mark.parametrize("commit", [True, False])
def test_ending_at_the_last_epoch_rotates_and_can_be_repeated(commit):
    txn = at(S.ONGOING, producer_epoch=EPOCH_MAX, last_producer_epoch=EPOCH_MAX - 1)
    assert txn.decide(PID, EPOCH_MAX, commit)[:3] == (E.NONE, NEW, 0)
    assert txn.coordinator.marker_epoch(txn.current) == EPOCH_MAX + 1
    assert txn.decide(PID, EPOCH_MAX, commit).error is BUSY
    assert txn.add(NEW, 0).error is BUSY, "the client's next transaction must not be fenced by its own end"
    assert txn.produce(NEW, 0) is BUSY
    txn.restart()
    txn.finish()
    assert txn.current.identity == (NEW, 0)
    assert txn.decide(PID, EPOCH_MAX, commit)[:3] == (E.NONE, NEW, 0)
    opposite = txn.decide(PID, EPOCH_MAX, not commit)
    assert opposite.error is (WRONG if commit else FENCED)
    txn.add(NEW, 0)
    txn.end(NEW, 0, True)
    assert txn.decide(PID, EPOCH_MAX, commit).error is E.INVALID_PRODUCER_ID_MAPPING


def test_a_transaction_may_change_protocol_between_its_begin_and_its_end():
    txn = at(S.ONGOING, client_version=0)
    assert txn.end(PID, C, True, 5)[:3] == (E.NONE, PID, C + 1)
    txn = at(S.ONGOING)
    assert txn.end(PID, C, True, 4).error is E.NONE
    assert txn.current.identity == (PID, C)
    # Kafka's row R16: after a V1 end the same epoch is a next transaction to V2.
    assert txn.end(PID, C, True, 5).error is WRONG
    assert txn.end(PID, C, False, 5)[:3] == (E.NONE, PID, C + 1)


def test_the_end_before_a_v1_end_is_not_taken_for_its_retry():
    txn = at(S.COMPLETE_COMMIT, client_version=0)
    assert txn.decide(PID, C - 1, True, 5).error is FENCED


# -- Two-step change --------------------------------------------------------------------------------------------


def test_while_a_decision_is_being_written_its_identity_is_closed_and_everything_else_waits():
    txn = at(S.ONGOING)
    coordinator = txn.coordinator
    answer = coordinator.end_transaction(ID, PID, C, True, 2_000, 5)
    assert answer.transition is not None
    assert coordinator.is_pending(ID)
    assert txn.produce(PID, C) is E.CONCURRENT_TRANSACTIONS
    assert txn.produce(PID, C, version=11) is E.NOT_ENOUGH_REPLICAS
    assert txn.add(PID, C, P0).error is BUSY
    assert txn.init().error is BUSY
    assert txn.init(PID, C).error is BUSY
    assert txn.decide(PID, C, True, 5).error is BUSY
    assert txn.decide(PID, C, False, 4).error is BUSY
    assert coordinator.time_out(ID, 10**9).error is BUSY
    assert coordinator.expired(10**9) == []
    coordinator.complete(answer.transition)
    assert txn.produce(PID, C) is E.INVALID_PRODUCER_EPOCH


def test_a_cancelled_decision_leaves_the_transaction_open():
    txn = at(S.ONGOING)
    answer = txn.coordinator.end_transaction(ID, PID, C, True, 2_000, 5)
    assert answer.transition is not None
    txn.coordinator.cancel(answer.transition)
    assert txn.produce(PID, C) is E.NONE
    assert txn.end(PID, C, True)[:3] == (E.NONE, PID, C + 1)


def test_produce_to_an_added_partition_goes_on_while_another_one_is_being_added():
    txn = at(S.ONGOING)
    answer = txn.coordinator.add_partitions(ID, PID, C, [P1], 2_000, api_version=12, implicit=True)
    assert answer.transition is not None
    assert txn.produce(PID, C, P0) is E.NONE
    assert txn.coordinator.add_partitions(ID, PID, C, [P0], 2_000, api_version=12, implicit=True)[:4] == (
        0,
        -1,
        -1,
        None,
    )
    assert txn.produce(PID, C, P1) is E.CONCURRENT_TRANSACTIONS
    txn.coordinator.complete(answer.transition)
    assert txn.produce(PID, C, P1) is E.NONE


def test_a_transition_is_completed_once_and_only_as_it_was_handed_out():
    txn = at(S.ONGOING)
    answer = txn.coordinator.end_transaction(ID, PID, C, True, 2_000, 5)
    assert answer.transition is not None
    with pytest.raises(AssertionError):
        txn.coordinator.complete(replace(answer.transition, last_update_ms=3_000))
    txn.coordinator.complete(answer.transition)
    with pytest.raises(AssertionError):
        txn.coordinator.complete(answer.transition)


def test_two_ids_do_not_wait_for_each_other():
    coordinator = Transactions().coordinator
    assert coordinator.init_producer_id("a", 1_000, -1, -1, 0, 6).error is E.NONE
    assert coordinator.init_producer_id("b", 1_000, -1, -1, 0, 6).error is E.NONE
    assert coordinator.init_producer_id("a", 1_000, -1, -1, 0, 6).error is BUSY


# -- Time-outs, recovery, looking in ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "old_v1", "commit_v2", "abort_v2", "init_again"),
    [
        (2, FENCED, FENCED, E.NONE, (E.NONE, PID, C + 1)),
        (1, FENCED, FENCED, FENCED, (E.PRODUCER_FENCED, -1, -1)),
    ],
)
def test_what_the_writer_of_a_timed_out_transaction_hears(version, old_v1, commit_v2, abort_v2, init_again):
    txn = at(S.ONGOING, version)
    txn.now = 1_000 + 60_000
    assert txn.coordinator.expired(txn.now) == []
    assert txn.time_out().error is E.INVALID_TXN_STATE
    txn.now += 1
    assert txn.coordinator.expired(txn.now) == [ID]
    assert txn.time_out().error is E.NONE
    txn.finish()
    assert (txn.current.state, txn.current.producer_epoch) == (S.COMPLETE_ABORT, C + 1)
    assert txn.coordinator.expired(txn.now) == []
    for version_ in (2, 4):
        assert txn.decide(PID, C, True, version_).error is old_v1
        assert txn.decide(PID, C, False, version_).error is old_v1
    assert txn.decide(PID, C, True, 5).error is commit_v2
    assert txn.decide(PID, C, False, 5).error is abort_v2
    assert txn.produce(PID, C) is E.INVALID_PRODUCER_EPOCH
    assert txn.add(PID, C, implicit=False).error is FENCED
    assert txn.init(PID, C)[:3] == init_again


def test_a_transaction_without_time_limit_is_never_timed_out_or_forgotten():
    txn = at(S.ONGOING, timeout_ms=NO_TIMEOUT_MS)
    assert txn.coordinator.expired(10**15) == []
    idle = at(S.COMPLETE_COMMIT, timeout_ms=NO_TIMEOUT_MS)
    assert idle.coordinator.idle(10**15, 1_000) == []


@pytest.mark.parametrize("state", [S.EMPTY, S.ONGOING, *PREPARED, S.COMPLETE_COMMIT, S.COMPLETE_ABORT])
def test_unused_ids_are_forgotten_with_a_tombstone_and_open_ones_never(state):
    txn = at(state)
    assert txn.coordinator.idle(1_999, 1_000) == []
    if state not in IDLE:
        assert txn.coordinator.idle(10**15, 1_000) == []
        return
    assert txn.coordinator.idle(2_000, 1_000) == [ID]
    txn.log_it(txn.coordinator.forget(ID, 2_000))
    assert txn.log[-1][1] is None
    txn.restart()
    assert txn.coordinator.get(ID) is None
    assert txn.decide(PID, C, True).error is E.INVALID_PRODUCER_ID_MAPPING
    assert txn.init(PID, C)[:3] == (E.NONE, NEW, 0)


@pytest.mark.parametrize("commit", [True, False])
@pytest.mark.parametrize("version", [1, 2])
def test_a_decision_survives_a_restart_and_is_finished_as_decided(version, commit):
    txn = at(S.ONGOING, version)
    txn.decide(PID, C, commit)
    txn.restart()
    (prepared,) = txn.coordinator.unfinished()
    assert prepared.partitions == {P0}
    assert txn.coordinator.marker_epoch(prepared) == (C + 1 if version == 2 else C)
    assert (PID, C) in txn.coordinator.open_identities(), "its data would be taken for an orphan's"
    txn.finish()
    assert txn.coordinator.unfinished() == []
    assert txn.decide(PID, C, commit).error is E.NONE, "the retry of the client after the crash"
    assert txn.current.partitions == frozenset()


def test_an_open_transaction_survives_a_restart():
    txn = at(S.ONGOING)
    txn.restart()
    assert txn.produce(PID, C) is E.NONE
    assert txn.coordinator.open_identities() == {(PID, C)}
    assert txn.end(PID, C, True)[:3] == (E.NONE, PID, C + 1)
    assert txn.coordinator.open_identities() == frozenset()


def test_describe():
    txn = at(S.ONGOING)
    assert txn.coordinator.describe(ID) == (E.NONE, txn.current)
    assert txn.coordinator.describe("x") == (E.TRANSACTIONAL_ID_NOT_FOUND, None)
    assert txn.coordinator.describe("") == (E.INVALID_REQUEST, None)


@pytest.mark.parametrize(
    ("filters", "found", "unknown"),
    [
        ({}, ["a", "b"], []),
        ({"states": ["Ongoing"]}, ["a"], []),
        ({"states": ["Ongoing", "Sleeping"]}, ["a"], ["Sleeping"]),
        ({"states": ["Sleeping"]}, [], ["Sleeping"]),
        ({"producer_ids": [8]}, ["b"], []),
        ({"duration_ms": 500}, ["a"], []),
        ({"duration_ms": 501}, [], []),
        ({"states": ["Empty"], "producer_ids": [7]}, [], []),
    ],
)
def test_list_transactions(filters, found, unknown):
    coordinator = Transactions().coordinator
    coordinator.restore("a", metadata(S.ONGOING, transactional_id="a"))
    coordinator.restore("b", metadata(S.EMPTY, transactional_id="b", producer_id=8))
    listed, names = coordinator.list_transactions(1_500, **filters)
    assert [item.transactional_id for item in listed] == found
    assert names == unknown

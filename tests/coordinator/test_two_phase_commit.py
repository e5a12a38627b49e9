"""KIP-939 at the coordinator: every row of the two tables of the dual identity (Kafka facts, 3.2), one test a row.

`p, e` is the identity that wrote the transaction, `cp, ce` the client's, the only one that may end it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from semel.coordinator.transaction import EPOCH_MAX, NO_TIMEOUT_MS, TransactionMetadata, TransactionState
from semel.errors import ErrorCode
from semel.types import TopicPartition

from .drivers import ID, P0, Transactions

S = TransactionState
E = ErrorCode
P, EPOCH = 7, 5
"""The transaction's identity, `p` and `e`."""
NEW = 1000
"""The first producer id that the coordinator gives."""


def opened(epoch: int = EPOCH, *, timeout_ms: int = NO_TIMEOUT_MS, version: int = 2) -> Transactions:
    """An open transaction of (7, epoch)."""
    txn = Transactions(version)
    txn.place(
        TransactionMetadata(
            ID,
            P,
            epoch,
            previous_producer_id=P,
            timeout_ms=timeout_ms,
            state=S.ONGOING,
            partitions=frozenset({P0}),
            start_ms=1_000,
            last_update_ms=1_000,
            client_version=version,
        )
    )
    return txn


def taken_over(epoch: int = EPOCH, times: int = 1) -> Transactions:
    """The same, after so many owners that kept it."""
    txn = opened(epoch)
    for _ in range(times):
        assert txn.init(two_phase=True, keep=True).error is E.NONE
    return txn


# -- InitProducerId, rows 1 to 9 --------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [True, False])
def test_row_1_without_a_transactional_id_the_flags_mean_nothing(keep):
    txn = Transactions(two_phase_commit=False)
    answer = txn.coordinator.init_producer_id(None, 0, -1, -1, 0, 6, enable_two_phase=True, keep_prepared=keep)
    assert answer[:4] == (E.NONE, NEW, 0, None)


def test_row_2_keep_is_for_the_first_call_of_a_producer():
    txn = opened()
    before = txn.current
    for identity in ((P, EPOCH), (P, EPOCH - 1), (99, 0)):
        assert txn.init(*identity, keep=True).error is E.INVALID_REQUEST
    assert txn.current == before
    # Without keep the rules of KIP-360 hold: who knows the identity has its transaction aborted and goes on.
    assert txn.init(P, EPOCH).error is E.CONCURRENT_TRANSACTIONS
    txn.finish()
    assert txn.init(P, EPOCH)[:3] == (E.NONE, P, EPOCH + 1)


@pytest.mark.parametrize("keep", [True, False])
def test_row_3_a_broker_that_does_not_allow_it_refuses_and_nothing_happens(keep):
    txn = Transactions(two_phase_commit=False)
    assert txn.init(two_phase=True, keep=keep).error is E.TRANSACTIONAL_ID_AUTHORIZATION_FAILED
    assert txn.coordinator.get(ID) is None
    assert txn.init(keep=keep).error is E.NONE, "without the flag it is a producer like any other"


@pytest.mark.parametrize("keep", [True, False])
def test_row_4_an_unknown_id_begins_with_a_new_producer_id(keep):
    answer = Transactions().init(two_phase=True, keep=keep)
    assert (answer[:3], answer.ongoing) == ((E.NONE, NEW, 0), (-1, -1))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("state", [S.EMPTY, S.COMPLETE_COMMIT, S.COMPLETE_ABORT])
def test_row_5_with_nothing_open_the_epoch_rises_and_nothing_is_named(keep, state):
    txn = Transactions()
    txn.place(TransactionMetadata(ID, P, EPOCH, state=state))
    answer = txn.init(two_phase=True, keep=keep)
    assert (answer[:3], answer.ongoing) == ((E.NONE, P, EPOCH + 1), (-1, -1))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("commit", [True, False])
def test_row_6_a_decision_under_way_is_waited_for(keep, commit):
    txn = opened()
    pending = txn.coordinator.end_transaction(ID, P, EPOCH, commit, 2_000, 5)
    assert txn.init(keep=keep).error is E.CONCURRENT_TRANSACTIONS
    txn.log_it(pending.transition)
    assert txn.init(keep=keep).error is E.CONCURRENT_TRANSACTIONS
    txn.finish()
    answer = txn.init(keep=keep)
    assert (answer.error, answer.ongoing) == (E.NONE, (-1, -1))


def test_row_7_keep_hands_the_transaction_over():
    txn = opened()
    answer = txn.init(two_phase=True, keep=True)
    assert (answer[:3], answer.ongoing) == ((E.NONE, P, EPOCH + 1), (P, EPOCH))
    assert (txn.current.identity, txn.current.client_identity) == ((P, EPOCH), (P, EPOCH + 1))
    assert (txn.current.state, txn.current.partitions, txn.current.start_ms) == (S.ONGOING, {P0}, 1_000)
    txn.restart()
    assert txn.current.client_identity == (P, EPOCH + 1), "a crash after the answer gives the identity out again"


def test_row_7_without_keep_the_transaction_is_aborted_and_the_epoch_passes_the_clients():
    txn = taken_over()
    assert txn.init().error is E.CONCURRENT_TRANSACTIONS
    assert txn.coordinator.marker_epoch(txn.current) == EPOCH + 1
    txn.finish()
    assert (txn.current.state, txn.current.identity) == (S.COMPLETE_ABORT, (P, EPOCH + 2))
    assert txn.init()[:3] == (E.NONE, P, EPOCH + 3)


def test_row_8_keep_at_the_last_epoch_gives_a_new_producer_id():
    txn = opened(EPOCH_MAX)
    answer = txn.init(two_phase=True, keep=True)
    assert (answer[:3], answer.ongoing) == ((E.NONE, NEW, 0), (P, EPOCH_MAX))
    assert txn.current.identity == (P, EPOCH_MAX)


def test_row_8_without_keep_a_client_at_the_last_epoch_gets_a_new_producer_id():
    txn = taken_over(EPOCH_MAX - 1)
    assert txn.current.client_identity == (P, EPOCH_MAX)
    txn.init()
    assert txn.coordinator.marker_epoch(txn.current) == EPOCH_MAX
    txn.finish()
    assert txn.current.identity == (NEW, 0)
    assert txn.init()[:3] == (E.NONE, NEW, 1)


@pytest.mark.parametrize("keep", [True, False])
def test_row_9_with_transactions_v1_nothing_is_kept(keep):
    txn = opened(version=1)
    answer = txn.init(two_phase=True, keep=keep)
    assert answer.error is (E.UNSUPPORTED_VERSION if keep else E.CONCURRENT_TRANSACTIONS)
    assert txn.current.state is (S.ONGOING if keep else S.PREPARE_ABORT)


def test_a_broker_that_went_back_to_v1_still_ends_what_was_kept():
    txn = taken_over()
    txn.version = 1
    txn.restart()
    assert txn.init().error is E.CONCURRENT_TRANSACTIONS
    assert txn.coordinator.marker_epoch(txn.current) == EPOCH + 1
    txn.finish()
    assert txn.current.identity == (P, EPOCH + 2), "the client's epoch would be given out twice"


def test_a_crash_loop_names_the_same_transaction_every_time():
    txn = opened()
    answers = [txn.init(two_phase=True, keep=True) for _ in range(4)]
    assert [answer[1:3] for answer in answers] == [(P, EPOCH + n) for n in range(1, 5)]
    assert {answer.ongoing for answer in answers} == {(P, EPOCH)}


def test_a_crash_loop_rotates_more_than_once():
    txn = opened(EPOCH_MAX - 1)
    given = [txn.init(two_phase=True, keep=True) for _ in range(2)]
    assert [answer[1:3] for answer in given] == [(P, EPOCH_MAX), (NEW, 0)]
    txn.place(replace(txn.current, next_producer_epoch=EPOCH_MAX))
    assert txn.init(two_phase=True, keep=True)[1:3] == (NEW + 1, 0)
    assert txn.current.identity == (P, EPOCH_MAX - 1)
    assert txn.end(NEW + 1, 0, True)[:3] == (E.NONE, NEW + 1, 1)


@pytest.mark.parametrize(
    ("before", "two_phase", "after"),
    [
        (10_000, True, NO_TIMEOUT_MS),
        (10_000, False, 10_000),
        (NO_TIMEOUT_MS, False, NO_TIMEOUT_MS),
        (NO_TIMEOUT_MS, True, NO_TIMEOUT_MS),
    ],
)
def test_who_keeps_a_transaction_may_take_its_time_out_away_and_never_gives_it_one(before, two_phase, after):
    txn = opened(timeout_ms=before)
    assert txn.init(timeout_ms=1, two_phase=two_phase, keep=True).error is E.NONE
    assert txn.current.timeout_ms == after


@pytest.mark.parametrize("timeout_ms", [60_000, 0, -5, 2**31 - 1])
def test_two_phase_commit_has_no_time_out_whatever_is_asked_for(timeout_ms):
    txn = Transactions()
    assert txn.init(timeout_ms=timeout_ms, two_phase=True).error is E.NONE
    txn.add(NEW, 0)
    assert txn.current.timeout_ms == NO_TIMEOUT_MS
    assert txn.coordinator.expired(10**15) == []
    assert txn.time_out().error is E.INVALID_TXN_STATE
    txn.end(NEW, 0, True)
    assert txn.coordinator.idle(10**15, 1) == [], "an id with two-phase commit is not forgotten"


@pytest.mark.parametrize("timeout_ms", [0, -5, 900_001])
def test_keep_alone_does_not_lift_the_limits_of_the_time_out(timeout_ms):
    """The question by which a client finds out, without a side effect, whether a broker knows keepPreparedTxn."""
    txn = opened()
    before = txn.current
    assert txn.init(timeout_ms=timeout_ms, keep=True).error is E.INVALID_TRANSACTION_TIMEOUT
    assert txn.current == before


# -- What the identities may do afterwards ----------------------------------------------------------------------


@pytest.mark.parametrize("commit", [True, False])
def test_end_v5_by_the_client_ends_the_transaction(commit):
    txn = taken_over(times=3)
    assert txn.decide(P, EPOCH + 3, commit, 5)[:3] == (E.NONE, P, EPOCH + 4)
    assert txn.coordinator.marker_epoch(txn.current) == EPOCH + 1, "the markers are the writer's"
    assert txn.current.partitions == {P0}
    txn.restart()
    txn.finish()
    assert (txn.current.identity, txn.current.previous_producer_id) == ((P, EPOCH + 4), P)
    assert txn.current.last_producer_epoch == EPOCH + 3
    assert txn.current.client_identity == txn.current.identity


@pytest.mark.parametrize("commit", [True, False])
@pytest.mark.parametrize("identity", [(P, EPOCH), (P, EPOCH + 1), (P, EPOCH - 1), (P, EPOCH + 3), (99, 0)])
def test_end_v5_by_anybody_else_is_fenced(commit, identity):
    txn = taken_over(times=2)
    before = txn.current
    assert txn.decide(*identity, commit, 5).error is E.PRODUCER_FENCED
    assert txn.current == before


@pytest.mark.parametrize("api_version", range(5))
@pytest.mark.parametrize("commit", [True, False])
def test_end_before_v5_cannot_tell_the_next_identity_and_is_refused(commit, api_version):
    txn = taken_over()
    before = txn.current
    assert txn.decide(P, EPOCH + 1, commit, api_version).error is E.INVALID_TXN_STATE
    fenced = E.INVALID_PRODUCER_EPOCH if api_version < 2 else E.PRODUCER_FENCED
    assert txn.decide(P, EPOCH, commit, api_version).error is fenced
    assert txn.current == before


@pytest.mark.parametrize("restarted", [True, False])
@pytest.mark.parametrize("commit", [True, False])
def test_end_is_repeated_with_the_same_answer_and_never_with_the_opposite(commit, restarted):
    txn = taken_over()
    first = txn.decide(P, EPOCH + 1, commit)
    assert txn.decide(P, EPOCH + 1, commit).error is E.CONCURRENT_TRANSACTIONS
    txn.finish()
    if restarted:
        txn.restart()
    assert txn.decide(P, EPOCH + 1, commit)[:3] == first[:3]
    opposite = E.INVALID_TXN_STATE if commit else E.PRODUCER_FENCED
    assert txn.decide(P, EPOCH + 1, not commit).error is opposite
    assert txn.decide(P, EPOCH, commit).error is E.PRODUCER_FENCED


def test_end_at_the_last_epoch_rotates_and_can_be_repeated():
    """Worked case of Kafka's pull request: 32764 -> 32765 open -> kept by 32766 -> commit rotates."""
    txn = Transactions()
    txn.place(TransactionMetadata(ID, P, EPOCH_MAX - 2))
    assert txn.init()[1:3] == (P, EPOCH_MAX - 1)
    txn.add(P, EPOCH_MAX - 1)
    assert txn.init(two_phase=True, keep=True)[1:3] == (P, EPOCH_MAX)
    assert txn.decide(P, EPOCH_MAX, True)[:3] == (E.NONE, NEW, 0)
    assert txn.coordinator.marker_epoch(txn.current) == EPOCH_MAX
    assert txn.decide(P, EPOCH_MAX, True).error is E.CONCURRENT_TRANSACTIONS
    txn.finish()
    txn.restart()
    assert txn.current.identity == (NEW, 0)
    assert txn.decide(P, EPOCH_MAX, True)[:3] == (E.NONE, NEW, 0)


def test_keep_rotates_and_the_end_then_raises_the_new_epoch():
    """Worked case of Kafka's pull request: 32765 -> 32766 open -> keep rotates -> commit gives (new, 1)."""
    txn = Transactions()
    txn.place(TransactionMetadata(ID, P, EPOCH_MAX - 1))
    assert txn.init()[1:3] == (P, EPOCH_MAX)
    txn.add(P, EPOCH_MAX)
    assert txn.init(two_phase=True, keep=True)[1:3] == (NEW, 0)
    assert txn.decide(P, EPOCH_MAX, True).error is E.PRODUCER_FENCED
    assert txn.decide(NEW, 0, True)[:3] == (E.NONE, NEW, 1)
    assert txn.coordinator.marker_epoch(txn.current) == EPOCH_MAX + 1
    txn.finish()
    assert (txn.current.identity, txn.current.previous_producer_id) == ((NEW, 1), NEW)
    assert txn.decide(NEW, 0, True)[:3] == (E.NONE, NEW, 1)


def test_a_delayed_commit_of_the_client_finds_nothing_that_it_could_commit():
    """The review of Kafka's pull request: the epoch after the end must not be the one that the client held."""
    txn = taken_over()
    assert txn.end(P, EPOCH + 1, True)[:3] == (E.NONE, P, EPOCH + 2)
    txn.add(P, EPOCH + 2)
    assert txn.decide(P, EPOCH + 1, True).error is E.PRODUCER_FENCED
    assert txn.current.state is S.ONGOING


def test_a_kept_transaction_takes_no_more_data_from_its_client():
    txn = taken_over()
    for version in (9, 11, 12):
        assert txn.produce(P, EPOCH + 1, version=version) is E.INVALID_TXN_STATE
    for implicit in (True, False):
        for partition in (P0, TopicPartition("orders", 1)):
            answer = txn.add(P, EPOCH + 1, partition, implicit=implicit)
            assert (answer.error, answer.transition) == (E.INVALID_TXN_STATE, None)


@pytest.mark.parametrize("identity", [(P, EPOCH), (P, EPOCH + 1), (99, 0)])
def test_a_kept_transaction_takes_no_more_data_from_who_wrote_it(identity):
    txn = taken_over(times=2)
    for version in (9, 11, 12):
        assert txn.produce(*identity, version=version) is E.INVALID_PRODUCER_EPOCH
    assert txn.add(*identity, implicit=True).error is E.INVALID_PRODUCER_EPOCH
    assert txn.add(*identity, implicit=False).error is E.PRODUCER_FENCED


def test_while_the_hand_over_is_being_written_its_writer_is_held_off():
    txn = opened()
    answer = txn.coordinator.init_producer_id(ID, 0, -1, -1, 2_000, 6, enable_two_phase=True, keep_prepared=True)
    assert answer.transition is not None
    assert txn.produce(P, EPOCH) is E.CONCURRENT_TRANSACTIONS
    assert txn.add(P, EPOCH).error is E.CONCURRENT_TRANSACTIONS
    assert txn.decide(P, EPOCH, True).error is E.CONCURRENT_TRANSACTIONS
    txn.coordinator.cancel(answer.transition)
    assert txn.produce(P, EPOCH) is E.NONE, "the log refused: nothing happened"


@pytest.mark.parametrize("identity", [(P, EPOCH), (P, EPOCH + 3), (99, 0)])
def test_init_by_an_earlier_identity_does_not_touch_what_is_kept(identity):
    txn = taken_over(times=2)
    before = txn.current
    assert txn.init(*identity).error is E.PRODUCER_FENCED
    assert txn.current == before
    assert txn.init(P, EPOCH + 2).error is E.CONCURRENT_TRANSACTIONS, "the client itself may abort it"
    txn.finish()
    assert txn.init(P, EPOCH + 2)[:3] == (E.NONE, P, EPOCH + 3)


def test_describe_and_list_show_the_identity_of_the_data():
    txn = taken_over(times=2)
    error, found = txn.coordinator.describe(ID)
    assert error is E.NONE
    assert found is not None
    assert (found.state, found.identity, found.timeout_ms) == (S.ONGOING, (P, EPOCH), NO_TIMEOUT_MS)
    assert txn.coordinator.list_transactions(61_000, producer_ids=[P], duration_ms=60_000)[0] == [found]
    assert txn.coordinator.list_transactions(61_000, duration_ms=60_001)[0] == []
    assert txn.coordinator.open_identities() == {(P, EPOCH)}, "its data would be taken for an orphan's"


def test_a_kept_transaction_with_a_time_out_is_aborted_and_its_client_can_go_on():
    txn = opened(timeout_ms=10_000)
    txn.init(keep=True)
    txn.now = 12_000
    assert txn.coordinator.expired(txn.now) == [ID]
    assert txn.time_out().error is E.NONE
    assert txn.coordinator.marker_epoch(txn.current) == EPOCH + 1
    txn.finish()
    assert (txn.current.state, txn.current.identity) == (S.COMPLETE_ABORT, (P, EPOCH + 2))
    assert txn.decide(P, EPOCH + 1, True).error is E.PRODUCER_FENCED
    assert txn.decide(P, EPOCH + 1, False)[:3] == (E.NONE, P, EPOCH + 2)


def test_an_operator_ends_a_forgotten_transaction_with_a_plain_init():
    """Admin.forceTerminateTransaction: InitProducerId v5 of nobody, with a time-out of its own."""
    txn = opened()
    assert txn.init(version=5, timeout_ms=60_000).error is E.CONCURRENT_TRANSACTIONS
    txn.finish()
    assert (txn.current.state, txn.current.identity) == (S.COMPLETE_ABORT, (P, EPOCH + 1))
    assert txn.init(version=5, timeout_ms=60_000)[:3] == (E.NONE, P, EPOCH + 2)
    assert txn.current.timeout_ms == 60_000, "the id would never be forgotten"
    assert txn.decide(P, EPOCH, True).error is E.PRODUCER_FENCED

"""KIP-939 in the client: the rules of prepare and complete (Kafka facts, 3.3), and what each broker gets to hear."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semel.client.admin import Admin
from semel.client.batches import Batch, Identity
from semel.client.cluster import KafkaClient
from semel.client.producer import TransactionalProducer
from semel.client.reactions import Reaction
from semel.client.transaction import TransactionProtocol
from semel.client.transaction_state import Kind, Request, State, TransactionView
from semel.client.two_phase import PreparedState, TwoPhaseMode
from semel.errors import (
    AbortTransaction,
    ConfigurationError,
    ErrorCode,
    Fatal,
    Fenced,
    OutcomeUnknown,
    TwoPhaseCommitUnavailable,
)
from semel.types import TopicPartition
from tests.client.scripted_broker import END_TXN, INIT, PRODUCE, ScriptedBroker
from tests.client.test_brokers import Cluster, records, run, values
from tests.client.test_producer import FAST
from tests.client.test_transaction_model import Records
from tests.conftest import unavailable
from tests.services.kafka import KafkaNode, missing_tools

P0 = TopicPartition("t", 0)
ME, NEXT = Identity(7, 5), Identity(7, 6)
THEIRS = PreparedState(7, 3)
NO_TIMEOUT_MS = 2**31 - 1


# -- Names ------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**63 - 1), st.integers(0, 32_767))
def test_a_name_is_read_back(producer_id: int, epoch: int) -> None:
    name = PreparedState(producer_id, epoch)
    assert str(name) == f"{producer_id}:{epoch}"
    assert PreparedState.parse(str(name)) == name


def test_no_transaction_is_the_empty_text() -> None:
    assert str(PreparedState()) == ""
    assert PreparedState.parse("") == PreparedState()
    assert not PreparedState().is_transaction


@pytest.mark.parametrize("text", ["7", "7:", ":5", "7:5:1", "-7:5", "7:-5", "a:b", " 7:5", "7:5 ", "٧:5"])
def test_a_name_that_is_none_is_refused_with_what_a_name_looks_like(text: str) -> None:
    with pytest.raises(ConfigurationError, match="1000:7"):
        PreparedState.parse(text)


# -- The rules, without I/O -------------------------------------------------------------------------------------


def answered(protocol: TransactionProtocol, code: int = 0, identity: Identity = ME, **more: Any) -> Request:
    """Answer the request that the protocol wants to send."""
    request = protocol.next_request()
    assert request is not None
    if request.kind is Kind.InitProducerId:
        protocol.init_answered(request, code, identity, **more)
    else:
        assert request.kind is Kind.EndTxn
        protocol.end_answered(request, code, identity)
    return request


def ready(*, keep: bool = False, ongoing: PreparedState | None = None, two_phase: bool = True) -> TransactionProtocol:
    protocol = TransactionProtocol("id", two_phase=two_phase)
    protocol.initialize(2, keep_prepared=keep)
    answered(protocol, ongoing=ongoing or PreparedState())
    return protocol


def write(protocol: TransactionProtocol) -> None:
    protocol.produce(Batch(P0, Records("a", 1), deadline=1e9))
    batch = protocol.take_batch(P0, "node")
    assert batch is not None
    protocol.batch_answered(batch, 0)


def prepared() -> TransactionProtocol:
    protocol = ready()
    protocol.begin(2)
    write(protocol)
    assert protocol.prepare() == PreparedState(*ME)
    return protocol


def test_prepare_names_the_transaction_by_the_identity_that_wrote_it() -> None:
    protocol = prepared()
    assert (protocol.state, protocol.prepared) == (State.Prepared, PreparedState(7, 5))
    assert protocol.next_request() is None, "prepare is nothing that a broker hears of"


def test_a_kept_transaction_is_prepared_under_the_name_of_who_wrote_it() -> None:
    protocol = ready(keep=True, ongoing=THEIRS)
    assert (protocol.state, protocol.prepared, protocol.identity) == (State.Prepared, THEIRS, ME)


@pytest.mark.parametrize(
    ("make", "name"),
    [(prepared, PreparedState(*ME)), (lambda: ready(keep=True, ongoing=THEIRS), THEIRS)],
    ids=["prepared", "kept"],
)
@pytest.mark.parametrize("same", [True, False])
def test_complete_commits_what_the_database_names_and_aborts_anything_else(make: Any, name: Any, same: bool) -> None:
    protocol = make()
    assert protocol.complete(name if same else PreparedState(7, 1))
    request = answered(protocol, identity=NEXT)
    assert (request.commit, request.identity) == (same, ME), "the end is asked for with our own identity"
    assert (protocol.state, protocol.prepared, protocol.identity) == (State.Ready, PreparedState(), NEXT)


def test_complete_after_a_takeover_that_found_nothing_does_nothing() -> None:
    for name in (PreparedState(), THEIRS):
        protocol = ready(keep=True)
        assert not protocol.complete(name)
        assert (protocol.state, protocol.next_request()) == (State.Ready, None)


def test_complete_without_prepare_or_takeover_is_refused() -> None:
    for protocol in (ready(), ready(keep=True)):
        protocol.begin(2)
        write(protocol)
        with pytest.raises(Fatal, match="InTransaction"):
            protocol.complete(PreparedState(*ME))
    with pytest.raises(Fatal, match="Ready"):
        ready().complete(PreparedState())


def test_prepared_allows_only_the_end() -> None:
    protocol = prepared()
    for forbidden in (
        lambda: protocol.begin(2),
        lambda: protocol.produce(Batch(P0, Records("b", 1), deadline=1e9)),
        lambda: protocol.send_offsets({P0: 1}, None),  # type: ignore[arg-type]
        lambda: protocol.prepare(),
        lambda: protocol.initialize(2),
        lambda: protocol.initialize(2, keep_prepared=True),
    ):
        with pytest.raises(Fatal, match=r"7:5.* is prepared.*complete"):
            forbidden()
    assert protocol.state is State.Prepared
    protocol.end(commit=False)
    assert answered(protocol, identity=NEXT).commit is False


def test_prepare_waits_for_what_is_not_acknowledged() -> None:
    protocol = ready()
    protocol.begin(2)
    protocol.produce(Batch(P0, Records("a", 1), deadline=1e9))
    with pytest.raises(Fatal):
        protocol.prepare()


def test_an_empty_transaction_has_no_name_because_its_identity_goes_on_to_the_next() -> None:
    """Or the database would remember (7, 5) as decided, and a crash in the next one, (7, 5) too, would commit it."""
    protocol = ready()
    protocol.begin(2)
    assert protocol.prepare() == PreparedState()
    protocol.complete(PreparedState())
    assert (protocol.state, protocol.identity) == (State.Ready, ME)
    protocol.begin(2)
    write(protocol)
    assert protocol.prepare() == PreparedState(*ME)


def test_without_two_phase_commit_nothing_is_prepared() -> None:
    protocol = ready(two_phase=False)
    protocol.begin(2)
    write(protocol)
    with pytest.raises(ConfigurationError, match="two_phase_commit=True"):
        protocol.prepare()
    assert protocol.state is State.InTransaction


def test_only_the_first_init_keeps_and_every_one_asks_for_no_time_out() -> None:
    protocol = TransactionProtocol("id", two_phase=True)
    protocol.initialize(2, keep_prepared=True)
    first = protocol.next_request()
    assert first is not None
    assert (first.identity, first.two_phase, first.keep_prepared) == (Identity(), True, True)
    protocol.unanswered(first)
    again = protocol.next_request()
    assert again == first, "asked again, the broker names the same transaction"
    protocol.init_answered(again, 0, ME)
    protocol.begin(2)
    write(protocol)
    protocol.end(commit=False)
    answered(protocol, ErrorCode.INVALID_TXN_STATE, Identity())  # Nothing was open: the epoch has to rise by an init.
    later = protocol.next_request()
    assert later is not None
    assert (later.kind, later.identity) == (Kind.InitProducerId, ME)
    assert (later.two_phase, later.keep_prepared) == (True, False)


def test_an_end_without_an_answer_is_repeated_as_decided() -> None:
    protocol = prepared()
    protocol.complete(PreparedState(*ME))
    request = protocol.next_request()
    assert request is not None
    protocol.unanswered(request)
    assert isinstance(protocol.give_up(1.0), OutcomeUnknown)
    protocol.initialize(2)
    assert answered(protocol, identity=NEXT) == request
    assert protocol.state is State.Ready


def test_a_commit_that_could_not_even_be_asked_for_is_not_given_up() -> None:
    """The database has decided; telling the caller to abort would tear the two apart."""
    protocol = prepared()
    protocol.complete(PreparedState(*ME))
    assert isinstance(protocol.give_up(1.0), OutcomeUnknown)
    protocol.initialize(2, keep_prepared=True)
    assert answered(protocol, identity=NEXT).commit is True


@pytest.mark.parametrize("code", [ErrorCode.INVALID_TXN_STATE, ErrorCode.TRANSACTION_ABORTABLE])
def test_a_decided_commit_that_is_refused_is_never_called_abortable(code: ErrorCode) -> None:
    protocol = prepared()
    protocol.complete(PreparedState(*ME))
    answered(protocol, code, Identity())
    assert protocol.state is State.Failed
    assert not isinstance(protocol.failure, AbortTransaction)
    assert "7:5" in str(protocol.failure)
    assert "missing in Kafka" in str(protocol.failure)


@pytest.mark.parametrize(
    ("view", "state", "says"),
    [
        (TransactionView(Identity(7, 6), "CompleteAbort", NO_TIMEOUT_MS), State.Failed, "missing in Kafka"),
        (TransactionView(Identity(7, 7), "Empty", 60_000), State.Fenced, "7:7"),
        (TransactionView(ME, "Ongoing", NO_TIMEOUT_MS), State.Fenced, "Another process"),
        (None, State.Fenced, "another|Another"),
    ],
    ids=["an operator aborted it", "a new owner", "handed over", "unknown"],
)
def test_what_a_fenced_commit_means_is_found_out(view: TransactionView | None, state: State, says: str) -> None:
    protocol = prepared()
    protocol.complete(PreparedState(*ME))
    answered(protocol, ErrorCode.PRODUCER_FENCED, Identity())
    request = protocol.next_request()
    assert request is not None
    assert request.kind is Kind.DescribeTransactions
    protocol.diagnosed(request, view)
    assert protocol.state is state
    assert any(word in str(protocol.failure) for word in says.split("|"))
    assert "time-out" not in str(protocol.failure), "a transaction without time-out does not time out"


@pytest.mark.parametrize("code", [ErrorCode.TRANSACTIONAL_ID_AUTHORIZATION_FAILED, ErrorCode.UNSUPPORTED_VERSION])
def test_a_broker_that_refuses_two_phase_commit_leaves_everything_as_it_was(code: ErrorCode) -> None:
    protocol = TransactionProtocol("id", two_phase=True)
    protocol.initialize(2, keep_prepared=True)
    request = protocol.next_request()
    assert request is not None
    assert protocol.init_answered(request, code, Identity()) is Reaction.FATAL
    assert isinstance(protocol.failure, TwoPhaseCommitUnavailable)
    assert protocol.next_request() is None
    protocol.initialize(2, keep_prepared=True)
    answered(protocol, ongoing=THEIRS)
    assert protocol.state is State.Prepared, "an operator switched it on: the same call succeeds"


def test_transactions_v1_are_refused() -> None:
    with pytest.raises(TwoPhaseCommitUnavailable, match="one identity stands for many"):
        TransactionProtocol("id", two_phase=True).initialize(1)
    protocol = ready()
    with pytest.raises(TwoPhaseCommitUnavailable):
        protocol.begin(1)


# -- Against a broker that does what the test says ----------------------------------------------------------------


def scripted(
    test: Callable[[ScriptedBroker, TransactionalProducer], Awaitable[None]], *, offers: int = 6, version: int = 2
) -> None:
    async def main() -> None:
        async with ScriptedBroker(version) as broker:
            broker.versions[INIT] = (0, offers)
            async with KafkaClient(broker.address, settings=FAST) as client:
                producer = TransactionalProducer(client, "orders-1", two_phase_commit=True)
                try:
                    await test(broker, producer)
                finally:
                    await producer.close()

    asyncio.run(main())


def test_the_flags_are_on_the_wire_and_the_mode_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def test(broker: ScriptedBroker, producer: TransactionalProducer) -> None:
        broker.then(INIT, {}, {"ongoing_txn_producer_id": 1000, "ongoing_txn_producer_epoch": 4})
        with caplog.at_level(logging.INFO, "semel.client"):
            await producer.init_transactions(keep_prepared=True)
        probe, first = broker.asked(INIT)
        assert (probe.producer_id, probe.producer_epoch) == (0, 0), "the question has no effect"
        assert (first.enable2_pc, first.keep_prepared_txn, first.producer_id) == (True, True, -1)
        assert str(producer.prepared_state) == "1000:4"
        assert producer.two_phase_mode is TwoPhaseMode.FULL
        assert "orders-1: two-phase commit with recovery" in caplog.text
        assert await producer.complete("1000:4")
        (end,) = broker.asked(END_TXN)
        assert end.committed

    scripted(test)


@pytest.mark.parametrize(
    ("offers", "version", "code", "mode", "keep", "works"),
    [
        (6, 2, None, TwoPhaseMode.FULL, True, True),
        (6, 2, ErrorCode.UNSUPPORTED_VERSION, TwoPhaseMode.NO_RECOVERY, True, False),
        (6, 2, ErrorCode.UNSUPPORTED_VERSION, TwoPhaseMode.NO_RECOVERY, False, True),
        (6, 2, ErrorCode.TRANSACTIONAL_ID_AUTHORIZATION_FAILED, TwoPhaseMode.REFUSED, False, False),
        (5, 2, None, TwoPhaseMode.UNSUPPORTED, False, False),
        (6, 1, None, TwoPhaseMode.TRANSACTIONS_V1, False, False),
    ],
)
def test_what_each_kind_of_broker_allows(
    offers: int, version: int, code: ErrorCode | None, mode: TwoPhaseMode, keep: bool, works: bool
) -> None:
    async def test(broker: ScriptedBroker, producer: TransactionalProducer) -> None:
        if code is not None:
            broker.then(INIT, code)
        if works:
            await producer.init_transactions(keep_prepared=keep)
            assert producer.two_phase_mode is mode
            return
        with pytest.raises(TwoPhaseCommitUnavailable) as caught:
            await producer.init_transactions(keep_prepared=keep)
        assert mode.meaning in str(caught.value)
        assert len(broker.asked(INIT)) <= 1, "nothing may be asked for that aborts what the predecessor prepared"

    scripted(test, offers=offers, version=version)


def test_keep_prepared_is_for_producers_with_two_phase_commit() -> None:
    async def main() -> None:
        async with ScriptedBroker() as broker, KafkaClient(broker.address, settings=FAST) as client:
            with pytest.raises(ConfigurationError, match="two_phase_commit=True"):
                await TransactionalProducer(client, "id").init_transactions(keep_prepared=True)
            assert not broker.asked(INIT)

    asyncio.run(main())


def test_prepare_fails_where_not_everything_was_written() -> None:
    async def test(broker: ScriptedBroker, producer: TransactionalProducer) -> None:
        await producer.init_transactions()
        producer.begin()
        broker.then(PRODUCE, ErrorCode.MESSAGE_TOO_LARGE)
        await producer.produce("t", 0, records("a"))
        with pytest.raises(AbortTransaction, match="MESSAGE_TOO_LARGE"):
            await producer.prepare()
        await producer.abort()
        assert producer.state is State.Ready

    scripted(test)


def test_close_leaves_a_prepared_transaction_to_whoever_knows_its_outcome() -> None:
    async def test(broker: ScriptedBroker, producer: TransactionalProducer) -> None:
        await producer.init_transactions()
        producer.begin()
        await producer.produce("t", 0, records("a"))
        await producer.prepare()
        await producer.close()
        assert not broker.asked(END_TXN)

    scripted(test)


@pytest.mark.parametrize("lost", ["close", "close after", "silent"])
def test_a_lost_answer_to_the_end_is_asked_for_again(lost: str) -> None:
    async def test(broker: ScriptedBroker, producer: TransactionalProducer) -> None:
        await producer.init_transactions()
        producer.begin()
        await producer.produce("t", 0, records("a"))
        name = await producer.prepare()
        broker.then(END_TXN, lost)
        assert await producer.complete(name)
        assert [end.committed for end in broker.asked(END_TXN)] == [True, True]

    scripted(test)


# -- Against real brokers ---------------------------------------------------------------------------------------


EXPECTED = {
    ("embedded", 2): TwoPhaseMode.FULL,
    ("embedded", 1): TwoPhaseMode.TRANSACTIONS_V1,
    ("kafka", 2): TwoPhaseMode.UNSUPPORTED,
    ("kafka", 1): TwoPhaseMode.TRANSACTIONS_V1,
}


def test_every_broker_is_asked_what_it_offers(any_broker: Any) -> None:
    async def test(cluster: Cluster) -> None:
        assert await cluster.admin.two_phase_mode() is EXPECTED[any_broker.kind, any_broker.transaction_version]
        listed = {item.transactional_id for item in await cluster.admin.list_transactions()}
        assert "semel.two-phase-probe" not in listed

    run(any_broker, test)


@pytest.mark.parametrize("remembered", [True, False])
def test_a_successor_ends_what_was_prepared_as_the_database_says(embedded: Any, remembered: bool) -> None:
    async def test(cluster: Cluster) -> None:
        first = await cluster.producer(two_phase_commit=True)
        first.begin()
        await first.produce(cluster.topic, 0, records("a"))
        name = await first.prepare()
        second = TransactionalProducer(cluster.client, first.transactional_id, two_phase_commit=True)
        await second.init_transactions(keep_prepared=True)
        assert second.prepared_state == name
        with pytest.raises(Fenced, match="Another process"):
            await first.complete(name)
        assert await second.complete(name if remembered else "1:1") is remembered
        second.begin()
        await second.produce(cluster.topic, 0, records("b"))
        following = await second.prepare()
        assert following != name
        assert await second.complete(following)
        assert values(await cluster.read()) == (["a", "b"] if remembered else ["b"])

    run(embedded, test)


def test_an_operator_ended_it_before_the_database_could(embedded: Any) -> None:
    async def test(cluster: Cluster) -> None:
        producer = await cluster.producer(two_phase_commit=True)
        producer.begin()
        await producer.produce(cluster.topic, 0, records("a"))
        name = await producer.prepare()
        operator = TransactionalProducer(cluster.client, producer.transactional_id)
        await operator.init_transactions()
        with pytest.raises(Fenced):
            await producer.complete(name)
        assert values(await cluster.read()) == []

    run(embedded, test)


@pytest.mark.peers
@pytest.mark.parametrize(("allowed", "mode"), [("true", TwoPhaseMode.NO_RECOVERY), ("false", TwoPhaseMode.REFUSED)])
def test_apache_kafka_with_unstable_versions_is_asked_and_believed(allowed: str, mode: TwoPhaseMode) -> None:
    """4.3.1 has enable2Pc behind two switches and answers keepPreparedTxn with UNSUPPORTED_VERSION."""
    if missing_tools():
        unavailable("Apache Kafka", f"{' and '.join(missing_tools())} not found")
    extra = {"unstable.api.versions.enable": "true", "transaction.two.phase.commit.enable": allowed}
    node = KafkaNode(extra=extra)
    try:
        node.start()

        async def main() -> None:
            async with KafkaClient(node.bootstrap) as client:
                assert await Admin(client).two_phase_mode() is mode
                assert await Admin(client).list_transactions() == [], "the question left something behind"
                producer = TransactionalProducer(client, "w", two_phase_commit=True)
                with pytest.raises(TwoPhaseCommitUnavailable):
                    await producer.init_transactions(keep_prepared=True)
                assert await Admin(client).list_transactions() == []
                if mode is TwoPhaseMode.NO_RECOVERY:
                    await producer.init_transactions()
                    (found,) = await Admin(client).describe_transactions(["w"])
                    assert found.timeout_ms == NO_TIMEOUT_MS
                await producer.close()

        asyncio.run(main())
    finally:
        node.stop()

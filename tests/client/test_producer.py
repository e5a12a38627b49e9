"""Both producers against a broker that errs on purpose: what was lost in other clients must not be lost here."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from semel.client.cluster import KafkaClient
from semel.client.producer import Producer, TransactionalProducer
from semel.client.transaction_state import State
from semel.errors import AbortTransaction, ErrorCode, Fatal, Fenced, OutcomeUnknown, Retriable
from semel.types import GroupMetadata, TopicPartition
from semel.wire.records import BatchBuilder, read_header
from tests.client.scripted_broker import (
    ADD_PARTITIONS,
    END_TXN,
    INIT,
    METADATA,
    PRODUCE,
    TXN_OFFSET_COMMIT,
    ScriptedBroker,
)

P0 = TopicPartition("t", 0)
FAST = {"socket.timeout.ms": 150, "delivery.timeout.ms": 3_000, "reconnect.backoff.ms": 5}


def records(count: int = 1) -> BatchBuilder:
    builder = BatchBuilder()
    for number in range(count):
        builder.append(b"key", b"%d" % number, 1_700_000_000_000)
    return builder


def with_producer(
    test: Callable[[ScriptedBroker, TransactionalProducer], Awaitable[None]],
    *,
    version: int = 2,
    settings: dict[str, Any] | None = None,
) -> None:
    async def main() -> None:
        async with (
            ScriptedBroker(version) as broker,
            KafkaClient(broker.address, settings=FAST | (settings or {})) as client,
        ):
            producer = TransactionalProducer(client, "orders-1")
            await producer.init_transactions()
            try:
                await test(broker, producer)
            finally:
                await producer.close()

    asyncio.run(main())


async def one(producer: TransactionalProducer, *, commit: bool = True, count: int = 1) -> None:
    producer.begin()
    await producer.produce("t", 0, records(count))
    await producer.end_transaction(commit)


@pytest.mark.parametrize("version", [1, 2])
def test_the_versions_that_each_protocol_needs(version: int) -> None:
    async def test(broker: ScriptedBroker, producer: TransactionalProducer) -> None:
        assert producer.transaction_version == version
        producer.begin()
        await producer.produce("t", 0, records())
        await producer.send_offsets({TopicPartition("in", 0): 5}, GroupMetadata("g", 3, "member", "instance"))
        await producer.end_transaction(True)
        names = {type(body).__module__ for _, body in broker.requests}
        wanted = {1: ("v3", "v3"), 2: ("v5", "v5")}[version]
        assert any(f"end_txn.{wanted[0]}" in name for name in names)
        assert any(f"txn_offset_commit.{wanted[1]}" in name for name in names)
        assert any(f"produce.v{10 + version}" in name for name in names)
        assert bool(broker.asked(ADD_PARTITIONS)) == (version == 1)
        (commit,) = broker.asked(TXN_OFFSET_COMMIT)
        assert (commit.generation_id, commit.member_id, commit.group_instance_id) == (3, "member", "instance")

    with_producer(test, version=version)


def test_c2_out_of_order_in_a_transaction_aborts_it_and_nothing_is_left_out() -> None:
    async def test(broker: ScriptedBroker, producer: TransactionalProducer) -> None:
        broker.then(PRODUCE, ErrorCode.OUT_OF_ORDER_SEQUENCE_NUMBER)
        with pytest.raises(AbortTransaction, match="OUT_OF_ORDER"):
            await one(producer)
        assert not broker.asked(END_TXN), "no commit may follow"
        await producer.abort()
        assert producer.state is State.Ready
        await one(producer)

    with_producer(test)


@pytest.mark.parametrize("version", [1, 2])
def test_c3_a_topic_that_vanishes_for_a_while_keeps_its_sequence(version: int) -> None:
    async def test(broker: ScriptedBroker, producer: TransactionalProducer) -> None:
        producer.begin()
        await producer.produce("t", 0, records(3))
        await producer.flush()
        broker.then(PRODUCE, ErrorCode.UNKNOWN_TOPIC_OR_PARTITION)
        broker.then(METADATA, *[ErrorCode.UNKNOWN_TOPIC_OR_PARTITION] * 3)
        await producer.produce("t", 0, records(2))
        await producer.end_transaction(True)
        assert [batch[1:] for batch in broker.written[P0]] == [(0, 3), (3, 2)]

    with_producer(test, version=version)


def test_c4_a_batch_that_is_not_delivered_in_time_makes_the_transaction_abortable() -> None:
    async def test(broker: ScriptedBroker, producer: TransactionalProducer) -> None:
        broker.then(PRODUCE, *[ErrorCode.NOT_ENOUGH_REPLICAS] * 1_000)
        producer.begin()
        await producer.produce("t", 0, records(4))
        with pytest.raises(AbortTransaction, match="NOT_ENOUGH_REPLICAS"):
            await producer.end_transaction(True)
        assert not broker.asked(END_TXN)
        broker.script[PRODUCE].clear()
        await producer.abort()
        await one(producer)
        assert broker.written[P0] == [(broker.written[P0][0][0], 0, 1)]

    with_producer(test, settings={"delivery.timeout.ms": 400})


@pytest.mark.parametrize("version", [1, 2])
def test_c5_a_cluster_that_is_gone_before_the_first_request_gives_no_commit(version: int) -> None:
    async def test(broker: ScriptedBroker, producer: TransactionalProducer) -> None:
        broker.then(PRODUCE, *["close"] * 1_000)
        broker.then(ADD_PARTITIONS, *["close"] * 1_000)
        with pytest.raises(AbortTransaction, match="not delivered"):
            await one(producer)
        assert not broker.asked(END_TXN)
        broker.script.clear()
        await producer.abort()
        await one(producer)
        assert len(broker.written[P0]) == 1

    with_producer(test, version=version, settings={"delivery.timeout.ms": 400})


def test_c6_fenced_comes_up_at_once_and_nothing_is_sent_afterwards() -> None:
    async def test(broker: ScriptedBroker, producer: TransactionalProducer) -> None:
        broker.then(PRODUCE, ErrorCode.INVALID_PRODUCER_EPOCH)
        with pytest.raises(Fenced, match="'orders-1'"):
            await one(producer)
        sent = len(broker.requests)
        for call in (producer.init_transactions, producer.abort):
            with pytest.raises(Fenced):
                await call()
        with pytest.raises(Fenced):
            producer.begin()
        assert len(broker.requests) == sent
        assert not broker.asked(END_TXN)

    with_producer(test)


def test_c7_the_epoch_rises_only_when_the_abort_is_finished() -> None:
    """librdkafka #3971: raised while EndTxn was still being tried, the producer fenced itself."""

    async def test(broker: ScriptedBroker, producer: TransactionalProducer) -> None:
        broker.then(PRODUCE, ErrorCode.MESSAGE_TOO_LARGE)  # Its sequence numbers are used up: the epoch has to rise.
        with pytest.raises(AbortTransaction):
            await one(producer)
        broker.then(END_TXN, *[ErrorCode.CONCURRENT_TRANSACTIONS] * 3, "close after", {})
        await producer.abort()
        await one(producer)
        asked = [key for key, _ in broker.requests if key in (INIT, END_TXN)]
        assert asked == [INIT, *[END_TXN] * 5, INIT, END_TXN], "InitProducerId came before the abort was answered"
        assert producer.state is State.Ready

    with_producer(test, version=1)


@pytest.mark.parametrize("api", [PRODUCE, TXN_OFFSET_COMMIT, END_TXN])
def test_kafka_18019_an_id_that_the_broker_forgot_ends_the_producer(api: int) -> None:
    """A new InitProducerId in its place takes an expired id up again, and what was in doubt is done twice."""

    async def test(broker: ScriptedBroker, producer: TransactionalProducer) -> None:
        producer.begin()
        await producer.produce("t", 0, records())
        await producer.flush()
        broker.then(api, ErrorCode.INVALID_PRODUCER_ID_MAPPING)
        await producer.produce("t", 0, records())
        await producer.send_offsets({TopicPartition("in", 0): 5}, GroupMetadata("g", 3, "member", None))
        with pytest.raises(Fenced, match="orders-1"):
            await producer.end_transaction(True)
        for call in (producer.init_transactions, producer.abort):
            with pytest.raises(Fenced):
                await call()
        assert len(broker.asked(INIT)) == 1

    with_producer(test)


def test_the_leader_moves_and_everything_arrives_in_order_with_the_same_sequences() -> None:
    async def main() -> None:
        async with (
            ScriptedBroker() as broker,
            ScriptedBroker(node_id=2, cluster=broker) as second,
            KafkaClient(broker.address, settings=FAST) as client,
        ):
            producer = TransactionalProducer(client, "orders-1")
            await producer.init_transactions()
            producer.begin()
            broker.then(PRODUCE, ErrorCode.NOT_LEADER_OR_FOLLOWER)
            broker.leaders[P0] = 2
            for count in (1, 2, 3, 4, 5, 6, 7):
                await producer.produce("t", 0, records(count))
            await producer.end_transaction(True)
            assert broker.written[P0] == []
            assert [item[2] for item in second.written[P0]] == [1, 2, 3, 4, 5, 6, 7]
            await producer.close()

    asyncio.run(main())


@pytest.mark.parametrize("is_connected", [False, True])
def test_a_leader_that_is_gone_is_not_waited_for(is_connected: bool) -> None:
    """Nothing was in flight to it, so no request fails that would tell: only the connection does."""

    async def main() -> None:
        async with (
            ScriptedBroker() as broker,
            KafkaClient(broker.address, settings=FAST) as client,
        ):
            second = ScriptedBroker(node_id=2, cluster=broker)
            await second.__aenter__()
            broker.leaders[P0] = 2
            producer, plain = TransactionalProducer(client, "orders-1"), Producer(client)
            await producer.init_transactions()
            await plain.start()
            assert await client.leader("t", 0) == 2
            if is_connected:
                await plain.send("t", 0, b"k", b"v")
            await second.__aexit__()
            broker.leaders[P0] = 1
            producer.begin()
            await producer.produce("t", 0, records(3))
            await producer.end_transaction(True)
            await plain.send("t", 0, b"k", b"v")
            assert [item[2] for item in broker.written[P0]] == [3, 1]
            await producer.close()
            await plain.close()

    asyncio.run(main())


@pytest.mark.parametrize("fate", ["close", "close after", "silent"])
@pytest.mark.parametrize("version", [1, 2])
def test_a_lost_connection_doubles_nothing_and_loses_nothing(fate: str, version: int) -> None:
    async def test(broker: ScriptedBroker, producer: TransactionalProducer) -> None:
        producer.begin()
        broker.then(PRODUCE, {}, fate)
        for _ in range(8):
            await producer.produce("t", 0, records(2))
            await asyncio.sleep(0)
        await producer.produce("t", 1, records(1))
        await producer.end_transaction(True)
        assert [batch[1] for batch in broker.written[P0]] == [0, 2, 4, 6, 8, 10, 12, 14]
        assert len(broker.written[TopicPartition("t", 1)]) == 1
        await one(producer)
        inits = len(broker.asked(INIT))
        assert inits == (2 if version == 1 else 1), "V1 raises the epoch after an unanswered copy, V2 needs not"

    with_producer(test, version=version)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("fate", ["close", "close after", "silent"])
def test_end_transaction_is_repeated_until_it_is_answered(version: int, fate: str) -> None:
    async def test(broker: ScriptedBroker, producer: TransactionalProducer) -> None:
        broker.then(END_TXN, fate, fate)
        await one(producer)
        ends = broker.asked(END_TXN)
        assert len(ends) == 3
        assert len({(end.producer_id, end.producer_epoch, end.committed) for end in ends}) == 1
        await one(producer)
        assert len(broker.asked(INIT)) == (2 if version == 1 else 1)

    with_producer(test, version=version)


def test_an_end_that_nobody_answers_is_an_unknown_outcome_which_init_resolves() -> None:
    async def test(broker: ScriptedBroker, producer: TransactionalProducer) -> None:
        broker.then(END_TXN, *["silent"] * 1_000)
        with pytest.raises(OutcomeUnknown, match="may have happened"):
            await one(producer)
        with pytest.raises(OutcomeUnknown):
            producer.begin()
        broker.script.clear()
        await producer.init_transactions()
        assert producer.state is State.Ready
        assert all(end.committed for end in broker.asked(END_TXN)), "a commit in doubt is never turned into an abort"
        await one(producer)

    with_producer(test, settings={"delivery.timeout.ms": 400})


def test_an_abort_that_follows_a_commit_in_doubt_asks_for_the_commit_again() -> None:
    async def test(broker: ScriptedBroker, producer: TransactionalProducer) -> None:
        broker.then(END_TXN, *["close after"] * 1_000)
        with pytest.raises(OutcomeUnknown):
            await one(producer)
        broker.script.clear()
        await producer.abort()
        assert all(end.committed for end in broker.asked(END_TXN))
        assert producer.state is State.Ready

    with_producer(test, settings={"delivery.timeout.ms": 300, "retry.backoff.max.ms": 20})


def test_a_refused_offset_aborts_and_the_next_transaction_goes_on() -> None:
    async def test(broker: ScriptedBroker, producer: TransactionalProducer) -> None:
        broker.then(TXN_OFFSET_COMMIT, ErrorCode.ILLEGAL_GENERATION)
        producer.begin()
        await producer.produce("t", 0, records())
        await producer.send_offsets({TopicPartition("in", 0): 5}, GroupMetadata("g", 3, "member"))
        with pytest.raises(AbortTransaction, match="ILLEGAL_GENERATION"):
            await producer.end_transaction(True)
        await producer.abort()
        assert [end.committed for end in broker.asked(END_TXN)] == [False]
        await one(producer)

    with_producer(test)


def test_v1_an_abort_that_left_a_hole_in_the_sequence_gets_a_new_epoch() -> None:
    async def test(broker: ScriptedBroker, producer: TransactionalProducer) -> None:
        broker.then(PRODUCE, ErrorCode.MESSAGE_TOO_LARGE)
        with pytest.raises(AbortTransaction, match="MESSAGE_TOO_LARGE"):
            await one(producer, count=3)
        await producer.abort()
        await one(producer)
        assert [batch[1:] for batch in broker.written[P0]] == [(0, 1)]
        assert len(broker.asked(INIT)) == 2

    with_producer(test, version=1)


def test_a_topic_that_is_not_there_is_named_when_the_transaction_fails() -> None:
    async def test(broker: ScriptedBroker, producer: TransactionalProducer) -> None:
        producer.begin()
        await producer.produce("nope", 0, records())
        with pytest.raises(AbortTransaction, match="nope-0"):
            await producer.end_transaction(True)
        await producer.abort()
        await one(producer)

    with_producer(test, settings={"delivery.timeout.ms": 200})


def test_an_empty_transaction_asks_nobody() -> None:
    async def test(broker: ScriptedBroker, producer: TransactionalProducer) -> None:
        sent = len(broker.requests)
        producer.begin()
        await producer.end_transaction(True)
        producer.begin()
        await producer.abort()
        assert len(broker.requests) == sent
        assert producer.state is State.Ready

    with_producer(test)


def test_what_is_not_allowed_is_fatal_and_says_so() -> None:
    async def main() -> None:
        async with ScriptedBroker() as broker, KafkaClient(broker.address, settings=FAST) as client:
            broker.then(INIT, ErrorCode.TRANSACTIONAL_ID_AUTHORIZATION_FAILED)
            producer = TransactionalProducer(client, "orders-1")
            with pytest.raises(Fatal, match=r"'orders-1'.*TRANSACTIONAL_ID_AUTHORIZATION_FAILED"):
                await producer.init_transactions()
            await producer.init_transactions()
            assert producer.state is State.Ready
            await producer.close()

    asyncio.run(main())


def test_an_answer_that_nobody_foresaw_ends_the_producer_and_does_not_wedge_it() -> None:
    async def test(broker: ScriptedBroker, producer: TransactionalProducer) -> None:
        perform = producer._perform

        async def fail(_request: Any) -> None:
            raise AttributeError("no such field")

        producer._perform = fail  # type: ignore[method-assign]
        with pytest.raises(Fatal, match=r"EndTxn of .*'orders-1' failed unexpectedly.*no such field"):
            await one(producer)
        producer._perform = perform  # type: ignore[method-assign]
        await producer.init_transactions()
        assert producer.state is State.Ready
        await one(producer)

    with_producer(test, settings={"delivery.timeout.ms": 1_000})


# --- Without transactions ---


def with_idempotent(
    test: Callable[[ScriptedBroker, Producer], Awaitable[None]], settings: dict[str, Any] | None = None
) -> None:
    async def main() -> None:
        async with (
            ScriptedBroker() as broker,
            KafkaClient(broker.address, settings=FAST | (settings or {})) as client,
        ):
            producer = Producer(client)
            await producer.start()
            try:
                await test(broker, producer)
            finally:
                await producer.close()

    asyncio.run(main())


def test_records_that_wait_together_go_together_and_learn_their_offsets() -> None:
    async def test(broker: ScriptedBroker, producer: Producer) -> None:
        found = await asyncio.gather(*(producer.send("t", 0, None, b"%d" % n, timestamp_ms=n) for n in range(100)))
        assert [item.offset for item in found] == list(range(100))
        assert "0 bytes" in repr(producer)
        assert [item.timestamp_ms for item in found] == list(range(100))
        assert len(broker.written[P0]) < 10

    with_idempotent(test)


@pytest.mark.parametrize("fate", ["close", "close after", "silent", ErrorCode.NOT_ENOUGH_REPLICAS])
def test_idempotent_a_repeated_batch_is_written_once(fate: Any) -> None:
    async def test(broker: ScriptedBroker, producer: Producer) -> None:
        broker.then(PRODUCE, fate)
        found = [(await producer.send("t", 0, None, b"%d" % number)).offset for number in range(5)]
        assert found == [0, 1, 2, 3, 4]
        assert [batch[1] for batch in broker.written[P0]] == [0, 1, 2, 3, 4]

    with_idempotent(test)


def test_idempotent_a_record_without_an_answer_is_an_unknown_outcome_and_the_next_one_goes_on() -> None:
    async def test(broker: ScriptedBroker, producer: Producer) -> None:
        broker.then(PRODUCE, *["close after"] * 1_000)
        with pytest.raises(OutcomeUnknown, match="may be in the log"):
            await producer.send("t", 0, None, b"x")
        broker.script.clear()
        broker.written.clear()
        await producer.send("t", 0, None, b"y")
        assert broker.written[P0][0][1] == 0, "a new producer id begins at 0"
        assert len(broker.asked(INIT)) == 2

    with_idempotent(test, {"delivery.timeout.ms": 2_000})  # Long enough to be written once, on any machine.


def test_idempotent_a_record_that_was_never_taken_is_retriable() -> None:
    async def test(broker: ScriptedBroker, producer: Producer) -> None:
        broker.then(PRODUCE, *[ErrorCode.NOT_ENOUGH_REPLICAS] * 1_000)
        with pytest.raises(Retriable, match="error 19"):
            await producer.send("t", 0, None, b"x")
        broker.script.clear()
        assert (await producer.send("t", 0, None, b"y")).offset == 0

    with_idempotent(test, {"delivery.timeout.ms": 300})


@pytest.mark.parametrize(
    "code",
    [ErrorCode.NOT_ENOUGH_REPLICAS_AFTER_APPEND, ErrorCode.REQUEST_TIMED_OUT, ErrorCode.NOT_LEADER_OR_FOLLOWER],
)
def test_idempotent_an_error_that_may_follow_the_append_is_an_unknown_outcome(code: ErrorCode) -> None:
    async def test(broker: ScriptedBroker, producer: Producer) -> None:
        broker.then(PRODUCE, *[code] * 1_000)
        with pytest.raises(OutcomeUnknown, match=f"error {int(code)}"):
            await producer.send("t", 0, None, b"x")
        broker.script.clear()
        assert (await producer.send("t", 0, None, b"y")).offset == 0

    with_idempotent(test, {"delivery.timeout.ms": 300})


def test_idempotent_a_refusal_says_nothing_about_the_copy_before_it() -> None:
    async def test(broker: ScriptedBroker, producer: Producer) -> None:
        broker.then(PRODUCE, "close after", ErrorCode.TOPIC_AUTHORIZATION_FAILED)
        with pytest.raises(OutcomeUnknown, match="TOPIC_AUTHORIZATION_FAILED"):
            await producer.send("t", 0, None, b"x")

    with_idempotent(test)


def test_idempotent_nothing_new_is_sent_without_a_producer_id() -> None:
    async def test(broker: ScriptedBroker, producer: Producer) -> None:
        def sent(partition: int) -> list[Any]:
            items = [
                item for body in broker.asked(PRODUCE) for topic in body.topic_data for item in topic.partition_data
            ]
            return [read_header(item.records) for item in items if item.index == partition]

        broker.then(PRODUCE, *["close"] * 1_000)
        given_up = asyncio.ensure_future(producer.send("t", 1, None, b"a"))
        await asyncio.sleep(0.4)
        in_doubt = asyncio.ensure_future(producer.send("t", 0, None, b"b"))
        with pytest.raises(OutcomeUnknown):  # Its sequence numbers are lost, so a new producer id is due.
            await given_up
        behind, before = asyncio.ensure_future(producer.send("t", 0, None, b"c")), len(sent(0))
        while len(sent(0)) < before + 3:
            await asyncio.sleep(0.002)
        broker.script.clear()
        await asyncio.gather(in_doubt, behind)
        assert all(header.producer_id >= 0 for header in sent(0)), "a repeated copy of this batch would be doubled"

    with_idempotent(test, {"delivery.timeout.ms": 800, "retry.backoff.max.ms": 20})


def test_idempotent_a_record_too_large_fails_alone() -> None:
    async def test(broker: ScriptedBroker, producer: Producer) -> None:
        broker.then(PRODUCE, ErrorCode.MESSAGE_TOO_LARGE)
        with pytest.raises(Fatal, match="MESSAGE_TOO_LARGE"):
            await producer.send("t", 0, None, b"x" * 1000)
        assert (await producer.send("t", 0, None, b"y")).offset == 0

    with_idempotent(test)


def test_idempotent_a_broker_that_lost_our_place_gets_a_new_producer_id() -> None:
    async def test(broker: ScriptedBroker, producer: Producer) -> None:
        assert (await producer.send("t", 0, None, b"a")).offset == 0
        broker.then(PRODUCE, ErrorCode.OUT_OF_ORDER_SEQUENCE_NUMBER)
        assert (await producer.send("t", 0, None, b"b")).offset >= 0
        header = read_header(broker.asked(PRODUCE)[-1].topic_data[0].partition_data[0].records)
        assert header.base_sequence == 0
        assert len(broker.asked(INIT)) == 2

    with_idempotent(test)


def test_closing_fails_what_waits_and_a_closed_producer_says_so() -> None:
    async def test(broker: ScriptedBroker, producer: Producer) -> None:
        broker.then(PRODUCE, "silent")
        waiting = asyncio.ensure_future(producer.send("t", 0, None, b"x"))
        while not broker.asked(PRODUCE):
            await asyncio.sleep(0.005)
        await producer.close()
        with pytest.raises(OutcomeUnknown):
            await waiting
        with pytest.raises(Fatal, match="closed"):
            await producer.send("t", 0, None, b"x")

    with_idempotent(test, {"socket.timeout.ms": 5_000})

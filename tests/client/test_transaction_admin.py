"""What operators do to transactions, and ends under saved names: the same on both kinds of broker."""

from __future__ import annotations

from typing import Any

import pytest

from semel.client.admin import Admin
from semel.client.batches import Identity
from semel.client.producer import TransactionalProducer
from semel.client.transaction_admin import SavedEnd, TransactionAdmin
from semel.client.two_phase import PreparedState
from semel.errors import ConfigurationError, Fenced
from semel.types import TopicPartition
from tests.client.test_brokers import Cluster, records, run, values


async def opened(cluster: Cluster, name: str, value: str = "a", **more: Any) -> TransactionalProducer:
    """A producer with one record in its open transaction."""
    producer = await cluster.producer(name, **more)
    producer.begin()
    await producer.produce(cluster.topic, 0, records(value))
    await producer.flush()
    return producer


def name_of(producer: TransactionalProducer) -> PreparedState:
    return PreparedState(*producer.identity)


def test_logs_tell_what_is_open_and_who_wrote_it(newest_broker: Any) -> None:
    async def test(cluster: Cluster) -> None:
        admin = TransactionAdmin(cluster.client)
        producer = await opened(cluster, "w")
        name = name_of(producer)
        [found] = await admin.open_in_logs(cluster.partitions)
        assert (found.partition, found.name, found.start_offset) == (TopicPartition(cluster.topic, 0), name, 0)
        assert await admin.written_by(name) == [TopicPartition(cluster.topic, 0)]
        await producer.end_transaction(commit=False)
        await cluster.all_ended(cluster.partitions)
        assert await admin.open_in_logs(cluster.partitions) == []
        assert await admin.written_by(name) == [TopicPartition(cluster.topic, 0)], "also of one that was aborted"
        assert await admin.written_by(PreparedState(name.producer_id + 1_000_000, 0)) == []

    run(newest_broker, test)


def test_an_operator_aborts_and_fences(newest_broker: Any) -> None:
    async def test(cluster: Cluster) -> None:
        producer = await opened(cluster, "w")
        identity = await TransactionAdmin(cluster.client).fence(producer.transactional_id)
        assert identity.producer_id >= 0
        with pytest.raises(Fenced):
            await producer.end_transaction(commit=True)
        assert values(await cluster.read()) == []

    run(newest_broker, test)


def test_a_saved_name_ends_its_own_transaction_and_no_other(newest_broker: Any) -> None:
    """Kafka facts 3.5, R1 to R9 and R11, as EndTxn v5 has them."""

    async def test(cluster: Cluster) -> None:
        admin = TransactionAdmin(cluster.client)
        producer = await opened(cluster, "w")
        own, name = producer.transactional_id, name_of(producer)
        for _ in range(2):
            assert await admin.end_saved(own, name, commit=True) is SavedEnd.ENDED
        assert await admin.end_saved(own, name, commit=False) is SavedEnd.OTHERWISE
        successor = await opened(cluster, "w", "b")
        assert await admin.end_saved(own, name, commit=True) is SavedEnd.MOVED_ON
        later = name_of(successor)
        assert await admin.end_saved(own, later, commit=False) is SavedEnd.ENDED
        committed_after = await admin.end_saved(own, later, commit=True)
        assert committed_after in (SavedEnd.OTHERWISE, SavedEnd.MOVED_ON), "4.3.1 says 48, its successors 90"
        assert await admin.end_saved("nobody", later, commit=True) is SavedEnd.UNKNOWN_ID
        stranger = PreparedState(later.producer_id + 1_000_000, later.epoch)
        assert await admin.end_saved(own, stranger, commit=True) is SavedEnd.UNKNOWN_ID
        assert values(await cluster.read()) == ["a"]

    run(newest_broker, test)


def test_a_producer_may_prepare_what_times_out_only_when_it_says_so(newest_broker: Any) -> None:
    async def test(cluster: Cluster) -> None:
        with pytest.raises(ConfigurationError, match="two_phase_commit=True"):
            await (await opened(cluster, "plain")).prepare()
        producer = await opened(cluster, "timed", prepare_until_timeout=True, transaction_timeout_ms=60_000)
        name = await producer.prepare()
        [found] = await Admin(cluster.client).describe_transactions([producer.transactional_id])
        assert (found.timeout_ms, Identity(*name)) == (60_000, producer.identity)
        assert await producer.complete(name)
        await cluster.all_ended(cluster.partitions[1:])

    run(newest_broker, test)


def test_on_v1_a_name_stands_for_many_transactions(embedded_v1: Any) -> None:
    async def test(cluster: Cluster) -> None:
        with pytest.raises(ConfigurationError, match=r"transaction\.version below 2"):
            await TransactionAdmin(cluster.client).end_saved("w", PreparedState(1, 1), commit=True)
        with pytest.raises(ConfigurationError, match=r"transaction\.version"):
            await cluster.producer("timed", prepare_until_timeout=True)

    run(embedded_v1, test)

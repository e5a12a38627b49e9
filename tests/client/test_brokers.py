"""The client against real brokers of both kinds and both transaction protocols."""

from __future__ import annotations

import asyncio
import ctypes
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import confluent_kafka
import pytest

from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.client.consumer import Consumer, Reader
from semel.client.producer import Producer, TransactionalProducer
from semel.errors import AbortTransaction, ConfigurationError, Fatal, Fenced, Retriable
from semel.types import GroupMetadata, Record, TopicPartition
from semel.wire.records import BatchBuilder
from tests.moment import NOW_MS


class Cluster:
    """A broker, a client, and a topic of this test's own."""

    def __init__(self, address: Any, client: KafkaClient, topic: str) -> None:
        self.bootstrap = address.bootstrap
        self.version = address.transaction_version
        self.client = client
        self.admin = Admin(client)
        self.topic = topic
        self.partitions = [TopicPartition(topic, number) for number in range(2)]

    async def producer(self, name: str = "writer", **more: Any) -> TransactionalProducer:
        producer = TransactionalProducer(self.client, f"{self.topic}.{name}", **more)
        await producer.init_transactions()
        return producer

    async def all_ended(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        """The ends of these partitions, once no transaction is open: Kafka writes markers after it has answered."""
        while True:
            ends = await self.admin.list_offsets(partitions, at="high_watermark")
            if await self.admin.list_offsets(partitions, at="stable") == ends:
                return ends
            await asyncio.sleep(0.01)

    async def read(self, partitions: list[TopicPartition] | None = None) -> list[Record]:
        """Every committed record."""
        wanted = partitions or self.partitions
        ends = await self.all_ended(wanted)
        reader = Reader(self.bootstrap)
        await reader.start(dict.fromkeys(wanted, 0))
        records: list[Record] = []
        waiting = {partition for partition in wanted if ends[partition]}
        while waiting:
            batch = await reader.poll(1_000, 1.0)
            records += batch.records
            waiting -= {partition for partition, end in batch.end_offsets.items() if end >= ends[partition]}
        await reader.close()
        return records


def run(address: Any, test: Callable[[Cluster], Awaitable[None]]) -> None:
    async def main() -> None:
        topic = f"client-{uuid.uuid4().hex[:8]}"
        async with KafkaClient(address.bootstrap) as client:
            cluster = Cluster(address, client, topic)
            await cluster.admin.create_topics({topic: TopicSpec(2)})
            await test(cluster)

    asyncio.run(main())


def records(*values: str, headers: tuple[tuple[str, bytes | None], ...] = ()) -> BatchBuilder:
    builder = BatchBuilder()
    for value in values:
        builder.append(b"key", value.encode(), NOW_MS, headers)
    return builder


def values(found: list[Record]) -> list[str]:
    return sorted((record.value or b"").decode() for record in found)


async def written(producer: TransactionalProducer, cluster: Cluster, value: str) -> None:
    await producer.produce(cluster.topic, 0, records(value))
    await producer.end_transaction(True)


async def poll_for_ever(source: Reader | Consumer) -> None:
    while True:
        await source.poll(10, 0.2)


def test_committed_records_are_seen_whole_and_aborted_ones_never(any_broker: Any) -> None:
    async def test(cluster: Cluster) -> None:
        producer = await cluster.producer()
        for number in range(4):
            producer.begin()
            for partition in range(2):
                await producer.produce(
                    cluster.topic, partition, records(f"{number}.{partition}a", f"{number}.{partition}b")
                )
            await producer.flush()
            await producer.end_transaction(commit=number % 2 == 0)
        assert values(await cluster.read()) == [f"{n}.{p}{x}" for n in (0, 2) for p in (0, 1) for x in "ab"]
        await producer.close()

    run(any_broker, test)


def test_a_record_keeps_key_value_headers_and_time(any_broker: Any) -> None:
    async def test(cluster: Cluster) -> None:
        producer = Producer(cluster.client)
        await producer.start()
        sent = await producer.send(cluster.topic, 1, b"k", None, [("a", b"1"), ("b", None)], NOW_MS + 123)
        assert sent.offset == 0
        (record,) = await cluster.read()
        assert record == Record(cluster.topic, 1, 0, NOW_MS + 123, b"k", None, (("a", b"1"), ("b", None)))
        await producer.close()

    run(any_broker, test)


def test_offsets_go_with_the_transaction_and_a_stable_fetch_waits_for_it(any_broker: Any) -> None:
    async def test(cluster: Cluster) -> None:
        group = f"{cluster.topic}.group"
        source = cluster.partitions[0]
        producer = await cluster.producer()
        for offset, commit in ((5, True), (9, False)):
            producer.begin()
            await producer.produce(cluster.topic, 1, records("x"))
            await producer.send_offsets({source: offset}, GroupMetadata(group))
            await producer.flush()
            assert await cluster.admin.committed_offsets(group, [source], require_stable=False) == (
                {} if commit else {source: 5}
            )
            waiting = asyncio.ensure_future(cluster.admin.committed_offsets(group, [source]))
            await asyncio.sleep(0.1)
            assert not waiting.done(), "an open transaction holds the offset"
            await producer.end_transaction(commit)
            assert await waiting == {source: 5}
        producer.begin()
        await producer.send_offsets({source: 11}, GroupMetadata(group))
        await producer.flush()
        with pytest.raises(Retriable, match="UNSTABLE_OFFSET_COMMIT"):
            await cluster.admin.committed_offsets(group, [source], timeout=0.3)
        await producer.abort()
        await producer.close()

    run(any_broker, test)


def test_a_producer_can_ask_whether_it_has_a_successor(any_broker: Any) -> None:
    async def test(cluster: Cluster) -> None:
        older = await cluster.producer()
        await older.check_owner()
        for commit in (True, False):
            older.begin()
            await older.produce(cluster.topic, 0, records("mine"))
            await older.flush()
            await older.check_owner()
            await older.end_transaction(commit)
            await older.check_owner()
        newer = await cluster.producer()
        with pytest.raises(Fenced, match=re.escape(f"owns it now as {newer.identity}")):
            await older.check_owner()
        await newer.check_owner()

    run(any_broker, test)


def test_c6_the_newer_owner_fences_the_older_which_says_who_it_is(any_broker: Any) -> None:
    async def test(cluster: Cluster) -> None:
        older = await cluster.producer()
        older.begin()
        await older.produce(cluster.topic, 0, records("zombie"))
        await older.flush()
        newer = await cluster.producer()
        with pytest.raises(Fenced) as fenced:
            await written(older, cluster, "zombie 2")
        assert f"{cluster.topic}.writer" in str(fenced.value)
        assert str(newer.identity) in str(fenced.value)
        with pytest.raises(Fenced):
            await older.abort()
        newer.begin()
        await newer.produce(cluster.topic, 0, records("owner"))
        await newer.end_transaction(True)
        assert values(await cluster.read()) == ["owner"]
        await older.close()
        await newer.close()

    run(any_broker, test)


def test_a_second_owner_of_an_idle_id_fences_at_the_first_write(any_broker: Any) -> None:
    async def test(cluster: Cluster) -> None:
        older = await cluster.producer()
        newer = await cluster.producer()
        older.begin()
        with pytest.raises(Fenced):
            await written(older, cluster, "zombie")
        assert await cluster.read() == []
        await older.close()
        await newer.close()

    run(any_broker, test)


def test_a_batch_begun_while_the_timer_runs_for_another_is_sent_too(any_broker: Any) -> None:
    """A busy machine: the second batch is begun when the first one's linger is over, and nobody sends after it."""

    async def test(cluster: Cluster) -> None:
        producer = Producer(cluster.client, linger_ms=50)
        await producer.start()
        for partition in range(2):
            await producer.send(cluster.topic, partition, None, b"first")

        async def late() -> None:
            time.sleep(0.06)  # Nothing else runs meanwhile, as when the processor is taken away.
            await producer.send(cluster.topic, 1, None, b"second")

        async with asyncio.timeout(20):
            await asyncio.gather(producer.send(cluster.topic, 0, None, b"second"), late())
        await producer.close()

    run(any_broker, test)


def test_epochs_of_many_transactions_and_a_restart(any_broker: Any) -> None:
    async def test(cluster: Cluster) -> None:
        expected = []
        for life in range(3):
            producer = await cluster.producer()
            for number in range(20):
                producer.begin()
                await producer.produce(cluster.topic, number % 2, records(f"{life}.{number}"))
                await producer.end_transaction(True)
                expected.append(f"{life}.{number}")
            producer.begin()
            await producer.produce(cluster.topic, 0, records("left open"))
            await producer.flush()
            await producer._sender.close()  # The process dies: nothing is aborted, nothing is closed.
        await (await cluster.producer()).close()
        assert values(await cluster.read()) == sorted(expected)

    run(any_broker, test)


def test_topics_are_made_checked_and_listed(any_broker: Any) -> None:
    async def test(cluster: Cluster) -> None:
        name = f"{cluster.topic}-made"
        spec = {name: TopicSpec(3, {"cleanup.policy": "compact"})}
        await cluster.admin.create_topics(spec)
        await cluster.admin.create_topics(spec)
        with pytest.raises(ConfigurationError, match="3 partitions and the app declares 4"):
            await cluster.admin.create_topics({name: TopicSpec(4)})
        listed = await cluster.admin.list_topics()
        assert listed[name].partitions == 3
        assert not any(topic.startswith("__") for topic in listed)
        await cluster.admin.delete_topics([name])
        await cluster.admin.delete_topics([name])
        with pytest.raises(Fatal, match=name):
            await cluster.client.topic(name, timeout=0.2)

    run(any_broker, test)


def test_positions_and_transactions_are_told(any_broker: Any) -> None:
    async def test(cluster: Cluster) -> None:
        producer = await cluster.producer()
        producer.begin()
        await producer.produce(cluster.topic, 0, records("a", "b"))
        await producer.flush()
        first = cluster.partitions[0]
        assert (await cluster.admin.list_offsets([first], at="stable"))[first] == 0
        assert (await cluster.admin.list_offsets([first], at="high_watermark"))[first] == 2
        assert (await cluster.admin.list_offsets([first], at="earliest"))[first] == 0
        (described,) = await cluster.admin.describe_transactions([producer.transactional_id, "nobody"])
        assert described.state == "Ongoing"
        assert described.start_ms > 0
        assert first in described.partitions
        assert (described.producer_id, described.producer_epoch) == producer.identity
        ongoing = await cluster.admin.list_transactions(["Ongoing"])
        assert producer.transactional_id in [item.transactional_id for item in ongoing]
        with pytest.raises(ConfigurationError, match="Sideways"):
            await cluster.admin.list_transactions(["Sideways"])
        await producer.end_transaction(True)
        assert await cluster.all_ended([first]) == {first: 3}
        await producer.close()

    run(any_broker, test)


class Member:
    """A group member that notes what the group does to it; it begins at the committed offsets."""

    def __init__(
        self, cluster: Cluster, group: str, instance: str | None, delay: float = 0.0, kind: Any = Consumer, **more: Any
    ) -> None:
        self.cluster = cluster
        self.group = group
        self.delay = delay
        self.owned: set[TopicPartition] = set()
        self.told: list[str] = []
        self.records: list[Record] = []
        self.ends: dict[TopicPartition, int] = {}
        options = {"session_timeout_ms": 6_000} | more
        self.consumer: Consumer = kind(
            cluster.bootstrap, group=group, topics=[cluster.topic], instance_id=instance, events=self, **options
        )

    async def on_assigned(self, partitions: list[TopicPartition]) -> Mapping[TopicPartition, int]:
        await asyncio.sleep(self.delay)
        committed = await self.cluster.admin.committed_offsets(self.group, partitions)
        self.told.append("assigned")
        self.owned |= set(partitions)
        return {partition: committed.get(partition, 0) for partition in partitions}

    async def on_revoked(self, partitions: list[TopicPartition]) -> None:
        self.told.append("revoked")
        self.owned -= set(partitions)

    async def on_lost(self, partitions: list[TopicPartition]) -> None:
        self.told.append("lost")
        self.owned -= set(partitions)

    async def poll(self) -> None:
        batch = await self.consumer.poll(500, 0.1)
        for record in batch.records:
            assert (record.topic, record.partition) in self.owned, "a record of a partition that is not ours"
        self.records += batch.records
        self.ends.update(batch.end_offsets)

    async def until(self, condition: Callable[[], bool], *others: Member) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline, f"{self.told} {self.owned}"
            await asyncio.gather(*(member.poll() for member in (self, *others)))


def test_a_group_starts_where_it_is_told_and_passes_trailing_markers(any_broker: Any) -> None:
    async def test(cluster: Cluster) -> None:
        producer = await cluster.producer()
        group = f"{cluster.topic}.group"
        first, second = cluster.partitions
        for number in range(3):
            producer.begin()
            await producer.produce(cluster.topic, 0, records(f"{number}"))
            await producer.produce(cluster.topic, 1, records(f"{number}"))
            if number == 1:
                await producer.send_offsets({first: 2}, GroupMetadata(group))
            await producer.end_transaction(True)
        member = Member(cluster, group, "one", delay=0.2)
        await member.consumer.start()
        await member.until(lambda: member.ends == {first: 6, second: 6})
        assert [record.value for record in member.records if record.partition == 0] == [b"1", b"2"]
        assert [record.value for record in member.records if record.partition == 1] == [b"0", b"1", b"2"]
        assert member.consumer.positions == {first: 6, second: 6}
        assert member.told == ["assigned"]
        metadata = member.consumer.group_metadata()
        assert (metadata.group_id, metadata.group_instance_id) == (group, "one")
        assert metadata.generation_id >= 1
        producer.begin()
        await producer.send_offsets({first: 6}, metadata)
        await producer.end_transaction(True)
        producer.begin()
        await producer.send_offsets({first: 3}, metadata._replace(generation_id=metadata.generation_id + 7))
        with pytest.raises(AbortTransaction, match="ILLEGAL_GENERATION"):
            await producer.end_transaction(True)
        await producer.abort()
        assert await cluster.admin.committed_offsets(group, [first]) == {first: 6}
        await member.consumer.close()
        await producer.close()

    run(any_broker, test)


def test_a_handler_that_holds_the_event_loop_for_longer_than_a_session_keeps_its_partitions(embedded: Any) -> None:
    async def test(cluster: Cluster) -> None:
        member = Member(cluster, f"{cluster.topic}.group", "one", session_timeout_ms=1_500)
        await member.consumer.start()
        await member.until(lambda: len(member.owned) == 2)
        before = member.consumer.group_metadata()
        time.sleep(4.0)  # What a synchronous handler does: nothing else runs in this loop.
        assert member.consumer.group_metadata() == before
        producer = await cluster.producer()
        producer.begin()
        await producer.send_offsets({cluster.partitions[0]: 0}, before)
        await producer.end_transaction(True)
        await member.poll()
        assert member.told == ["assigned"]
        await member.consumer.close()
        await producer.close()

    run(embedded, test)


def test_native_code_that_keeps_the_gil_for_a_session_ends_it_and_what_was_open_is_refused(
    embedded: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """No thread of Python can send a heartbeat then. Nothing is done twice for it, and the log says what it was."""

    async def test(cluster: Cluster) -> None:
        member = Member(cluster, f"{cluster.topic}.group", "one", session_timeout_ms=1_500)
        await member.consumer.start()
        await member.until(lambda: len(member.owned) == 2)
        before = member.consumer.group_metadata()
        ctypes.PyDLL(None).sleep(4)  # Unlike other foreign functions it does not let the lock go.
        await member.until(lambda: member.told == ["assigned", "lost", "assigned"])
        producer = await cluster.producer()
        producer.begin()
        await producer.send_offsets({cluster.partitions[0]: 0}, before)
        with pytest.raises(AbortTransaction):
            await producer.end_transaction(True)
        await producer.abort()
        await member.consumer.close()
        await producer.close()

    run(embedded, test)
    assert [line for line in caplog.messages if "Python's lock (GIL)" in line and "SEMEL_SESSION_TIMEOUT_MS" in line]


def test_in_a_group_of_the_new_protocol_nobody_stops_who_has_nothing_to_give_back(newest_broker: Any) -> None:
    """KIP-848: who joins takes one partition over; the other one stays with whom it was, epoch after epoch."""

    async def test(cluster: Cluster) -> None:
        group = f"{cluster.topic}.group"
        producer = await cluster.producer()
        producer.begin()
        for number in range(2):
            await producer.produce(cluster.topic, number, records(f"{number}"))
        await producer.end_transaction(True)
        settings = {"group.protocol": "consumer"}
        one, two = (Member(cluster, group, name, settings=settings) for name in ("one", "two"))
        await one.consumer.start()
        await one.until(lambda: len(one.records) == 2)
        epoch = one.consumer.group_metadata().generation_id
        await two.consumer.start()
        await one.until(lambda: len(one.owned) == len(two.owned) == 1 and len(two.records) == 1, two)
        assert one.owned | two.owned == set(cluster.partitions)
        assert one.told == ["assigned", "revoked"]
        (mine,) = one.owned
        producer.begin()
        metadata = one.consumer.group_metadata()
        assert metadata.generation_id > epoch
        await producer.produce(mine.topic, mine.partition, records("more"))
        await producer.send_offsets({mine: 2}, metadata)
        await producer.end_transaction(True)
        await one.until(lambda: values(one.records) == ["0", "1", "more"], two)
        producer.begin()
        # Since KIP-1251 an epoch in which the partition was ours already would do.
        (theirs,) = two.owned
        await producer.send_offsets({theirs: 0}, metadata._replace(generation_id=epoch))
        with pytest.raises(AbortTransaction):
            await producer.end_transaction(True)
        await producer.abort()
        await two.consumer.close()
        await one.consumer.close()
        back = Member(cluster, group, "one", settings=settings)
        await back.consumer.start()
        await back.until(lambda: mine in back.owned and bool(back.records))
        assert values(back.records) == ["more"], "a static member has its place again at once, where it was"
        await back.consumer.close()
        await producer.close()

    run(newest_broker, test)


def test_seek_delivers_again_from_there_and_nothing_fetched_before(any_broker: Any) -> None:
    async def test(cluster: Cluster) -> None:
        producer = await cluster.producer()
        producer.begin()
        await producer.produce(cluster.topic, 0, records(*[str(number) for number in range(500)]))
        await producer.end_transaction(True)
        member = Member(cluster, f"{cluster.topic}.group", "one")
        await member.consumer.start()
        first = cluster.partitions[0]
        for target in (0, 100, 7, 499):
            await member.until(lambda: len(member.records) >= 1)
            await member.consumer.seek({first: target})
            member.records.clear()
            await member.until(lambda: len(member.records) >= 1)
            assert member.records[0].offset == target
        cancelled = asyncio.ensure_future(member.consumer.poll(500, 5.0))
        await asyncio.sleep(0.05)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        await member.consumer.seek({first: 42})
        member.records.clear()
        await member.until(lambda: len(member.records) >= 1)
        assert [record.offset for record in member.records[:3]] == [42, 43, 44]
        await member.consumer.close()
        await producer.close()

    run(any_broker, test)


def test_a_cancelled_poll_loses_no_record(any_broker: Any) -> None:
    async def test(cluster: Cluster) -> None:
        producer = await cluster.producer()
        member = Member(cluster, f"{cluster.topic}.group", "one")
        await member.consumer.start()
        await member.until(lambda: len(member.owned) == 2)
        polling = asyncio.ensure_future(member.consumer.poll(500, 10.0))
        await asyncio.sleep(0.05)
        polling.cancel()
        producer.begin()
        await producer.produce(cluster.topic, 0, records("kept"))
        await producer.end_transaction(True)
        await member.until(lambda: len(member.records) >= 1)
        assert values(member.records) == ["kept"]
        await member.consumer.close()
        await producer.close()

    run(any_broker, test)


def test_members_share_and_a_twin_fences_the_one_with_its_instance_id(newest_broker: Any) -> None:
    async def test(cluster: Cluster) -> None:
        group = f"{cluster.topic}.group"
        one, two = Member(cluster, group, "one"), Member(cluster, group, "two")
        await one.consumer.start()
        await one.until(lambda: len(one.owned) == 2)
        await two.consumer.start()
        await one.until(lambda: len(one.owned) == len(two.owned) == 1, two)
        assert one.owned | two.owned == set(cluster.partitions)
        assert one.told == ["assigned", "revoked", "assigned"]
        assert one.consumer.group_metadata().generation_id == two.consumer.group_metadata().generation_id
        twin = Member(cluster, group, "one")
        await twin.consumer.start()
        with pytest.raises(Fenced, match="'one'"):
            await one.until(lambda: False, two, twin)
        for member in (one, two, twin):
            await member.consumer.close()

    run(newest_broker, test)


@pytest.mark.parametrize(("kind", "session"), [("embedded", 1.5), ("kafka", 6.0)])
def test_who_was_stopped_for_longer_than_a_session_is_fenced_by_his_successor_and_not_the_other_way_round(
    kind: str, session: float, request: pytest.FixtureRequest
) -> None:
    async def test(cluster: Cluster) -> None:
        group = f"{cluster.topic}.group"
        one, successor = (Member(cluster, group, "one", session_timeout_ms=round(session * 1_000)) for _ in range(2))
        await one.consumer.start()
        await one.until(lambda: len(one.owned) == 2)
        # Its thread stands still, as the whole process would after SIGSTOP.
        one.consumer._member._loop.call_soon_threadsafe(time.sleep, session + 2)  # type: ignore[union-attr]
        await successor.consumer.start()
        await successor.until(lambda: len(successor.owned) == 2)
        with pytest.raises(Fenced, match="'one'"):
            await one.until(lambda: False, successor)
        await successor.poll()
        assert successor.told == ["assigned"]
        for member in (one, successor):
            await member.consumer.close()

    run(request.getfixturevalue(kind), test)


@pytest.mark.parametrize("kind", ["embedded", "kafka"])
def test_librdkafkas_consumer_shares_a_group_with_ours_whoever_leads_it(
    kind: str, request: pytest.FixtureRequest
) -> None:
    """So an app may be moved from the one to the other in a rolling restart."""

    async def test(cluster: Cluster) -> None:
        producer = await cluster.producer()
        producer.begin()
        for number in range(2):
            await producer.produce(cluster.topic, number, records(f"of-{number}"))
        await producer.end_transaction(True)
        group = f"{cluster.topic}.group"
        first, last = Member(cluster, group, None), Member(cluster, group, None)
        settings = {"group.id": group, "session.timeout.ms": 6_000, "auto.offset.reset": "earliest"}
        theirs = confluent_kafka.Consumer(
            settings | {"bootstrap.servers": cluster.bootstrap, "enable.auto.commit": False}
        )
        read: list[str] = []
        owned: set[int] = set()

        def poll() -> None:
            message = theirs.poll(0.1)
            if message is not None and message.error() is None:
                read.append(message.value().decode())
            owned.clear()
            owned.update(item.partition for item in theirs.assignment())

        async def until(member: Member, condition: Callable[[], bool]) -> None:
            async with asyncio.timeout(60):
                while not condition():
                    await asyncio.gather(asyncio.to_thread(poll), member.poll())

        def shared(member: Member) -> bool:
            return len(owned) == len(member.owned) == 1 and {at.partition for at in member.owned} | owned == {0, 1}

        await first.consumer.start()
        await first.until(lambda: len(first.records) == 2)
        theirs.subscribe([cluster.topic])
        await until(first, lambda: shared(first) and bool(read))
        await first.consumer.close()  # Theirs leads the group now.
        async with asyncio.timeout(60):
            while len(owned) < 2:
                await asyncio.to_thread(poll)
        await last.consumer.start()
        await until(last, lambda: shared(last) and bool(last.records))
        await last.consumer.close()
        theirs.close()
        await producer.close()

    run(request.getfixturevalue(kind), test)


def test_a_member_replaced_in_the_middle_of_a_rebalance_leaves_no_partition_without_owner(newest_broker: Any) -> None:
    """The process that has to give partitions up dies just then, and its slot starts again with the same instance id.

    With cooperative rebalancing the broker hands the newcomer the half of the assignment that its predecessor was to
    keep, nobody revokes the other half, and it has no owner until somebody else joins or leaves.
    """

    async def test(cluster: Cluster) -> None:
        group = f"{cluster.topic}.group"

        class Dying(Member):
            async def on_revoked(self, partitions: list[TopicPartition]) -> None:
                await successor.consumer.start()
                await successor.until(lambda: bool(successor.owned) and bool(two.owned), two)

        first, successor, two = (
            Dying(cluster, group, "one"),
            Member(cluster, group, "one"),
            Member(cluster, group, "two"),
        )
        await first.consumer.start()
        await first.until(lambda: len(first.owned) == 2)
        await two.consumer.start()
        with pytest.raises(Fenced, match="'one'"):
            await first.until(lambda: False)
        await successor.until(lambda: len(successor.owned) == len(two.owned) == 1, two)
        assert successor.owned | two.owned == set(cluster.partitions)
        for member in (first, successor, two):
            await member.consumer.close()

    run(newest_broker, test)


def test_a_pause_ends_when_the_partition_is_given_up(any_broker: Any) -> None:
    async def test(cluster: Cluster) -> None:
        producer = await cluster.producer()
        producer.begin()
        for number in range(2):
            await producer.produce(cluster.topic, number, records(f"of-{number}"))
        await producer.end_transaction(True)
        one = Member(cluster, f"{cluster.topic}.group", "one")
        await one.consumer.start()
        await one.until(lambda: len(one.records) == 2)
        await one.consumer.pause(cluster.partitions)
        two = Member(cluster, one.group, "two")
        await two.consumer.start()
        # Nothing was committed, so what it keeps is delivered again, unless it still stands still.
        await one.until(lambda: one.told == ["assigned", "revoked", "assigned"] and len(one.records) == 3, two)
        for member in (one, two):
            await member.consumer.close()
        await producer.close()

    run(any_broker, test)


def test_a_failing_takeover_stops_the_consumer_with_its_error(any_broker: Any) -> None:
    async def test(cluster: Cluster) -> None:
        class Failing(Member):
            async def on_assigned(self, partitions: list[TopicPartition]) -> Mapping[TopicPartition, int]:
                raise Retriable("the store cannot be restored")

        member = Failing(cluster, f"{cluster.topic}.group", "one")
        await member.consumer.start()
        with pytest.raises(Retriable, match="cannot be restored"):
            await member.until(lambda: False)
        await member.consumer.close()

    run(any_broker, test)


def test_a_position_that_is_gone_is_told_not_skipped(any_broker: Any) -> None:
    async def test(cluster: Cluster) -> None:
        producer = await cluster.producer()
        producer.begin()
        await producer.produce(cluster.topic, 0, records("a"))
        await producer.end_transaction(True)
        reader = Reader(cluster.bootstrap)
        await reader.start({cluster.partitions[0]: 1_000})
        with pytest.raises(Fatal, match=f"{cluster.topic}-0"):
            await poll_for_ever(reader)
        await reader.close()
        await producer.close()

    run(any_broker, test)


def test_closing_does_not_hang_when_the_broker_is_gone(tmp_path: Any) -> None:
    from semel.broker.embedded import EmbeddedBroker

    broker = EmbeddedBroker(tmp_path)
    broker.start()

    async def main() -> float:
        async with KafkaClient(broker.address) as client:
            cluster = Cluster(type("A", (), {"bootstrap": broker.address, "transaction_version": 2}), client, "t")
            await cluster.admin.create_topics({"t": TopicSpec(2)})
            member = Member(cluster, "group", "one")
            await member.consumer.start()
            await member.until(lambda: len(member.owned) == 2)
            await asyncio.to_thread(broker.stop)
            started = time.monotonic()
            await member.consumer.close()
            return time.monotonic() - started

    assert asyncio.run(main()) < 11

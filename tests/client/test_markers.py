"""Markers that a coordinator gave up (KAFKA-20734): what was answered as committed stays so, and readers go on.

The embedded broker never gives one up, so the tests put into a log what such a transaction leaves there. The one with
Apache Kafka makes it do so.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from semel.broker.embedded import EmbeddedBroker
from semel.client.admin import TopicSpec
from semel.client.cluster import KafkaClient
from semel.client.markers import behind, finish
from semel.client.producer import TransactionalProducer
from semel.client.transaction_admin import TransactionAdmin
from semel.client.two_phase import PreparedState
from semel.errors import ConfigurationError, ErrorCode, kafka_error
from semel.processing.ports import free_ports
from semel.types import GroupMetadata, TopicPartition
from tests.broker.core import leave_open
from tests.client.test_brokers import Cluster, records, values
from tests.conftest import unavailable
from tests.services.kafka import KafkaNode, missing_tools

HERE = "127.0.0.1"


class Scene(Cluster):
    """A cluster, and a producer whose last transaction lacks its marker in the topic's second partition."""

    producer_of_it: TransactionalProducer
    name: PreparedState

    @property
    def places(self) -> tuple[TopicPartition, TopicPartition]:
        return self.partitions[0], self.partitions[1]

    async def transaction(
        self, partition: int, value: str, *, commit: bool = True, before_end: Callable[[], None] = lambda: None
    ) -> None:
        self.name = PreparedState(*self.producer_of_it.identity)
        self.producer_of_it.begin()
        await self.producer_of_it.produce(self.topic, partition, records(value))
        await self.producer_of_it.flush()
        before_end()
        await self.producer_of_it.end_transaction(commit)

    def give_up(self, broker: EmbeddedBroker, value: bytes = b"given up") -> None:
        """Put a record of the last transaction where it has no marker."""
        broker.call(lambda node: leave_open(node, self.topic, 1, self.name, value))

    async def committed(self) -> list[str]:
        """What readers of committed records see, once nothing is open."""
        async with asyncio.timeout(20):
            return sorted(values(await self.read()))


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker(tmp_path_factory.mktemp("markers")) as broker:
        yield broker


def play(broker: EmbeddedBroker, scene: Callable[[Scene], Awaitable[None]]) -> None:
    class Address:
        bootstrap, transaction_version = broker.address, 2

    async def main() -> None:
        async with KafkaClient(broker.address) as client:
            cluster = Scene(Address, client, f"markers-{uuid.uuid4().hex[:8]}")
            await cluster.admin.create_topics({cluster.topic: TopicSpec(2)})
            cluster.producer_of_it = await cluster.producer()
            await scene(cluster)

    asyncio.run(main())


@pytest.mark.parametrize("commit", [True, False])
def test_a_missing_marker_is_written_as_the_coordinator_decided(
    embedded: EmbeddedBroker, commit: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene(cluster: Scene) -> None:
        await cluster.transaction(0, "a", commit=commit)
        cluster.give_up(embedded)
        assert await behind(cluster.admin, lambda name: name == cluster.topic) == {cluster.places[1]: 0}
        assert await finish(cluster.client, cluster.partitions, lambda name: name == "another's") == []
        with caplog.at_level(logging.WARNING):
            [found] = await finish(cluster.client, cluster.partitions, lambda name: name.startswith(cluster.topic))
        assert (found.at.partition, found.at.name, found.commit) == (cluster.places[1], cluster.name, commit)
        assert await cluster.committed() == (["a", "given up"] if commit else [])
        assert any(cluster.producer_of_it.transactional_id in line for line in caplog.messages)
        await cluster.transaction(1, "next")
        assert await cluster.committed() == (["a", "given up", "next"] if commit else ["next"])

    play(embedded, scene)


def test_a_transaction_that_is_open_or_whose_id_went_on_is_left_alone(embedded: EmbeddedBroker) -> None:
    async def scene(cluster: Scene) -> None:
        await cluster.transaction(0, "a")
        gone = cluster.name
        await cluster.transaction(0, "b")
        cluster.name = gone
        cluster.give_up(embedded)
        other = await cluster.producer("other")
        other.begin()
        await other.produce(cluster.topic, 0, records("open"))
        await other.flush()
        assert await finish(cluster.client, cluster.partitions, lambda _: True) == []
        assert len(await TransactionAdmin(cluster.client).open_in_logs(cluster.partitions)) == 2
        await other.abort()

    play(embedded, scene)


async def restarted(cluster: Scene) -> None:
    """The process was killed, and starts again."""
    cluster.producer_of_it = await cluster.producer()


async def reconnected(cluster: Scene) -> None:
    """The broker was away for a moment."""
    for connection in cluster.client._connections.values():
        connection.close()


@pytest.mark.parametrize("what_happens", [restarted, reconnected])
@pytest.mark.parametrize("is_about_offsets", [False, True])
def test_an_abort_takes_nothing_along_that_was_answered_as_committed(
    embedded: EmbeddedBroker, what_happens: Callable[[Scene], Awaitable[None]], is_about_offsets: bool
) -> None:
    async def scene(cluster: Scene) -> None:
        await cluster.transaction(0, "a")
        cluster.give_up(embedded)
        await what_happens(cluster)
        producer = cluster.producer_of_it
        producer.begin()
        if is_about_offsets:
            await producer.send_offsets({cluster.places[0]: 1}, GroupMetadata(f"{cluster.topic}-group"))
            await producer.flush()
            assert await cluster.committed() == ["a", "given up"], "before anything is written under this id"
        await producer.produce(cluster.topic, 1, records("aborted"))
        await producer.flush()
        await producer.end_transaction(commit=False)
        assert await cluster.committed() == ["a", "given up"]

    play(embedded, scene)


def test_who_may_not_write_it_is_told_who_may_and_writes_nothing_else(
    embedded: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refused(*_: Any, **__: Any) -> None:
        raise kafka_error(ErrorCode.CLUSTER_AUTHORIZATION_FAILED, "the marker")

    async def scene(cluster: Scene) -> None:
        await cluster.transaction(0, "a")
        cluster.give_up(embedded)
        with monkeypatch.context() as patch:
            patch.setattr(TransactionAdmin, "end_hanging", refused)
            with pytest.raises(ConfigurationError, match=rf"doctor txn commit {cluster.topic}-1@{cluster.name} --yes"):
                await cluster.producer()
            await reconnected(cluster)
            with pytest.raises(ConfigurationError, match="Alter on the cluster"):
                await cluster.transaction(1, "b")
        await restarted(cluster)
        assert await cluster.committed() == ["a", "given up"]

    play(embedded, scene)


def test_who_may_not_look_goes_on_and_is_told(
    embedded: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The right to write a topic does not include DescribeProducers, which asks for Read."""

    async def refused(*_: Any) -> None:
        raise kafka_error(ErrorCode.TOPIC_AUTHORIZATION_FAILED, "the producers of t-0")

    async def scene(cluster: Scene) -> None:
        await cluster.transaction(0, "a")
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            patch.setattr(TransactionAdmin, "open_in_logs", refused)
            await restarted(cluster)
            await cluster.transaction(0, "b")
        assert any("right to read" in line for line in caplog.messages)
        assert await cluster.committed() == ["a", "b"]

    play(embedded, scene)


class Wire:
    """What a broker's requests to itself go over: it can be there, and not."""

    def __init__(self, port: int, upstream: int) -> None:
        self._port, self._upstream = port, upstream
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._carry, HERE, self._port)

    def close(self) -> None:
        """Whoever connects is refused."""
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            their_reader, their_writer = await asyncio.open_connection(HERE, self._upstream)
            self._writers |= {writer, their_writer}
            await asyncio.gather(self._copy(reader, their_writer), self._copy(their_reader, writer))
        writer.close()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
        writer.close()


async def complete(cluster: Scene) -> bool:
    """Whether the coordinator calls the transaction complete within a few seconds, as it does without a marker."""
    with suppress(TimeoutError):
        async with asyncio.timeout(4):
            while True:
                [found] = await cluster.admin.describe_transactions(["markers.writer"])
                if found.state == "CompleteCommit":
                    return True
                await asyncio.sleep(0.05)
    return False


async def killed_before_its_markers(scene: Callable[[Scene], Awaitable[None]]) -> None:
    """A transaction's EndTxn is answered, and the broker is killed before it wrote a marker; then it is back.

    Markers go over the listener between brokers. It is away until the broker that came back has given them up.
    """
    client_port, controller_port, tls_port, brokers_port, wire_port = free_ports(5)
    wire = Wire(wire_port, brokers_port)
    own = f"CLIENT://{HERE}:{client_port},BROKERS://{HERE}"
    extra = {
        "listeners": f"{own}:{brokers_port},CONTROLLER://{HERE}:{controller_port}",
        "advertised.listeners": f"{own}:{wire_port}",
        "inter.broker.listener.name": "BROKERS",
        "listener.security.protocol.map": "CLIENT:PLAINTEXT,CONTROLLER:PLAINTEXT,BROKERS:PLAINTEXT",
    }
    ports = (client_port, controller_port, tls_port)
    node = await asyncio.to_thread(lambda: KafkaNode(extra=extra, ports=ports))
    try:
        await wire.open()
        await asyncio.to_thread(node.start)
        async with KafkaClient(node.bootstrap) as client:

            class Address:
                bootstrap, transaction_version = node.bootstrap, 2

            cluster = Scene(Address, client, "markers")
            await cluster.admin.create_topics({cluster.topic: TopicSpec(2)})
            cluster.producer_of_it = await cluster.producer()
            await cluster.transaction(0, "first")
            assert await cluster.committed() == ["first"]
            await cluster.transaction(1, "given up", before_end=wire.close)
            while not await complete(cluster):  # Nearly every restart meets the moment.
                await asyncio.to_thread(node.kill)
                await asyncio.to_thread(node.start)
            await wire.open()
            await scene(cluster)
    finally:
        wire.close()
        await asyncio.to_thread(node.stop)


@pytest.mark.soak
@pytest.mark.kafka
@pytest.mark.parametrize("what_happens", [restarted, reconnected])
def test_apache_kafka_gives_a_marker_up_and_the_record_stays_committed(
    what_happens: Callable[[Scene], Awaitable[None]],
) -> None:
    if missing_tools():
        unavailable("Apache Kafka", f"{' and '.join(missing_tools())} not found")

    async def scene(cluster: Scene) -> None:
        [left] = await TransactionAdmin(cluster.client).open_in_logs(cluster.partitions)
        assert left.name == cluster.name, "this Kafka gives no marker up: nothing was tested"
        await what_happens(cluster)
        cluster.producer_of_it.begin()
        await cluster.producer_of_it.produce(cluster.topic, 1, records("aborted"))
        await cluster.producer_of_it.flush()
        await cluster.producer_of_it.end_transaction(commit=False)
        assert await cluster.committed() == ["first", "given up"]

    asyncio.run(killed_before_its_markers(scene))

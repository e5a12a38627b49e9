"""The same few transactional calls through three clients, with a short request time-out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import aiokafka
import aiokafka.structs
import confluent_kafka

from semel.client.cluster import KafkaClient
from semel.client.producer import TransactionalProducer
from semel.history import PROOF
from semel.types import GroupMetadata, TopicPartition
from semel.wire.records import BatchBuilder
from tests.moment import NOW_MS


class PeerClient(Protocol):
    async def start(self) -> None: ...
    async def begin(self) -> None: ...
    async def produce(self, partition: TopicPartition, value: str, proof: str = "") -> None:
        """Write one record and wait until it is acknowledged; `proof` says where it comes from (docs/proof.md)."""

    async def send_offsets(self, partition: TopicPartition, offset: int, group: str) -> None: ...
    async def commit(self) -> None: ...
    async def abort(self) -> None: ...
    async def close(self) -> None: ...


def headers_of(proof: str) -> tuple[tuple[str, bytes], ...]:
    return ((PROOF, proof.encode()),) if proof else ()


class Semel:
    def __init__(self, bootstrap: str, transactional_id: str, timeout_ms: int) -> None:
        settings = {"socket.timeout.ms": timeout_ms, "delivery.timeout.ms": 10_000}
        self._client = KafkaClient(bootstrap, client_id="late", settings=settings)
        self._producer = TransactionalProducer(self._client, transactional_id)

    async def start(self) -> None:
        await self._client.start()
        await self._producer.init_transactions()

    async def begin(self) -> None:
        self._producer.begin()

    async def produce(self, partition: TopicPartition, value: str, proof: str = "") -> None:
        builder = BatchBuilder()
        builder.append(None, value.encode(), NOW_MS, headers_of(proof))
        await self._producer.produce(*partition, builder)
        await self._producer.flush()

    async def send_offsets(self, partition: TopicPartition, offset: int, group: str) -> None:
        await self._producer.send_offsets({partition: offset}, GroupMetadata(group))
        await self._producer.flush()

    async def commit(self) -> None:
        await self._producer.end_transaction(commit=True)

    async def abort(self) -> None:
        await self._producer.end_transaction(commit=False)

    async def close(self) -> None:
        await self._producer.close()
        await self._client.close()


class Confluent:
    def __init__(self, bootstrap: str, transactional_id: str, timeout_ms: int) -> None:
        shared = {
            "bootstrap.servers": bootstrap,
            "socket.timeout.ms": timeout_ms,
            "reconnect.backoff.ms": 10,
            "reconnect.backoff.max.ms": 50,
            "log_level": 0,
        }
        self._shared = shared
        self._config: dict[str, Any] = shared | {
            "transactional.id": transactional_id,
            "request.timeout.ms": timeout_ms,
            "retry.backoff.ms": 10,
            "linger.ms": 0,
            "transaction.timeout.ms": 10_000,
        }
        self._producer: Any = None
        self._consumer: Any = None

    async def _run(self, call: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.to_thread(call, *args)

    async def start(self) -> None:
        self._producer = confluent_kafka.Producer(self._config)
        await self._run(self._producer.init_transactions, 30)

    async def begin(self) -> None:
        await self._run(self._producer.begin_transaction)

    async def produce(self, partition: TopicPartition, value: str, proof: str = "") -> None:
        self._producer.produce(partition.topic, value, partition=partition.partition, headers=[*headers_of(proof)])
        left = await self._run(self._producer.flush, 10)
        if left:
            raise TimeoutError("not delivered")

    async def send_offsets(self, partition: TopicPartition, offset: int, group: str) -> None:
        if self._consumer is None:
            self._consumer = confluent_kafka.Consumer(self._shared | {"group.id": group})
        metadata = self._consumer.consumer_group_metadata()
        offsets = [confluent_kafka.TopicPartition(*partition, offset)]
        await self._run(self._producer.send_offsets_to_transaction, offsets, metadata, 10)

    async def commit(self) -> None:
        await self._run(self._producer.commit_transaction, 10)

    async def abort(self) -> None:
        await self._run(self._producer.abort_transaction, 10)

    async def close(self) -> None:
        if self._consumer is not None:
            await self._run(self._consumer.close)
        if self._producer is not None:
            self._producer.purge()
            await self._run(self._producer.flush, 2)


class Aiokafka:
    def __init__(self, bootstrap: str, transactional_id: str, timeout_ms: int) -> None:
        self._producer = aiokafka.AIOKafkaProducer(
            bootstrap_servers=bootstrap,
            transactional_id=transactional_id,
            transaction_timeout_ms=10_000,
            request_timeout_ms=timeout_ms,
            retry_backoff_ms=10,
        )

    async def start(self) -> None:
        await self._producer.start()

    async def begin(self) -> None:
        await self._producer.begin_transaction()

    async def produce(self, partition: TopicPartition, value: str, proof: str = "") -> None:
        headers = [*headers_of(proof)]
        await self._producer.send_and_wait(
            partition.topic, value.encode(), partition=partition.partition, headers=headers
        )

    async def send_offsets(self, partition: TopicPartition, offset: int, group: str) -> None:
        where = aiokafka.structs.TopicPartition(*partition)
        await self._producer.send_offsets_to_transaction({where: offset}, group)

    async def commit(self) -> None:
        await self._producer.commit_transaction()

    async def abort(self) -> None:
        await self._producer.abort_transaction()

    async def close(self) -> None:
        await self._producer.stop()


CLIENTS: dict[str, Callable[[str, str, int], PeerClient]] = {
    "semel": Semel,
    "confluent-kafka": Confluent,
    "aiokafka": Aiokafka,
}

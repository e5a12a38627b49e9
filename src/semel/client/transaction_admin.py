"""What an operator asks about transactions and does to them: the logs' view, and ends from outside (KIP-664).

None of this is for the owner of a transaction, who has a `TransactionalProducer`.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable
from enum import StrEnum
from typing import Any, NamedTuple

from semel.client.admin import Admin
from semel.client.cluster import TRANSACTION, KafkaClient
from semel.client.two_phase import PreparedState
from semel.errors import ConfigurationError, ErrorCode, OutcomeUnknown, Retriable, kafka_error
from semel.types import TopicPartition

__all__ = ["OpenInLog", "SavedEnd", "TransactionAdmin"]

INIT_PRODUCER_ID, END_TXN, WRITE_TXN_MARKERS, DESCRIBE_PRODUCERS = 22, 26, 27, 61
_FENCING_VERSION = 5
"""The newest InitProducerId that every Kafka with transactions V2 has; Java's Admin sends it, too."""
SAVED_END_VERSION = 5
"""EndTxn of transactions V2: an epoch belongs to one transaction, so that a saved name cannot end another one."""


class OpenInLog(NamedTuple):
    """A producer's last transaction in one partition, as DescribeProducers tells it."""

    partition: TopicPartition
    producer_id: int
    producer_epoch: int
    start_offset: int
    """Of its first record there, where readers of committed records stop; -1 when it has ended."""
    last_timestamp_ms: int
    coordinator_epoch: int

    @property
    def name(self) -> PreparedState:
        """As a database would remember it."""
        return PreparedState(self.producer_id, self.producer_epoch)


class SavedEnd(StrEnum):
    """What came of an EndTxn under a saved name."""

    ENDED = "ended as asked"
    """Now or earlier: the answer is the same."""
    OTHERWISE = "ended otherwise"
    """The transaction was decided the other way, by its time-out or somebody else; or nothing was written to it."""
    MOVED_ON = "moved on"
    """The transactional id has a later identity: this answer does not say how the transaction ended."""
    UNKNOWN_ID = "unknown id"
    """The coordinator knows no such id, or it belongs to another producer: it expired, or this is another cluster."""


_SAVED_ENDS = {
    ErrorCode.NONE: SavedEnd.ENDED,
    ErrorCode.INVALID_TXN_STATE: SavedEnd.OTHERWISE,
    ErrorCode.PRODUCER_FENCED: SavedEnd.MOVED_ON,
    ErrorCode.INVALID_PRODUCER_EPOCH: SavedEnd.MOVED_ON,
    ErrorCode.INVALID_PRODUCER_ID_MAPPING: SavedEnd.UNKNOWN_ID,
}


class TransactionAdmin:
    """Calls about transactions over one client; each is repeated until it is answered or the time is over."""

    def __init__(self, client: KafkaClient) -> None:
        self._client = client

    def __repr__(self) -> str:
        return f"<TransactionAdmin {self._client!r}>"

    # --- The logs' view ---

    async def open_in_logs(self, partitions: Iterable[TopicPartition]) -> list[OpenInLog]:
        """Every transaction that is open in these partitions, whether or not a coordinator knows of it."""
        return [item for item in await self._producers(partitions) if item.start_offset >= 0]

    async def written_by(self, name: PreparedState) -> list[TopicPartition]:
        """The partitions in which this transaction, open or ended, was the last of its producer.

        Leaders forget a producer a day after its last record (producer.id.expiration.ms).
        """
        topics = await Admin(self._client).list_topics()
        places = [TopicPartition(item.name, number) for item in topics.values() for number in range(item.partitions)]
        epochs = (name.epoch, name.epoch + 1)  # The marker that ends it carries the next epoch.
        return [
            item.partition
            for item in await self._producers(places)
            if item.producer_id == name.producer_id and item.producer_epoch in epochs
        ]

    async def _producers(self, partitions: Iterable[TopicPartition]) -> list[OpenInLog]:
        wanted = list(dict.fromkeys(partitions))

        async def once() -> list[OpenInLog]:
            by_leader: dict[int, list[TopicPartition]] = defaultdict(list)
            for partition in wanted:
                by_leader[await self._client.leader(*partition)].append(partition)
            answers = await asyncio.gather(*(self._open_at(*item) for item in by_leader.items()))
            return sorted(item for answer in answers for item in answer)

        if not wanted:
            return []
        return await self._client.retry(once, f"asking for the producers of {len(wanted)} partitions")

    async def _open_at(self, node_id: int, partitions: list[TopicPartition]) -> list[OpenInLog]:
        topics: dict[str, list[int]] = defaultdict(list)
        for partition in partitions:
            topics[partition.topic].append(partition.partition)
        try:
            answer = await self._client.call(
                DESCRIBE_PRODUCERS,
                node_id,
                topics=[{"name": name, "partition_indexes": numbers} for name, numbers in topics.items()],
            )
        except (Retriable, OutcomeUnknown):
            self._forget(topics)
            raise
        found = []
        for topic in answer.topics:
            for item in topic.partitions:
                at = TopicPartition(topic.name, item.partition_index)
                if item.error_code != ErrorCode.NONE:
                    self._forget([topic.name])
                    raise kafka_error(item.error_code, f"the producers of {at}", item.error_message or "")
                found += [_open(at, producer) for producer in item.active_producers]
        return found

    def _forget(self, topics: Iterable[str]) -> None:
        for name in topics:
            self._client.invalidate(topic=name)

    # --- Ends from outside ---

    async def end_hanging(self, item: OpenInLog, *, commit: bool) -> None:
        """Write the marker that no coordinator will ever write (WriteTxnMarkers); done already is fine.

        Only for a transaction that no coordinator has open: Apache Kafka does not check that, and would end the records
        of one partition of a transaction that then ends otherwise in the others. Raises `Fatal` where it is refused.
        """
        kind = "a commit" if commit else "an abort"

        async def once() -> None:
            node_id = await self._client.leader(*item.partition)
            connection = await self._client.connection(node_id)
            # v2 asks for an epoch above the transaction's, as a coordinator gives it; v1 ends what is open.
            version = min(connection.version_of(WRITE_TXN_MARKERS), 1)
            topic = {"name": item.partition.topic, "partition_indexes": (item.partition.partition,)}
            marker = {
                "producer_id": item.producer_id,
                "producer_epoch": item.producer_epoch,
                "transaction_result": commit,
                "topics": (topic,),
                "coordinator_epoch": max(item.coordinator_epoch, 0),
            }
            answer: Any = await connection.send(WRITE_TXN_MARKERS, version, markers=(marker,))
            code = answer.markers[0].topics[0].partitions[0].error_code
            if code != ErrorCode.NONE:
                self._forget([item.partition.topic])
                raise kafka_error(code, f"{kind} marker for producer {item.name} in {item.partition}")

        await self._client.retry(once, f"writing {kind} marker for producer {item.name} into {item.partition}")

    async def fence(self, transactional_id: str, *, timeout_ms: int = 10_000) -> PreparedState:
        """Abort what is open under the id and fence its producer; the identity that fences it.

        What Java's Admin calls fenceProducers and forceTerminateTransaction: an InitProducerId that nobody works under.
        """

        async def once(node_id: int) -> PreparedState:
            connection = await self._client.connection(node_id)
            answer = await connection.send(
                INIT_PRODUCER_ID,
                min(connection.version_of(INIT_PRODUCER_ID), _FENCING_VERSION),
                transactional_id=transactional_id,
                transaction_timeout=timeout_ms,
                producer_id=-1,
                producer_epoch=-1,
            )
            if answer.error_code != ErrorCode.NONE:
                raise kafka_error(answer.error_code, f"fencing transactional id {transactional_id!r}")
            return PreparedState(answer.producer_id, answer.producer_epoch)

        what = f"fencing transactional id {transactional_id!r}"
        return await self._client.on_coordinator(transactional_id, TRANSACTION, once, what)

    async def end_saved(self, transactional_id: str, name: PreparedState, *, commit: bool) -> SavedEnd:
        """End a transaction under the name that its producer saved; nobody is fenced, nothing else is touched.

        Transactions V2 only (EndTxn v5), where the name stands for one transaction; asking again is safe. Raises
        `ConfigurationError` on V1, where it would end whatever the id has open now.
        """
        await self._client.refresh_metadata()
        if self._client.transaction_version < 2:
            raise ConfigurationError(
                f"transaction {name} of {transactional_id!r} cannot be ended by its name: the cluster has "
                "transaction.version below 2, where one name stands for many transactions. Nothing was done."
            )

        async def once(node_id: int) -> SavedEnd:
            answer = await self._client.call(
                END_TXN,
                node_id,
                SAVED_END_VERSION,
                transactional_id=transactional_id,
                producer_id=name.producer_id,
                producer_epoch=name.epoch,
                committed=commit,
            )
            found = _SAVED_ENDS.get(answer.error_code)
            if found is None:
                raise kafka_error(answer.error_code, f"the end of transaction {name} of {transactional_id!r}")
            return found

        what = f"ending transaction {name} of {transactional_id!r}"
        return await self._client.on_coordinator(transactional_id, TRANSACTION, once, what)


def _open(at: TopicPartition, producer: Any) -> OpenInLog:
    return OpenInLog(
        at,
        producer.producer_id,
        producer.producer_epoch,
        producer.current_txn_start_offset,
        producer.last_timestamp,
        producer.coordinator_epoch,
    )

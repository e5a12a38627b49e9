"""One transactional producer under two transactional ids, which take turns.

Apache Kafka answers EndTxn when the decision is durable and writes the markers after that. Until they are written, the
next transaction of the same id is held up: 20 ms at a time, inside of the broker. A transaction of another id is not.

At most one transaction is open at a time: the next one begins under the other id only after the end of this one was
answered. Everything that goes wrong is put right under the id that it went wrong under. Why this is safe:
docs/decisions/0012-two-ids-in-turn.md.
"""

from __future__ import annotations

from collections.abc import Mapping

from semel.client.batches import Payload
from semel.client.cluster import KafkaClient
from semel.client.producer import TransactionalProducer
from semel.client.transaction_state import State
from semel.types import GroupMetadata, TopicPartition

__all__ = ["ProducersInTurn"]


class ProducersInTurn:
    """Writes transactions under `transactional_id` and `{transactional_id}.b`; one task at a time may use it.

    The first id is the whole name, so that a predecessor which has only that one is fenced as well. Errors are
    those of `TransactionalProducer`.
    """

    def __init__(self, client: KafkaClient, transactional_id: str, *, transaction_timeout_ms: int = 10_000) -> None:
        first, second = (
            TransactionalProducer(client, name, transaction_timeout_ms=transaction_timeout_ms)
            for name in (transactional_id, f"{transactional_id}.b")
        )
        self._current, self._next = second, first

    def __repr__(self) -> str:
        return f"<ProducersInTurn {self._current!r}, next {self._next!r}>"

    @property
    def written(self) -> Mapping[TopicPartition, int]:
        """Where the records of the last transaction end, as far as the broker said."""
        return self._current.written

    async def init_transactions(self) -> None:
        """Take both ids over: a predecessor may have a transaction open under either."""
        for producer in sorted((self._current, self._next), key=lambda item: item.transactional_id):
            await producer.init_transactions()

    async def check_owner(self) -> None:
        """Raise `Fenced` when somebody else owns one of the ids now."""
        for producer in (self._current, self._next):
            await producer.check_owner()

    def begin(self) -> None:
        """Open a transaction under the other id, if the last one's end was answered; else its producer objects."""
        if self._current.state is State.Ready:
            self._current, self._next = self._next, self._current
        self._current.begin()

    async def produce(self, topic: str, partition: int, batches: Payload) -> None:
        """As `TransactionalProducer.produce`."""
        await self._current.produce(topic, partition, batches)

    async def send_offsets(self, offsets: Mapping[TopicPartition, int], group: GroupMetadata) -> None:
        """As `TransactionalProducer.send_offsets`."""
        await self._current.send_offsets(offsets, group)

    async def end_transaction(self, commit: bool) -> None:
        """As `TransactionalProducer.end_transaction`."""
        await self._current.end_transaction(commit)

    async def abort(self) -> None:
        """As `TransactionalProducer.abort`; the other id has nothing to be put right."""
        await self._current.abort()

    async def close(self) -> None:
        """Abort what is open, if anybody answers, and stop."""
        await self._current.close()
        await self._next.close()

"""confluent-kafka (librdkafka): consume, process, produce in one Kafka transaction.

After the example of its repository (examples/eos-transactions.py) with what librdkafka's manual (INTRODUCTION.md,
"Transactional producer") adds to it: a consumer in a group hands its group metadata over (KIP-447), a retriable error
is retried, an abortable one aborts and goes back to the committed offsets, any other ends the process, which is then
started again with the same transactional.id. Partitions are given up only after the open transaction was aborted.
"""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Callable
from typing import Any

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Producer, TopicPartition

from semel.prove.compare.loops import work

log = logging.getLogger("loop")


class Loop:
    def __init__(self) -> None:
        self.stopping = False
        self._open = False
        self._producer = Producer(
            {
                "bootstrap.servers": work.BOOTSTRAP,
                "transactional.id": f"{work.GROUP}-{work.INSTANCE}",
                "transaction.timeout.ms": work.TRANSACTION_TIMEOUT_MS,
                "metadata.recovery.strategy": work.LIBRDKAFKA_RECOVERY,
            }
        )
        self._consumer = Consumer(
            {
                "bootstrap.servers": work.BOOTSTRAP,
                "group.id": work.GROUP,
                "auto.offset.reset": "earliest",
                "enable.auto.commit": False,
                "isolation.level": "read_committed",
                "session.timeout.ms": work.SESSION_TIMEOUT_MS,
            }
        )

    def run(self) -> None:
        self._producer.init_transactions()
        self._consumer.subscribe([work.ORDERS], on_revoke=self._give_up, on_lost=self._give_up)
        while not self.stopping:
            try:
                self._transaction()
            except work.StockUnreachableError:
                self._back()
            except KafkaException as error:
                if not (error.args[0].txn_requires_abort() or self._has_failed(error)):
                    raise
                log.warning("aborting: %s", error)
                self._back()
        self._abort()
        self._consumer.close()

    def _transaction(self) -> None:
        """What arrived within the commit interval, and its outputs, in one transaction."""
        messages = self._consumer.consume(40, timeout=work.COMMIT_SECONDS)
        if not messages:
            return
        self._producer.begin_transaction()
        self._open = True
        for message in messages:
            if message.error():
                raise KafkaException(message.error())
            for key, value in work.encoded(message.value() or b""):
                self._producer.produce(work.ITEMS, value, key)
            self._producer.poll(0)
        self._commit()

    def _has_failed(self, error: KafkaException) -> bool:
        """Whether `produce` refused a record because the transaction had failed before: it must be aborted, too."""
        return self._open and error.args[0].code() == KafkaError._STATE

    def _commit(self) -> None:
        positions = [where for where in self._consumer.position(self._consumer.assignment()) if where.offset >= 0]
        metadata = self._consumer.consumer_group_metadata()
        _retried(lambda: self._producer.send_offsets_to_transaction(positions, metadata))
        _retried(self._producer.commit_transaction)
        self._open = False

    def _abort(self) -> None:
        if self._open:
            _retried(self._producer.abort_transaction)
            self._open = False

    def _back(self) -> None:
        """Abort, and read again from where the group stands."""
        self._abort()
        for where in self._consumer.committed(self._consumer.assignment()):
            offset = where.offset if where.offset >= 0 else OFFSET_BEGINNING
            self._consumer.seek(TopicPartition(where.topic, where.partition, offset))

    def _give_up(self, _consumer: Any, _partitions: list[TopicPartition]) -> None:
        self._abort()


def _retried(call: Callable[[], object]) -> None:
    while True:
        try:
            call()
            return
        except KafkaException as error:
            if not error.args[0].retriable():
                raise


if __name__ == "__main__":
    loop = Loop()
    signal.signal(signal.SIGTERM, lambda *_: setattr(loop, "stopping", True))
    with contextlib.suppress(KeyboardInterrupt):
        loop.run()

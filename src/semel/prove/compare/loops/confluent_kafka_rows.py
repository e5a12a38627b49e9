"""confluent-kafka: consume, write to a database, commit the offsets.

As its documentation has it ("Kafka Consumer", synchronous commits): offsets are committed after the work, so that
nothing is lost. That is at-least-once, and the documentation says so.
"""

from __future__ import annotations

import signal
from types import SimpleNamespace

from confluent_kafka import Consumer, KafkaException

from semel.prove.compare.loops import rows, work


def main() -> None:
    state = SimpleNamespace(stopping=False)
    signal.signal(signal.SIGTERM, lambda *_: setattr(state, "stopping", True))
    database = rows.connect()
    consumer = Consumer(
        {
            "bootstrap.servers": work.BOOTSTRAP,
            "group.id": work.GROUP,
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "session.timeout.ms": work.SESSION_TIMEOUT_MS,
        }
    )
    consumer.subscribe([work.ORDERS])
    while not state.stopping:
        messages = consumer.consume(40, timeout=work.COMMIT_SECONDS)
        for message in messages:
            if message.error():
                raise KafkaException(message.error())
        if messages:
            rows.write(database, [message.value() for message in messages])
            consumer.commit(asynchronous=False)
    consumer.close()


if __name__ == "__main__":
    main()

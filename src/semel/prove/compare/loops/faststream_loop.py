"""faststream: a subscriber that publishes.

faststream has no Kafka transactions. This is the strongest that its documentation offers (Kafka, "Consuming
Acknowledgements"): the offset is committed after the handler, and a failed record is read again
(`AckPolicy.NACK_ON_ERROR`). That is at-least-once, and the documentation says so.
"""

from __future__ import annotations

import asyncio

from faststream import AckPolicy, FastStream
from faststream.kafka import KafkaBroker

from semel.prove.compare.loops import work

broker = KafkaBroker(work.BOOTSTRAP, acks="all", enable_idempotence=True)
app = FastStream(broker)
publisher = broker.publisher(work.ITEMS)


@broker.subscriber(
    work.ORDERS,
    group_id=work.GROUP,
    auto_offset_reset="earliest",
    isolation_level="read_committed",
    session_timeout_ms=work.SESSION_TIMEOUT_MS,
    heartbeat_interval_ms=work.SESSION_TIMEOUT_MS // 3,
    ack_policy=AckPolicy.NACK_ON_ERROR,
)
async def reserve(order: dict[str, int]) -> None:
    await asyncio.sleep(work.STEP_SECONDS)
    for key, value in work.items_of(order):
        await publisher.publish(value, key=key.encode())


if __name__ == "__main__":
    asyncio.run(app.run())

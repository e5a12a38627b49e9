"""faststream: a subscriber that writes to a database.

The offset is committed after the handler, and a failed record is read again (`AckPolicy.NACK_ON_ERROR`): at-least-once,
the strongest that its documentation offers.
"""

from __future__ import annotations

import asyncio
import json

from faststream import AckPolicy, FastStream
from faststream.kafka import KafkaBroker

from semel.prove.compare.loops import rows, work

broker = KafkaBroker(work.BOOTSTRAP)
app = FastStream(broker)
database = rows.connect()


@broker.subscriber(
    work.ORDERS,
    group_id=work.GROUP,
    auto_offset_reset="earliest",
    session_timeout_ms=work.SESSION_TIMEOUT_MS,
    heartbeat_interval_ms=work.SESSION_TIMEOUT_MS // 3,
    ack_policy=AckPolicy.NACK_ON_ERROR,
)
async def reserve(order: dict[str, int]) -> None:
    rows.write(database, [json.dumps(order).encode()])


if __name__ == "__main__":
    asyncio.run(app.run())

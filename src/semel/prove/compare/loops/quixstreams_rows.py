"""quixstreams: a batching sink, under `processing_guarantee="exactly-once"`.

A sink of its own, made as its documentation says ("Creating a Custom Sink"). Exactly-once covers Kafka alone: sinks are
written before the offsets are committed, which its documentation ("Sinks") calls at-least-once.
"""

from __future__ import annotations

import json
import tempfile
from typing import Any

from quixstreams import Application
from quixstreams.sinks.base import BatchingSink

from semel.prove.compare.loops import rows, work


class Items(BatchingSink):
    def setup(self) -> None:
        self._database = rows.connect()

    def write(self, batch: Any) -> None:
        rows.write(self._database, [json.dumps(item.value).encode() for item in batch])


def main() -> None:
    app = Application(
        broker_address=work.BOOTSTRAP,
        consumer_group=work.GROUP,
        auto_offset_reset="earliest",
        processing_guarantee="exactly-once",
        commit_interval=work.COMMIT_SECONDS,
        auto_create_topics=False,
        state_dir=tempfile.mkdtemp(prefix="quix-"),
        producer_extra_config={
            "transaction.timeout.ms": work.TRANSACTION_TIMEOUT_MS,
            "metadata.recovery.strategy": work.LIBRDKAFKA_RECOVERY,
        },
        consumer_extra_config={"session.timeout.ms": work.SESSION_TIMEOUT_MS},
    )
    app.dataframe(app.topic(work.ORDERS, value_deserializer="json")).sink(Items())
    app.run()


if __name__ == "__main__":
    main()

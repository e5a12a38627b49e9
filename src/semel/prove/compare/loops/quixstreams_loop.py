"""quixstreams: a streaming dataframe with `processing_guarantee="exactly-once"`.

As its documentation has it (configuration, "Processing Guarantees"): offsets and outputs in one Kafka transaction a
checkpoint. The library makes the transactional.id: a new random one at every start. An error in the work ends the
process, as is its default.
"""

from __future__ import annotations

import tempfile
import time

from quixstreams import Application

from semel.prove.compare.loops import work


def items(order: dict[str, int]) -> list[dict[str, int | str]]:
    time.sleep(work.STEP_SECONDS)
    return [{"sku": key, **value} for key, value in work.items_of(order)]


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
    source = app.topic(work.ORDERS, value_deserializer="json")
    target = app.topic(work.ITEMS, key_serializer="str", value_serializer="json")
    stream = app.dataframe(source).apply(items, expand=True)
    stream.to_topic(target, key=lambda item: item["sku"])
    app.run()


if __name__ == "__main__":
    main()

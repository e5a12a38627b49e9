"""quixstreams: a streaming dataframe with JSON in and out, and its own guarantee."""

from __future__ import annotations

import tempfile

import order as bench
from quixstreams import Application


def mark(value: dict) -> None:
    value["seen"] = True


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="quix-") as folder:
        app = Application(
            broker_address=bench.BOOTSTRAP,
            consumer_group=bench.GROUP,
            auto_offset_reset="earliest",
            processing_guarantee="exactly-once" if bench.EXACTLY_ONCE else "at-least-once",
            commit_interval=bench.INTERVAL_MS / 1000,
            auto_create_topics=False,
            state_dir=folder,
        )
        source = app.topic(bench.SOURCE, key_deserializer="bytes", value_deserializer="json")
        target = app.topic(bench.TARGET, key_serializer="bytes", value_serializer="json")
        app.dataframe(source).update(mark).to_topic(target)
        app.run()


if __name__ == "__main__":
    main()

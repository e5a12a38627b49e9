"""Figures of this machine, measured in one run: `make bench`, or `python bench/run.py --orders 20000 --json out.json`.

Absolute rates depend on the machine; the ratios in the last column are what to compare between machines and versions.
Everything - clients, HTTP, workers, broker, database - shares the machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.services.kafka import KafkaNode, missing_tools

from semel.broker.embedded import EmbeddedBroker
from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.client.producer import TransactionalProducer
from semel.prove.demo import Demo, DemoOptions, DemoResult
from semel.wire.records import BatchBuilder


class Quiet:
    interval = 5.0

    def line(self, text: str) -> None:
        print(f"    {text}", file=sys.stderr)

    progress = line


def chain(orders: int, *, rate: float | None = None, broker: KafkaNode | None = None) -> DemoResult:
    """The whole chain without faults; the result must be exact or the figure is worth nothing."""
    demo = Demo(DemoOptions(orders=orders, faults=False, rate=rate, seed=5), Quiet(), broker)
    try:
        result = asyncio.run(demo.run())
    finally:
        demo.close()
    if not result.exact:
        sys.exit(f"not exact: {result.verdict.findings.summary()}")
    return result


async def transactions(bootstrap: str, seconds: float) -> float:
    """One-record transactions of one producer, one after the other, per second."""
    async with KafkaClient(bootstrap) as client:
        await Admin(client).create_topics({"bench": TopicSpec(1)})
        producer = TransactionalProducer(client, f"bench-{time.time_ns()}")
        await producer.init_transactions()
        count, began = 0, time.monotonic()
        while time.monotonic() - began < seconds:
            batch = BatchBuilder()
            batch.append(b"key", b"v" * 200, time.time_ns() // 1_000_000)
            producer.begin()
            await producer.produce("bench", 0, batch)
            await producer.end_transaction(True)
            count += 1
        return count / (time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orders", type=int, default=20_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures: dict[str, object] = {}

    result = chain(options.orders)
    figures["chain_orders_per_second_embedded"] = result.as_json()["orders_per_second"]
    paced = chain(min(options.orders, 10_000), rate=500)
    figures["chain_500_per_second_p50_ms"] = paced.as_json()["p50_ms"]
    figures["chain_500_per_second_p99_ms"] = paced.as_json()["p99_ms"]
    with tempfile.TemporaryDirectory() as folder, EmbeddedBroker(Path(folder)) as embedded:
        figures["transactions_per_second_embedded"] = round(asyncio.run(transactions(embedded.address, 5)))

    if missing_tools():
        print(f"Apache Kafka is not measured: {' and '.join(missing_tools())} not found", file=sys.stderr)
    else:
        node = KafkaNode()
        try:
            node.start()
            kafka = chain(options.orders, broker=node)
            figures["chain_orders_per_second_kafka"] = kafka.as_json()["orders_per_second"]
            figures["transactions_per_second_kafka"] = round(asyncio.run(transactions(node.bootstrap, 5)))
        finally:
            node.stop()
        for name in ("chain_orders_per_second", "transactions_per_second"):
            ours, theirs = figures[f"{name}_embedded"], figures[f"{name}_kafka"]
            figures[f"{name}_ratio_embedded_to_kafka"] = round(float(str(ours)) / float(str(theirs)), 2)

    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:<{width}}  {value}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()

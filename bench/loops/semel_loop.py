"""Ours: a processor with a typed handler. `semel_loop.py prepare|SLOT PARTITIONS` makes topics, or is a worker."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.processing.running import prepare

from bench.loops import order as bench
from bench.loops.order import Order, Seen
from semel.app import App
from semel.env import Env
from semel.processing.engine import Engine
from semel.processing.metrics import Metrics
from semel.processing.worker import Worker
from semel.settings import Settings

COMPONENT = "copy"


def copying_app(name: str, source: str, target: str, partitions: int, **options: Any) -> App:
    """`options` are those of `app.processor`."""
    app = App(name)
    orders = app.topic(source, key=str, value=Order, partitions=partitions)
    seen = app.topic(target, key=str, value=Seen, partitions=partitions)

    @app.processor(orders, **options)
    def copy(record: Any) -> Any:
        order = record.value
        yield seen.record(record.key, Seen(order.id, order.amount, order.pad, True))

    return app


def main() -> None:
    what, partitions = sys.argv[1], int(sys.argv[2])
    options: dict[str, Any] = {} if bench.EXACTLY_ONCE else {"delivery": "at-least-once"}
    if os.environ.get("LATENCY"):
        options["latency"] = os.environ["LATENCY"]
    name = bench.GROUP.removesuffix(f".{COMPONENT}")
    app = copying_app(name, bench.SOURCE, bench.TARGET, partitions, **options)
    if what == "prepare":
        asyncio.run(prepare(bench.BOOTSTRAP, app))
        return
    settings = Settings(kafka=bench.BOOTSTRAP, instance="bench", commit_interval_ms=bench.INTERVAL_MS)
    metrics = Metrics()
    engine = Engine(app.components()[0], bench.BOOTSTRAP, settings, Env(), metrics, slot=int(what))
    asyncio.run(Worker({COMPONENT: engine}).run())
    commits = metrics.counter("semel_transactions_total", "", ("component", "outcome"))
    print(int(commits.value(component=COMPONENT, outcome="committed")))


if __name__ == "__main__":
    main()

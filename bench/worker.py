"""The read-process-write worker: `worker.py NAME BOOTSTRAP prepare|run`. Reads JSON, adds a field, writes it on."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.processing.running import prepare

from semel.app import App
from semel.env import Env
from semel.processing.engine import Engine
from semel.processing.metrics import Metrics
from semel.processing.worker import Worker
from semel.settings import Settings


def copying_app(name: str) -> App:
    app = App(name)
    source = app.topic(f"{name}.in", key=str, value=dict[str, Any], partitions=4)
    target = app.topic(f"{name}.out", key=str, value=dict[str, Any], partitions=4)

    @app.processor(source)
    def copy(record: Any) -> Any:
        record.value["seen"] = True
        yield target.record(record.key, record.value)

    return app


def main() -> None:
    name, bootstrap, what = sys.argv[1:]
    app = copying_app(name)
    if what == "prepare":
        asyncio.run(prepare(bootstrap, app))
    else:
        settings = Settings(kafka=bootstrap, instance="bench", commit_interval_ms=100)
        engine = Engine(app.components()[0], bootstrap, settings, Env(), Metrics())
        asyncio.run(Worker({"copy": engine}).run())


if __name__ == "__main__":
    main()

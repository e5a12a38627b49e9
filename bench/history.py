"""What a history costs: our engine and the SQLite sink without it and with it, in turn. `python bench/history.py`.

Records a second, and CPU microseconds of this process a record, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.processing.running import drained, prepare, while_running
from tests.services.broker import BrokerProcess
from tests.sinks import ledger

from bench.copying import filled
from bench.loops.semel_loop import copying_app
from bench.servers import create_topic
from semel import history
from semel.env import Env
from semel.processing.engine import Engine
from semel.processing.metrics import Metrics
from semel.settings import Settings

Measured = tuple[float, float]
"""Wall seconds and CPU seconds."""


def engine(bootstrap: str, folder: Path, records: int, is_on: bool) -> Measured:
    """Read, process and write `records`, exactly once, in units of 100 ms."""
    name = f"h{uuid4().hex[:8]}"
    source = filled(bootstrap, 200, records)
    app = copying_app(name, source.topic, create_topic(bootstrap, f"{name}.out"), source.partitions)
    asyncio.run(prepare(bootstrap, app))
    history.start(folder if is_on else "", "worker", 0)
    settings = Settings(kafka=bootstrap, instance="bench")
    running = Engine(app.components()[0], bootstrap, settings, Env(), Metrics())
    began = time.monotonic(), time.process_time()
    asyncio.run(while_running([running], lambda: drained(bootstrap, f"{name}.copy", source.topic, timeout=600)))
    took = time.monotonic() - began[0], time.process_time() - began[1]
    history.stop()
    return took


def sink(folder: Path, records: int, is_on: bool, batch: int = 500) -> Measured:
    """Apply `records` to SQLite in transactions of `batch`."""
    history.start(folder if is_on else "", "worker", 0)
    running = ledger.sink(f"sqlite:///{folder}/{uuid4().hex}.db")
    running.take_over([ledger.claim()])
    items = [ledger.record(offset, f"k{offset % 1000}", 1) for offset in range(records)]
    slices = [ledger.a_slice(*items[at : at + batch]) for at in range(0, records, batch)]
    began = time.monotonic(), time.process_time()
    for one in slices:
        running.apply([one])
    took = time.monotonic() - began[0], time.process_time() - began[1]
    running.close()
    history.stop()
    return took


def compare(what: str, records: int, rounds: int, measure: Callable[[bool], Measured]) -> None:
    """Off, on, on, off, ...: what slows the machine for a while strikes both."""
    found: dict[bool, list[Measured]] = {False: [], True: []}
    measure(False)  # Imports and caches.
    for number in range(rounds):
        for is_on in (False, True) if number % 2 == 0 else (True, False):
            found[is_on].append(measure(is_on))
    rate = {is_on: records / statistics.median(wall for wall, _ in all_) for is_on, all_ in found.items()}
    cpu = {is_on: statistics.median(cpu for _, cpu in all_) / records * 1e6 for is_on, all_ in found.items()}
    for is_on in (False, True):
        state = "on " if is_on else "off"
        print(f"{what:8} history {state}  {rate[is_on]:9,.0f} records/s  {cpu[is_on]:6.1f} us CPU a record")
    print(f"{what:8} on / off     {rate[True] / rate[False]:9.2f}            {cpu[True] / cpu[False]:6.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    records, rounds = options.records, options.rounds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        compare("sink", records, rounds, lambda is_on: sink(folder, records, is_on))
        broker = BrokerProcess(folder / "data")
        broker.start()
        try:
            compare("engine", records, rounds, lambda is_on: engine(broker.bootstrap, folder, records, is_on))
        finally:
            broker.stop()
        size = sum(path.stat().st_size for path in folder.glob("*.jsonl"))
        print(f"history: {size / (2 * rounds * records):.1f} bytes a record")


if __name__ == "__main__":
    main()

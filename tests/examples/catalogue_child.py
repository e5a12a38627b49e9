"""The catalogue as processes: `python -m tests.examples.catalogue_child app|sink SEED`, until SIGTERM.

Where everything is stands in SEMEL_KAFKA, SEMEL_DATABASE, SEMEL_SEARCH and SEMEL_DATA; SEMEL_FAILPOINT arms it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import sys
import threading

from semel.env import Env
from semel.errors import OutcomeUnknown, Retriable
from semel.examples.catalogue import app, change, withdraw
from semel.failpoints import arm_failpoints
from semel.processing.metrics import Metrics
from semel.processing.worker import Worker
from semel.settings import Settings
from semel.sinks.engine import SinkEngine

SKUS = 30
WRITERS = 3


def write(seed: int) -> None:
    """Changes of few products by several threads, so that rows and documents are changed often."""
    ending = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ending.set())

    def some(rng: random.Random) -> None:
        while not ending.is_set():
            sku = f"sku-{rng.randrange(SKUS)}"
            try:
                if rng.random() < 0.25:
                    withdraw(sku)
                else:
                    change(sku, f"product {rng.randrange(1_000)}", rng.randrange(100, 10_000))
            except (Retriable, OutcomeUnknown) as error:
                logging.info("tried again: %s", error)
                ending.wait(0.05)

    threads = [threading.Thread(target=some, args=(random.Random(f"{seed}/{n}"),)) for n in range(WRITERS)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        ending.wait(0.2)
    app.close()


async def follow() -> None:
    settings = Settings.from_environment(session_timeout_ms=1_500)
    app.use_databases(os.environ)
    engine = SinkEngine(app.name, app.sinks["follow"], settings.kafka, settings, Env(), Metrics())
    await Worker({"follow": engine}).run()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(name)s %(message)s")
    arm_failpoints(os.environ.get("SEMEL_FAILPOINT", ""))
    if sys.argv[1] == "app":
        write(int(sys.argv[2]))
    else:
        asyncio.run(follow())

"""A worker that runs one sink until SIGTERM: `python -m tests.sinks.engine_child BOOTSTRAP URL DATA SLOT`."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path

from semel.env import Env
from semel.failpoints import arm_failpoints
from semel.processing.metrics import Metrics
from semel.processing.worker import Worker
from semel.settings import Settings
from semel.sinks.engine import SinkEngine
from tests.sinks import ledger


async def main(bootstrap: str, url: str, data: str, slot: str) -> None:
    settings = Settings(data=Path(data), session_timeout_ms=1_500)
    engine = SinkEngine("shop", ledger.spec(url), bootstrap, settings, Env(), Metrics(), slot=int(slot))
    await Worker({"totals": engine}).run()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(name)s %(message)s")
    arm_failpoints(os.environ.get("SEMEL_FAILPOINT", ""))
    asyncio.run(main(*sys.argv[1:]))

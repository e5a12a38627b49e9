"""A relay in a process of its own: bootstrap, database, data folder, app, slot. SEMEL_FAILPOINT arms it."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path

from semel.databases.spec import DatabaseSpec
from semel.env import Env
from semel.errors import Fenced
from semel.failpoints import arm_failpoints
from semel.outbox.relay import Relay
from semel.processing import EXIT_FENCED
from semel.processing.metrics import Metrics
from semel.processing.worker import Worker
from semel.settings import Settings


def main() -> int:
    bootstrap, url, folder, app, slot = sys.argv[1:6]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(name)s %(message)s")
    settings = Settings.from_environment(data=Path(folder), session_timeout_ms=3_000)
    arm_failpoints(settings.failpoint)
    relay = Relay(app, DatabaseSpec("database", url), bootstrap, settings, Env(), Metrics(), slot=int(slot))
    try:
        asyncio.run(Worker({relay.name: relay}, drain_seconds=15).run())
    except Fenced:
        return EXIT_FENCED
    return 0


if __name__ == "__main__":
    sys.exit(main())

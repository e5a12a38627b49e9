"""The process of the embedded broker. It imports nothing of workers and HTTP, so that it serves in no time."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from pathlib import Path

from semel.broker.broker import serve
from semel.broker.config import BrokerConfig
from semel.broker.seed import SeedTopic
from semel.processing.heartbeat import Heartbeat

__all__ = ["run_broker"]


async def run_broker(data: Path, listen: str, config: BrokerConfig, seed: Sequence[SeedTopic] = ()) -> None:
    """The embedded broker, until SIGTERM or SIGINT."""
    heartbeat = Heartbeat.from_environment()
    heartbeat.start()
    serving = asyncio.create_task(serve(data, listen, config, seed=seed))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, serving.cancel)
    try:
        await serving
    except asyncio.CancelledError:
        if not serving.cancelled():
            raise

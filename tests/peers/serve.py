"""The embedded broker with any settings, as a process of its own: `python -m tests.peers.serve DATA LISTEN CONFIG`.

`CONFIG` is a pickled `BrokerConfig` in base64: the tests' own, never anybody else's.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import pickle
import signal
import sys
from pathlib import Path

from semel.broker.broker import serve
from semel.broker.config import BrokerConfig
from tests.services.broker import BrokerProcess

__all__ = ["ConfiguredBroker"]


class ConfiguredBroker(BrokerProcess):
    """`BrokerProcess`, for settings that `semel broker` has no option for."""

    def __init__(self, data: Path, config: BrokerConfig) -> None:
        super().__init__(data)
        pickled = base64.b64encode(pickle.dumps(config)).decode()
        self._argv = [sys.executable, "-m", "tests.peers.serve", str(data), self.bootstrap, pickled]


async def _main(data: str, listen: str, config: BrokerConfig) -> None:
    task = asyncio.ensure_future(serve(Path(data), listen, config, on_ready=lambda _: None))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(_main(sys.argv[1], sys.argv[2], pickle.loads(base64.b64decode(sys.argv[3]))))

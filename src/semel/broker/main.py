"""`python -m semel.broker.main --data DIR --listen HOST:PORT`: a broker in a process of its own, for tests.

Users start it with `semel broker`. Prints its address on one line when it serves; SIGTERM and Ctrl-C stop it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
from pathlib import Path

from semel.broker.broker import serve
from semel.broker.config import BrokerConfig
from semel.errors import ConfigurationError
from semel.failpoints import arm_failpoints

__all__ = ["main"]


async def _run(data: Path, listen: str, config: BrokerConfig) -> None:
    task = asyncio.ensure_future(serve(data, listen, config, on_ready=_announce))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _announce(address: str) -> None:
    sys.stdout.write(f"{address}\n")
    sys.stdout.flush()


def main() -> int:
    """Run until stopped; the exit code is 2 for a configuration that cannot work."""
    parser = argparse.ArgumentParser(prog="python -m semel.broker.main")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--listen", default="127.0.0.1:0")
    parser.add_argument("--transaction-version", type=int, choices=(1, 2), default=2)
    parser.add_argument("--two-phase-commit", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--fsync", choices=("os", "always"), default="os")
    parser.add_argument("--advertised", default="")
    parser.add_argument("--partitions", type=int, default=4)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        arm_failpoints(os.environ.get("SEMEL_FAILPOINT", ""), profile=os.environ.get("SEMEL_PROFILE", "dev"))
        config = BrokerConfig(
            transaction_version=options.transaction_version,
            two_phase_commit=options.two_phase_commit,
            fsync=options.fsync,
            advertised=options.advertised,
            num_partitions=options.partitions,
        )
        asyncio.run(_run(options.data, options.listen, config))
    except ConfigurationError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

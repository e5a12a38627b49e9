"""An app as processes of their own under a supervisor: broker, HTTP instances, workers."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from semel.errors import Retriable, SemelError
from semel.processing.supervisor import ChildSpec

__all__ = ["Progress", "before_the_supervisor", "child_specs", "until_ready"]

_START_SECONDS = 60.0
_ANSWER_SECONDS = 5.0


def child_specs(
    app: str,
    folder: Path,
    environment: Callable[[str], Mapping[str, str]],
    *,
    broker: str | None,
    http: Sequence[int],
    workers: int,
) -> list[ChildSpec]:
    """The processes of `app` (module:attribute), named `role-slot`; logs are in `folder`, the broker's data below it.

    `environment(name)` is asked at every start of a process. `broker` is where an embedded broker listens, None for
    none of ours; `http` are the ports of the HTTP instances.
    """

    def spec(name: str, *argv: str) -> ChildSpec:
        command = [sys.executable, "-m", "semel", *argv]
        # The others need the broker while they drain.
        return ChildSpec(
            name,
            command,
            environment=lambda: environment(name),
            log=folder / f"{name}.log",
            is_last=name.startswith("broker"),
        )

    specs = []
    if broker is not None:
        specs.append(spec("broker-0", "broker", "--data", str(folder / "broker"), "--listen", broker))
    for slot, port in enumerate(http):
        specs.append(spec(f"http-{slot}", "child", "http", app, "--listen", f"127.0.0.1:{port}", "--slot", str(slot)))
    return specs + [spec(f"worker-{slot}", "child", "worker", app, "--slot", str(slot)) for slot in range(workers)]


class Progress(Protocol):
    """Where a run tells people how far it is. `interval` is seconds between two progress lines."""

    interval: float

    def line(self, text: str) -> None: ...

    def progress(self, text: str) -> None: ...


async def before_the_supervisor(wanted: asyncio.Task[None], supervisor: asyncio.Task[int], folder: Path) -> None:
    """Wait for `wanted`; a supervisor that ends before it is an error that must be seen. Raises `SemelError`."""
    await asyncio.wait({wanted, supervisor}, return_when=asyncio.FIRST_COMPLETED)
    if not wanted.done():
        await supervisor
        raise SemelError(f"the supervisor ended during the run; the children's logs are in {folder}")
    await wanted


async def until_ready(ports: Sequence[int], supervisor: asyncio.Task[int], folder: Path) -> None:
    """Return when each HTTP instance says that it is ready. Raises `Retriable` when that takes a minute."""
    deadline = time.monotonic() + _START_SECONDS
    for port in ports:
        while not await _is_ready(port):
            if supervisor.done():
                await supervisor
                raise SemelError(f"the processes ended before they were ready; their logs are in {folder}")
            if time.monotonic() > deadline:
                raise Retriable(f"not ready within {_START_SECONDS:.0f} s; look at {folder}/*.log")
            await asyncio.sleep(0.05)


async def _is_ready(port: int) -> bool:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    try:
        writer.write(b"GET /readyz HTTP/1.1\r\nHost: semel\r\nConnection: close\r\n\r\n")
        async with asyncio.timeout(_ANSWER_SECONDS):
            return b" 200 " in await reader.readline()
    except (OSError, TimeoutError):
        return False
    finally:
        writer.close()

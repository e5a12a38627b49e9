"""Everything that comes from outside the program: clocks, randomness, ids, and where connections come in.

Sans-IO rooms get these as values or through `Env`, so that the same code runs in production and in a seeded
simulation. No safety decision reads a clock; time-outs and back-off do.
"""

from __future__ import annotations

import asyncio
import errno
import random
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from semel.errors import ConfigurationError

__all__ = ["Env", "boot_seconds", "clock_off_ms", "comes", "listen", "wall_ms"]


_BACKLOG = 1024


def listen(host: str, port: int) -> socket.socket:
    """A non-blocking listening socket. Raises `ConfigurationError` when the address cannot be had."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
    except OSError as error:
        raise ConfigurationError(f"Cannot listen on {host}:{port}: {error.strerror or error}.") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            hint = "Another process listens there: stop it, or choose another port (port 0 takes a free one)."
        else:
            hint = "Choose an address of this machine and a port that you may use."
        raise ConfigurationError(f"Cannot listen on {host}:{port}: {error.strerror}. {hint}") from error
    return sock


clock_off_ms: Callable[[], int] | None = None
"""By how much a campaign of faults puts the wall clock off; see `semel.faultpage`."""


def wall_ms() -> int:
    """Milliseconds since 1970 in UTC, as this process is to see them."""
    now = time.time_ns() // 1_000_000
    return now if clock_off_ms is None else now + clock_off_ms()


_BOOT_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def boot_seconds() -> float:
    """Seconds since the machine's start, sleep included: nobody can set this clock, and all processes have the same."""
    return time.clock_gettime(_BOOT_CLOCK)


async def comes(event: asyncio.Event, seconds: float | None) -> bool:
    """Wait until the event is set, for at most so many seconds (None: for ever); whether it is.

    `asyncio.wait_for` loses a cancellation that arrives together with the event until Python 3.12 (gh-86296): who then
    waits for the cancelled task waits for ever.
    """
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Env:
    """The outside world. `monotonic` is seconds, `wall_ms` milliseconds since 1970 in UTC."""

    monotonic: Callable[[], float] = time.monotonic
    wall_ms: Callable[[], int] = wall_ms
    rng: random.Random = field(default_factory=random.Random)
    new_id: Callable[[], uuid.UUID] = uuid.uuid4
    boot_seconds: Callable[[], float] = boot_seconds
    listen: Callable[[str, int], socket.socket] = listen
    """Where connections come in; connecting is the event loop's `create_connection`, files are `semel.disk`'s."""

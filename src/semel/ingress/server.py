"""uvicorn with the limits it lacks: an absolute deadline for receiving a request, and bounds on its headers.

uvicorn's keep-alive time-out starts anew with every byte, so one trickling client holds a connection for as long as it
likes. Here the headers must be complete within a fixed time of their first byte (or of the connection's opening), and
the body within another; then the connection is closed. Timers only exist for requests that are not here as a whole.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from enum import Enum, auto
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from semel.errors import ConfigurationError
from semel.ingress.asgi import Ingress
from semel.ingress.limits import Limits

__all__ = ["bind", "bounded_protocol", "serve"]

log = logging.getLogger("semel.ingress")

BACKLOG = 2048
ABORT_SECONDS = 2.0
"""A client that does not read the last answer, or goes on sending behind it, is cut off after this."""
BODY_GRACE_SECONDS = 1.0
"""The ASGI shell answers 408 when a body's time is over; the connection ends a little later."""


class _Stage(Enum):
    IDLE = auto()
    """No request has begun, or the last one was received as a whole."""
    HEADERS = auto()
    BODY = auto()


class _Corked:
    """A transport that joins what is written in one turn of the loop, and lets a client read the last answer.

    uvicorn writes head and body of an answer one after the other, and each would be a system call and a packet of its
    own: a quarter of what a small answer costs.

    `is_receiving` says whether a request is still coming. Closed then, the kernel would meet its next bytes with a
    reset, which takes the answer away before the client has read it (RFC 9112, 9.6). So only our half is closed, and
    what comes is dropped for a while.
    """

    def __init__(
        self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, is_receiving: Callable[[], bool]
    ) -> None:
        self._transport = transport
        self._loop = loop
        self._is_receiving = is_receiving
        self._is_lingering = False
        self._parts: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._parts:
            self._loop.call_soon(self.flush)
        self._parts.append(data)

    def flush(self) -> None:
        """Hand everything over now."""
        if self._parts:
            joined = b"".join(self._parts)
            self._parts.clear()
            self._transport.write(joined)

    def is_closing(self) -> bool:
        return self._is_lingering or self._transport.is_closing()

    def close(self) -> None:
        self.flush()
        if self.is_closing():
            return
        if not self._is_receiving():
            self._transport.close()
            return
        self._is_lingering = True
        self._transport.resume_reading()
        self._transport.write_eof()
        self._loop.call_later(ABORT_SECONDS, self._transport.abort)

    def get_write_buffer_size(self) -> int:
        return self._transport.get_write_buffer_size() + sum(map(len, self._parts))


class _BoundedProtocol(HttpToolsProtocol):
    """One connection. `limits` is set by `bounded_protocol`."""

    limits: Limits

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._stage = _Stage.IDLE
        self._messages = 0
        self._timed = (0, _Stage.IDLE)
        self._deadline: asyncio.TimerHandle | None = None
        self._header_count = 0
        self._header_bytes = 0
        self._unparsed_bytes = 0
        self._is_refused = False
        corked = _Corked(transport, self.loop, lambda: self._stage is not _Stage.IDLE)
        super().connection_made(cast(asyncio.Transport, corked))
        if len(self.connections) > self.limits.connections:
            transport.abort()
            return
        self._arm(self.limits.header_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused or self.transport.is_closing():
            return
        before = (self._messages, self._stage)
        super().data_received(data)
        now = (self._messages, self._stage)
        if now == before and self._stage is _Stage.HEADERS:
            # The parser keeps a line that does not end to itself, so what came since the first piece is counted here.
            self._unparsed_bytes += len(data)
            if self._unparsed_bytes > self.limits.header_bytes:
                self._refuse(431, "The request's headers are too large.")
        if now != self._timed:
            self._timed = now
            self._disarm()
            if self._stage is _Stage.HEADERS:
                self._arm(self.limits.header_seconds)
            elif self._stage is _Stage.BODY:
                self._arm(self.limits.body_seconds + BODY_GRACE_SECONDS)

    # --- What the parser reports ---

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._messages += 1
        self._stage = _Stage.HEADERS
        self._header_count = self._header_bytes = self._unparsed_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._header_bytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_count += 1
        self._header_bytes += len(name) + len(value)
        if not self._are_headers_too_large():
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._stage = _Stage.BODY
        if self._are_headers_too_large():
            self._refuse(431, "The request's headers are too large.")
        elif not self._is_refused:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._stage = _Stage.IDLE
        if not self._is_refused:
            super().on_message_complete()

    def _are_headers_too_large(self) -> bool:
        return self._header_bytes > self.limits.header_bytes or self._header_count > self.limits.header_count

    # --- Deadlines ---

    def _arm(self, seconds: float) -> None:
        self._deadline = self.loop.call_later(seconds, self._too_slow)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        if self._stage is _Stage.HEADERS:
            self._refuse(408, "The request's headers did not arrive in time.")
        else:
            self._end()

    def timeout_keep_alive_handler(self) -> None:
        """An idle connection is closed, even when its client never read the last answer."""
        self._end()

    def _refuse(self, status: int, detail: str) -> None:
        """Answer, unless another answer is on its way, and close."""
        if self._is_refused or self.transport.is_closing():
            return
        self._is_refused = True
        if self.cycle is None or self.cycle.response_complete:
            self.send_refusal(status, detail)
        self._end()

    def send_refusal(self, status: int, detail: str) -> None:
        """A short answer without the app, after which the connection ends."""
        phrase = {408: "Request Timeout", 431: "Request Header Fields Too Large"}[status]
        body = f'{{"type":"about:blank","title":"{phrase}","status":{status},"detail":"{detail}"}}'
        self.transport.write(
            f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/problem+json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n{body}".encode("ascii")
        )

    def _end(self) -> None:
        transport = self.transport
        if not transport.is_closing():
            transport.close()
        if transport.get_write_buffer_size():
            self.loop.call_later(ABORT_SECONDS, transport.abort)


def bounded_protocol(limits: Limits) -> type[asyncio.Protocol]:
    """The protocol class for `uvicorn.Config(http=...)`."""
    return type("BoundedProtocol", (_BoundedProtocol,), {"limits": limits})


def bind(host: str, port: int, *, reuse_port: bool = False) -> socket.socket:
    """A bound socket; port 0 takes a free one. Raises `ConfigurationError` when the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((host, port))
        sock.set_inheritable(True)
    except OSError as error:
        sock.close()
        why = "another process listens there" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
        raise ConfigurationError(f"cannot listen on {host}:{port}: {why}. Choose another one (--listen).") from error
    return sock


class _Server(uvicorn.Server):
    """uvicorn's server, for which a signal is an orderly end: the process may exit with 0."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        handled = (signal.SIGTERM, signal.SIGINT)
        for number in handled:
            loop.add_signal_handler(number, self.drain)
        try:
            yield
        finally:
            for number in handled:
                loop.remove_signal_handler(number)

    def drain(self) -> None:
        """Stop; asked a second time, at once."""
        self.force_exit = self.should_exit
        self.should_exit = True


async def serve(
    app: Ingress, sock: socket.socket, *, drain_seconds: float = 25.0, stop: asyncio.Event | None = None
) -> None:
    """Serve until SIGTERM, SIGINT or `stop`; then finish what is in flight and let go of the log.

    It listens from the start and answers 503 until the log is open. Raises the `SemelError` that makes it unable to
    ever take requests.
    """
    limits = app.limits
    config = uvicorn.Config(
        app,
        http=bounded_protocol(limits),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=int(limits.keep_alive_seconds),
        timeout_graceful_shutdown=int(drain_seconds) or 1,
    )
    server = _Server(config)
    starting = asyncio.create_task(app.start(), name="semel-ingress-start")
    ending = asyncio.create_task(_drain_when(server, app, stop), name="semel-ingress-stop")
    try:
        await server.serve(sockets=[sock])
    finally:
        for task in (starting, ending):
            task.cancel()
        await asyncio.gather(starting, ending, return_exceptions=True)
        await app.close()
    if app.gateway.fatal is not None:
        raise app.gateway.fatal


async def _drain_when(server: _Server, app: Ingress, stop: asyncio.Event | None) -> None:
    """Drain the server when it is asked to stop or can never work."""
    waits: list[Any] = [asyncio.create_task(app.gateway.failed.wait())]
    if stop is not None:
        waits.append(asyncio.create_task(stop.wait()))
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        server.drain()
    finally:
        for wait in waits:
            wait.cancel()

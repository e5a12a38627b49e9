"""A TCP proxy as two sockets a connection, and what can happen to a wire whatever is said over it.

`Pipe` carries one client's connection to the server behind it; what is said is its subclass's affair. `Proxy` is all
of them and the wire: silent in one direction or both, slow, reset, refused. It lives in the process that strikes.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from semel.env import comes, listen

if TYPE_CHECKING:
    from semel.prove.faults.rules import Trap

__all__ = ["Address", "Direction", "Pipe", "Proxy"]

log = logging.getLogger("semel.prove.proxy")

Direction = Literal["request", "response"]
"""From the client to the server, or back."""
Address = tuple[str, int]
BOTH: tuple[Direction, ...] = ("request", "response")
HERE = "127.0.0.1"
_BUFFER_BYTES = 1 << 20
"""What may wait to be sent on one socket before its other side is read no more."""
_MOST_PIPES = 4_096
"""Connections at once: a client that reconnects in a tight loop must not take every descriptor of a campaign."""
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER with zero seconds: closing throws away what is unsent, and tells the peer so with RST."""


class Side(asyncio.Protocol):
    """One socket of a pipe. It is read unless somebody has a reason against it; several may have one at a time."""

    def __init__(self, name: Direction, receive: Callable[[bytes], None], gone: Callable[[Exception | None], None]):
        self.name = name
        self._receive = receive
        self._gone = gone
        self._reasons: set[str] = set()
        self.transport: asyncio.Transport | None = None
        self.other: Side
        self.bytes_per_second = 0.0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.set_write_buffer_limits(high=_BUFFER_BYTES)
        if self._reasons:
            transport.pause_reading()

    def data_received(self, data: bytes) -> None:
        self._receive(data)
        if self.bytes_per_second:
            self.pause("slow")
            asyncio.get_running_loop().call_later(len(data) / self.bytes_per_second, self.resume, "slow")

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        self._gone(error)

    def pause_writing(self) -> None:
        self.other.pause("full")

    def resume_writing(self) -> None:
        self.other.resume("full")

    def pause(self, reason: str) -> None:
        """Read no more until `resume` with the same reason."""
        if not self._reasons and self.transport is not None:
            self.transport.pause_reading()
        self._reasons.add(reason)

    def resume(self, reason: str) -> None:
        """Take one reason back; with the last one, reading goes on."""
        if reason in self._reasons:
            self._reasons.discard(reason)
            if not self._reasons and self.transport is not None and not self.transport.is_closing():
                self.transport.resume_reading()

    def write(self, data: bytes | memoryview) -> None:
        """Send bytes; to a peer that is gone they go nowhere."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    def close(self, *, reset: bool = False) -> None:
        """Close when everything is sent; with `reset`, at once and with RST."""
        if self.transport is None:
            return
        if reset:
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self.transport.abort()
        else:
            self.transport.close()


class Pipe:
    """One connection from a client, and ours to the server behind. Subclasses say what becomes of the bytes."""

    def __init__(self, proxy: Proxy, upstream: Address) -> None:
        self._proxy = proxy
        self._upstream = upstream
        self.client = Side("request", self.from_client, self._client_gone)
        self.server = Side("response", self.from_server, self._server_gone)
        self.client.other, self.server.other = self.server, self.client
        self.client.pause("connecting")
        self._connecting: asyncio.Task[None] | None = None
        self.waiting: set[asyncio.Task[None]] = set()
        """What is held until its trap is released."""

    def from_client(self, data: bytes) -> None:
        """Bytes on their way to the server."""
        self.server.write(data)

    def from_server(self, data: bytes) -> None:
        """Bytes on their way to the client."""
        self.client.write(data)

    def client_gone(self) -> None:
        """The client closed. What it sent still arrives, unless this is overridden."""
        self.server.close()

    def server_gone(self) -> None:
        """The server closed. What it sent still arrives; what is held for it never does."""
        self._drop_what_waits()
        self.client.close()

    def done_waiting(self) -> None:
        """Something that was held has gone its way."""

    def close(self, *, reset: bool = False) -> None:
        """End both connections."""
        if self._connecting is not None:
            self._connecting.cancel()
        self._drop_what_waits()
        self.client.close(reset=reset)
        self.server.close(reset=reset)

    def when_let_go(self, trap: Trap, seconds: float | None, action: Callable[[], None]) -> None:
        """Do it after so many seconds, or when the trap is released; never, when the server is gone before."""

        async def wait() -> None:
            await comes(trap.released, seconds)
            action()

        def done(task: asyncio.Task[None]) -> None:
            self.waiting.discard(task)
            if task.cancelled():
                trap.settle(None)
            self.done_waiting()

        task = asyncio.get_running_loop().create_task(wait())
        self.waiting.add(task)
        task.add_done_callback(done)

    def _drop_what_waits(self) -> None:
        for task in list(self.waiting):
            task.cancel()

    def connect(self) -> asyncio.Protocol:
        """Begin to reach the server; returns the protocol of the client's socket, which is not read until then."""
        self._connecting = asyncio.get_running_loop().create_task(self._connect())
        return self.client

    async def _connect(self) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: self.server, *self._upstream)
        except OSError:
            self.client.close(reset=True)
            return
        if self.client.transport is None:
            self.server.close()
        self.client.resume("connecting")

    def _client_gone(self, _error: Exception | None) -> None:
        if self.server.transport is None:
            self._proxy.forget(self)
        else:
            self.client_gone()

    def _server_gone(self, _error: Exception | None) -> None:
        if self.client.transport is None:
            self._proxy.forget(self)
        self.server_gone()


class Proxy:
    """Listens on ports of 127.0.0.1, one for each server behind it."""

    def __init__(self) -> None:
        self._servers: dict[Address, tuple[int, asyncio.Task[asyncio.Server]]] = {}
        self._pipes: set[Pipe] = set()
        self._silent: set[Direction] = set()
        self._bytes_per_second = 0.0
        self._refusing = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {len(self._pipes)} connections to {len(self._servers)} servers>"

    def make_pipe(self, upstream: Address) -> Pipe:
        """What serves one new connection."""
        return Pipe(self, upstream)

    def port_for(self, host: str, port: int) -> int:
        """Our port before this server; it is listened on from now on. Call it in the event loop."""
        known = self._servers.get((host, port))
        if known is None:
            sock = listen(HERE, 0)
            accepting = asyncio.get_running_loop().create_server(lambda: self._accept((host, port)), sock=sock)
            known = (sock.getsockname()[1], asyncio.ensure_future(accepting))
            self._servers[host, port] = known
        return known[0]

    async def close(self) -> None:
        """Stop listening, and end every connection."""
        for _, starting in self._servers.values():
            server = await starting
            server.close()
        for pipe in list(self._pipes):
            pipe.close(reset=True)
        while self._pipes:
            await asyncio.sleep(0)

    # --- The wire ---

    @property
    def connections(self) -> int:
        """How many there are now."""
        return len(self._pipes)

    @property
    def is_silent(self) -> bool:
        """Whether nothing is carried in some direction."""
        return bool(self._silent)

    def silence(self, *directions: Direction) -> None:
        """Carry nothing in these directions (default: both) until `restore`; nobody is told.

        What was sent meanwhile arrives then, as after a partition that TCP outlived.
        """
        self._silent = set(directions or BOTH)
        for pipe in self._pipes:
            self._weather(pipe)

    def throttle(self, bytes_per_second: float) -> None:
        """Carry no more than so many bytes a second on each connection and direction until `restore`."""
        self._bytes_per_second = bytes_per_second
        for pipe in self._pipes:
            self._weather(pipe)

    def refuse(self) -> None:
        """Reset every connection, and every new one too, until `restore`."""
        self._refusing = True
        self.reset()

    def reset(self) -> int:
        """End every connection with RST, on both sides; returns how many there were."""
        pipes = list(self._pipes)
        for pipe in pipes:
            pipe.close(reset=True)
        return len(pipes)

    def restore(self) -> None:
        """A good wire again."""
        self._silent, self._bytes_per_second, self._refusing = set(), 0.0, False
        for pipe in self._pipes:
            self._weather(pipe)

    def _weather(self, pipe: Pipe) -> None:
        for side in (pipe.client, pipe.server):
            side.bytes_per_second = self._bytes_per_second
            if side.name in self._silent:
                side.pause("silent")
            else:
                side.resume("silent")

    # --- Connections ---

    def _accept(self, upstream: Address) -> asyncio.Protocol:
        if self._refusing or len(self._pipes) >= _MOST_PIPES:
            return _Refused()
        pipe = self.make_pipe(upstream)
        self._pipes.add(pipe)
        self._weather(pipe)
        return pipe.connect()

    def forget(self, pipe: Pipe) -> None:
        """Both sides of this pipe are gone."""
        self._pipes.discard(pipe)


class _Refused(asyncio.Protocol):
    def connection_made(self, transport: Any) -> None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        transport.abort()

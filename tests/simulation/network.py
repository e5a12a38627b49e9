"""Connections in memory: ordered bytes with latency, cut, held back or swallowed by the schedule.

The client's end is an asyncio transport, the broker's end looks like a non-blocking socket to `semel.broker.server`.
Bytes that a side has sent are on their way whatever becomes of that side: a request arrives after its client gave up.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections import deque
from collections.abc import Callable
from typing import Any, cast

from tests.simulation.loop import PROCESS, Process, SimulatedLoop

__all__ = ["Link", "Network"]


class Pipe:
    """One direction of a connection. `deliver(data)` at the far end; None for the end of the stream."""

    def __init__(self, network: Network, deliver: Callable[[bytes | None], None]) -> None:
        self._network = network
        self._deliver = deliver
        self._arrivals: deque[bytes | None] = deque()
        self._last = 0.0
        self.in_flight = 0
        self.held_until = 0.0
        self.swallows = False
        self.ended = False
        self.receiver: Process | None = None

    def send(self, data: bytes | None) -> None:
        """Bytes, or the end, leave here and arrive after everything before them."""
        if self.ended:
            return
        if data is None:
            self.ended = True
        if self.swallows:
            return
        network = self._network
        pieces: list[bytes | None] = [data]
        if data is not None:
            self.in_flight += len(data)
            if len(data) > 1 and network.rng.random() < network.split:
                at = network.rng.randrange(1, len(data))
                pieces = [data[:at], data[at:]]
        for piece in pieces:
            self._last = max(self._last, network.loop.now + network.latency(), self.held_until)
            self._arrivals.append(piece)
            network.loop.call_at(self._last, self._arrive, context=network.context)

    def _arrive(self) -> None:
        if not self._arrivals:
            return  # The connection was cut.
        data = self._arrivals.popleft()
        if data is not None:
            self.in_flight -= len(data)
        self._deliver(data)

    def cut(self) -> None:
        """What is on its way is lost, and nothing more will come."""
        self._arrivals.clear()
        self.in_flight = 0
        self.ended = True


class Link:
    """One connection."""

    def __init__(self, network: Network, number: int, client: Process, protocol: asyncio.Protocol) -> None:
        self.number = number
        self.client = client
        self.server: Process | None = None
        self.network = network
        self.to_server = Pipe(network, self._at_server)
        self.to_client = Pipe(network, self._at_client)
        self.socket = ServerSocket(network, self)
        self.transport = ClientTransport(self, protocol)
        self.closed = False

    def __repr__(self) -> str:
        return f"link {self.number} of {self.client.name}"

    def _at_server(self, data: bytes | None) -> None:
        self.network.trace("net", self.number, "to broker", -1 if data is None else len(data))
        self.socket.arrived(data)

    def _at_client(self, data: bytes | None) -> None:
        if self.client.alive:
            self.network.trace("net", self.number, "to client", -1 if data is None else len(data))
            self.network.loop.call_soon(self.transport.arrived, data, context=self.client.context)
        self.socket.sendable()

    def cut(self, *, deliver_requests: bool, silent: bool) -> None:
        """The connection breaks. Requests on their way arrive or not; answers do not. `silent`: no side is told."""
        if not deliver_requests:
            self.to_server.cut()
        self.to_client.cut()
        self.to_client.ended = False
        if silent:
            self.to_client.swallows = self.to_server.swallows = True
            return
        self.to_client.send(None)
        self.to_client.swallows = True
        if deliver_requests:
            self.to_server.send(None)
        else:
            self.to_server.ended = False
            self.to_server.send(None)

    def forget(self) -> None:
        if not self.closed:
            self.closed = True
            self.network.links.pop(self.number, None)


class ClientTransport(asyncio.Transport):
    """What a client writes to."""

    def __init__(self, link: Link, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self._link = link
        self._protocol = protocol
        self._closing = False
        self._lost = False

    def write(self, data: Any) -> None:
        client = self._link.client
        if client.paused:  # Stopped on its way to this very write.
            client.held.append(asyncio.Handle(self.write, (bytes(data),), self._link.network.loop, client.context))
        elif not self._closing:
            network = self._link.network
            if network.late is not None and int.from_bytes(data[4:6], "big") == network.late[0]:
                self._link.to_server.held_until = network.loop.now + network.late[1]
                network.trace("fault", self._link, "is late with API", network.late[0])
                network.late = None
            self._link.to_server.send(bytes(data))

    def abort(self) -> None:
        if not self._closing:
            self._closing = True
            self._link.to_server.send(None)
            self._link.network.loop.call_soon(self._lose, None)

    close = abort

    def is_closing(self) -> bool:
        return self._closing

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def arrived(self, data: bytes | None) -> None:
        if self._closing:
            return
        if data is None:
            self._closing = True
            self._lose(ConnectionResetError("connection reset"))
        else:
            self._protocol.data_received(data)

    def _lose(self, error: Exception | None) -> None:
        if not self._lost:
            self._lost = True
            self._protocol.connection_lost(error)


class ServerSocket:
    """What the broker's connection takes for a non-blocking socket."""

    def __init__(self, network: Network, link: Link) -> None:
        self._network = network
        self._link = link
        self._fd = network.new_fd(self)
        self._inbox = bytearray()
        self._eof = False
        self._closed = False
        self._told_to_read = False

    def fileno(self) -> int:
        return self._fd

    def setblocking(self, flag: bool) -> None:
        assert not flag

    def setsockopt(self, *args: Any) -> None:
        """No option changes what is simulated."""

    def getsockname(self) -> tuple[str, int]:
        return self._network.host, self._network.port

    def recv_into(self, buffer: Any) -> int:
        count = min(len(buffer), len(self._inbox))
        if count == 0:
            if self._eof:
                return 0
            raise BlockingIOError
        buffer[:count] = self._inbox[:count]
        del self._inbox[:count]
        return count

    def send(self, data: Any, flags: int = 0) -> int:
        room = self._network.window - self._link.to_client.in_flight
        if self._link.to_client.ended:
            raise ConnectionResetError("connection reset")
        if room <= 0:
            raise BlockingIOError
        piece = bytes(data[:room])
        self._link.to_client.send(piece)
        return len(piece)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._network.sockets.pop(self._fd, None)
            self._link.to_client.send(None)
            self._link.forget()

    # --- The other side ---

    def arrived(self, data: bytes | None) -> None:
        if self._closed:
            return
        if data is None:
            self._eof = True
        else:
            self._inbox += data
        self.poll()

    def sendable(self) -> None:
        handle = self._network.loop.writers.get(self._fd)
        if handle is not None and self._link.to_client.in_flight < self._network.window:
            self._network.loop.call_soon(self._write_event, context=handle._context)

    def poll(self) -> None:
        """Tell whoever waits for bytes, again and again while there are any, as epoll does."""
        if self._told_to_read or not (self._inbox or self._eof):
            return
        handle = self._network.loop.readers.get(self._fd)
        if handle is not None:
            self._told_to_read = True
            self._network.loop.call_soon(self._read_event, context=handle._context)

    def _read_event(self) -> None:
        self._told_to_read = False
        handle = self._network.loop.readers.get(self._fd)
        if handle is not None:
            handle._callback(*handle._args)  # type: ignore[attr-defined]
            self.poll()

    def _write_event(self) -> None:
        handle = self._network.loop.writers.get(self._fd)
        if handle is not None:
            handle._callback(*handle._args)  # type: ignore[attr-defined]


class Door:
    """What the broker takes for its listening socket."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._fd = network.new_fd(self)
        self.process = PROCESS.get()
        self.waiting: deque[ServerSocket] = deque()

    def fileno(self) -> int:
        return self._fd

    def getsockname(self) -> tuple[str, int]:
        return self._network.host, self._network.port

    def accept(self) -> tuple[ServerSocket, tuple[str, int]]:
        if not self.waiting:
            raise BlockingIOError
        return self.waiting.popleft(), ("client", 1)

    def close(self) -> None:
        self._network.sockets.pop(self._fd, None)
        if self._network.door is self:
            self._network.door = None

    def poll(self) -> None:
        handle = self._network.loop.readers.get(self._fd)
        if handle is not None and self.waiting:
            self._network.loop.call_soon(handle._callback, *handle._args, context=handle._context)  # type: ignore[attr-defined]

    def sendable(self) -> None:
        """Nothing is ever sent here."""


class Network:
    """One broker's address, and every connection to it."""

    host = "broker"
    port = 9092

    def __init__(self, loop: SimulatedLoop, rng: random.Random, trace: Callable[..., None]) -> None:
        self.loop = loop
        self.rng = rng
        self.trace = trace
        self.context = Process("network").context
        self.base_latency = 0.0002
        self.jitter = 0.001
        self.split = 0.05
        """How often a write arrives in two pieces."""
        self.window = 256 * 1024
        """Bytes that the broker's socket takes before it is full."""
        self.refuses = False
        self.late: tuple[int, float] | None = None
        """(API key, seconds): the next request of this kind, and what its connection sends after it, comes so late."""
        self.links: dict[int, Link] = {}
        self.sockets: dict[int, ServerSocket | Door] = {}
        self.door: Door | None = None
        self._numbers = 0
        self._fds = 1_000_000
        loop.connect = self.connect
        loop.on_interest = self._on_interest

    def new_fd(self, owner: ServerSocket | Door) -> int:
        self._fds += 1
        self.sockets[self._fds] = owner
        return self._fds

    def latency(self) -> float:
        return self.base_latency + self.jitter * self.rng.random()

    def listen(self, host: str, port: int) -> socket.socket:
        """For `Env.listen`."""
        assert self.door is None or self.door.process is None or not self.door.process.alive, "the address is taken"
        self.door = Door(self)
        return cast(socket.socket, self.door)

    async def connect(self, factory: Callable[[], asyncio.Protocol], host: str, port: int) -> Any:
        """For `loop.create_connection`."""
        await asyncio.sleep(self.latency())
        door = self.door
        if self.refuses or door is None or door.process is None or not door.process.alive:
            raise ConnectionRefusedError(f"nobody listens on {host}:{port}")
        client = PROCESS.get()
        assert client is not None
        self._numbers += 1
        protocol = factory()
        link = Link(self, self._numbers, client, protocol)
        link.server = door.process
        self.links[link.number] = link
        self.trace("net", link.number, "opened by", client.name)
        door.waiting.append(link.socket)
        door.poll()
        protocol.connection_made(link.transport)
        return link.transport, protocol

    @property
    def has_legacies(self) -> bool:
        """Whether requests of clients that are no more are still on their way."""
        return any(link.to_server.in_flight and not link.client.alive for link in self.links.values())

    def process_ended(self, process: Process, *, abruptly: bool) -> None:
        """The kernel closes a dead process's connections; with `abruptly` the machine is gone and nothing is sent."""
        for link in list(self.links.values()):
            if link.client is process:
                link.to_server.send(None)
            elif link.server is process:
                if abruptly:
                    link.to_client.cut()
                    link.to_client.ended = False
                link.to_client.send(None)
                link.socket.close()

    def _on_interest(self, fd: int) -> None:
        found = self.sockets.get(fd)
        if found is not None:
            found.poll()
            found.sendable()

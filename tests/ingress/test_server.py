"""The HTTP server on raw sockets: trickling, oversize and ambiguous requests, and an orderly end."""

import asyncio
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from semel.errors import ConfigurationError
from semel.ingress.asgi import Ingress
from semel.ingress.limits import Limits
from semel.ingress.owner import Owner
from semel.ingress.server import bind, serve
from tests.ingress.double import Partition, ScriptedLink
from tests.ingress.test_asgi import ENDPOINTS

TIGHT = Limits(header_seconds=0.4, body_seconds=0.4, header_bytes=4096, header_count=20, body_bytes=100_000)
BODY = b'{"id":1}'


def request(key: str = "k", body: bytes = BODY, extra: bytes = b"", length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return (
        b"POST /orders HTTP/1.1\r\nHost: shop\r\nContent-Type: application/json\r\n"
        b'Idempotency-Key: "%b"\r\nContent-Length: %d\r\n%b\r\n%b' % (key.encode(), size, extra, body)
    )


class Client:
    """One connection, byte by byte if need be."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def answer(self) -> tuple[int, bytes, bytes]:
        """Status, head and body of the next answer."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = next(
            (int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")), 0
        )
        return int(head.split()[1]), head, await self.reader.readexactly(length)

    async def ask(self, data: bytes) -> int:
        self.writer.write(data)
        return (await self.answer())[0]

    async def ended(self, seconds: float = 3.0) -> bytes:
        """What still comes before the server closes the connection."""
        async with asyncio.timeout(seconds):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""


@contextlib.asynccontextmanager
async def running(limits: Limits = TIGHT) -> AsyncIterator[tuple[Callable[[], Awaitable[Client]], ScriptedLink]]:
    link = ScriptedLink(Partition(Owner("shop", ENDPOINTS)))
    ingress = Ingress("shop", ENDPOINTS, link, limits=limits, drain_seconds=1.0)
    sock = bind("127.0.0.1", 0)
    host, port = sock.getsockname()
    stop = asyncio.Event()
    server = asyncio.create_task(serve(ingress, sock, drain_seconds=1.0, stop=stop))
    clients: list[Client] = []

    async def connect() -> Client:
        client = Client(*await asyncio.open_connection(host, port))
        clients.append(client)
        return client

    try:
        async with asyncio.timeout(5):
            while not ingress.gateway.is_ready:
                await asyncio.sleep(0.01)
            while True:
                with contextlib.suppress(ConnectionError):
                    await connect()
                    break
        yield connect, link
    finally:
        for client in clients:
            client.writer.close()
        stop.set()
        await server


def run(test: Callable[[Callable[[], Awaitable[Client]], ScriptedLink], Awaitable[Any]], limits: Limits = TIGHT) -> Any:
    async def body() -> Any:
        async with running(limits) as (connect, link):
            return await test(connect, link)

    return asyncio.run(body())


def test_requests_on_one_connection() -> None:
    async def test(connect: Any, link: ScriptedLink) -> None:
        client = await connect()
        for number in range(5):
            assert await client.ask(request(f"k{number}")) == 201
        client.writer.write(request("k5") + request("k6") + request("k5"))
        assert [(await client.answer())[0] for _ in range(3)] == [201, 201, 201]
        assert len(link.partition.effects) == 7

    run(test)


def test_a_connection_that_sends_nothing_is_closed() -> None:
    async def test(connect: Any, _: ScriptedLink) -> None:
        client = await connect()
        began = time.monotonic()
        assert await client.ended() == b""
        assert time.monotonic() - began < 2

    run(test)


@pytest.mark.parametrize("first", [b"", request("before")])
def test_headers_that_trickle_are_cut_off_whatever_comes_meanwhile(first: bytes) -> None:
    async def test(connect: Any, link: ScriptedLink) -> None:
        client, other = await connect(), await connect()
        if first:
            assert await client.ask(first) == 201
        began = time.monotonic()

        async def trickle() -> None:
            with contextlib.suppress(ConnectionError):
                for byte in request("slow", extra=b"X-Slow: " + b"s" * 2000 + b"\r\n"):
                    client.writer.write(bytes([byte]))
                    await client.writer.drain()
                    await asyncio.sleep(0.02)

        trickling = asyncio.create_task(trickle())
        assert await other.ask(request("other")) == 201
        end = await client.ended()
        trickling.cancel()
        assert end.startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - began < 2
        assert len(link.appended) == 1 + bool(first)

    run(test)


def test_a_body_that_trickles_is_cut_off() -> None:
    async def test(connect: Any, link: ScriptedLink) -> None:
        client = await connect()
        began = time.monotonic()
        client.writer.write(request("slow", body=b"", length=5_000))

        async def trickle() -> None:
            with contextlib.suppress(ConnectionError):
                for _ in range(200):
                    client.writer.write(b" ")
                    await client.writer.drain()
                    await asyncio.sleep(0.02)

        trickling = asyncio.create_task(trickle())
        status, head, _ = await client.answer()
        assert (status, b"connection: close" in head) == (408, True)
        await client.ended()
        trickling.cancel()
        assert time.monotonic() - began < 3
        assert link.appended == []

    run(test)


def test_a_refused_request_that_goes_on_sending_is_cut_off() -> None:
    """The answer is there already, but its body would trickle for ever into nothing."""

    async def test(connect: Any, _: ScriptedLink) -> None:
        client = await connect()
        client.writer.write(b"POST /orders HTTP/1.1\r\nHost: s\r\nContent-Length: 90000\r\n\r\n")
        assert (await client.answer())[0] == 400
        began = time.monotonic()
        with contextlib.suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(4):
                while not client.reader.at_eof():
                    client.writer.write(b" ")
                    await client.writer.drain()
                    await asyncio.sleep(0.02)
        assert time.monotonic() - began < 3

    run(test)


@pytest.mark.parametrize(
    "extra",
    [
        b"X-Big: " + b"x" * 5_000 + b"\r\n",
        b"".join(b"X-%d: 1\r\n" % number for number in range(30)),
        b"X" * 5_000 + b": 1\r\n",
    ],
)
def test_large_headers_are_refused(extra: bytes) -> None:
    async def test(connect: Any, link: ScriptedLink) -> None:
        client = await connect()
        assert await client.ask(request(extra=extra)) == 431
        assert await client.ended() == b""
        assert link.appended == []

    run(test)


@pytest.mark.parametrize("line", [b"GET /" + b"x" * 200, b"GET / HTTP/1.1\r\nX-Endless: " + b"x" * 200])
def test_a_line_without_end_is_refused(line: bytes) -> None:
    async def test(connect: Any, _: ScriptedLink) -> None:
        client = await connect()
        for piece in (line, b"x" * 3_000, b"x" * 3_000):
            client.writer.write(piece)
            await client.writer.drain()
            await asyncio.sleep(0.1)
        assert (await client.ended()).startswith(b"HTTP/1.1 431 ")

    run(test, Limits(header_bytes=4096))


def test_oversize_bodies_are_refused_and_the_connection_ends() -> None:
    async def test(connect: Any, link: ScriptedLink) -> None:
        declared = await connect()
        assert await declared.ask(request(body=b"", length=200_000)) == 413
        await declared.ended()
        chunked = await connect()
        head = request(body=b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        with contextlib.suppress(ConnectionError):
            chunked.writer.write(head + b"10000\r\n" + b"x" * 0x10000 + b"\r\n10000\r\n" + b"x" * 0x10000 + b"\r\n")
        assert (await chunked.answer())[0] == 413
        await chunked.ended()
        assert link.appended == []

    run(test)


@pytest.mark.parametrize(
    "data",
    [
        request(extra=b"Transfer-Encoding: chunked\r\n"),
        request(extra=b"Transfer-Encoding: chunked\r\n").replace(b"Content-Length: 8", b"Content-Length: 0"),
        request(extra=b"Content-Length: 7\r\n"),
        request(body=b"").replace(b"Content-Length: 0", b"Transfer-Encoding: xchunked"),
        request(body=b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked, identity"),
        request(body=b"").replace(b"Content-Length: 0", b"Transfer-Encoding : chunked"),
        request(body=b"").replace(b"Content-Length: 0", b"Content-Length: +8"),
        request(extra=b"X-Folded: a\r\n b\r\n"),
        request(extra=b"X-Null: a\x00b\r\n"),
        request(extra=b" X-Space: a\r\n"),
        request().replace(b"\r\n", b"\n"),
        request().replace(b"HTTP/1.1", b"HTTP/9.1"),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"NONSENSE\r\n\r\n",
    ],
)
def test_ambiguous_and_broken_requests_never_reach_the_log(data: bytes) -> None:
    """Two readings of one stream are how a request is smuggled past a proxy (RFC 9112, section 11.2)."""

    async def test(connect: Any, link: ScriptedLink) -> None:
        client = await connect()
        client.writer.write(data + request("smuggled"))
        answer = await client.ended()
        assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 408 "))
        assert link.appended == []

    run(test)


@pytest.mark.parametrize("key", [b'"a\rb"', b'"a\x00"', b'"\xd0\xba"', b"x" * 3_000])
def test_strange_keys_over_the_wire(key: bytes) -> None:
    async def test(connect: Any, link: ScriptedLink) -> None:
        client = await connect()
        assert await client.ask(request().replace(b'"k"', key)) == 400
        assert link.appended == []

    run(test)


def test_a_client_that_leaves_before_its_answer_changes_nothing_for_its_retry() -> None:
    async def test(connect: Any, link: ScriptedLink) -> None:
        client = await connect()
        client.writer.write(request())
        await client.writer.drain()
        client.writer.transport.abort()
        other = await connect()
        while not link.appended:
            await asyncio.sleep(0.01)
        assert await other.ask(request()) == 201
        assert len(link.partition.effects) == 1

    run(test)


def test_more_connections_than_allowed_are_closed_at_once() -> None:
    async def test(connect: Any, _: ScriptedLink) -> None:
        clients = [await connect() for _ in range(3)]
        assert await clients[0].ask(request()) == 201
        over = await connect()
        assert await over.ended() == b""

    run(test, Limits(connections=4))


def test_a_taken_port_is_one_clear_message() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigurationError, match="another process listens there"):
            bind("127.0.0.1", taken.getsockname()[1])


PROGRAM = """
import asyncio, sys
from semel.ingress.asgi import Ingress
from semel.ingress.owner import Owner
from semel.ingress.server import bind, serve
from tests.ingress.double import Partition, ScriptedLink
from tests.ingress.test_asgi import ENDPOINTS

async def main():
    link = ScriptedLink(Partition(Owner("shop", ENDPOINTS)))
    link.behaviour = "silent"
    sock = bind("127.0.0.1", 0)
    print(sock.getsockname()[1], flush=True)
    await serve(Ingress("shop", ENDPOINTS, link), sock)

asyncio.run(main())
"""


def test_sigterm_answers_what_is_in_flight_and_exits_with_zero() -> None:
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=root, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())

            async def body() -> None:
                async with asyncio.timeout(10):
                    while True:
                        try:
                            client = Client(*await asyncio.open_connection("127.0.0.1", port))
                            break
                        except ConnectionError:
                            await asyncio.sleep(0.05)
                    client.writer.write(request())
                    await asyncio.sleep(0.1)
                    os.kill(process.pid, signal.SIGTERM)
                    status, head, _ = await client.answer()
                    assert (status, b"connection: close" in head) == (202, True)

            asyncio.run(body())
            assert process.wait(10) == 0
        finally:
            process.kill()


def test_a_client_that_goes_on_sending_what_is_refused_reads_why() -> None:
    """Most clients read when they have sent. Closed at once, the connection would be reset by what still comes."""

    def send_then_read(address: tuple[str, int]) -> bytes:
        with socket.create_connection(address, 5) as client:
            client.sendall(b"POST /orders HTTP/1.1\r\nHost: shop\r\nX-Slow: ")
            while not select.select([client], [], [], 0.01)[0]:
                client.sendall(b"s")
            for _ in range(20):  # The answer is there, and not read yet.
                client.sendall(b"s")
                time.sleep(0.005)
            return client.recv(1 << 16)

    async def test(connect: Any, _: ScriptedLink) -> None:
        address = (await connect()).writer.get_extra_info("peername")
        assert (await asyncio.to_thread(send_then_read, address)).startswith(b"HTTP/1.1 408 ")

    run(test)

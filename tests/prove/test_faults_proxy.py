"""The Kafka proxy, byte by byte: each rule does what it says to the frame it was meant for, and to no other.

The server behind it answers every request with its correlation id and what it was sent, and keeps a list of it.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

import pytest

from semel.prove.faults.frames import FrameStream, Mode
from semel.prove.faults.kafka_proxy import KafkaProxy
from semel.prove.faults.rules import Cut, Drop, Duplicate, Hold, Reorder, Rule

END_TXN, HEARTBEAT, PRODUCE = 26, 12, 0
SECONDS = 20.0


def frame(correlation_id: int, payload: bytes = b"", api_key: int = HEARTBEAT) -> bytes:
    """A request of an old version, which has no tagged fields."""
    head = api_key.to_bytes(2, "big") + b"\0\0" + correlation_id.to_bytes(4, "big") + b"\0\1c"
    return (len(head) + len(payload)).to_bytes(4, "big") + head + payload


def answer(correlation_id: int, payload: bytes = b"") -> bytes:
    return (4 + len(payload)).to_bytes(4, "big") + correlation_id.to_bytes(4, "big") + payload


class Server:
    """What it got, in order; `silent` payloads are not answered, as Produce with acks=0 is not."""

    def __init__(self) -> None:
        self.got: list[bytes] = []
        self.closed = 0
        self.changed = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                size = int.from_bytes(await reader.readexactly(4), "big")
                body = await reader.readexactly(size)
                self.got.append(body[11:])
                self.changed.set()
                if body[11:] != b"silent":
                    writer.write(answer(int.from_bytes(body[4:8], "big"), body[11:]))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            self.got += [b"torn " + error.partial] if getattr(error, "partial", b"") else []
        finally:
            self.closed += 1
            self.changed.set()
            writer.close()

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(SECONDS):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


class Client:
    """A connection of our own to the proxy."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, *frames: bytes) -> None:
        self.writer.write(b"".join(frames))

    async def read(self, size: int) -> bytes:
        async with asyncio.timeout(SECONDS):
            return await self.reader.readexactly(size)

    async def expect(self, *frames: bytes) -> None:
        wanted = b"".join(frames)
        assert await self.read(len(wanted)) == wanted

    async def is_silent(self) -> bool:
        """Nothing came for a moment. A slow machine can only make this true where it should not matter."""
        try:
            async with asyncio.timeout(0.1):
                return not await self.reader.read(1)
        except TimeoutError:
            return True

    async def rest(self) -> bytes:
        """Everything until the end of the connection."""
        async with asyncio.timeout(SECONDS):
            return await self.reader.read(-1)


Scenario = Callable[[KafkaProxy, Server, Callable[[], Awaitable[Client]]], Awaitable[None]]


def run(scenario: Scenario) -> None:
    async def whole() -> None:
        server = Server()
        listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        proxy = await KafkaProxy(f"127.0.0.1:{listening.sockets[0].getsockname()[1]}").start()
        clients: list[Client] = []

        async def connect() -> Client:
            host, _, port = proxy.bootstrap.rpartition(":")
            clients.append(Client(*await asyncio.open_connection(host, int(port))))
            return clients[-1]

        try:
            await scenario(proxy, server, connect)
        finally:
            for client in clients:
                client.writer.close()
            async with asyncio.timeout(SECONDS):
                await proxy.close()
            listening.close()
        assert proxy.connections == 0

    asyncio.run(whole())


def test_without_rules_every_byte_passes_in_order_whatever_the_pieces() -> None:
    async def scenario(proxy: KafkaProxy, server: Server, connect: Callable[[], Awaitable[Client]]) -> None:
        client, rng = await connect(), Random(1)
        payloads = [rng.randbytes(size) for size in (0, 1, 3, 70_000, 0, 2_000_000, 5)]
        stream = b"".join(frame(number, payload) for number, payload in enumerate(payloads))
        at = 0
        while at < len(stream):
            step = rng.choice([1, 2, 7, 100_000, 500_000])
            client.send(stream[at : at + step])
            await client.writer.drain()
            at += step
        await client.expect(*(answer(number, payload) for number, payload in enumerate(payloads)))
        assert server.got == payloads

    run(scenario)


def test_a_held_request_holds_what_is_behind_it_and_no_other_connection() -> None:
    async def scenario(proxy: KafkaProxy, server: Server, connect: Callable[[], Awaitable[Client]]) -> None:
        first, second = await connect(), await connect()
        rule = proxy.on("EndTxn", Hold(), nth=2)
        first.send(frame(1, b"a", END_TXN), frame(2, b"b", END_TXN), frame(3, b"c"))
        await asyncio.wait_for(rule.struck.wait(), SECONDS)
        second.send(frame(1, b"d", END_TXN))
        await second.expect(answer(1, b"d"))
        await first.expect(answer(1, b"a"))
        assert sorted(server.got) == [b"a", b"d"]
        proxy.remove(rule)
        await first.expect(answer(2, b"b"), answer(3, b"c"))
        assert server.got[2:] == [b"b", b"c"]
        await asyncio.wait_for(rule.answered.wait(), SECONDS)
        assert rule.answer == answer(2, b"b")[4:]

    run(scenario)


def test_a_held_request_arrives_although_its_client_is_gone() -> None:
    async def scenario(proxy: KafkaProxy, server: Server, connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        rule = proxy.on("EndTxn", Hold())
        client.send(frame(1, b"late", END_TXN))
        await asyncio.wait_for(rule.struck.wait(), SECONDS)
        client.writer.close()
        await client.writer.wait_closed()
        rule.release()
        await asyncio.wait_for(rule.answered.wait(), SECONDS)
        assert server.got == [b"late"]
        await server.until(lambda: server.closed)

    run(scenario)


def test_held_for_a_time_goes_by_itself_and_a_held_response_is_carried_out() -> None:
    async def scenario(proxy: KafkaProxy, server: Server, connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        proxy.on("EndTxn", Hold(seconds=0.05))
        client.send(frame(1, b"a", END_TXN))
        await client.expect(answer(1, b"a"))
        proxy.clear()
        rule = proxy.on("EndTxn", Hold("response"))
        client.send(frame(2, b"b", END_TXN), frame(3, b"c"))
        await server.until(lambda: len(server.got) == 3)
        await asyncio.wait_for(rule.answered.wait(), SECONDS)
        assert await client.is_silent()
        rule.release()
        await client.expect(answer(2, b"b"), answer(3, b"c"))

    run(scenario)


@pytest.mark.parametrize("behind", [1, 2])
def test_an_overtaken_request_is_answered_in_the_client_s_order(behind: int) -> None:
    async def scenario(proxy: KafkaProxy, server: Server, connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        proxy.on("Produce", Reorder(behind, seconds=600))
        client.send(*(frame(number, b"%d" % number, PRODUCE) for number in range(4)))
        await client.expect(*(answer(number, b"%d" % number) for number in range(4)))
        order = [b"1", b"0", b"2", b"3"] if behind == 1 else [b"1", b"2", b"0", b"3"]
        assert server.got == order

    run(scenario)


def test_what_nobody_overtakes_goes_after_a_while() -> None:
    async def scenario(proxy: KafkaProxy, server: Server, connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        proxy.on("Produce", Reorder(seconds=0.05))
        client.send(frame(1, b"a", PRODUCE))
        await client.expect(answer(1, b"a"))

    run(scenario)


def test_a_duplicate_is_delivered_twice_and_answered_once() -> None:
    async def scenario(proxy: KafkaProxy, server: Server, connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        at_once = proxy.on("EndTxn", Duplicate())
        client.send(frame(1, b"a", END_TXN))
        await client.expect(answer(1, b"a"))
        await asyncio.wait_for(at_once.answered.wait(), SECONDS)
        assert server.got == [b"a", b"a"]
        proxy.clear()
        late = proxy.on("EndTxn", Duplicate(seconds=None))
        client.send(frame(2, b"b", END_TXN), frame(3, b"c"))
        await client.expect(answer(2, b"b"), answer(3, b"c"))
        client.writer.close()
        late.release()
        await asyncio.wait_for(late.answered.wait(), SECONDS)
        assert server.got[2:] == [b"b", b"c", b"b"]
        assert late.answer == answer(2, b"b")[4:]

    run(scenario)


def test_a_dropped_request_takes_everything_behind_it_along() -> None:
    async def scenario(proxy: KafkaProxy, server: Server, connect: Callable[[], Awaitable[Client]]) -> None:
        client, other = await connect(), await connect()
        rule = proxy.on("EndTxn", Drop())
        client.send(frame(1, b"a"), frame(2, b"b", END_TXN), frame(3, b"c"))
        await client.expect(answer(1, b"a"))
        await asyncio.wait_for(rule.answered.wait(), SECONDS)
        assert rule.answer is None
        other.send(frame(1, b"d", END_TXN))
        await other.expect(answer(1, b"d"))
        assert await client.is_silent()
        assert server.got == [b"a", b"d"]

    run(scenario)


def test_a_dropped_response_was_carried_out_and_the_right_one_is_missing() -> None:
    async def scenario(proxy: KafkaProxy, server: Server, connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        rule = proxy.on("EndTxn", Drop("response"))
        # Correlation ids say which answer is whose: the second of these has none.
        client.send(frame(1, b"a"), frame(2, b"silent"), frame(3, b"c", END_TXN), frame(4, b"d"))
        await client.expect(answer(1, b"a"))
        await asyncio.wait_for(rule.answered.wait(), SECONDS)
        await server.until(lambda: len(server.got) == 4)
        assert await client.is_silent()
        assert rule.answer == answer(3, b"c")[4:]

    run(scenario)


@pytest.mark.parametrize("at", range(13))
def test_a_response_is_cut_at_every_byte(at: int) -> None:
    async def scenario(proxy: KafkaProxy, server: Server, connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        proxy.on("EndTxn", Cut("response", at))
        client.send(frame(1, b"a"), frame(2, b"bbbb", END_TXN), frame(3, b"c"))
        assert await client.rest() == answer(1, b"a") + answer(2, b"bbbb")[:at]
        assert server.got[:2] == [b"a", b"bbbb"]

    run(scenario)


@pytest.mark.parametrize("at", [0, 1, 4, 11, 15, 18])
def test_a_request_is_cut_at_a_byte(at: int) -> None:
    async def scenario(proxy: KafkaProxy, server: Server, connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        whole = frame(2, b"bbbb", END_TXN)
        proxy.on("EndTxn", Cut("request", at))
        client.send(frame(1, b"a"))
        await client.expect(answer(1, b"a"))
        client.send(whole, frame(3, b"c"))
        assert await client.rest() == b""
        await server.until(lambda: server.closed)
        assert b"".join(server.got[1:]).removeprefix(b"torn ") in (b"", whole[:at], whole[4:at])
        assert b"bbbb" not in server.got

    run(scenario)


def test_a_reset_is_seen_as_one() -> None:
    async def scenario(proxy: KafkaProxy, server: Server, connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        proxy.on("EndTxn", Cut(reset=True))
        client.send(frame(1, b"a", END_TXN))
        with pytest.raises(ConnectionResetError):
            await client.rest()
        assert server.got == []
        proxy.clear()
        client = await connect()
        client.send(frame(1, b"a"))
        await client.expect(answer(1, b"a"))
        assert proxy.reset() == 1
        with pytest.raises(ConnectionResetError):
            await client.rest()

    run(scenario)


@pytest.mark.parametrize("direction", ["request", "response"])
def test_half_open_carries_one_direction_and_nothing_is_lost(direction: Any) -> None:
    async def scenario(proxy: KafkaProxy, server: Server, connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        client.send(frame(1, b"a"))
        await client.expect(answer(1, b"a"))
        proxy.silence(direction)
        late = await connect()
        for each in (client, late):
            each.send(frame(2, b"b"))
        if direction == "response":
            await server.until(lambda: server.got == [b"a", b"b", b"b"])
        assert await client.is_silent()
        assert await late.is_silent()
        assert server.got == ([b"a"] if direction == "request" else [b"a", b"b", b"b"])
        proxy.restore()
        await client.expect(answer(2, b"b"))
        await late.expect(answer(2, b"b"))

    run(scenario)


async def ask(connect: Callable[[], Awaitable[Client]]) -> bytes:
    client = await connect()
    client.send(frame(1, b"a"))
    return await client.read(1)


def test_a_refusing_wire_resets_what_is_there_and_what_comes() -> None:
    async def scenario(proxy: KafkaProxy, server: Server, connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        client.send(frame(1, b"a"))
        await client.expect(answer(1, b"a"))
        proxy.refuse()
        with pytest.raises(ConnectionResetError):
            await client.rest()
        with pytest.raises(ConnectionError):
            await ask(connect)
        proxy.restore()
        client = await connect()
        client.send(frame(1, b"b"))
        await client.expect(answer(1, b"b"))

    run(scenario)


def test_a_throttled_wire_is_slow_and_carries_everything() -> None:
    async def scenario(proxy: KafkaProxy, server: Server, connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        payload = bytes(100_000)
        loop = asyncio.get_running_loop()
        proxy.throttle(400_000)
        began = loop.time()
        client.send(*(frame(number, payload) for number in range(4)))
        await client.expect(*(answer(number, payload) for number in range(4)))
        assert loop.time() - began > 0.3, "400 kB at 400 kB a second"

    run(scenario)


def test_a_server_that_is_not_there_resets_the_client() -> None:
    async def scenario(proxy: KafkaProxy, server: Server, connect: Callable[[], Awaitable[Client]]) -> None:
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            port = proxy.port_for("127.0.0.1", nobody.getsockname()[1])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with pytest.raises(ConnectionResetError):
                await asyncio.wait_for(reader.read(1), SECONDS)
            writer.close()

    run(scenario)


def test_what_is_no_kafka_passes_as_it_is() -> None:
    async def scenario(proxy: KafkaProxy, server: Server, connect: Callable[[], Awaitable[Client]]) -> None:
        received = asyncio.Event()

        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(await reader.readexactly(16))
            received.set()

        other = await asyncio.start_server(echo, "127.0.0.1", 0)
        proxy.on("EndTxn", Drop())
        port = proxy.port_for("127.0.0.1", other.sockets[0].getsockname()[1])
        client = Client(*await asyncio.open_connection("127.0.0.1", port))
        hello = bytes.fromhex("16030100c8010000c40303aabbccddee")  # How TLS begins: a frame of 350 MB, or none.
        client.send(hello)
        await client.expect(hello)
        client.writer.close()
        other.close()

    run(scenario)


def test_rules_choose_by_version_and_by_what_is_asked() -> None:
    rule = Rule(Drop(), api_key=END_TXN, version=0, when=lambda _header, body: body.endswith(b"b"))
    assert rule.may_take(END_TXN, 0)
    assert not rule.may_take(END_TXN, 5)
    assert not rule.may_take(PRODUCE, 0)

    async def scenario(proxy: KafkaProxy, server: Server, connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        proxy.add(rule)
        client.send(frame(1, b"a", END_TXN), frame(2, b"b", END_TXN))
        await client.expect(answer(1, b"a"))
        await asyncio.wait_for(rule.struck.wait(), SECONDS)
        assert (rule.seen, rule.hits) == (1, 1)

    run(scenario)


@pytest.mark.parametrize("seed", range(20))
def test_a_stream_is_cut_into_its_frames_whatever_the_pieces(seed: int) -> None:
    """What passes and what is taken whole come out in the order in which they came in."""
    rng = Random(seed)
    frames = [frame(number, rng.randbytes(rng.choice([0, 1, 50, 3_000]))) for number in range(30)]
    modes = [rng.choice(list(Mode)) for _ in frames]
    out: list[bytes] = []
    numbers = iter(range(len(frames)))

    def begin(data: bytes, at: int) -> Mode:
        number = next(numbers)
        assert data[at : at + 12] == frames[number][:12]
        return modes[number]

    def whole(data: bytes) -> None:
        assert data in frames
        out.append(data)
        if rng.random() < 0.3:
            stream.halt()

    stream = FrameStream(12, begin, whole, lambda data: out.append(bytes(data)))
    everything, at = b"".join(frames), 0
    while at < len(everything):
        step = rng.choice([1, 11, 13, 500, 4_000])
        stream.feed(everything[at : at + step])
        at += step
        if stream.halted and rng.random() < 0.5:
            stream.go()
    while stream.halted:
        stream.go()
    assert b"".join(out) == b"".join(each for each, mode in zip(frames, modes, strict=True) if mode is not Mode.SKIP)

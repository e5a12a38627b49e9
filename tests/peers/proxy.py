"""A frame-aware TCP proxy before one Kafka broker, which can withhold one request and deliver it much later.

Clients stay behind it: the addresses in Metadata, FindCoordinator and DescribeCluster answers are rewritten to its own.
A withheld request stalls its connection, as a full buffer or a lost segment does. When the client gives the connection
up and goes on over another one, the stalled one stays open to the broker, so that what was withheld can still arrive.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from typing import Any

from kio.serial import entity_writer

from semel.wire.messages import RequestHeader, decode_request_header, decode_response, is_flexible

FIRST = asyncio.FIRST_COMPLETED
METADATA, FIND_COORDINATOR, DESCRIBE_CLUSTER = 3, 10, 60
Matcher = Callable[[RequestHeader, bytes], bool]


class Withheld:
    """One request that is kept back until `release`."""

    def __init__(self, matches: Matcher) -> None:
        self.matches = matches
        self.caught = asyncio.Event()
        self.answered = asyncio.Event()
        self.answer: Any = None
        """The broker's answer once it came; None when the broker closed the connection instead."""
        self._released = asyncio.Event()

    def release(self) -> None:
        """Let the request go on to the broker."""
        self._released.set()

    async def wait_for_release(self) -> None:
        await self._released.wait()


class Proxy:
    """Listens on a free port of 127.0.0.1 for one broker."""

    def __init__(self, bootstrap: str) -> None:
        host, _, port = bootstrap.rpartition(":")
        self._upstream = (host, int(port))
        self._server: asyncio.Server | None = None
        self._withheld: list[Withheld] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> Proxy:
        self._server = await asyncio.start_server(self._accepted, "127.0.0.1", 0, limit=1 << 22)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        for item in self._withheld:
            item.release()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def withhold(self, matches: Matcher) -> Withheld:
        """Withhold the next request that matches, once."""
        item = Withheld(matches)
        self._withheld.append(item)
        return item

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            up_reader, up_writer = await asyncio.open_connection(*self._upstream, limit=1 << 22)
        except OSError:
            writer.close()
            return
        asked: deque[tuple[RequestHeader, Withheld | None]] = deque()
        answers = asyncio.create_task(self._answers(up_reader, writer, asked))
        try:
            await self._requests(reader, up_writer, asked)
            for item in [item for _, item in asked if item is not None]:
                await asyncio.wait((answers, asyncio.create_task(item.answered.wait())), timeout=5, return_when=FIRST)
        finally:
            answers.cancel()
            for _, item in asked:
                if item is not None:
                    item.answered.set()
            up_writer.close()
            writer.close()

    async def _requests(
        self,
        reader: asyncio.StreamReader,
        upstream: asyncio.StreamWriter,
        asked: deque[tuple[RequestHeader, Withheld | None]],
    ) -> None:
        while (frame := await _read_frame(reader)) is not None:
            header = decode_request_header(frame)
            caught = next((item for item in self._withheld if item.matches(header, frame)), None)
            if caught is not None:
                self._withheld.remove(caught)
                caught.caught.set()
                await caught.wait_for_release()
            asked.append((header, caught))
            upstream.write(len(frame).to_bytes(4, "big") + frame)

    async def _answers(
        self,
        upstream: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        asked: deque[tuple[RequestHeader, Withheld | None]],
    ) -> None:
        while (frame := await _read_frame(upstream)) is not None:
            header, caught = asked.popleft()
            if caught is not None:
                caught.answer = decode_response(header.api_key, header.api_version, frame)
                caught.answered.set()
            if header.api_key in (METADATA, FIND_COORDINATOR, DESCRIBE_CLUSTER):
                frame = self._readdressed(header, frame)
            if not writer.is_closing():
                writer.write(len(frame).to_bytes(4, "big") + frame)
        writer.close()

    def _readdressed(self, header: RequestHeader, frame: bytes) -> bytes:
        answer = decode_response(header.api_key, header.api_version, frame)
        here = {"host": "127.0.0.1", "port": self.port}
        for name in ("brokers", "coordinators"):
            if hasattr(answer, name):
                answer = replace(answer, **{name: tuple(replace(item, **here) for item in getattr(answer, name))})
        if hasattr(answer, "host"):
            answer = replace(answer, **here)
        buffer = BytesIO()
        buffer.write(frame[:4] + (b"\0" if is_flexible(header.api_key, header.api_version) else b""))
        entity_writer(type(answer))(buffer, answer)
        return buffer.getvalue()


async def _read_frame(reader: asyncio.StreamReader) -> bytes | None:
    try:
        size = int.from_bytes(await reader.readexactly(4), "big")
        return await reader.readexactly(size)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None

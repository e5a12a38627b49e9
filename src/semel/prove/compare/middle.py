"""What stands between the loops and the broker: it lets one request arrive late, or loses one answer.

A late request is no fiction: the client's connection breaks (a load balancer restarts, an address translation expires)
after the request was sent; the client repeats it over another connection, is answered and goes on; and then the first
copy arrives, out of a buffer or the queue of a busy broker. Nothing is altered and nothing is made up: every byte that
the broker gets was sent by the client.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from semel.prove.faults.readdress import names_brokers, readdressed
from semel.wire.messages import RequestHeader, decode_request, decode_request_header, decode_response

__all__ = ["Caught", "Late", "LostAnswer", "Middle"]

PRODUCE, OFFSET_COMMIT, ADD_OFFSETS_TO_TXN, END_TXN, TXN_OFFSET_COMMIT = 0, 8, 25, 26, 28
_TRANSACTIONAL = {PRODUCE, 22, 24, ADD_OFFSETS_TO_TXN, END_TXN, TXN_OFFSET_COMMIT}
_MAX_FRAME = 128 << 20
"""As large as a Kafka frame may be by default; what says more is no frame."""
_ANSWER_SECONDS = 5.0
"""How long the broker may take over a late request before its sender goes on."""


class Asked(NamedTuple):
    """A request that is under way: its transactional id, and None where it has none."""

    header: RequestHeader
    request: Any
    transactional_id: str | None


class Link:
    """One client's connection and the one to the broker that belongs to it."""

    def __init__(self, client: asyncio.StreamWriter, broker: asyncio.StreamWriter) -> None:
        self.client, self.broker = client, broker
        self.asked: deque[Asked] = deque()
        self.kept = asyncio.Event()
        """Set when nobody needs the broker's end any more; it is made unset by who keeps it for a late request."""
        self.kept.set()

    def cut(self) -> None:
        """Break the client's end, as a reset does."""
        self.client.transport.abort()

    def send(self, frame: bytes, asked: Asked) -> None:
        self.asked.append(asked)
        self.broker.write(len(frame).to_bytes(4, "big") + frame)


@dataclass(slots=True)
class Late:
    """One request that arrives late: in the middle of the next transaction of the same producer.

    `committed` narrows EndTxn to commits or aborts. The copy goes on after the next transaction's first answered batch
    (after its first answered offsets for TxnOffsetCommit), or, with `before_offsets`, when all its batches are written
    and its offsets come; always before anything else of that transaction. `done` is set when it was answered; for
    offsets when that transaction ended, and the next one waits for `drop`.
    """

    api_key: int
    committed: bool | None = None
    before_offsets: bool = False
    answer: str = ""
    """What the broker said to the late copy: an error's name, `NONE` for success."""
    done: asyncio.Event = field(default_factory=asyncio.Event)
    _held: tuple[Link, bytes, Asked] | None = None
    _repeated: bool = False
    _ended: bool = False
    _gate: asyncio.Event = field(default_factory=asyncio.Event)
    _sent: bool = False

    def __post_init__(self) -> None:
        self._gate.set()

    async def request(self, link: Link, frame: bytes, asked: Asked) -> bool:
        """Whether the request may go on now."""
        if self._held is None:
            if asked.header.api_key != self.api_key or asked.transactional_id is None:
                return True
            if self.committed is not None and asked.request.committed != self.committed:
                return True
            self._held = link, frame, asked
            link.kept.clear()
            link.cut()
            return False
        if asked.transactional_id == self._held[2].transactional_id:
            if self.before_offsets and self._ended and asked.header.api_key in (ADD_OFFSETS_TO_TXN, TXN_OFFSET_COMMIT):
                self._deliver()
            await self._gate.wait()
        return True

    def answered(self, _link: Link, asked: Asked, answer: Any) -> bool:
        """Whether the answer goes on to the client."""
        if self._held is None:
            return True
        first = self._held[2]
        if asked is first:
            self.answer = _code(answer)
            self._arrived()
        elif self._is_after_late_offsets(asked):
            self._gate.clear()  # Until `drop`: the next transaction must not repair what this one left.
            self._finish()
        elif asked.transactional_id == first.transactional_id and not self._sent and _code(answer) == "NONE":
            self._advance(asked.header.api_key)
        return True

    def _is_after_late_offsets(self, asked: Asked) -> bool:
        assert self._held is not None
        is_end = asked.header.api_key == END_TXN and asked.transactional_id == self._held[2].transactional_id
        return self._sent and is_end and self.api_key == TXN_OFFSET_COMMIT and not self.done.is_set()

    def _advance(self, api_key: int) -> None:
        """Wait for the repetition, the end of that transaction, and the first write of the next one."""
        assert self._held is not None
        if not self._repeated:
            self._repeated = api_key == self.api_key
            self._ended = self._repeated and api_key == END_TXN
        elif not self._ended:
            self._ended = api_key == END_TXN
        elif not self.before_offsets and api_key == (
            TXN_OFFSET_COMMIT if self.api_key == TXN_OFFSET_COMMIT else PRODUCE
        ):
            self._deliver()

    def _deliver(self) -> None:
        if not self._sent and self._held is not None:
            link, frame, asked = self._held
            self._sent = True
            self._gate.clear()
            link.send(frame, asked)
            asyncio.get_running_loop().call_later(_ANSWER_SECONDS, self._arrived)

    def _arrived(self) -> None:
        """The late copy was answered, or never will be. Of offsets one sees more when their transaction has ended."""
        if not self.done.is_set():
            self._gate.set()
            if self.api_key != TXN_OFFSET_COMMIT:
                self._finish()

    def _finish(self) -> None:
        self.done.set()
        if self._held is not None:
            self._held[0].kept.set()

    def drop(self) -> None:
        """Let go of everything; a copy that was not sent yet is lost."""
        self._gate.set()
        if self._held is not None:
            self._held[0].kept.set()

    def __str__(self) -> str:
        if self._held is None:
            return "no such request was sent"
        return f"the broker answered {self.answer or 'nothing'} to the late copy" if self._sent else "never delivered"


@dataclass(slots=True)
class LostAnswer:
    """The broker does what one request says, and the connection breaks before the answer."""

    api_key: int
    done: asyncio.Event = field(default_factory=asyncio.Event)
    _lost: Asked | None = None

    async def request(self, _link: Link, _frame: bytes, asked: Asked) -> bool:
        if self._lost is None and asked.header.api_key == self.api_key and asked.transactional_id is not None:
            self._lost = asked
        return True

    def answered(self, link: Link, asked: Asked, _answer: Any) -> bool:
        if asked is not self._lost:
            return True
        link.cut()
        self.done.set()
        return False

    def drop(self) -> None:
        """Nothing is held."""

    def __str__(self) -> str:
        return "the answer was lost" if self.done.is_set() else "no such request was sent"


@dataclass(slots=True)
class Caught:
    """The first request that commits anything - a transaction, or a position outside of one - never leaves here."""

    done: asyncio.Event = field(default_factory=asyncio.Event)

    async def request(self, _link: Link, _frame: bytes, asked: Asked) -> bool:
        if asked.header.api_key in (END_TXN, OFFSET_COMMIT):
            self.done.set()
        return not self.done.is_set()

    def answered(self, _link: Link, _asked: Asked, _answer: Any) -> bool:
        return True

    def drop(self) -> None:
        """Nothing is held: what was caught is lost."""


class Middle:
    """Listens on a free port of 127.0.0.1 for one broker; `strike` is what it does at present, if anything.

    Clients stay behind it: the addresses in Metadata, FindCoordinator and DescribeCluster answers become its own.
    """

    def __init__(self, bootstrap: str) -> None:
        host, _, port = bootstrap.rpartition(":")
        self._upstream = (host, int(port))
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.strike: Caught | Late | LostAnswer | None = None
        self.port = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accepted, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        if self.strike is not None:
            self.strike.drop()
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            from_broker, to_broker = await asyncio.open_connection(*self._upstream)
        except OSError:
            writer.close()
            return
        link = Link(writer, to_broker)
        answers = asyncio.create_task(self._answers(from_broker, link))
        answers.add_done_callback(lambda _task: link.cut())
        try:
            await self._requests(reader, link)
            await link.kept.wait()
        finally:
            answers.cancel()
            await asyncio.gather(answers, return_exceptions=True)
            to_broker.close()
            writer.close()

    async def _requests(self, reader: asyncio.StreamReader, link: Link) -> None:
        while (frame := await _read_frame(reader)) is not None:
            header = decode_request_header(frame)
            strike, request, name = self.strike, None, None
            if strike is not None and header.api_key in _TRANSACTIONAL:
                request = decode_request(header, frame)
                name = getattr(request, "transactional_id", None)
            asked = Asked(header, request, name)
            if strike is not None and not await strike.request(link, frame, asked):
                return  # Nothing overtakes on one connection: what comes behind is lost with it.
            link.send(frame, asked)
            with suppress(ConnectionError):
                await link.broker.drain()

    async def _answers(self, reader: asyncio.StreamReader, link: Link) -> None:
        while (frame := await _read_frame(reader)) is not None:
            asked = link.asked.popleft()
            header = asked.header
            if asked.request is not None and self.strike is not None:
                answer = decode_response(header.api_key, header.api_version, frame)
                if not self.strike.answered(link, asked, answer):
                    continue
            frame = len(frame).to_bytes(4, "big") + frame
            if names_brokers(header.api_key, header.api_version, several=False):
                frame = readdressed(header.api_key, header.api_version, frame, self._port_for)
            if not link.client.is_closing():
                link.client.write(frame)
        link.client.close()
        link.kept.set()

    def _port_for(self, _host: str, _port: int) -> int:
        return self.port


def _code(answer: Any) -> str:
    """The error in an answer to a transactional request, the first one if there are several."""
    if hasattr(answer, "error_code"):
        return answer.error_code.name.upper()  # type: ignore[no-any-return]
    topics = answer.responses if hasattr(answer, "responses") else getattr(answer, "topics", ())
    for topic in topics:
        for item in topic.partition_responses if hasattr(topic, "partition_responses") else topic.partitions:
            if item.error_code.value:
                return item.error_code.name.upper()  # type: ignore[no-any-return]
    return "NONE"


async def _read_frame(reader: asyncio.StreamReader) -> bytes | None:
    try:
        size = int.from_bytes(await reader.readexactly(4), "big")
        return await reader.readexactly(size) if size <= _MAX_FRAME else None
    except (asyncio.IncompleteReadError, ConnectionError):
        return None

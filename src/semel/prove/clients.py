"""HTTP clients that never give up: what gets no answer is sent again with the same Idempotency-Key, as any client must.

Connections are kept alive; nothing is pipelined.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

__all__ = ["Answer", "Connection", "Watch", "request_bytes", "until_answered"]

Address = tuple[str, int]

RETRY_STATUS = frozenset({202, 429, 500, 502, 503, 504})
"""Answers that say nothing final about the request."""
_ANSWER_SECONDS = 15.0
_WAIT_SECONDS = (0.02, 1.0)
_WAIT_FACTOR = 1.7


class Answer(NamedTuple):
    """What came back. `status` 0: nothing, or not a whole answer."""

    status: int
    replayed: bool = False
    body: bytes = b""
    address: Address | None = None
    """The instance that answered, or that was asked and did not."""

    @property
    def is_final(self) -> bool:
        return self.status != 0 and self.status not in RETRY_STATUS


class Watch(Protocol):
    """Is told of every attempt. `sending` gives a name to the attempt, which `answered` gets."""

    def sending(self) -> str: ...

    def answered(self, attempt: str, answer: Answer, seconds: float) -> None: ...


class Connection:
    """One keep-alive connection; opened when needed, thrown away on any trouble."""

    def __init__(self, pick: Callable[[], Address]) -> None:
        self._pick = pick
        self._address: Address | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def post(self, request: bytes) -> Answer:
        """Send one request; an answer of status 0 when there was none."""
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                return await self._post(request)
        except (OSError, EOFError, TimeoutError, ValueError, asyncio.LimitOverrunError):
            self.close()
            return Answer(0, address=self._address)

    async def _post(self, request: bytes) -> Answer:
        if self._reader is None or self._writer is None:
            self._address = self._pick()
            self._reader, self._writer = await asyncio.open_connection(*self._address)
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        lowered = head.lower()
        status = int(head[9:12])
        at = lowered.find(b"content-length:")
        size = int(lowered[at + 15 : lowered.index(b"\r\n", at)]) if at >= 0 else 0
        body = await self._reader.readexactly(size) if size else b""
        if b"connection: close" in lowered:
            self.close()
        return Answer(status, b"idempotency-replayed: true" in lowered, body, self._address)

    def close(self) -> None:
        """Let the connection go; the next request opens another."""
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None


def request_bytes(method: str, path: str, key: str, body: bytes, headers: tuple[tuple[str, str], ...] = ()) -> bytes:
    """A request as it goes over the wire. Raises `ValueError` for a line break in what would become a header."""
    content_type = () if any(name.lower() == "content-type" for name, _ in headers) else _JSON
    lines = [
        f"{method} {path} HTTP/1.1",
        "Host: semel",
        *(f"{name}: {value}" for name, value in (*content_type, *headers)),
        f'Idempotency-Key: "{key}"',
        f"Content-Length: {len(body)}",
    ]
    if any("\r" in line or "\n" in line for line in lines):
        raise ValueError(f"a request to {path!r} has a line break in its path, key or headers")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


_JSON = (("Content-Type", "application/json"),)


async def until_answered(
    connection: Connection, request: bytes, watch: Watch, may_go_on: Callable[[], bool] = lambda: True
) -> Answer:
    """Post one request until it has a final answer; back off a little longer each time.

    When `may_go_on` says no, the last answer is given back, final or not.
    """
    delay, longest = _WAIT_SECONDS
    while True:
        attempt, began = watch.sending(), time.monotonic()
        answer = await connection.post(request)
        watch.answered(attempt, answer, time.monotonic() - began)
        if answer.is_final or not may_go_on():
            return answer
        await asyncio.sleep(delay)
        delay = min(delay * _WAIT_FACTOR, longest)

"""What travels and what is kept: request records, reply records, stored responses.

All are MessagePack arrays whose first element is a number: kind and version of the format. A reader meets every format
that was ever written, and a number it does not know is an error, never a guess. Topics of an app:

- `<app>.semel.requests`: key = scope, value = `Request` or `LookUp`
- `<app>.semel.responses`: key = id of the HTTP instance, value = `Reply`
- state store `idempotency`: key = scope, value = `Stored`
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from semel.ingress.rules import Answer, KnownOutcome
from semel.processing.topics import DataError

__all__ = [
    "LookUp",
    "Reply",
    "Request",
    "Stored",
    "read_reply",
    "read_request",
    "read_stored",
    "requests_topic",
    "responses_topic",
    "write",
]

STORE = "idempotency"
"""The store of responses; its changelog is `<app>.semel.state.idempotency`."""

T = TypeVar("T")


def requests_topic(app: str) -> str:
    """The topic of requests."""
    return f"{app}.semel.requests"


def responses_topic(app: str) -> str:
    """The topic of replies."""
    return f"{app}.semel.responses"


class Request(msgspec.Struct, frozen=True, array_like=True, tag=1, gc=False):
    """A request as an HTTP instance took it. `path` and `query` hold values of the route's parameters, in order."""

    instance: bytes
    number: int
    """With `instance`, which waiting HTTP request the reply belongs to."""
    reply_partition: int
    route: str
    content_type: str
    body: bytes
    path: tuple[str, ...] = ()
    query: tuple[tuple[str, str], ...] = ()
    """The allow-listed parameters that were sent, sorted."""
    principal: str | None = None
    trace: tuple[tuple[str, str], ...] = ()
    """The headers of W3C Trace Context that came with it. Requests of before this was there have none."""


class LookUp(msgspec.Struct, frozen=True, array_like=True, tag=2, gc=False):
    """A question: what became of the request under this record's key?"""

    instance: bytes
    number: int
    reply_partition: int
    operation: str
    """The id under which it was asked for."""


class Reply(msgspec.Struct, frozen=True, array_like=True, tag=1, gc=False):
    """An answer on its way to the HTTP instance that waits for it."""

    number: int
    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes
    is_replayed: bool = False


class Stored(msgspec.Struct, frozen=True, array_like=True, tag=1, gc=False):
    """The outcome of a request, kept under its scope. `completed_ms` is in the time of appends."""

    fingerprint: bytes
    is_failed: bool
    """The handler failed, nothing was done: the same request runs again."""
    completed_ms: int
    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes

    @property
    def answer(self) -> Answer:
        return Answer(self.status, self.headers, self.body)

    def known(self, retention_ms: int) -> KnownOutcome:
        """What the decision table needs of it."""
        return KnownOutcome(self.fingerprint, self.is_failed, self.completed_ms + retention_ms)


write: Callable[[Request | LookUp | Reply | Stored], bytes] = msgspec.msgpack.Encoder().encode
"""A record's value in bytes."""


def _reader(kind: Any, what: str) -> Callable[[bytes], Any]:
    decode = msgspec.msgpack.Decoder(kind).decode

    def read(data: bytes) -> Any:
        try:
            return decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise DataError(
                f"{what} of {len(data)} bytes cannot be read: {error}. "
                "Something else, or a newer version of Semel, wrote it."
            ) from error

    return read


read_request: Callable[[bytes], Request | LookUp] = _reader(Request | LookUp, "a request record")
"""Raises `DataError`."""
read_reply: Callable[[bytes], Reply] = _reader(Reply, "a reply record")
"""Raises `DataError`."""
read_stored: Callable[[bytes], Stored] = _reader(Stored, "a stored response")
"""Raises `DataError`."""

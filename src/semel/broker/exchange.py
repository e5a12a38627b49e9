"""One request and its answer, as the shell hands them to the handlers and takes them back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from semel.log.log import Slice
from semel.wire.frames import MAX_FRAME_BYTES
from semel.wire.messages import RequestHeader, decode_request

if TYPE_CHECKING:
    from semel.broker.node import Node
    from semel.broker.security.login import Login

__all__ = ["ANONYMOUS", "Answer", "Api", "Fields", "Later", "Outbox", "Part", "Parts", "Peer", "Request"]

ANONYMOUS = "User:ANONYMOUS"
"""Whoever need not say who they are, as Kafka calls them."""
Fields = dict[str, Any]
"""A response as plain values; `semel.wire.messages` turns it into bytes."""
Part = bytes | Slice
Parts = list[Part]
"""A response as it goes to the socket, length prefix included; a `Slice` is copied from its file while sending."""
Answer = Fields | Parts | None
"""None: this request has no response (Produce with acks=0)."""


@dataclass(slots=True)
class Peer:
    """The two ends of a connection: the client's host and who it is, and the address it is told to use."""

    client_host: str
    host: str
    port: int
    max_frame_bytes: int = MAX_FRAME_BYTES
    principal: str = ANONYMOUS
    login: Login | None = None
    """Sees every frame first; None: the client may ask anything that it has the right to."""
    leaving: bool = False
    """The connection closes when what was answered is sent."""

    def logged_in(self, principal: str, max_frame_bytes: int) -> None:
        """The client proved who it is."""
        self.principal, self.max_frame_bytes = principal, max_frame_bytes


class Request:
    """One request frame. `frame` may be the receive buffer itself: valid only until the handler returns."""

    __slots__ = ("_body", "frame", "header", "now_ms", "peer", "version")

    def __init__(self, header: RequestHeader, frame: memoryview, peer: Peer, now_ms: int) -> None:
        self.header = header
        self.version = header.api_version
        self.frame = frame
        self.peer = peer
        self.now_ms = now_ms
        self._body: Any = None

    def __repr__(self) -> str:
        key, version, correlation_id, client_id, _ = self.header
        return f"<Request api {key} v{version}, correlation id {correlation_id}, client {client_id!r}>"

    @property
    def body(self) -> Any:
        """The decoded request. Raises `ProtocolError` for malformed bytes."""
        if self._body is None:
            self._body = decode_request(self.header, self.frame.toreadonly())
        return self._body

    @body.setter
    def body(self, body: Any) -> None:
        """What of the request is left for its handler."""
        self._body = body


class Outbox:
    """Answers that came after their handler had returned, in order. The shell sets `notify` and drains it."""

    def __init__(self) -> None:
        self._items: deque[tuple[Later, Answer]] = deque()
        self.notify: Callable[[], None] | None = None
        """Called when the outbox stops being empty."""

    def put(self, later: Later, answer: Answer) -> None:
        """Add an answer."""
        self._items.append((later, answer))
        if len(self._items) == 1 and self.notify is not None:
            self.notify()

    def drain(self) -> None:
        """Deliver everything, also what delivering adds; the loop here keeps that from nesting."""
        while self._items:
            later, answer = self._items[0]
            try:
                if later.deliver is not None:
                    later.deliver(answer)
            finally:
                self._items.popleft()


class Later:
    """An answer that is not there yet. The connection waits for it, so that responses keep the order of requests."""

    __slots__ = ("_outbox", "abandon", "answered", "deliver", "finish", "header")

    def __init__(self, outbox: Outbox, request: Request) -> None:
        self._outbox = outbox
        self.answered = False
        self.header = request.header
        self.deliver: Callable[[Answer], None] | None = None
        """Set by the shell: sends the answer."""
        self.abandon: Callable[[], None] | None = None
        """Set by the handler: called once when the connection closed before the answer."""
        self.finish: Callable[[Answer], Answer] | None = None
        """Set by whoever has the last word about the answer."""

    def answer(self, answer: Answer) -> None:
        """Give the answer; a second one, and one after the connection closed, is ignored."""
        if not self.answered:
            self.answered = True
            self._outbox.put(self, answer if self.finish is None else self.finish(answer))

    def close(self) -> None:
        """The connection is gone: nobody waits any more."""
        if not self.answered:
            self.answered = True
            if self.abandon is not None:
                self.abandon()


Handler = Callable[["Node", Request], Answer | Later]


class Api(NamedTuple):
    """One API: the versions it serves and its handler. `advertised_min` differs only where KAFKA-18659 wants it."""

    key: int
    min_version: int
    max_version: int
    handle: Handler
    advertised_min: int | None = None

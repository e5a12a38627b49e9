"""One connection's way in (KIP-43, KIP-152, KIP-368): what it must do before it may ask anything.

ApiVersions, SaslHandshake, then tokens: in SaslAuthenticate requests after a handshake of version 1, as bare frames
after one of version 0. Everything else closes the connection. Where logins expire, the same connection logs in again.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Final

from semel.broker.exchange import Answer, Fields, Later, Parts, Peer, Request
from semel.errors import ErrorCode, ProtocolError
from semel.wire.messages import RequestHeader, api_name, decode_request_header, encode_response
from semel.wire.scram import MECHANISMS, ScramError, ScramServer

if TYPE_CHECKING:
    from semel.broker.node import Node

__all__ = ["LOGIN_FRAME_BYTES", "LOGIN_SECONDS", "PASS", "Login"]

log = logging.getLogger("semel.broker.security")

LOGIN_FRAME_BYTES = 16 * 1024
"""Limit of a frame before the login: names, nonces and proofs are short, and strangers get little memory."""
LOGIN_SECONDS = 30.0
"""A connection that has not logged in after this long is closed."""
FAILED_LOGIN_SECONDS = 0.1
"""A wrong password is answered this much later (Kafka's connection.failed.authentication.delay.ms)."""
REQUESTS_MAX = 16
"""Requests before the login is done; a login takes four."""
_HANDSHAKE, _AUTHENTICATE, _API_VERSIONS = 17, 36, 18
_NONCE_BYTES = 18


class _Pass(Enum):
    PASS = 0


PASS: Final = _Pass.PASS
"""Not the login's business: an ordinary request of somebody who may ask."""


class _Step(Enum):
    GREETING = "nothing but ApiVersions and SaslHandshake"
    TOKENS = "the mechanism is chosen, tokens go to and fro"
    DONE = "logged in"
    FAILED = "refused"


class _Failed(ProtocolError):
    """The login is refused; the text is for the client."""


class Login:
    """The state of one connection's login; `take` sees every frame while it is the peer's."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._step = _Step.GREETING
        self._requests = 0
        self._mechanism = ""
        self._bare = False
        self._scram: ScramServer | None = None
        self._first: tuple[str, str] | None = None
        """Mechanism and principal of the first login, which later ones must repeat."""
        self._expires: float | None = None

    def __repr__(self) -> str:
        return f"<Login {self._step.name} {self._mechanism}>"

    @property
    def was_done(self) -> bool:
        """Whether the client has logged in, now or before its login expired."""
        return self._first is not None

    def take(self, node: Node, frame: memoryview) -> Parts | Later | _Pass | None:
        """Answer a frame, or let it pass. Raises `ProtocolError`: close the connection."""
        if self._step is _Step.DONE:
            return self._while_logged_in(node, frame)
        self._requests += 1
        if self._requests > REQUESTS_MAX or self._step is _Step.FAILED:
            raise ProtocolError("it did not log in")
        if self._step is _Step.TOKENS and self._bare:
            return self._take_bare(node, bytes(frame))
        return self._take_request(node, decode_request_header(frame), frame)

    def _while_logged_in(self, node: Node, frame: memoryview) -> Parts | Later | _Pass | None:
        header = decode_request_header(frame)
        if header.api_key == _HANDSHAKE:
            self._step, self._requests = _Step.GREETING, 0
            return self._take_request(node, header, frame)
        if self._expires is not None and node.env.monotonic() >= self._expires and header.api_key != _API_VERSIONS:
            raise ProtocolError(f"its login as {self._peer.principal} has expired")
        return PASS

    def _take_request(self, node: Node, header: RequestHeader, frame: memoryview) -> Parts | Later | _Pass | None:
        if header.api_key == _API_VERSIONS and self._step is _Step.GREETING and self._first is None:
            return PASS
        wanted = _HANDSHAKE if self._step is _Step.GREETING else _AUTHENTICATE
        highest = 1 if wanted == _HANDSHAKE else 2
        if header.api_key != wanted or not 0 <= header.api_version <= highest:
            raise ProtocolError(f"it sent {api_name(header.api_key)} v{header.api_version} before it logged in")
        request = Request(header, frame, self._peer, node.env.wall_ms())
        if wanted == _HANDSHAKE:
            return [_encode(header, self._shake_hands(node, request))]
        return self._answer(node, request, bytes(request.body.auth_bytes))

    def _shake_hands(self, node: Node, request: Request) -> Fields:
        enabled = node.config.security.mechanisms
        mechanism = request.body.mechanism
        answer: Fields = {"error_code": ErrorCode.NONE, "mechanisms": list(enabled)}
        if mechanism not in enabled:
            self._fail(f"the mechanism {mechanism!r} is not enabled")
            return answer | {"error_code": ErrorCode.UNSUPPORTED_SASL_MECHANISM}
        self._step, self._mechanism, self._bare = _Step.TOKENS, mechanism, request.version == 0
        self._scram = None
        if mechanism in MECHANISMS:
            nonce = secrets.token_urlsafe(_NONCE_BYTES)
            self._scram = ScramServer(mechanism, lambda user: node.users.credential(mechanism, user), nonce)
        return answer

    # --- Tokens ---

    def _take_bare(self, node: Node, token: bytes) -> Parts | Later | None:
        """Tokens without headers; a refusal is the end of the connection, for there is no room to say it."""
        header = RequestHeader(_AUTHENTICATE, -1, 0, None, 0)
        request = Request(header, memoryview(token), self._peer, node.env.wall_ms())
        return self._answer(node, request, token)

    def _answer(self, node: Node, request: Request, token: bytes) -> Parts | Later | None:
        try:
            if self._scram is not None:
                return self._take_scram(node, request, self._scram, token)
            return self._take_plain(node, request, token)
        except (ScramError, _Failed) as error:
            return self._refuse(node, request, str(error))

    def _take_scram(self, node: Node, request: Request, scram: ScramServer, token: bytes) -> Parts:
        answer = scram.respond(token)
        if scram.user is None:
            return [_token(request.header, answer, 0)]
        return [_token(request.header, answer, self._accept(node, scram.user))]

    def _take_plain(self, node: Node, request: Request, token: bytes) -> Parts | Later:
        """RFC 4616: `[authorization id] NUL user NUL password`."""
        try:
            authorization, user, password = token.decode().split("\0")
        except ValueError:
            raise _Failed("the PLAIN message is malformed") from None
        if not user or not password or authorization not in ("", user):
            raise _Failed("the PLAIN message lacks a name or a password, or asks for another identity")
        if node.users.remembers(user, password):
            return [_token(request.header, b"", self._accept(node, user))]
        later = Later(node.outbox, request)

        def checked(right: bool) -> None:
            try:
                if not right:
                    raise _Failed("invalid credentials")
                node.users.remember(user, password)
                later.answer([_token(request.header, b"", self._accept(node, user))])
            except _Failed as error:
                self._refuse(node, request, str(error), later)

        node.aside(lambda: node.users.check(user, password), checked)
        return later

    # --- Ends ---

    def _accept(self, node: Node, user: str) -> int:
        """The client is who it says; returns for how many milliseconds, 0 for as long as the connection."""
        principal = f"User:{user}"
        if self._first not in (None, (self._mechanism, principal)):
            raise _Failed("a connection cannot change its mechanism or its user")
        self._first = (self._mechanism, principal)
        self._step, self._scram = _Step.DONE, None
        seconds = node.config.security.reauth_seconds
        self._expires = node.env.monotonic() + seconds if seconds else None
        self._peer.logged_in(principal, node.config.max_frame_bytes)
        if not seconds:
            self._peer.login = None  # No frame of this connection has to be looked at here any more.
        return int(seconds * 1000)

    def _fail(self, why: str) -> None:
        self._step = _Step.FAILED
        self._peer.leaving = True
        log.info("login from %s refused: %s", self._peer.client_host, why)

    def _refuse(self, node: Node, request: Request, why: str, later: Later | None = None) -> Later:
        """Say so after a while, and close."""
        self._fail(why)
        later = later or Later(node.outbox, request)
        header = request.header
        message = f"Authentication failed: {why} (SASL mechanism {self._mechanism})."
        answer: Parts = [] if self._bare else [_refusal(header, message)]
        say: Callable[[Answer], None] = later.answer
        node.call_later(FAILED_LOGIN_SECONDS, lambda: say(answer))
        return later


def _encode(header: RequestHeader, fields: Fields) -> bytes:
    return encode_response(header.api_key, header.api_version, header.correlation_id, **fields)


def _token(header: RequestHeader, token: bytes, lifetime_ms: int) -> bytes:
    if header.api_version < 0:
        return len(token).to_bytes(4, "big") + token
    fields = {"error_code": 0, "error_message": None, "auth_bytes": token, "session_lifetime": lifetime_ms}
    return _encode(header, fields)


def _refusal(header: RequestHeader, message: str) -> bytes:
    fields = {"error_code": ErrorCode.SASL_AUTHENTICATION_FAILED, "error_message": message, "auth_bytes": b""}
    return _encode(header, fields)

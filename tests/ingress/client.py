"""Calls an ASGI app without a server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import msgspec

Body = bytes | Sequence[bytes | float]
"""The body, or pieces of it; a number waits that many seconds, the last piece ends the body."""


class Got(NamedTuple):
    """An HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)

    @property
    def type(self) -> str:
        """Of the problem."""
        assert self.headers["content-type"] == "application/problem+json"
        return str(self.json["type"])


async def call(
    app: Callable[..., Awaitable[None]],
    method: str,
    path: str,
    body: Body = b"",
    headers: Sequence[tuple[str, str]] = (),
    *,
    root_path: str = "",
    gone: bool = False,
) -> Got:
    """One request. `gone`: the client disconnects instead of ending its body."""
    path, _, query = path.partition("?")
    pieces: list[bytes | float] = [body] if isinstance(body, bytes) else list(body)
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        while pieces:
            piece = pieces.pop(0)
            if isinstance(piece, bytes):
                return {"type": "http.request", "body": piece, "more_body": bool(pieces) or gone}
            await asyncio.sleep(piece)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": root_path + path,
        "raw_path": (root_path + path).encode(),
        "root_path": root_path,
        "query_string": query.encode(),
        "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    await app(scope, receive, send)
    if not sent:
        return Got(0, {}, b"")
    answered = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in sent[0]["headers"]}
    return Got(sent[0]["status"], answered, b"".join(message.get("body", b"") for message in sent[1:]))


async def post(app: Any, path: str = "/orders", body: Body = b'{"id":1}', key: str | None = '"k"', **more: Any) -> Got:
    """A POST as a well-behaved client sends it; `headers` come on top."""
    headers = [("content-type", "application/json"), *more.pop("headers", ())]
    if key is not None:
        headers.append(("idempotency-key", key))
    return await call(app, "POST", path, body, headers, **more)

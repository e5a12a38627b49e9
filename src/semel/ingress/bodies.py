"""Receiving request bodies within limits of size, time and memory."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from semel.ingress.limits import Limits
from semel.ingress.rules import failure

__all__ = ["Bodies", "ClientGone"]

Message = MutableMapping[str, Any]


class ClientGone(Exception):
    """The client closed its connection before its request was complete: there is nobody to answer."""


class Bodies:
    """The bodies that are in memory. Whoever reads one releases it."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.held_bytes = 0
        """Of bodies that are arriving or were not released yet."""

    def __repr__(self) -> str:
        return f"<Bodies {self.held_bytes} of {self._limits.held_bytes} bytes>"

    def release(self, body: bytes) -> None:
        """The body is not needed any more."""
        self.held_bytes -= len(body)

    async def read(self, content_length: bytes, receive: Callable[[], Awaitable[Message]]) -> bytes:
        """The whole body. Raises `Problem` 413, 408 or 503, and `ClientGone`."""
        limits = self._limits
        if content_length and (not content_length.isdigit() or int(content_length[:20]) > limits.body_bytes):
            raise failure("body-too-large", f"The limit is {limits.body_bytes} bytes.")
        try:
            async with asyncio.timeout(limits.body_seconds):
                message = await receive()
                if message["type"] == "http.request" and not message.get("more_body"):
                    body: bytes = message.get("body", b"")
                    self._hold(body, 0)
                    return body
                return await self._read_pieces(message, receive)
        except TimeoutError:
            raise failure("receive-timeout", f"The body must be here within {limits.body_seconds:g} s.") from None

    async def _read_pieces(self, message: Message, receive: Callable[[], Awaitable[Message]]) -> bytes:
        """Read on after the first message of a body that comes in several."""
        pieces: list[bytes] = []
        size = 0
        try:
            while True:
                if message["type"] == "http.disconnect":
                    raise ClientGone
                piece: bytes = message.get("body", b"")
                self._hold(piece, size)
                pieces.append(piece)
                size += len(piece)
                if not message.get("more_body"):
                    return b"".join(pieces)
                message = await receive()
        except BaseException:
            self.held_bytes -= size
            raise

    def _hold(self, piece: bytes, before: int) -> None:
        """Count a piece of a body that has `before` bytes already."""
        limits = self._limits
        if before + len(piece) > limits.body_bytes:
            raise failure("body-too-large", f"The limit is {limits.body_bytes} bytes.")
        if self.held_bytes + len(piece) > limits.held_bytes:
            raise failure("overloaded", "", ("Connection", "close"))
        self.held_bytes += len(piece)

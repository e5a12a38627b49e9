"""The ingress of an app under test, and one HTTP request to it, without a server."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any
from urllib.parse import unquote

from semel.env import Env
from semel.ingress.asgi import Ingress
from semel.ingress.link import KafkaLink
from semel.processing.seams import ReaderSeam
from semel.settings import Settings
from semel.testing.kafka import GetNode, LocalReader
from semel.testing.values import Answer

__all__ = ["LocalLink", "ask"]


class LocalLink(KafkaLink):
    """The ingress' way to the log; replies are read from there."""

    def __init__(self, node: GetNode, app: str, partitions: int, settings: Settings, env: Env) -> None:
        super().__init__(app, settings.kafka, partitions, env, settings.kafka_client)
        self._node = node

    def _make_reader(self) -> ReaderSeam:
        return LocalReader(self._node)


async def ask(ingress: Ingress, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> Answer:
    """The answer to a request. `path` may have a query."""
    plain, _, query = path.partition("?")
    messages: list[MutableMapping[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]
    answered: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        answered.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": unquote(plain),
        "raw_path": plain.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()],
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 0),
    }
    await ingress(scope, receive, send)
    start, *rest = answered
    found = {bytes(name).decode().lower(): bytes(value).decode("latin-1") for name, value in start["headers"]}
    return Answer(start["status"], found, b"".join(message.get("body", b"") for message in rest))

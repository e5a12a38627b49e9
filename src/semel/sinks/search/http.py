"""One connection to an OpenSearch, over the standard library: JSON requests, one after the other."""

from __future__ import annotations

import base64
import contextlib
import http.client
import ssl
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec

from semel.databases.database import without_password
from semel.errors import ConfigurationError
from semel.sinks.contract import Unavailable

__all__ = ["ANSWER_SECONDS", "Answer", "SearchConnection"]

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 30.0
"""How long an answer may take: the server is told to give up a write whose shard is away before that."""
ANSWER_BYTES_MAX = 64 * 1024 * 1024
"""Of one answer: every item of a bulk request refused with a long reason has less."""
_OPTIONS = frozenset({"prefix", "ssl_ca"})
_BROKEN = (OSError, http.client.HTTPException)


class Answer(msgspec.Struct, frozen=True):
    """Status and decoded body of one request."""

    status: int
    body: Any

    @property
    def type(self) -> str:
        """The class of the server's error; empty where there is none."""
        error = self.body.get("error") if isinstance(self.body, dict) else None
        return str(error.get("type", "")) if isinstance(error, dict) else ""

    @property
    def reason(self) -> str:
        """The server's own words for an error."""
        error = self.body.get("error") if isinstance(self.body, dict) else None
        words = error.get("reason", error) if isinstance(error, dict) else error
        return " ".join(f"{self.status} {self.type} {words or ''}".split())


class SearchConnection:
    """Requests to the server that a URL names; used by one thread at a time.

    `opensearch://[USER:PASSWORD@]HOST[:PORT][/PATH]`, `opensearchs://` with TLS. Options: `ssl_ca`, a PEM file of the
    authorities that the server's certificate may come from (the system's, if it is not given); `prefix`, which every
    name of an index begins with.
    """

    def __init__(self, url: str) -> None:
        self.url = without_password(url)
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        unknown = sorted(options.keys() - _OPTIONS)
        try:
            port = parts.port or 9200
        except ValueError:
            port = 0
        if parts.scheme not in ("opensearch", "opensearchs") or not parts.hostname or not port or unknown:
            what = f" knows no option {unknown[0]!r}" if unknown else " names no OpenSearch"
            raise ConfigurationError(
                f"{self.url!r}{what}. Use opensearch://HOST:PORT, or opensearchs:// with TLS; options are prefix= and "
                "ssl_ca=."
            )
        self.prefix = options.get("prefix", "")
        self._path = parts.path.rstrip("/")
        self._address = parts.hostname, port
        self._headers = {"Accept": "application/json"}
        if parts.username is not None:
            user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self._headers["Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
        self._context = _tls(options.get("ssl_ca")) if parts.scheme == "opensearchs" else None
        self._connection: http.client.HTTPConnection | None = None

    def __repr__(self) -> str:
        return f"<SearchConnection {self.url}>"

    def close(self) -> None:
        """Close the connection. Does not raise."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.close()

    def call(self, method: str, path: str, body: bytes | None = None, *, lines: bool = False) -> Answer:
        """One request; with `lines` the body is one JSON document a line.

        A connection that the server closed while it was idle is opened again, and the request repeated: each of ours
        may be, because its version or its compare-and-set makes the second one do nothing. Raises `Unavailable` when
        nobody answers, and for an answer that is none of OpenSearch's.
        """
        headers = dict(self._headers)
        if body is not None:
            headers["Content-Type"] = "application/x-ndjson" if lines else "application/json"
        is_reused = self._connection is not None
        try:
            return self._send(method, path, body, headers)
        except _BROKEN as error:
            self.close()
            if not (is_reused and isinstance(error, ConnectionError)):
                raise self._away(error) from error
        try:
            return self._send(method, path, body, headers)
        except _BROKEN as error:
            self.close()
            raise self._away(error) from error

    def _away(self, error: Exception) -> Unavailable:
        return Unavailable(f"{self.url}: {type(error).__name__}: {error}")

    def _send(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> Answer:
        if self._connection is None:
            self._connection = self._connect()
        self._connection.request(method, self._path + path, body, headers)
        response = self._connection.getresponse()
        raw = response.read(ANSWER_BYTES_MAX)
        if not response.isclosed():
            self.close()  # There is more, which nobody wants.
        if response.status in (401, 403) and b"cluster_block_exception" not in raw:
            raise Unavailable(f"{self.url} refuses {method} {path}: {raw[:300]!r}. Check the user and its rights.")
        try:
            return Answer(response.status, msgspec.json.decode(raw) if raw else None)
        except msgspec.DecodeError:
            raise Unavailable(f"{self.url} answers {response.status} {raw[:200]!r} to {method} {path}.") from None

    def _connect(self) -> http.client.HTTPConnection:
        host, port = self._address
        connection: http.client.HTTPConnection
        if self._context is None:
            connection = http.client.HTTPConnection(host, port, timeout=CONNECT_SECONDS)
        else:
            connection = http.client.HTTPSConnection(host, port, timeout=CONNECT_SECONDS, context=self._context)
        connection.connect()
        connection.sock.settimeout(ANSWER_SECONDS)
        return connection


def _tls(authorities: str | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=authorities or None)
    except OSError as error:
        raise ConfigurationError(f"ssl_ca={authorities}: {error.strerror or error}.") from error

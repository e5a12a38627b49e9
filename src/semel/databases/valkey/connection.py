"""A connection to a Valkey or Redis, and what the server has to be for effects that happen once."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar
from urllib.parse import urlsplit

from semel.databases.database import without_password
from semel.errors import ConfigurationError, Retriable
from semel.processing.shortage import is_shortage

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.exceptions import NoPermissionError, NoScriptError, ResponseError
    from redis.retry import Retry
except ImportError as error:
    if is_shortage(error):
        raise  # It is there, and cannot be loaded at this moment.
    raise ConfigurationError(
        f"Valkey needs redis-py, which is not there ({error}). Install it with: pip install 'semel[valkey]'"
    ) from error

__all__ = ["ANSWER_SECONDS", "NoPermissionError", "NoScriptError", "ResponseError", "ValkeyConnection", "packed"]

log = logging.getLogger("semel.databases")

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 30.0
"""How long an answer may take; a script has milliseconds of work, but others may run before it."""
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 15_000}


class ValkeyConnection:
    """One connection, used by one thread at a time; it is opened when it is needed."""

    away: ClassVar[type[Retriable]] = Retriable
    """What is raised, with the connection closed, when something goes wrong on the way or in the server."""

    def __init__(self, url: str) -> None:
        self.url = url
        parts = urlsplit(url)
        scheme = parts.scheme.replace("valkey", "redis")
        if scheme not in ("redis", "rediss") or not parts.hostname:
            raise ConfigurationError(f"{without_password(url)!r} names no Valkey. Use valkey://HOST:PORT/0.")
        keepalive = {getattr(socket, name): value for name, value in _KEEPALIVE.items() if hasattr(socket, name)}
        try:
            self._client: Any = redis.Redis.from_url(
                parts._replace(scheme=scheme).geturl(),
                socket_connect_timeout=CONNECT_SECONDS,
                socket_timeout=ANSWER_SECONDS,
                socket_keepalive=True,
                socket_keepalive_options=keepalive,
                # A script whose answer was lost is not sent again by the driver: first it is found out what it did.
                retry=Retry(NoBackoff(), 0),
                retry_on_error=[],
                client_name="semel",
                single_connection_client=False,
                max_connections=1,
            )
        except ValueError as error:
            raise ConfigurationError(f"{without_password(url)!r} is not a Valkey URL: {error}") from error
        self._link: Any = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {without_password(self.url)}>"

    def close(self) -> None:
        """Close the connection. Does not raise."""
        link, self._link = self._link, None
        with contextlib.suppress(Exception):
            if link is not None:
                link.disconnect()
                self._client.connection_pool.release(link)
        with contextlib.suppress(Exception):
            self._client.close()

    @contextmanager
    def reaching(self) -> Iterator[None]:
        """Whatever goes wrong on the way or in the server is `away`; a script looks at its data itself."""
        try:
            yield
        except (redis.RedisError, OSError) as error:
            self.close()
            text = " ".join(str(error).split())
            raise self.away(f"{without_password(self.url)}: {type(error).__name__}: {text}") from error

    def send(self, *commands: Sequence[str | bytes]) -> list[Any]:
        """The raw answers to commands that are sent at once, over a connection that stays the same until `close`.

        An answer that is an error is in the list as such. Whatever is raised, nobody knows which were carried out.
        """
        with self.reaching():
            if self._link is None:
                self._link = self._client.connection_pool.get_connection()
            self._link.send_packed_command(self._link.pack_commands(commands))
            found = []
            for _ in commands:
                try:
                    found.append(self._link.read_response())
                except ResponseError as error:
                    found.append(error)
            return found

    @property
    def is_linked(self) -> bool:
        """Whether the connection of `send` is there, as far as can be seen without asking."""
        if self._link is None:
            return False
        try:
            return not self._link.can_read(timeout=0)  # Something to read between two commands is its end.
        except (redis.RedisError, OSError):
            return False

    def script(self, text: str) -> Any:
        """A script to `run`."""
        return self._client.register_script(text)

    def run(self, script: Any, keys: Sequence[str | bytes], arguments: Sequence[str | bytes] = ()) -> list[str]:
        """What the script answers, as text."""
        with self.reaching():
            answer = script(keys=keys, args=arguments)
        return [part.decode(errors="replace") if isinstance(part, bytes) else str(part) for part in answer]

    def info(self) -> dict[str, Any]:
        """What the server tells of itself. Raises `ConfigurationError` for a cluster."""
        with self.reaching():
            info: dict[str, Any] = self._client.info()
        if info.get("redis_mode") == "cluster" or info.get("cluster_enabled"):
            raise ConfigurationError(
                f"{without_password(self.url)} is a cluster, where a script reaches the keys of one slot only: what "
                "belongs together could not change in one step. Use a server that is no cluster (with replicas, if it "
                "must not go away)."
            )
        return info

    def settings(self) -> dict[str, str] | None:
        """The server's settings; None where it does not tell. Raises `ConfigurationError` where any key may go."""
        try:
            with self.reaching():
                settings: dict[str, str] = self._client.config_get("*")
        except self.away as error:
            log.warning("%s does not tell its settings: %s", without_password(self.url), error)
            return None
        if str(settings.get("maxmemory", "0")) != "0" and str(settings.get("maxmemory-policy")).startswith("allkeys"):
            raise ConfigurationError(
                f"{without_password(self.url)} throws any key away when its memory is full (maxmemory-policy "
                f"{settings['maxmemory-policy']}), Semel's own too. Set it to noeviction, or to volatile-*, which "
                "takes keys with a time to live only."
            )
        return settings


def packed(item: Any) -> bytes:
    """MessagePack of lists of bytes and None, with bytes as its older strings: Lua's `cmsgpack` knows no other."""
    if item is None:
        return b"\xc0"
    size = len(item)
    if isinstance(item, bytes):
        if size < 32:
            return b"%c%b" % (0xA0 | size, item)
        return (b"\xda" + size.to_bytes(2) if size < 65_536 else b"\xdb" + size.to_bytes(4)) + item
    head = b"%c" % (0x90 | size) if size < 16 else b"\xdd" + size.to_bytes(4)
    return head + b"".join(map(packed, item))

"""One connection to one broker: requests go out pipelined, answers come back in order.

What happened to a request is never guessed. One that was not written raises `Retriable`; one that was written and
whose answer did not come, for a time-out or a lost connection, raises `OutcomeUnknown` and is counted by whoever
must know (transactions V1). A time-out closes the connection: answers come in order, so nothing behind it would come.

Answers are read by the event loop's own callbacks, so there is no reader task to lose.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from semel.client.security import ClientSecurity, tls_failure
from semel.env import Env
from semel.errors import Fatal, OutcomeUnknown, ProtocolError, Retriable, SemelError
from semel.wire.frames import FrameReader
from semel.wire.messages import api_name, decode_response, encode_request, latest_version

__all__ = ["Connection", "ForkedClient", "check_not_forked"]

API_VERSIONS = 18
_API_VERSIONS_VERSION = 3
_SOFTWARE: dict[str, Any] = {"client_software_name": "semel", "client_software_version": "0.1.0"}
_CAPS = {0: 12, 22: 5, 24: 3}
"""Produce v13 needs topic ids, InitProducerId v6 is for two-phase commit only, AddPartitionsToTxn v4 is for brokers."""
_LOG_IN_AGAIN_AFTER = 0.85
"""Part of a login's lifetime; librdkafka takes 0.9, Java 0.85 to 0.95."""


class ForkedClient(Fatal):
    """This client was made before a fork and is used in the child, where its connections belong to the parent."""


def check_not_forked(owner_pid: int, what: str) -> None:
    """Raise `ForkedClient` when the process is not the one that made the client."""
    if os.getpid() != owner_pid:
        raise ForkedClient(
            f"{what} was made in process {owner_pid} and is used in its forked child {os.getpid()}: the two would "
            "mix their bytes on one connection. Make the client after the fork (gunicorn: not with --preload)."
        )


class _Pending(NamedTuple):
    correlation_id: int
    api_key: int
    version: int
    seconds: float
    deadline: float
    answer: asyncio.Future[Any]
    decode: Callable[[bytes], Any] | None


class Connection(asyncio.Protocol):
    """A connected broker. Made by `Connection.open`; every call after `close` raises `Retriable`."""

    def __init__(self, address: str, client_id: str, env: Env, timeout: float) -> None:
        self.address = address
        self.versions: dict[int, tuple[int, int]] = {}
        """(lowest, highest) version of each API key that the broker answers."""
        self.features: dict[str, int] = {}
        self.features_epoch = -1
        self._client_id = client_id
        self._env = env
        self._timeout = timeout
        self._transport: asyncio.Transport | None = None
        self._reader = FrameReader()
        self._pending: deque[_Pending] = deque()
        self._correlation_id = 0
        self._timer: asyncio.TimerHandle | None = None
        self._lost: str | None = None
        self._refused: Fatal | None = None
        self._login: asyncio.Task[None] | None = None
        self._login_timer: asyncio.TimerHandle | None = None
        self._held: list[Callable[[], None]] | None = None
        """Requests that wait for us to log in again; None while nothing has to wait."""
        self._closed = asyncio.get_running_loop().create_future()
        self._pid = os.getpid()

    def __repr__(self) -> str:
        state = self._lost or "open"
        return f"<Connection {self.address} [{state}] {len(self._pending)} in flight>"

    @classmethod
    async def open(
        cls,
        host: str,
        port: int,
        *,
        client_id: str,
        env: Env,
        timeout: float,
        connect_timeout: float,
        security: ClientSecurity | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> Connection:
        """Connect, learn the broker's versions and features, log in.

        Raises `Retriable` when nobody answers there, `Fatal` when we are refused, or the broker cannot be trusted.
        """
        address = f"{host}:{port}"
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(connect_timeout):
                _, connection = await loop.create_connection(
                    lambda: cls(address, client_id, env, timeout),
                    host,
                    port,
                    ssl=tls,
                    server_hostname=None if tls is None else host,
                )
        except (OSError, TimeoutError) as error:
            refused = tls_failure(address, error) if isinstance(error, ssl.SSLError) else None
            if refused is not None:
                raise refused from error
            hint = "" if tls is None else ". Does it speak TLS there? Check the port and security.protocol"
            raise Retriable(
                f"no connection to Kafka at {address}: {str(error) or type(error).__name__}{hint}"
            ) from error
        try:
            await connection._learn_versions()
            if security is not None and security.sasl:
                await connection._log_in(security)
        except OutcomeUnknown as error:
            connection.close()
            if connection._refused is not None:
                raise connection._refused from error
            hint = "" if tls is not None else ". If it speaks TLS there, set security.protocol"
            raise Retriable(f"Kafka at {address} did not let us in: {error}{hint}") from error
        except BaseException:
            connection.close()
            raise
        return connection

    async def _log_in(self, security: ClientSecurity) -> None:
        async def ask(api_key: int, **fields: Any) -> Any:
            highest = self.versions.get(api_key, (0, 1))[1]
            return await self._write(api_key, min(highest, latest_version(api_key)), None, fields)

        lifetime_ms = await security.log_in(self.address, ask)
        if lifetime_ms > 0 and self._lost is None:
            wait = lifetime_ms / 1000 * _LOG_IN_AGAIN_AFTER
            self._login_timer = asyncio.get_running_loop().call_later(wait, self._begin_login, security)

    def _begin_login(self, security: ClientSecurity) -> None:
        self._login = asyncio.get_running_loop().create_task(self._log_in_again(security))

    async def _log_in_again(self, security: ClientSecurity) -> None:
        """Before the login expires (KIP-368); whatever else is sent waits meanwhile, as the broker would refuse it."""
        held = self._held = []
        try:
            await self._log_in(security)
        except SemelError as error:
            self._lose(f"logging in again failed: {error}")
        finally:
            self._held = None
        for request in held:
            request()

    async def _learn_versions(self) -> None:
        answer = await self.send(API_VERSIONS, _API_VERSIONS_VERSION, **_SOFTWARE)
        if answer.error_code != 0:
            raise Fatal(
                f"Kafka at {self.address} refuses ApiVersions v3 with error {int(answer.error_code)}: "
                "it is older than Apache Kafka 2.4, which Semel does not support."
            )
        self.versions = {item.api_key: (item.min_version, item.max_version) for item in answer.api_keys}
        self.features = {item.name: item.max_version_level for item in answer.finalized_features}
        self.features_epoch = answer.finalized_features_epoch

    # --- Requests ---

    @property
    def is_open(self) -> bool:
        """Whether a request can still be written."""
        return self._lost is None and self._transport is not None

    @property
    def in_flight(self) -> int:
        """Requests that were written and not answered yet."""
        return len(self._pending)

    def version_of(self, api_key: int, wanted: int | None = None) -> int:
        """The version to use: `wanted`, or the highest both sides know. Raises `Fatal` when there is none."""
        lowest, highest = self.versions.get(api_key, (0, -1))
        best = min(highest, _CAPS.get(api_key, highest), latest_version(api_key)) if wanted is None else wanted
        if not lowest <= best <= highest:
            asked = "any version we know" if wanted is None else f"v{wanted}"
            raise Fatal(
                f"Kafka at {self.address} does not support {api_name(api_key)} {asked} (it offers {lowest}..{highest})."
            )
        return best

    def offers(self, api_key: int, version: int) -> bool:
        """Whether the broker knows this version of an API."""
        lowest, highest = self.versions.get(api_key, (0, -1))
        return lowest <= version <= highest

    def send(
        self,
        api_key: int,
        version: int,
        /,
        *,
        decode: Callable[[bytes], Any] | None = None,
        patience: float | None = None,
        **values: Any,
    ) -> asyncio.Future[Any]:
        """Write one request now; the future gives its answer, or `OutcomeUnknown`.

        While we log in again it is written right after that. `decode` reads the answer's frame where the schema cannot;
        `patience`, in seconds, is for requests that a broker answers late on purpose. Raises `Retriable` if nothing
        was written.
        """
        check_not_forked(self._pid, f"the connection to Kafka at {self.address}")
        if self._held is None:
            return self._write(api_key, version, decode, values, patience=patience)
        waiting: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def write() -> None:
            if waiting.done():
                return  # Whoever sent it gave up.
            try:
                self._write(api_key, version, decode, values, waiting, patience)
            except SemelError as error:
                waiting.set_exception(error)
                waiting.exception()  # Marked as seen, as in `_lose`.

        self._held.append(write)
        return waiting

    def _write(
        self,
        api_key: int,
        version: int,
        decode: Callable[[bytes], Any] | None,
        values: Mapping[str, Any],
        waiting: asyncio.Future[Any] | None = None,
        patience: float | None = None,
    ) -> asyncio.Future[Any]:
        transport = self._transport
        if self._lost is not None or transport is None:
            raise Retriable(f"the connection to Kafka at {self.address} is closed: {self._lost}")
        self._correlation_id = (self._correlation_id + 1) & 0x7FFFFFFF
        frame = encode_request(api_key, version, self._correlation_id, self._client_id, **values)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future() if waiting is None else waiting
        seconds = self._timeout if patience is None else patience
        deadline = self._env.monotonic() + seconds
        self._pending.append(_Pending(self._correlation_id, api_key, version, seconds, deadline, future, decode))
        if self._timer is not None and loop.time() + seconds < self._timer.when():
            self._timer.cancel()  # It was set for a request that may take longer.
            self._timer = None
        if self._timer is None:
            self._timer = loop.call_later(seconds, self._check_deadline)
        transport.write(memoryview(frame))  # What the socket does not take at once is not copied twice.
        return future

    def _check_deadline(self) -> None:
        self._timer = None
        if not self._pending:
            return
        head = self._pending[0]
        left = head.deadline - self._env.monotonic()
        if left > 0:
            self._timer = asyncio.get_running_loop().call_later(left + 0.001, self._check_deadline)
            return
        self._lose(f"{api_name(head.api_key)} was not answered within {head.seconds:g} s")

    # --- asyncio.Protocol ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._reader.receive_data(data):
                self._take_answer(frame)
        except ProtocolError as error:
            self._lose(f"it sent bytes that are not the Kafka protocol: {error}")

    def _take_answer(self, frame: bytes) -> None:
        if not self._pending:
            raise ProtocolError("an answer came that no request asked for")
        pending = self._pending[0]
        correlation_id = int.from_bytes(frame[:4], "big", signed=True)
        if correlation_id != pending.correlation_id:
            raise ProtocolError(f"answer {correlation_id} came where {pending.correlation_id} was due")
        version = pending.version
        if pending.api_key == API_VERSIONS and frame[4:6] == b"\x00\x23":
            version = 0  # A broker that does not know our version answers UNSUPPORTED_VERSION in the oldest layout.
        decode = pending.decode
        answer = decode_response(pending.api_key, version, frame) if decode is None else decode(frame)
        self._pending.popleft()
        if not pending.answer.done():
            pending.answer.set_result(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        if isinstance(exc, ssl.SSLError):
            self._refused = tls_failure(self.address, exc)
        self._lose(f"the broker closed it ({exc})" if exc else "the broker closed it")
        if not self._closed.done():
            self._closed.set_result(None)

    def _lose(self, why: str) -> None:
        if self._lost is None:
            self._lost = why
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._login_timer is not None:
            self._login_timer.cancel()
        if self._transport is not None:
            self._transport.abort()
        while self._pending:
            pending = self._pending.popleft()
            if not pending.answer.done():
                pending.answer.set_exception(
                    OutcomeUnknown(
                        f"{api_name(pending.api_key)} was sent to {self.address} and its answer is lost: {self._lost}"
                    )
                )
                pending.answer.exception()  # Marked as seen: whoever sent it may be gone already.

    def close(self) -> None:
        """Close now; requests in flight end as `OutcomeUnknown`. Safe to call twice."""
        self._lose("closed by this side")

    async def wait_closed(self) -> None:
        """Return once the socket is closed."""
        if self._transport is not None:
            await self._closed

"""A TCP proxy before PostgreSQL that knows one message: COMMIT, and the answer to it.

Everything else passes. TLS and GSS encryption are answered with "no", as by a server without them: the proxy and the
server are on this side of it. https://www.postgresql.org/docs/18/protocol-message-formats.html
"""

from __future__ import annotations

import re
from urllib.parse import parse_qs, urlsplit, urlunsplit

from semel.prove.faults.pipe import HERE, Address, Pipe, Proxy
from semel.prove.faults.rules import Cut, Drop, Hold, Trap

__all__ = ["PostgresProxy"]

_SSL_REQUEST, _GSS_REQUEST = 80877103, 80877104
_COMMIT = re.compile(rb"\s*(COMMIT|END)\b", re.IGNORECASE)
_DONE = re.compile(rb"C....(COMMIT|ROLLBACK)", re.DOTALL)
"""CommandComplete of a COMMIT; one that could not be answers ROLLBACK. ErrorResponse begins with E."""
_NEEDS_TLS = ("require", "verify-ca", "verify-full")
_PORT = 5432


class PostgresPipe(Pipe):
    """One session."""

    def __init__(self, proxy: PostgresProxy, upstream: Address) -> None:
        super().__init__(proxy, upstream)
        self._commits = proxy.commits
        self._is_starting = True
        self._asked = bytearray()
        self._told = bytearray()
        self._commit_names: set[bytes] = set()
        """Prepared statements whose text is COMMIT."""
        self._group: bytearray | None = None
        """The messages of a COMMIT in the extended protocol, up to their Sync, while a trap wants them."""
        self._trap: Trap | None = None
        """What took the COMMIT that is being answered."""
        self._answer: bytearray | None = None
        self._deaf = False

    # --- To the server ---

    def from_client(self, data: bytes) -> None:
        self._asked += data
        at = 0
        while self.client.transport is not None and not self.waiting:
            head = 0 if self._is_starting else 1
            if len(self._asked) - at < head + 4:
                break
            size = head + int.from_bytes(self._asked[at + head : at + head + 4], "big")
            if len(self._asked) - at < size:
                break
            message = bytes(self._asked[at : at + size])
            at += size
            if self._is_starting:
                self._start(message)
            else:
                self._ask(message)
        del self._asked[:at]

    def _start(self, message: bytes) -> None:
        if int.from_bytes(message[4:8], "big") in (_SSL_REQUEST, _GSS_REQUEST):
            self.client.write(b"N")
            return
        self._is_starting = False
        self.server.write(message)

    def _ask(self, message: bytes) -> None:
        if self._group is not None:
            self._group += message
            if message[:1] in (b"S", b"H"):
                group, self._group = bytes(self._group), None
                self._commit(group)
            return
        if not self._is_commit(message):
            self.server.write(message)
            return
        trap = next((trap for trap in list(self._commits) if trap.count()), None)
        if trap is None:
            self.server.write(message)
            return
        self._trap = trap
        if message[:1] == b"Q":
            self._commit(message)
        else:
            self._group = bytearray(message)

    def _is_commit(self, message: bytes) -> bool:
        match message[:1]:
            case b"Q":
                return _COMMIT.match(message, 5) is not None
            case b"P":
                name, _, text = message[5:].partition(b"\0")
                is_commit = _COMMIT.match(text) is not None
                self._commit_names.discard(name)
                if is_commit and name:
                    # Executed by a Bind, maybe much later; parsing it commits nothing.
                    self._commit_names.add(name)
                    return False
                return is_commit
            case b"B":
                _, _, rest = message[5:].partition(b"\0")
                return rest.partition(b"\0")[0] in self._commit_names
        return False

    def _commit(self, messages: bytes) -> None:
        """The whole of a COMMIT that a trap has taken."""
        trap = self._trap
        assert trap is not None
        match trap.action:
            case Hold("request", seconds):
                self.when_let_go(trap, seconds, lambda: self.server.write(messages))
            case Drop("request"):
                trap.settle(None)
                self.client.pause("dropped")
            case Cut("request", at, reset):
                self.server.write(messages[:at])
                trap.settle(None)
                self.close(reset=reset)
            case _:
                self.server.write(messages)

    # --- To the client ---

    def from_server(self, data: bytes) -> None:
        if not self._told and self._trap is None and not self._deaf and self._is_whole(data):
            self.client.write(data)
            return
        self._told += data
        at = 0
        while len(self._told) - at >= 5:
            size = 1 + int.from_bytes(self._told[at + 1 : at + 5], "big")
            if len(self._told) - at < size:
                break
            self._tell(bytes(self._told[at : at + size]))
            at += size
        del self._told[:at]

    @staticmethod
    def _is_whole(data: bytes) -> bool:
        """Whether these are whole messages and nothing more."""
        at = 0
        while len(data) - at >= 5:
            at += 1 + int.from_bytes(data[at + 1 : at + 5], "big")
        return at == len(data)

    def _tell(self, message: bytes) -> None:
        if self._trap is None:
            if not self._deaf:
                self.client.write(message)
            return
        if self._answer is None:
            if message[:1] != b"E" and _DONE.match(message) is None:
                self.client.write(message)  # Of what was sent before the COMMIT, in a pipeline.
                return
            self._answer = bytearray()
        self._answer += message
        if message[:1] == b"Z":
            trap, answer = self._trap, bytes(self._answer)
            self._trap = self._answer = None
            self._answered(trap, answer)

    def _answered(self, trap: Trap, answer: bytes) -> None:
        trap.settle(answer)
        match trap.action:
            case Hold("response", seconds):
                self.server.pause("held")
                self.when_let_go(trap, seconds, lambda: self._let_answer_go(answer))
            case Drop("response"):
                self._deaf = True
            case Cut("response", at, reset):
                self.client.write(answer[:at])
                self.close(reset=reset)
            case _:
                self.client.write(answer)

    def _let_answer_go(self, answer: bytes) -> None:
        self.client.write(answer)
        self.server.resume("held")

    # --- The end ---

    def done_waiting(self) -> None:
        if not self.waiting:
            self.from_client(b"")  # What came behind a COMMIT that was held.

    def server_gone(self) -> None:
        if self._trap is not None:
            self._trap.settle(None)
        super().server_gone()


class PostgresProxy(Proxy):
    """Before one server; `commits` are traps, each counts COMMITs. Use it within one event loop."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = urlsplit(url)
        self.commits: list[Trap] = []

    @staticmethod
    def refusal(url: str) -> str:
        """Why no proxy can stand before this database, as a sentence; empty when one can."""
        parts = urlsplit(url)
        query = parse_qs(parts.query)
        if not parts.hostname or "," in parts.netloc or "host" in query:
            return "the database is not one server at an address in its URL's host."
        if query.get("sslmode", [""])[-1] in _NEEDS_TLS:
            return "the database URL demands TLS, and of that a proxy can read nothing."
        return ""

    @property
    def url(self) -> str:
        """The database's URL with our address in place of the server's. Call it in the event loop."""
        port = self.port_for(self._url.hostname or HERE, self._url.port or _PORT)
        login, at, _ = self._url.netloc.rpartition("@")
        return urlunsplit(self._url._replace(netloc=f"{login}{at}{HERE}:{port}"))

    def make_pipe(self, upstream: Address) -> Pipe:
        return PostgresPipe(self, upstream)

    def on_commit(self, trap: Trap) -> Trap:
        """Put a trap in force; the first that takes a COMMIT wins."""
        self.commits.append(trap)
        return trap

    def remove(self, trap: Trap) -> None:
        """Take a trap out of force; what it holds goes on."""
        if trap in self.commits:
            self.commits.remove(trap)
        trap.release()

    async def close(self) -> None:
        for trap in list(self.commits):
            self.remove(trap)
        await super().close()

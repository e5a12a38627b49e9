"""The model of PostgreSQL behind psycopg: a connection that looks like psycopg's, over a network that breaks.

The real `PostgresDatabase` runs on it, so what it makes of a broken COMMIT, of an error inside a transaction or of a
server that is away is the real thing too. It is used from fibers: a call waits for its answer in virtual time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import errors
from psycopg.pq import TransactionStatus

from tests.simulation.fibers import FIBER, Fiber, Resume
from tests.simulation.loop import PROCESS, Process
from tests.simulation.model_postgres import ModelServer, ModelSession, Result

if TYPE_CHECKING:
    from tests.simulation.world import World

__all__ = ["DatabaseHost", "ModelConnection", "ModelCursor"]

_SET_CONFIG = "SELECT set_config"
_ADVISORY_LOCK = "SELECT pg_advisory_xact_lock"
_SECONDS = re.compile(r"(\d+)s")
_NOTICED_LATE_SECONDS = 1.5
"""When the server learns that a client is gone whose connection just went silent."""


class ModelCursor:
    """The part of psycopg's cursor that a result has."""

    def __init__(self, result: Result) -> None:
        self.rowcount = result.count
        self.statusmessage = result.status
        self.description = None if result.rows is None else ()
        self._rows = result.rows or []

    def fetchall(self) -> list[tuple[Any, ...]]:
        return self._rows


class DatabaseHost:
    """The server's machine, its network, and what happens to them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.server = ModelServer()
        self.rng = world.stream("database")
        self.is_away = False
        self.commit_fault = ""
        """What happens to the next COMMIT: `before` or `after` it is carried out its connection breaks."""
        self.commit_late = 0.0
        """Seconds by which the next COMMIT comes late, while its client has lost the connection already."""
        self.connections: list[ModelConnection] = []

    def latency(self) -> float:
        return self.world.network.base_latency + self.world.network.jitter * self.rng.random()

    def connect(self, conninfo: str, *, autocommit: bool) -> ModelConnection:
        """In the place of `psycopg.connect`."""
        assert autocommit
        process, fiber = PROCESS.get(), FIBER.get()
        assert process is not None
        assert fiber is not None
        fiber.wait(lambda resume: fiber.later(2 * self.latency(), lambda: resume(None, None)))
        if self.is_away:
            raise psycopg.OperationalError("connection failed: connection refused")
        connection = ModelConnection(self, self.server.connect(), process, fiber)
        self.connections.append(connection)
        self.world.trace("database", "session of", process.name)
        return connection

    def process_ended(self, process: Process) -> None:
        """Its kernel closes its connections; what it has sent still arrives."""
        for connection in list(self.connections):
            if connection.process is process:
                self.world._at(self.latency(), connection.hang_up)

    def end_session(self, draw: float) -> None:
        """pg_terminate_backend."""
        if self.connections:
            self.connections[int(draw * len(self.connections))].break_off()

    def cut(self, draw: float) -> None:
        """A client's connection is dead for it at once, for the server later: its locks stay meanwhile."""
        if self.connections:
            connection = self.connections[int(draw * len(self.connections))]
            connection.break_off(server_notices=False)
            self.world._at(_NOTICED_LATE_SECONDS, connection.hang_up)

    def restart(self, seconds: float) -> None:
        """Every session ends, what was open is rolled back, and nobody is let in for a while."""
        self.is_away = True
        for connection in list(self.connections):
            connection.break_off()
        self.world._at(seconds, lambda: setattr(self, "is_away", False))


class _Info:
    def __init__(self, connection: ModelConnection) -> None:
        self._connection = connection

    @property
    def transaction_status(self) -> TransactionStatus:
        return self._connection.status


class ModelConnection:
    """The part of `psycopg.Connection` that the sink's database uses."""

    def __init__(self, host: DatabaseHost, session: ModelSession, process: Process, fiber: Fiber) -> None:
        self.process = process
        self.closed = False
        self.status = self._told = TransactionStatus.IDLE
        self.info = _Info(self)
        self._host = host
        self._session = session
        self._fiber = fiber
        self._is_broken = False
        self._answer: Callable[[Result | None, BaseException | None], None] | None = None
        """Who waits for the answer to the statement that is under way."""
        self._hangs_up = False
        self._settings: dict[str, float] = {}
        self._idle = 0

    # --- As psycopg's ---

    def execute(
        self, query: str | bytes, parameters: Sequence[Any] | None = None, *, binary: bool | None = None
    ) -> ModelCursor:
        text = query.decode() if isinstance(query, bytes) else query
        values = list(parameters or ())
        if self.closed:
            raise psycopg.OperationalError("the connection is closed")
        if text.startswith(_SET_CONFIG):
            self._set(values)
            return ModelCursor(Result("SELECT 1", 1, [tuple(values[1::2])]))
        if not text or text.startswith(_ADVISORY_LOCK):
            text, values = "SET CONSTRAINTS ALL IMMEDIATE", []  # Changes nothing, but takes its time.
        result: Result = self._fiber.wait(lambda resume: self._send(text, values, resume))
        self.status = self._told
        return ModelCursor(result)

    @contextmanager
    def cursor(self) -> Iterator[_Many]:
        yield _Many(self)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._host.world._at(self._host.latency(), self.hang_up)

    def _set(self, pairs: list[str]) -> None:
        for name, text in zip(pairs[::2], pairs[1::2], strict=True):
            found = _SECONDS.fullmatch(text)
            if found is not None:
                self._settings[name] = float(found[1])

    # --- The way there and back ---

    def _send(self, text: str, values: list[Any], resume: Resume) -> None:
        """Called in the loop. The client's end waits in its process, the rest is the network's and the server's."""
        world = self._host.world

        def settled(result: Result | None, error: BaseException | None) -> None:
            self._answer = None
            if error is not None and not self.closed:
                self.status = self._told
            world.loop.call_soon(resume, result, error, context=self.process.context)

        def leave() -> None:
            if self._is_broken:
                self.closed = True
                settled(None, psycopg.OperationalError("the connection is lost"))
                return
            self._answer = settled
            world._at(self._host.latency(), lambda: self._arrived(text, values))

        world.loop.call_soon(leave, context=self.process.context)

    def _arrived(self, text: str, values: list[Any]) -> None:
        if self._session.is_over:
            return
        self._idle += 1
        fault, seconds = "", 0.0
        if text == "COMMIT" and self._session.status is TransactionStatus.INTRANS:
            fault, self._host.commit_fault = self._host.commit_fault, ""
            seconds, self._host.commit_late = self._host.commit_late, 0.0
            fault = "late" if seconds else fault
        self._host.world.trace("database", self.process.name, text.split("\n")[0][:40] or text[:40], fault)
        if fault == "late":
            self.break_off(server_notices=False)
            self._host.world._at(seconds, lambda: self._come_late(text, values))
            return
        if fault == "before":
            self.break_off()
            return
        self._session.execute(text, values, self._answered)
        if fault == "after":
            self.break_off()
        elif self._session.is_waiting:
            number = self._idle
            seconds = self._settings.get("statement_timeout", 30.0)
            self._host.world._at(seconds, lambda: self._cancel(number))

    def _come_late(self, text: str, values: list[Any]) -> None:
        """It was in the network; nobody waits for an answer any more."""
        if not self._session.is_over:
            self._session.execute(text, values, lambda *_: None)
        self.hang_up()

    def _cancel(self, number: int) -> None:
        if number == self._idle:
            self._session.cancel()

    def _answered(self, result: Result | None, error: psycopg.Error | None) -> None:
        """The server has carried it out."""
        if self._hangs_up:
            self.hang_up()
            return
        self._told = self._session.status  # What became of it since, a client learns with its next statement.
        number = self._idle
        if self._session.status is not TransactionStatus.IDLE:
            seconds = self._settings.get("idle_in_transaction_session_timeout", 10.0)
            self._host.world._at(seconds, lambda: self._idle_for_long(number))
        answer = self._answer
        if answer is not None:
            self._host.world._at(self._host.latency(), lambda: self._come_back(answer, result, error))

    def _come_back(self, answer: Any, result: Result | None, error: psycopg.Error | None) -> None:
        if not self._is_broken:
            answer(result, error)

    def _idle_for_long(self, number: int) -> None:
        if number == self._idle and not self._session.is_over:
            self._host.world.trace("database", "ends the idle session of", self.process.name)
            self.break_off()

    # --- Ends ---

    def break_off(self, *, server_notices: bool = True) -> None:
        """The connection breaks; the server's session ends now or stays."""
        if self._is_broken:
            return
        self._is_broken = True
        self._host.world.trace("database", "loses the connection of", self.process.name)
        if server_notices:
            self.hang_up()
        answer, self._answer = self._answer, None
        if answer is not None:
            self.closed = True
            self._host.world._at(
                self._host.latency(), lambda: answer(None, errors.AdminShutdown("the connection is lost"))
            )

    def hang_up(self) -> None:
        """The server ends the session, or will when the statement under way is through."""
        if self._session.is_waiting:
            self._hangs_up = True
        elif not self._session.is_over:
            self._session.terminate()
        if self in self._host.connections:
            self._host.connections.remove(self)


class _Many:
    """psycopg's cursor, for `executemany`."""

    def __init__(self, connection: ModelConnection) -> None:
        self._connection = connection
        self.rowcount = -1

    def executemany(self, query: str, rows: Iterable[Sequence[Any]]) -> None:
        counts = [self._connection.execute(query, row).rowcount for row in rows]
        self.rowcount = sum(counts)

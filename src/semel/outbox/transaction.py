"""`app.transaction(db)`: a database transaction, and the records that it sends.

One block for both colours: `with` gives a `Transaction`, `async with` an `AsyncTransaction`, which runs the same work
in a thread, so that the event loop turns while the database works. The records wait in memory until the block ends;
then they are the last rows that are written before COMMIT, because what holds a row's lock by then has its place in
the order of its key.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar

from semel.databases.database import Parameters
from semel.databases.statements import StatementRefused
from semel.errors import ConfigurationError, Fatal
from semel.outbox.records import Outgoing, row_of
from semel.processing.effects import Produce
from semel.processing.repeats import check_apart

if TYPE_CHECKING:
    from semel.outbox.writer import AnySession, SqlSession, Writer

__all__ = ["AsyncTransaction", "Block", "Sending", "Transaction", "TransactionBlock", "finished"]

_INTERRUPT_PAUSE_SECONDS = 0.02
_INTERRUPT_PAUSE_MAX_SECONDS = 1.0

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S", bound="Sending")
A = TypeVar("A", bound="Sending")


class Sending:
    """What both colours share: the records, and whether anything may still be done."""

    def __init__(self, writer: Writer, session: AnySession) -> None:
        self._writer = writer
        self._session = session
        self._outgoing = Outgoing()
        self._open = True

    def __repr__(self) -> str:
        state = "open" if self._open else "ended"
        return f"<{type(self).__name__} {self._session.transaction_id} [{state}, {len(self._outgoing.rows)} records]>"

    def send(self, record: Produce, *, id: uuid.UUID | str | None = None) -> uuid.UUID:  # noqa: A002
        """Send a record that `topic.record(key, value)` made, if and only if this transaction commits; its id.

        It is written and checked here and now. `id` is for events that have one of their own (a UUID): it travels as
        the header `semel-id`. Records of one key stay in the order in which their transactions held the lock of the
        row that the key stands for: so change that row before the block ends.

        Raises `DataError` for what cannot be written or is too large for Kafka, `ConfigurationError` for a topic of
        another app, `Fatal` outside of the block. The transaction goes on as if nothing had been sent.
        """
        self._check_open("sends a record")
        self._writer.check_topic(record)
        row = row_of(record, id)
        self._outgoing.add(row)
        return uuid.UUID(row.msg_id)

    @property
    def is_open(self) -> bool:
        """Whether the block has not ended."""
        return self._open

    @property
    def id(self) -> str:
        """Names this transaction in errors, and with an outbox in `semel_commit`."""
        return self._session.transaction_id

    def _check_open(self, what: str) -> None:
        if not self._open:
            raise Fatal(
                f"the code {what} of a transaction that has ended: nothing was done. Do it inside of the block "
                "'with app.transaction(db) as tx:'."
            )

    def _finish(self, failed: bool) -> None:
        """Commit, or roll back; then the connection is free."""
        self._open = False
        try:
            if not failed:
                self._commit()
        finally:
            self._writer.drop(self._session)
        if not failed and self._outgoing.rows:
            self._writer.wake()

    def _commit(self) -> None:
        self._writer.commit(self._session, self._outgoing.rows)


class _InSql(Sending):
    """What both colours share on a SQL database."""

    _session: SqlSession

    @property
    def connection(self) -> Any:
        """The driver's own connection, a `psycopg.Connection` or `sqlite3.Connection`, inside the transaction.

        COMMIT and ROLLBACK are the block's.
        """
        self._check_open("uses its connection")
        return self._session.database.driver_connection

    def _check(self, sql: str, parameters: Parameters = ()) -> None:
        self._check_open("runs a statement")
        self._session.database.check_handler_statement(sql)
        if parameters and "?" not in sql and ("%s" in sql or "%(" in sql):
            raise StatementRefused(
                f"placeholders are ? on every database, also where the driver has %s: {sql!r:.200}. "
                "(tx.connection is the driver's own connection, with the driver's placeholders.)"
            )

    def _execute(self, sql: str, parameters: Parameters) -> int:
        self._check(sql, parameters)
        return self._session.database.execute(sql, parameters)

    def _executemany(self, sql: str, rows: list[Parameters]) -> int:
        self._check(sql, rows)
        return self._session.database.executemany(sql, rows)

    def _query(self, sql: str, parameters: Parameters) -> list[tuple[Any, ...]]:
        self._check(sql, parameters)
        return self._session.database.query(sql, parameters)


class Transaction(_InSql):
    """The inside of `with app.transaction(db) as tx:`. Errors of statements are the driver's own."""

    def execute(self, sql: str, parameters: Parameters = ()) -> int:
        """Run one statement with `?` placeholders; how many rows it changed."""
        return self._execute(sql, parameters)

    def executemany(self, sql: str, rows: Iterable[Parameters]) -> int:
        """Run one statement for each row of parameters; how many rows they changed together."""
        return self._executemany(sql, list(rows))

    def query(self, sql: str, parameters: Parameters = ()) -> list[tuple[Any, ...]]:
        """Run one statement and fetch all of its rows."""
        return self._query(sql, parameters)


class AsyncTransaction(_InSql):
    """The inside of `async with app.transaction(db) as tx:`. Errors of statements are the driver's own.

    A statement whose task is cancelled is ended in the database, too, and the transaction rolled back.
    """

    async def execute(self, sql: str, parameters: Parameters = ()) -> int:
        """Run one statement with `?` placeholders; how many rows it changed."""
        return await self._run(self._execute, sql, parameters)

    async def executemany(self, sql: str, rows: Iterable[Parameters]) -> int:
        """Run one statement for each row of parameters; how many rows they changed together."""
        return await self._run(self._executemany, sql, list(rows))

    async def query(self, sql: str, parameters: Parameters = ()) -> list[tuple[Any, ...]]:
        """Run one statement and fetch all of its rows."""
        return await self._run(self._query, sql, parameters)

    async def run(self, function: Callable[Concatenate[Any, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`function(connection, ...)` with the driver's connection, in a thread: its calls block."""
        return await self._run(function, self.connection, *args, **kwargs)

    async def _run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await finished(self._writer.submit(function, *args, **kwargs), self._session.database.interrupt)


async def finished(work: Future[T], interrupt: Callable[[], None] | None = None) -> T:
    """What the thread's work gives. Who is cancelled waits for its end all the same: the connection is in use.

    Work that can be interrupted is, and the interruption waited for, too: it must not hit the next statement.
    """
    future = asyncio.wrap_future(work)
    pending: list[asyncio.Future[Any]] = [future]
    cancelled: asyncio.CancelledError | None = None
    while not all(each.done() for each in pending):
        try:
            await asyncio.wait(pending)
        except asyncio.CancelledError as error:
            if cancelled is None and interrupt is not None:
                pending.append(asyncio.create_task(_interrupted(future, interrupt)))
            cancelled = error
    if cancelled is not None:
        future.exception()  # What was interrupted fails: that is no news.
        raise cancelled
    return future.result()


async def _interrupted(future: asyncio.Future[Any], interrupt: Callable[[], None]) -> None:
    """Interrupt the work until it ends: at first it may not have reached the database."""
    pause = _INTERRUPT_PAUSE_SECONDS
    while not future.done():
        await asyncio.to_thread(interrupt)
        await asyncio.wait([future], timeout=pause)
        pause = min(2 * pause, _INTERRUPT_PAUSE_MAX_SECONDS)


_current: ContextVar[tuple[tuple[object, str, Sending], ...]] = ContextVar("semel_transactions", default=())
"""The transactions that were begun here: by whom (a task or a thread), on which database."""


def _whoever() -> object:
    try:
        return asyncio.current_task() or threading.current_thread()
    except RuntimeError:
        return threading.current_thread()


class Block(Generic[S, A]):
    """What `app.transaction(...)` gives: enter it once, with `with` or `async with`.

    The block commits at its end, and rolls back when an exception leaves it. Raises `Retriable` when no connection
    came free or the database is away, with nothing done, and `ConfigurationError` in a handler that may run again; see
    `Session.commit` for what COMMIT itself may raise.
    """

    _colours: tuple[type[S], type[A]]
    """What is inside of the block, with `with` and with `async with`."""

    def __init__(self, writer: Callable[[], Writer], name: str) -> None:
        self._find_writer = writer
        self._name = name
        self._transaction: Sending | None = None
        self._entered = False
        self._outer: tuple[tuple[object, str, Sending], ...] = ()

    def __enter__(self) -> S:
        self._check_entry()
        if _runs_in_loop():
            raise ConfigurationError(
                "'with app.transaction(db)' would stop this event loop while the database works: write 'async with "
                "app.transaction(db) as tx:', and await tx.execute(...)."
            )
        writer = self._find_writer()
        writer.prepare()
        session = writer.fresh(writer.pool.borrow())
        try:
            writer.begin(session)
        except BaseException:
            writer.drop(session)
            raise
        transaction = self._colours[0](writer, session)
        self._enter(transaction)
        return transaction

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()._finish(failed=error is not None)

    async def __aenter__(self) -> A:
        self._check_entry()
        writer = self._find_writer()
        if not writer.is_prepared:
            await asyncio.to_thread(writer.prepare)
        session = writer.fresh(await writer.pool.borrow_async())
        try:
            await finished(writer.submit(writer.begin, session))
        except BaseException:
            writer.submit(writer.drop, session)
            raise
        transaction = self._colours[1](writer, session)
        self._enter(transaction)
        return transaction

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        transaction = self._leave()
        await finished(transaction._writer.submit(transaction._finish, failed=error is not None))

    def _check_entry(self) -> None:
        check_apart()
        if self._entered:
            raise ConfigurationError("a transaction's block is entered once: call app.transaction(db) for each.")
        me = _whoever()
        if any(who is me and name == self._name and held.is_open for who, name, held in _current.get()):
            raise ConfigurationError(
                f"a transaction on database {self._name} is open here already, and this one would commit apart from "
                "it: hand tx on to the function that needs it."
            )

    def _enter(self, transaction: Sending) -> None:
        self._entered, self._transaction = True, transaction
        self._outer = _current.get()
        _current.set((*self._outer, (_whoever(), self._name, transaction)))

    def _leave(self) -> Sending:
        transaction, self._transaction = self._transaction, None
        assert transaction is not None
        _current.set(self._outer)
        return transaction


class TransactionBlock(Block[Transaction, AsyncTransaction]):
    """`app.transaction(db)` on a SQL database."""

    _colours = (Transaction, AsyncTransaction)


def _runs_in_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True

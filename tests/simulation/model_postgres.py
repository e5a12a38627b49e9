"""PostgreSQL as the sink sees it [sans-IO]: sessions, READ COMMITTED, row locks, savepoints, deadlocks.

What is modelled follows PostgreSQL's manual (13.2.1 read committed, 13.3.2 row locks, INSERT's ON CONFLICT) and is held
against a real server by `test_model_postgres.py`, with random programs. A statement sees what was committed when it
began. Whoever changes or locks a row that another open transaction has changed or locked waits for its end, and then
looks at the row again. The one whose waiting closes a circle of waiters is the victim of the deadlock: on a server,
too, where each step comes after the `deadlock_timeout` of those before it.

A session executes one statement at a time and tells its end through `done`, at once or after others have ended.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from enum import Enum
from itertools import count
from typing import Any, NamedTuple

import psycopg
from psycopg import errors
from psycopg.pq import TransactionStatus

from tests.simulation.model_sql import Control, Create, Delete, Expression, Insert, Select, Statement, Update, parse

__all__ = ["Done", "ModelServer", "ModelSession", "Result"]

Values = dict[str, Any]


class Result(NamedTuple):
    """What a statement gave; `rows` is None for one that gives none."""

    status: str
    count: int = -1
    rows: list[tuple[Any, ...]] | None = None


_BORN = "(born)"
"""Stands beside a row's columns: a row that is deleted and inserted again is another one, and nobody waited for it."""
Done = Callable[[Result | None, psycopg.Error | None], None]
_Work = Generator["_Transaction", None, Result]
"""Yields whom it waits for."""


class _Mark(Enum):
    """No row: never there, or deleted."""

    GONE = 0


class _Row:
    """One primary key's row, or a row of a table without one."""

    __slots__ = ("committed", "is_changed", "pending", "writer")

    def __init__(self) -> None:
        self.committed: Values | _Mark = _Mark.GONE
        self.pending: Values | _Mark = _Mark.GONE
        self.writer: _Transaction | None = None
        """Who has locked the row; `pending` is how it stands for him."""
        self.is_changed = False

    def seen_by(self, transaction: _Transaction) -> Values | _Mark:
        return self.pending if self.writer is transaction else self.committed


class _Table:
    def __init__(self, create: Create) -> None:
        self.create = create
        self.rows: list[_Row] = []
        self.by_key: dict[tuple[Any, ...], _Row] = {}


class _Undo(NamedTuple):
    row: _Row
    pending: Values | _Mark
    is_changed: bool
    was_locked: bool


class _Transaction:
    def __init__(self, session: ModelSession, number: int) -> None:
        self.session = session
        self.number = number
        self.undo: list[_Undo] = []
        self.savepoints: list[tuple[str, int]] = []
        self.waits_for: _Transaction | None = None

    def __repr__(self) -> str:
        return f"<transaction {self.number}>"


class ModelServer:
    """The database. Everything in it survives its sessions."""

    def __init__(self) -> None:
        self.tables: dict[str, _Table] = {}
        self.sessions: list[ModelSession] = []
        self._numbers = count(1)
        self._waiting: list[ModelSession] = []
        """Sessions whose statement waits for another transaction, in the order in which they began to wait."""

    def connect(self) -> ModelSession:
        session = ModelSession(self)
        self.sessions.append(session)
        return session

    def new_transaction(self, session: ModelSession) -> _Transaction:
        return _Transaction(session, next(self._numbers))

    def table(self, name: str) -> _Table:
        if name not in self.tables:
            raise errors.UndefinedTable(f'relation "{name}" does not exist')
        return self.tables[name]

    def committed(self, name: str) -> list[Values]:
        """Every row, for whoever judges a run."""
        found = [row.committed for row in self.tables[name].rows]
        return [
            {column: value for column, value in values.items() if column != _BORN}
            for values in found
            if not isinstance(values, _Mark)
        ]

    def new_mark(self) -> int:
        return next(self._numbers)

    # --- Locks ---

    def lock(self, transaction: _Transaction, row: _Row) -> None:
        assert row.writer in (None, transaction)
        transaction.undo.append(_Undo(row, row.pending, row.is_changed, row.writer is transaction))
        if row.writer is None:
            row.writer, row.pending, row.is_changed = transaction, row.committed, False

    def change(self, transaction: _Transaction, row: _Row, values: Values | _Mark) -> None:
        self.lock(transaction, row)
        row.pending, row.is_changed = values, True

    def roll_back(self, transaction: _Transaction, to: int = 0) -> None:
        """Undo everything behind this point, and let those go on who waited for it."""
        while len(transaction.undo) > to:
            row, row.pending, row.is_changed, was_locked = transaction.undo.pop()
            if not was_locked:
                row.writer = None
        self.wake()

    def commit(self, transaction: _Transaction) -> None:
        for row, *_ in transaction.undo:
            if row.writer is transaction:
                row.committed, row.writer, row.is_changed = row.pending, None, False
        transaction.undo.clear()
        self.wake()

    def begin_wait(self, session: ModelSession) -> None:
        self._waiting.append(session)

    def end_wait(self, session: ModelSession) -> None:
        if session in self._waiting:
            self._waiting.remove(session)

    def wake(self) -> None:
        """Let every waiting statement look again, the one that waits longest first."""
        for session in list(self._waiting):
            if session in self._waiting:
                session.go_on()


class ModelSession:
    """One backend. Its transaction is rolled back when it ends."""

    def __init__(self, server: ModelServer) -> None:
        self.server = server
        self.status = TransactionStatus.IDLE
        self.is_over = False
        self._transaction: _Transaction | None = None
        self._work: _Work | None = None
        self._done: Done | None = None
        self._is_running = False

    @property
    def is_waiting(self) -> bool:
        return self._work is not None

    # --- Statements ---

    def execute(self, sql: str, parameters: Sequence[Any], done: Done) -> None:
        """Run a statement, or a script in one transaction; `done` is called when it has ended."""
        assert self._work is None
        assert not self.is_over
        self._done = done
        try:
            statements = parse(sql)
            if len(statements) == 1 and isinstance(statements[0], Control):
                self._finish(self._control(statements[0]), None)
                return
            if self.status is TransactionStatus.INERROR:
                raise errors.InFailedSqlTransaction("current transaction is aborted, commands ignored until its end")
        except psycopg.Error as error:
            if self.status is TransactionStatus.INTRANS and self._transaction is not None:
                self._fail(self._transaction, error)
            else:
                self._finish(None, error)
            return
        if self._transaction is None:
            self._transaction = self.server.new_transaction(self)
        self._work = self._run(statements, parameters, self._transaction)
        self.go_on()

    def go_on(self) -> None:
        """Run until the statement has ended or has to wait."""
        work = self._work
        if work is None or self._is_running:
            return
        transaction = self._transaction
        assert transaction is not None
        self._is_running = True
        self.server.end_wait(self)
        transaction.waits_for = None
        try:
            holder = next(work)
        except StopIteration as end:
            self._is_running, self._work = False, None
            if self.status is TransactionStatus.IDLE:
                self._transaction = None
                self.server.commit(transaction)
            self._finish(end.value, None)
            return
        except psycopg.Error as error:
            self._is_running, self._work = False, None
            self._fail(transaction, error)
            return
        self._is_running = False
        transaction.waits_for = holder
        if _closes_circle(transaction):
            transaction.waits_for, self._work = None, None
            self._fail(transaction, errors.DeadlockDetected("deadlock detected"))
            return
        self.server.begin_wait(self)

    def cancel(self) -> None:
        """The statement waits for longer than it may (statement_timeout)."""
        if self._work is not None:
            self._work = None
            self.server.end_wait(self)
            assert self._transaction is not None
            self._transaction.waits_for = None
            self._fail(self._transaction, errors.QueryCanceled("canceling statement due to statement timeout"))

    def terminate(self) -> None:
        """The backend ends; whoever waits for its answer gets none."""
        if self.is_over:
            return
        self.is_over = True
        self.server.sessions.remove(self)
        self._work, self._done = None, None
        self.server.end_wait(self)
        self._end(commit=False)

    def _fail(self, transaction: _Transaction, error: psycopg.Error) -> None:
        if self.status is TransactionStatus.IDLE:
            self._transaction = None
            self.server.roll_back(transaction)
        else:
            # Its locks are freed at once: PostgreSQL aborts the transaction here and only waits to be told.
            self.status = TransactionStatus.INERROR
            to = transaction.savepoints[-1][1] if transaction.savepoints else 0
            self.server.roll_back(transaction, to)
        self._finish(None, error)

    def _finish(self, result: Result | None, error: psycopg.Error | None) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(result, error)

    # --- Transactions ---

    def _control(self, control: Control) -> Result:
        verb, name = control
        if verb == "BEGIN" and self.status is not TransactionStatus.INERROR:
            if self.status is TransactionStatus.IDLE:
                self._transaction = self.server.new_transaction(self)
                self.status = TransactionStatus.INTRANS
            return Result("BEGIN")
        if verb in ("COMMIT", "ROLLBACK"):
            commit = verb == "COMMIT" and self.status is not TransactionStatus.INERROR
            self._end(commit)
            return Result("COMMIT" if commit else "ROLLBACK")
        if self.status is TransactionStatus.INERROR and verb != "ROLLBACK TO":
            raise errors.InFailedSqlTransaction("current transaction is aborted, commands ignored until its end")
        transaction = self._transaction
        if verb == "NOTHING":
            return Result("SET CONSTRAINTS")
        if transaction is None:
            raise errors.NoActiveSqlTransaction(f"{verb} can only be used in transaction blocks")
        if verb == "SAVEPOINT":
            transaction.savepoints.append((name, len(transaction.undo)))
            return Result("SAVEPOINT")
        places = [at for at, (known, _) in enumerate(transaction.savepoints) if known == name]
        if not places:
            raise errors.InvalidSavepointSpecification(f'savepoint "{name}" does not exist')
        if verb == "RELEASE":
            del transaction.savepoints[places[-1] :]
            return Result("RELEASE")
        del transaction.savepoints[places[-1] + 1 :]
        self.status = TransactionStatus.INTRANS
        self.server.roll_back(transaction, transaction.savepoints[-1][1])
        return Result("ROLLBACK")

    def _end(self, commit: bool) -> None:
        transaction, self._transaction = self._transaction, None
        self.status = TransactionStatus.IDLE
        if transaction is not None:
            if commit:
                self.server.commit(transaction)
            else:
                self.server.roll_back(transaction)

    # --- What statements do ---

    def _run(self, statements: list[Statement], parameters: Sequence[Any], transaction: _Transaction) -> _Work:
        result = Result("")
        for statement in statements:
            if isinstance(statement, Create):
                self.server.tables.setdefault(statement.table, _Table(statement))
                result = Result("CREATE TABLE")
            elif isinstance(statement, Insert):
                result = yield from self._insert(statement, parameters, transaction)
            elif isinstance(statement, Update):
                result = yield from self._update(statement, parameters, transaction)
            elif isinstance(statement, Delete):
                result = yield from self._delete(statement, parameters, transaction)
            elif isinstance(statement, Select):
                result = yield from self._select(statement, parameters, transaction)
        return result

    def _found(
        self, table: _Table, where: Expression, parameters: Sequence[Any], transaction: _Transaction
    ) -> list[_Row]:
        """The rows that the statement sees, as it begins."""
        found = []
        for row in table.rows:
            values = row.seen_by(transaction)
            if not isinstance(values, _Mark) and where(values, {}, parameters):
                found.append(row)
        return found

    def _locked(
        self, rows: list[_Row], where: Expression, parameters: Sequence[Any], transaction: _Transaction
    ) -> Generator[_Transaction, None, list[tuple[_Row, Values]]]:
        """Lock one after the other; one that another transaction changed meanwhile is looked at again."""
        locked = []
        born = [None if isinstance(seen := row.seen_by(transaction), _Mark) else seen[_BORN] for row in rows]
        for row, mark in zip(rows, born, strict=True):
            while row.writer not in (None, transaction):
                assert row.writer is not None
                yield row.writer
            values = row.seen_by(transaction)
            if not isinstance(values, _Mark) and values[_BORN] == mark and where(values, {}, parameters):
                self.server.lock(transaction, row)
                locked.append((row, values))
        return locked

    def _update(self, update: Update, parameters: Sequence[Any], transaction: _Transaction) -> _Work:
        table = self.server.table(update.table)
        changed = 0
        for row in self._found(table, update.where, parameters, transaction):
            for _, values in (yield from self._locked([row], update.where, parameters, transaction)):
                new = values | {name: value(values, {}, parameters) for name, value in update.changes.items()}
                _check_required(table, new)
                self.server.change(transaction, row, new)
                changed += 1
        return Result(f"UPDATE {changed}", changed)

    def _delete(self, delete: Delete, parameters: Sequence[Any], transaction: _Transaction) -> _Work:
        deleted = 0
        for row in self._found(self.server.table(delete.table), delete.where, parameters, transaction):
            for _ in (yield from self._locked([row], delete.where, parameters, transaction)):
                self.server.change(transaction, row, _Mark.GONE)
                deleted += 1
        return Result(f"DELETE {deleted}", deleted)

    def _insert(self, insert: Insert, parameters: Sequence[Any], transaction: _Transaction) -> _Work:
        table = self.server.table(insert.table)
        given = {name: value({}, {}, parameters) for name, value in zip(insert.columns, insert.values, strict=True)}
        new: Values = dict.fromkeys(table.create.columns) | table.create.defaults | given
        new[_BORN] = self.server.new_mark()
        _check_required(table, new)
        key = tuple(new[name] for name in table.create.key)
        row = table.by_key.get(key) if key else None
        if row is None:
            row = _Row()
            table.rows.append(row)
            if key:
                table.by_key[key] = row
        while True:
            # A row that somebody has only locked is there for sure; one that he has changed may go or come.
            while row.writer not in (None, transaction) and row.is_changed:
                assert row.writer is not None
                yield row.writer
            there = row.seen_by(transaction)
            if isinstance(there, _Mark):
                self.server.change(transaction, row, new)
                return _inserted(insert, new)
            if insert.on_conflict == "":
                raise errors.UniqueViolation(f"duplicate key value violates unique constraint of {insert.table}")
            if insert.on_conflict == "nothing":
                return Result("INSERT 0 0", 0, [] if insert.returning else None)
            if row.writer not in (None, transaction):
                assert row.writer is not None
                yield row.writer
                continue
            updated = there | {name: value(there, new, parameters) for name, value in insert.changes.items()}
            _check_required(table, updated)
            self.server.change(transaction, row, updated)
            return _inserted(insert, updated)

    def _select(self, select: Select, parameters: Sequence[Any], transaction: _Transaction) -> _Work:
        table = self.server.table(select.table)
        found = self._found(table, select.where, parameters, transaction)
        if select.for_update:
            seen = [values for _, values in (yield from self._locked(found, select.where, parameters, transaction))]
        else:
            seen = [values for row in found if not isinstance(values := row.seen_by(transaction), _Mark)]
        seen.sort(key=lambda values: tuple(values[name] for name in select.order))
        if any(kind in ("count", "sum") for kind, _ in select.outputs):
            rows = [tuple(_aggregate(kind, name, seen) for kind, name in select.outputs)]
        else:
            rows = [tuple(values[name] if name else 1 for _, name in select.outputs) for values in seen]
        if select.is_distinct:
            rows = list(dict.fromkeys(rows))
        rows = rows[: select.limit]
        return Result(f"SELECT {len(rows)}", len(rows), rows)


def _inserted(insert: Insert, values: Values) -> Result:
    rows = [tuple(values[name] for name in insert.returning)] if insert.returning else None
    return Result("INSERT 0 1", 1, rows)


def _aggregate(kind: str, name: str, seen: list[Values]) -> Any:
    if kind == "count":
        return len(seen)
    known = [values[name] for values in seen if values[name] is not None]
    return sum(known) if known else None


def _check_required(table: _Table, values: Values) -> None:
    for name in table.create.columns:
        if name in table.create.required and values[name] is None:
            raise errors.NotNullViolation(f'null value in column "{name}" violates not-null constraint')


def _closes_circle(transaction: _Transaction) -> bool:
    at = transaction.waits_for
    while at is not None:
        if at is transaction:
            return True
        at = at.waits_for
    return False

"""Records of a SQLAlchemy session: they wait with it, and are its last statements before COMMIT.

A record belongs to what it was added in: when a savepoint is rolled back its records are forgotten, too, and with the
session's transaction all of them are.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from semel.databases.borrowed import borrow
from semel.errors import ConfigurationError
from semel.outbox.calling import call
from semel.outbox.records import NewRow, Outgoing, inserts

__all__ = ["add"]

_KEY = "semel.outbox"
"""Where a session keeps its records, in `session.info`."""


class _Pending:
    """The records of one session's transaction, and how many there were when each of its savepoints began."""

    def __init__(self) -> None:
        self.outgoing = Outgoing()
        self.marks: dict[Any, int] = {}
        self.connection: Any = None
        """The connection whose COMMIT writes them."""
        self.called_for = ""
        """The URL at which they were written, when its relays are to be called after the COMMIT."""
        self.committed = False
        """The session's own transaction ended well: COMMIT itself may be another's, and come later."""

    def forget(self) -> None:
        """The transaction is over."""
        self.outgoing.keep(0)
        self.connection = None


def add(session: Any, row: NewRow) -> None:
    """Add a record to the session's transaction. Raises `DataError` when it has too many."""
    if isinstance(session, scoped_session | async_scoped_session):
        session = session()
    if isinstance(session, AsyncSession):
        session = session.sync_session
    if session.twophase:
        raise ConfigurationError("enqueue_in: a session with twophase=True has two ends, and records go with one.")
    pending = session.info.get(_KEY)
    if pending is None:
        pending = session.info[_KEY] = _Pending()
        transaction = session.get_nested_transaction()
        while transaction is not None and transaction.nested:
            pending.marks[transaction] = 0
            transaction = transaction.parent
        for name, listener in _LISTENERS.items():
            event.listen(session, name, listener)
    if not session.in_transaction():
        session.begin()  # Nothing is sent to the database; but from here on there is an end that is told.
    pending.outgoing.add(row)


def _before_commit(session: Session) -> None:
    """The first that is known of a coming COMMIT: from here on the connection is listened to.

    It may be only a savepoint's end, or that of a savepoint that is open when the whole is committed, and what was
    added to the session is not written yet. The connection's own event comes once, and last.
    """
    pending: _Pending = session.info[_KEY]
    if not pending.outgoing.rows:
        session.flush()  # It may add records.
    if pending.outgoing.rows:
        connection = session.connection()
        if pending.connection is not connection:
            pending.connection = connection
            event.listen(connection, "commit", lambda connection: _write(pending, connection))
            event.listen(connection, "rollback", lambda _: pending.forget())


def _write(pending: _Pending, connection: Connection) -> None:
    """COMMIT is the next statement."""
    if pending.connection is not connection or not pending.outgoing.rows:
        return
    run = borrow(connection).run
    for statement in inserts(pending.outgoing.rows):
        run(*statement)
    pending.forget()
    if connection.dialect.name == "postgresql":
        pending.called_for = connection.engine.url.set(drivername="postgresql").render_as_string(hide_password=False)


def _after_commit(session: Session) -> None:
    pending: _Pending = session.info[_KEY]
    pending.committed = not session.in_nested_transaction()
    url, pending.called_for = pending.called_for, ""
    if url:
        call(url)


def _after_transaction_create(session: Session, transaction: Any) -> None:
    if transaction.nested:
        pending: _Pending = session.info[_KEY]
        pending.marks[transaction] = len(pending.outgoing.rows)


def _after_transaction_end(session: Session, transaction: Any) -> None:
    if transaction.parent is None:
        pending: _Pending = session.info[_KEY]
        pending.marks.clear()  # Only now: a savepoint's rollback is told after its end.
        if not pending.committed:
            pending.forget()
        pending.committed = False


def _after_soft_rollback(session: Session, previous: Any) -> None:
    if previous.nested:
        pending: _Pending = session.info[_KEY]
        pending.outgoing.keep(pending.marks.get(previous, 0))


_LISTENERS = {
    "before_commit": _before_commit,
    "after_commit": _after_commit,
    "after_transaction_create": _after_transaction_create,
    "after_transaction_end": _after_transaction_end,
    "after_soft_rollback": _after_soft_rollback,
}

"""Databases as the command line meets them: what a driver says becomes one line, without the password."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from semel.databases.database import Database, open_database, without_password
from semel.errors import Retriable, SemelError
from semel.sinks.sql import migrate as run_migration

__all__ = ["connected", "migrate"]


def migrate(url: str, *, print_only: bool, audit: bool = False) -> str:
    """Make Semel's tables, with `audit` the ledger that a history needs too; the SQL.

    Raises `Retriable` when the database cannot be reached.
    """
    with _reaching(url):
        return run_migration(url, print_only=print_only, audit=audit)


@contextmanager
def connected(url: str) -> Iterator[Database | None]:
    """A connection for one look or one command; None for a SQLite file that is not there, which looking would make.

    Raises `Retriable` when the database cannot be reached, inside the block too.
    """
    database = open_database(url)
    path = getattr(database, "path", None)
    if path is not None and not path.exists():
        yield None
        return
    with _reaching(url):
        try:
            database.connect()
            yield database
        finally:
            database.close()


@contextmanager
def _reaching(url: str) -> Iterator[None]:
    try:
        yield
    except SemelError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise Retriable(f"the database {without_password(url)} cannot be used now: {text}") from error

"""Databases as the command line meets them: what a driver says becomes one line, without the password."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from semel.errors import Retriable, SemelError
from semel.sinks.sql import list_parked
from semel.sinks.sql import migrate as run_migration
from semel.sinks.sql.database import open_database, without_password

__all__ = ["migrate", "parked_in_database"]


def migrate(url: str, *, print_only: bool, audit: bool = False) -> str:
    """Make Semel's tables, with `audit` the ledger that a history needs too; the SQL.

    Raises `Retriable` when the database cannot be reached.
    """
    with _reaching(url):
        return run_migration(url, print_only=print_only, audit=audit)


def parked_in_database(url: str) -> list[dict[str, Any]]:
    """The sinks' parked records. Raises `Retriable` when the database cannot be reached."""
    path = getattr(open_database(url), "path", None)
    if path is not None and not path.exists():
        return []  # Looking into a SQLite file that is not there would make it.
    with _reaching(url):
        return list_parked(url)


@contextmanager
def _reaching(url: str) -> Iterator[None]:
    try:
        yield
    except SemelError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise Retriable(f"the database {without_password(url)} cannot be used now: {text}") from error

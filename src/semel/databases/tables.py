"""Semel's tables in a user's database: looking whether they are there and may be used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from semel.databases.database import Database, is_missing_privilege, is_missing_table, without_password
from semel.errors import ConfigurationError

__all__ = ["Need", "check_needs", "refused"]


class Need(NamedTuple):
    """A right on a table, and a statement that needs it too and changes nothing."""

    privilege: str
    table: str
    statement: str


@contextmanager
def refused(database: Database, privilege: str, table: str, whole: str) -> Iterator[None]:
    """A driver's error about a table or a right that is missing becomes a `ConfigurationError`, which says what to do.

    `whole` is what the table is part of, as a message calls it.
    """
    try:
        yield
    except Exception as error:
        where = without_password(database.url)
        if is_missing_table(error):
            raise ConfigurationError(
                f"table {table} is not in {where}. Make {whole} with semel migrate (with --sql it only prints what it "
                "would do)."
            ) from error
        if is_missing_privilege(error):
            said = " ".join(str(error).split())
            raise ConfigurationError(
                f"the user of {where} has no {privilege} on {table} ({said}). Grant it: GRANT {privilege} ON {table} "
                "TO ...;"
            ) from error
        raise


def check_needs(database: Database, needs: Iterable[Need], whole: str) -> None:
    """Raise `ConfigurationError` when a table or a right is missing."""
    for need in needs:
        with refused(database, need.privilege, need.table, whole):
            database.query(need.statement)

"""What a handler gets as `db`: three calls inside the sink's transaction, and no way out of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from semel.databases.database import Cause, Database, Parameters
from semel.databases.statements import StatementRefused
from semel.failpoints import failpoint

__all__ = ["Effects"]


class Effects:
    """Valid while the handler runs. Errors are the driver's own.

    A handler may catch a constraint's error on SQLite and MariaDB and go on; PostgreSQL ends the transaction at the
    first error, so the batch fails then whether it was caught or not (use ON CONFLICT).
    """

    __slots__ = ("_database", "failure", "title")

    def __init__(self, database: Database) -> None:
        self._database: Database | None = database
        self.title = database.title
        """`SQLite`, `PostgreSQL` or `MariaDB`, for a handler that runs on several."""
        self.failure: Exception | None = None
        """The first error that was not the data's fault: the handler may have hidden it behind its own."""

    def execute(self, sql: str, parameters: Parameters = ()) -> int:
        """Run one statement with `?` placeholders; how many rows it changed."""
        return int(self._call("execute", sql, parameters))

    def executemany(self, sql: str, rows: Iterable[Parameters]) -> int:
        """Run one statement once for each row of parameters; how many rows were changed together."""
        return int(self._call("executemany", sql, rows))

    def query(self, sql: str, parameters: Parameters = ()) -> list[tuple[Any, ...]]:
        """Run one statement and return its rows; it sees what this transaction wrote."""
        rows: list[tuple[Any, ...]] = self._call("query", sql, parameters)
        return rows

    def _call(self, method: str, sql: str, parameters: Any) -> Any:
        database = self._database
        if database is None:
            raise StatementRefused("db is used after the handler ended: its transaction is over. Use it inside only.")
        database.check_handler_statement(sql)
        if self.failure is not None or not database.in_transaction:
            # Going on would write outside of the transaction, where nothing is undone with it.
            raise StatementRefused("the transaction ended with an earlier error; nothing more can be written in it.")
        try:
            found = getattr(database, method)(sql, parameters)
        except Exception as error:
            if database.driver_cause(error) not in (None, Cause.DATA):
                self.failure = error
            raise
        failpoint("sink.between_effects")
        return found

    def end(self) -> None:
        """The handler returned or raised: its `db` is of no further use."""
        self._database = None

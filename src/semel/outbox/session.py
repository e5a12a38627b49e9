"""A connection for transactions whose COMMIT is never in doubt for long.

A COMMIT whose answer does not come may have happened. So each connection has a row in `semel_commit`, with the number
of its last transaction, which every transaction raises as one of its last statements. Whoever was not answered reads
the row: it has this transaction's number, or the one before. The read takes the row's lock, and so waits for a session
that is still committing. PostgreSQL's `pg_xact_status` would cost no row, but a server that crashed may give the number
of a transaction that it lost to another one, and MariaDB and SQLite have nothing of the kind.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from semel.databases.database import Database, without_password
from semel.databases.settling import SETTLE_SECONDS, begin, one_line, settled
from semel.env import wall_ms
from semel.errors import Fatal, OutcomeUnknown, Retriable
from semel.failpoints import failpoint
from semel.outbox.records import NewRow, inserts
from semel.outbox.tables import check_outbox

__all__ = ["Session"]

_TRANSACTIONS_PER_ROW = 1_000
"""Then the connection takes a new row: beside a transaction that is open for hours no version of a row can be removed,
and finding the newest of very many takes longer every time."""
_FORGOTTEN_MS = 7 * 86_400_000
"""A row that was not used for so long is of a process that was killed. Deleting one too early would not lead to a wrong
answer: a row that is not there says nothing, and whoever looks for it is told that."""


class Session:
    """A connection and its row. Used by one thread at a time; what it raises besides is the driver's."""

    def __init__(
        self,
        database: Database,
        app: str,
        *,
        settle_seconds: float = SETTLE_SECONDS,
        confirm: Callable[[Database], None] | None = None,
    ) -> None:
        self.database = database
        self._app = app
        self._settle_seconds = settle_seconds
        self._confirm = confirm
        """Raises where the outbox must not be used, in the transaction that takes a row."""
        self._id = ""
        self._number = 0

    def __repr__(self) -> str:
        return f"<Session {self._id} transaction {self._number} on {self.database!r}>"

    @property
    def transaction_id(self) -> str:
        """Names the transaction that is open, or the last one: `session_id/number`, as `semel_commit` has it."""
        return f"{self._id}/{self._number + 1 if self.database.in_transaction else self._number}"

    def begin(self) -> None:
        """Begin a transaction, on a new connection if need be.

        Raises `ConfigurationError` when the outbox's tables are not there or not ours, and `Retriable` when the
        database cannot be reached: nothing happened.
        """
        begin(self.database, opened=self._first_row, reused=self._next_row)

    def commit(self, rows: Sequence[NewRow]) -> None:
        """Write the rows as the last statements, and commit.

        Raises `Retriable` when COMMIT was not answered and did not happen, `OutcomeUnknown` when nobody can tell within
        the limit, and `Fatal` when the transaction is not open any more; else what the database refuses.
        """
        if not self.database.in_transaction:
            raise Fatal(
                "the transaction was ended by other means than this block (tx.connection, or an error that the code "
                f"went on after), so {len(rows)} records were not sent. Let the block commit, and raise what fails."
            )
        failpoint("transaction.before_rows")
        for sql, parameters in inserts(rows):
            self.database.execute(sql, parameters)
        failpoint("transaction.before_mark")
        self._mark()
        failpoint("transaction.before_commit")
        try:
            self.database.commit()
        except OutcomeUnknown as error:
            self._settle(error, rows)
        self._number += 1
        failpoint("transaction.after_commit")

    def rollback(self) -> None:
        """Roll back what is open, without raising."""
        self.database.rollback()

    def close(self) -> None:
        """Close the connection, without raising; its row goes with it where that works."""
        if self.database.connected and not self.database.in_transaction:
            with contextlib.suppress(Exception):  # Then it is deleted in a week.
                self.database.execute("DELETE FROM semel_commit WHERE session_id = ?", (self._id,))
        self.database.close()

    # --- The row ---

    def _first_row(self) -> None:
        check_outbox(self.database, "writer", self._app)
        self._take_row()

    def _next_row(self) -> None:
        if self._number >= _TRANSACTIONS_PER_ROW:
            self._take_row()

    def _take_row(self) -> None:
        """Give back the row of before, and take a new one."""
        now, fresh = wall_ms(), uuid.uuid4().hex
        self.database.begin()
        try:
            if self._confirm is not None:
                self._confirm(self.database)
            self.database.execute(
                "DELETE FROM semel_commit WHERE session_id = ? OR used_at < ?", (self._id, now - _FORGOTTEN_MS)
            )
            self.database.execute(
                "INSERT INTO semel_commit (session_id, number, used_at) VALUES (?, 0, ?)", (fresh, now)
            )
            self.database.commit()
        except BaseException:
            self.database.rollback()
            raise
        self._id, self._number = fresh, 0

    def _mark(self) -> None:
        changed = self.database.execute(
            "UPDATE semel_commit SET number = ?, used_at = ? WHERE session_id = ?",
            (self._number + 1, wall_ms(), self._id),
        )
        if changed != 1:
            self.database.close()
            raise Retriable(
                f"row {self._id} of semel_commit is gone from {without_password(self.database.url)}: it was deleted, "
                "or the database was restored. The transaction was rolled back; run it again."
            )

    def _settle(self, cause: OutcomeUnknown, rows: Sequence[NewRow]) -> None:
        """Return when the transaction is committed, raise `Retriable` when it is not."""
        failpoint("transaction.before_settle")
        found = self._read_number(cause, rows)
        failpoint("transaction.after_settle")
        if found != self._number + 1:
            self.database.close()
            raise Retriable(
                f"{cause}. Nothing was committed: transaction {self._id}/{self._number + 1} is not in semel_commit. "
                "Run it again."
            ) from cause

    def _read_number(self, cause: OutcomeUnknown, rows: Sequence[NewRow]) -> int:
        def read() -> list[tuple[Any, ...]]:
            self.database.begin()
            # A write, which waits for a session that is still committing, and takes what is seen to the disk.
            self.database.execute("UPDATE semel_commit SET used_at = used_at + 1 WHERE session_id = ?", (self._id,))
            found = self.database.query("SELECT number FROM semel_commit WHERE session_id = ?", (self._id,))
            self.database.commit()
            return found

        try:
            found = settled(self.database, read, self._settle_seconds)
        except Exception as error:
            raise self._unknown(f"and cannot be asked ({one_line(error)})", cause, rows) from error
        if not found or found[0][0] not in (self._number, self._number + 1):
            self.database.close()
            raise self._unknown("and the row that would tell is gone: the database was restored", cause, rows)
        return int(found[0][0])

    # --- Errors ---

    def _unknown(self, why: str, cause: OutcomeUnknown, rows: Sequence[NewRow]) -> OutcomeUnknown:
        ids = ", ".join(row.msg_id for row in rows[:3]) + (", ..." if len(rows) > 3 else "")
        look = f"SELECT number FROM semel_commit WHERE session_id = '{self._id}'"  # noqa: S608 - to be read
        return OutcomeUnknown(
            f"{cause} {why}. Transaction {self._id}/{self._number + 1} of {len(rows)} records ({ids}) is in the "
            f"database whole or not at all. When the database is there again, look before you repeat it: {look} "
            f"gives {self._number + 1} if it was committed, {self._number} if not. Its records have these ids."
        )

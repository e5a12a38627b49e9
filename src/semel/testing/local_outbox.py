"""The outbox of a test's database: its tables, and its rows as the relay would publish them."""

from __future__ import annotations

from typing import NamedTuple

from semel.databases.database import open_database
from semel.databases.spec import DatabaseSpec
from semel.outbox.rows import MSG_ID_HEADER, decode_headers
from semel.outbox.tables import schema_sql
from semel.types import Header

__all__ = ["LocalOutbox", "LocalRow"]


class LocalRow(NamedTuple):
    """A record that is committed and not published."""

    seq: int
    msg_id: str
    topic: str
    key: bytes | None
    value: bytes | None
    record_headers: tuple[Header, ...]


class LocalOutbox:
    """Rows are published between the steps of a test, and nothing fails between: so deleting each is enough."""

    def __init__(self, spec: DatabaseSpec) -> None:
        self._database = open_database(spec.url)
        self._database.connect()
        self._database.migrate(schema_sql(self._database.title))
        if spec.schema:
            self._database.migrate(spec.schema)

    def rows(self) -> list[LocalRow]:
        """What is committed and not held, in order."""
        found = self._database.query(
            "SELECT seq, msg_id, topic, record_key, record_value, headers FROM semel_outbox "
            "WHERE held IS NULL ORDER BY seq"
        )
        return [
            LocalRow(
                seq,
                msg_id,
                topic,
                None if key is None else bytes(key),
                None if value is None else bytes(value),
                (*decode_headers(headers), (MSG_ID_HEADER, msg_id.encode())),
            )
            for seq, msg_id, topic, key, value, headers in found
        ]

    def delete(self, row: LocalRow) -> None:
        """It is in Kafka."""
        self._database.execute("DELETE FROM semel_outbox WHERE seq = ?", (row.seq,))

    def close(self) -> None:
        """Close the connection."""
        self._database.close()

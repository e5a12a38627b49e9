"""The SQL sink: SQLite, PostgreSQL and MariaDB, with the position in the transaction of the effects."""

from semel.sinks.sql.parking import list_parked
from semel.sinks.sql.sink import SqlSink
from semel.sinks.sql.tables import migrate

__all__ = ["SqlSink", "list_parked", "migrate"]

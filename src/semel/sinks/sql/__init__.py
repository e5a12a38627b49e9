"""The SQL sink: SQLite and PostgreSQL, with the position in the transaction of the effects."""

from semel.sinks.sql.database import Database, connect, open_database
from semel.sinks.sql.parking import list_parked
from semel.sinks.sql.sink import SqlSink
from semel.sinks.sql.tables import migrate

__all__ = ["Database", "SqlSink", "connect", "list_parked", "migrate", "open_database"]

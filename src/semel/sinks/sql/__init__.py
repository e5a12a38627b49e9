"""The SQL sink: SQLite and PostgreSQL, with the position in the transaction of the effects."""

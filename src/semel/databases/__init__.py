"""Connections to databases: one shape for every driver, transactions by hand, and whose fault an error is."""

from semel.databases.database import Database, connect, open_database

__all__ = ["Database", "connect", "open_database"]

"""Every test of the outbox runs on each database that it can be in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from semel.databases import Database, connect
from semel.databases.database import title_of
from semel.outbox.tables import schema_sql
from tests.outbox.bank import SCHEMA, Bank


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    """A connection to a database with an empty outbox."""
    found = connect(url)
    found.migrate(schema_sql(title_of(url)))
    yield found
    found.close()


@pytest.fixture
def bank(url: str, database: Database) -> Iterator[Bank]:
    """An app on an empty database."""
    database.migrate(SCHEMA)
    found = Bank(url, database)
    yield found
    found.app.close()

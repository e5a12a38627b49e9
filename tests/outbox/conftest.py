"""Every test of the outbox runs on each database that it can be in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from semel.databases import Database, connect
from semel.databases.database import title_of
from semel.outbox.tables import schema_sql
from tests.outbox.bank import SCHEMA, Bank


@pytest.fixture(
    params=[
        "sqlite",
        pytest.param("postgres", marks=pytest.mark.postgres),
        pytest.param("mariadb", marks=pytest.mark.mariadb),
    ]
)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/outbox.db"
    return str(request.getfixturevalue(request.param).new_database())


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

"""Every test of the dual write runs on each database that it can be in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from semel.databases import open_database
from semel.dualwrite.sql import SqlStore
from semel.dualwrite.store import Store

DATABASES = [
    "sqlite",
    pytest.param("postgres", marks=pytest.mark.postgres),
    pytest.param("mariadb", marks=pytest.mark.mariadb),
]


@pytest.fixture(params=DATABASES)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/dual.db"
    return str(request.getfixturevalue(request.param).new_database())


@pytest.fixture
def new_store(url: str) -> Iterator[Callable[[], Store]]:
    """Makes stores of one database, as processes of one app have them."""
    made: list[Store] = []

    def new() -> Store:
        store = SqlStore(open_database(url), "bank", "database")
        store.open("bank", "cluster-a", create_tables=True)
        made.append(store)
        return store

    yield new
    for store in made:
        store.close()

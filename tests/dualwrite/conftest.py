"""Every test of the dual write runs on each database that it can be in, and what a store holds to on every store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from semel.databases import open_database
from semel.databases.database import is_cache
from semel.dualwrite.sql import SqlStore
from semel.dualwrite.store import Store
from tests.conftest import Address
from tests.dualwrite.world import CacheWorld, World


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On servers `make test` kills at two points; all others are in `make soak`."""
    for item in items:
        is_long = item.path == CRASHES and "sqlite" not in item.name
        if is_long and not any(f"{point}-kill" in item.name for point in SAMPLE):
            item.add_marker(pytest.mark.soak)


CRASHES = Path(__file__).with_name("test_crashes.py")
SAMPLE = ("dual.before_commit", "dual.after_commit")

DATABASES = [
    "sqlite",
    pytest.param("postgres", marks=pytest.mark.postgres),
    pytest.param("mariadb", marks=pytest.mark.mariadb),
]
STORES = [*DATABASES, pytest.param("valkey", marks=pytest.mark.valkey)]


def _empty(kind: str, request: pytest.FixtureRequest, folder: Path) -> str:
    return f"sqlite:///{folder}/dual.db" if kind == "sqlite" else str(request.getfixturevalue(kind).new_database())


@pytest.fixture(params=DATABASES)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty SQL database."""
    return _empty(request.param, request, tmp_path)


@pytest.fixture(params=STORES)
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty store of any kind."""
    return _empty(request.param, request, tmp_path)


def open_store(url: str, app: str = "bank", environment: str = "cluster-a", *, create_tables: bool = True) -> Store:
    """The store of a URL, open."""
    store: Store
    if is_cache(url):
        from semel.dualwrite.valkey.store import ValkeyStore

        store = ValkeyStore(url, app, "database")
    else:
        store = SqlStore(open_database(url), app, "database")
    store.open(app, environment, create_tables=create_tables)
    return store


@pytest.fixture
def new_store(store_url: str) -> Iterator[Callable[[], Store]]:
    """Makes stores of one place, as processes of one app have them."""
    yield from _stores(store_url)


@pytest.fixture
def new_sql_store(url: str) -> Iterator[Callable[[], Store]]:
    """The same in a SQL database."""
    yield from _stores(url)


def _stores(url: str) -> Iterator[Callable[[], Store]]:
    made: list[Store] = []

    def new() -> Store:
        made.append(open_store(url))
        return made[-1]

    yield new
    for store in made:
        store.close()


@pytest.fixture
def world(url: str, embedded: Address, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A bank on an empty database, and the embedded broker."""
    monkeypatch.setenv("SEMEL_KAFKA", embedded.bootstrap)
    found = World(url, embedded.bootstrap)
    yield found
    found.close()


@pytest.fixture
def any_world(store_url: str, embedded: Address, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A bank in an empty store of any kind, and the embedded broker."""
    monkeypatch.setenv("SEMEL_KAFKA", embedded.bootstrap)
    found = (CacheWorld if is_cache(store_url) else World)(store_url, embedded.bootstrap)
    yield found
    found.close()

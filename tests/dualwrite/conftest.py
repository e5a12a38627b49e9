"""Every test of the dual write runs on each database that it can be in, and what a store holds to on every store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from semel.databases import open_database
from semel.databases.database import is_cache, is_documents
from semel.dualwrite.sql import SqlStore
from semel.dualwrite.store import Store
from tests.conftest import DATABASES, Address, empty_database
from tests.dualwrite.memory import memory_at
from tests.dualwrite.world import CacheWorld, DocumentWorld, World

HERE = Path(__file__).parent
SAMPLE = tuple(
    f"{kind}-dual.{point}-kill"
    for kind, point in [
        ("postgres", "before_commit"),
        ("postgres", "after_commit"),
        ("mariadb", "before_commit"),
        ("valkey", "before_commit"),
        ("valkey", "after_commit"),
    ]
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In `make test` programs are killed at every point on SQLite, on servers at some; the rest is in `make soak`."""
    for item in items:
        if item.path.parent == HERE and _is_long(item) and not any(name in item.name for name in SAMPLE):
            item.add_marker(pytest.mark.soak)


def _is_long(item: pytest.Item) -> bool:
    if item.path.stem in ("test_faults", "test_agreement"):
        return "mariadb" in item.name or ("zombie" in item.name and "sqlite-dual.before_commit" not in item.name)
    return item.path.stem == "test_crashes" and "sqlite" not in item.name


SERVERS = [
    *DATABASES,
    pytest.param("valkey", marks=pytest.mark.valkey),
    pytest.param("ferretdb", marks=pytest.mark.peers),
]
STORES = [*SERVERS, "memory"]


@pytest.fixture(params=STORES)
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty store of any kind."""
    return f"memory:///{tmp_path}/dual.db" if request.param == "memory" else empty_database(request, tmp_path)


def open_store(url: str, app: str = "bank", environment: str = "cluster-a", *, create_tables: bool = True) -> Store:
    """The store of a URL, open."""
    store: Store
    if is_cache(url):
        from semel.dualwrite.valkey.store import ValkeyStore

        store = ValkeyStore(url, app, "database")
    elif is_documents(url):
        from semel.dualwrite.documents.connection import DocumentDatabase
        from semel.dualwrite.documents.store import DocumentStore

        store = DocumentStore(DocumentDatabase(url), app, "database")
    elif url.startswith("memory:"):
        from semel.dualwrite.documents.store import DocumentStore

        store = DocumentStore(memory_at(url), app, "database")
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


@pytest.fixture(params=SERVERS)
def any_world(
    request: pytest.FixtureRequest, tmp_path: Path, embedded: Address, monkeypatch: pytest.MonkeyPatch
) -> Iterator[World]:
    """A bank in an empty store of any kind, and the embedded broker."""
    monkeypatch.setenv("SEMEL_KAFKA", embedded.bootstrap)
    url = empty_database(request, tmp_path)
    kind = CacheWorld if is_cache(url) else DocumentWorld if is_documents(url) else World
    found = kind(url, embedded.bootstrap)
    yield found
    found.close()

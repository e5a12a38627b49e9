"""Every test of the SQL sink runs on SQLite, on PostgreSQL and on MariaDB."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def deferring_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database whose constraints may wait for COMMIT; MariaDB's cannot."""
    return empty_database(request, tmp_path)


@pytest.fixture(
    params=[
        "sqlite",
        pytest.param("postgres", marks=pytest.mark.postgres),
        pytest.param("mariadb", marks=pytest.mark.mariadb),
    ]
)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database."""
    return empty_database(request, tmp_path)


def empty_database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database of the kind that the fixture's parameter names."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/sink.db"
    server = request.getfixturevalue(request.param)
    return str(server.new_database())


@pytest.fixture(
    params=[
        "sqlite",
        pytest.param("postgres", marks=pytest.mark.postgres),
        pytest.param("mariadb", marks=pytest.mark.mariadb),
        pytest.param("valkey", marks=pytest.mark.valkey),
    ]
)
def any_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty store of any kind that a sink can write to; on OpenSearch they run in `test_search`."""
    return empty_database(request, tmp_path)

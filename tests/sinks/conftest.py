"""Every test of the SQL sink runs on SQLite, on PostgreSQL and on MariaDB, and what a sink holds to on Valkey too."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import DATABASES, DEFERRING, empty_database


@pytest.fixture(params=DEFERRING)
def deferring_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database whose constraints may wait for COMMIT."""
    return empty_database(request, tmp_path)


@pytest.fixture(params=[*DATABASES, pytest.param("valkey", marks=pytest.mark.valkey)])
def any_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty store of any kind that a sink can write to; on OpenSearch they run in `test_search`."""
    return empty_database(request, tmp_path)

"""A campaign's databases: fresh where that is possible, and never one with somebody's rows."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from semel import App
from semel.errors import ConfigurationError, Retriable
from semel.prove.stores import check_empty, choose_databases, describe
from tests.services.postgres import PostgresServer


def app_at(url: str) -> App:
    app = App("till")
    rows = app.topic("rows", key=str, value=int)
    database = app.database(url)

    @app.sink(rows, database)
    def keep(records: Any, db: Any) -> None: ...

    return app


def test_sqlite_is_a_new_file_and_postgres_the_apps_own(tmp_path: Path) -> None:
    fresh = {"SEMEL_DATABASE": f"sqlite:///{tmp_path}/database.db"}
    assert choose_databases(app_at("sqlite:///mine.db"), {}, tmp_path) == fresh
    assert choose_databases(app_at("postgresql://db/a"), {}, tmp_path) == {"SEMEL_DATABASE": "postgresql://db/a"}
    given = {"": "postgresql://db/b"}
    assert choose_databases(app_at("sqlite:///mine.db"), given, tmp_path) == {"SEMEL_DATABASE": "postgresql://db/b"}
    with pytest.raises(ConfigurationError, match="app till has no such database"):
        choose_databases(app_at("sqlite:///mine.db"), {"other": "sqlite:///x.db"}, tmp_path)


def test_a_database_with_rows_is_refused_and_not_changed(tmp_path: Path) -> None:
    file = tmp_path / "mine.db"
    app = app_at(f"sqlite:///{file}")
    check_empty(app)
    assert not file.exists(), "looking must not make the file"
    with sqlite3.connect(file) as connection:
        connection.execute('CREATE TABLE "odd ""name" (a INTEGER)')
    check_empty(app)
    with sqlite3.connect(file) as connection:
        connection.execute('INSERT INTO "odd ""name" VALUES (1)')
    with pytest.raises(ConfigurationError, match=r'is not empty: there are rows in "odd ""name"'):
        check_empty(app)
    assert sqlite3.connect(file).execute('SELECT count(*) FROM "odd ""name"').fetchone() == (1,)


def test_postgres_with_rows_is_refused(postgres: PostgresServer) -> None:
    import psycopg

    url = postgres.new_database()
    app = app_at(url)
    check_empty(app)
    assert describe(app)[0].startswith("PostgreSQL ")
    with psycopg.connect(url) as connection:
        connection.execute('CREATE TABLE "Rows%" (a INTEGER)')
        connection.execute('INSERT INTO "Rows%" VALUES (1)')
    with pytest.raises(ConfigurationError, match=r'is not empty: there are rows in public[.]"Rows%"'):
        check_empty(app)


def test_a_database_that_does_not_answer_is_named_without_its_password() -> None:
    with pytest.raises(Retriable) as raised:
        check_empty(app_at("postgresql://app:canary@127.0.0.1:1/till"))
    assert "127.0.0.1" in str(raised.value)
    assert "canary" not in str(raised.value)

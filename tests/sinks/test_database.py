"""Opening, migrating, and sorting errors: what a user sees when the database is not as it should be."""

from __future__ import annotations

import builtins
import sqlite3
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psycopg
import pytest

from semel.databases import connect, open_database
from semel.databases.database import Cause, without_password
from semel.env import Env
from semel.errors import ConfigurationError
from semel.sinks.contract import Unavailable
from semel.sinks.sql import SqlSink, list_parked, migrate
from tests.services.postgres import PostgresServer
from tests.sinks import ledger


def test_migrate_makes_the_tables_and_may_run_again(url: str) -> None:
    printed = migrate(url, print_only=True)
    assert ledger.rows(url, "SELECT * FROM semel_position") == []
    with pytest.raises(Exception, match="semel_position"):
        connect(url).query("SELECT * FROM semel_position")
    assert migrate(url) == printed
    assert migrate(url, schema="CREATE TABLE IF NOT EXISTS mine (a INTEGER)").endswith("mine (a INTEGER)\n")
    migrate(url, schema="CREATE TABLE IF NOT EXISTS mine (a INTEGER)")
    assert connect(url).query("SELECT COUNT(*) FROM semel_position, semel_parked, mine") == [(0,)]


def test_what_is_printed_can_be_run_by_hand(url: str) -> None:
    tool = connect(url)
    tool.migrate(migrate(url, print_only=True))
    tool.close()
    sink = ledger.sink(url, create_tables=False)
    sink.close()


def test_without_tables_production_says_what_to_do(url: str) -> None:
    with pytest.raises(ConfigurationError, match="semel migrate"):
        ledger.sink(url, create_tables=False)


def test_a_schema_with_a_mistake_says_so_and_changes_nothing(url: str) -> None:
    with pytest.raises(ConfigurationError, match="refused the schema"):
        migrate(url, schema="CREATE TABLE good (a INTEGER); CREATE TABEL bad (a INTEGER);")
    assert ledger.rows(url, "SELECT * FROM good") == []


def test_many_processes_may_migrate_at_once(url: str) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            ledger.sink(url).close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert errors == []


def test_list_parked_of_a_database_without_tables_is_empty(url: str) -> None:
    tool = connect(url)
    assert list_parked(tool) == []
    tool.close()


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("mysql://x", "not on MySQL"),
        ("oracle://x", "no database that Semel knows"),
        ("sqlite:///:memory:", "in memory"),
        ("sqlite://", "names no file"),
        ("sqlite:shop.db", "names no file"),
        ("sqlite:///x.db?mode=ro", "options"),
        ("postgresql://localhost/x?no_such_option=1", "not a PostgreSQL URL"),
    ],
)
def test_urls_that_cannot_work(url: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        open_database(url)


def test_sqlite_paths() -> None:
    assert open_database("sqlite:////var/x%20y.db").path == Path("/var/x y.db")  # type: ignore[attr-defined]
    assert open_database("sqlite:///a/b.db").path == Path.cwd() / "a/b.db"  # type: ignore[attr-defined]


def test_passwords_stay_out_of_texts() -> None:
    assert without_password("postgresql://me:se:cret@host/db") == "postgresql://me:***@host/db"
    assert without_password("postgresql://host/db?user=me&password=secret&x=1") == (
        "postgresql://host/db?user=me&password=***&x=1"
    )
    assert "secret" not in repr(open_database("postgresql://me:secret@host/db"))


@pytest.mark.parametrize(
    ("url", "module", "driver", "extra"),
    [
        ("postgresql://host/db", "semel.databases.postgres", "psycopg", "postgres"),
        ("mariadb://host/db", "semel.databases.mariadb", "pymysql", "mariadb"),
    ],
)
def test_a_missing_driver_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, url: str, module: str, driver: str, extra: str
) -> None:
    real = builtins.__import__

    def without_driver(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == driver:
            raise ImportError(f"No module named '{driver}'")
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(builtins, "__import__", without_driver)
    with pytest.raises(ConfigurationError, match=rf"semel\[{extra}\]"):
        open_database(url)


@pytest.mark.postgres
def test_a_server_that_is_not_there_is_an_outage_without_a_password_in_it(postgres: PostgresServer) -> None:
    url = f"postgresql://me:hunter2@127.0.0.1:{postgres.port}/no_such_database"
    sink = SqlSink(ledger.spec(url), "shop.totals", "c", env=Env(), create_tables=True)
    with pytest.raises(Unavailable) as raised:
        sink.open()
    assert "hunter2" not in str(raised.value)
    assert "no_such_database" in str(raised.value)


@pytest.mark.postgres
@pytest.mark.parametrize(
    ("sql", "cause"),
    [
        ("SELECT 1 / 0", Cause.DATA),
        ("SELECT 'x'::integer", Cause.DATA),
        ("SELEC 1", Cause.DATA),
        ("SELECT * FROM nowhere", Cause.INFRASTRUCTURE),
        ("SELECT nothing FROM pg_class", Cause.INFRASTRUCTURE),
        ("SELECT pg_cancel_backend(pg_backend_pid())", Cause.INFRASTRUCTURE),
        ("SELECT pg_terminate_backend(pg_backend_pid())", Cause.INFRASTRUCTURE),
        ("DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '40P01'; END $$", Cause.CONFLICT),
        ("DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '40001'; END $$", Cause.CONFLICT),
        ("DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '53100'; END $$", Cause.INFRASTRUCTURE),
        ("DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '25006'; END $$", Cause.INFRASTRUCTURE),
        ("DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '55P03'; END $$", Cause.LOCKED),
        ("DO $$ BEGIN RAISE EXCEPTION 'mine'; END $$", Cause.DATA),
        ("SELECT * FROM pg_class WHERE relname = ?", Cause.DATA),
    ],
)
def test_causes_on_postgres(postgres: PostgresServer, sql: str, cause: Cause) -> None:
    database = connect(postgres.url())
    with pytest.raises(psycopg.Error) as raised:
        database.query(sql)
    assert database.cause(raised.value) is cause
    database.close()


@pytest.mark.parametrize(
    ("sql", "parameters", "cause"),
    [
        ("SELECT json('{')", (), Cause.DATA),
        ("SELEC 1", (), Cause.DATA),
        ("SELECT * FROM nowhere", (), Cause.INFRASTRUCTURE),
        ("SELECT nowhere FROM sqlite_master", (), Cause.INFRASTRUCTURE),
        ("SELECT ?", (), Cause.DATA),
        ("SELECT ?", (object(),), Cause.DATA),
        ("INSERT INTO one VALUES (1)", (), Cause.DATA),
    ],
)
def test_causes_on_sqlite(tmp_path: Path, sql: str, parameters: tuple[Any, ...], cause: Cause) -> None:
    database = connect(f"sqlite:///{tmp_path}/x.db")
    database.execute("CREATE TABLE one (a INTEGER PRIMARY KEY)")
    database.execute("INSERT INTO one VALUES (1)")
    with pytest.raises(sqlite3.Error) as raised:
        database.query(sql, parameters)
    assert database.cause(raised.value) is cause
    database.close()
    with pytest.raises(sqlite3.Error) as raised:
        database.query("SELECT 1")
    assert database.cause(raised.value) is Cause.INFRASTRUCTURE


def test_a_full_disk_waits_and_parks_nothing(tmp_path: Path) -> None:
    """SQLite ends the transaction itself then; the handler must not go on writing outside of it."""
    url = f"sqlite:///{tmp_path}/sink.db"

    def handler(records: Any, db: Any) -> None:
        for number in range(1_000):
            try:
                db.execute(ledger.NOTE, (0, records[0].offset, "x" * 10_000))
            except sqlite3.Error as error:
                errors.append(str(error))
            except Exception as error:
                refused.append(str(error))
                assert number

    errors: list[str] = []
    refused: list[str] = []
    sink = ledger.sink(url, handler)
    sink.take_over([ledger.claim()])
    pages = sink._database.query("PRAGMA page_count")[0][0]
    sink._database.query(f"PRAGMA max_page_count = {pages + 50}")
    with pytest.raises(Unavailable, match="full"):
        sink.apply([ledger.a_slice(ledger.record(0, "ann", 1))])
    assert errors == ["database or disk is full"]
    assert refused, "the handler could go on after the transaction was gone"
    assert ledger.seen(url) == []
    assert ledger.parked(url) == []
    assert ledger.position(url) == (0, 1)
    sink.close()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(ConfigurationError, match="cannot write to"):
        ledger.sink(f"sqlite:///{tmp_path}/sink.db")


def test_a_folder_that_goes_away_later_is_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "mount"
    folder.mkdir()
    url = f"sqlite:///{folder}/sink.db"
    sink = ledger.sink(url)
    sink.take_over([ledger.claim()])
    sink._database.close()
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(Unavailable, match="does not exist"):
        sink.apply([ledger.a_slice(ledger.record(0, "ann", 1))])
    (tmp_path / "elsewhere").rename(folder)
    assert sink.apply([ledger.a_slice(ledger.record(0, "ann", 1))]).records == 1
    sink.close()


@pytest.mark.postgres
def test_a_session_that_is_silent_in_a_transaction_is_ended_also_after_executemany(
    postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """psycopg's pipeline leaves the server's idle timer off; a stopped process would hold its locks for ever."""
    from semel.databases import postgres as module

    monkeypatch.setitem(module._SESSION, "idle_in_transaction_session_timeout", "500ms")
    url = postgres.new_database()
    tool = connect(url)
    tool.execute("CREATE TABLE t (a INTEGER)")
    silent = []
    for rows in range(1, 13):
        database = connect(url)
        database.begin()
        database.executemany("INSERT INTO t VALUES (?)", [(number,) for number in range(rows)])
        silent.append(database)
    deadline = time.monotonic() + 5
    others = "SELECT COUNT(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    while tool.query(others) != [(0,)]:
        assert time.monotonic() < deadline, f"{tool.query(others)[0][0]} of {len(silent)} sessions live on"
        time.sleep(0.05)
    for database in (tool, *silent):
        database.close()

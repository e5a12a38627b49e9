"""What is particular to MariaDB: its implicit commits, its errors by number, its time-outs, its DDL."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from semel.databases import connect, open_database
from semel.databases.database import Cause, Database
from semel.databases.statements import (
    StatementRefused,
    check_handler_statement_for_mariadb,
    placeholders_for_pymysql,
    split_statements_for_mariadb,
)
from semel.errors import ConfigurationError
from semel.sinks.contract import Applied, Unavailable
from semel.sinks.sql import migrate
from tests.services.mariadb import MariadbServer
from tests.sinks import child, ledger, test_crashes
from tests.sinks.ledger import a_slice, claim, record

pytestmark = pytest.mark.mariadb


@pytest.fixture
def url(mariadb: MariadbServer) -> str:
    return mariadb.new_database()


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    found = connect(url)
    yield found
    found.close()


def test_every_kind_of_value_comes_back_as_it_was(database: Database) -> None:
    texts = ["it's", 'say "hi"', "back\\slash", "100 % ? %s", "😀", "line\nend", "\x00nul", ""]
    database.execute("CREATE TABLE t (n INT PRIMARY KEY, a LONGTEXT, b LONGBLOB, c DATETIME(6), d DOUBLE, e BOOLEAN)")
    east = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=timezone(timedelta(hours=2)))
    rows = [(n, text, bytes(range(256)), east, n / 7, n % 2 == 0) for n, text in enumerate(texts)]
    assert database.executemany("INSERT INTO t VALUES (?, ?, ?, ?, ?, ?)", rows) == len(rows)
    database.execute("INSERT INTO t (n, a) VALUES (?, ?)", (99, None))
    found = database.query("SELECT n, a, b, c, d, e FROM t WHERE n < 99 ORDER BY n")
    utc = east.astimezone(UTC).replace(tzinfo=None)
    assert found == [(n, text, raw, utc, number, int(flag)) for n, text, raw, _, number, flag in rows]
    assert database.query("SELECT '?', \"??\", '\\', `a` FROM t WHERE n = ? -- ?\n # ?\n /* ? */", (99,)) == [
        ("?", "??", "\\", None)
    ]
    assert database.executemany("INSERT INTO t (n) VALUES (?)", iter([])) == 0


def test_names_are_told_apart_byte_by_byte(url: str) -> None:
    """Two sinks whose names MariaDB would compare as equal by default have positions of their own."""
    migrate(url)
    tool = connect(url)
    for sink in ("shop.a", "shop.A", "shop.a ", "shop.ä"):
        tool.execute("INSERT INTO semel_position VALUES (?, 'c', 't', 'x', 0, 0, 1, '', 0)", (sink,))
    assert len(tool.query("SELECT DISTINCT sink FROM semel_position")) == 4
    tool.close()


COMMITTING = """
CREATE TABLE x (a INT)|TRUNCATE seen|ALTER TABLE seen ADD x INT|DROP TABLE seen|LOCK TABLES seen READ|CALL commits()
SET autocommit = 1|/*! COMMIT */|SELECT 1 /*M! ; */|GRANT SELECT ON *.* TO x|XA BEGIN 'a'|BEGIN NOT ATOMIC COMMIT
EXECUTE IMMEDIATE 'COMMIT'|ANALYZE TABLE seen|`SELECT`|
"""


@pytest.mark.parametrize("statement", COMMITTING.strip().replace("\n", "|").split("|"))
def test_what_commits_by_itself_is_refused_before_it_runs(url: str, statement: str) -> None:
    def handler(records: Sequence[Any], db: Any) -> None:
        db.execute(ledger.NOTE, (0, 0, "before"))
        db.execute(statement)

    sink = ledger.sink(url, handler)
    tool = connect(url)
    tool._open.query("CREATE PROCEDURE commits() COMMIT")
    tool.close()
    sink.take_over([claim()])
    sink.apply([a_slice(record(0, "ann", 1))])
    assert ledger.seen(url) == []
    assert ledger.parked(url) == [(0, 0, b"ann", "StatementRefused")]
    sink.close()


def test_statements_are_cut_by_mariadbs_rules() -> None:
    assert split_statements_for_mariadb("SELECT ';' ; # a; b\nSELECT `;` -- c;\n; SELECT 5--1;") == [
        "SELECT ';'", "# a; b\nSELECT `;` -- c;", "SELECT 5--1"
    ]  # fmt: skip
    assert placeholders_for_pymysql("SELECT ? -- ?\n, '\\', ?, 1 % 2, ??") == "SELECT %s -- ?\n, '\\', %s, 1 %% 2, ?"
    trigger = "CREATE TRIGGER t BEFORE INSERT ON a FOR EACH ROW BEGIN IF NEW.x THEN SET @a = 1; END IF; SET @b = 2; END"
    assert len(split_statements_for_mariadb(f"CREATE TABLE a (x INT); {trigger}; CREATE TABLE b (x INT)")) == 3
    for statement in (
        "SELECT 1",
        "(SELECT 1)",
        "with a as (select 1) select * from a",
        "-- x\nINSERT INTO a VALUES (1)",
    ):
        check_handler_statement_for_mariadb(statement)
    with pytest.raises(StatementRefused, match="several"):
        check_handler_statement_for_mariadb("SELECT '\\'; COMMIT; -- '")


@pytest.mark.parametrize(
    ("sql", "cause"),
    [
        ("SELEC 1", Cause.DATA),
        ("SELECT * FROM one WHERE a = ?", Cause.DATA),
        ("INSERT INTO one VALUES (1)", Cause.DATA),
        ("INSERT INTO one VALUES ('x')", Cause.DATA),
        ("INSERT INTO one VALUES (99999999999)", Cause.DATA),
        ("INSERT INTO one VALUES (1 / 0)", Cause.DATA),
        ("SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'mine'", Cause.DATA),
        ("SELECT * FROM nowhere", Cause.INFRASTRUCTURE),
        ("SELECT nothing FROM one", Cause.INFRASTRUCTURE),
        ("KILL QUERY CONNECTION_ID()", Cause.INFRASTRUCTURE),
        ("KILL CONNECTION_ID()", Cause.INFRASTRUCTURE),
        ("SET STATEMENT max_statement_time = 0.01 FOR SELECT SLEEP(5) FROM one", Cause.INFRASTRUCTURE),
        ("SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213", Cause.CONFLICT),
        ("SIGNAL SQLSTATE '70100' SET MYSQL_ERRNO = 1290", Cause.INFRASTRUCTURE),
        ("SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = 1205", Cause.LOCKED),
    ],
)
def test_causes(database: Database, sql: str, cause: Cause) -> None:
    import pymysql

    database.execute("CREATE TABLE one (a INTEGER PRIMARY KEY)")
    database.execute("INSERT INTO one VALUES (1)")
    with pytest.raises(pymysql.Error) as raised:
        database.query(sql)
    assert database.cause(raised.value) is cause
    database.close()
    with pytest.raises(pymysql.Error) as raised:
        database.query("SELECT 1")
    assert database.cause(raised.value) is Cause.INFRASTRUCTURE


def test_a_statement_that_runs_can_be_ended_from_another_thread(database: Database) -> None:
    import pymysql

    errors: list[Exception] = []

    def wait() -> None:
        try:
            database.query("SELECT SLEEP(25) FROM information_schema.engines")
        except pymysql.Error as error:
            errors.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    while waiting.is_alive():
        database.interrupt()
        waiting.join(0.1)
    assert [database.cause(error) for error in errors] == [Cause.INFRASTRUCTURE]
    assert database.query("SELECT 1") == [(1,)]


def test_a_deadlock_that_a_handler_hides_writes_nothing_outside_of_the_transaction(url: str) -> None:
    """MariaDB ends the whole transaction there; what comes next would be committed by itself."""
    tool = connect(url)
    tool.execute("CREATE TABLE account (name VARCHAR(9) PRIMARY KEY, hits BIGINT)")
    tool.executemany("INSERT INTO account VALUES (?, 0)", [(name,) for name in ("a", "b", *range(300))])
    both = threading.Barrier(2)
    tries: list[int] = []
    hidden: list[Exception] = []

    def heavy() -> None:
        tool.begin()
        tool.execute("UPDATE account SET hits = hits + 10 WHERE name <> 'a'")
        both.wait(20)
        tool.execute("UPDATE account SET hits = hits + 10 WHERE name = 'a'")
        tool.commit()

    def handler(records: Sequence[Any], db: Any) -> None:
        tries.append(1)
        db.execute("UPDATE account SET hits = hits + 1 WHERE name = 'a'")
        if len(tries) == 1:
            both.wait(20)
        try:
            db.execute("UPDATE account SET hits = hits + 1 WHERE name = 'b'")
        except Exception as error:
            hidden.append(error)
            with pytest.raises(type(error), match="the transaction is over"):
                sink._database.execute(ledger.NOTE, (9, 9, "outside"))
            db.execute(ledger.NOTE, (9, 9, "outside"))

    sink = ledger.sink(url, handler)
    sink.take_over([claim()])
    other = threading.Thread(target=heavy)
    other.start()
    assert sink.apply([a_slice(record(0, "ann", 1))]) == Applied(1, 0, 1)
    other.join(20)
    assert ledger.rows(url, "SELECT hits FROM account WHERE name IN ('a', 'b')") == [(11,), (11,)]
    assert [error.args[0] for error in hidden] == [1213]
    assert len(tries) == 2, "the victim is the one that changed less, and it is repeated"
    assert ledger.seen(url) == []
    assert ledger.parked(url) == []
    sink.close()
    tool.close()


def test_a_statement_larger_than_the_server_takes_waits_and_names_the_setting(url: str, mariadb: MariadbServer) -> None:
    mariadb.run("SET GLOBAL max_allowed_packet = 1048576")
    try:
        sink = ledger.sink(url)
        sink.take_over([claim()])
        with pytest.raises(Unavailable, match="max_allowed_packet"):
            sink.apply([a_slice(record(0, "k" * 600_000, 1), record(1, "j" * 600_000, b"x"))])
        assert ledger.parked(url) == []
        sink.close()
    finally:
        mariadb.run("SET GLOBAL max_allowed_packet = 16777216")


def test_a_migration_that_broke_off_is_healed_by_the_next_one(url: str) -> None:
    """DDL commits statement by statement: what went before the failure is there, and running again makes the rest."""
    schema = "CREATE TABLE IF NOT EXISTS first (a INT); CREATE TABLE IF NOT EXISTS child (a INT REFERENCES {}(a));"
    with pytest.raises(ConfigurationError, match="refused the schema"):
        migrate(url, schema=schema.format("nowhere"))
    assert ledger.rows(url, "SELECT COUNT(*) FROM first") == [(0,)]
    migrate(url, schema="CREATE TABLE IF NOT EXISTS nowhere (a INT PRIMARY KEY); " + schema.format("nowhere"))
    assert ledger.rows(url, "SELECT COUNT(*) FROM child") == [(0,)]


def test_triggers_may_be_in_a_schema(url: str) -> None:
    migrate(
        url,
        schema="CREATE TABLE IF NOT EXISTS a (n INT); CREATE OR REPLACE TRIGGER twice BEFORE INSERT ON a FOR EACH ROW "
        "BEGIN IF NEW.n > 1 THEN SET NEW.n = NEW.n * 2; END IF; SET NEW.n = NEW.n * 2; END; "
        "CREATE TABLE IF NOT EXISTS b (n INT);",
    )
    tool = connect(url)
    tool.executemany("INSERT INTO a VALUES (?)", [(1,), (3,)])
    assert tool.query("SELECT n FROM a ORDER BY n") == [(2,), (12,)]
    assert tool.query("SELECT COUNT(*) FROM b") == [(0,)]
    tool.close()


def test_a_table_that_no_rollback_undoes_is_named(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        migrate(url, schema="CREATE TABLE IF NOT EXISTS old (a INT) ENGINE=MyISAM")
    assert "old (MyISAM)" in caplog.text
    tool = connect(url)
    tool.execute("ALTER TABLE semel_position ENGINE=Aria")
    tool.close()
    with pytest.raises(ConfigurationError, match=r"semel_position \(Aria\) must be InnoDB"):
        migrate(url)


def test_a_server_that_cannot_do_it_is_refused(
    url: str, mariadb: MariadbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from semel.databases import mariadb as module

    monkeypatch.setattr(module, "LEAST_VERSION", (99, 0))
    with pytest.raises(ConfigurationError, match=r"needs MariaDB 99.0 or later"):
        connect(url)


@pytest.mark.parametrize(
    ("tail", "text"),
    [
        ("localhost", "names no database"),
        ("localhost/x?charset=latin1", "option 'charset' is unknown"),
        ("localhost:port/x", "not a MariaDB URL"),
    ],
)
def test_urls_that_cannot_work(tail: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text) as raised:
        open_database(f"mariadb://me:hunter2@{tail}")
    assert "hunter2" not in str(raised.value)
    assert "hunter2" not in repr(open_database("mariadb://me:hunter2@host/db"))


def test_a_wrong_password_is_an_outage_without_the_password_in_it(mariadb: MariadbServer) -> None:
    with pytest.raises(Unavailable, match="Access denied") as raised:
        ledger.sink(f"mariadb://me:hunter2@127.0.0.1:{mariadb.port}/mysql")
    assert "hunter2" not in str(raised.value)


def test_a_stopped_owner_delays_a_takeover_only_for_a_while(url: str) -> None:
    """It holds the row's lock until idle_transaction_timeout ends its session."""
    process = test_crashes.start(url, "sink.before_db_commit:stop:2", IDLE_IN_TRANSACTION="1500ms")
    try:
        test_crashes.wait_until(lambda: test_crashes.is_stopped(process.pid), "the failpoint was not reached")
        began = time.monotonic()
        heir = ledger.sink(url)
        heir.take_over([claim(part) for part in range(child.PARTITIONS)])
        assert time.monotonic() - began < 8
        heir.close()
        child.work(url, test_crashes.TOTAL)
        os.kill(process.pid, signal.SIGCONT)
        assert process.wait(30) != 0, "the zombie did not notice that it is fenced"
        test_crashes.check_exact(url)
    finally:
        process.kill()
        process.communicate()

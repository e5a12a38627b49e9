"""Placeholders and statement checks, against PostgreSQL's own reading of the same text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semel.databases import connect
from semel.databases.sqlite import _whole_statements
from semel.databases.statements import (
    StatementRefused,
    check_handler_statement,
    placeholders_for_psycopg,
    split_statements,
)
from tests.services.postgres import PostgresServer


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("INSERT INTO t VALUES (?, ?)", "INSERT INTO t VALUES (%s, %s)"),
        ("SELECT '?', ?", "SELECT '?', %s"),
        ("SELECT 'it''s ?', ?", "SELECT 'it''s ?', %s"),
        ("SELECT E'\\'?', ?", "SELECT E'\\'?', %s"),
        ("SELECT 'back\\', ?", "SELECT 'back\\', %s"),
        ('SELECT "a?b", ?', 'SELECT "a?b", %s'),
        ("SELECT 1 -- why?\n, ?", "SELECT 1 -- why?\n, %s"),
        ("SELECT /* ? /* ? */ ? */ ?", "SELECT /* ? /* ? */ ? */ %s"),
        ("SELECT $$ ? $$, $x$ ? $$ ? $x$, ?", "SELECT $$ ? $$, $x$ ? $$ ? $x$, %s"),
        ("SELECT a$b$c, ?", "SELECT a$b$c, %s"),
        ("SELECT 5 % 3, '100%', ?", "SELECT 5 %% 3, '100%%', %s"),
        ("SELECT doc ?? 'key', doc ??| ?", "SELECT doc ? 'key', doc ?| %s"),
        ("SELECT 'unfinished ?", "SELECT 'unfinished ?"),
        ("SELECT 1 /* unfinished ?", "SELECT 1 /* unfinished ?"),
    ],
)
def test_placeholders(sql: str, expected: str) -> None:
    assert placeholders_for_psycopg(sql) == expected


@given(st.text(alphabet="'\"$x-/*?%;\\eE \n", max_size=40))
def test_pieces_are_the_whole_text(sql: str) -> None:
    """Nothing is lost or invented whatever is written: undoing the translation gives the text."""
    if "??" not in sql:
        assert placeholders_for_psycopg(sql).replace("%%", "\0").replace("%s", "?").replace("\0", "%") == sql


@pytest.mark.postgres
def test_postgres_reads_it_as_we_do(postgres: PostgresServer) -> None:
    database = connect(postgres.new_database())
    sql = (
        "SELECT '?' || $a$ ? $a$ || E'\\'?' /* ? /* ? */ */ || ?::text, 7 % 4, "
        "'{\"a\": 1}'::jsonb ?? 'a' -- ?\n, '100%', ?::text"
    )
    assert database.query(sql, ("x", "%s")) == [("? ? '?x", 3, True, "100%", "%s")]
    database.execute("CREATE TABLE t (a INTEGER, b TEXT)")
    assert database.executemany("INSERT INTO t VALUES (?, ? || '%')", [(1, "a"), (2, "b")]) == 2
    assert database.query("SELECT b FROM t ORDER BY a") == [("a%",), ("b%",)]
    assert database.execute("UPDATE t SET a = 0 WHERE b = 'a%'") == 1
    assert database.executemany("INSERT INTO t VALUES (?, ?)", []) == 0
    database.close()


def test_split() -> None:
    assert split_statements("-- only a comment\n;;") == []
    assert split_statements("CREATE TABLE a (x TEXT DEFAULT ';'); -- ;\nSELECT ';' ; ") == [
        "CREATE TABLE a (x TEXT DEFAULT ';')",
        "-- ;\nSELECT ';'",
    ]


def test_a_trigger_stays_in_one_piece() -> None:
    trigger = "CREATE TRIGGER t AFTER INSERT ON a BEGIN UPDATE b SET x = 1; DELETE FROM c; END"
    found = _whole_statements(f"{trigger}; SELECT 1;")
    assert [" ".join(text.replace(";", "; ").split()) for text in found] == [f"{trigger};", "SELECT 1;"]


@pytest.mark.parametrize(
    "sql",
    [
        "commit",
        "  -- go\n ROLLBACK",
        "(END)",
        "PREPARE TRANSACTION 'x'",
        "SET LOCAL statement_timeout = 0",
        "INSERT INTO a VALUES (1); SELECT 1",
        "PRAGMA synchronous=OFF",
    ],
)
def test_refused(sql: str) -> None:
    with pytest.raises(StatementRefused):
        check_handler_statement(sql)


@pytest.mark.parametrize(
    "sql", ["INSERT INTO a VALUES ('COMMIT; ROLLBACK');", "WITH x AS (SELECT 1) SELECT * FROM x", "CREATE TABLE a (b)"]
)
def test_allowed(sql: str) -> None:
    check_handler_statement(sql)

"""Acceptance 7, the writing side: what is wrong with a database is said before anything is changed, and by name."""

from __future__ import annotations

import psycopg
import pytest

from semel import App
from semel.databases import Database, connect
from semel.errors import ConfigurationError, Retriable
from semel.ops.databases import migrate, migrate_app
from semel.outbox.tables import schema_sql
from tests.outbox.bank import INSERT, SCHEMA, Bank, Paid
from tests.services.mariadb import MariadbServer
from tests.services.postgres import PostgresServer


@pytest.fixture(autouse=True)
def _production(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is made by itself."""
    monkeypatch.setenv("SEMEL_PROFILE", "production")


def refused(bank: Bank, match: str, error: type[Exception] = ConfigurationError) -> None:
    """The block is never entered."""
    with pytest.raises(error, match=match):
        bank.open_account("ann", 1)


def test_no_tables(url: str) -> None:
    look = connect(url)
    look.migrate(SCHEMA)
    bank = Bank(url, look)
    refused(bank, "table semel_outbox_meta is not in .*semel migrate")
    assert bank.balances() == {}
    migrate(url, print_only=False, outbox=True)
    bank.open_account("ann", 1)
    assert bank.balances() == bank.told() == {"ann": 1}
    bank.app.close()
    look.close()


def test_one_table_that_is_missing_is_named(bank: Bank, database: Database) -> None:
    database.execute("DROP TABLE semel_commit")
    refused(bank, "table semel_commit is not in")
    assert (bank.balances(), bank.rows()) == ({}, [])


def test_a_schema_of_another_version(bank: Bank, database: Database) -> None:
    database.execute("UPDATE semel_outbox_meta SET schema_version = 99")
    refused(bank, "schema version 99.*Use the newer Semel")
    assert bank.balances() == {}


def test_the_outbox_of_another_app(bank: Bank, database: Database) -> None:
    database.execute("UPDATE semel_outbox_meta SET app = 'shop'")
    refused(bank, "belongs to app 'shop', and this is app 'bank'")
    assert bank.balances() == {}


@pytest.mark.postgres
@pytest.mark.parametrize(
    ("privilege", "table"), [("INSERT", "semel_outbox"), ("UPDATE", "semel_commit"), ("SELECT", "semel_outbox_meta")]
)
def test_a_right_that_is_missing_is_named(postgres: PostgresServer, privilege: str, table: str) -> None:
    url = postgres.new_database()
    look = connect(url)
    look.migrate(schema_sql("PostgreSQL") + SCHEMA)
    user = f"teller_{table}_{privilege}".lower()
    look.execute(f"CREATE ROLE {user} LOGIN")
    look.execute(f"GRANT INSERT, SELECT ON account TO {user}")
    for right, name in (
        ("INSERT", "semel_outbox"),
        ("SELECT", "semel_outbox_meta"),
        *((right, "semel_commit") for right in ("SELECT", "INSERT", "UPDATE", "DELETE")),
    ):
        if (right, name) != (privilege, table):
            look.execute(f"GRANT {right} ON {name} TO {user}")
    bank = Bank(url.replace("postgres@", f"{user}@"), look)
    refused(bank, rf"no {privilege} on {table}.*GRANT {privilege} ON {table}")
    assert bank.balances() == {}
    look.execute(f"GRANT {privilege} ON {table} TO {user}")
    bank.open_account("ann", 1)  # These rights are enough.
    assert bank.balances() == bank.told() == {"ann": 1}
    bank.app.close()
    look.execute(f"REASSIGN OWNED BY {user} TO postgres")
    look.execute(f"DROP OWNED BY {user}")
    look.execute(f"DROP ROLE {user}")
    look.close()


@pytest.mark.postgres
def test_a_database_that_only_reads(postgres: PostgresServer) -> None:
    """A standby, or one that is being switched over: nothing happened, and it is tried again later."""
    url = postgres.new_database()
    look = connect(url)
    look.migrate(schema_sql("PostgreSQL") + SCHEMA)
    bank = Bank(f"{url}?options=-c%20default_transaction_read_only%3Don", look)
    refused(bank, "nothing happened: cannot execute .* in a read-only transaction", Retriable)
    bank.app.close()
    look.close()


def test_a_password_is_in_no_error() -> None:
    app = App("bank")
    database = app.database("postgresql://teller:hush@127.0.0.1:1/bank", outbox=True)
    with pytest.raises(Retriable) as raised, app.transaction(database):
        pass
    assert "hush" not in str(raised.value)
    assert "hush" not in repr(app.writer("database").pool.borrow())
    app.close()


def test_an_app_says_what_its_databases_need(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    app = App("bank")
    app.database(url, outbox=True, schema=SCHEMA.replace("CREATE TABLE", "CREATE TABLE IF NOT EXISTS"))
    printed = migrate_app(app, print_only=True)
    for name in ("semel_position", "semel_outbox", "semel_commit", "account"):
        assert name in printed
    assert migrate_app(app, print_only=False) == printed
    migrate_app(app, print_only=False)  # It may run again.
    look = connect(url)
    bank = Bank(url, look)
    bank.open_account("ann", 1)
    assert bank.told() == {"ann": 1}
    bank.app.close()
    look.close()


def test_in_development_the_tables_are_made(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMEL_PROFILE", "dev")
    app = App("bank")
    paid = app.topic("paid", key=str, value=Paid)
    database = app.database(url, outbox=True, schema=SCHEMA.replace("CREATE TABLE", "CREATE TABLE IF NOT EXISTS"))
    with app.transaction(database) as tx:
        tx.execute(INSERT, ("ann", 1))
        tx.send(paid.record("ann", Paid(1)))
    app.close()
    look = connect(url)
    assert look.query("SELECT COUNT(*) FROM semel_outbox") == [(1,)]
    look.close()


def test_psycopg_is_asked_for_no_more_than_it_has() -> None:
    """`enqueue_in` leans on it: an idle connection is status 0."""
    assert psycopg.pq.TransactionStatus.IDLE == 0


@pytest.mark.mariadb
def test_a_mariadb_that_loses_answered_commits(mariadb: MariadbServer) -> None:
    """Killed, it would come back without rows whose records are in Kafka."""
    url = mariadb.new_database()
    migrate(url, print_only=False, outbox=True)
    look = connect(url)
    look.migrate(SCHEMA)
    look.execute("SET GLOBAL innodb_flush_log_at_trx_commit = 2")
    try:
        bank = Bank(url, look)
        refused(bank, "innodb_flush_log_at_trx_commit=2.*Set it to 1")
        assert (bank.balances(), bank.rows()) == ({}, [])
    finally:
        look.execute("SET GLOBAL innodb_flush_log_at_trx_commit = 1")
    bank.open_account("ann", 1)
    bank.app.close()
    look.close()


@pytest.mark.postgres
def test_a_postgresql_that_would_lose_answered_commits_is_told_not_to(postgres: PostgresServer) -> None:
    url = postgres.new_database()
    name = url.rpartition("/")[2]
    database = connect(url)
    for setting, becomes in (("off", "on"), ("local", "local"), ("remote_apply", "remote_apply")):
        database.execute(f"ALTER DATABASE {name} SET synchronous_commit = {setting}")
        database.connect()
        assert database.query("SHOW synchronous_commit") == [(becomes,)]
    database.close()

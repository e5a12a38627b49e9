"""`enqueue_in`: a record inside of the user's own transaction is there if and only if that commits."""

from __future__ import annotations

import asyncio
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pymysql
import pytest
import sqlalchemy
from sqlalchemy import orm
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from semel.databases import Database
from semel.errors import ConfigurationError, Fatal
from semel.outbox import enqueue_in
from semel.processing.topics import DataError
from tests.conftest import DATABASES, DEFERRING, empty_database
from tests.outbox.bank import INSERT, Bank, Paid


@pytest.fixture(params=DEFERRING)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of a kind whose drivers `enqueue_in` knows."""
    return empty_database(request, tmp_path)


def alchemy(url: str) -> str:
    """The URL as SQLAlchemy writes it."""
    return url.replace("postgresql://", "postgresql+psycopg://").replace("mariadb://", "mariadb+pymysql://")


@pytest.fixture
def engine(url: str) -> Iterator[sqlalchemy.Engine]:
    made = sqlalchemy.create_engine(alchemy(url))
    yield made
    made.dispose()


class Base(orm.DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "account"
    id: orm.Mapped[str] = orm.mapped_column(primary_key=True)
    balance: orm.Mapped[int]


def path(url: str) -> str:
    return url.removeprefix("sqlite:///")


def open_raw(url: str, *, autocommit: bool = False) -> Any:
    """A connection of the driver, as its documentation opens one."""
    if url.startswith("sqlite"):
        return sqlite3.connect(path(url), isolation_level=None if autocommit else "")
    if url.startswith("postgres"):
        return psycopg.connect(url, autocommit=autocommit)
    parts = urlsplit(url)
    where = {"host": parts.hostname, "port": parts.port, "user": parts.username, "database": parts.path[1:]}
    return pymysql.connect(**where, autocommit=autocommit)


def run(raw: Any, sql: str, parameters: tuple[Any, ...] = ()) -> None:
    raw.cursor().execute(sql if isinstance(raw, sqlite3.Connection) else sql.replace("?", "%s"), parameters)


@pytest.fixture
def raw(url: str) -> Iterator[Any]:
    made = open_raw(url)
    yield made
    made.close()


def insert(raw: Any, name: str, balance: int) -> None:
    run(raw, INSERT, (name, balance))


@pytest.mark.parametrize("url", DATABASES, indirect=True)
class TestDrivers:
    """psycopg, sqlite3 and PyMySQL: the row is written at once, in the user's transaction."""

    def test_commit(self, bank: Bank, raw: Any) -> None:
        insert(raw, "ann", 5)
        given = enqueue_in(raw, bank.paid.record("ann", Paid(5)))
        assert isinstance(given, uuid.UUID)
        assert (bank.balances(), bank.rows()) == ({}, [])
        raw.commit()
        assert bank.balances() == bank.told() == {"ann": 5}

    def test_rollback(self, bank: Bank, raw: Any) -> None:
        insert(raw, "ann", 5)
        enqueue_in(raw, bank.paid.record("ann", Paid(5)))
        raw.rollback()
        assert (bank.balances(), bank.rows()) == ({}, [])

    def test_without_a_transaction_it_is_refused(self, bank: Bank, url: str) -> None:
        raw = open_raw(url, autocommit=True)
        with pytest.raises(Fatal, match=r"in autocommit and no transaction is open.*Nothing was written"):
            enqueue_in(raw, bank.paid.record("ann", Paid(5)))
        assert bank.rows() == []
        run(raw, "BEGIN")
        enqueue_in(raw, bank.paid.record("ann", Paid(5)))
        run(raw, "COMMIT")
        assert len(bank.rows()) == 1
        raw.close()

    def test_what_cannot_be_sent_leaves_the_transaction_as_it_is(self, bank: Bank, raw: Any) -> None:
        insert(raw, "ann", 5)
        with pytest.raises(DataError):
            enqueue_in(raw, bank.raw.record(b"k", bytes(2_000_000)))
        with pytest.raises(ConfigurationError, match="is not a record"):
            enqueue_in(raw, Paid(5))
        raw.commit()
        assert (bank.balances(), bank.rows()) == ({"ann": 5}, [])

    def test_what_is_no_connection(self, bank: Bank) -> None:
        with pytest.raises(ConfigurationError, match="is no connection that Semel knows"):
            enqueue_in(object(), bank.paid.record("ann", Paid(5)))


@pytest.mark.postgres
def test_psycopg_in_a_coroutine(postgres: Any, request: pytest.FixtureRequest) -> None:
    url = postgres.new_database()
    from semel.databases import connect
    from semel.outbox.tables import schema_sql
    from tests.outbox.bank import SCHEMA

    look = connect(url)
    look.migrate(schema_sql("PostgreSQL") + SCHEMA)
    bank = Bank(url, look)

    async def whole() -> None:
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
            with pytest.raises(Fatal, match="autocommit"):
                await enqueue_in(connection, bank.paid.record("ann", Paid(5)))
            async with connection.transaction():
                await connection.execute(INSERT.replace("?", "%s"), ("ann", 5))
                assert isinstance(await enqueue_in(connection, bank.paid.record("ann", Paid(5))), uuid.UUID)
            async with connection.transaction(force_rollback=True):
                await enqueue_in(connection, bank.paid.record("bob", Paid(5)))

    asyncio.run(whole())
    assert bank.balances() == bank.told() == {"ann": 5}
    look.close()


@pytest.mark.parametrize("url", DATABASES, indirect=True)
class TestSqlalchemyCore:
    def test_commit_and_rollback(self, bank: Bank, engine: sqlalchemy.Engine) -> None:
        statement = sqlalchemy.insert(Account)
        with engine.begin() as connection:
            connection.execute(statement, [{"id": "ann", "balance": 5}])
            enqueue_in(connection, bank.paid.record("ann", Paid(5)))
        with engine.connect() as connection:
            connection.execute(statement, [{"id": "bob", "balance": 6}])
            enqueue_in(connection, bank.paid.record("bob", Paid(6)))
            connection.rollback()
        assert bank.balances() == bank.told() == {"ann": 5}

    def test_without_a_transaction_it_is_refused(self, bank: Bank, engine: sqlalchemy.Engine) -> None:
        with engine.connect() as connection, pytest.raises(Fatal, match="has no transaction"):
            enqueue_in(connection, bank.paid.record("ann", Paid(5)))
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sqlalchemy.text("SELECT 1"))
            with pytest.raises(Fatal, match="in autocommit"):
                enqueue_in(connection, bank.paid.record("ann", Paid(5)))
        assert bank.rows() == []


class TestSession:
    """An event that is added to a session becomes a record when the session commits."""

    @pytest.mark.parametrize("url", DATABASES, indirect=True)
    def test_it_is_the_last_that_is_written(self, bank: Bank, engine: sqlalchemy.Engine) -> None:
        said: list[str] = []
        sqlalchemy.event.listen(engine, "before_cursor_execute", lambda *given: said.append(given[2].split()[2]))
        with orm.Session(engine) as session:
            enqueue_in(session, bank.paid.record("ann", Paid(5)))
            session.add(Account(id="ann", balance=5))
            session.commit()
            assert said == ["account", "semel_outbox"]
            session.add(Account(id="bob", balance=6))
            enqueue_in(session, bank.paid.record("bob", Paid(6)))
            session.commit()  # Each record once.
        assert bank.balances() == bank.told() == {"ann": 5, "bob": 6}
        assert len(bank.rows()) == 2

    def test_what_is_rolled_back_is_forgotten(self, bank: Bank, engine: sqlalchemy.Engine) -> None:
        with orm.Session(engine) as session:
            session.add(Account(id="ann", balance=5))
            enqueue_in(session, bank.paid.record("ann", Paid(5)))
            session.flush()
            session.rollback()
            session.add(Account(id="bob", balance=6))
            enqueue_in(session, bank.paid.record("bob", Paid(6)))
            session.commit()
            enqueue_in(session, bank.paid.record("eve", Paid(7)))
            session.close()
            session.commit()
        assert bank.balances() == bank.told() == {"bob": 6}

    def test_a_commit_that_fails_sends_nothing(self, bank: Bank, engine: sqlalchemy.Engine) -> None:
        bank.open_account("ann", 1)
        with orm.Session(engine) as session:
            session.add(Account(id="ann", balance=5))
            enqueue_in(session, bank.paid.record("ann", Paid(5)))
            with pytest.raises(sqlalchemy.exc.IntegrityError):
                session.commit()
            session.rollback()
            session.commit()
        assert bank.balances() == bank.told() == {"ann": 1}

    def test_savepoints(self, bank: Bank, engine: sqlalchemy.Engine) -> None:
        with orm.Session(engine) as session:
            enqueue_in(session, bank.paid.record("ann", Paid(1)))
            session.add(Account(id="ann", balance=1))
            with session.begin_nested():
                session.add(Account(id="bob", balance=2))
                enqueue_in(session, bank.paid.record("bob", Paid(2)))
            with session.begin_nested() as point:
                session.add(Account(id="eve", balance=3))
                enqueue_in(session, bank.paid.record("eve", Paid(3)))
                with session.begin_nested():
                    enqueue_in(session, bank.paid.record("eve", Paid(4)))
                point.rollback()
            session.commit()
        assert bank.balances() == {"ann": 1, "bob": 2}
        assert [key for _, key, _ in bank.rows()] == [b"ann", b"bob"]

    def test_a_commit_over_an_open_savepoint(self, bank: Bank, engine: sqlalchemy.Engine) -> None:
        with orm.Session(engine) as session:
            whole = session.begin()
            session.begin_nested()
            session.add(Account(id="ann", balance=1))
            enqueue_in(session, bank.paid.record("ann", Paid(1)))
            whole.commit()
        assert bank.balances() == bank.told() == {"ann": 1}

    def test_a_record_that_a_flush_adds(self, bank: Bank, engine: sqlalchemy.Engine) -> None:
        with orm.Session(engine) as session:

            @sqlalchemy.event.listens_for(session, "after_flush")
            def tell(session: orm.Session, _: Any) -> None:
                for account in session.new:
                    enqueue_in(session, bank.paid.record(account.id, Paid(account.balance)))

            session.add(Account(id="ann", balance=1))
            session.commit()
            session.add(Account(id="bob", balance=2))
            session.commit()
        assert bank.balances() == bank.told() == {"ann": 1, "bob": 2}

    def test_a_session_inside_of_a_transaction_of_others(self, bank: Bank, engine: sqlalchemy.Engine) -> None:
        """The session's commit is none; the real one comes later, or never."""

        def write(connection: sqlalchemy.Connection, name: str) -> None:
            with orm.Session(connection, join_transaction_mode="rollback_only") as session:
                session.add(Account(id=name, balance=1))
                enqueue_in(session, bank.paid.record(name, Paid(1)))
                session.commit()

        with engine.connect() as connection:
            with connection.begin() as transaction:
                write(connection, "ann")
                transaction.rollback()
            with connection.begin():
                write(connection, "bob")
                assert bank.rows() == []
        assert bank.balances() == bank.told() == {"bob": 1}

    def test_a_scoped_session_and_a_generator_of_ids(self, bank: Bank, engine: sqlalchemy.Engine) -> None:
        session = orm.scoped_session(orm.sessionmaker(engine))
        event = uuid.uuid4()
        assert enqueue_in(session, bank.paid.record("ann", Paid(1)), id=event) == event
        session.commit()
        session.remove()
        assert bank.told() == {"ann": 1}

    def test_in_autocommit_nothing_is_sent(self, bank: Bank, engine: sqlalchemy.Engine) -> None:
        alone = engine.execution_options(isolation_level="AUTOCOMMIT")
        with orm.Session(alone) as session:
            enqueue_in(session, bank.paid.record("ann", Paid(1)))
            with pytest.raises(Fatal, match="in autocommit"):
                session.commit()
        assert bank.rows() == []

    def test_two_phases_are_refused(self, bank: Bank, engine: sqlalchemy.Engine) -> None:
        with orm.Session(engine, twophase=True) as session, pytest.raises(ConfigurationError, match="twophase"):
            enqueue_in(session, bank.paid.record("ann", Paid(1)))


@pytest.mark.postgres
def test_sqlalchemy_in_a_coroutine(postgres: Any) -> None:
    from semel.databases import connect
    from semel.outbox.tables import schema_sql
    from tests.outbox.bank import SCHEMA

    url = postgres.new_database()
    look = connect(url)
    look.migrate(schema_sql("PostgreSQL") + SCHEMA)
    bank = Bank(url, look)

    async def whole() -> None:
        engine = create_async_engine(url.replace("postgresql://", "postgresql+psycopg://"))
        async with AsyncSession(engine) as session:
            session.add(Account(id="ann", balance=1))
            enqueue_in(session, bank.paid.record("ann", Paid(1)))
            await session.commit()
            enqueue_in(session, bank.paid.record("bob", Paid(1)))
            await session.rollback()
        async with engine.begin() as connection:
            await connection.execute(sqlalchemy.insert(Account), [{"id": "eve", "balance": 2}])
            await enqueue_in(connection, bank.paid.record("eve", Paid(2)))
        async with engine.connect() as connection:
            with pytest.raises(Fatal, match="has no transaction"):
                await enqueue_in(connection, bank.paid.record("joe", Paid(3)))
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            await connection.execute(sqlalchemy.text("SELECT 1"))
            with pytest.raises(Fatal, match="in autocommit"):
                await enqueue_in(connection, bank.paid.record("joe", Paid(3)))
        await engine.dispose()

    asyncio.run(whole())
    assert bank.balances() == bank.told() == {"ann": 1, "eve": 2}
    look.close()


def test_inside_of_app_transaction_there_is_send(bank: Bank) -> None:
    with bank.app.transaction(bank.database) as tx:
        tx.execute(INSERT, ("ann", 1))
        with pytest.raises(ConfigurationError, match=r"tx\.send"):
            enqueue_in(tx, bank.paid.record("ann", Paid(1)))
    assert (bank.balances(), bank.rows()) == ({"ann": 1}, [])


def test_a_sinks_handler_sends_with_its_effects(bank: Bank, database: Database) -> None:
    from semel.sinks.sql.effects import Effects

    database.begin()
    enqueue_in(Effects(database), bank.paid.record("ann", Paid(1)))
    database.rollback()
    assert bank.rows() == []
    database.begin()
    enqueue_in(Effects(database), bank.paid.record("ann", Paid(1)))
    database.commit()
    assert bank.told() == {"ann": 1}


def django_connections(url: str) -> Any:
    """Django's connections to the database, configured as a project does it."""
    from django.db.utils import ConnectionHandler

    if url.startswith("sqlite"):
        settings = {"ENGINE": "django.db.backends.sqlite3", "NAME": path(url)}
    else:
        parts = psycopg.conninfo.conninfo_to_dict(url)
        settings = {"ENGINE": "django.db.backends.postgresql", "NAME": parts["dbname"], "USER": parts["user"]}
        settings |= {"HOST": parts["host"], "PORT": parts["port"]}
    return ConnectionHandler({"default": settings})


@pytest.fixture
def django(url: str) -> Iterator[Callable[[], Any]]:
    connections = django_connections(url)
    yield lambda: connections["default"]
    connections.close_all()


@pytest.mark.filterwarnings("ignore:Accessing the database")
def test_django(bank: Bank, django: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from django.conf import settings
    from django.db.transaction import Atomic

    if not settings.configured:
        settings.configure()
    connection = django()
    monkeypatch.setattr("django.db.transaction.get_connection", lambda using=None: connection)
    with pytest.raises(Fatal, match=r"not inside of transaction\.atomic"):
        enqueue_in(connection, bank.paid.record("ann", Paid(1)))
    with Atomic(None, True, False), connection.cursor() as cursor:
        cursor.execute(INSERT.replace("?", "%s"), ("ann", 1))
        enqueue_in(connection, bank.paid.record("ann", Paid(1)))
    with Atomic(None, True, False):
        enqueue_in(connection, bank.paid.record("bob", Paid(1)))
        connection.set_rollback(True)
    assert bank.balances() == bank.told() == {"ann": 1}

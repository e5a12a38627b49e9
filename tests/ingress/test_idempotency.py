"""Idempotency-Key in the user's own database: the decision table, races, expiry, and every kind of connection."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy
from fastapi import Depends, FastAPI, Response
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Route

from semel import App, Created, IdempotencyMiddleware
from semel.databases import connect
from semel.databases.borrowed import borrow, is_busy
from semel.errors import ConfigurationError, Fatal, OutcomeUnknown, Retriable
from semel.ingress import claims
from semel.ingress.idempotency import IdempotentRequest
from semel.ops.guarantees import edges_of
from tests.ingress.bank import SCHEMA, make_bank, who
from tests.ingress.client import Got, call, post
from tests.outbox.test_enqueue import alchemy, django_connections, open_raw

PATH = "/accounts/ann/transfers"


@pytest.fixture
def url(url: str) -> str:
    """The URL of a database with the bank's table."""
    database = connect(url)
    database.migrate(SCHEMA)
    database.close()
    return url


def rows(url: str, sql: str) -> list[tuple[Any, ...]]:
    database = connect(url)
    try:
        return database.query(sql)
    finally:
        database.close()


def transfers(url: str) -> list[tuple[str, int]]:
    return [(name, cents) for name, cents in rows(url, "SELECT id, cents FROM transfer ORDER BY id, cents")]


async def ask(api: Any, cents: int = 5, key: str | None = "k1", path: str = PATH, **more: Any) -> Got:
    return await post(api, path, b'{"cents": %d}' % cents, key, **more)


def starlette(route: Route) -> Starlette:
    return Starlette(routes=[route], middleware=[Middleware(IdempotencyMiddleware)])


def play(work: Callable[[], Any]) -> Any:
    return asyncio.run(work())


def test_a_retry_gets_the_first_answer_byte_for_byte(url: str) -> None:
    async def work() -> None:
        api = make_bank(url)
        first = await ask(api)
        assert (first.status, "idempotency-replayed" in first.headers) == (201, False)
        again = await ask(make_bank(url))  # Another instance.
        assert (again.status, again.body) == (201, first.body)
        assert again.headers == first.headers | {"idempotency-replayed": "true"}
        assert first.headers["location"] == f"/transfers/{first.json['number']}"
        assert transfers(url) == [("ann", 5)]
        other = await ask(api, key="k2")
        assert other.json != first.json
        assert transfers(url) == [("ann", 5), ("ann", 5)]

    play(work)


def test_a_key_is_not_reused_for_anything_else(url: str) -> None:
    async def work() -> None:
        api = make_bank(url)
        await ask(api)
        for got in (
            await ask(api, 6),
            await ask(api, path=f"{PATH}?note=x"),
            await ask(api, path="/accounts/bob/transfers"),
        ):
            assert (got.status, got.type) == (422, "/errors/idempotency-key-reused")
        assert transfers(url) == [("ann", 5)]

    play(work)


def test_what_is_refused_before_the_claim_stores_nothing(url: str) -> None:
    async def work() -> None:
        api = make_bank(url)
        missing = await ask(api, key=None)
        assert (missing.status, missing.type) == (400, "/errors/idempotency-key-missing")
        for key in ("", '"', "a" * 256, "\x7f"):
            got = await ask(api, key=key)
            assert (got.status, got.type) == (400, "/errors/idempotency-key-invalid"), key
        twice = await ask(api, headers=[("idempotency-key", "other")])
        assert twice.type == "/errors/idempotency-key-invalid"
        assert (await post(api, PATH, b'{"cents": "x"}', "k1")).status == 422, "FastAPI's own validation"
        large = await post(api, PATH, b'{"cents": 5, "x": "' + b"x" * 600_000 + b'"}', "k1")
        assert (large.status, large.type) == (413, "/errors/body-too-large")
        assert rows(url, "SELECT * FROM semel_idempotency") == []
        assert (await ask(api)).status == 201

    play(work)


def test_a_declined_transfer_is_an_outcome_and_a_failed_one_is_none(url: str) -> None:
    async def work() -> None:
        api = make_bank(url)
        declined = await ask(api, 2_000)
        assert (declined.status, declined.type) == (402, "/errors/declined")
        again = await ask(api, 2_000)
        assert again.body == declined.body
        assert again.headers["idempotency-replayed"] == "true"
        with pytest.raises(ZeroDivisionError):
            await ask(api, -1, key="k2")
        assert transfers(url) == []
        assert (await ask(api, 7, key="k2")).status == 201, "nothing was stored under the key, not even its content"

    play(work)


def test_keys_of_one_principal_are_unknown_to_another(url: str) -> None:
    async def work() -> None:
        api = make_bank(url, principal=who)
        first = await ask(api, headers=[("x-user", "ann")])
        other = await ask(api, headers=[("x-user", "bob")])
        assert first.json != other.json
        assert (await ask(api, headers=[("x-user", "ann")])).json == first.json
        nobody = await ask(api)
        assert (nobody.status, nobody.type) == (500, "/errors/principal-failed")

    play(work)


def test_many_at_once_run_once_and_all_get_the_same_answer(url: str) -> None:
    async def work() -> None:
        api = make_bank(url, wait_seconds=20)
        found = await asyncio.gather(*(ask(api, key=f"k{number % 3}") for number in range(24)))
        assert {got.status for got in found} == {201}
        assert len({got.body for got in found}) == 3
        assert sum("idempotency-replayed" not in got.headers for got in found) == 3
        assert len(transfers(url)) == 3

    play(work)


def test_who_waits_for_the_first_request_gets_its_answer_or_409(url: str) -> None:
    """On SQLite a writer is in the way of everybody, so there it is 503: nobody knows whose key it is."""
    entered, go_on = threading.Event(), threading.Event()

    def inside() -> None:
        entered.set()
        assert go_on.wait(60)

    async def work() -> None:
        api, other = make_bank(url, inside=inside), make_bank(url, wait_seconds=0.05)
        await ask(other, key="k0")  # Its tables are there.
        first = asyncio.create_task(ask(api))
        await asyncio.to_thread(entered.wait, 60)
        if url.startswith("postgres"):
            refused = await ask(other, headers=[("prefer", "wait=0")])
            assert (refused.status, refused.type) == (409, "/errors/idempotency-key-in-use")
            assert refused.headers["retry-after"] == "1"
        waiting = asyncio.create_task(ask(make_bank(url, wait_seconds=20)))
        await asyncio.sleep(0.2)  # It is at the row, or comes to it later: either way it has to wait or to find it.
        go_on.set()
        answered = await first
        assert answered.status == 201
        late = await waiting
        assert (late.body, late.headers["idempotency-replayed"]) == (answered.body, "true")
        assert len(transfers(url)) == 2

    play(work)


def test_after_a_rollback_the_next_in_line_runs(url: str) -> None:
    entered, go_on = threading.Event(), threading.Event()
    fails = [True]

    def inside() -> None:
        if fails.pop() if fails else False:
            entered.set()
            assert go_on.wait(60)
            raise ZeroDivisionError

    async def work() -> None:
        api = make_bank(url, inside=inside, wait_seconds=20)
        first = asyncio.create_task(ask(api))
        await asyncio.to_thread(entered.wait, 60)
        second = asyncio.create_task(ask(api))
        go_on.set()
        with pytest.raises(ZeroDivisionError):
            await first
        got = await second
        assert (got.status, "idempotency-replayed" in got.headers) == (201, False)
        assert transfers(url) == [("ann", 5)]

    play(work)


def test_a_key_holds_for_its_days_and_is_then_a_new_one(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    [(today,)] = rows(url, f"SELECT {claims._DAY[connect(url).title]}")

    def it_is(day: int) -> None:
        monkeypatch.setattr(claims, "_DAY", dict.fromkeys(claims._DAY, str(day)))

    async def work() -> None:
        it_is(today)
        first = await ask(make_bank(url))
        it_is(today + 1)
        assert (await ask(make_bank(url))).body == first.body
        it_is(today - 1)  # The database's clock was set back, by less than a key's time.
        assert (await ask(make_bank(url))).body == first.body
        it_is(today + 2)
        new = await ask(make_bank(url))
        assert "idempotency-replayed" not in new.headers
        assert new.body != first.body
        kept = {day for (day,) in rows(url, "SELECT day FROM semel_idempotency")}
        assert kept == {today, today + 1, today + 2}, "today is past, and was not dropped yet"
        it_is(today + 3)
        await ask(make_bank(url), key="k2")
        assert min(day for (day,) in rows(url, "SELECT day FROM semel_idempotency")) > today

    play(work)


def test_the_longest_time_that_any_app_asks_for_holds_for_the_days_of_all(url: str) -> None:
    async def work() -> None:
        await ask(make_bank(url, keep_days=9))
        database = connect(url)
        [(today,)] = database.query(f"SELECT {claims._DAY[database.title]}")
        claims.tend(database, 1)
        database.close()
        assert len(rows(url, "SELECT * FROM semel_idempotency")) == 10
        assert (await ask(make_bank(url, keep_days=9))).headers["idempotency-replayed"] == "true"
        assert min(day for (day,) in rows(url, "SELECT day FROM semel_idempotency")) == today - 9

    play(work)


def test_a_claim_without_an_answer_is_not_committed(url: str) -> None:
    app = App("bank")
    idempotent = app.idempotency(app.database(url))
    api = FastAPI()
    api.add_middleware(IdempotencyMiddleware)

    @api.post("/orders")
    def forget(request: IdempotentRequest = Depends(idempotent)) -> None:  # noqa: B008
        database = connect(url)
        database.begin()
        try:
            with request.claim(database):
                pass
        finally:
            database.close()

    @api.post("/early")
    def early(request: IdempotentRequest = Depends(idempotent)) -> Any:  # noqa: B008
        database = connect(url)
        database.begin()
        with request.claim(database) as claim:
            database.commit()
            claim.answer(1)
            raise ZeroDivisionError

    async def work() -> None:
        with pytest.raises(Fatal, match=r"without claim\.answer"):
            await post(api)
        assert rows(url, "SELECT * FROM semel_idempotency") == []
        with pytest.raises(ZeroDivisionError):
            await post(api, "/early")
        got = await post(api, "/early")
        assert (got.status, got.type) == (409, "/errors/idempotency-key-in-use")
        assert "without a response" in got.json["detail"]

    play(work)


def test_outcomes_that_nobody_knows_and_databases_that_are_away_are_503_with_the_same_key() -> None:
    def answer(error: Exception) -> Got:
        async def fail(_: Any) -> Response:
            raise error

        api = starlette(Route("/orders", fail, methods=["POST"]))
        found: Got = play(lambda: post(api))
        return found

    unknown = answer(OutcomeUnknown("the connection broke in COMMIT"))
    assert (unknown.status, unknown.type) == (503, "/errors/outcome-unknown")
    away = answer(Retriable("nobody answers"))
    assert (away.status, away.type, away.headers["retry-after"]) == (503, "/errors/unavailable", "1")
    with pytest.raises(ZeroDivisionError):
        answer(ZeroDivisionError())


def test_what_cannot_be_stored_is_told_and_without_the_middleware_nothing_is_done(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/bank.db"
    app = App("bank")
    idempotent = app.idempotency(app.database(url))

    def take(request: IdempotentRequest = Depends(idempotent)) -> None:  # noqa: B008
        database = connect(url)
        database.begin()
        with request.claim(database) as claim:
            for bad in (b"x" * 70_000, Created(1, {"Set-Cookie": "a=b"}), object()):
                with pytest.raises((ValueError, TypeError)):
                    claim.answer(bad)
            raise ZeroDivisionError

    bare, api = FastAPI(), FastAPI()
    bare.post("/orders")(take)
    with pytest.raises(ConfigurationError, match="IdempotencyMiddleware"):
        play(lambda: post(bare))
    api.post("/orders")(take)
    api.add_middleware(IdempotencyMiddleware)
    with pytest.raises(ZeroDivisionError):
        play(lambda: post(api))
    for wrong in ({"keep_days": 0}, {"keep_days": 31}, {"wait_seconds": 60}):
        with pytest.raises(ConfigurationError):
            app.idempotency(app.databases["database"], **wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="no database"):
        app.idempotency("bank")  # type: ignore[arg-type]


def test_without_its_table_production_says_what_to_do(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMEL_PROFILE", "production")
    with pytest.raises(ConfigurationError, match="semel migrate"):
        play(lambda: ask(make_bank(url)))


def test_the_guarantee_report_has_the_edge() -> None:
    app = App("bank")
    bank = app.database("postgresql://bank@db/bank")
    app.idempotency(bank, keep_days=2)
    [edge] = edges_of(app, 2)
    assert edge.edge == "HTTP with app.idempotency -> database database (PostgreSQL)"
    assert "kept 2 to 3 days" in edge.dedup
    assert "shared by all callers" in edge.weakened[0]


# --- Connections that others made ---


def prepared(url: str) -> str:
    """A database with the table of keys."""
    made = connect(url)
    made.migrate(claims.schema_sql(made.title))
    claims.tend(made, 1)
    made.close()
    return url


def claim_with(connection: Any, key: bytes = b"s" * 32) -> Any:
    return IdempotentRequest(key, b"f" * 33, 1, 5.0).claim(connection)


def stored(url: str) -> list[tuple[int, Any]]:
    found = rows(url, "SELECT status, body FROM semel_idempotency WHERE status IS NOT NULL")
    return [(status, msgspec.json.decode(bytes(body))) for status, body in found]


def test_a_plain_sqlite3_connection(tmp_path: Path) -> None:
    url = prepared(f"sqlite:///{tmp_path}/bank.db")
    connection = sqlite3.connect(tmp_path / "bank.db")
    with connection, claim_with(connection) as claim:
        claim.answer({"id": 1})
    assert stored(url) == [(200, {"id": 1})]
    connection.isolation_level = None
    with pytest.raises(Fatal, match="BEGIN IMMEDIATE"):
        borrow(connection)
    connection.close()


@pytest.mark.postgres
def test_psycopg_in_both_colours(postgres: Any) -> None:
    import psycopg
    from psycopg.rows import dict_row

    url = prepared(postgres.new_database())
    with psycopg.connect(url, row_factory=dict_row) as connection:
        with claim_with(connection) as claim:
            claim.answer({"id": 1})
        [before] = connection.execute("SHOW lock_timeout").fetchall()
        assert before == {"lock_timeout": "0"}, "the time limit was for the claim only"

    async def work() -> None:
        async with await psycopg.AsyncConnection.connect(url) as connection:
            with pytest.raises(ConfigurationError, match="async with"):
                claim_with(connection, b"t" * 32).__enter__()
            async with claim_with(connection, b"t" * 32) as claim:
                claim.answer({"id": 2})

    play(work)
    assert sorted(body["id"] for _, body in stored(url)) == [1, 2]
    with psycopg.connect(url, autocommit=True) as connection:
        with pytest.raises(Fatal, match="autocommit"):
            borrow(connection)
        with connection.transaction():
            borrow(connection)


@pytest.mark.mariadb
def test_pymysql(mariadb: Any) -> None:
    url = prepared(mariadb.new_database())
    connection = open_raw(url)
    with claim_with(connection) as claim:
        claim.answer({"id": 1})
    connection.commit()
    assert stored(url) == [(200, {"id": 1})]
    connection.autocommit(True)
    with pytest.raises(Fatal, match="autocommit"):
        borrow(connection)
    connection.begin()
    with pytest.raises(Exception, match="answered 200"), claim_with(connection):
        pytest.fail("the key was known")
    connection.close()


KINDS = [
    "sqlite",
    pytest.param("postgres", marks=pytest.mark.postgres),
    pytest.param("mariadb", marks=pytest.mark.mariadb),
]


@pytest.mark.parametrize("url", KINDS, indirect=True)
def test_sqlalchemy_connections_and_sessions(url: str) -> None:
    from sqlalchemy.orm import Session, scoped_session, sessionmaker

    prepared(url)
    engine = sqlalchemy.create_engine(alchemy(url))
    with engine.begin() as connection, claim_with(connection) as claim:
        claim.answer({"id": 1})
    with Session(engine) as session, session.begin(), claim_with(session, b"t" * 32) as claim:
        claim.answer({"id": 2})
    with Session(engine) as session:  # It begins with its first statement.
        with claim_with(session, b"u" * 32) as claim:
            claim.answer({"id": 3})
        session.commit()
    scoped = scoped_session(sessionmaker(engine))
    with claim_with(scoped, b"v" * 32) as claim:
        claim.answer({"id": 4})
    scoped.commit()
    scoped.remove()
    assert sorted(body["id"] for _, body in stored(url)) == [1, 2, 3, 4]
    with pytest.raises(Exception, match="answered 200"), engine.begin() as connection, claim_with(connection):
        pytest.fail("the key was known")
    engine.dispose()


@pytest.mark.parametrize("url", KINDS, indirect=True)
def test_sqlalchemy_without_a_transaction_claims_nothing(url: str) -> None:
    """In autocommit the key would be taken although the endpoint's own rows may never come."""
    from sqlalchemy.orm import Session

    prepared(url)
    engine = sqlalchemy.create_engine(alchemy(url))
    with engine.connect() as connection, pytest.raises(Fatal, match="has no transaction"):
        claim_with(connection).__enter__()
    alone = engine.execution_options(isolation_level="AUTOCOMMIT")
    with alone.begin() as connection, pytest.raises(Fatal, match=r"autocommit.*Nothing was written"):
        claim_with(connection).__enter__()
    with Session(alone) as session, session.begin(), pytest.raises(Fatal, match="autocommit"):
        claim_with(session).__enter__()
    assert rows(url, "SELECT * FROM semel_idempotency") == []
    engine.dispose()


@pytest.mark.postgres
def test_sqlalchemy_in_coroutines(postgres: Any) -> None:
    from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

    url = prepared(postgres.new_database())

    async def work() -> None:
        engine = create_async_engine(alchemy(url))
        async with engine.begin() as connection, claim_with(connection) as claim:
            claim.answer({"id": 1})
        async with AsyncSession(engine) as session:
            async with claim_with(session, b"t" * 32) as claim:
                claim.answer({"id": 2})
            await session.commit()
        async with engine.connect() as connection:
            with pytest.raises(Fatal, match="has no transaction"):
                await claim_with(connection, b"u" * 32).__aenter__()
        alone = engine.execution_options(isolation_level="AUTOCOMMIT")
        async with AsyncSession(alone) as session, alone.begin() as connection:
            for taken in (session, connection):
                with pytest.raises(Fatal, match="autocommit"):
                    await claim_with(taken, b"u" * 32).__aenter__()
        await engine.dispose()

    play(work)
    assert sorted(body["id"] for _, body in stored(url)) == [1, 2]
    assert len(rows(url, "SELECT * FROM semel_idempotency")) == 4, "two keys, each on two days"


def test_a_driver_of_which_nothing_is_known_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = prepared(f"sqlite:///{tmp_path}/bank.db")
    monkeypatch.setattr("semel.databases.borrowed._CHECKS", {})
    engine = sqlalchemy.create_engine(url)
    alone = engine.execution_options(isolation_level="AUTOCOMMIT")
    with alone.begin() as connection, pytest.raises(Fatal, match="autocommit"):
        borrow(connection)  # SQLAlchemy's own word for it.
    monkeypatch.delattr(sqlalchemy.dialects.sqlite.pysqlite.SQLiteDialect_pysqlite, "detect_autocommit_setting")
    with engine.begin() as connection, pytest.raises(ConfigurationError, match=r"cannot tell.*nothing was written"):
        claim_with(connection).__enter__()
    engine.dispose()


@pytest.mark.parametrize("url", KINDS[:2], indirect=True)
@pytest.mark.filterwarnings("ignore:Accessing the database")
def test_django(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from django.conf import settings
    from django.db.transaction import Atomic

    if not settings.configured:
        settings.configure()
    prepared(url)
    connections = django_connections(url)
    connection = connections["default"]
    monkeypatch.setattr("django.db.transaction.get_connection", lambda using=None: connection)
    with pytest.raises(Fatal, match=r"not inside of transaction\.atomic"):
        claim_with(connection).__enter__()
    with Atomic(None, True, False), claim_with(connection) as claim:
        claim.answer({"id": 1})
    with Atomic(None, True, False):
        with claim_with(connection, b"t" * 32) as claim:
            claim.answer({"id": 2})
        connection.set_rollback(True)
    assert stored(url) == [(200, {"id": 1})]
    with pytest.raises(Exception, match="answered 200"), Atomic(None, True, False), claim_with(connection):
        pytest.fail("the key was known")
    connections.close_all()


def test_a_transaction_of_semel_in_both_colours(url: str) -> None:
    from semel.outbox.tables import schema_sql

    database = connect(url)
    database.migrate(schema_sql(database.title))
    database.close()
    app = App("bank")
    bank = app.database(prepared(url), outbox=True)
    with app.transaction(bank) as tx, claim_with(tx) as claim:
        tx.execute("INSERT INTO transfer (id, cents) VALUES (?, ?)", ("ann", 1))
        claim.answer({"id": 1})

    async def work() -> None:
        async with app.transaction(bank) as tx, claim_with(tx, b"t" * 32) as claim:
            await tx.execute("INSERT INTO transfer (id, cents) VALUES (?, ?)", ("bob", 2))
            claim.answer({"id": 2})

    play(work)
    app.close()
    assert sorted(body["id"] for _, body in stored(url)) == [1, 2]
    assert transfers(url) == [("ann", 1), ("bob", 2)]


def test_a_thing_that_is_no_connection_is_told() -> None:
    with pytest.raises(ConfigurationError, match="is no connection that Semel knows"):
        borrow(object())
    assert not is_busy(ValueError())


def test_a_starlette_endpoint_asks_by_itself(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/bank.db"
    app = App("bank")
    idempotent = app.idempotency(app.database(url))

    async def take(request: Any) -> Any:
        known = await idempotent(request)
        connection = sqlite3.connect(tmp_path / "bank.db")
        with connection, known.claim(connection) as claim:
            claim.answer(Created({"path": request.url.path}))
        connection.close()
        return claim.response

    api = starlette(Route("/orders/{id}", take, methods=["POST"]))

    async def work() -> None:
        first = await post(api, "/orders/1")
        assert (first.status, first.json) == (201, {"path": "/orders/1"})
        assert (await post(api, "/orders/1")).headers["idempotency-replayed"] == "true"
        assert (await call(api, "GET", "/other")).status == 404

    play(work)

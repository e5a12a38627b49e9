"""The connection is cut after COMMIT was sent and before its answer: what became of the transaction is looked up, never
guessed, and whoever is told "nothing happened" may run it again."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator

import pytest

from semel.databases import connect
from semel.errors import OutcomeUnknown, Retriable
from semel.outbox.session import Session
from semel.outbox.tables import schema_sql
from semel.outbox.transaction import AsyncTransaction
from tests.outbox.bank import INSERT, SCHEMA, Bank, Paid
from tests.services.mariadb import MariadbServer
from tests.services.postgres import PostgresServer
from tests.sinks.cutting_proxy import CuttingProxy, When


@pytest.fixture(params=[pytest.param("postgres", marks=pytest.mark.postgres)])
def server(request: pytest.FixtureRequest) -> PostgresServer | MariadbServer:
    found: PostgresServer | MariadbServer = request.getfixturevalue(request.param)
    return found


on_mariadb_too = pytest.mark.parametrize(
    "server",
    [pytest.param("postgres", marks=pytest.mark.postgres), pytest.param("mariadb", marks=pytest.mark.mariadb)],
    indirect=True,
)


@pytest.fixture
def proxy(server: PostgresServer | MariadbServer) -> Iterator[CuttingProxy]:
    made = CuttingProxy(server.port)
    yield made
    made.close()


@pytest.fixture
def bank(server: PostgresServer | MariadbServer, proxy: CuttingProxy) -> Iterator[Bank]:
    """The app behind the proxy, with a connection; the test looks without it."""
    url = server.new_database()
    look = connect(url)
    look.migrate(schema_sql(look.title))
    look.migrate(SCHEMA)
    found = Bank(url.replace(f":{server.port}/", f":{proxy.port}/"), look)
    found.open_account("first", 1)
    yield found
    found.app.close()
    look.close()


def cuts(bank: Bank, proxy: CuttingProxy, times: int) -> tuple[int, int]:
    """Cut so many COMMITs; how many of them were done, and how many were not."""
    whens: list[When] = ["before", "at", "after"]
    rng = random.Random(7)
    done = refused = 0
    for number in range(times):
        name = f"account-{number}"
        proxy.when = rng.choice(whens)
        try:
            bank.open_account(name, number)
        except Retriable as error:
            assert "Nothing was committed" in str(error)  # noqa: PT017
            assert name not in bank.balances()
            refused += 1
            bank.open_account(name, number)  # The error says so.
        else:
            assert bank.balances()[name] == number
            done += 1
        assert proxy.when == "never"
    assert bank.balances() == bank.told()
    assert len(bank.rows()) == times + 1  # Each once.
    return done, refused


def test_fifty_cuts_are_resolved(bank: Bank, proxy: CuttingProxy) -> None:
    done, refused = cuts(bank, proxy, 50)
    assert min(done, refused) > 5
    assert proxy.cuts == 50


@on_mariadb_too
def test_a_cut_in_the_look_at_a_cut_is_looked_behind(bank: Bank, proxy: CuttingProxy) -> None:
    pool = bank.app.writer("database").pool
    session = pool.borrow()
    pool.give_back(session)
    assert isinstance(session, Session)
    ways: list[When] = ["before", "after"]
    told = {}
    for at in ways:
        for look in ways:
            proxy.when = at
            proxy.cut_again(session.database, look)
            try:
                bank.open_account(f"{at}-{look}", 1)
            except Retriable as error:
                assert "Nothing was committed" in str(error)  # noqa: PT017
                told[f"{at}-{look}"] = False
                bank.open_account("to have a connection", 1)
                bank._look.execute("DELETE FROM account WHERE id = 'to have a connection'")
            else:
                told[f"{at}-{look}"] = True
            assert proxy.when == "never"
    assert told == {f"{at}-{look}": at == "after" for at in ways for look in ways}
    assert proxy.cuts == 8
    assert bank.balances() == {"first": 1} | {name: 1 for name, done in told.items() if done}


@pytest.mark.soak
def test_a_thousand_cuts_are_resolved(bank: Bank, proxy: CuttingProxy) -> None:
    done, refused = cuts(bank, proxy, 1_000)
    print(f"{done} were committed, {refused} were not; 1,000 resolved")
    assert min(done, refused) > 100


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_same_in_a_coroutine(bank: Bank, proxy: CuttingProxy, when: When) -> None:
    async def work(tx: AsyncTransaction) -> None:
        await tx.execute(INSERT, ("ann", 1))
        tx.send(bank.paid.record("ann", Paid(1)))
        proxy.when = when

    if when == "before":
        with pytest.raises(Retriable, match="Nothing was committed"):
            bank.run(work)
        assert (set(bank.balances()), bank.woken) == ({"first"}, 1)
    else:
        bank.run(work)
        assert (set(bank.balances()), bank.woken) == ({"first", "ann"}, 2)
    assert bank.balances() == bank.told()


def test_a_database_that_stays_away_leaves_it_open_and_says_how_to_look(bank: Bank, proxy: CuttingProxy) -> None:
    session = bank.app.writer("database").pool.borrow()
    session._settle_seconds = 0.2
    bank.app.writer("database").pool.give_back(session)
    proxy.when, proxy.refuse = "after", True
    with pytest.raises(OutcomeUnknown, match="in the database whole or not at all") as raised:
        bank.open_account("ann", 1)
    proxy.refuse = False
    # The error's statement tells.
    text = str(raised.value)
    statement, _, verdict = text[text.index("SELECT number") :].partition(" gives ")
    assert verdict.startswith("2 if it was committed, 1 if not")
    assert bank._look.query(statement) == [(2,)]
    assert bank.balances()["ann"] == 1
    msg_id = bank._look.query("SELECT msg_id FROM semel_outbox WHERE record_key = ?", (b"ann",))[0][0]
    assert msg_id in text
    bank.open_account("bob", 1)  # The pool is as good as new.


def test_a_row_that_is_gone_says_nothing(bank: Bank, proxy: CuttingProxy) -> None:
    """A restored database: nobody may conclude from a missing row that nothing was committed."""
    proxy.when, proxy.refuse = "after", True

    def restore() -> None:
        while proxy.when != "never":
            pass
        bank._look.execute("DELETE FROM semel_commit")
        proxy.refuse = False

    thread = threading.Thread(target=restore)
    thread.start()
    with pytest.raises(OutcomeUnknown, match="the row that would tell is gone"):
        bank.open_account("ann", 1)
    thread.join()
    bank.open_account("bob", 1)


def test_a_connection_that_the_server_closed_is_opened_again(bank: Bank) -> None:
    direct = Bank(bank._look.url, bank._look)
    for number in range(3):
        direct.open_account(f"account-{number}", 1)
        bank._look.query(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    direct.open_account("last", 1)
    assert len(bank.balances()) == 5
    direct.app.close()


def test_rows_of_commits_do_not_grow(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("semel.outbox.session._TRANSACTIONS_PER_ROW", 3)
    taken = set()
    for number in range(10):
        bank.open_account(f"account-{number}", 1)
        rows = bank._look.query("SELECT session_id, number FROM semel_commit")
        assert len(rows) == 1
        taken.add(rows[0][0])
    assert len(taken) == 4
    bank.app.close()
    assert bank._look.query("SELECT session_id FROM semel_commit") == []


def test_a_database_that_is_away_is_told_at_once_and_nothing_happened(bank: Bank, proxy: CuttingProxy) -> None:
    async def work(tx: AsyncTransaction) -> None:
        raise AssertionError("never begun")

    proxy.refuse = True
    proxy_connections = bank.app.writer("database").pool
    session = proxy_connections.borrow()
    session.database.close()
    proxy_connections.give_back(session)
    with pytest.raises(Retriable, match=r"no transaction could be begun on .*nothing happened") as raised:
        asyncio.run(_once(bank, work))
    assert "postgres@" in str(raised.value)


async def _once(bank: Bank, work: object) -> None:
    async with bank.app.transaction(bank.database) as tx:
        await work(tx)  # type: ignore[operator]

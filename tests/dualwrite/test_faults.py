"""Kafka away, the broker killed behind the COMMIT, a COMMIT without an answer, zombies, rows that are gone: what the
caller is told is true, and in the end both have it or neither."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
import pymysql
import pytest

from semel.databases import open_database
from semel.databases.database import title_of
from semel.databases.spec import DatabaseSpec
from semel.dualwrite.keeping import make_keeper
from semel.dualwrite.plan import Plan
from semel.dualwrite.recovery import Recovery
from semel.dualwrite.rows import Rows
from semel.dualwrite.session import DualSession
from semel.dualwrite.sql import SqlStore
from semel.dualwrite.store import SlotRow
from semel.env import Env
from semel.errors import (
    ConfigurationError,
    Fatal,
    Fenced,
    OutcomeUnknown,
    Retriable,
    SemelError,
    TwoPhaseCommitUnavailable,
)
from semel.failpoints import arm_failpoints
from semel.processing.effects import Produce
from semel.processing.metrics import Metrics
from semel.settings import Settings
from tests.conftest import Address
from tests.dualwrite.world import Bank, Paid, World, in_a_child
from tests.services.broker import BrokerProcess
from tests.services.mariadb import MariadbServer
from tests.services.postgres import PostgresServer
from tests.sinks.cutting_proxy import CuttingProxy, When


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    arm_failpoints("")


@pytest.fixture
def sqlite(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/dual.db"


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[BrokerProcess]:
    """One of the test's own, to be killed."""
    made = BrokerProcess(tmp_path / "broker")
    made.start()
    yield made
    made.kill()


def eventually(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it does not come to hold"
        time.sleep(0.02)


def store_of(bank: Bank) -> Any:
    """The rows of its slots, as its keeper changes them."""
    keeper = bank.app.writer("database")._keeper
    assert keeper is not None
    assert keeper._keeper is not None
    return keeper._keeper._rows.store


def session_of(bank: Bank) -> DualSession:
    """The session that the next transaction of this process uses."""
    writer = bank.app.writer("database")
    writer.prepare()
    session = writer.pool.borrow()
    writer.pool.give_back(session)
    assert isinstance(session, DualSession)
    return session


# --- Kafka ---


def test_a_kafka_that_is_away_costs_nothing_but_the_records(
    sqlite: str, broker: BrokerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEMEL_KAFKA", broker.bootstrap)
    monkeypatch.setattr("semel.dualwrite.keeper.KAFKA_SECONDS", 0.5)
    world = World(sqlite, broker.bootstrap)
    world.bank.open_account("before", 1)
    broker.kill()
    with pytest.raises(Retriable, match="othing was committed"):
        world.bank.open_account("meanwhile", 1)
    with world.bank.app.transaction(world.bank.database) as tx:
        tx.execute("INSERT INTO account (id, balance) VALUES ('silent', 0)")
    assert set(world.balances()) == {"before", "silent"}
    broker.start()

    def works() -> bool:
        try:
            world.bank.open_account("after", 1)
        except Retriable:
            return False
        return True

    eventually(works)
    world.look.execute("DELETE FROM account WHERE id = 'silent'")
    assert set(world.check()) == {"before", "after"}
    world.close()


def test_the_broker_is_killed_behind_the_commit_and_hears_of_it_when_it_is_back(
    sqlite: str, broker: BrokerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEMEL_KAFKA", broker.bootstrap)
    world = World(sqlite, broker.bootstrap)
    world.bank.open_account("first", 1)
    session = session_of(world.bank)
    commit = session.database.commit

    def killing() -> None:
        commit()
        broker.kill()

    session.database.commit = killing  # type: ignore[method-assign]
    world.bank.open_account("second", 2)  # The database has decided, so the caller has success.
    session.database.commit = commit  # type: ignore[method-assign]
    broker.start()
    eventually(lambda: world.open_in_kafka() == [])
    assert world.told() == {"first": 1, "second": 2}
    world.bank.open_account("third", 3)  # With the same slot, and the same producer.
    assert [row for (row,) in world.look.query("SELECT owner_epoch FROM semel_txn")] == [1]
    assert set(world.check()) == {"first", "second", "third"}
    world.close()


def test_the_end_of_a_program_waits_until_kafka_knows(sqlite: str, embedded: Address) -> None:
    world = World(sqlite, embedded.bootstrap)
    program = (
        "import sys\nfrom semel import App\n"
        "app = App(sys.argv[1])\ntopic = app.topic(sys.argv[2], key=str, value=dict)\n"
        "database = app.database(sys.argv[3], dual_write=True)\n"
        "with app.transaction(database) as tx:\n"
        "    tx.execute('INSERT INTO account (id, balance) VALUES (?, 1)', ('ann',))\n"
        "    tx.send(topic.record('ann', {'cents': 1}))\n"
    )
    environment = {**os.environ, "SEMEL_KAFKA": embedded.bootstrap}
    argv = [sys.executable, "-c", program, world.name, world.topic, sqlite]
    subprocess.run(argv, env=environment, check=True, timeout=60)
    assert world.open_in_kafka() == []
    assert world.told() == {"ann": 1} == world.balances()
    world.close()


# --- What is asked for, and what the broker can do ---


def test_a_broker_that_keeps_nothing_is_refused_or_gets_the_outbox(
    sqlite: str, embedded_v1: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEMEL_KAFKA", embedded_v1.bootstrap)
    alone = World(sqlite, embedded_v1.bootstrap)
    with pytest.raises(TwoPhaseCommitUnavailable, match=r"transaction.version below 2.*outbox=True"):
        alone.bank.open_account("ann", 1)
    assert alone.balances() == {}
    alone.declared["outbox"] = True
    both = Bank(alone)
    both.open_account("ann", 1)
    writer = both.app.writer("database")
    assert writer.choice is not None
    assert writer.choice.plan is Plan.OUTBOX
    assert "V1" in writer.choice.why
    assert alone.look.query("SELECT COUNT(*) FROM semel_outbox") == [(1,)]
    both.app.close()
    alone.close()


def test_a_broker_that_keeps_prepared_transactions_gets_the_dual_write(sqlite: str, embedded: Address) -> None:
    world = World(sqlite, embedded.bootstrap, outbox=True)
    world.bank.open_account("ann", 1)
    assert world.look.query("SELECT COUNT(*) FROM semel_outbox") == [(0,)]
    assert set(world.check()) == {"ann"}
    world.close()


def test_the_slots_of_another_app_are_refused(sqlite: str, embedded: Address) -> None:
    world = World(sqlite, embedded.bootstrap)
    world.look.execute("UPDATE semel_txn_meta SET app = 'other', environment = 'elsewhere'")
    with pytest.raises(ConfigurationError, match="belongs to app 'other'"):
        world.bank.open_account("ann", 1)
    world.look.execute("UPDATE semel_txn_meta SET app = NULL")
    with pytest.raises(ConfigurationError, match="belongs to the Kafka cluster 'elsewhere'"):
        world.bank.open_account("ann", 1)
    assert world.balances() == {}
    world.close()


# --- Records ---


def test_records_that_kafka_does_not_take_are_in_neither(world: World) -> None:
    bank = world.bank
    stranger = bank.app.topic(f"{world.name}.nowhere", key=str, value=bytes)

    def sends(record: Produce, error: Exception | None = None) -> None:
        with bank.app.transaction(bank.database) as tx:
            tx.execute("INSERT INTO account (id, balance) VALUES ('ann', 1)")
            tx.send(bank.paid.record("ann", Paid(1)))
            tx.send(record)
            if error is not None:
                raise error

    with pytest.raises(Fatal, match="UNKNOWN_TOPIC"):
        sends(stranger.record("ann", b""))
    with pytest.raises(KeyError):
        sends(bank.paid.record("bob", Paid(1)), KeyError())
    with bank.app.transaction(bank.database) as tx:
        for number in range(3_000):
            tx.send(bank.paid.record(f"many-{number}", Paid(number)))
    eventually(lambda: world.open_in_kafka() == [])
    assert world.balances() == {}
    assert world.told() == {f"many-{number}": number for number in range(3_000)}


def test_both_colours_and_the_bound_of_the_pool(sqlite: str, embedded: Address) -> None:
    world = World(sqlite, embedded.bootstrap)
    bank = world.bank

    async def pay(number: int) -> None:
        async with bank.app.transaction(bank.database) as tx:
            await tx.execute("INSERT INTO account (id, balance) VALUES (?, ?)", (f"account-{number}", number))
            tx.send(bank.paid.record(f"account-{number}", Paid(number)))

    async def all_of_them() -> None:
        await asyncio.gather(*(pay(number) for number in range(20)))

    asyncio.run(all_of_them())
    pool = bank.app.writer("database").pool
    pool.wait_seconds = 0.05
    with bank.app.transaction(bank.database), pytest.raises(Retriable, match="came free"):
        asyncio.run(pay(20))
    assert set(world.check()) == {f"account-{number}" for number in range(20)}
    world.close()


# --- Other owners ---


def test_a_slot_that_was_taken_over_says_so_and_the_next_transaction_has_another(world: World) -> None:
    world.bank.open_account("first", 1)
    world.look.execute("UPDATE semel_txn SET owner_epoch = owner_epoch + 1, owner = 'somebody'")
    with pytest.raises(Fenced, match="Nothing was committed"):
        world.bank.open_account("second", 2)
    world.bank.open_account("third", 3)
    eventually(lambda: world.open_in_kafka() == [])
    assert set(world.told()) == set(world.balances()) == {"first", "third"}


def test_a_row_that_is_gone_decides_nothing(world: World) -> None:
    world.bank.open_account("first", 1)
    world.look.execute("DELETE FROM semel_txn")
    with pytest.raises(Fenced, match="or its row is gone"):
        world.bank.open_account("second", 2)
    world.bank.open_account("third", 3)
    assert world.look.query("SELECT slot FROM semel_txn") == [(f"{world.name}.dual.database.1",)]
    eventually(lambda: world.open_in_kafka() == [])
    assert set(world.told()) == set(world.balances()) == {"first", "third"}


def test_a_slot_that_cannot_be_given_back_now_is_given_back_later(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its owner, and not by whoever finds it dead when a lease is over."""
    monkeypatch.setattr("semel.dualwrite.keeper.LEASE_SECONDS", 600.0)
    monkeypatch.setattr("semel.dualwrite.keeper.BEAT_SECONDS", 0.02)
    world.bank.open_account("first", 1)
    store = store_of(world.bank)
    release, tries = store.release, count()

    def fails(slot: str, owner: str) -> None:
        if next(tries) < 2:
            raise Retriable("the database is away")
        release(slot, owner)

    store.release = fails
    session_of(world.bank).close()
    eventually(lambda: world.owners() == [])
    assert next(tries) == 3
    world.bank.open_account("second", 2)
    assert world.look.query("SELECT slot FROM semel_txn") == [(f"{world.name}.dual.database.0",)]
    assert set(world.check()) == {"first", "second"}


def test_a_slot_whose_reservation_was_not_answered_is_the_next_one_s(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("semel.dualwrite.keeper.LEASE_SECONDS", 600.0)
    monkeypatch.setattr("semel.dualwrite.keeper._AWAY_SECONDS", 0.0)
    world.bank.open_account("first", 1)
    store = store_of(world.bank)
    session_of(world.bank).close()
    eventually(lambda: world.owners() == [])
    reserve, tries = store.reserve, count()

    def unanswered(row: SlotRow, owner: str) -> bool:
        taken = reserve(row, owner)
        if next(tries) == 0:
            raise Retriable("the answer is lost")
        return taken

    store.reserve = unanswered
    with pytest.raises(Retriable, match=r"nothing was committed: .*the answer is lost"):
        world.bank.open_account("second", 2)
    world.bank.open_account("third", 3)
    assert world.look.query("SELECT slot FROM semel_txn") == [(f"{world.name}.dual.database.0",)]
    assert set(world.check()) == {"first", "third"}


@pytest.mark.postgres
def test_a_long_transaction_under_repeatable_read_outlives_signs_of_life(
    postgres: PostgresServer, embedded: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They go on meanwhile, or it would be taken for dead; and it can change its slot's row all the same."""
    monkeypatch.setattr("semel.dualwrite.keeper.BEAT_SECONDS", 0.02)
    world = World(postgres.new_database(), embedded.bootstrap)
    store = SqlStore(open_database(world.url), world.name, "database")
    with world.bank.app.transaction(world.bank.database) as tx:
        tx.connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        tx.query("SELECT balance FROM account")  # What it sees is settled here.
        before = store.slots()
        eventually(lambda: store.slots()[0].beat > before[0].beat + 1)
        tx.execute("INSERT INTO account (id, balance) VALUES ('ann', 1)")
        tx.send(world.bank.paid.record("ann", Paid(1)))
    store.close()
    assert set(world.check()) == {"ann"}
    world.close()


def test_nobody_else_changes_the_row_of_a_transaction_that_is_open(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the conditional recipe says in it about the last decision waits until the slot rests."""
    monkeypatch.setattr("semel.dualwrite.keeper.BEAT_SECONDS", 600.0)
    world.bank.open_account("first", 1)
    thread = world.bank.app.writer("database")._keeper
    assert thread is not None
    keeper = thread._keeper
    assert keeper is not None
    [slot] = keeper._held.values()
    eventually(lambda: slot.committed != "")
    said: list[str] = []

    async def rested(rows: Rows, slot: str, owner: str, decision: str) -> None:
        said.append(decision)

    monkeypatch.setattr(keeper._recipe, "rested", rested)
    with world.bank.app.transaction(world.bank.database) as tx:
        tx.query("SELECT balance FROM account")
        thread._call(lambda keeper: keeper._rest(slot))
        assert said == []
    thread._call(lambda keeper: keeper._rest(slot))
    assert len(said) == 1
    assert set(world.check()) == {"first"}


ZOMBIES = ["dual.after_prepare", "dual.before_commit", "dual.after_commit", "dual.before_complete"]


@pytest.mark.parametrize("point", ZOMBIES)
def test_a_zombie_that_wakes_up_tears_nothing(
    world: World, tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands still for longer than a lease, and another process recovers its slot. On SQLite one that holds the lock
    is ended; elsewhere the database ends its transaction."""
    monkeypatch.setattr("semel.dualwrite.keeper.LEASE_SECONDS", 0.0)

    def zombie(told: Callable[[str], object]) -> None:
        monkeypatch.setattr("semel.dualwrite.keeper.LEASE_SECONDS", 600.0)
        bank = Bank(world)
        driver_errors = (psycopg.Error, pymysql.Error)
        arm_failpoints(f"{point}:stop:1")
        for number in range(3):
            try:
                bank.open_account(f"zombie-{number}", number)
            except (SemelError, *driver_errors) as error:  # Its connection was closed while it stood still.
                told(f"# {type(error).__name__} {error}")
            else:
                told(f"zombie-{number}")
        bank.app.close()

    done = tmp_path / "done"
    pid = in_a_child(zombie, done)
    assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
    world.recover()
    assert world.open_in_kafka() == []
    assert world.balances() == world.told()
    os.kill(pid, signal.SIGCONT)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    held_lock = code == -signal.SIGKILL
    assert code == 0 or (held_lock and title_of(world.url) == "SQLite")
    assert held_lock or title_of(world.url) != "SQLite" or point not in ("dual.after_prepare", "dual.before_commit")
    found = world.check()
    lines = done.read_text().splitlines()
    assert {line for line in lines if not line.startswith("#")} <= set(found)
    decided = point in ("dual.after_commit", "dual.before_complete")
    assert ("zombie-0" in found) == decided
    if not held_lock:
        assert "zombie-2" in found  # It has another slot by then.


def test_recoverers_that_overlap_tear_nothing(world: World, tmp_path: Path) -> None:
    """Three of them at once at the same dead slots, committed ones and others."""

    def dies(point: str) -> Callable[[Callable[[str], object]], None]:
        def work(told: Callable[[str], object]) -> None:
            bank = Bank(world)
            arm_failpoints(f"{point}:kill:1")
            bank.open_account(f"{point}-{os.getpid()}", 1)
            bank.app.close()

        return work

    async def recover() -> None:
        made = [
            make_keeper(world.name, world_spec(world), {}, Settings(kafka=world.bootstrap), Env(), Metrics())
            for _ in range(3)
        ]
        async with asyncio.timeout(60):
            await asyncio.gather(*(keeper.open() for keeper, _ in made))
            while world.owners():
                await asyncio.gather(*(keeper.sweep() for keeper, _ in made))
        for keeper, close in made:
            await keeper.abandon()
            await close()

    committed = 0
    for point in ("dual.after_commit", "dual.before_commit", "dual.before_complete"):
        pid = in_a_child(dies(point), tmp_path / "done")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        asyncio.run(recover())
        committed += point != "dual.before_commit"
        assert world.open_in_kafka() == []
        assert len(world.balances()) == committed
        assert world.balances() == world.told()


def world_spec(world: World) -> DatabaseSpec:
    return DatabaseSpec("database", world.url, dual_write=True)


def test_a_worker_recovers_although_nobody_writes(sqlite: str, embedded: Address, tmp_path: Path) -> None:
    """What `semel run` has for it, from its start; who writes is a web server that was killed."""
    world = World(sqlite, embedded.bootstrap)
    metrics = Metrics()
    settings = Settings(kafka=embedded.bootstrap)
    recovery = Recovery(world.name, world.spec(), {}, settings, Env(), metrics)

    def writes(told: Callable[[str], object]) -> None:
        bank = world.new_bank()
        arm_failpoints("dual.after_commit:kill:1")
        bank.open_account("ann", 1)

    pid = in_a_child(writes, tmp_path / "done")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert world.open_in_kafka() == [f"{world.name}.dual.database.0"]

    async def work() -> None:
        running = asyncio.create_task(recovery.run())
        async with asyncio.timeout(60):
            while world.owners():
                await asyncio.sleep(0.02)
            await recovery.drain()
            await running

    asyncio.run(work())
    assert world.told() == world.balances() == {"ann": 1}
    assert 'semel_dual_recovered_total{component="dual",found="committed"} 1' in metrics.render()
    world.close()


def test_a_worker_on_a_broker_that_keeps_nothing_ends_or_waits_beside_the_outbox(
    sqlite: str, embedded_v1: Address, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "semel.dualwrite")
    settings = Settings(kafka=embedded_v1.bootstrap)

    async def work(outbox: bool) -> None:
        spec = DatabaseSpec("database", sqlite, outbox=outbox, dual_write=True)
        recovery = Recovery("bank", spec, {}, settings, Env(), Metrics())
        async with asyncio.timeout(60):
            running = asyncio.create_task(recovery.run())
            while outbox and "nothing to recover: the outbox is used" not in caplog.text:
                await asyncio.sleep(0.02)
            if outbox:
                await recovery.drain()
            await running

    asyncio.run(work(outbox=True))
    with pytest.raises(TwoPhaseCommitUnavailable):
        asyncio.run(work(outbox=False))


# --- A COMMIT without an answer ---


@pytest.mark.parametrize(
    "kind",
    [pytest.param("postgres", marks=pytest.mark.postgres), pytest.param("mariadb", marks=pytest.mark.mariadb)],
)
def test_cut_commits_are_looked_up(kind: str, request: pytest.FixtureRequest, embedded: Address) -> None:
    """Also where the COMMIT of the look is cut, too."""
    server: PostgresServer | MariadbServer = request.getfixturevalue(kind)
    proxy = CuttingProxy(server.port)
    url = server.new_database()
    world = World(url, embedded.bootstrap)
    bank = World.__new__(World)  # The same world, seen through the proxy.
    bank.__dict__.update(world.__dict__)
    bank.url = url.replace(f":{server.port}/", f":{proxy.port}/")
    app = Bank(bank)
    app.open_account("first", 1)
    session = session_of(app)
    told: dict[str, bool] = {}
    whens: list[tuple[When, When]] = [(at, look) for at in ("before", "after") for look in ("never", "before", "after")]
    for at, look in whens:
        name = f"{at}-{look}"
        # The keeper's own statements go another way: only the session's COMMITs are cut.
        proxy.when = at
        proxy.cut_again(session.database, look)
        try:
            app.open_account(name, 1)
        except Retriable as error:
            assert "othing was committed" in str(error)  # noqa: PT017
            told[name] = False
        else:
            told[name] = True
        assert proxy.when == "never"
    assert told == {f"{at}-{look}": at == "after" for at, look in whens}
    assert proxy.cuts == 10
    app.app.close()
    proxy.close()
    assert set(world.check()) == {"first", *(name for name, done in told.items() if done)}
    world.close()


def test_the_answer_to_the_look_is_lost_too(world: World) -> None:
    world.bank.open_account("first", 1)
    database = session_of(world.bank).database
    commit, lost = database.commit, iter((True, True))

    def losing() -> None:
        commit()
        if next(lost, False):
            database.close()
            raise OutcomeUnknown("the answer is lost")

    database.commit = losing  # type: ignore[method-assign]
    world.bank.open_account("second", 2)
    assert not any(lost)
    assert set(world.check()) == {"first", "second"}


def test_an_outcome_that_nobody_can_tell_is_decided_by_recovery(world: World) -> None:
    world.bank.open_account("first", 1)
    session = session_of(world.bank)
    session._settle_seconds = 0.0
    commit, connect = session.database.commit, session.database.connect

    def lost() -> None:
        commit()
        session.database.close()
        raise OutcomeUnknown("the answer is lost")

    def away() -> None:
        raise open_database_error(world)

    session.database.commit, session.database.connect = lost, away  # type: ignore[method-assign]
    with pytest.raises(OutcomeUnknown, match="in the database and in Kafka, or in neither") as raised:
        world.bank.open_account("second", 2)
    session.database.commit, session.database.connect = commit, connect  # type: ignore[method-assign]
    statement, _, verdict = str(raised.value).partition("SELECT prepared")[2].partition(" gives ")
    assert world.look.query(f"SELECT prepared{statement}") == [(verdict.split(" ")[0],)]
    eventually(lambda: world.open_in_kafka() == [])  # The sweep of this process.
    assert set(world.told()) == set(world.balances()) == {"first", "second"}
    world.bank.open_account("third", 3)


def open_database_error(world: World) -> Exception:
    """The driver's own error of a database that is not there."""
    database = open_database(world.url)
    try:
        database.execute("SELECT 1")  # It was never connected.
    except Exception as error:
        return error
    raise AssertionError("it answers without a connection")

"""A database with both ways: records go one way at a time, whatever its processes know of the broker, so that those of
one key stay in order."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from semel.client.two_phase import TwoPhaseMode
from semel.databases import Database, connect, open_database
from semel.dualwrite.agreement import PlanChanged, agree, confirm
from semel.dualwrite.plan import Plan
from semel.dualwrite.sql import MARK, SqlStore
from semel.dualwrite.store import Store
from semel.errors import Fenced, Retriable
from semel.outbox.session import Session
from semel.outbox.tables import schema_sql
from tests.conftest import Address
from tests.dualwrite.world import Bank, World


@pytest.fixture
def database(url: str, new_sql_store: Callable[[], Store]) -> Database:
    """A connection to a database with the tables of both."""
    found = connect(url)
    found.migrate(schema_sql(found.title))
    assert isinstance(new_sql_store(), SqlStore)
    return found


def test_the_dual_write_waits_for_an_empty_outbox_and_leaves_nobody_behind(database: Database, url: str) -> None:
    assert agree(database, Plan.OUTBOX) is Plan.OUTBOX
    session = Session(open_database(url), "bank", confirm=lambda found: confirm(found, Plan.OUTBOX, found.lock_rows))
    database.execute(
        "INSERT INTO semel_outbox (shard, msg_id, topic, headers, created_at) VALUES (0, 'a', 't', '[]', 0)"
    )
    assert agree(database, Plan.DUAL_WRITE) is Plan.OUTBOX
    session.begin()
    session.commit([])
    database.execute("DELETE FROM semel_outbox")
    if database.title == "SQLite":  # There nobody else writes while a transaction is open.
        assert agree(database, Plan.DUAL_WRITE) is Plan.DUAL_WRITE
        session.begin()
    else:
        session.begin()
        assert agree(database, Plan.DUAL_WRITE) is Plan.DUAL_WRITE
    with pytest.raises(Retriable, match="The transaction was rolled back"):
        session.commit([])
    with pytest.raises(PlanChanged, match="go by dual write now"):
        session.begin()
    confirm(database, Plan.DUAL_WRITE)
    session.close()
    database.close()


def test_the_outbox_fences_every_dual_write_that_is_under_way(
    database: Database, new_sql_store: Callable[[], Store]
) -> None:
    store = new_sql_store()
    assert agree(database, Plan.DUAL_WRITE) is Plan.DUAL_WRITE
    slot = store.add("ann").slot
    epoch = store.claim(slot, "ann").owner_epoch
    assert agree(database, Plan.OUTBOX) is Plan.OUTBOX
    assert database.execute(MARK, ("7:1", slot, epoch, "ann")) == 0
    with pytest.raises(PlanChanged, match="go by outbox now"):
        confirm(database, Plan.DUAL_WRITE)
    database.close()


def test_processes_that_know_the_broker_before_and_after_its_upgrade(
    url: str, embedded: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who began with the outbox goes on with it, until it is empty; then all take the dual write. And back."""
    monkeypatch.setenv("SEMEL_KAFKA", embedded.bootstrap)
    monkeypatch.setattr("semel.outbox.writer.CHOOSE_AGAIN_SECONDS", 0.0)
    offers = [TwoPhaseMode.UNSUPPORTED]
    monkeypatch.setattr("semel.dualwrite.thread.KeeperThread.mode", lambda _: offers[-1])
    world = World(url, embedded.bootstrap, outbox=True)
    old, new = world.new_bank(), world.new_bank()

    def waiting() -> int:
        [(count,)] = world.look.query("SELECT COUNT(*) FROM semel_outbox")
        return int(count)

    old.open_account("a", 1)
    offers.append(TwoPhaseMode.FULL)
    new.open_account("b", 2)
    assert waiting() == 2, "it must not overtake what waits"
    world.look.execute("DELETE FROM semel_outbox")  # The relay has published it.
    new.open_account("c", 3)
    assert (waiting(), world.told()) == (0, {"c": 3})
    opens(old, "d")
    assert waiting() == 0
    offers.append(TwoPhaseMode.REFUSED)
    third = world.new_bank()
    third.open_account("e", 5)
    assert waiting() == 1
    for number, bank in enumerate((old, new)):
        opens(bank, f"f-{number}")
    assert waiting() == 3
    assert set(world.told()) == {"c", "d"}
    assert set(world.balances()) == {"a", "b", "c", "d", "e", "f-0", "f-1"}
    for bank in (old, new, third):
        bank.app.close()

    def away(_: object) -> TwoPhaseMode:
        raise Retriable("Kafka does not answer")

    monkeypatch.setattr("semel.dualwrite.thread.KeeperThread.mode", away)
    fourth = world.new_bank()
    fourth.open_account("g", 1)  # What was agreed on is the outbox, which needs no Kafka.
    assert waiting() == 4
    fourth.app.close()
    world.look.execute("UPDATE semel_txn_meta SET plan = NULL")
    with pytest.raises(Retriable, match="Kafka does not answer"):
        world.bank.open_account("h", 1)
    world.close()


def opens(bank: Bank, name: str) -> None:
    """What its plan was changed behind is told so, at most twice, and runs it again."""
    for _ in range(2):
        try:
            bank.open_account(name, 1)
        except (Retriable, Fenced):
            continue
        return
    bank.open_account(name, 1)

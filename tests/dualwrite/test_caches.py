"""`app.transaction(cache)`: what users do on a Valkey, and what they are told."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from semel import App
from semel.databases.valkey.effects import EffectRefused
from semel.errors import ConditionFailed, ConfigurationError, Conflict, Fatal, Retriable, SemelError
from tests.conftest import Address
from tests.dualwrite.world import CacheWorld, Paid, in_a_child
from tests.services.valkey import ValkeyServer

pytestmark = pytest.mark.valkey
ACCOUNTS = 4
START = 1_000


@pytest.fixture
def world(valkey: ValkeyServer, embedded: Address, monkeypatch: pytest.MonkeyPatch) -> Iterator[CacheWorld]:
    monkeypatch.setenv("SEMEL_KAFKA", embedded.bootstrap)
    found = CacheWorld(valkey.new_database(), embedded.bootstrap)
    yield found
    found.close()


def transfer(bank: Any, source: str, target: str, cents: int, name: str) -> None:
    """The balance must suffice; it is read, and must not have changed when the block ends."""
    with bank.app.transaction(bank.database) as tx:
        balance = int(tx.hget("balances", source) or 0)
        if balance < cents:
            raise Refused(f"{source} has {balance}")
        tx.hincrby("balances", source, -cents)
        tx.hincrby("balances", target, cents)
        tx.hset("accounts", {name: cents})
        tx.send(bank.paid.record(name, Paid(cents)))


def sending(bank: Any, name: str, work: Any) -> None:
    """A transaction that does something and sends one record."""
    with bank.app.transaction(bank.database) as tx:
        work(tx)
        tx.send(bank.paid.record(name, Paid(1)))


class Refused(Exception):
    """Not enough money."""


def test_what_is_read_changed_and_sent_is_one_step(world: CacheWorld) -> None:
    world.client.hset("balances", "ann", 100)
    bank = world.bank
    with bank.app.transaction(bank.database) as tx:
        assert tx.hget("balances", "ann") == b"100"
        assert tx.hgetall("balances") == {b"ann": b"100"}
        assert tx.get("nothing") is None
        assert tx.read("hlen", "balances") == 1
        tx.hincrby("balances", "ann", -30)
        tx.set("seen", b"\x00\xff")
        tx.hset("accounts", {"t1": 30})
        tx.send(bank.paid.record("t1", Paid(30)))
        assert world.client.hget("balances", "ann") == "100"  # Nothing happens before the end.
    assert world.client.hget("balances", "ann") == "70"
    assert world.balances() == world.told() == {"t1": 30}


def test_the_async_colour_does_the_same(world: CacheWorld) -> None:
    world.client.hset("balances", "ann", 100)

    async def work(tx: Any) -> None:
        assert await tx.hget("balances", "ann") == b"100"
        assert await tx.hgetall("balances") == {b"ann": b"100"}
        assert await tx.get("nothing") is None
        assert await tx.read("HLEN", "balances") == 1
        tx.require("balances", field="ann", at_least=30)
        tx.hset("accounts", {"t1": 30})
        tx.send(world.bank.paid.record("t1", Paid(30)))

    world.bank.run(work)
    assert world.balances() == world.told() == {"t1": 30}


def test_an_exception_leaves_nothing(world: CacheWorld) -> None:
    bank = world.bank

    def fail(tx: Any) -> None:
        tx.set("a", 1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sending(bank, "t1", fail)
    assert world.client.get("a") is None
    assert world.told() == {}


def test_a_transaction_without_records_needs_no_kafka(world: CacheWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    world.bootstrap, away = "127.0.0.1:1", world.bootstrap
    bank = world.new_bank()
    world.bootstrap = away
    with bank.app.transaction(bank.database) as tx:
        tx.set("a", 1)
    assert world.client.get("a") == "1"
    with pytest.raises(Retriable, match="1 records cannot be sent, nothing happened"):
        sending(bank, "t1", lambda tx: tx.set("a", 2))
    assert world.client.get("a") == "1"
    bank.app.close()


def test_who_read_what_another_changed_is_told_and_nothing_of_it_is_anywhere(world: CacheWorld) -> None:
    bank = world.bank
    world.client.set("stock", 1)

    def buy(tx: Any) -> None:
        assert tx.get("stock") == b"1"
        world.client.set("stock", 0)
        tx.incrby("stock", -1)

    with pytest.raises(Conflict, match="Run it again"):
        sending(bank, "t1", buy)
    assert world.client.get("stock") == "0"
    assert world.told() == {}


def test_a_condition_that_does_not_hold_leaves_nothing(world: CacheWorld) -> None:
    bank = world.bank
    world.client.set("stock", 2)

    def buy(tx: Any) -> None:
        tx.require("stock", at_least=1)
        tx.incrby("stock", -1)

    sending(bank, "t1", buy)
    sending(bank, "t2", buy)
    with pytest.raises(ConditionFailed, match=r"stock is 0, and has to be at least 1\. Nothing happened"):
        sending(bank, "t3", buy)
    assert world.client.get("stock") == "0"
    assert world.told().keys() == {"t1", "t2"}


def test_transfers_at_once_spend_no_money_twice(world: CacheWorld) -> None:
    """Several read the same balance, and only one of them has read it rightly."""
    bank = world.bank
    world.client.hset("balances", mapping={"ann": 100, "bob": 0})
    done: list[str] = []

    def pay(number: int) -> None:
        for attempt in range(100):
            try:
                transfer(bank, "ann", "bob", 30, f"t{number}")
                done.append(f"t{number}")
            except Conflict:
                time.sleep(random.random() * 0.01 * (attempt + 1))
            except Refused:
                return
            else:
                return

    threads = [threading.Thread(target=pay, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 3
    assert world.client.hgetall("balances") == {"ann": "10", "bob": "90"}
    assert world.balances() == world.told() == dict.fromkeys(done, 30)


def test_what_cannot_be_is_refused_before_anything_is_sent(world: CacheWorld) -> None:
    bank = world.bank
    with bank.app.transaction(bank.database) as tx:
        for wrong, why in (
            (lambda: tx.read("DEL", "a"), "DEL is none of the commands"),
            (lambda: tx.get("semel:txn:x"), "Semel's own"),
            (lambda: tx.require("a", at_least=1.5), "no whole number"),
            (lambda: tx.set("semel:x", 1), "Semel's own"),
            (lambda: tx.get(""), "not empty"),
        ):
            with pytest.raises(EffectRefused, match=why):
                wrong()
    with pytest.raises(Fatal, match="a transaction that has ended"):
        tx.get("a")
    with pytest.raises(EffectRefused, match="after the handler ended, or the transaction"):
        tx.set("a", 1)
    world.client.set("a", "text")
    with pytest.raises(EffectRefused, match=r"command 1 .*holds no integer"):
        sending(bank, "t1", lambda tx: tx.incrby("a"))
    assert world.told() == {}


def test_what_is_declared_wrongly_is_refused() -> None:
    app = App("bank")
    sink_only = app.cache("valkey://host/0")
    with pytest.raises(ConfigurationError, match=r"cache cache has no dual write.*dual_write=True"):
        app.transaction(sink_only)
    with pytest.raises(ConfigurationError, match=r"no cache of app bank"):
        app.transaction(App("other").cache("valkey://host/0", name="else", dual_write=True))
    with pytest.raises(ConfigurationError, match=r"dual_write='yes', but it is True or False"):
        app.cache("valkey://host/0", name="third", dual_write="yes")  # type: ignore[arg-type]
    app.cache("valkey://host/0", name="money", dual_write=True)
    with pytest.raises(ConfigurationError, match=r"database money: another store of app bank that sends records"):
        app.database("sqlite:///x.db", name="money", dual_write=True)


# --- Faults ---


def movements(world: CacheWorld, count: int, name: str, seed: int) -> Any:
    """A program that moves money between accounts and never gives one up, whatever it is told."""

    def work(told: Any) -> None:
        bank, rng = world.new_bank(), random.Random(seed)
        for number in range(count):
            source, target = rng.sample(range(ACCOUNTS), 2)
            while True:
                try:
                    transfer(bank, f"a{source}", f"a{target}", rng.randint(1, 5), f"{name}-{number}")
                except Refused:
                    break
                except SemelError as error:
                    told(f"# {type(error).__name__}")
                    time.sleep(0.02)
                    if not isinstance(error, Retriable) and world.client.hexists("accounts", f"{name}-{number}"):
                        break
                else:
                    told(f"{name}-{number}")
                    break
        bank.app.close()

    return work


def holds(world: CacheWorld, done: Path) -> dict[str, int]:
    found = world.check()
    balances = [int(cents) for cents in world.client.hvals("balances")]
    assert sum(balances) == ACCOUNTS * START
    assert min(balances) >= 0
    told = {line for line in done.read_text().splitlines() if not line.startswith("#")}
    assert told <= set(found)
    return found


@pytest.mark.soak  # The bank of test_cache_bank.py kills it, too.
def test_a_server_that_is_killed_while_scripts_run_loses_and_doubles_nothing(
    embedded: Address, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEMEL_KAFKA", embedded.bootstrap)
    server = ValkeyServer().start()
    try:
        world = CacheWorld(server.new_database(), embedded.bootstrap)
        world.client.hset("balances", mapping={f"a{number}": START for number in range(ACCOUNTS)})
        pid = in_a_child(movements(world, 40, "t", 1), tmp_path / "done")
        for kill in range(3):
            deadline = time.monotonic() + 60
            while (tmp_path / "done").read_text().count("t-") < 8 * (kill + 1) and time.monotonic() < deadline:
                time.sleep(0.005)
            server.kill()
            server.start()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, (tmp_path / "done.error").read_text()
        assert len(holds(world, tmp_path / "done")) >= 30
        world.close()
    finally:
        server.stop()


def test_a_zombie_that_wakes_after_the_recovery_does_nothing(world: CacheWorld, tmp_path: Path) -> None:
    """It stands still between Kafka's promise and the script, until another process has its slot."""
    from semel.failpoints import arm_failpoints

    def work(told: Any) -> None:
        bank = world.new_bank()
        arm_failpoints("dual.before_commit:stop:2")
        for number in range(3):
            try:
                bank.open_account(f"t{number}", number)
                told(f"t{number}")
            except SemelError as error:
                told(f"# {type(error).__name__}: {error}")
        bank.app.close()

    pid = in_a_child(work, tmp_path / "done")
    assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
    [slot] = world.client.smembers(f"semel:txn:slots:{world.name}.dual.cache.")
    before = world.client.hget(f"semel:txn:{slot}", "owner_epoch")
    asyncio.run(take_over(world, slot))
    assert world.client.hget(f"semel:txn:{slot}", "owner_epoch") > before
    os.kill(pid, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, (tmp_path / "done.error").read_text()
    lines = (tmp_path / "done").read_text().splitlines()
    assert lines[0] == "t0"
    assert lines[1].startswith("# Fenced: ")
    assert lines[2] == "t2"
    assert {name for name in world.check() if not name.startswith("after")} == {"t0", "t2"}


async def take_over(world: CacheWorld, slot: str) -> None:
    """What another process does with a slot whose owner gave no sign of life for a lease."""
    from semel.client.cluster import KafkaClient
    from semel.client.producer import TransactionalProducer
    from semel.dualwrite.ending import put_away
    from semel.dualwrite.keeping import store_of

    store = store_of(world.name, world.spec())
    async with KafkaClient(world.bootstrap) as client:
        await client.refresh_metadata()
        store.open(world.name, client.cluster_id, create_tables=False)
        producer = TransactionalProducer(client, slot, two_phase_commit=True)
        await producer.init_transactions(keep_prepared=True)
        claim = store.claim(slot, "heir")
        ongoing = producer.prepared_state
        assert ongoing.is_transaction
        assert await producer.complete(claim.prepared) is False
        store.release(slot, "heir")
        await put_away(producer)
    store.close()

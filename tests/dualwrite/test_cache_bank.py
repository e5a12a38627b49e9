"""The bank on a Valkey, under kill -9: two processes of writers, the broker and the server die in turn and at every
failpoint of the recipe. In the end every transfer is in both, the balances are the fold of the ledger, each account's
entries are in their order, and nobody has spent what he had not."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from semel import App
from semel.databases.spec import CacheSpec
from semel.examples import payments
from semel.examples.payments import ACCOUNTS, OPENING_CENTS, Entry
from tests.dualwrite.kills import Writers, recover, shares
from tests.outbox.kills import (
    PATIENCE_SECONDS,
    check_account,
    do_shares,
    make_topic,
    strike_until_written,
    told_entries,
    transfer,
)
from tests.services.broker import BrokerProcess
from tests.services.valkey import ValkeyServer

pytestmark = pytest.mark.valkey
THREADS = 8
DONE = "done"


def plain(url: str) -> Any:
    return redis.Redis.from_url(url.replace("valkey:", "redis:"), decode_responses=True)


class Bank(Writers):
    """Transfers on a Valkey."""

    def work(self, name: str) -> None:
        os.environ["SEMEL_KAFKA"] = self.broker.bootstrap
        app = App("payments")
        ledger = app.topic("ledger", key=str, value=Entry)
        cache = app.cache(self.url, dual_write=True)
        notes = os.open(self.folder / "acknowledged", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def one(number: int) -> None:
            wanted = transfer(number)
            with app.transaction(cache) as tx:
                key = f"{DONE}:{number}"
                if tx.get(key):
                    return
                source, target = (tx.hgetall(f"account:{name}") for name in (wanted.source, wanted.target))
                cents = wanted.cents if int(source[b"balance"]) >= wanted.cents else 0
                for account, found, change in ((wanted.source, source, -cents), (wanted.target, target, cents)):
                    tx.hincrby(f"account:{account}", "balance", change)
                    tx.hincrby(f"account:{account}", "entries", 1)
                    tx.send(ledger.record(account, Entry(wanted.id, account, change, int(found[b"entries"]) + 1)))
                tx.set(key, 1)
                tx.sadd(DONE, number)
            os.write(notes, b"%d\n" % number)

        do_shares(one, self.transfers, of=THREADS, shares=shares(name, THREADS))
        app.close()


def patient(call: Any) -> Any:
    """What it gives, once the server is there."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return call()
        except redis.RedisError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def finished(client: Any) -> set[int]:
    """The transfers that are done."""
    return {int(number) for number in patient(lambda: client.smembers(DONE))}


def run(world: Bank, kills: int) -> None:
    client = plain(world.url)
    accounts = [f"a{number}" for number in range(1, ACCOUNTS + 1)]
    for account in accounts:
        client.hset(f"account:{account}", mapping={"balance": OPENING_CENTS, "entries": 0})
    bootstrap = world.broker.bootstrap
    asyncio.run(make_topic(bootstrap))
    try:
        strike_until_written(world, kills, lambda: patient(lambda: client.scard(DONE)))
        spec = CacheSpec("cache", world.url, dual_write=True)
        asyncio.run(recover("payments", spec, bootstrap, payments.ledger.name))
        told = told_entries(world, finished(client))
        for account in accounts:
            found = {field: int(value) for field, value in client.hgetall(f"account:{account}").items()}
            check_account(account, found["balance"], found["entries"], told)
            assert found["balance"] >= 0, account
    finally:
        client.close()
        world.end()


@pytest.fixture
def own_valkey() -> Iterator[ValkeyServer]:
    server = ValkeyServer().start()
    yield server
    server.stop()


@pytest.mark.timeout(420)
def test_a_bank_on_valkey(own_valkey: ValkeyServer, own_broker: BrokerProcess, tmp_path: Path) -> None:
    world = Bank(own_valkey.new_database(), own_broker, own_valkey, tmp_path, 60, random.Random(3))
    run(world, kills=3)


@pytest.mark.soak
@pytest.mark.timeout(36_000)
def test_a_large_bank_on_valkey(own_valkey: ValkeyServer, own_broker: BrokerProcess, tmp_path: Path) -> None:
    world = Bank(own_valkey.new_database(), own_broker, own_valkey, tmp_path, 20_000, random.Random(6))
    run(world, kills=100)

"""The bank on a Valkey, under kill -9: two processes of writers, the broker and the server die in turn and at every
failpoint of the recipe. In the end every transfer is in both, the balances are the fold of the ledger, each account's
entries are in their order, and nobody has spent what he had not."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis

from semel import App
from semel.client.admin import Admin
from semel.client.cluster import KafkaClient
from semel.databases.spec import CacheSpec
from semel.dualwrite.keeping import make_keeper
from semel.env import Env
from semel.errors import Conflict, SemelError
from semel.examples import payments
from semel.examples.payments import ACCOUNTS, OPENING_CENTS, Entry
from semel.failpoints import FAILPOINTS
from semel.processing.metrics import Metrics
from semel.settings import Settings
from semel.types import TopicPartition
from tests.outbox import test_bank as outbox_bank
from tests.outbox.test_bank import PATIENCE_SECONDS, make_topic, transfer, until
from tests.outbox.world import msg_id, read_topic
from tests.services.broker import BrokerProcess
from tests.services.valkey import ValkeyServer

pytestmark = pytest.mark.valkey
THREADS, WRITERS = 8, 2
POINTS = [name for name, point in FAILPOINTS.items() if point.role == "dual"]
DONE = "done"


def plain(url: str) -> Any:
    return redis.Redis.from_url(url.replace("valkey:", "redis:"), decode_responses=True)


@dataclass
class World(outbox_bank.World):
    """No relays: each writer recovers what another one left, and the test what the last ones left."""

    names = ("writer-0", "writer-1")

    def points(self, name: str) -> list[str]:
        return POINTS

    def work(self, name: str) -> None:
        os.environ["SEMEL_KAFKA"] = self.broker.bootstrap
        app = App("payments")
        ledger = app.topic("ledger", key=str, value=Entry)
        cache = app.cache(self.url, dual_write=True)
        number = int(name.rpartition("-")[2])
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

        def some(first: int) -> None:
            rng = random.Random(first)
            for number in range(first, self.transfers, THREADS):
                while True:
                    try:
                        one(number)
                        break
                    except Conflict:
                        time.sleep(0.005 * rng.random())
                    except SemelError:
                        time.sleep(0.05)
                    except BaseException:
                        import traceback

                        traceback.print_exc()
                        os._exit(3)

        running = [threading.Thread(target=some, args=(first,)) for first in range(number, THREADS, WRITERS)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
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


async def recover(world: World) -> None:
    """What a process does when it starts. Nothing may be open afterwards."""
    spec = CacheSpec("cache", world.url, dual_write=True)
    keeper, close = make_keeper("payments", spec, {}, Settings(kafka=world.broker.bootstrap), Env(), Metrics())
    try:
        await keeper.open()
        await keeper.sweep()
    finally:
        await keeper.abandon()
        await close()
    partitions = [TopicPartition(payments.ledger.name, number) for number in range(3)]
    async with KafkaClient(world.broker.bootstrap) as client:
        admin = Admin(client)
        ends = await admin.list_offsets(partitions, "high_watermark")
        assert await admin.list_offsets(partitions, "stable") == ends, "a transaction is open after the recovery"


def run(world: World, kills: int) -> None:
    client = plain(world.url)
    for account in range(1, ACCOUNTS + 1):
        client.hset(f"account:a{account}", mapping={"balance": OPENING_CENTS, "entries": 0})
    asyncio.run(make_topic(world.broker.bootstrap))
    try:
        for name in world.names:
            world.fork(name, armed=True)
        step = world.transfers // (kills + 1)
        for strike in range(1, kills + 1):
            until(world, lambda goal=strike * step: patient(lambda: client.scard(DONE)) >= goal, armed=True)  # type: ignore[misc]
            world.strike()
        until(world, lambda: not world.children)
        asyncio.run(recover(world))
        print(f"{world.transfers} transfers, killed: {dict(world.struck)}")
        compare(world, client)
    finally:
        client.close()
        world.end()


def compare(world: World, client: Any) -> None:
    """Every transfer in both; numbers, cents and sums of every account."""
    done = finished(client)
    assert done == set(range(world.transfers))
    noted = {int(line) for line in (world.folder / "acknowledged").read_text().split()}
    assert noted <= done
    records = asyncio.run(read_topic(world.broker.bootstrap, payments.ledger.name))
    entries = [msgspec.json.decode(record.value or b"", type=Entry) for record in records]
    assert len({msg_id(record) for record in records}) == len(records) == 2 * world.transfers
    told = defaultdict(list)
    for entry in entries:
        told[entry.account].append(entry)
    assert {entry.transfer for entry in entries} == {f"t-{number}" for number in done}
    total = 0
    for account in (f"a{number}" for number in range(1, ACCOUNTS + 1)):
        found = {field: int(value) for field, value in client.hgetall(f"account:{account}").items()}
        assert [entry.number for entry in told[account]] == list(range(1, found["entries"] + 1)), account
        assert OPENING_CENTS + sum(entry.cents for entry in told[account]) == found["balance"] >= 0, account
        total += found["balance"]
    assert total == ACCOUNTS * OPENING_CENTS


@pytest.fixture
def own_broker(tmp_path: Path) -> Iterator[BrokerProcess]:
    broker = BrokerProcess(tmp_path / "broker")
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture
def own_valkey() -> Iterator[ValkeyServer]:
    server = ValkeyServer().start()
    yield server
    server.stop()


@pytest.mark.timeout(420)
def test_a_bank_on_valkey(own_valkey: ValkeyServer, own_broker: BrokerProcess, tmp_path: Path) -> None:
    world = World(own_valkey.new_database(), own_broker, own_valkey, tmp_path, 60, random.Random(3))  # type: ignore[arg-type]
    run(world, kills=3)


@pytest.mark.soak
@pytest.mark.timeout(36_000)
def test_a_large_bank_on_valkey(own_valkey: ValkeyServer, own_broker: BrokerProcess, tmp_path: Path) -> None:
    world = World(own_valkey.new_database(), own_broker, own_valkey, tmp_path, 20_000, random.Random(6))  # type: ignore[arg-type]
    run(world, kills=100)

"""Orders in a FerretDB under kill -9: two processes of writers, the broker and the server die in turn and at every
failpoint of the recipe, and in the end documents and records are the same."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from semel import App
from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.databases.spec import DocumentsSpec
from semel.dualwrite.keeping import make_keeper
from semel.env import Env
from semel.errors import SemelError
from semel.failpoints import FAILPOINTS
from semel.processing.metrics import Metrics
from semel.settings import Settings
from semel.types import TopicPartition
from tests.conftest import unavailable
from tests.outbox import test_bank as outbox_bank
from tests.outbox.test_bank import until
from tests.outbox.world import read_topic
from tests.services.broker import BrokerProcess
from tests.services.ferretdb import FerretServer, missing_ferretdb

pytestmark = pytest.mark.peers
THREADS, WRITERS, PARTITIONS = 4, 2, 3
POINTS = [name for name, point in FAILPOINTS.items() if point.role == "dual"]


@dataclass
class World(outbox_bank.World):
    """Each writer recovers what another one left, and the test what the last ones left."""

    names = ("writer-0", "writer-1")

    def points(self, name: str) -> list[str]:
        return POINTS

    def work(self, name: str) -> None:
        os.environ["SEMEL_KAFKA"] = self.broker.bootstrap
        app = App("orders")
        placed = app.topic("placed", key=str, value=int)
        store = app.documents(self.url)
        own = int(name.rpartition("-")[2])
        notes = os.open(self.folder / "acknowledged", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def place(number: int) -> None:
            order = f"{number}-{uuid.uuid4().hex}"
            with app.transaction(store) as tx:
                tx.insert("orders", {"_id": order, "number": number})
                tx.send(placed.record(order, number))
            os.write(notes, f"{order}\n".encode())

        def some(first: int) -> None:
            for number in range(first, self.transfers, THREADS):
                while f"{number}-" not in acknowledged(self.folder):
                    try:
                        place(number)
                    except SemelError:
                        time.sleep(0.05)
                    except BaseException:
                        import traceback

                        traceback.print_exc()
                        os._exit(3)

        running = [threading.Thread(target=some, args=(first,)) for first in range(own, THREADS, WRITERS)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        app.close()


def acknowledged(folder: Path) -> set[str]:
    """The orders that somebody was told of, and the beginnings of their names."""
    path = folder / "acknowledged"
    found = set(path.read_text().split()) if path.exists() else set()
    return found | {f"{name.partition('-')[0]}-" for name in found}


async def finish(world: World) -> list[str]:
    """What a process does when it starts; then the records. Nothing may be open."""
    spec = DocumentsSpec("documents", world.url, dual_write=True)
    keeper, close = make_keeper("orders", spec, {}, Settings(kafka=world.broker.bootstrap), Env(), Metrics())
    try:
        await keeper.open()
        await keeper.sweep()
    finally:
        await keeper.abandon()
        await close()
    partitions = [TopicPartition("placed", number) for number in range(PARTITIONS)]
    async with KafkaClient(world.broker.bootstrap) as client:
        admin = Admin(client)
        ends = await admin.list_offsets(partitions, "high_watermark")
        assert await admin.list_offsets(partitions, "stable") == ends, "a transaction is open after the recovery"
    records = await read_topic(world.broker.bootstrap, "placed", partitions=PARTITIONS)
    return [(record.key or b"").decode() for record in records]


async def make_topic(bootstrap: str) -> None:
    async with KafkaClient(bootstrap) as client:
        await Admin(client).create_topics({"placed": TopicSpec(PARTITIONS)})


@pytest.fixture
def own_broker(tmp_path: Path) -> Iterator[BrokerProcess]:
    broker = BrokerProcess(tmp_path / "broker")
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture
def own_ferretdb() -> Iterator[FerretServer]:
    if missing_ferretdb():
        unavailable("FerretDB", missing_ferretdb())
    server = FerretServer().start()
    yield server
    server.stop()


@pytest.mark.timeout(900)
def test_orders_on_ferretdb(own_ferretdb: FerretServer, own_broker: BrokerProcess, tmp_path: Path) -> None:
    from pymongo import MongoClient

    server: Any = own_ferretdb
    kills = 12
    world = World(own_ferretdb.new_database(), own_broker, server, tmp_path, 240, random.Random(5))
    asyncio.run(make_topic(own_broker.bootstrap))
    try:
        for name in world.names:
            world.fork(name, armed=True)
        for strike in range(1, kills + 1):
            goal = 2 * strike * world.transfers // (kills + 1)  # Each order is there with its name and its beginning.
            until(world, lambda goal=goal: len(acknowledged(tmp_path)) >= goal, armed=True)  # type: ignore[misc]
            world.strike()
        until(world, lambda: not world.children)
        records = asyncio.run(finish(world))
    finally:
        world.end()
    print(f"{world.transfers} orders, killed: {dict(world.struck)}")
    client: Any = MongoClient(world.url)
    documents = list(client.get_database(world.url.rpartition("/")[2])["orders"].find({}))
    client.close()
    placed = {item["_id"] for item in documents if "fence" not in item["semel"]}
    assert len(records) == len(set(records))
    assert set(records) == placed
    assert {name for name in acknowledged(tmp_path) if not name.endswith("-")} <= placed
    assert {item["number"] for item in documents if item["_id"] in placed} == set(range(world.transfers))


def test_an_insert_is_done_by_one_of_all_who_try_and_an_update_is_not(own_ferretdb: FerretServer) -> None:
    """What the dual write rests on, and why it offers no update. The second half is for reading: it shows chance."""
    from pymongo import MongoClient

    from semel.dualwrite.documents.connection import DocumentDatabase

    url, rounds, clients = own_ferretdb.new_database(), 150, 4
    barrier, inserted = threading.Barrier(clients), [0] * clients

    def work(number: int) -> None:
        database, plain = DocumentDatabase(url), MongoClient(url)
        updated = plain.get_database(url.rpartition("/")[2])["counters"]
        for at in range(rounds):
            barrier.wait()
            inserted[number] += database.insert("places", {"_id": f"p{at}", "by": number})
            updated.update_one({"_id": "n"}, {"$inc": {"n": 1}})
        database.close()
        plain.close()

    client: Any = MongoClient(url)
    counters = client.get_database(url.rpartition("/")[2])["counters"]
    counters.insert_one({"_id": "n", "n": 0})
    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    left = counters.find_one({"_id": "n"})["n"]
    client.close()
    print(f"{clients} clients: of {rounds * clients} increments {left} are left")
    assert sum(inserted) == rounds

"""Orders in a FerretDB under kill -9: two processes of writers, the broker and the server die in turn and at every
failpoint of the recipe, and in the end documents and records are the same."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from semel import App
from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.databases.spec import DocumentsSpec
from tests.conftest import unavailable
from tests.dualwrite.kills import Writers, recover, shares
from tests.outbox.kills import do_shares, strike_until_written
from tests.outbox.world import read_topic
from tests.services.broker import BrokerProcess
from tests.services.ferretdb import FerretServer, missing_ferretdb

pytestmark = pytest.mark.peers
THREADS, PARTITIONS = 4, 3


class Orders(Writers):
    """Orders in a document store."""

    def work(self, name: str) -> None:
        os.environ["SEMEL_KAFKA"] = self.broker.bootstrap
        app = App("orders")
        placed = app.topic("placed", key=str, value=int)
        store = app.documents(self.url)
        notes = os.open(self.folder / "acknowledged", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def place(number: int) -> None:
            if f"{number}-" in acknowledged(self.folder):
                return
            order = f"{number}-{uuid.uuid4().hex}"
            with app.transaction(store) as tx:
                tx.insert("orders", {"_id": order, "number": number})
                tx.send(placed.record(order, number))
            os.write(notes, f"{order}\n".encode())

        do_shares(place, self.transfers, of=THREADS, shares=shares(name, THREADS))
        app.close()


def acknowledged(folder: Path) -> set[str]:
    """The orders that somebody was told of, and the beginnings of their names."""
    path = folder / "acknowledged"
    found = set(path.read_text().split()) if path.exists() else set()
    return found | {f"{name.partition('-')[0]}-" for name in found}


async def make_topic(bootstrap: str) -> None:
    async with KafkaClient(bootstrap) as client:
        await Admin(client).create_topics({"placed": TopicSpec(PARTITIONS)})


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

    world = Orders(own_ferretdb.new_database(), own_broker, own_ferretdb, tmp_path, 240, random.Random(5))
    bootstrap = own_broker.bootstrap
    asyncio.run(make_topic(bootstrap))
    try:
        # Each order is there with its name and its beginning.
        strike_until_written(world, 12, lambda: len(acknowledged(tmp_path)) // 2)
        spec = DocumentsSpec("documents", world.url, dual_write=True)
        asyncio.run(recover("orders", spec, bootstrap, "placed"))
        found = asyncio.run(read_topic(bootstrap, "placed", partitions=PARTITIONS))
    finally:
        world.end()
    records = [(record.key or b"").decode() for record in found]
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

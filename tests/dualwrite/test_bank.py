"""The bank of the outbox's tests by dual write, under kill -9: two processes of writers, the broker and the database
die in turn and at every failpoint of the recipe, and in the end every transfer is in both or in neither, the balances
are the fold of the ledger, and each account's entries are in their order."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from semel.client.admin import Admin
from semel.client.cluster import KafkaClient
from semel.dualwrite.keeping import make_keeper
from semel.dualwrite.tables import schema_sql
from semel.env import Env
from semel.examples import payments
from semel.examples.payments import app, bank
from semel.failpoints import FAILPOINTS
from semel.processing.metrics import Metrics
from semel.settings import Settings
from semel.types import TopicPartition
from tests.outbox import test_bank as outbox_bank
from tests.outbox.test_bank import Look, prepare, strike_and_finish
from tests.services.broker import BrokerProcess
from tests.services.mariadb import MariadbServer
from tests.services.postgres import PostgresServer

WRITERS = 2
POINTS = [name for name, point in FAILPOINTS.items() if point.role == "dual"]


@dataclass
class World(outbox_bank.World):
    """No relays: each writer recovers what another one left, and the test what the last ones left."""

    names = ("writer-0", "writer-1")

    def points(self, name: str) -> list[str]:
        return POINTS

    def work(self, name: str) -> None:
        os.environ["SEMEL_KAFKA"] = self.broker.bootstrap
        app.databases[bank.name] = replace(bank, outbox=False, dual_write=True)
        number = int(name.rpartition("-")[2])
        threads = range(number, outbox_bank.THREADS, WRITERS)
        outbox_bank.write(self.url, self.transfers, self.folder / "acknowledged", threads)
        app.close()


async def recover(world: World) -> None:
    """What a process does when it starts. Nothing may be open afterwards."""
    settings = Settings(kafka=world.broker.bootstrap)
    spec = replace(bank, url=world.url, outbox=False, dual_write=True)
    keeper, close = make_keeper(app.name, spec, {}, settings, Env(), Metrics())
    try:
        await keeper.open()
        await keeper.sweep()
    finally:
        await close()
    partitions = [TopicPartition(payments.ledger.name, number) for number in range(3)]
    async with KafkaClient(world.broker.bootstrap) as client:
        admin = Admin(client)
        ends = await admin.list_offsets(partitions, "high_watermark")
        assert await admin.list_offsets(partitions, "stable") == ends, "a transaction is open after the recovery"


def run(world: World, kills: int) -> None:
    def is_settled(look: Look) -> bool:
        asyncio.run(recover(world))
        slots = look.query("SELECT slot, owner FROM semel_txn")
        assert slots
        assert not [slot for slot, owner in slots if owner], "a slot whose owner is gone was not given back"
        return True

    prepare(world.url, schema_sql)
    strike_and_finish(world, kills, is_settled)


@pytest.fixture
def own_broker(tmp_path: Path) -> Iterator[BrokerProcess]:
    broker = BrokerProcess(tmp_path / "broker")
    broker.start()
    yield broker
    broker.stop()


@pytest.mark.timeout(420)
@pytest.mark.postgres
def test_a_bank_on_postgres(postgres: PostgresServer, own_broker: BrokerProcess, tmp_path: Path) -> None:
    run(World(postgres.new_database(), own_broker, postgres, tmp_path, 80, random.Random(3)), kills=3)


@pytest.mark.soak
@pytest.mark.timeout(36_000)
@pytest.mark.postgres
def test_a_large_bank_on_postgres(postgres: PostgresServer, own_broker: BrokerProcess, tmp_path: Path) -> None:
    run(World(postgres.new_database(), own_broker, postgres, tmp_path, 100_000, random.Random(1)), kills=300)


@pytest.mark.soak
@pytest.mark.timeout(36_000)
def test_a_large_bank_on_sqlite(own_broker: BrokerProcess, tmp_path: Path) -> None:
    run(World(f"sqlite:///{tmp_path}/bank.db", own_broker, None, tmp_path, 20_000, random.Random(4)), kills=100)


@pytest.mark.soak
@pytest.mark.timeout(36_000)
@pytest.mark.mariadb
def test_a_large_bank_on_mariadb(mariadb: MariadbServer, own_broker: BrokerProcess, tmp_path: Path) -> None:
    run(World(mariadb.new_database(), own_broker, mariadb, tmp_path, 20_000, random.Random(5)), kills=100)

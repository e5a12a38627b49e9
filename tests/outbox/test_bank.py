"""A bank under kill -9: writers, relays, the broker and the database die in turn, and in the end every transfer is in
both or in neither, the balances are the fold of the ledger, and the sum is what it was at every moment."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from semel.databases import Database, connect, open_database
from semel.databases.database import title_of
from semel.databases.spec import DatabaseSpec
from semel.env import Env
from semel.examples.payments import ACCOUNTS, OPENING_CENTS, app, bank, move
from semel.failpoints import FAILPOINTS
from semel.outbox.relay import Relay
from semel.outbox.tables import schema_sql
from semel.processing.metrics import Metrics
from semel.settings import Settings
from tests.outbox.kills import (
    PATIENCE_SECONDS,
    World,
    check_account,
    do_shares,
    make_topic,
    strike_until_written,
    told_entries,
    transfer,
    until,
)
from tests.services.broker import BrokerProcess
from tests.services.kafka import KafkaNode, missing_tools
from tests.services.mariadb import MariadbServer
from tests.services.postgres import PostgresServer

THREADS = 8
_WRITES = [name for name, point in FAILPOINTS.items() if point.role == "program"]
_RELAYS = [name for name, point in FAILPOINTS.items() if point.role == "relay"]


# --- The processes ---


def write(url: str, transfers: int, acknowledged: Path, shares: Iterable[int] = range(THREADS)) -> None:
    """Do every transfer that is not done yet, eight at a time; what was acknowledged is noted. A process may do the
    shares of some of the eight threads."""
    os.environ["SEMEL_DATABASE"] = url
    notes = os.open(acknowledged, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def one(number: int) -> None:
        with app.transaction(bank) as tx:
            if tx.query("SELECT 1 FROM done WHERE number = ?", (number,)):
                return
            tx.execute("INSERT INTO done (number) VALUES (?)", (number,))
            for entry in move(tx, transfer(number)):
                tx.send(entry)
        os.write(notes, b"%d\n" % number)

    def passes(error: Exception) -> bool:
        """Whether it is an error of a database that was killed."""
        return open_database(url).driver_cause(error) is not None

    do_shares(one, transfers, of=THREADS, shares=shares, passes=passes)


def publish(url: str, bootstrap: str, folder: Path) -> None:
    """A relay, until it is killed."""
    settings = Settings(data=folder, session_timeout_ms=6_000)
    spec = DatabaseSpec("database", url, outbox=True)
    asyncio.run(Relay("payments", spec, bootstrap, settings, Env(), Metrics()).run())


class Bank(World):
    """A process of writers and two relays."""

    names = ("relay-0", "relay-1", "writer")

    def points(self, name: str) -> list[str]:
        return _WRITES if name == "writer" else _RELAYS

    def work(self, name: str) -> None:
        if name == "writer":
            write(self.url, self.transfers, self.folder / "acknowledged")
        else:
            publish(self.url, self.broker.bootstrap, self.folder / name)


class Look:
    """A connection of the test's own, which outlives kills of the server."""

    def __init__(self, url: str) -> None:
        self._database: Database = connect(url)

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                if not self._database.connected:
                    self._database.connect()
                return self._database.query(sql)
            except Exception:
                self._database.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def number(self, sql: str) -> int:
        return int(self.query(sql)[0][0])

    def close(self) -> None:
        self._database.close()


def prepare(url: str, tables: Callable[[str], str] = schema_sql) -> None:
    database = connect(url)
    database.migrate(tables(title_of(url)))
    database.migrate(str(bank.schema) + "CREATE TABLE done (number BIGINT PRIMARY KEY);")
    database.close()


def run(world: Bank, kills: int) -> None:
    """Transfers under kills, then the rest in peace, then the comparison."""
    prepare(world.url)
    strike_and_finish(world, kills, lambda look: look.number("SELECT COUNT(*) FROM semel_outbox") == 0)


def strike_and_finish(world: World, kills: int, is_settled: Callable[[Look], bool]) -> None:
    """What every bank in a SQL database goes through; its tables are there."""
    asyncio.run(make_topic(world.broker.bootstrap))
    look = Look(world.url)

    def the_sum_is_kept() -> None:
        assert look.number("SELECT SUM(balance) FROM account") == ACCOUNTS * OPENING_CENTS

    try:
        strike_until_written(world, kills, lambda: look.number("SELECT COUNT(*) FROM done"), the_sum_is_kept)
        until(world, lambda: is_settled(look))
        told = told_entries(world, {number for (number,) in look.query("SELECT number FROM done")})
        for account, balance, count in look.query("SELECT id, balance, entries FROM account"):
            check_account(account, balance, count, told)
    finally:
        look.close()
        world.end()


# --- The runs ---


@pytest.mark.timeout(420)
@pytest.mark.postgres
def test_a_bank_on_postgres(postgres: PostgresServer, own_broker: BrokerProcess, tmp_path: Path) -> None:
    run(Bank(postgres.new_database(), own_broker, postgres, tmp_path, 160, random.Random(3)), kills=6)


@pytest.mark.soak
@pytest.mark.timeout(36_000)
@pytest.mark.postgres
def test_a_large_bank_on_postgres(postgres: PostgresServer, own_broker: BrokerProcess, tmp_path: Path) -> None:
    run(Bank(postgres.new_database(), own_broker, postgres, tmp_path, 100_000, random.Random(1)), kills=300)


@pytest.mark.soak
@pytest.mark.timeout(36_000)
@pytest.mark.kafka
@pytest.mark.postgres
def test_a_large_bank_on_postgres_and_kafka(postgres: PostgresServer, tmp_path: Path) -> None:
    if missing_tools():
        pytest.fail(f"Apache Kafka needs {missing_tools()}")
    node = KafkaNode(2)
    try:
        node.start()
        run(Bank(postgres.new_database(), node, postgres, tmp_path, 100_000, random.Random(2)), kills=300)
    finally:
        node.stop()


@pytest.mark.soak
@pytest.mark.timeout(36_000)
def test_a_large_bank_on_sqlite(own_broker: BrokerProcess, tmp_path: Path) -> None:
    run(Bank(f"sqlite:///{tmp_path}/bank.db", own_broker, None, tmp_path, 20_000, random.Random(4)), kills=100)


@pytest.mark.soak
@pytest.mark.timeout(36_000)
@pytest.mark.mariadb
def test_a_large_bank_on_mariadb(mariadb: MariadbServer, own_broker: BrokerProcess, tmp_path: Path) -> None:
    run(Bank(mariadb.new_database(), own_broker, mariadb, tmp_path, 20_000, random.Random(5)), kills=100)

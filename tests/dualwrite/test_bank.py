"""The bank of the outbox's tests by dual write, under kill -9: two processes of writers, the broker and the database
die in turn and at every failpoint of the recipe, and in the end every transfer is in both or in neither, the balances
are the fold of the ledger, and each account's entries are in their order."""

from __future__ import annotations

import asyncio
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest

from semel.dualwrite.tables import schema_sql
from semel.examples import payments
from semel.examples.payments import app, bank
from tests.dualwrite.kills import Writers, recover, shares
from tests.outbox.test_bank import THREADS, Look, prepare, strike_and_finish, write
from tests.services.broker import BrokerProcess
from tests.services.mariadb import MariadbServer
from tests.services.postgres import PostgresServer


class Bank(Writers):
    """Transfers in a SQL database."""

    def work(self, name: str) -> None:
        os.environ["SEMEL_KAFKA"] = self.broker.bootstrap
        app.databases[bank.name] = replace(bank, outbox=False, dual_write=True)
        write(self.url, self.transfers, self.folder / "acknowledged", shares(name, THREADS))
        app.close()


def run(world: Bank, kills: int) -> None:
    spec = replace(bank, url=world.url, outbox=False, dual_write=True)

    def is_settled(look: Look) -> bool:
        asyncio.run(recover(app.name, spec, world.broker.bootstrap, payments.ledger.name))
        slots = look.query("SELECT slot, owner FROM semel_txn")
        assert slots
        assert not [slot for slot, owner in slots if owner], "a slot whose owner is gone was not given back"
        return True

    prepare(world.url, schema_sql)
    strike_and_finish(world, kills, is_settled)


@pytest.mark.timeout(420)
@pytest.mark.postgres
def test_a_bank_on_postgres(postgres: PostgresServer, own_broker: BrokerProcess, tmp_path: Path) -> None:
    run(Bank(postgres.new_database(), own_broker, postgres, tmp_path, 80, random.Random(3)), kills=3)


@pytest.mark.soak
@pytest.mark.timeout(36_000)
@pytest.mark.postgres
def test_a_large_bank_on_postgres(postgres: PostgresServer, own_broker: BrokerProcess, tmp_path: Path) -> None:
    run(Bank(postgres.new_database(), own_broker, postgres, tmp_path, 100_000, random.Random(1)), kills=300)


@pytest.mark.soak
@pytest.mark.timeout(36_000)
def test_a_large_bank_on_sqlite(own_broker: BrokerProcess, tmp_path: Path) -> None:
    run(Bank(f"sqlite:///{tmp_path}/bank.db", own_broker, None, tmp_path, 20_000, random.Random(4)), kills=100)


@pytest.mark.soak
@pytest.mark.timeout(36_000)
@pytest.mark.mariadb
def test_a_large_bank_on_mariadb(mariadb: MariadbServer, own_broker: BrokerProcess, tmp_path: Path) -> None:
    run(Bank(mariadb.new_database(), own_broker, mariadb, tmp_path, 20_000, random.Random(5)), kills=100)

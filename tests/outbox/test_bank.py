"""A bank under kill -9: writers, relays, the broker and the database die in turn, and in the end every transfer is in
both or in neither, the balances are the fold of the ledger, and the sum is what it was at every moment."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.databases import Database, connect, open_database
from semel.databases.database import title_of
from semel.databases.spec import DatabaseSpec
from semel.env import Env
from semel.errors import SemelError
from semel.examples import payments
from semel.examples.payments import ACCOUNTS, OPENING_CENTS, Entry, Transfer, app, bank, move
from semel.failpoints import FAILPOINTS, arm_failpoints
from semel.outbox.relay import Relay
from semel.outbox.tables import schema_sql
from semel.processing.metrics import Metrics
from semel.settings import Settings
from tests.outbox.world import msg_id, read_topic
from tests.services.broker import BrokerProcess
from tests.services.kafka import KafkaNode, missing_tools
from tests.services.mariadb import MariadbServer
from tests.services.postgres import PostgresServer

THREADS = 8
PATIENCE_SECONDS = 240.0
"""For one step of progress, on a machine that is busy with other things."""
_WRITES = [name for name, point in FAILPOINTS.items() if point.role == "program"]
_RELAYS = [name for name, point in FAILPOINTS.items() if point.role == "relay"]


def transfer(number: int) -> Transfer:
    """The number decides everything, so that a writer that comes back does the same."""
    rng = random.Random(number)
    source, target = rng.sample(range(1, ACCOUNTS + 1), 2)
    return Transfer(f"t-{number}", f"a{source}", f"a{target}", rng.randrange(1, 3_000))


# --- The processes ---


def write(url: str, transfers: int, acknowledged: Path, threads: Iterable[int] = range(THREADS)) -> None:
    """Do every transfer that is not done yet, eight at a time; what was acknowledged is noted. A process may do the
    part of some of the eight threads."""
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

    def some(first: int) -> None:
        for number in range(first, transfers, THREADS):
            while True:
                try:
                    one(number)
                    break
                except Exception as error:
                    if not isinstance(error, SemelError) and connect_cause(error, url) is None:
                        os._exit(3)  # No error of a database that was killed: the test sees it.
                    time.sleep(0.05)

    running = [threading.Thread(target=some, args=(first,)) for first in threads]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


def connect_cause(error: Exception, url: str) -> object:
    return open_database(url).driver_cause(error)


def publish(url: str, bootstrap: str, folder: Path) -> None:
    """A relay, until it is killed."""
    settings = Settings(data=folder, session_timeout_ms=6_000)
    spec = DatabaseSpec("database", url, outbox=True)
    asyncio.run(Relay("payments", spec, bootstrap, settings, Env(), Metrics()).run())


@dataclass
class World:
    """The processes, who of them is alive, and how to bring each back."""

    url: str
    broker: BrokerProcess | KafkaNode
    server: PostgresServer | MariadbServer | None
    folder: Path
    transfers: int
    rng: random.Random
    children: dict[str, int] = field(default_factory=dict)
    struck: Counter[str] = field(default_factory=Counter)
    """How often each was killed, by us or at its failpoint."""
    names = ("relay-0", "relay-1", "writer")
    _points: dict[str, str] = field(default_factory=dict)

    def points(self, name: str) -> list[str]:
        """Where a child may die by itself."""
        return _WRITES if name == "writer" else _RELAYS

    def work(self, name: str) -> None:
        """What a child does."""
        if name == "writer":
            write(self.url, self.transfers, self.folder / "acknowledged")
        else:
            publish(self.url, self.broker.bootstrap, self.folder / name)

    def fork(self, name: str, *, armed: bool) -> None:
        """Start a child; armed ones kill themselves at a failpoint, sooner or later."""
        point = self._points[name] = self.rng.choice(self.points(name)) if armed else ""
        arm = f"{point}:kill:{self.rng.randrange(1, 8)}" if armed else ""
        pid = os.fork()
        if not pid:
            code = 1
            try:
                with (self.folder / f"{name}.log").open("ab") as log:
                    os.dup2(log.fileno(), 1)
                    os.dup2(log.fileno(), 2)
                arm_failpoints(arm)
                self.work(name)
                code = 0
            finally:
                os._exit(code)
        self.children[name] = pid

    def reap(self, *, armed: bool) -> None:
        """Bring back who died by itself."""
        for name, pid in list(self.children.items()):
            found, status = os.waitpid(pid, os.WNOHANG)
            if not found:
                continue
            code = os.waitstatus_to_exitcode(status)
            del self.children[name]
            if code == -signal.SIGKILL:
                self.struck[self._points[name] or name] += 1
                self.fork(name, armed=armed)
            else:
                assert (name[:6], code) == ("writer", 0), f"{name} ended with {code}: {self.log(name)}"

    def strike(self) -> None:
        """kill -9 of one of them, and its successor."""
        victims = [*self.children, "broker"] + (["database"] if self.server is not None else [])
        victim = self.rng.choice(victims)
        self.struck[victim] += 1
        if victim == "broker":
            self.broker.kill()
            self.broker.start()
        elif victim == "database":
            assert self.server is not None
            self.server.kill()
            self.server.start()
        else:
            pid = self.children.pop(victim)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            self.fork(victim, armed=self.rng.random() < 0.5)

    def end(self) -> None:
        for pid in self.children.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")[-3_000:]


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


async def make_topic(bootstrap: str) -> None:
    async with KafkaClient(bootstrap) as client:
        await Admin(client).create_topics({payments.ledger.name: TopicSpec(3, {})})


def until(world: World, condition: Callable[[], bool], *, armed: bool = False) -> None:
    """Wait, and bring back who dies meanwhile."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "nothing moves: " + "".join(world.log(name) for name in world.children)
        world.reap(armed=armed)
        time.sleep(0.02)


def run(world: World, kills: int) -> None:
    """Transfers under kills, then the rest in peace, then the comparison."""
    prepare(world.url)
    strike_and_finish(world, kills, lambda look: look.number("SELECT COUNT(*) FROM semel_outbox") == 0)


def strike_and_finish(world: World, kills: int, is_settled: Callable[[Look], bool]) -> None:
    """What every bank goes through; its tables are there."""
    asyncio.run(make_topic(world.broker.bootstrap))
    look = Look(world.url)
    try:
        for name in world.names:
            world.fork(name, armed=True)
        step = world.transfers // (kills + 1)
        for strike in range(1, kills + 1):
            until(world, lambda goal=strike * step: look.number("SELECT COUNT(*) FROM done") >= goal, armed=True)  # type: ignore[misc]
            assert look.number("SELECT SUM(balance) FROM account") == ACCOUNTS * OPENING_CENTS
            world.strike()
        until(world, lambda: not any(name.startswith("writer") for name in world.children))
        until(world, lambda: is_settled(look))
        print(f"{world.transfers} transfers, killed: {dict(world.struck)}")
        compare(world, look)
    finally:
        look.close()
        world.end()


def compare(world: World, look: Look) -> None:
    """Every transfer in both; numbers, cents and sums of every account."""
    done = {number for (number,) in look.query("SELECT number FROM done")}
    assert done == set(range(world.transfers))
    noted = {int(line) for line in (world.folder / "acknowledged").read_text().split()}
    assert noted <= done
    records = asyncio.run(read_topic(world.broker.bootstrap, payments.ledger.name))
    entries = [msgspec.json.decode(record.value or b"", type=Entry) for record in records]
    assert len({msg_id(record) for record in records}) == len(records) == 2 * world.transfers
    sides = defaultdict(set)
    for entry in entries:
        sides[entry.transfer].add(entry.account)
    assert sides == {f"t-{number}": {transfer(number).source, transfer(number).target} for number in done}
    told = defaultdict(list)
    for entry in entries:
        told[entry.account].append(entry)
    for account, balance, count in look.query("SELECT id, balance, entries FROM account"):
        assert [entry.number for entry in told[account]] == list(range(1, count + 1)), account
        assert OPENING_CENTS + sum(entry.cents for entry in told[account]) == balance, account
    assert sum(entry.cents for entry in entries) == 0


# --- The runs ---


@pytest.fixture
def own_broker(tmp_path: Path) -> Iterator[BrokerProcess]:
    broker = BrokerProcess(tmp_path / "broker")
    broker.start()
    yield broker
    broker.stop()


@pytest.mark.timeout(420)
@pytest.mark.postgres
def test_a_bank_on_postgres(postgres: PostgresServer, own_broker: BrokerProcess, tmp_path: Path) -> None:
    run(World(postgres.new_database(), own_broker, postgres, tmp_path, 160, random.Random(3)), kills=6)


@pytest.mark.soak
@pytest.mark.timeout(36_000)
@pytest.mark.postgres
def test_a_large_bank_on_postgres(postgres: PostgresServer, own_broker: BrokerProcess, tmp_path: Path) -> None:
    run(World(postgres.new_database(), own_broker, postgres, tmp_path, 100_000, random.Random(1)), kills=300)


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
        run(World(postgres.new_database(), node, postgres, tmp_path, 100_000, random.Random(2)), kills=300)
    finally:
        node.stop()


@pytest.mark.soak
@pytest.mark.timeout(36_000)
def test_a_large_bank_on_sqlite(own_broker: BrokerProcess, tmp_path: Path) -> None:
    run(World(f"sqlite:///{tmp_path}/bank.db", own_broker, None, tmp_path, 20_000, random.Random(4)), kills=100)


@pytest.mark.soak
@pytest.mark.timeout(36_000)
@pytest.mark.mariadb
def test_a_large_bank_on_mariadb(mariadb: MariadbServer, own_broker: BrokerProcess, tmp_path: Path) -> None:
    run(World(mariadb.new_database(), own_broker, mariadb, tmp_path, 20_000, random.Random(5)), kills=100)

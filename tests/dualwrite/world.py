"""An app that keeps accounts and tells of them by the dual write, and a look at what its transactions left."""

from __future__ import annotations

import asyncio
import os
import uuid
from itertools import cycle
from pathlib import Path
from typing import Any

import msgspec

from semel import App
from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.databases import connect
from semel.databases.spec import CacheSpec, DatabaseSpec, DocumentsSpec
from semel.dualwrite.keeping import make_keeper
from semel.dualwrite.session import DualSession
from semel.dualwrite.tables import schema_sql
from semel.env import Env
from semel.errors import OutcomeUnknown, Retriable
from semel.processing.metrics import Metrics
from semel.settings import Settings
from tests.outbox.world import read_topic

SCHEMA = "CREATE TABLE account (id VARCHAR(40) PRIMARY KEY, balance BIGINT NOT NULL)"
PARTITIONS = 2


class Paid(msgspec.Struct, frozen=True):
    cents: int


class World:
    """A database with its tables, a topic, and apps on both: one a process."""

    def __init__(self, url: str, bootstrap: str, **database: Any) -> None:
        self.url, self.bootstrap = url, bootstrap
        self.name = f"bank{uuid.uuid4().hex[:8]}"
        self.topic = f"{self.name}.paid"
        self.declared = {"dual_write": True, "connections": 3, **database}
        self._bank: Bank | None = None
        self._prepare()
        asyncio.run(self._make_topic())

    def _prepare(self) -> None:
        self.connect()
        self.look.migrate(SCHEMA)
        self.look.migrate(schema_sql(self.look.title))

    def connect(self) -> None:
        """A connection to look with; a forked process needs one of its own."""
        self.look = connect(self.url)

    async def _make_topic(self) -> None:
        async with KafkaClient(self.bootstrap) as client:
            await Admin(client).create_topics({self.topic: TopicSpec(PARTITIONS)})

    @property
    def bank(self) -> Bank:
        """The app in this process."""
        if self._bank is None:
            self._bank = self.new_bank()
        return self._bank

    def new_bank(self) -> Bank:
        """The app in another process."""
        return Bank(self)

    def spec(self) -> DatabaseSpec:
        return DatabaseSpec("database", self.url, dual_write=self.declared["dual_write"])

    def lose_answers(self, session: Any) -> None:
        """From now on the session's COMMITs happen, and their answers are lost; those that settle one are answered."""
        assert isinstance(session, DualSession)
        database = session.database
        commit = database.commit
        answered = cycle([False, True])

        def lost() -> None:
            commit()
            if next(answered):
                return
            database.close()
            raise OutcomeUnknown("the answer is lost")

        database.commit = lost  # type: ignore[method-assign]

    def balances(self) -> dict[str, int]:
        return dict(self.look.query("SELECT id, balance FROM account"))

    def told(self) -> dict[str, int]:
        """The balances as Kafka tells them; each account once. It waits for what is open."""
        records = asyncio.run(read_topic(self.bootstrap, self.topic, partitions=PARTITIONS))
        found = {(record.key or b"").decode(): msgspec.json.decode(record.value or b"")["cents"] for record in records}
        assert len(found) == len(records), "something is in the topic twice"
        return found

    def owners(self) -> list[str]:
        """Of slots that are not given back."""
        return [owner for (owner,) in self.look.query("SELECT owner FROM semel_txn") if owner]

    def open_in_kafka(self) -> list[str]:
        """Transactional ids of this app that have a transaction open."""

        async def ask() -> list[str]:
            async with KafkaClient(self.bootstrap) as client:
                listed = await Admin(client).list_transactions(states=["Ongoing", "PrepareCommit", "PrepareAbort"])
            return [item.transactional_id for item in listed if item.transactional_id.startswith(f"{self.name}.")]

        return asyncio.run(ask())

    def recover(self, excused: type[Exception] | None = None) -> None:
        """What any process of the app does when it starts: until no owner is left. `excused` is tried again."""

        async def work() -> None:
            keeper, close = make_keeper(self.name, self.spec(), {}, Settings(kafka=self.bootstrap), Env(), Metrics())
            try:
                await keeper.open()
                async with asyncio.timeout(60):
                    while self.owners():
                        try:
                            await keeper.sweep()
                        except (asyncio.CancelledError, Exception) as error:
                            if excused is None or not isinstance(error, (asyncio.CancelledError, excused)):
                                raise
            finally:
                await keeper.abandon()
                await close()

        asyncio.run(work())

    def check(self) -> dict[str, int]:
        """Everything is in both or in neither, nothing is open, and the next transaction works; the balances."""
        self.close_bank()
        self.recover()
        assert self.open_in_kafka() == []
        found = self.balances()
        assert found == self.told()
        name = f"after-{uuid.uuid4().hex}"
        self.bank.open_account(name, 1)
        self.close_bank()
        assert self.told().get(name) == 1
        return found

    def close_bank(self) -> None:
        """End the app of this process, if there is one."""
        bank, self._bank = self._bank, None
        if bank is not None:
            bank.app.close()

    def close(self) -> None:
        self.close_bank()
        self.look.close()


class Bank:
    """The app. Whoever makes one closes it."""

    def __init__(self, world: World) -> None:
        os.environ["SEMEL_KAFKA"] = world.bootstrap  # The fixture puts it back.
        self.app = App(world.name)
        self.paid = self.app.topic(world.topic, key=str, value=Paid)
        self.database = self._declare(world)

    def _declare(self, world: World) -> Any:
        return self.app.database(world.url, **world.declared)

    def open_account(self, name: str, cents: int) -> None:
        """A row and the record that tells of it."""
        with self.app.transaction(self.database) as tx:
            tx.execute("INSERT INTO account (id, balance) VALUES (?, ?)", (name, cents))
            tx.send(self.paid.record(name, Paid(cents)))

    def run(self, work: Any) -> Any:
        """Run a coroutine function with an open transaction in a loop of its own."""

        async def whole() -> Any:
            async with self.app.transaction(self.database) as tx:
                return await work(tx)

        return asyncio.run(whole())


class CacheWorld(World):
    """The same on a Valkey: the balances are a hash."""

    def _prepare(self) -> None:
        self.connect()

    def connect(self) -> None:
        import redis

        self.client: Any = redis.Redis.from_url(self.url.replace("valkey:", "redis:"), decode_responses=True)

    def new_bank(self) -> Bank:
        return CacheBank(self)

    def spec(self) -> DatabaseSpec:
        return CacheSpec("cache", self.url, dual_write=True)

    def lose_answers(self, session: Any) -> None:
        """From now on the session's script runs, and its answer is lost."""
        target = session.target
        send = target.send

        def lost(*commands: Any) -> Any:
            found = send(*commands)
            if commands[-1][0] == "EXEC":
                target.close()
                raise Retriable("the answer is lost")
            return found

        target.send = lost

    def balances(self) -> dict[str, int]:
        return {name: int(cents) for name, cents in self.client.hgetall("accounts").items()}

    def owners(self) -> list[str]:
        slots = self.client.smembers(f"semel:txn:slots:{self.name}.dual.cache.")
        return [owner for slot in slots if (owner := self.client.hget(f"semel:txn:{slot}", "owner"))]

    def close(self) -> None:
        self.close_bank()
        self.client.close()


class CacheBank(Bank):
    def _declare(self, world: World) -> Any:
        return self.app.cache(world.url, **world.declared)

    def open_account(self, name: str, cents: int) -> None:
        with self.app.transaction(self.database) as tx:
            tx.hset("accounts", {name: cents})
            tx.send(self.paid.record(name, Paid(cents)))


class DocumentWorld(World):
    """The same on a document store: each account is a document."""

    def _prepare(self) -> None:
        self.connect()

    def connect(self) -> None:
        from pymongo import MongoClient

        self.client: Any = MongoClient(self.url)
        self.documents = self.client.get_database(self.url.rpartition("/")[2])

    def new_bank(self) -> Bank:
        return DocumentBank(self)

    def spec(self) -> DatabaseSpec:
        return DocumentsSpec("documents", self.url, dual_write=True)

    def lose_answers(self, session: Any) -> None:
        """From now on each account is inserted, and the answer is lost."""
        database, lost = session.target._database, set()
        insert = database.insert

        def once(collection: str, document: dict[str, Any]) -> bool:
            done = bool(insert(collection, document))
            if collection == "accounts" and done and document["_id"] not in lost:
                lost.add(document["_id"])
                raise Retriable("the answer is lost")
            return done

        database.insert = once

    def balances(self) -> dict[str, int]:
        found = self.documents["accounts"].find({})
        return {item["_id"]: item["cents"] for item in found if "fence" not in item["semel"]}

    def owners(self) -> list[str]:
        slots = list(self.documents["semel_txn_slots"].find({}))
        return [slot["owner"] for slot in slots if slot["_id"].startswith(f"{self.name}.") and slot["owner"]]

    def close(self) -> None:
        if self._bank is not None:
            self._bank.app.close()
        self.client.close()


class DocumentBank(Bank):
    def _declare(self, world: World) -> Any:
        return self.app.documents(world.url, connections=3)

    def open_account(self, name: str, cents: int) -> None:
        with self.app.transaction(self.database) as tx:
            tx.insert("accounts", {"_id": name, "cents": cents})
            tx.send(self.paid.record(name, Paid(cents)))


def in_a_child(work: Any, done: Path) -> int:
    """Run `work(told)` in a forked process; `told(name)` says that a caller was given success. Its process id."""
    done.write_text("")
    pid = os.fork()
    if not pid:
        code = 1
        try:
            with done.open("a", buffering=1) as file:
                work(lambda name: file.write(f"{name}\n"))
            code = 0
        except BaseException:
            import traceback

            with done.with_suffix(".error").open("a") as file:
                traceback.print_exc(file=file)
        finally:
            os._exit(code)
    return pid

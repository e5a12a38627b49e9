"""The dual write in the simulated world: a bank whose transfers are in its database and in Kafka, or in neither.

Its processes run the real keeper, recipe, slots and sessions, on the simulated broker and the model of PostgreSQL. They
take each other for dead, also while they live: so zombies and recoverers that overlap are in every run.
"""

from __future__ import annotations

import asyncio
import types
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple, TypeVar
from unittest import mock

import psycopg

from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.databases.postgres import PostgresDatabase
from semel.dualwrite.keeper import Keeper
from semel.dualwrite.measures import Measures
from semel.dualwrite.rows import Rows
from semel.dualwrite.session import DualSession
from semel.dualwrite.sql import SqlStore
from semel.dualwrite.store import LEAVE_RELEASED, slot_prefix
from semel.dualwrite.thread import KeeperThread
from semel.dualwrite.writing import Outgoing, Writing
from semel.errors import Fenced, OutcomeUnknown, Retriable, SemelError
from semel.processing.metrics import Metrics
from semel.types import TopicPartition
from tests.simulation.actors import Actor, read_whole
from tests.simulation.fibers import FIBER, Fiber, sleep
from tests.simulation.history import Seen, Transaction, Violation
from tests.simulation.loop import Process, SimulatedLoop
from tests.simulation.plan import Plan
from tests.simulation.striking import StrikingWorld
from tests.simulation.world import World

__all__ = ["DualWorld"]

APP, NAME, URL = "bank", "database", "postgresql://model/db"
LEDGER, PARTITIONS = "ledger", 2
ACCOUNTS = 4
LEASE_SECONDS = 1.5
SESSIONS = 2
"""Transfers that a process has under way at once, each on a slot of its own."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS semel_txn (slot TEXT PRIMARY KEY, owner_epoch BIGINT NOT NULL, owner TEXT NOT NULL,
  prepared TEXT NOT NULL, resolved_epoch BIGINT NOT NULL DEFAULT -1, looks BIGINT NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS semel_txn_beat (slot TEXT PRIMARY KEY, owner TEXT NOT NULL, beat BIGINT NOT NULL);
CREATE TABLE IF NOT EXISTS semel_txn_meta (only_row BIGINT PRIMARY KEY, slots BIGINT NOT NULL);
INSERT INTO semel_txn_meta (only_row, slots) VALUES (1, 0);
CREATE TABLE IF NOT EXISTS account (id TEXT PRIMARY KEY, balance BIGINT NOT NULL, entries BIGINT NOT NULL);
CREATE TABLE IF NOT EXISTS done (transfer TEXT PRIMARY KEY);
"""
T = TypeVar("T")


class Change(NamedTuple):
    """One side of a transfer, as a record tells it: the account's n-th."""

    transfer: str
    account: str
    cents: int
    number: int

    def __str__(self) -> str:
        return "|".join(map(str, self))

    @classmethod
    def parse(cls, text: str) -> Change:
        transfer, account, cents, number = text.split("|")
        return cls(transfer, account, int(cents), int(number))


class Excuse(Exception):
    """The caller changes its mind in the middle of a transfer."""


class FiberKeeper(KeeperThread):
    """A session's way to the keeper, out of a fiber of the same loop instead of a thread."""

    def __init__(self, keeper: Keeper, loop: SimulatedLoop) -> None:
        super().__init__(lambda: None, "the model")  # type: ignore[arg-type, return-value]
        self._held, self._in = keeper, loop

    def _call(self, call: Callable[[Keeper], Coroutine[Any, Any, T]]) -> T:
        fiber = FIBER.get()
        assert fiber is not None

        def start(resume: Callable[[Any, BaseException | None], None]) -> None:
            def ended(task: asyncio.Task[T]) -> None:
                if not task.cancelled():
                    error = task.exception()
                    resume(None if error else task.result(), error)

            self._in.create_task(call(self._held)).add_done_callback(ended)

        found: T = fiber.wait(start)
        return found

    def _tell(self, call: Callable[[Keeper], None]) -> None:
        self._in.call_soon(call, self._held)


class Payer(Actor):
    """A process of the bank over all its lives, with a keeper and some sessions."""

    has_twins = True
    is_background = True
    world: DualWorld

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self.numbers = 0

    @property
    def has_paid(self) -> bool:
        return self.left <= 0

    async def live(self, client: KafkaClient, life: int) -> None:
        world, loop = self.world, self.world.loop
        process = next(process for actor, process in world.lives if process.name == f"{self.name}#{life}")
        rows, recovery = (Rows(SqlStore(PostgresDatabase(URL), APP, NAME), world.fiber()) for _ in range(2))
        writing = Writing(client, {})
        measures = Measures(Metrics(), "dual")
        keeper = Keeper(
            APP, slot_prefix(APP, NAME), client, rows, recovery, writing, world.env(process), measures,
            is_dead=world.judgement(process),
        )  # fmt: skip
        keeper._identity = process.name
        running = loop.create_task(keeper.run())
        sessions = [
            (DualSession(PostgresDatabase(URL), FiberKeeper(keeper, loop)), world.fiber()) for _ in range(SESSIONS)
        ]
        await asyncio.gather(*(self._pay(session, fiber, life) for session, fiber in sessions))
        while not world.is_draining:
            await asyncio.sleep(0.05)
        for session, fiber in sessions:
            await loop.run_in_executor(fiber, session.close)
        await keeper.close()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await keeper.abandon()
        self.done = True

    async def _pay(self, session: DualSession, fiber: Fiber, life: int) -> None:
        while self.left > 0:
            self.left -= 1
            self.numbers += 1
            transaction = self.history.begin(self.name, life, self.numbers)
            await self.think()
            kind = self.rng.random()
            try:
                transaction.fate = "asked"
                await self.world.loop.run_in_executor(fiber, self._transfer, session, transaction, kind)
            except OutcomeUnknown:
                pass
            except (SemelError, psycopg.Error, Excuse) as error:
                transaction.fate = "aborted"
                if isinstance(error, Fenced):
                    self.world.fenced.append(str(error))
                elif not isinstance(error, (Retriable, Excuse, psycopg.Error)):
                    raise
            else:
                transaction.fate = "committed"
            self.world.trace("bank", str(transaction))

    def _transfer(self, session: DualSession, transaction: Transaction, kind: float) -> None:
        """As a block of `app.transaction` runs it; in a fiber."""
        name = f"{transaction.owner}/{transaction.life}/{transaction.number}"
        source, target = self.rng.sample(range(ACCOUNTS), 2)
        cents = self.rng.randrange(1, 50)
        try:
            session.begin()
            database, changes = session.database, []
            for account, change in sorted(((f"a{source}", -cents), (f"a{target}", cents))):
                database.execute(
                    "UPDATE account SET balance = balance + ?, entries = entries + 1 WHERE id = ?", (change, account)
                )
                [(number,)] = database.query("SELECT entries FROM account WHERE id = ?", (account,))
                changes.append(Change(name, account, change, number))
            database.execute("INSERT INTO done (transfer) VALUES (?)", (name,))
            if kind < 0.1:
                raise Excuse
            session.commit([self._record(change) for change in changes])
        finally:
            session.rollback()

    def _record(self, change: Change) -> Outgoing:
        key = change.account.encode()
        return Outgoing(
            LEDGER, f"{change.transfer}/{change.account}", key, str(change).encode(), (), self.world.client_ms()
        )


class DualWorld(StrikingWorld):
    """Payers pay; what they were told, the rows and the topic must agree."""

    calm_seconds = 2.5
    calms_early = False

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.is_draining = False
        self.fenced: list[str] = []
        """What those were told who lost a slot."""
        self._taken: dict[Process, set[str]] = {}
        setup = self.database.server.connect()
        accounts = "".join(
            f"INSERT INTO account (id, balance, entries) VALUES ('a{n}', 0, 0);" for n in range(ACCOUNTS)
        )
        errors: list[Any] = []
        setup.execute(_SCHEMA + accounts, [], lambda _, error: errors.append(error))
        assert errors == [None]
        setup.terminate()

    def cast(self) -> list[tuple[str, int, type[Actor]]]:
        return [("payer", self.plan.payers, Payer)]

    def settings(self) -> AbstractContextManager[None]:
        return _instead(super().settings(), self)

    def judgement(self, process: Process) -> Callable[[str], bool]:
        """Who this process takes for dead. It may be wrong: that costs the other an error and nothing else."""
        rng = self.stream(f"judgement of {process.name}")

        def is_dead(owner: str) -> bool:
            other = next((life for _, life in self.lives if life.name == owner.split(" ")[0]), None)
            if other is process:
                return False
            if other is None or other.alive:
                return not self._calm and rng.random() < self.plan.knobs["suspicion"]
            return True

        return is_dead

    async def _prepare(self, client: KafkaClient) -> None:
        await client.start()
        await Admin(client).create_topics({LEDGER: TopicSpec(PARTITIONS)})

    # --- Zombies ---

    def _pause(self, process: Process, seconds: float) -> None:
        self._taken[process] = self._slots_of(process)
        super()._pause(process, seconds)

    def resume(self, process: Process) -> None:
        if process.alive and self._taken.pop(process, set()) - self._slots_of(process):
            self.zombies += 1
            self.trace("world", process.name, "is a zombie")
        super().resume(process)

    def _slots_of(self, process: Process) -> set[str]:
        rows = self.database.server.committed("semel_txn")
        return {row["slot"] for row in rows if row["owner"].split(" ")[0] == process.name}

    # --- The end ---

    async def settle(self, client: KafkaClient, deadline: float) -> None:
        """Everybody has paid and nothing is open any more; then the processes end, and every slot is given back."""
        payers = [actor for actor in self.actors if isinstance(actor, Payer)]
        await self._until(lambda: all(payer.has_paid for payer in payers), deadline, "these have not paid")
        await self._ledger(client, deadline)
        # A new slot whose COMMIT was not answered may have an owner who does not know of it: that is left to the lease.
        await asyncio.sleep(2 * LEASE_SECONDS)
        self.is_draining = True
        await self._until(lambda: all(payer.done for payer in payers), deadline, "these do not drain")

    async def _until(self, condition: Callable[[], bool], deadline: float, what: str) -> None:
        while not condition():
            if self.loop.now > deadline:
                raise Violation("liveness", f"{what}: {[(actor.name, actor.left) for actor in self.actors]}")
            await asyncio.sleep(0.05)

    async def _ledger(
        self, client: KafkaClient, deadline: float, *, committed: bool = True
    ) -> dict[TopicPartition, list[Seen]]:
        found = {}
        for number in range(PARTITIONS):
            at = TopicPartition(LEDGER, number)
            while at not in found:
                try:
                    found[at], _ = await read_whole(self, client, at, committed=committed)
                except (Retriable, OutcomeUnknown) as error:
                    if self.loop.now > deadline:
                        raise Violation("liveness", f"{at} cannot be read to its end: {error}") from error
                    await asyncio.sleep(0.1)
        return found

    async def _judge(self, client: KafkaClient, deadline: float) -> None:
        changes = [Change.parse(seen.value) for log in (await self._ledger(client, deadline)).values() for seen in log]
        self._check_both_or_neither(changes)
        self._check_accounts(changes)
        for row in self.database.server.committed("semel_txn"):
            if row["owner"] != LEAVE_RELEASED:
                self.history.fail("slot kept", f"{row['slot']} has owner {row['owner']} when all have ended")
        for text in self.fenced:
            if "another process" not in text:
                self.history.fail("fenced without a word", text)
        if self.history.problem is not None:
            raise self.history.problem

    def _check_both_or_neither(self, changes: list[Change]) -> None:
        fail = self.history.fail
        told = Counter(change.transfer for change in changes)
        done = {row["transfer"] for row in self.database.server.committed("done")}
        for name in sorted(done | set(told)):
            if name not in done:
                fail("records without rows", name)
            elif told[name] != 2:
                fail("rows without records" if not told[name] else "records doubled", f"{name}: {told[name]} records")
        for name, transaction in self.history.transactions.items():
            if transaction.fate == "committed" and name not in done:
                fail("acknowledged and lost", name)
            elif transaction.fate == "aborted" and name in done:
                fail("denied and done", name)

    def _check_accounts(self, changes: list[Change]) -> None:
        by_account = defaultdict(list)
        for change in changes:
            by_account[change.account].append(change)
        for row in self.database.server.committed("account"):
            of = by_account[row["id"]]
            if [change.number for change in of] != list(range(1, row["entries"] + 1)):
                self.history.fail(
                    "order", f"{row['id']} has {row['entries']} changes, told as {[item.number for item in of]}"
                )
            if sum(change.cents for change in of) != row["balance"]:
                self.history.fail("balance", f"{row['id']} has {row['balance']}, told {sum(item.cents for item in of)}")


@contextmanager
def _instead(settings: AbstractContextManager[None], world: DualWorld) -> Iterator[None]:
    """Virtual time for sessions, short waits, and tables that are there already."""
    clock = types.SimpleNamespace(sleep=sleep, monotonic=world.loop.time)
    with settings, ExitStack() as stack:
        stack.enter_context(mock.patch("semel.databases.settling.time", clock))
        stack.enter_context(mock.patch("semel.dualwrite.sql.SqlStore.open"))
        for name, value in (("KAFKA_SECONDS", 2.0), ("LEASE_SECONDS", LEASE_SECONDS), ("BEAT_SECONDS", 0.3)):
            stack.enter_context(mock.patch(f"semel.dualwrite.keeper.{name}", value))
        yield

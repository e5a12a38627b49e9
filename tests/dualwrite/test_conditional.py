"""The conditional recipe: slots change hands on a Kafka that keeps no prepared transaction for a successor."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from semel.broker.config import BrokerConfig
from semel.broker.embedded import EmbeddedBroker
from semel.client.admin import Admin, DescribedTransaction
from semel.client.cluster import KafkaClient
from semel.client.producer import TransactionalProducer
from semel.client.transaction_admin import TransactionAdmin
from semel.client.two_phase import PreparedState, TwoPhaseMode
from semel.databases.database import open_database
from semel.dualwrite.conditional import CONDITION_TIMEOUT_MS, ConditionalName, ConditionalRecipe, _owner_went_on, own_id
from semel.dualwrite.recipe import Taken
from semel.dualwrite.rows import Rows
from semel.dualwrite.sql import MARK, SqlStore
from semel.dualwrite.store import OUT_OF_USE, SlotOutOfUse
from semel.env import Env, wall_ms
from semel.errors import ConfigurationError, ErrorCode, Fenced, Retriable, TwoPhaseCommitUnavailable
from semel.failpoints import FAILPOINTS, FailpointRaised, arm_failpoints
from tests.client.test_brokers import Cluster, records, run, values
from tests.conftest import Address, unavailable
from tests.services.kafka import KafkaNode, missing_tools

SHORT_MS = 1_000
"""A time-out that passes within a test."""


class Process:
    """Somebody who takes slots over: a recipe, and a connection of its own."""

    def __init__(
        self, scene: Scene, *, timeout_ms: int = 60_000, mode: TwoPhaseMode = TwoPhaseMode.UNSUPPORTED
    ) -> None:
        self.scene = scene
        self.owner = f"process {uuid.uuid4().hex}"
        self.store = SqlStore(open_database(scene.url), "bank", "database")
        self.rows = Rows(self.store, ThreadPoolExecutor(1))
        client = scene.cluster.client

        self._timeout_ms = timeout_ms
        self.recipe = ConditionalRecipe(client, self.producer)
        self.recipe.accept(mode)
        self.taken: Taken | None = None
        scene.stack.callback(self.rows.end)

    def producer(self, name: str, two_phase: bool) -> TransactionalProducer:
        return TransactionalProducer(
            self.scene.cluster.client,
            name,
            transaction_timeout_ms=self._timeout_ms,
            two_phase_commit=two_phase,
            prepare_until_timeout=not two_phase,
        )

    async def takes(self) -> str:
        """Take the slot over; what was found."""
        self.taken = await self.recipe.take_over(self.rows, self.scene.slot, self.owner)
        return self.taken.found

    async def prepares(self, value: str) -> PreparedState:
        assert self.taken is not None
        producer = self.taken.producer
        producer.begin()
        await producer.produce(self.scene.cluster.topic, 0, records(value))
        return await producer.prepare()

    def commits(self, name: PreparedState, value: str) -> int:
        """The database transaction that decides; how many rows it marked."""
        assert self.taken is not None
        database = open_database(self.scene.url)
        database.connect()
        try:
            database.begin()
            database.execute("INSERT INTO ledger VALUES (?)", (value,))
            decision = self.recipe.decision(self.taken.owner_epoch, name)
            changed = database.execute(MARK, (decision, self.scene.slot, self.taken.owner_epoch, self.owner))
            if changed == 1:
                database.commit()
            else:
                database.rollback()
            return changed
        finally:
            database.close()


class Scene:
    """One slot of a database, and the topic of this test."""

    def __init__(self, cluster: Cluster, folder: Path, stack: contextlib.ExitStack) -> None:
        self.cluster, self.stack = cluster, stack
        self.url = f"sqlite:///{folder / 'dual.db'}"
        first = SqlStore(open_database(self.url), "bank", "database")
        first.open("bank", cluster.client.cluster_id, create_tables=True)
        self.slot = f"bank.dual.database.{uuid.uuid4().hex}"  # The brokers are shared by all tests.
        self.run("CREATE TABLE ledger (value TEXT)")
        self.run("INSERT INTO semel_txn (slot, owner_epoch, owner, prepared) VALUES (?, 0, '', '')", self.slot)
        first.close()

    def run(self, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
        database = open_database(self.url)
        database.connect()
        try:
            return database.query(sql, parameters)
        finally:
            database.close()

    def row(self) -> tuple[Any, ...]:
        [found] = self.run("SELECT owner_epoch, owner, prepared, resolved_epoch FROM semel_txn")
        return found

    def ledger(self) -> list[str]:
        return sorted(value for (value,) in self.run("SELECT value FROM ledger"))

    async def topic(self) -> list[str]:
        async with asyncio.timeout(60):
            return values(await self.cluster.read())

    async def agree(self, *expected: str) -> None:
        """Rows and records are these, and nothing is open."""
        assert (self.ledger(), await self.topic()) == (sorted(expected), sorted(expected))


def play(broker: Any, folder: Path, scene: Callable[[Scene], Awaitable[None]]) -> None:
    async def test(cluster: Cluster) -> None:
        with contextlib.ExitStack() as stack:
            await cluster.client.refresh_metadata()
            await scene(Scene(cluster, folder, stack))

    run(broker, test)


@pytest.fixture
def disarmed() -> Iterator[None]:
    yield
    arm_failpoints("")


def test_a_name_says_whose_it_is_and_is_read_back() -> None:
    for name in (ConditionalName(3, PreparedState(1000, 7)), ConditionalName(3, PreparedState(1000, 7), is_ended=True)):
        assert ConditionalName.parse(str(name)) == name
    for text in ("", "1000:7", "3/1000", "3/1000:7/", "3/1000:7/committed/"):
        assert ConditionalName.parse(text) is None


def test_a_successor_commits_what_was_decided_and_aborts_what_was_not(newest_broker: Address, tmp_path: Path) -> None:
    async def scene(scene: Scene) -> None:
        first, second, third, fourth = (Process(scene) for _ in range(4))
        assert await first.takes() == "nothing"
        assert first.commits(await first.prepares("a"), "a") == 1
        assert await second.takes() == "committed", "killed after COMMIT, before Kafka was told"
        await scene.agree("a")
        assert scene.row()[2].endswith("/committed")
        name = await second.prepares("b")
        assert await third.takes() == "aborted", "killed before COMMIT"
        assert second.commits(name, "b") == 0, "the zombie's database transaction finds the fence raised"
        await scene.agree("a")
        assert await fourth.takes() == "nothing", "the one before did nothing"
        assert scene.row()[::3] == (4, 3)

    play(newest_broker, tmp_path, scene)


def test_what_the_owner_told_kafka_itself_is_committed_once(newest_broker: Address, tmp_path: Path) -> None:
    async def scene(scene: Scene) -> None:
        first, second = Process(scene), Process(scene)
        await first.takes()
        name = await first.prepares("a")
        first.commits(name, "a")
        assert first.taken is not None
        assert await first.taken.producer.complete(name)
        await first.prepares("b")  # Under the next epoch of the same id: its end must not be taken for that of "a".
        assert await second.takes() == "aborted"
        await scene.agree("a")

    play(newest_broker, tmp_path, scene)


POINTS = ("after_fence", "before_complete", "after_complete", "after_ended", "after_old_fence", "after_init")


@pytest.mark.usefixtures("disarmed")
def test_a_recovery_that_dies_anywhere_is_taken_up_by_the_next(newest_broker: Address, tmp_path: Path) -> None:
    async def scene(scene: Scene) -> None:
        expected = []
        owner = Process(scene)
        await owner.takes()
        for point in POINTS:
            value = f"before {point}"
            assert owner.commits(await owner.prepares(value), value) == 1
            expected.append(value)
            arm_failpoints(f"dual.claim.{point}:raise")
            with pytest.raises(FailpointRaised):
                await Process(scene).takes()
            arm_failpoints("")
            owner = Process(scene)
            await owner.takes()
            await scene.agree(*expected)

    assert {f"dual.claim.{point}" for point in POINTS} <= FAILPOINTS.keys()
    play(newest_broker, tmp_path, scene)


def test_of_two_that_recover_at_once_the_loser_stops_before_it_hides_how_it_ended(
    newest_broker: Address, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(scene: Scene) -> None:
        first, loser, winner = (Process(scene) for _ in range(3))
        await first.takes()
        first.commits(await first.prepares("a"), "a")
        loop, say = asyncio.get_running_loop(), loser.store.replace_prepared

        def late(*of_what: Any) -> bool:
            """Both know that it is committed; the loser comes to say so when the slot has another owner."""
            assert asyncio.run_coroutine_threadsafe(winner.takes(), loop).result(60) == "nothing"
            return say(*of_what)

        monkeypatch.setattr(loser.store, "replace_prepared", late)
        with pytest.raises(Fenced, match="taken over by another process while it was recovered"):
            await loser.takes()
        await scene.agree("a")
        name = await winner.prepares("b")
        assert winner.commits(name, "b") == 1
        assert winner.taken is not None
        assert await winner.taken.producer.complete(name)
        await scene.agree("a", "b")

    with caplog.at_level(logging.ERROR, "semel.dualwrite"):
        play(newest_broker, tmp_path, scene)
    assert not caplog.records, "nothing was lost, and nothing was said to be"


@pytest.mark.parametrize("newest_broker", ["embedded"], indirect=True)
def test_who_was_overtaken_before_his_id_was_there_begins_nothing_under_it(
    newest_broker: Address, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The successor has found no such id to fence, and marked it resolved: nobody would ever end what is open there."""

    async def scene(scene: Scene) -> None:
        late, winner = Process(scene), Process(scene)
        initialize = late.recipe._initialize

        async def stands_still(producer: TransactionalProducer) -> None:
            assert await winner.takes() == "nothing"
            await initialize(producer)

        monkeypatch.setattr(late.recipe, "_initialize", stands_still)
        with pytest.raises(Fenced, match="taken over by another process"):
            await late.takes()
        name = await winner.prepares("a")
        assert winner.commits(name, "a") == 1
        assert winner.taken is not None
        assert await winner.taken.producer.complete(name)
        await scene.agree("a")

    play(newest_broker, tmp_path, scene)


async def aborted_by_the_coordinator(scene: Scene, transactional_id: str) -> None:
    async with asyncio.timeout(90):
        while True:
            [found] = await Admin(scene.cluster.client).describe_transactions([transactional_id])
            if found.state == "CompleteAbort":
                return
            await asyncio.sleep(0.2)


# Kafka looks for time-outs every 10 s.
@pytest.mark.parametrize("newest_broker", ["embedded", pytest.param("kafka", marks=pytest.mark.soak)], indirect=True)
def test_a_time_out_that_passed_while_the_app_was_down_is_told_loudly(
    newest_broker: Address, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The condition did not hold: rows without records. What cannot be helped must at least not pass in silence."""

    async def scene(scene: Scene) -> None:
        first = Process(scene, timeout_ms=SHORT_MS)
        await first.takes()
        name = await first.prepares("a")
        assert first.commits(name, "a") == 1
        await aborted_by_the_coordinator(scene, own_id(scene.slot, 1))
        for _ in range(2):  # Whoever comes next finds the same.
            with pytest.raises(SlotOutOfUse) as caught:
                await Process(scene).takes()
            text = str(caught.value)
            for said in (scene.slot, str(name), "LOST", f"{scene.cluster.topic}-0", "read_uncommitted", "out of use"):
                assert said in text
            assert text in caplog.text
            assert scene.row()[1].startswith(OUT_OF_USE)
        assert scene.ledger() == ["a"]
        assert await scene.topic() == []
        assert first.commits(PreparedState(1, 1), "late") == 0, "the owner that was away cannot decide any more"

    with caplog.at_level(logging.ERROR, "semel.dualwrite"):
        play(newest_broker, tmp_path, scene)


def test_a_recovery_that_was_just_in_time_is_told(
    embedded: Address, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene(scene: Scene) -> None:
        first, second, third = (Process(scene, timeout_ms=60_000) for _ in range(3))
        caplog.clear()  # They said that there is a condition.
        await first.takes()
        first.commits(await first.prepares("a"), "a")
        assert await second.takes() == "committed"
        assert not caplog.records, "one that came at once is no news"
        second.commits(await second.prepares("b"), "b")
        later = Env(wall_ms=lambda: wall_ms() + 40_000)
        async with KafkaClient(embedded.bootstrap, env=later) as client:
            third.recipe = ConditionalRecipe(client, third.producer)
            assert await third.takes() == "committed"
        [line] = caplog.messages
        assert scene.slot in line
        assert "would have aborted it after 60 s" in line

    with caplog.at_level(logging.WARNING, "semel.dualwrite"):
        play(embedded, tmp_path, scene)


def test_an_operator_who_ended_it_is_noticed(newest_broker: Address, tmp_path: Path) -> None:
    async def scene(scene: Scene) -> None:
        first = Process(scene)
        await first.takes()
        first.commits(await first.prepares("a"), "a")
        await TransactionAdmin(scene.cluster.client).fence(own_id(scene.slot, 1))
        with pytest.raises(SlotOutOfUse, match="MAY BE LOST"):
            await Process(scene).takes()

    play(newest_broker, tmp_path, scene)


def test_what_rested_needs_kafka_no_more(newest_broker: Address, tmp_path: Path) -> None:
    """Kafka forgets an id that was not used for a week."""

    async def scene(scene: Scene) -> None:
        first = Process(scene)
        await first.takes()
        assert first.taken is not None
        name = await first.prepares("a")
        first.commits(name, "a")
        await first.taken.producer.complete(name)
        decision = first.recipe.decision(first.taken.owner_epoch, name)
        await first.recipe.rested(first.rows, scene.slot, first.owner, decision)
        await TransactionAdmin(scene.cluster.client).fence(own_id(scene.slot, 1))  # No memory of how "a" ended is left.
        assert await Process(scene).takes() == "nothing"
        await scene.agree("a")

    play(newest_broker, tmp_path, scene)


@pytest.mark.parametrize(
    ("state", "producer_id", "epoch", "went_on"),
    [
        ("Ongoing", 7, 5, False),  # Not reached: it would have been committed.
        ("CompleteAbort", 7, 6, False),
        ("Empty", 7, 7, False),  # Somebody's InitProducerId: nobody can tell.
        ("Ongoing", 7, 6, True),
        ("CompleteCommit", 7, 6, True),
        ("CompleteAbort", 7, 7, True),
        ("CompleteAbort", 8, 0, False),  # The epochs were used up by this very abort.
        ("CompleteCommit", 8, 0, True),
        ("Ongoing", 8, 0, True),
        ("CompleteAbort", 8, 1, True),
        ("Empty", 8, 0, False),
    ],
)
def test_a_later_identity_says_that_the_owner_went_on_or_says_nothing(
    state: str, producer_id: int, epoch: int, went_on: bool
) -> None:
    now = DescribedTransaction(ErrorCode.NONE, "id", state, 1_000, 0, producer_id, epoch, ())
    assert _owner_went_on(now, PreparedState(7, 5)) is went_on


def test_a_kafka_that_grants_less_time_is_told_before_anything_is_written(tmp_path: Path) -> None:
    async def scene(scene: Scene) -> None:
        with pytest.raises(ConfigurationError, match=r"raise its transaction\.max\.timeout\.ms to 900000"):
            await Process(scene, timeout_ms=CONDITION_TIMEOUT_MS).takes()

    with EmbeddedBroker(tmp_path / "broker", config=BrokerConfig(transaction_max_timeout_ms=60_000)) as broker:
        play(Address(broker.address, "embedded", 2), tmp_path, scene)


def test_while_kafka_is_away_no_owner_is_written(tmp_path: Path) -> None:
    with EmbeddedBroker(tmp_path / "broker") as broker:
        address = broker.address

        async def scene(scene: Scene) -> None:
            broker.stop()
            client = KafkaClient(address, settings={"delivery.timeout.ms": 500})
            process = Process(scene)
            process.recipe = ConditionalRecipe(client, process.producer)
            with pytest.raises(Retriable):
                await process.takes()
            assert scene.row()[:2] == (0, ""), "each would have an id of its own, and the next ones would look at all"
            await client.close()

        play(Address(broker.address, "embedded", 2), tmp_path, scene)


def test_v1_is_refused() -> None:
    recipe = ConditionalRecipe(None, None)  # type: ignore[arg-type]
    with pytest.raises(TwoPhaseCommitUnavailable, match=r"transaction\.version"):
        recipe.accept(TwoPhaseMode.TRANSACTIONS_V1)


@pytest.mark.soak
def test_with_enable2pc_a_late_recovery_is_in_time(tmp_path: Path) -> None:
    """4.3.1 has it behind two switches: the transaction outlives every time-out, and the condition is no condition."""
    if missing_tools():
        unavailable("Apache Kafka", f"{' and '.join(missing_tools())} not found")
    extra = {
        "unstable.api.versions.enable": "true",
        "transaction.two.phase.commit.enable": "true",
        "transaction.abort.timed.out.transaction.cleanup.interval.ms": "200",
    }
    node = KafkaNode(extra=extra)
    try:
        node.start()

        async def scene(scene: Scene) -> None:
            mode = await Admin(scene.cluster.client).two_phase_mode()
            assert mode is TwoPhaseMode.NO_RECOVERY
            first, second = (Process(scene, timeout_ms=SHORT_MS, mode=mode) for _ in range(2))
            await first.takes()
            first.commits(await first.prepares("a"), "a")
            witness = TransactionalProducer(scene.cluster.client, "witness", transaction_timeout_ms=SHORT_MS)
            await witness.init_transactions()
            witness.begin()
            await witness.produce(scene.cluster.topic, 1, records("w"))
            await witness.flush()
            await aborted_by_the_coordinator(scene, "witness")  # An ordinary one of the same age is gone.
            assert await second.takes() == "committed"
            await scene.agree("a")

        play(Address(node.bootstrap, "kafka", 2), tmp_path, scene)
    finally:
        node.stop()

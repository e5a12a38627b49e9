"""The doctor explains what is in doubt, and decides in the only safe order: every situation made for real."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from click.testing import CliRunner

from semel import App
from semel.broker.embedded import EmbeddedBroker
from semel.broker.node import Node
from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.client.producer import TransactionalProducer
from semel.client.two_phase import PreparedState
from semel.databases.database import Database, open_database
from semel.databases.processes import ProcessIdentity
from semel.dualwrite.conditional import ConditionalName, own_id
from semel.dualwrite.sql import MARK, SqlStore
from semel.env import wall_ms
from semel.errors import ConfigurationError, ErrorCode, Fenced, Retriable
from semel.log.log import LogError
from semel.ops import cli
from semel.ops.audit import audit_topic
from semel.ops.doctor import Asked, decide, explain, list_all
from semel.settings import Settings
from semel.types import TopicPartition
from tests.broker.core import batch, leave_open
from tests.client.test_brokers import Cluster, records, values
from tests.conftest import unavailable
from tests.services.kafka import KafkaNode, missing_tools

DEAD = "host=elsewhere/boot/ns pid=1 started=1 6f1f"
"""An owner on another host, of whom nobody here can say whether it runs."""
COMMIT: Literal["commit"] = "commit"
ABORT: Literal["abort"] = "abort"


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker(tmp_path_factory.mktemp("doctor")) as found:
        yield found


class Ward:
    """An app with a database of its own, and one slot of its dual write."""

    def __init__(self, broker: EmbeddedBroker, client: KafkaClient, url: str) -> None:
        self.broker, self.client, self.url = broker, client, url
        self.app = App(f"ward{uuid.uuid4().hex[:8]}")
        self.app.database(url, name="shop")
        self.topic = f"{self.app.name}-orders"
        self.settings = Settings(kafka=broker.address, data=Path("unused"))
        self.store = SqlStore(open_database(url), self.app.name, "shop")
        self.slot = ""
        self.owner_epoch = 0

    async def admit(self) -> None:
        await Admin(self.client).create_topics({self.topic: TopicSpec(1)})
        await self.client.refresh_metadata(self.topic)
        self.store.open(self.app.name, self.client.cluster_id, create_tables=True)
        self.slot = self.store.add(DEAD).slot
        self.run("CREATE TABLE orders (value TEXT)")

    def run(self, sql: str, *parameters: Any) -> int:
        with self.database() as database:
            return database.execute(sql, parameters)

    def database(self) -> Any:
        from contextlib import contextmanager

        @contextmanager
        def opened() -> Iterator[Database]:
            database = open_database(self.url)
            database.connect()
            try:
                yield database
            finally:
                database.close()

        return opened()

    async def prepared(self, transactional_id: str = "", value: str = "order", **more: Any) -> PreparedState:
        """A process prepares a transaction and is seen no more."""
        two_phase = more.pop("two_phase", True)
        producer = TransactionalProducer(self.client, transactional_id or self.slot, two_phase_commit=two_phase, **more)
        await producer.init_transactions()
        producer.begin()
        await producer.produce(self.topic, 0, records(value))
        await producer.flush()
        return await producer.prepare() if two_phase else PreparedState(*producer.identity)

    def commit(self, name: PreparedState, value: str = "order") -> None:
        """The database transaction that decides, as the recipe writes it."""
        with self.database() as database:
            database.begin()
            database.execute("INSERT INTO orders VALUES (?)", (value,))
            assert database.execute(MARK, (str(name), self.slot, self.owner_epoch, DEAD)) == 1
            database.commit()

    async def explained(self, name: str = "") -> dict[str, Any]:
        return await explain(self.settings, self.app, (), name or self.slot)

    async def listed(self) -> dict[str, dict[str, Any]]:
        return {row["id"]: row for row in await list_all(self.settings, self.app, ())}

    async def decided(self, verb: Any, name: str = "", **more: Any) -> str:
        asked = Asked(verb, "ticket 7", yes=True, **more)
        return str((await decide(self.settings, self.app, (), name or self.slot, asked))["outcome"])

    async def read(self, topic: str = "") -> list[str]:
        class Here:
            bootstrap, transaction_version = self.broker.address, 2

        cluster = Cluster(Here, self.client, topic or self.topic)
        async with asyncio.timeout(30):
            return values(await cluster.read([TopicPartition(topic or self.topic, 0)]))

    async def audit(self) -> list[dict[str, Any]]:
        return [json.loads(text) for text in await self.read(audit_topic(self.app.name))]

    def orders(self) -> list[str]:
        with self.database() as database:
            return [value for (value,) in database.query("SELECT value FROM orders")]


Scene = Callable[[Ward], Awaitable[None]]


def play(broker: EmbeddedBroker, url: str | Path, scene: Scene) -> None:
    async def main() -> None:
        async with KafkaClient(broker.address) as client:
            ward = Ward(broker, client, f"sqlite:///{url / 'shop.db'}" if isinstance(url, Path) else url)
            await ward.admit()
            try:
                await scene(ward)
            finally:
                ward.store.close()

    asyncio.run(main())


async def before_commit(ward: Ward) -> None:
    name = await ward.prepared()
    found = await ward.explained()
    assert (found["decision"], found["transaction"], found["kind"]) == (ABORT, str(name), "dual write")
    assert "holds no transaction yet" in found["why"]
    with pytest.raises(ConfigurationError, match=r"commit is not the right decision.*rows the database does not have"):
        await ward.decided(COMMIT)
    assert (await ward.explained())["decision"] == ABORT, "what was refused changed nothing"
    assert await ward.decided(ABORT) == f"{name} is aborted"
    assert (await ward.read(), ward.orders()) == ([], [])
    with pytest.raises(AssertionError):  # The process that was believed dead comes back: its database transaction
        ward.commit(name)  # finds the fence raised, and rolls back.
    assert ward.orders() == []


async def after_commit(ward: Ward) -> None:
    name = await ward.prepared()
    ward.commit(name)
    found = await ward.explained()
    assert (found["decision"], found["ends_in_seconds"]) == (COMMIT, None)
    assert found["row"]["prepared"] == str(name)
    assert str(name) in found["why"]
    with pytest.raises(ConfigurationError, match=r"abort is not the right decision.*records are then lost"):
        await ward.decided(ABORT)
    assert await ward.decided(COMMIT) == f"{name} is committed"
    assert (await ward.read(), ward.orders()) == (["order"], ["order"])


def test_a_crash_before_the_database_commit(broker: EmbeddedBroker, tmp_path: Path) -> None:
    play(broker, tmp_path, before_commit)


def test_a_crash_after_the_database_commit(broker: EmbeddedBroker, tmp_path: Path) -> None:
    play(broker, tmp_path, after_commit)


@pytest.mark.postgres
def test_both_on_postgres(broker: EmbeddedBroker, postgres: Any) -> None:
    play(broker, postgres.new_database(), before_commit)
    play(broker, postgres.new_database(), after_commit)


def test_the_row_of_the_transaction_before_does_not_commit_this_one(broker: EmbeddedBroker, tmp_path: Path) -> None:
    async def scene(ward: Ward) -> None:
        first = await ward.prepared(value="first")
        ward.commit(first, "first")
        assert await ward.decided(COMMIT) == f"{first} is committed"
        second = await ward.prepared(value="second")
        found = await ward.explained()
        assert (found["decision"], found["transaction"]) == (ABORT, str(second))
        assert f"holds {first}, an earlier transaction" in found["why"]
        assert await ward.decided(ABORT) == f"{second} is aborted"
        assert await ward.read() == ["first"]

    play(broker, tmp_path, scene)


def test_a_decision_that_is_being_carried_out(broker: EmbeddedBroker, tmp_path: Path) -> None:
    async def scene(ward: Ward) -> None:
        await ward.prepared()
        end_txn = TransactionalProducer(ward.client, ward.slot, two_phase_commit=True)
        await end_txn.init_transactions(keep_prepared=True)
        name = end_txn.prepared_state
        ward.commit(name)

        def refuse(node: Node) -> Callable[..., Any]:
            """The partition's disk takes nothing: the decision is made, and its marker waits."""
            partition = node.topics.partition(ward.topic, 0)
            assert partition is not None
            real = partition.log.append_marker

            def refused(*_: Any, **__: Any) -> Any:
                raise LogError(ErrorCode.KAFKA_STORAGE_ERROR, "the disk is full")

            partition.log.append_marker = refused  # type: ignore[method-assign]
            return real

        real = ward.broker.call(refuse)
        assert await end_txn.complete(name)
        found = await ward.explained()
        assert (found["decision"], found["state"]) == ("nothing", "PrepareCommit")
        assert f"written into {ward.topic}-0" in found["why"]
        for verb in (COMMIT, ABORT):
            with pytest.raises(ConfigurationError, match="cannot go back"):
                await ward.decided(verb, against=True)

        def accept(node: Node) -> None:
            partition = node.topics.partition(ward.topic, 0)
            assert partition is not None
            partition.log.append_marker = real  # type: ignore[method-assign]
            node.transactions.sweep(node.env.wall_ms())

        ward.broker.call(accept)
        assert await ward.read() == ["order"]
        assert (await ward.explained())["title"] == "nothing is open"

    play(broker, tmp_path, scene)


def test_a_lost_row(broker: EmbeddedBroker, tmp_path: Path) -> None:
    async def scene(ward: Ward) -> None:
        name = await ward.prepared()
        ward.commit(name)
        ward.run("DELETE FROM semel_txn")  # As a database that was restored to yesterday would have it.
        ward.run("DELETE FROM orders")
        found = await ward.explained()
        assert (found["decision"], found["title"]) == (ABORT, "its row is not there")
        assert "Make sure that this is the app's database" in found["then"]
        with pytest.raises(ConfigurationError, match="commit is not the right decision"):
            await ward.decided(COMMIT)
        assert await ward.decided(ABORT) == f"{name} is aborted"
        assert await ward.read() == []

    play(broker, tmp_path, scene)


def test_a_row_of_another_environment(broker: EmbeddedBroker, tmp_path: Path) -> None:
    async def scene(ward: Ward) -> None:
        name = await ward.prepared()
        ward.commit(name)
        ward.run("UPDATE semel_txn_meta SET environment = 'staging'")
        found = await ward.explained()
        assert found["decision"] == "unknown"
        assert "another environment: Kafka cluster 'staging'" in found["why"]
        for verb in (COMMIT, ABORT):
            with pytest.raises(ConfigurationError, match="Right is: unknown"):
                await ward.decided(verb)
        assert (await ward.explained())["state"] == "Ongoing"

    play(broker, tmp_path, scene)


def test_the_database_is_away(broker: EmbeddedBroker, tmp_path: Path) -> None:
    async def scene(ward: Ward) -> None:
        name = await ward.prepared()
        ward.commit(name)
        ward.store.close()
        file = tmp_path / "shop.db"
        file.rename(tmp_path / "away.db")
        found = await ward.explained()
        assert found["decision"] == "unknown"
        assert "it cannot be read: there is no database" in found["why"]
        with pytest.raises(ConfigurationError, match="Do nothing to it"):
            await ward.decided(ABORT)
        (tmp_path / "away.db").rename(file)
        assert (await ward.explained())["decision"] == COMMIT
        file.rename(tmp_path / "gone.db")  # For ever: an operator takes the loss, and says so.
        assert await ward.decided(ABORT, against=True) == f"{name} is aborted"
        assert await ward.read() == []
        asked, done = await ward.audit()
        assert (asked["state"], done["state"]) == ("asked", "done")
        assert done["against_the_database"]
        assert (done["reason"], done["transaction"]["transaction"]) == ("ticket 7", str(name))

    play(broker, tmp_path, scene)


def test_another_clients_transaction(broker: EmbeddedBroker, tmp_path: Path) -> None:
    async def scene(ward: Ward) -> None:
        name = f"billing-{ward.app.name}"
        await ward.prepared(name, two_phase=False, transaction_timeout_ms=60_000)
        found = await ward.explained(name)
        assert (found["kind"], found["decision"]) == ("foreign client", "wait")
        assert 0 < found["ends_in_seconds"] <= 60
        with pytest.raises(ConfigurationError, match="nobody but its owner can commit"):
            await ward.decided(COMMIT, name, against=True)
        assert "aborted, and its producer fenced" in await ward.decided(ABORT, name)
        assert await ward.read() == []
        flink = f"flink-{ward.app.name}"
        await ward.prepared(flink)
        found = await ward.explained(flink)
        assert (found["decision"], found["title"]) == ("unknown", "prepared by another client")
        with pytest.raises(ConfigurationError, match="Find its owner"):
            await ward.decided(ABORT, flink)
        assert "aborted" in await ward.decided(ABORT, flink, against=True)

    play(broker, tmp_path, scene)


def test_a_hanging_transaction(broker: EmbeddedBroker, tmp_path: Path) -> None:
    async def scene(ward: Ward) -> None:
        # What a late write after the end leaves behind in a Kafka without KIP-890.
        ward.broker.call(lambda node: leave_open(node, ward.topic, 0, (77, 3)))
        known = await ward.prepared(two_phase=False)  # One that a coordinator knows, in the same partition.
        name = f"{ward.topic}-0@77:3"
        found = (await ward.listed())[name]
        assert (found["kind"], found["decision"], found["ends_in_seconds"]) == ("hanging", ABORT, None)
        assert "open since offset 0, and no coordinator" in found["why"]
        assert f"{ward.topic}-0@{known}" not in await ward.listed(), "a coordinator will end it"
        with pytest.raises(ConfigurationError, match="KIP-664"):
            await ward.decided(COMMIT, name)
        assert await ward.decided(ABORT, name) == f"aborted: {ward.topic}-0 has its marker"
        assert "aborted" in await ward.decided(ABORT)
        assert await ward.read() == [], "readers go on, and see nothing of it"
        with pytest.raises(ConfigurationError, match="nothing is open"):
            await ward.decided(ABORT, name)

    play(broker, tmp_path, scene)


@pytest.mark.parametrize("commit", [True, False])
def test_a_decided_transaction_whose_marker_was_given_up(broker: EmbeddedBroker, tmp_path: Path, commit: bool) -> None:
    """KAFKA-20734. An abort from outside would lose what was answered as committed."""

    async def scene(ward: Ward) -> None:
        other = f"{ward.topic}-other"
        await Admin(ward.client).create_topics({other: TopicSpec(1)})
        producer = TransactionalProducer(ward.client, f"{ward.app.name}.count.host1.0")
        await producer.init_transactions()
        pid, epoch = producer.identity
        producer.begin()
        await producer.produce(other, 0, records("seen"))
        await producer.flush()
        await producer.end_transaction(commit)
        ward.broker.call(lambda node: leave_open(node, ward.topic, 0, (pid, epoch), b"unmarked"))
        name, right, wrong = f"{ward.topic}-0@{pid}:{epoch}", COMMIT if commit else ABORT, ABORT if commit else COMMIT
        found = (await ward.listed())[name]
        assert (found["kind"], found["decision"], found["ends_in_seconds"]) == ("hanging", right, None)
        assert f"The coordinator of {producer.transactional_id} says" in found["why"]
        with pytest.raises(ConfigurationError, match="Nothing was changed"):
            await ward.decided(wrong, name)
        done = "committed" if commit else "aborted"
        assert await ward.decided(right, name) == f"{done}: {ward.topic}-0 has its marker"
        assert await ward.read() == (["unmarked"] if commit else [])

    play(broker, tmp_path, scene)


def test_a_slot_that_is_taken_over_meanwhile(
    broker: EmbeddedBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def recover(ward: Ward) -> bool:
        """What the app's next process does, in the order of the recipe."""
        producer = TransactionalProducer(ward.client, ward.slot, two_phase_commit=True)
        await producer.init_transactions(keep_prepared=True)
        claim = await asyncio.to_thread(SqlStore(open_database(ward.url), ward.app.name, "shop").claim, ward.slot, DEAD)
        return await producer.complete(claim.prepared)

    async def before(ward: Ward) -> None:
        name = await ward.prepared()
        ward.commit(name)
        assert (await ward.explained())["decision"] == COMMIT
        assert await recover(ward)
        with pytest.raises(ConfigurationError, match="nothing is open"):
            await ward.decided(COMMIT)
        assert await ward.read() == ["order"]

    async def between_the_fences(ward: Ward) -> None:
        await ward.prepared()
        loop, claim = asyncio.get_running_loop(), SqlStore.claim

        def late(store: SqlStore, slot: str, owner: str) -> Any:
            monkeypatch.setattr(SqlStore, "claim", claim)
            assert not asyncio.run_coroutine_threadsafe(recover(ward), loop).result(30)
            return claim(store, slot, owner)

        monkeypatch.setattr(SqlStore, "claim", late)
        with pytest.raises(Fenced, match="taken over by another process in this moment"):
            await ward.decided(ABORT)
        asked, failed = await ward.audit()
        assert failed["state"] == "failed"
        assert asked["id"] == failed["id"]
        assert await ward.read() == []

    async def the_row_changed(ward: Ward) -> None:
        """A zombie's database transaction commits between the doctor's look and its fence: the row decides."""
        name = await ward.prepared()
        claim = SqlStore.claim

        def late(store: SqlStore, slot: str, owner: str) -> Any:
            ward.commit(name)
            return claim(store, slot, owner)

        monkeypatch.setattr(SqlStore, "claim", late)
        with pytest.raises(Retriable, match=f"holds '{name}' now, so commit is right"):
            await ward.decided(ABORT)
        monkeypatch.setattr(SqlStore, "claim", claim)
        assert await ward.decided(COMMIT) == f"{name} is committed"
        assert (await ward.read(), ward.orders()) == (["order"], ["order"])

    for number, scene in enumerate((before, between_the_fences, the_row_changed)):
        folder = tmp_path / str(number)
        folder.mkdir()
        play(broker, folder, scene)


def test_a_relays_and_a_processors_transaction(broker: EmbeddedBroker, tmp_path: Path) -> None:
    async def scene(ward: Ward) -> None:
        orders = ward.app.topic(ward.topic, key=str, value=str)

        @ward.app.processor(orders)
        def count(record: Any) -> Iterator[Any]:
            yield from ()

        lane, worker = f"{ward.app.name}.outbox.0123abcd.5", f"{ward.app.name}.count.host1.0"
        for name in (lane, worker):
            await ward.prepared(name, two_phase=False)
        found = await ward.listed()
        assert (found[lane]["kind"], found[lane]["decision"]) == ("outbox lane", "wait")
        assert "nothing is lost" in found[lane]["why"]
        assert (found[worker]["kind"], found[worker]["component"]) == ("component", "count")
        assert found[worker]["decision"] == "wait"
        for name in (lane, worker):
            assert 0 < found[name]["ends_in_seconds"] <= 10
            with pytest.raises(ConfigurationError, match="nobody but its owner"):
                await ward.decided(COMMIT, name)
            assert "aborted" in await ward.decided(ABORT, name)
        assert await ward.read() == []

    play(broker, tmp_path, scene)


def test_an_owner_that_runs_is_waited_for(broker: EmbeddedBroker, tmp_path: Path) -> None:
    async def scene(ward: Ward) -> None:
        await ward.prepared()
        ward.run("UPDATE semel_txn SET owner = ?", f"{ProcessIdentity.current()} 6f1f")
        found = await ward.explained()
        assert "runs on this host" in found["why"]
        assert found["then"].startswith("Wait for the owner first.")
        assert "aborted" in await ward.decided(ABORT)

    play(broker, tmp_path, scene)


def test_the_conditional_recipe_without_keep_prepared(broker: EmbeddedBroker, tmp_path: Path) -> None:
    async def scene(ward: Ward) -> None:
        ward.owner_epoch = await asyncio.to_thread(lambda: ward.store.claim(ward.slot, DEAD).owner_epoch)
        own = own_id(ward.slot, ward.owner_epoch)

        async def prepares(value: str) -> PreparedState:
            producer = TransactionalProducer(
                ward.client, own, transaction_timeout_ms=60_000, prepare_until_timeout=True
            )
            await producer.init_transactions()
            producer.begin()
            await producer.produce(ward.topic, 0, records(value))
            return await producer.prepare()

        def commit(name: PreparedState, value: str) -> None:
            ward.run("UPDATE semel_txn SET prepared = ?", str(ConditionalName(ward.owner_epoch, name)))
            ward.run("INSERT INTO orders VALUES (?)", value)

        name = await prepares("undecided")
        assert (await ward.explained(own))["decision"] == ABORT
        assert await ward.decided(ABORT, own) == f"{name} is aborted"
        ward.owner_epoch = await asyncio.to_thread(lambda: ward.store.claim(ward.slot, DEAD).owner_epoch)
        own = own_id(ward.slot, ward.owner_epoch)
        name = await prepares("kept")
        commit(name, "kept")
        found = await ward.explained(own)
        assert found["decision"] == COMMIT
        assert found["title"].endswith("s are left")
        assert 0 < found["ends_in_seconds"] <= 60
        with pytest.raises(ConfigurationError, match="abort is not the right decision"):
            await ward.decided(ABORT, own)
        assert await ward.decided(COMMIT, own) == f"{name} is committed"
        ward.owner_epoch = await asyncio.to_thread(lambda: ward.store.claim(ward.slot, DEAD).owner_epoch)
        own = own_id(ward.slot, ward.owner_epoch)
        name = await prepares("lost")
        commit(name, "lost")
        ward.broker.call(lambda node: node.transactions.sweep(node.env.wall_ms() + 3_600_000))
        found = (await ward.listed())[own]
        assert found["title"].startswith("LOST")
        assert f"producer {name.producer_id}, epoch {name.epoch}" in found["then"]
        assert (await ward.explained())["then"] == found["then"], "the slot is known by its own name, too"
        assert await ward.decided(ABORT, own) == f"slot {ward.slot} is in use again"
        assert own not in await ward.listed()
        assert (await ward.read(), ward.orders()) == (["kept"], ["kept", "lost"])
        ward.run("UPDATE semel_txn SET prepared = '9999/1000:7'")  # A week later: Kafka does not know the id any more.
        found = (await ward.listed())[own_id(ward.slot, 9999)]
        assert (found["title"], found["decision"]) == ("it may be lost", ABORT)
        assert "Kafka has forgotten the id" in found["why"]
        assert await ward.decided(ABORT) == f"slot {ward.slot} is in use again"
        assert own_id(ward.slot, 9999) not in await ward.listed()

    play(broker, tmp_path, scene)


def test_on_the_command_line(broker: EmbeddedBroker, tmp_path: Path) -> None:
    def semel(*words: str, code: int = 0) -> str:
        result = CliRunner().invoke(cli.main, ["doctor", "txn", *words, "--kafka", broker.address])
        assert result.exit_code == code, (result.stdout, result.stderr)
        return result.stdout if code == 0 else result.stderr

    made: list[Ward] = []

    async def scene(ward: Ward) -> None:
        ward.commit(await ward.prepared())
        made.append(ward)

    play(broker, tmp_path, scene)
    [ward] = made
    where = ("--database", ward.url)
    line = next(line for line in semel("list", *where).splitlines() if ward.slot in line)
    assert "dual write" in line
    assert "commit" in line
    assert "nobody said in which database" in json.loads(semel("explain", ward.slot, "--format", "json"))["why"]
    text = semel("explain", ward.slot, *where)
    assert text.startswith(f"{ward.slot}: the database committed with it")
    dry = semel("commit", ward.slot, *where)
    assert "raise the fence of row" in dry
    assert "nothing was changed; --yes does it" in dry
    assert "say why with --reason" in semel("commit", ward.slot, *where, "--yes", code=2)
    assert "abort is not the right decision" in semel("abort", ward.slot, *where, "--yes", "--reason", "r", code=2)
    done = json.loads(semel("commit", ward.slot, *where, "--yes", "--reason", "r", "--format", "json"))
    assert done["outcome"].endswith("is committed")
    assert "nothing is open under 'nobody'" in semel("explain", "nobody", code=2)


@pytest.mark.peers
def test_on_apache_kafka_a_hanging_and_a_foreign_transaction() -> None:
    """4.3.1 with its guard against hanging ones (KIP-890) off, as older ones are: a late write leaves one behind."""
    if missing_tools():
        unavailable("Apache Kafka", f"{' and '.join(missing_tools())} not found")
    node = KafkaNode(1, extra={"transaction.partition.verification.enable": "false"})
    topic = "orders"

    async def hang(client: KafkaClient) -> None:
        late = batch(
            b"late", producer_id=77, producer_epoch=3, base_sequence=0, transactional=True, timestamp_ms=wall_ms()
        )
        connection = await client.connection(await client.leader(topic, 0))
        answer = await connection.send(
            0,
            9,
            transactional_id="gone",
            acks=-1,
            timeout=5_000,
            topic_data=[{"name": topic, "partition_data": [{"index": 0, "records": late}]}],
        )
        assert answer.responses[0].partition_responses[0].error_code == ErrorCode.NONE

    async def scene(client: KafkaClient) -> None:
        settings, app = Settings(kafka=node.bootstrap, data=Path("unused")), App("shop")
        await Admin(client).create_topics({topic: TopicSpec(1)})
        foreign = TransactionalProducer(client, "billing", transaction_timeout_ms=60_000)
        await foreign.init_transactions()
        foreign.begin()
        await foreign.produce(topic, 0, records("b"))
        await foreign.flush()
        await hang(client)
        found = {row["id"]: row for row in await list_all(settings, app, ())}
        assert found.keys() == {"billing", f"{topic}-0@77:3"}
        assert found["billing"]["decision"] == "wait"
        assert found[f"{topic}-0@77:3"]["kind"] == "hanging"
        for name, says in ((f"{topic}-0@77:3", "has its marker"), ("billing", "aborted, and its producer fenced")):
            outcome = await decide(settings, app, (), name, Asked(ABORT, "ticket 7", yes=True))
            assert says in outcome["outcome"]
        partition = TopicPartition(topic, 0)
        async with asyncio.timeout(30):  # Kafka answers before the last marker is written.
            while (await Admin(client).list_offsets([partition], "stable")) != (
                await Admin(client).list_offsets([partition], "high_watermark")
            ):
                await asyncio.sleep(0.05)
        assert await list_all(settings, app, ()) == []

    async def main() -> None:
        async with KafkaClient(node.bootstrap) as client:
            await scene(client)

    try:
        node.start()
        asyncio.run(main())
    finally:
        node.stop()

"""The catalogue: database, topic and index agree, whoever is killed."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from semel import App
from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.databases import connect
from semel.dualwrite.plan import Plan
from semel.errors import ConfigurationError
from semel.examples.catalogue import Product, app, change, follow, products, shop, withdraw
from semel.examples.catalogue_check import check, disagreements, read_rows, read_topic
from semel.ops.databases import migrate_app
from semel.ops.gaps import accept_gaps
from semel.ops.guarantees import check_required, edges_of
from semel.prove.stores import choose_databases
from semel.settings import Settings
from semel.sinks.search.effects import SearchEffects
from semel.testing import TestApp
from semel.types import Record
from tests.services.broker import BrokerProcess
from tests.services.opensearch import OpenSearchNode
from tests.services.postgres import PostgresServer

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 180.0
ARMS = {
    "app": ("dual.after_prepare", "dual.before_commit", "dual.after_commit", "dual.after_complete"),
    "sink": ("sink.before_db_commit", "sink.before_position", "sink.after_db_commit", "sink.before_fence_commit"),
}


def make_topic(bootstrap: str) -> None:
    async def make() -> None:
        async with KafkaClient(bootstrap) as client:
            await Admin(client).create_topics({products.name: TopicSpec(products.partitions or 1, {})})

    asyncio.run(make())


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[BrokerProcess]:
    made = BrokerProcess(tmp_path / "broker")
    made.start()
    make_topic(made.bootstrap)
    yield made
    made.stop()


def as_the_index_has_it(told: list[Product]) -> dict[str, tuple[int, Any]]:
    """What the sink's handler makes of these products, with OpenSearch's rule: a version that is not lower counts."""
    raw = [(at, item.sku.encode(), msgspec.json.encode(item)) for at, item in enumerate(told)]
    records = [products.decode(Record(products.name, 0, at, 0, key, value)) for at, key, value in raw]
    index = SearchEffects(records, {"products"})
    follow(records, index)
    kept: dict[str, tuple[int, Any]] = {}
    for note in index.noted:
        assert not note.by_position
        if note.version >= kept.get(note.id, (0, None))[0]:
            kept[note.id] = note.version, msgspec.json.decode(note.body)
    return kept


def test_a_change_and_its_record_are_there_together_and_the_index_follows(
    broker: BrokerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path}/catalogue.db"
    for name, value in (("KAFKA", broker.bootstrap), ("DATABASE", url), ("DATA", str(tmp_path / "data"))):
        monkeypatch.setenv(f"SEMEL_{name}", value)
    try:
        change("b", "Blue Train", 1_199)
        change("a", "Kind of Blue", 999)
        change("b", "Blue Train", 899)
        withdraw("a")
        withdraw("unknown")
        choice = app.writer(shop.name).choice
        assert choice is not None
        assert choice.plan is Plan.DUAL_WRITE, "the embedded broker keeps prepared transactions"
    finally:
        app.close()
    rows = read_rows(url)
    told = asyncio.run(read_topic(broker.bootstrap))
    assert sorted(rows, key=lambda row: row.sku) == [
        Product("a", "Kind of Blue", 999, 2, withdrawn=True),
        Product("b", "Blue Train", 899, 2),
    ]
    assert list(disagreements(rows, told, as_the_index_has_it(told))) == []
    again = told[::-1] + told
    assert list(disagreements(rows, told, as_the_index_has_it(again))) == [], "late and repeated records change nothing"


ROW = Product("a", "Kind of Blue", 999, 2)
TOLD = [msgspec.structs.replace(ROW, version=1, cents=500), ROW]
SHOWN = {"sku": "a", "name": "Kind of Blue", "cents": 999}


@pytest.mark.parametrize(
    ("rows", "told", "documents", "text"),
    [
        ([ROW], TOLD[:1], {"a": (2, SHOWN)}, "the topic has its versions [1]"),
        ([ROW], [*TOLD, ROW], {"a": (2, SHOWN)}, "the topic has its versions [1, 2, 2]"),
        ([ROW], TOLD[::-1], {"a": (2, SHOWN)}, "the topic has its versions [2, 1]"),
        ([ROW], [TOLD[0], msgspec.structs.replace(ROW, cents=1)], {"a": (2, SHOWN)}, "its last record says"),
        ([ROW], TOLD, {"a": (1, SHOWN)}, "the index has version 1 of it"),
        ([ROW], TOLD, {"a": (2, {**SHOWN, "cents": 500})}, "'cents': 500"),
        ([ROW], TOLD, {}, "the index has version 0 of it: None"),
        ([ROW], TOLD, {"a": (2, {"deleted": True})}, "'deleted': True"),
        ([], TOLD, {}, "the topic tells of a, which the database does not know"),
        ([], [], {"a": (2, SHOWN)}, "the index shows a, which the database does not know"),
    ],
)
def test_the_check_names_what_does_not_agree(rows: Any, told: Any, documents: Any, text: str) -> None:
    [found] = disagreements(rows, told, documents)
    assert text in found


def test_what_the_catalogue_promises_is_said() -> None:
    [edge] = [edge for edge in edges_of(app, 2) if "OpenSearch" in edge.edge]
    assert "each document by itself" in edge.atomic_unit
    assert "external_gte" in edge.fence
    assert any("a batch is not one step" in reason for reason in edge.weakened)
    assert not edge.breaks
    check_required(App("strict", require="exactly-once"), [edge])


def test_who_does_not_know_indexes_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="has a search, and tests have no OpenSearch in memory"):
        TestApp(app)
    with pytest.raises(ConfigurationError, match="a campaign cannot read what an OpenSearch holds"):
        choose_databases(app, {}, tmp_path)
    gaps = accept_gaps(app, Settings(), component="follow", partitions=(), reason="", dry_run=True)
    with pytest.raises(ConfigurationError, match="in a cache or search: set next_offset there"):
        asyncio.run(gaps)


def test_what_the_catalogue_needs_is_printed_for_those_who_may_make_it() -> None:
    text = migrate_app(app, print_only=True)
    assert "CREATE TABLE IF NOT EXISTS product" in text
    assert "PUT /semel-sink" in text
    assert '"deleted": {\n' in text.partition("PUT /products")[2]


# --- Whoever is killed ---


class Children:
    """The app and its sink as processes, started again when they die."""

    def __init__(self, folder: Path, environment: dict[str, str], rng: random.Random) -> None:
        self._folder, self._rng = folder, rng
        self._environment = os.environ | environment
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self.died: Counter[str] = Counter()

    def start(self, role: str, *, armed: bool = True) -> None:
        point = f"{self._rng.choice(ARMS[role])}:kill:{self._rng.randrange(2, 60)}" if armed else ""
        environment = self._environment | {"SEMEL_FAILPOINT": point, "SEMEL_DATA": str(self._folder / role)}
        with (self._folder / f"{role}.log").open("ab") as log:
            self._running[role] = subprocess.Popen(
                [sys.executable, "-m", "tests.examples.catalogue_child", role, str(self._rng.random())[2:8]],
                cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def keep(self, *, armed: bool = True) -> None:
        for role, process in list(self._running.items()):
            code = process.poll()
            if code is not None:
                assert code == -signal.SIGKILL, f"{role} ended with {code}: {self.log(role)}"
                self.died[role] += 1
                self.start(role, armed=armed)

    def kill(self, role: str) -> None:
        self._running[role].kill()
        self._running[role].wait()

    def end(self, role: str) -> None:
        """In order; it leaves nothing that somebody would have to recover."""
        process = self._running.pop(role)
        process.terminate()
        assert process.wait(60) == 0, self.log(role)

    def stop(self) -> None:
        for process in self._running.values():
            process.kill()
            process.wait()

    def log(self, role: str) -> str:
        return (self._folder / f"{role}.log").read_text(errors="replace")[-3_000:]


def until(holds: Callable[[], bool], beside: Callable[[], None], what: Callable[[], str]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline, what()
        beside()
        time.sleep(0.05)


@pytest.mark.soak
@pytest.mark.postgres
@pytest.mark.opensearch
@pytest.mark.timeout(1_500)
def test_database_topic_and_index_agree_whoever_is_killed(
    broker: BrokerProcess, postgres: PostgresServer, opensearch: OpenSearchNode, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    rng = random.Random(939)
    url = postgres.new_database()
    environment = {
        "SEMEL_KAFKA": broker.bootstrap,
        "SEMEL_DATABASE": url,
        "SEMEL_SEARCH": opensearch.new_database(),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    look = connect(url)
    look.migrate(str(shop.schema))
    children = Children(tmp_path, environment, rng)

    def changes() -> int:
        return int(look.query("SELECT COALESCE(SUM(version), 0) FROM product")[0][0])

    struck: Counter[str] = Counter()
    try:
        children.start("app")
        children.start("sink")
        for strike in range(30):
            goal = changes() + 40
            until(lambda goal=goal: changes() >= goal, children.keep, lambda: children.log("app"))  # type: ignore[misc]
            victim = ("app", "sink", "search", "app", "sink", "broker")[strike % 6]
            struck[victim] += 1
            if victim in ("search", "broker"):
                server: OpenSearchNode | BrokerProcess = opensearch if victim == "search" else broker
                server.kill()
                server.start()
            else:
                children.kill(victim)
        children.kill("app")
        children.kill("sink")
        children.keep(armed=False)
        goal = changes() + 40
        until(lambda: changes() >= goal, children.keep, lambda: children.log("app"))
        children.end("app")
        settings = Settings.from_environment(data=tmp_path / "check")
        wrong: list[str] = ["not looked yet"]

        def agrees() -> bool:
            wrong[:] = check(settings)
            return not wrong

        until(agrees, lambda: None, lambda: f"{wrong[:5]}\n{children.log('sink')}")
        children.end("sink")
        assert check(settings) == []
        print(f"{changes()} changes; struck {dict(struck)}, died {dict(children.died)}")
    finally:
        children.stop()
        look.close()

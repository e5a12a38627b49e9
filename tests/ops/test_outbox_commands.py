"""`semel relay` and `semel outbox ...` as an operator runs them: processes, a real database, a real broker."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.databases import Database, connect
from semel.outbox.rows import shard_of
from semel.types import Record
from tests.conftest import Address
from tests.outbox.world import insert, msg_id, read_topic

APP = """
import os
from semel import App
app = App(os.environ["SHOP"])
app.topic(os.environ["SHOP"] + ".paid", key=str, value=dict[str, int])
app.database(os.environ["SHOP_DATABASE"], outbox=True)
none = App("none")
two = App("two")
two.database("sqlite:///one.db", outbox=True, name="one")
two.database("postgresql://me:hush@127.0.0.1:1/two", outbox=True, name="other")
"""
PATIENCE_SECONDS = 120.0


class Shop:
    """An app in a folder of its own, and the processes that are run there."""

    def __init__(self, folder: Path, url: str, bootstrap: str) -> None:
        self.name = f"shop{uuid.uuid4().hex[:8]}"
        self.topic = f"{self.name}.paid"
        self.bootstrap = bootstrap
        self.url = url
        self._folder = folder
        (folder / "shop.py").write_text(APP)
        self._environment = os.environ | {"SHOP": self.name, "SHOP_DATABASE": url, "PYTHONPATH": str(folder)}
        self._environment |= {"SEMEL_DATA": str(folder / "data"), "SEMEL_PROFILE": "production"}

    def begin(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "semel", *arguments],
            cwd=self._folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str) -> str:
        """What the command prints; it succeeds."""
        process = self.begin(*arguments)
        said, wrong = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 0, (arguments, said, wrong)
        return said

    def status(self) -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = json.loads(self.run("outbox", "status", "shop:app", "--format", "json"))
        return lines

    def records(self) -> list[Record]:
        return asyncio.run(read_topic(self.bootstrap, self.topic, partitions=1))

    async def make_topic(self) -> None:
        async with KafkaClient(self.bootstrap) as client:
            await Admin(client).create_topics({self.topic: TopicSpec(1, {})})


def refused(*commands: tuple[subprocess.Popen[str], int, str]) -> None:
    """They run side by side: each ends with its code, and says one line that has this text."""
    for process, code, text in commands:
        said, wrong = process.communicate(timeout=PATIENCE_SECONDS)
        assert (process.returncode, text in wrong) == (code, True), (process.args, said, wrong)
        assert "Traceback" not in wrong
        assert "hush" not in said + wrong, "a password is shown"


def until(condition: Callable[[], bool], beside: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert beside.poll() is None, beside.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def look(postgres: Any) -> Iterator[Database]:
    found = connect(postgres.new_database())
    yield found
    found.close()


def write(look: Database, topic: str, *keys: str) -> list[str]:
    rows = []
    for key in keys:
        identity = str(uuid.uuid4())
        rows.append((shard_of(key.encode(), identity), identity, topic, key.encode(), b'{"cents": 5}', "[]", 0))
    insert(look, rows)
    return [row[1] for row in rows]


@pytest.mark.postgres
@pytest.mark.timeout(300)
def test_what_an_operator_does_to_an_outbox(look: Database, embedded: Address, tmp_path: Path) -> None:
    shop = Shop(tmp_path, look.url, embedded.bootstrap)
    asyncio.run(shop.make_topic())
    kafka = ("--kafka", shop.bootstrap)

    # There is nothing yet.
    refused(
        (shop.begin("outbox", "status", "shop:app"), 2, "semel migrate"),
        (shop.begin("relay", "shop:app", *kafka), 2, "semel migrate"),
    )
    shop.run("migrate", "shop:app")

    # A hold is about rows that are there and rows that come; a dry run changes nothing.
    first = write(look, shop.topic, "ann", "bob", "ann")
    hold = ("outbox", "hold", "shop:app", "--topic", shop.topic, "--key", "ann", "--reason", "a dispute")
    assert shop.run(*hold, "--dry-run") == "2 rows would be held.\n"
    assert look.query("SELECT COUNT(*) FROM semel_outbox_hold") == [(0,)]
    assert shop.run(*hold) == "2 rows held.\n"

    relay = shop.begin("relay", "shop:app", *kafka)
    try:
        until(lambda: look.query("SELECT COUNT(*) FROM semel_outbox") == [(2,)], relay)
        later = write(look, shop.topic, "ann", "eve")
        marked = "SELECT COUNT(*), COUNT(held) FROM semel_outbox"
        until(lambda: look.query(marked) == [(3, 3)], relay)
        assert [msg_id(record) for record in shop.records()] == [first[1], later[1]]
        lines = shop.status()
        [said] = [line for line in lines if line["what"] == "hold"]
        assert (said["topic"], said["key"], said["reason"]) == (shop.topic, "ann", "a dispute")
        assert sum(line["held"] for line in lines if "held" in line) == 3
        assert len({line["owner"] for line in lines if line.get("owner")}) == 1, "who publishes is told"

        release = ("outbox", "release", "shop:app", "--topic", shop.topic, "--key", "ann", "--reason", "settled")
        assert shop.run(*release) == "3 rows released.\n"
        until(lambda: look.query("SELECT COUNT(*) FROM semel_outbox") == [(0,)], relay)
        assert [msg_id(record) for record in shop.records()][2:] == [first[0], first[2], later[0]], "in their order"

        again = (
            "outbox",
            "republish",
            "shop:app",
            "--topic",
            shop.topic,
            "--partition",
            "0",
            "--reason",
            "lost",
            *kafka,
        )
        at = shop.records()[0].offset
        told = json.loads(shop.run(*again, "--from", str(at), "--to", str(at), "--format", "json"))
        assert [(line["offset"], line["key"]) for line in told] == [(at, "bob")]
        until(lambda: len(shop.records()) == 6, relay)
        new = shop.records()[-1]
        assert dict(new.headers)["semel-supersedes"] == first[1].encode()
        assert (new.key, new.value) == (b"bob", b'{"cents": 5}')

        said_restored = shop.run("outbox", "declare-restored", "shop:app", "--reason", "a drill")
        assert said_restored.startswith("Every lane is compared with its topics. Incarnation ")
        verbs = look.query("SELECT verb, reason FROM semel_outbox_audit ORDER BY requested_at, verb")
        assert sorted(verbs) == [
            ("declare-restored", "a drill"),
            ("hold", "a dispute"),
            ("release", "settled"),
            ("republish", "lost"),
        ]
    finally:
        relay.send_signal(signal.SIGTERM)
        said, wrong = relay.communicate(timeout=PATIENCE_SECONDS)
    assert relay.returncode == 0, wrong
    assert len(shop.records()) == 6, "nothing was sent again"

    # What cannot be done.
    look.execute("UPDATE semel_outbox_meta SET app = 'another'")
    refused(
        (shop.begin(*again, "--from", "900", "--to", "901"), 2, "committed records from offset"),
        (shop.begin("relay", "shop:app", *kafka), 2, "belongs to app 'another'"),
    )


@pytest.mark.timeout(120)
def test_what_is_asked_wrongly_is_told_before_anything_is_done(tmp_path: Path) -> None:
    shop = Shop(tmp_path, f"sqlite:///{tmp_path}/shop.db", "127.0.0.1:1")
    shop.run("migrate", "shop:app")
    refused(
        (shop.begin("relay", "shop:app"), 2, "SEMEL_KAFKA"),
        (shop.begin("relay", "shop:none", "--kafka", shop.bootstrap), 2, "outbox=True"),
        (shop.begin("outbox", "hold", "shop:app", "--key", "ann"), 2, "--reason"),
    )
    refused(
        (shop.begin("outbox", "hold", "shop:app", "--reason", "x"), 2, "Name a topic, a key or a message"),
        (shop.begin("outbox", "hold", "shop:app", "--id", "m1", "--reason", "x"), 2, "m1"),
        (shop.begin("outbox", "hold", "shop:two", "--topic", "t", "--reason", "x"), 2, "it has one, other"),
        (shop.begin("outbox", "status", "shop:two"), 2, "semel migrate"),
    )
    look = connect(shop.url)
    assert look.query("SELECT COUNT(*) FROM semel_outbox_hold") == [(0,)]
    assert look.query("SELECT COUNT(*) FROM semel_outbox_audit") == [(0,)]
    look.close()

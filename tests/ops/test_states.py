"""`semel state get`: what is committed of a key, read from the changelog of a state."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from semel.broker.embedded import EmbeddedBroker
from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.client.producer import TransactionalProducer
from semel.ops import cli
from semel.wire.records import BatchBuilder

APP = """
from semel import App
app = App("tiny")
source = app.topic("in", key=str, value=str)
app.processor(source, state=app.state("names", key=str, value=str), name="a")(lambda record, state: None)
app.processor(source, state=app.state("numbers", key=int, value=int), name="b")(lambda record, state: None)
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with EmbeddedBroker(tmp_path_factory.mktemp("broker")) as broker:
        asyncio.run(fill(broker.address))
        yield broker.address


async def fill(bootstrap: str) -> None:
    async with KafkaClient(bootstrap) as client:
        await Admin(client).create_topics({"tiny.semel.state.names": TopicSpec(3, {"cleanup.policy": "compact"})})
        producer = TransactionalProducer(client, "tiny.filler")
        await producer.init_transactions()
        for partition, key, value, is_real in (
            (0, b"alice", b"one", True),
            (2, b"alice", b"two", True),
            (2, b"alice", b"three", True),
            (2, b"alice", b"never", False),
            (1, b"bob", b"here", True),
            (1, b"bob", None, True),
        ):
            producer.begin()
            batch = BatchBuilder()
            batch.append(key, value, 1_700_000_000_123, ())
            await producer.produce("tiny.semel.state.names", partition, batch)
            await producer.end_transaction(is_real)
        await producer.close()


@pytest.fixture
def get(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "tiny_app.py").write_text(APP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(cli.main, ["state", "get", "tiny_app:app", *arguments, "--kafka", address])

    return run


def test_the_last_committed_value_of_each_partition_is_shown(get: Any) -> None:
    result = get("names", "alice", "--format", "json")
    assert result.exit_code == 0, result.output
    rows = [(row["partition"], row["value"], row["written"]) for row in json.loads(result.stdout)]
    at = "2023-11-14T22:13:20.123+00:00"
    assert rows == [(0, "one", at), (2, "three", at)]


@pytest.mark.parametrize("key", ["bob", "nobody"])
def test_a_key_without_a_value_is_told_by_the_exit_code(get: Any, key: str) -> None:
    assert get("names", key).exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("streets", "alice"), "it has names, numbers"),
        (("numbers", "alice"), "whose keys are int"),
        (("numbers", "7"), "no worker of the app has run on this Kafka"),
    ],
)
def test_what_cannot_be_read_says_why(get: Any, arguments: tuple[str, str], said: str) -> None:
    result = get(*arguments)
    assert result.exit_code == 2
    assert said in result.output

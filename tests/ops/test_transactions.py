"""What an operator sees of open and prepared transactions."""

from __future__ import annotations

import asyncio
import json

from click.testing import CliRunner

from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.client.producer import TransactionalProducer
from semel.ops import cli
from tests.client.test_brokers import records
from tests.conftest import Address


def shown(address: Address, *options: str) -> str:
    result = CliRunner().invoke(cli.main, ["txn", "prepared", "--kafka", address.bootstrap, *options])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_prepared_transactions_are_listed_by_age_with_the_name_that_a_database_holds(embedded: Address) -> None:
    async def leave_two_open() -> str:
        async with KafkaClient(embedded.bootstrap) as client:
            await Admin(client).create_topics({"txn-prepared": TopicSpec(1)})
            name = ""
            for number, two_phase in enumerate((True, False)):
                producer = TransactionalProducer(client, f"txn-prepared.{number}", two_phase_commit=two_phase)
                await producer.init_transactions()
                producer.begin()
                await producer.produce("txn-prepared", 0, records("x"))
                await producer.flush()
                name = str(await producer.prepare()) if two_phase else name
            return name

    name = asyncio.run(leave_two_open())
    found = json.loads(shown(embedded, "--format", "json"))
    assert found["mode"] == "FULL"
    mine = [row for row in found["transactions"] if row["transactional_id"].startswith("txn-prepared.")]
    assert [row["transactional_id"] for row in mine] == ["txn-prepared.0", "txn-prepared.1"], "the oldest first"
    assert (mine[0]["transaction"], mine[0]["ends_in_seconds"]) == (name, None)
    assert 0 < mine[1]["ends_in_seconds"] <= 10
    assert mine[0]["partitions"] == ["txn-prepared-0"]
    text = shown(embedded)
    assert text.startswith("two-phase commit with recovery. A prepared transaction never times out")
    line = next(line for line in text.splitlines() if line.startswith("txn-prepared.0"))
    assert name in line
    assert "never" in line


def test_a_kafka_without_it_says_why(embedded_v1: Address) -> None:
    assert shown(embedded_v1).startswith("impossible: transactions V1. The cluster has transaction.version below 2")

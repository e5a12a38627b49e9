"""The demo in small, on everything it must run on; the full runs are `make soak`."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest

from semel.errors import ConfigurationError
from semel.prove.demo import Demo, DemoOptions, DemoResult
from tests.conftest import unavailable
from tests.services.kafka import KafkaNode, missing_tools
from tests.services.postgres import PostgresServer


class Quiet:
    interval = 1.0

    def line(self, text: str) -> None:
        print(text)

    def progress(self, text: str) -> None:
        print(text)


def run(options: DemoOptions, broker: KafkaNode | None = None) -> DemoResult:
    demo = Demo(options, Quiet(), broker)
    try:
        result = asyncio.run(demo.run())
    finally:
        demo.close()
    print(result.as_json())
    print(result.verdict.findings.summary(), result.load.refused[:3])
    return result


def assert_exact(result: DemoResult, orders: int) -> None:
    assert result.exact, (result.verdict.findings.summary(), result.load.refused[:3])
    assert result.verdict.found.orders == orders
    assert result.kills >= 3
    assert result.broker_kills >= 1
    assert result.pauses >= 1
    assert result.load.replayed >= orders // 10  # every order that was sent again was answered from the store


def test_embedded_broker_and_sqlite(tmp_path: Path) -> None:
    assert_exact(run(DemoOptions(orders=3_000, seed=11, keep=tmp_path)), 3_000)


@pytest.mark.soak  # Each half of it is in one of the others.
def test_embedded_broker_and_postgres(tmp_path: Path, postgres: PostgresServer) -> None:
    options = DemoOptions(orders=2_000, seed=12, keep=tmp_path, database=postgres.new_database())
    assert_exact(run(options), 2_000)


def kafka_node() -> KafkaNode:
    if missing_tools():
        unavailable("Apache Kafka", f"{' and '.join(missing_tools())} not found")
    return KafkaNode()


def test_apache_kafka_and_postgres(tmp_path: Path, postgres: PostgresServer) -> None:
    node = kafka_node()
    try:
        node.start()
        options = DemoOptions(orders=1_500, seed=13, keep=tmp_path, database=postgres.new_database())
        assert_exact(run(options, node), 1_500)
    finally:
        node.stop()


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1, 11))
def test_the_whole_input_ten_seeds(tmp_path: Path, seed: int) -> None:
    result = run(DemoOptions(seed=seed, keep=tmp_path))
    assert_exact(result, 69_659)
    figures = result.as_json()
    assert figures["cds"] == figures["items_taken"] == 167_881
    assert figures["dollars"] == 2_500_315.63
    assert figures["customers"] == 23_570
    assert result.kills >= 20
    assert result.broker_kills >= 3
    assert result.pauses >= 3
    assert result.rebalances >= 3
    assert result.load.duplicate_requests >= 10_000


@pytest.mark.soak
@pytest.mark.parametrize("seed", [21, 22, 23])
def test_the_whole_input_on_apache_kafka_and_postgres(tmp_path: Path, seed: int, postgres: PostgresServer) -> None:
    node = kafka_node()
    try:
        node.start()
        options = DemoOptions(seed=seed, keep=tmp_path, database=postgres.new_database())
        assert_exact(run(options, node), 69_659)
    finally:
        node.stop()


def test_a_wrong_outcome_is_not_called_exact(tmp_path: Path) -> None:
    result = run(DemoOptions(orders=50, seed=1, faults=False, keep=tmp_path))
    assert result.exact
    rows = dict(result.verdict.found.customers_rows)
    rows.pop(next(iter(rows)))
    found = dataclasses.replace(result.verdict.found, customers_rows=rows)
    result.verdict = dataclasses.replace(result.verdict, found=found)
    assert not result.exact


def test_what_an_earlier_run_left_is_refused(tmp_path: Path) -> None:
    run(DemoOptions(orders=20, seed=1, faults=False, keep=tmp_path / "first"))
    with pytest.raises(ConfigurationError, match="earlier run"):
        run(DemoOptions(orders=20, seed=1, faults=False, keep=tmp_path / "first"))
    url = f"sqlite:///{tmp_path / 'first' / 'shop.db'}"
    with pytest.raises(ConfigurationError, match="holds rows"):
        run(DemoOptions(orders=20, seed=1, faults=False, keep=tmp_path / "second", database=url))

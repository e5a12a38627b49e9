"""Fixtures for every test: real components, one of each a session.

With CI=true a component that cannot be started is a failure; on a user's machine it is a named skip.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.services.kafka import KafkaNode, missing_tools


def unavailable(what: str, why: str) -> None:
    """Fail in CI, skip with a name elsewhere."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} is needed here and cannot be started: {why}")
    pytest.skip(f"{what}: {why}")


def _node(transaction_version: int) -> Iterator[KafkaNode]:
    tools = missing_tools()
    if tools:
        unavailable("Apache Kafka", f"{' and '.join(tools)} not found")
    node = KafkaNode(transaction_version)
    try:
        yield node.start()
    finally:
        node.stop()


@pytest.fixture(scope="session")
def kafka() -> Iterator[KafkaNode]:
    """Apache Kafka 4.3.1 with transactions V2; shared, so use topics and ids of your own."""
    yield from _node(2)


@pytest.fixture(scope="session")
def kafka_v1() -> Iterator[KafkaNode]:
    """Apache Kafka 4.3.1 finalized at transaction.version 1."""
    yield from _node(1)

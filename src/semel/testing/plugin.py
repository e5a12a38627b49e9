"""The fixtures that pytest finds by itself (entry point `pytest11`), one for each scope."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from semel.testing.broker import BrokerForTests

__all__ = ["semel_broker", "semel_broker_module", "semel_broker_session"]


def _broker(factory: pytest.TempPathFactory) -> Iterator[BrokerForTests]:
    from semel.testing.broker import BrokerForTests  # Here, so that runs without a broker do not pay for its import.

    with BrokerForTests(factory.mktemp("semel-broker")) as broker:
        yield broker


@pytest.fixture
def semel_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerForTests]:
    """A Kafka broker of this test's own: empty, durable, on a free port of 127.0.0.1."""
    yield from _broker(tmp_path_factory)


@pytest.fixture(scope="module")
def semel_broker_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerForTests]:
    """A Kafka broker that the tests of one file share."""
    yield from _broker(tmp_path_factory)


@pytest.fixture(scope="session")
def semel_broker_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerForTests]:
    """A Kafka broker that all tests share: use topics and ids of your own."""
    yield from _broker(tmp_path_factory)

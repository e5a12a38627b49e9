"""The FastAPI app as its own team would test it, with its orders in Kafka."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
from fastapi.testclient import TestClient
from sqlalchemy.orm import Session

from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.databases import Database, connect
from semel.databases.spec import DatabaseSpec
from semel.env import Env
from semel.ops.databases import migrate_app
from semel.outbox.relay import Relay
from semel.processing.metrics import Metrics
from semel.settings import Settings
from tests.conftest import DEFERRING, empty_database
from tests.outbox.world import msg_id, read_topic


@pytest.fixture(params=DEFERRING)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return empty_database(request, tmp_path)


@pytest.fixture
def shop(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The app's module on this database, migrated, with two customers."""
    monkeypatch.setenv("SHOP_DATABASE", url)
    import semel.examples.fastapi_outbox as module

    module = importlib.reload(module)
    migrate_app(module.semel, print_only=False)
    module.Base.metadata.create_all(module.engine)
    with Session(module.engine) as session:
        session.add_all([module.Customer(id="ann", credit=100), module.Customer(id="bob", credit=1_000)])
        session.commit()
    yield module
    module.engine.dispose()


@pytest.fixture
def look(url: str, shop: ModuleType) -> Iterator[Database]:
    found = connect(url)
    yield found
    found.close()


def events(look: Database) -> list[dict[str, Any]]:
    found = look.query("SELECT record_value FROM semel_outbox ORDER BY seq")
    return [msgspec.json.decode(bytes(value)) for (value,) in found]


def test_an_order_and_its_event_are_both_there(shop: ModuleType, look: Database) -> None:
    client = TestClient(shop.api)
    assert client.post("/orders", json={"customer_id": "ann", "cents": 30}).json() == {"order": 1}
    assert look.query("SELECT id, customer_id, cents FROM customer_order") == [(1, "ann", 30)]
    assert events(look) == [{"customer_id": "ann", "cents": 30, "id": 1}]


def test_an_order_that_is_refused_tells_nothing(shop: ModuleType, look: Database) -> None:
    client = TestClient(shop.api)
    assert client.post("/orders", json={"customer_id": "ann", "cents": 101}).status_code == 409
    assert client.post("/orders", json={"customer_id": "eve", "cents": 1}).status_code == 409
    assert (look.query("SELECT * FROM customer_order"), events(look)) == ([], [])


def test_an_order_whose_commit_fails_tells_nothing(
    shop: ModuleType, look: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    look.execute("DROP TABLE semel_outbox")
    client = TestClient(shop.api, raise_server_exceptions=False)
    assert client.post("/orders", json={"customer_id": "ann", "cents": 1}).status_code == 500
    assert look.query("SELECT * FROM customer_order") == []
    assert look.query("SELECT credit FROM customer WHERE id = 'ann'") == [(100,)]


@pytest.mark.parametrize("url", [pytest.param("postgres", marks=pytest.mark.postgres)], indirect=True)
def test_orders_at_the_same_time_end_in_kafka_once_and_in_order(
    shop: ModuleType, look: Database, url: str, embedded: Any, tmp_path: Path
) -> None:
    """Many customers' requests at once, and the relay beside them."""
    topic, app = f"orders.placed.{tmp_path.name}", f"orders-{tmp_path.name}"
    look.execute("UPDATE customer SET credit = 1000")
    client = TestClient(shop.api)

    def order(number: int) -> int:
        answer = client.post("/orders", json={"customer_id": ("ann", "bob")[number % 2], "cents": 10})
        return int(answer.json()["order"])

    with ThreadPoolExecutor(4) as threads:
        taken = set(threads.map(order, range(24)))
    assert len(taken) == 24
    look.execute("UPDATE semel_outbox SET topic = ?", (topic,))  # The broker is shared, the topic is not.

    async def publish() -> list[Any]:
        async with KafkaClient(embedded.bootstrap) as kafka:
            await Admin(kafka).create_topics({topic: TopicSpec(3, {})})
        settings = Settings(data=tmp_path / "relay")
        relay = Relay(app, DatabaseSpec("database", url), embedded.bootstrap, settings, Env(), Metrics())
        running = asyncio.create_task(relay.run())
        async with asyncio.timeout(60):
            while look.query("SELECT COUNT(*) FROM semel_outbox") != [(0,)]:
                await asyncio.sleep(0.05)
        await relay.drain()
        await running
        return await read_topic(embedded.bootstrap, topic)

    records = asyncio.run(publish())
    found = [msgspec.json.decode(record.value) for record in records]
    assert sorted(event["id"] for event in found) == sorted(taken)
    assert len({msg_id(record) for record in records}) == 24
    for customer in ("ann", "bob"):
        numbers = [event["id"] for event in found if event["customer_id"] == customer]
        assert numbers == sorted(numbers)  # The customer's lock gave the order.

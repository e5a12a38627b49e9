"""Declaring an app: what cannot work is refused at once, with a message that says what to do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

import semel
from semel import App
from semel.errors import ConfigurationError
from semel.examples import shop
from semel.types import Record


class Order(msgspec.Struct):
    id: int


class Plain:
    """A class that no decoder knows."""


def app_with_topic() -> tuple[App, Any]:
    app = App("shop")
    return app, app.topic("orders", key=str, value=Order)


def test_the_shop_declares_what_its_page_says() -> None:
    assert list(shop.app.topics) == ["orders", "inventory"]
    assert list(shop.app.endpoints) == ["POST /orders"]
    assert [component.group for component in shop.app.components()] == ["shop.reserve"]
    assert {name: sink.topic.name for name, sink in shop.app.sinks.items()} == {
        "customer_totals": "orders",
        "stock": "inventory",
    }


def test_handlers_stay_plain_functions_that_a_test_can_call() -> None:
    order = shop.Order(1, "c", 2, 100)
    effects = list(shop.reserve(shop.orders.decode(_record(msgspec.json.encode(order)))))
    assert [effect.value.position for effect in effects] == [0, 1]
    assert {effect.topic.name for effect in effects} == {"inventory"}


def _record(value: bytes) -> Any:
    return Record("orders", 0, 0, 0, b"c", value)


def _twice(app: App, topic: Any) -> Any:
    return app.topic("orders", key=str, value=int)


def _sink_that_yields(app: App, topic: Any) -> Any:
    @app.sink(topic, app.database("sqlite:///x.db"))
    def write(records: Any, db: Any) -> Any:
        yield topic.record("k", Order(1))


def _processor_with_database(app: App, topic: Any) -> Any:
    app.processor(topic, state=app.database("sqlite:///x.db"), name="x")(lambda record: None)  # type: ignore[arg-type]


def _two_of_one_name(app: App, topic: Any) -> Any:
    def work(record: Any) -> None:
        return None

    app.processor(topic)(work)
    app.processor(topic)(work)


def _shared_state(app: App, topic: Any) -> Any:
    state = app.state("counts", key=str, value=int)
    app.processor(topic, state=state, name="one")(lambda record, counts: None)
    app.processor(topic, state=state, name="two")(lambda record, counts: None)


async def _waits(record: Any) -> None:
    return None


WRONG: dict[str, tuple[Callable[[App, Any], Any], str]] = {
    "topic twice": (_twice, "declared twice"),
    "topic name": (lambda app, _: app.topic("my topic", key=str, value=int), "use letters"),
    "our own topic name": (lambda app, _: app.topic("a.semel.b", key=str, value=int), "Semel's own"),
    "no partitions": (lambda app, _: app.topic("x", key=str, value=int, partitions=0), "from 1"),
    "key type": (lambda app, _: app.topic("x", key=Order, value=int), "a key is str, bytes or int"),
    "value type": (lambda app, _: app.topic("x", key=str, value=Plain), "Plain cannot be read from JSON"),
    "nested value type": (lambda app, _: app.topic("x", key=str, value=dict[str, list[Plain]]), "msgspec.Struct"),
    "foreign topic": (lambda app, _: app.processor(App("b").topic("x", key=str, value=int))(print), "not a topic of"),
    "no topic": (lambda app, _: app.processor("orders")(print), "not a topic of"),
    "handler arguments": (
        lambda app, t: app.processor(t, name="x")(lambda: None),
        r"handler is called as .*\(record\)",
    ),
    "state arguments": (
        lambda app, t: app.processor(t, state=app.state("s", key=str, value=int), name="x")(lambda record: None),
        r"\(record, s\)",
    ),
    "no function": (lambda app, t: app.processor(t, name="x")(3), "not a function"),
    "lambda": (lambda app, t: app.processor(t)(lambda record: None), "needs name="),
    "two of one name": (_two_of_one_name, "name= of its own"),
    "reserved name": (
        lambda app, t: app.processor(t, name="requests")(lambda record: None),
        "cannot be called requests",
    ),
    "ordering": (lambda app, t: app.processor(t, name="x", ordering="none")(lambda record: None), "neither 'key'"),
    "delivery": (lambda app, t: app.processor(t, name="x", delivery="maybe")(lambda record: None), "at-most-once"),
    "batch arguments": (lambda app, t: app.processor(t, name="x", batch=True)(lambda: None), r"\(records\)"),
    "concurrency without waiting": (
        lambda app, t: app.processor(t, name="x", concurrency=4)(lambda record: None),
        "is not async",
    ),
    "no concurrency": (lambda app, t: app.processor(t, name="x", concurrency=0)(_waits), "1 to 1000 calls"),
    "concurrent batches": (
        lambda app, t: app.processor(t, name="x", batch=True, concurrency=4)(_waits),
        "one of the two",
    ),
    "shared state": (_shared_state, "one writer"),
    "state twice": (lambda app, _: [app.state("s", key=str, value=int) for _ in range(2)], "declared twice"),
    "reserved state": (lambda app, _: app.state("idempotency", key=str, value=int), "another name"),
    "database": (lambda app, _: app.database("oracle://root:secret@host/db"), "no database that Semel knows"),
    "database twice": (lambda app, _: [app.database("sqlite:///x") for _ in range(2)], "name= of its own"),
    "foreign database": (
        lambda app, t: app.sink(t, App("b").database("sqlite:///x"), name="s")(lambda records, db: None),
        "not of app shop",
    ),
    "no connections": (lambda app, _: app.cache("valkey://host/0", connections=0), "cache cache: connections=0"),
    "no name for a document store": (
        lambda app, _: app.documents("mongodb://host/x", name=""),
        "name a document store",
    ),
    "one variable for two": (
        lambda app, _: [app.cache("valkey://host/0", name=name) for name in ("a-b", "a.b")],
        "cache a.b is declared twice",
    ),
    "sink on a document store": (
        lambda app, t: app.sink(t, app.documents("mongodb://host/x"), name="s")(lambda records, db: None),
        "not of app shop",
    ),
    "foreign document store": (
        lambda app, _: app.transaction(App("b").documents("mongodb://host/x")),
        r"documents is no document store of app shop. Use app\.documents",
    ),
    "transaction on a search": (
        lambda app, _: app.transaction(app.search("opensearch://host", indexes={"a": {}})),
        r"search is no database of app shop. Use app\.database",
    ),
    "transaction on a database that sends nothing": (
        lambda app, _: app.transaction(app.database("sqlite:///x")),
        "database database has no outbox",
    ),
    "writer of nothing": (lambda app, _: app.writer("money"), "no store called money that sends records"),
    "idempotency on no database": (
        lambda app, _: app.idempotency("sqlite:///x"),
        "'sqlite:///x' is no database of app shop",
    ),
    "dual write in a sink": (_sink_that_yields, "dual write without a plan"),
    "dual write in a processor": (_processor_with_database, "dual write without a plan"),
    "path": (lambda app, _: app.post("orders", request=Order)(print), "begins with '/'"),
    "endpoint twice": (lambda app, _: [app.post("/o", request=Order)(print) for _ in range(2)], "declared twice"),
    "request type": (lambda app, _: app.post("/o", request=Plain)(lambda order: None), "Plain cannot be read"),
    "endpoint handler": (lambda app, _: app.post("/o", request=Order)(lambda: None), "takes no argument"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_declaration_that_cannot_work_is_refused(case: str) -> None:
    declare, message = WRONG[case]
    with pytest.raises(ConfigurationError, match=message) as raised:
        declare(*app_with_topic())
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "my shop"}, "cannot name an app"),
        ({"name": "shop", "require": "at-least-once"}, "only 'exactly-once'"),
        ({"name": "shop", "request_partitions": 0}, "at least 1"),
    ],
)
def test_an_app_that_cannot_work_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        App(**arguments)


def test_importing_semel_loads_no_room_that_is_not_asked_for() -> None:
    code = "import semel, sys; sys.exit(any(name.startswith('semel.') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert {name for name in semel.__all__ if getattr(semel, name)} == set(semel.__all__)
    with pytest.raises(AttributeError):
        semel.Nothing  # noqa: B018


def test_the_environment_says_where_the_databases_are() -> None:
    app, orders = app_with_topic()
    main = app.database("sqlite:///main.db")
    search = app.database("postgresql://app:secret@db/search", name="search-index")

    @app.sink(orders, main)
    def rows(records: Any, db: Any) -> None: ...

    @app.sink(orders, search)
    def index(records: Any, db: Any) -> None: ...

    app.use_databases({"SEMEL_DATABASE_SEARCH_INDEX": "sqlite:///search.db", "SEMEL_DATA": "elsewhere"})
    assert app.sinks["rows"].database.url == "sqlite:///main.db"
    assert app.sinks["index"].database.url == app.databases["search-index"].url == "sqlite:///search.db"
    app.use_databases({"SEMEL_DATABASE": "postgresql://db/main"})
    assert app.sinks["rows"].database.url == "postgresql://db/main"


def test_a_database_variable_that_fits_nothing_is_refused() -> None:
    app, _ = app_with_topic()
    app.database("sqlite:///main.db")
    with pytest.raises(ConfigurationError, match="SEMEL_DATABASE_SERCH names no database of app shop: it takes SEMEL_"):
        app.use_databases({"SEMEL_DATABASE_SERCH": "sqlite:///x.db"})
    with pytest.raises(ConfigurationError, match=r"SEMEL_DATABASE: 'oracle:.*@db' is no database"):
        app.use_databases({"SEMEL_DATABASE": "oracle://app:secret@db"})
    assert app.databases["database"].url == "sqlite:///main.db"

"""A real schema registry: Apicurio, by the REST API of Confluent's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from semel import App, Avro, JsonSchema, Protobuf
from semel.errors import ConfigurationError, Retriable
from semel.processing.serdes.prepare import attach_all, prepare_schemas
from semel.processing.serdes.registry import Incompatible, SchemaRegistry
from semel.processing.topics import DataError, Topic
from semel.settings import Settings
from semel.types import Record
from tests.conftest import unavailable
from tests.processing.messages import messages
from tests.services.registry import SchemaRegistryNode, missing_for_registry

pytestmark = [pytest.mark.peers, pytest.mark.timeout(1_200)]  # The first start fetches the program, 168 MB.


class Order(msgspec.Struct, frozen=True):
    id: int
    note: str = ""


ORDER = Order(7, "é")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    if missing := missing_for_registry():
        unavailable("Apicurio Registry", f"{' and '.join(missing)} not found")
    node = SchemaRegistryNode()
    node.start()
    SchemaRegistry(node.url)._call("PUT", "/config", {"compatibility": "BACKWARD"})
    yield node.url
    node.stop()


def topic(name: str, form: Any, url: str, **options: Any) -> Topic[Any, Any]:
    made = App("shop").topic(name, value=form)
    insist(lambda: attach_all([made], SchemaRegistry(url), **options))
    return made


def insist(work: Callable[[], Any]) -> Any:
    """As an app does: a registry that is away, or slow, is asked again."""
    deadline = time.monotonic() + 120
    while True:
        try:
            return work()
        except Retriable:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def read(of: Topic[Any, Any], data: bytes | None, headers: Any = ()) -> Any:
    """The value, once the registry has told the schema."""
    return insist(lambda: of.decode(Record(of.name, 0, 0, 0, b"k", data, tuple(headers))).value)


# --- Versions ---


def test_a_record_of_an_older_version_is_read(url: str) -> None:
    older = topic("evolving", Avro(msgspec.defstruct("Order", [("id", int)])), url)
    data, _ = older.write(older.bound._kind(7), ())  # type: ignore[union-attr]
    assert read(topic("evolving", Avro(Order), url), data) == Order(7)


@pytest.mark.parametrize("form", [Avro, JsonSchema], ids=lambda form: form.__name__)
@pytest.mark.parametrize("register", [True, False])
def test_an_incompatible_schema_is_named(form: Any, register: bool, url: str) -> None:
    name = f"broken-{form.__name__}-{register}"
    topic(name, form(Order), url)
    broken = form(msgspec.defstruct("Order", [("id", str), ("size", int), ("note", str, "")]))
    with pytest.raises(Incompatible) as caught:
        topic(name, broken, url, register=register)
    text = str(caught.value)
    assert f"SCHEMA_INCOMPATIBLE: the app's schema for subject {name}-value is not compatible with version 1: " in text
    assert "field 'id' is " in text
    assert "field 'size' is new and has no default" in text


def test_an_incompatible_message_is_named(url: str) -> None:
    topic("broken-protobuf", Protobuf(messages()["shop.Order"]), url)
    other = messages(other_types=True)["shop.Order"]
    with pytest.raises(Incompatible, match="subject broken-protobuf-value is not compatible"):
        topic("broken-protobuf", Protobuf(other), url)


def test_without_the_right_to_register_the_schema_has_to_be_there(url: str) -> None:
    lacking = topic("not-there", Avro(Order), url, register=False)
    with pytest.raises(Retriable, match="not registered under subject not-there-value"):
        lacking.write(ORDER, ())
    there = topic("not-there", Avro(Order), url)
    assert topic("not-there", Avro(Order, register=False), url).write(ORDER, ()) == there.write(ORDER, ())


def test_a_schema_that_the_registry_does_not_know(url: str) -> None:
    ours = topic("unknown", Avro(Order), url)
    with pytest.raises(DataError, match="the registry has no schema 987654"):
        read(ours, b"\0" + (987_654).to_bytes(4, "big") + b"\x0e\0")


# --- At the start ---


def test_the_next_address_is_asked(url: str) -> None:
    assert topic("second", Avro(Order), f"http://127.0.0.1:1,{url}").write(ORDER, ())[0]


def test_at_the_start_a_registry_that_is_away_is_waited_for(url: str) -> None:
    made = [App("shop").topic("at-start", value=Avro(Order))]

    def start(registry: str, **options: Any) -> None:
        asyncio.run(prepare_schemas(made, Settings(schema_registry=registry, **options)))

    with pytest.raises(Retriable, match=r"does not do its work: http://127\.0\.0\.1:1: .*refused"):
        start("http://127.0.0.1:1")
    with pytest.raises(ConfigurationError, match="value of topic at-start goes by a schema registry: set SEMEL_SCHEMA"):
        start("")
    insist(lambda: start(url, schema_registry_register="no"))
    with pytest.raises(Retriable, match="not registered"):
        made[0].write(ORDER, ())
    insist(lambda: start(url))
    assert made[0].write(ORDER, ())[0]
    asyncio.run(prepare_schemas([App("shop").topic("plain", value=Order)], Settings()))

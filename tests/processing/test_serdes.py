"""What a topic's values look like in each format, byte for byte, and what becomes of bytes that are none."""

from __future__ import annotations

import datetime
import enum
import json
import uuid
from typing import Any

import fastavro
import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings

from semel import App, Avro, CloudEvent, Event, JsonSchema, Protobuf
from semel.errors import ConfigurationError, Retriable
from semel.processing.serdes.framing import VALUE_HEADER, frame, message_indexes, unframe
from semel.processing.serdes.prepare import attach_all
from semel.processing.serdes.registry import SchemaRegistry
from semel.processing.topics import DataError, Format, Topic
from semel.testing import TestApp, record
from semel.testing.registry import MemoryRegistry
from semel.types import Record
from tests.processing.messages import messages


class Order(msgspec.Struct, frozen=True):
    id: int
    note: str = ""


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Part(msgspec.Struct, frozen=True):
    name: str
    parts: list[Part] = []


class Everything(msgspec.Struct, frozen=True, kw_only=True):
    flag: bool
    count: int
    share: float
    text: str
    data: bytes
    at: datetime.datetime
    day: datetime.date
    key: uuid.UUID
    color: Color
    tags: list[str]
    counts: dict[str, int]
    maybe: str | None = None
    always: str | None = "x"
    part: Part


EVERYTHING = Everything(
    flag=True,
    count=-7,
    share=0.5,
    text="é",
    data=b"\0\xff",
    at=datetime.datetime(2026, 11, 21, 12, 0, 0, 123456, tzinfo=datetime.UTC),
    day=datetime.date(2026, 11, 21),
    key=uuid.UUID(int=7),
    color=Color.BLUE,
    tags=["a", "b"],
    counts={"x": 1},
    maybe=None,
    always="y",
    part=Part("p", [Part("q")]),
)


def topic(value: Any, registry: Any = None) -> Topic[Any, Any]:
    made = App("shop").topic("orders", value=value)
    attach_all([made], registry or MemoryRegistry())
    return made


def given_bytes(of: Topic[Any, Any], data: bytes, headers: Any = ()) -> Any:
    return of.decode(Record("orders", 0, 0, 0, b"k", data, tuple(headers))).value


# --- Framing ---


def test_the_wire_format() -> None:
    assert frame(258) == b"\0\0\0\1\2"
    assert frame(258, [0]) == b"\0\0\0\1\2\0", "the first message of a file is one zero"
    assert frame(1, [1]) == b"\0\0\0\0\1\x02\x02"
    assert frame(1, [2, 70]) == b"\0\0\0\0\1\x04\x04\x8c\x01"
    assert unframe(b"\0\0\0\1\2data", (), "it")[:] == (258, (), b"data")
    guid = uuid.uuid4()
    assert unframe(b"data", [(VALUE_HEADER, b"\1" + guid.bytes)], "it")[:] == (guid, (), b"data")
    found = unframe(b"data", [(VALUE_HEADER, b"\1" + guid.bytes + b"\x02\x02")], "it", is_protobuf=True)
    assert found[:] == (guid, (1,), b"data")


anything = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@anything
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 2**20), min_size=1, max_size=20), st.binary(max_size=20))
def test_what_is_framed_is_unframed(number: int, indexes: list[int], data: bytes) -> None:
    found = unframe(frame(number, indexes) + data, (), "it", is_protobuf=True)
    assert found[:] == (number, tuple(indexes), data)
    assert message_indexes(indexes)


@anything
@given(st.binary(max_size=30), st.binary(max_size=20), st.booleans())
def test_any_bytes_give_a_value_or_a_data_error(data: bytes, header: bytes, with_header: bool) -> None:
    headers = [(VALUE_HEADER, header)] if with_header else []
    for made in ANY_BYTES:
        try:
            given_bytes(made, data, headers)
            given_bytes(made, b"\0\0\0\0\1" + data, headers)
        except DataError:
            pass


# --- Avro ---


def test_the_schema_of_a_type() -> None:
    schema = json.loads(Avro(Everything, namespace="shop").bind("orders").schema.text)
    fields = {item["name"]: item for item in schema["fields"]}
    assert (schema["type"], schema["name"], schema["namespace"]) == ("record", "Everything", "shop")
    assert fields["count"] == {"name": "count", "type": "long"}
    assert fields["at"]["type"] == {"type": "long", "logicalType": "timestamp-micros"}
    assert fields["color"]["type"] == {"type": "enum", "name": "Color", "symbols": ["red", "blue"]}
    assert fields["maybe"] == {"name": "maybe", "type": ["null", "string"], "default": None}
    assert fields["always"] == {"name": "always", "type": ["string", "null"], "default": "x"}
    assert fields["part"]["type"]["fields"][1] == {
        "name": "parts",
        "type": {"type": "array", "items": "Part"},
        "default": [],
    }


def test_avro_there_and_back() -> None:
    made = topic(Avro(Everything))
    data, headers = made.write(EVERYTHING, ())
    assert data is not None
    assert (data[:5], headers) == (b"\0\0\0\0\1", ())
    assert given_bytes(made, data) == EVERYTHING


def test_avro_bytes_are_those_of_the_specification() -> None:
    made = topic(Avro(Order))
    assert made.write(Order(7, "abc"), ())[0] == b"\0\0\0\0\1" + b"\x0e" + b"\x06abc"


def test_a_writer_with_another_version_is_read_by_our_schema() -> None:
    Older = msgspec.defstruct("Order", [("id", int), ("gone", str)])
    registry = MemoryRegistry()
    older = topic(Avro(Older), registry)
    data, _ = older.write(Older(7, "x"), ())
    assert data is not None
    assert given_bytes(topic(Avro(Order), registry), data) == Order(7, "")


def test_avro_with_a_schema_of_ones_own() -> None:
    schema = {
        "type": "record",
        "name": "Order",
        "fields": [{"name": "price", "type": {"type": "bytes", "logicalType": "decimal", "precision": 9, "scale": 2}}],
    }
    import decimal

    made = topic(Avro(dict, schema=schema))
    data, _ = made.write({"price": decimal.Decimal("12.34")}, ())
    assert data is not None
    assert given_bytes(made, data) == {"price": decimal.Decimal("12.34")}
    assert topic(Avro(dict, schema=json.dumps(schema))).write({"price": decimal.Decimal("12.34")}, ())[0] == data


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "has no schema id: it begins with nothing"),
        (b'{"id": 1}', "has no schema id: it begins with 7b22696422"),
        (b"\0\0\0\0\1", "is no Avro of schema 1"),
        (b"\0\0\0\0\1\x0e\x06ab", "is no Avro of schema 1"),
        (b"\0\0\0\0\1\x0e\x06abc!", "has 1 bytes behind its Avro"),
        (b"\0\0\0\0\x09\x0e\x06abc", "the registry has no schema 9"),
    ],
)
def test_bytes_that_are_no_avro(data: bytes, why: str) -> None:
    with pytest.raises(DataError, match=why):
        given_bytes(topic(Avro(Order)), data)


def test_values_that_avro_does_not_take() -> None:
    made = topic(Avro(Order))
    for value, why in ((3, "declared as Order, got int"), (Order("x"), "cannot be written as Avro")):  # type: ignore[arg-type]
        with pytest.raises(DataError, match=why):
            made.write(value, ())


class Two(msgspec.Struct, tag=True):
    x: int


class Three(msgspec.Struct, tag=True):
    y: int


class Unions(msgspec.Struct):
    either: Two | Three


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (int, "is no record"),
        (Unions, "a union of several records has no one form"),
        (object(), "has no Avro schema|is no record"),
    ],
)
def test_types_without_an_avro_schema(kind: Any, why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        App("shop").topic("orders", value=Avro(kind))


def test_schemas_that_are_none() -> None:
    for schema, why in (("{", "not JSON"), ({"type": "nothing"}, "not valid")):
        with pytest.raises(ConfigurationError, match=why):
            App("shop").topic("orders", value=Avro(dict, schema=schema))  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="no JSON Schema"):
        App("shop").topic("orders", value=JsonSchema(dict, schema={"type": "nothing"}))
    with pytest.raises(ConfigurationError, match="no message class"):
        App("shop").topic("orders", value=Protobuf(int))


# --- JSON Schema ---


def test_json_schema_there_and_back() -> None:
    made = topic(JsonSchema(Everything))
    data, _ = made.write(EVERYTHING, ())
    assert data is not None
    assert data.startswith(b'\0\0\0\0\1{"flag":true')
    assert given_bytes(made, data) == EVERYTHING
    with pytest.raises(DataError, match="is not a valid Everything"):
        given_bytes(made, b'\0\0\0\0\1{"flag": 3}')


def test_a_json_schema_of_ones_own_is_checked_in_both_directions() -> None:
    schema = {"type": "object", "properties": {"id": {"type": "integer", "minimum": 1}}}
    made = topic(JsonSchema(Order, schema=schema))
    assert made.write(Order(1), ())[0] == b'\0\0\0\0\1{"id":1,"note":""}'
    with pytest.raises(DataError, match=r"\$\.id: 0 is less than the minimum of 1"):
        made.write(Order(0), ())
    with pytest.raises(DataError, match="less than the minimum"):
        given_bytes(made, b'\0\0\0\0\1{"id":0}')


def test_the_json_schema_of_a_type_is_of_draft_7() -> None:
    class Pair(msgspec.Struct):
        both: tuple[int, str]
        order: Order

    document = json.loads(JsonSchema(Pair).bind("orders").schema.text)
    assert document["$schema"] == "http://json-schema.org/draft-07/schema#"
    both = document["definitions"]["Pair"]["properties"]["both"]
    assert [item["type"] for item in both["items"]] == ["integer", "string"]
    assert both["additionalItems"] is False
    assert document["definitions"]["Pair"]["properties"]["order"] == {"$ref": "#/definitions/Order"}


# --- Protobuf ---


def test_protobuf_there_and_back() -> None:
    known = messages()
    registry = MemoryRegistry()
    for name, indexes in (("Order", b"\0"), ("Customer", b"\x02\x02"), ("Order.Line", b"\x04\0\x02")):
        made = topic(Protobuf(known[f"shop.{name}"]), registry)
        value = known[f"shop.{name}"]()
        if name == "Order":
            value.id, value.price.cents = 7, 1299
        data, _ = made.write(value, ())
        assert data is not None
        assert (data[:1], data[5 : 5 + len(indexes)]) == (b"\0", indexes)
        assert data[5 + len(indexes) :] == value.SerializeToString()
        assert given_bytes(made, data) == value


def test_imports_are_registered_first() -> None:
    made = topic(Protobuf(messages()["shop.Order"]))
    [reference] = made.bound.schema.references  # type: ignore[union-attr]
    assert tuple(reference) == ("shop/money.proto", "shop/money.proto", 1)


def test_another_message_does_not_pass_for_ours() -> None:
    """Any bytes may parse as any message, so the place in the file has to be right, in the writer's version too."""
    registry = MemoryRegistry()
    known = messages()
    orders = topic(Protobuf(known["shop.Order"]), registry)
    customer, _ = topic(Protobuf(known["shop.Customer"]), registry).write(known["shop.Customer"](name="x"), ())
    assert customer is not None
    with pytest.raises(DataError, match=r"is a shop\.Customer, and the topic is declared as shop\.Order"):
        given_bytes(orders, customer)
    newer = messages(first="Header", more=True)
    data, _ = topic(Protobuf(newer["shop.Order"]), registry).write(newer["shop.Order"](id=9, note="new"), ())
    assert data is not None
    assert given_bytes(orders, data).id == 9, "its place is another one, its name is ours"
    header, _ = topic(Protobuf(newer["shop.Header"]), registry).write(newer["shop.Header"](text="x"), ())
    assert header is not None
    with pytest.raises(DataError, match=r"is a shop\.Header"):
        given_bytes(orders, header)
    with pytest.raises(DataError, match="declared as Order, got Customer"):
        orders.write(known["shop.Customer"](), ())
    with pytest.raises(DataError, match=r"is no shop\.Order"):
        given_bytes(orders, b"\0\0\0\0\2\0\xff")


# --- CloudEvents ---


def event(**more: Any) -> Event[Order]:
    return Event(data=Order(7, "x"), id="orders-0@3", **more)


def test_binary_mode_is_as_the_kafka_binding_says() -> None:
    made = topic(CloudEvent(Order, type="shop.order", source="/shop"))
    when = datetime.datetime(2026, 11, 21, 12, 0, tzinfo=datetime.UTC)
    value = event(subject="7", time=when, extensions={"traceparent": "00-1"})
    data, headers = made.write(value, (("mine", b"1"),))
    assert data == b'{"id":7,"note":"x"}'
    assert dict(headers) == {
        "mine": b"1",
        "ce_specversion": b"1.0",
        "ce_id": b"orders-0@3",
        "ce_source": b"/shop",
        "ce_type": b"shop.order",
        "ce_subject": b"7",
        "ce_time": b"2026-11-21T12:00:00Z",
        "ce_traceparent": b"00-1",
        "content-type": b"application/json",
    }
    back = given_bytes(made, data, headers)
    assert back == msgspec.structs.replace(value, type="shop.order", source="/shop")


def test_structured_mode_is_one_document() -> None:
    made = topic(CloudEvent(Order, type="shop.order", source="/shop", mode="structured"))
    data, headers = made.write(event(type="shop.order.placed"), ())
    assert data is not None
    assert headers == (("content-type", b"application/cloudevents+json; charset=UTF-8"),)
    assert json.loads(data) == {
        "specversion": "1.0",
        "id": "orders-0@3",
        "source": "/shop",
        "type": "shop.order.placed",
        "datacontenttype": "application/json",
        "data": {"id": 7, "note": "x"},
    }
    assert given_bytes(made, data, headers).data == Order(7, "x")


def test_both_modes_are_read_whichever_is_written() -> None:
    made = topic(CloudEvent(Order, type="t", source="/s"))
    document = b'{"specversion":"1.0","id":"1","source":"/other","type":"t","data":{"id":7},"partitionkey":3,"ok":true}'
    found = given_bytes(made, document, [("content-type", b"application/cloudevents+json")])
    assert (found.data, found.source, found.extensions) == (Order(7), "/other", {"partitionkey": "3", "ok": "true"})


@pytest.mark.parametrize(("kind", "value"), [(bytes, b"\0\xff"), (str, "é"), (list[int], [1, 2])])
@pytest.mark.parametrize("mode", ["binary", "structured"])
def test_data_of_every_kind(kind: Any, value: Any, mode: Any) -> None:
    made = topic(CloudEvent(kind, type="t", source="/s", mode=mode))
    data, headers = made.write(Event(data=value, id="1"), ())
    assert data is not None
    assert given_bytes(made, data, headers).data == value


def test_data_in_avro() -> None:
    made = topic(CloudEvent(Avro(Order), type="t", source="/s"))
    data, headers = made.write(event(), ())
    assert data is not None
    assert data.startswith(b"\0\0\0\0\1")
    assert dict(headers)["content-type"] == b"application/avro"
    assert given_bytes(made, data, headers).data == Order(7, "x")


CE = [("ce_specversion", b"1.0"), ("ce_id", b"1"), ("ce_source", b"/s"), ("ce_type", b"t")]


@pytest.mark.parametrize(
    ("data", "headers", "why"),
    [
        (b"{}", (), "is no CloudEvent: neither"),
        (b"{}", CE[:2], "is not a valid Order"),
        (b'{"id":1}', CE[:2], "it has no source, type"),
        (b'{"id":1}', [("ce_specversion", b"0.3"), *CE[1:]], "version '0.3', not 1.0"),
        (b'{"id":1}', [*CE, ("ce_time", b"noon")], "the time of the event"),
        (b"[]", [("content-type", b"application/cloudevents-batch+json")], "JSON .* and binary mode are read"),
        (b"[]", [("content-type", b"application/cloudevents+json")], "is no CloudEvent"),
        (b'{"id":{}}', [("content-type", b"application/cloudevents+json")], "neither text nor a number"),
    ],
)
def test_what_is_no_cloud_event(data: bytes, headers: Any, why: str) -> None:
    with pytest.raises(DataError, match=why):
        given_bytes(topic(CloudEvent(Order, type="t", source="/s")), data, headers)


def test_events_that_cannot_be() -> None:
    made = topic(CloudEvent(Order, type="t", source="/s"))
    for value, why in (
        (Order(1), "is an Event"),
        (Event(data=Order(1), id=""), "needs an id"),
        (event(time=datetime.datetime(2026, 1, 1)), "has a time zone"),  # noqa: DTZ001
        (event(extensions={"Trace-Parent": "x"}), "cannot name an extension"),
        (event(extensions={"id": "x"}), "cannot name an extension"),
    ):
        with pytest.raises(DataError, match=why):
            made.write(value, ())
    for options, why in (
        ({"type": ""}, "say what"),
        ({"mode": "batch"}, "neither"),
        ({"kind": Avro(Order), "mode": "structured"}, "is no JSON"),
    ):
        with pytest.raises(ConfigurationError, match=why):
            CloudEvent(**{"kind": Order, "type": "t", "source": "/s", **options})  # type: ignore[arg-type]


# --- In an app ---


FORMATS: list[Any] = [
    Avro(Order),
    JsonSchema(Order),
    CloudEvent(Order, type="t", source="/s"),
    CloudEvent(Avro(Order), type="t", source="/s"),
]
ANY_BYTES = [
    topic(item)
    for item in (
        *FORMATS,
        CloudEvent(Order, type="t", source="/s", mode="structured"),
        Protobuf(messages()["shop.Order"]),
    )
]


def an_app(form: Format[Any]) -> tuple[App, Topic[Any, Any], Topic[Any, Any]]:
    app = App("shop")
    orders, done = app.topic("orders", value=form), app.topic("done", value=form)
    database = app.database("sqlite:///never.db", schema="CREATE TABLE IF NOT EXISTS seen (value TEXT)")

    @app.processor(orders)
    def copy(item: Any) -> Any:
        yield done.record(item.key, item.value)

    @app.sink(done, database)
    def keep(records: Any, db: Any) -> None:
        db.executemany("INSERT INTO seen VALUES (?)", [(repr(item.value),) for item in records])

    return app, orders, done


@pytest.mark.parametrize("form", FORMATS, ids=repr)
def test_through_a_whole_app(form: Any) -> None:
    app, orders, done = an_app(form)
    value = event() if isinstance(form, CloudEvent) else Order(7, "x")
    with TestApp(app, raise_errors=False) as t:
        t.send(orders, "a", value)
        [found] = t.sent(done)
        assert (found.value.data if isinstance(form, CloudEvent) else found.value) == Order(7, "x")
        assert len(t.query("SELECT * FROM seen")) == 1
        t.send_bytes(orders, b"b", b"no such thing")
        assert [item.key for item in t.parked()] == [b"b"], "what nobody can read is parked"


def test_a_registry_that_is_away_parks_nothing() -> None:
    class Away(MemoryRegistry):
        """Does not answer the first questions of each engine."""

        left = 6

        def find(self, schema: Any) -> Any:
            if self.left:
                self.left -= 1
                raise Retriable("the registry is away")
            return super().find(schema)

    Older = msgspec.defstruct("Order", [("id", int)])
    app, orders, done = an_app(Avro(Order))
    registry = Away()
    with TestApp(app) as t:
        attach_all(app.topics.values(), registry)
        older, _ = topic(Avro(Older), registry).write(Older(7), ())
        t.send_bytes(orders, b"a", older)
        t.send_bytes(done, b"b", older)
        assert registry.left == 0
        assert t.parked() == []
        assert sorted(item.value for item in t.sent(orders)) == [Order(7)]
        assert t.query("SELECT count(*) FROM seen") == [(2,)]


def test_without_a_registry_nothing_is_written_or_read() -> None:
    made = App("shop").topic("orders", value=Avro(Order))
    with pytest.raises(Retriable, match="which was not asked yet"):
        made.write(Order(1), ())
    with pytest.raises(Retriable, match="which was not asked yet"):
        given_bytes(made, b"\0\0\0\0\1\2\0")
    assert record(made, "a", Order(1)).value == Order(1), "a test of a handler needs none"


def test_formats_are_for_values_of_topics() -> None:
    app = App("shop")
    with pytest.raises(ConfigurationError, match="a form of a topic's values only"):
        app.state("totals", key=str, value=Avro(Order))  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="a key is str, bytes or int"):
        app.topic("orders", key=Avro(Order), value=Order)  # type: ignore[arg-type]


def test_addresses_and_secrets_of_a_registry() -> None:
    registry = SchemaRegistry("https://me:secret@reg:8081/path/,http://other")
    assert repr(registry) == "<SchemaRegistry https://reg:8081/path, http://other, 0 schemas known>"
    for url in ("", "reg:8081", "ftp://reg", "http://"):
        with pytest.raises(ConfigurationError, match="SEMEL_SCHEMA_REGISTRY"):
            SchemaRegistry(url)
    with pytest.raises(ConfigurationError, match="SEMEL_SCHEMA_REGISTRY_CA=/nowhere"):
        SchemaRegistry("https://reg", ca="/nowhere")
    assert fastavro.__version__

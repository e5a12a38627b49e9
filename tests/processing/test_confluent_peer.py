"""Confluent's own serializers as peers, byte for byte, and what becomes of a registry that does not work.

What a real registry says is in `test_registry.py`; here the peer's own registry in memory is enough.
"""

from __future__ import annotations

import asyncio
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import msgspec
import pytest
from confluent_kafka import schema_registry as confluent
from confluent_kafka.schema_registry.avro import AvroDeserializer, AvroSerializer
from confluent_kafka.schema_registry.json_schema import JSONDeserializer, JSONSerializer
from confluent_kafka.schema_registry.protobuf import ProtobufDeserializer, ProtobufSerializer
from confluent_kafka.serialization import MessageField, SerializationContext

from semel import App, Avro, JsonSchema, Protobuf
from semel.errors import ConfigurationError, Retriable
from semel.processing.serdes.framing import VALUE_HEADER, frame
from semel.processing.serdes.prepare import attach_all, prepare_schemas
from semel.processing.serdes.registry import Incompatible, SchemaRegistry
from semel.processing.topics import Topic
from semel.settings import Settings
from semel.testing.registry import MemoryRegistry
from semel.types import Record
from tests.processing.messages import messages


class Order(msgspec.Struct, frozen=True):
    id: int
    note: str = ""


ORDER = Order(7, "é")


def topic(form: Any) -> Topic[Any, Any]:
    made = App("shop").topic("orders", value=form)
    attach_all([made], MemoryRegistry())
    return made


def read(of: Topic[Any, Any], data: bytes | None, headers: Any = ()) -> Any:
    return of.decode(Record(of.name, 0, 0, 0, b"k", data, tuple(headers))).value


@pytest.fixture
def peer() -> Any:
    return confluent.SchemaRegistryClient.new_client({"url": "mock://"})


CONTEXT = SerializationContext("orders", MessageField.VALUE)
BY_TOPIC = {"subject.name.strategy": confluent.topic_subject_name_strategy}


# --- Byte for byte ---


def test_avro_is_that_of_confluents_serializer(peer: Any) -> None:
    ours = topic(Avro(Order))
    schema = ours.bound.schema.text  # type: ignore[union-attr]
    theirs = AvroSerializer(peer, schema, conf=BY_TOPIC)({"id": 7, "note": "é"}, CONTEXT)
    assert ours.write(ORDER, ())[0] == theirs
    assert AvroDeserializer(peer, conf=BY_TOPIC)(theirs, CONTEXT) == {"id": 7, "note": "é"}
    assert read(ours, theirs) == ORDER


def test_json_schema_is_that_of_confluents_serializer(peer: Any) -> None:
    ours = topic(JsonSchema(Order))
    schema = ours.bound.schema.text  # type: ignore[union-attr]
    compact = {"json_encode": lambda value: json.dumps(value, separators=(",", ":"), ensure_ascii=False)}
    theirs = JSONSerializer(schema, peer, conf=BY_TOPIC, **compact)({"id": 7, "note": "é"}, CONTEXT)
    data, _ = ours.write(ORDER, ())
    assert data == theirs
    assert JSONDeserializer(schema)(data, CONTEXT) == {"id": 7, "note": "é"}
    assert read(ours, theirs) == ORDER


def test_protobuf_is_that_of_confluents_serializer(peer: Any) -> None:
    known = messages()
    for name in ("Customer", "Order", "Order.Line"):
        kind = known[f"shop.{name}"]
        value = kind(id=7, price={"cents": 1299}) if name == "Order" else kind()
        ours = topic(Protobuf(kind))
        theirs = ProtobufSerializer(kind, peer, conf=BY_TOPIC)(value, CONTEXT)
        data, _ = ours.write(value, ())
        assert data == theirs, name
        assert ProtobufDeserializer(kind)(data, CONTEXT) == value
        assert read(ours, theirs) == value


def test_a_schema_id_in_a_header_is_read(peer: Any) -> None:
    """Confluent Platform 8 may name the schema by its GUID in a header; the peer's registry in memory does too."""
    ours = App("shop").topic("orders", value=Avro(Order))
    schema = ours.bound.schema  # type: ignore[union-attr]
    write = AvroSerializer(
        peer, schema.text, conf=BY_TOPIC | {"schema.id.serializer": confluent.header_schema_id_serializer}
    )
    headers: list[tuple[str, bytes]] = []
    data = write({"id": 7, "note": "é"}, SerializationContext("orders", MessageField.VALUE, headers))
    assert [name for name, _ in headers] == [VALUE_HEADER]

    class ByGuid:
        def register(self, subject: str, schema: Any) -> int:
            return 1

        def find(self, found: Any) -> Any:
            assert found.bytes == headers[0][1][1:17]
            return schema

    attach_all([ours], ByGuid())  # type: ignore[arg-type]
    assert read(ours, data, headers) == ORDER


@pytest.mark.parametrize("form", ["avro", "json", "protobuf"])
def test_a_schema_id_in_a_header_is_that_of_confluents_serializer(form: str, peer: Any) -> None:
    by_guid = {"schema.id.serializer": confluent.header_schema_id_serializer}
    value: Any = ORDER
    fields = {"id": 7, "note": "é"}
    compact = {"json_encode": lambda value: json.dumps(value, separators=(",", ":"), ensure_ascii=False)}
    if form == "avro":
        bound = App("shop").topic("orders", value=Avro(Order, guid=True))
        write = AvroSerializer(peer, bound.bound.schema.text, conf=BY_TOPIC | by_guid)  # type: ignore[union-attr]
    elif form == "json":
        bound = App("shop").topic("orders", value=JsonSchema(Order, guid=True))
        text = bound.bound.schema.text  # type: ignore[union-attr]
        write = JSONSerializer(text, peer, conf=BY_TOPIC | by_guid, **compact)
    else:
        kind = messages()["shop.Order.Line"]  # Not the file's first message: its way through the file is told, too.
        value = fields = kind()
        bound = App("shop").topic("orders", value=Protobuf(kind, guid=True))
        write = ProtobufSerializer(kind, peer, conf=BY_TOPIC | by_guid)
    theirs: list[tuple[str, bytes]] = []
    data = write(fields, SerializationContext("orders", MessageField.VALUE, theirs))
    guid = UUID(bytes=theirs[0][1][1:17])

    class SameGuid(MemoryRegistry):
        def guid_of(self, subject: str, schema: Any) -> UUID:
            return guid

        def find(self, found: Any) -> Any:
            return bound.bound.schema if found == guid else super().find(found)  # type: ignore[union-attr]

    registry = SameGuid()
    attach_all([bound], registry)
    before = (("trace", b"t"), (VALUE_HEADER, b"of the input that was passed on"))
    ours, headers = bound.write(value, before)
    assert ours == data
    assert list(headers) == [("trace", b"t"), *theirs]
    assert read(bound, ours, headers) == value
    plain = topic(Avro(Order)) if form == "avro" else None
    assert plain is None or plain.write(ORDER, ())[0] == frame(1) + ours


def test_a_registry_without_guids_stops_the_start() -> None:
    answers = {"/subjects/orders-value/versions": {"id": 1}, "/subjects/orders-value": {"id": 1, "version": 1}}
    ours = App("shop").topic("orders", value=Avro(Order, guid=True))
    with (
        serving(lambda _, path: (200, answers[path])) as (url, _),
        pytest.raises(ConfigurationError, match="no GUID, which guid=True asks for"),
    ):
        attach_all([ours], SchemaRegistry(url))


# --- A registry that does not work ---


def test_a_schema_that_its_subject_does_not_take_stops_the_start() -> None:
    """Subject, version and field are named although the registry itself says next to nothing."""
    stored = {"type": "record", "name": "Order", "fields": [{"name": "id", "type": "string"}]}

    def answer(method: str, path: str) -> tuple[int, Any]:
        path = path.split("?")[0]
        if path.startswith("/compatibility/"):
            return 200, {"is_compatible": path.endswith(("/1", "/3"))}
        if method == "POST":
            return 409, {"error_code": 409, "message": "incompatible"}
        return 200, [1, 2, 3] if path.endswith("/versions") else {"schema": json.dumps(stored)}

    made = [App("shop").topic("orders", value=Avro(Order))]
    with serving(answer) as (address, _), pytest.raises(Incompatible) as caught:
        asyncio.run(prepare_schemas(made, Settings(schema_registry=address)))
    text = str(caught.value)
    assert "SCHEMA_INCOMPATIBLE: the app's schema for subject orders-value is not compatible with version 2: " in text
    assert "field 'id' is \"long\", and was \"string\"; field 'note' is new and optional" in text


def test_an_answer_of_another_kind_of_server_is_none() -> None:
    made = [App("shop").topic("orders", value=Avro(Order))]
    for body in ("<html>", [], {"id": "seven"}, None):
        with (
            serving(lambda *_, body=body: (200, body)) as (address, _),
            pytest.raises(Retriable, match="not do its work"),
        ):
            attach_all(made, SchemaRegistry(address))


@contextmanager
def serving(answer: Callable[[str, str], tuple[int, Any]]) -> Iterator[tuple[str, list[Any]]]:
    """A server with these answers; its address, and the logins that it saw."""
    seen: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            seen.append(self.headers.get("Authorization"))
            status, body = answer(self.command, self.path)
            data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "kind"), [(500, Retriable), (503, Retriable), (429, Retriable), (401, ConfigurationError)]
)
def test_answers_that_are_none(status: int, kind: type[Exception]) -> None:
    made = [App("shop").topic("orders", value=Avro(Order))]
    with serving(lambda *_: (status, "")) as (address, seen), pytest.raises(kind) as caught:
        attach_all(made, SchemaRegistry(address.replace("//", "//me:secret@")))
    assert set(seen) == {"Basic bWU6c2VjcmV0"}
    assert "secret" not in str(caught.value)
    assert str(status) in str(caught.value)

"""Confluent's own serializers as peers, byte for byte, and what becomes of a registry that does not work.

What a real registry says is in `test_registry.py`; here the peer's own registry in memory is enough.
"""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
from confluent_kafka import schema_registry as confluent
from confluent_kafka.schema_registry.avro import AvroDeserializer, AvroSerializer
from confluent_kafka.schema_registry.json_schema import JSONDeserializer, JSONSerializer
from confluent_kafka.schema_registry.protobuf import ProtobufDeserializer, ProtobufSerializer
from confluent_kafka.serialization import MessageField, SerializationContext

from semel import App, Avro, JsonSchema, Protobuf
from semel.errors import ConfigurationError, Retriable
from semel.processing.serdes.framing import VALUE_HEADER
from semel.processing.serdes.prepare import attach_all
from semel.processing.serdes.registry import SchemaRegistry
from semel.processing.topics import Topic
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


# --- A registry that does not work ---


@contextmanager
def answering(status: int) -> Iterator[str]:
    """A server that answers everything with this status."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(self.headers.get("Authorization"))
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    seen: list[Any] = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
    assert set(seen) == {"Basic bWU6c2VjcmV0"}


@pytest.mark.parametrize(
    ("status", "kind"), [(500, Retriable), (503, Retriable), (429, Retriable), (401, ConfigurationError)]
)
def test_answers_that_are_none(status: int, kind: type[Exception]) -> None:
    with answering(status) as address, pytest.raises(kind) as caught:
        attach_all(
            [App("shop").topic("orders", value=Avro(Order))], SchemaRegistry(address.replace("//", "//me:secret@"))
        )
    assert "secret" not in str(caught.value)
    assert str(status) in str(caught.value)

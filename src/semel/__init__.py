"""Semel: every effect of a request happens exactly once, from HTTP through Kafka to the database."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from semel.app import App
    from semel.ingress.idempotency import IdempotencyMiddleware, IdempotentRequest
    from semel.processing.answers import Accepted, Created, Ok, Problem, Response
    from semel.processing.serdes.avro import Avro
    from semel.processing.serdes.cloudevents import CloudEvent, Event
    from semel.processing.serdes.jsonschema import JsonSchema
    from semel.processing.serdes.protobuf import Protobuf
    from semel.sinks.dedup import Inbox, Version

__all__ = [
    "Accepted",
    "App",
    "Avro",
    "CloudEvent",
    "Created",
    "Event",
    "IdempotencyMiddleware",
    "IdempotentRequest",
    "Inbox",
    "JsonSchema",
    "Ok",
    "Problem",
    "Protobuf",
    "Response",
    "Version",
]

_HOME = {
    "App": "semel.app",
    "Avro": "semel.processing.serdes.avro",
    "CloudEvent": "semel.processing.serdes.cloudevents",
    "Event": "semel.processing.serdes.cloudevents",
    "IdempotencyMiddleware": "semel.ingress.idempotency",
    "IdempotentRequest": "semel.ingress.idempotency",
    "Inbox": "semel.sinks.dedup",
    "JsonSchema": "semel.processing.serdes.jsonschema",
    "Protobuf": "semel.processing.serdes.protobuf",
    "Version": "semel.sinks.dedup",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: a broker or a tool needs none of the app's rooms."""
    if name in __all__:
        return getattr(import_module(_HOME.get(name, "semel.processing.answers")), name)
    raise AttributeError(f"module 'semel' has no attribute {name!r}")

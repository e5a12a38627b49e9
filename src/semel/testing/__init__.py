"""For tests: an app as a whole in memory (`TestApp`), a record for a handler (`record`), and Kafka for any test.

The pytest fixture `semel_broker` is there in every pytest run, without Docker or Java; nothing else of Semel needs to
be used. A broker is ready in milliseconds, speaks Kafka's protocol to any client, transactions included, and lets a
test break it on purpose:

    def test_orders(semel_broker):
        producer = confluent_kafka.Producer({"bootstrap.servers": semel_broker.bootstrap_servers})
        ...
        assert [record.value for record in semel_broker.records("orders")] == [b"one CD"]
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from semel.broker.control import Answered, Close, Delay, DropRequest, DropResponse, Error, Hold
    from semel.broker.embedded import InstalledRule
    from semel.errors import ErrorCode
    from semel.testing.app import AsyncTestApp, TestApp, UnexpectedlyParked
    from semel.testing.broker import BrokerForTests
    from semel.testing.handlers import NotDeterministic
    from semel.testing.rig import NotSettled
    from semel.testing.values import ANY, Answer, Parked, record
    from semel.types import Record

__all__ = [
    "ANY",
    "Answer",
    "Answered",
    "AsyncTestApp",
    "BrokerForTests",
    "Close",
    "Delay",
    "DropRequest",
    "DropResponse",
    "Error",
    "ErrorCode",
    "Hold",
    "InstalledRule",
    "NotDeterministic",
    "NotSettled",
    "Parked",
    "Record",
    "TestApp",
    "UnexpectedlyParked",
    "record",
]

_HOME = {
    "ANY": "semel.testing.values",
    "Answer": "semel.testing.values",
    "AsyncTestApp": "semel.testing.app",
    "BrokerForTests": "semel.testing.broker",
    "ErrorCode": "semel.errors",
    "InstalledRule": "semel.broker.embedded",
    "NotDeterministic": "semel.testing.handlers",
    "NotSettled": "semel.testing.rig",
    "Parked": "semel.testing.values",
    "Record": "semel.types",
    "TestApp": "semel.testing.app",
    "UnexpectedlyParked": "semel.testing.app",
    "record": "semel.testing.values",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is asked for: a pytest run that uses no broker must not pay for one."""
    if name in __all__:
        return getattr(import_module(_HOME.get(name, "semel.broker.control")), name)
    raise AttributeError(f"module 'semel.testing' has no attribute {name!r}")

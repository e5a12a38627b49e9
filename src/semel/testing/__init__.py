"""Kafka for your tests, without Docker or Java: the pytest fixture `semel_broker`.

Installed with Semel, there in every pytest run; nothing else of Semel needs to be used. A broker is ready in
milliseconds, speaks Kafka's protocol to any client, transactions included, and lets a test break it on purpose:

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
    from semel.testing.broker import BrokerForTests
    from semel.types import Record

__all__ = [
    "Answered",
    "BrokerForTests",
    "Close",
    "Delay",
    "DropRequest",
    "DropResponse",
    "Error",
    "ErrorCode",
    "Hold",
    "InstalledRule",
    "Record",
]

_HOME = {
    "BrokerForTests": "semel.testing.broker",
    "ErrorCode": "semel.errors",
    "InstalledRule": "semel.broker.embedded",
    "Record": "semel.types",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is asked for: a pytest run that uses no broker must not pay for one."""
    if name in __all__:
        return getattr(import_module(_HOME.get(name, "semel.broker.control")), name)
    raise AttributeError(f"module 'semel.testing' has no attribute {name!r}")

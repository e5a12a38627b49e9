"""The outbox: records written with the rows that they tell of, and the relay that brings them into Kafka once."""

from typing import Any

__all__ = ["enqueue_in"]


def __getattr__(name: str) -> Any:
    """Imported when it is asked for: the relay has no use for it."""
    if name == "enqueue_in":
        from semel.outbox.enqueue import enqueue_in

        return enqueue_in
    raise AttributeError(f"module 'semel.outbox' has no attribute {name!r}")

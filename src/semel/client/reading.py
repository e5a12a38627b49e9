"""Which consumer reads for the engine and the sinks: ours, or librdkafka's (`SEMEL_CONSUMER`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from semel.client.consumer import Consumer, ConsumerEvents, Reader

if TYPE_CHECKING:
    from semel.client import librdkafka

__all__ = ["make_consumer", "make_reader"]


def make_consumer(
    kind: str,
    bootstrap: str,
    *,
    group: str,
    topics: Sequence[str],
    instance_id: str | None,
    events: ConsumerEvents,
    session_timeout_ms: int,
    settings: Mapping[str, object] | None = None,
) -> Consumer | librdkafka.Consumer:
    """A member of a group; it joins when it is started. `kind` is `semel` or `librdkafka`."""
    made: type[Consumer | librdkafka.Consumer] = Consumer
    if kind == "librdkafka":
        from semel.client import librdkafka  # Native code of some size, which nobody else needs.

        made = librdkafka.Consumer
    return made(
        bootstrap,
        group=group,
        topics=topics,
        instance_id=instance_id,
        events=events,
        session_timeout_ms=session_timeout_ms,
        settings=settings,
    )


def make_reader(
    kind: str, bootstrap: str, *, settings: Mapping[str, object] | None = None
) -> Reader | librdkafka.Reader:
    """A reader of given partitions, in no group."""
    if kind == "librdkafka":
        from semel.client import librdkafka

        return librdkafka.Reader(bootstrap, settings=settings)
    return Reader(bootstrap, settings=settings)

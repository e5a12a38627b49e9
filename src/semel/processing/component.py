"""Components: what the engine runs.

A component reads topics in a group of its own, hands each record to `handle`, and makes the effects of many records
real in one Kafka transaction with the position in the input. Processors are components whose handler works on
decoded values; the ingress' owner is one that works on bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from semel.errors import ConfigurationError
from semel.processing.limits import CONCURRENCY_MAX
from semel.processing.topics import State, StateOptions, StateReader, StateView, Topic, check_name
from semel.processing.tracing import follow

__all__ = [
    "DELIVERIES",
    "Component",
    "Delivery",
    "Ordering",
    "ProcessorSpec",
    "StoreReader",
    "park_topic",
    "state_topic",
]

Ordering = Literal["key", "partition"]
"""What a record that cannot be processed holds up: the later records of its key, or its whole partition."""


Delivery = Literal["exactly-once", "at-least-once", "at-most-once"]
"""What a crash may cost: nothing, effects that happen again, or effects that do not happen."""

DELIVERIES: tuple[Delivery, ...] = ("exactly-once", "at-least-once", "at-most-once")

StoreReader = StateReader
"""How a component without types reads its stores."""

Handle = Callable[[Any, StoreReader], Any]
"""Takes an undecoded record, or a list of them where the component takes batches; what it gives back goes through
`effects.perform`."""


def state_topic(app: str, store: str) -> str:
    """The changelog of a store: compacted, one partition for each of the input's."""
    return f"{app}.semel.state.{store}"


def park_topic(app: str, topic: str) -> str:
    """Where records of a topic wait that could not be processed: kept for ever, partitions as the input's."""
    return f"{app}.semel.park.{topic}"


@dataclass(frozen=True, slots=True)
class Component:
    """One reader-and-writer of an app.

    With stores there is one input, because a store is kept by that input's partitions. An exception from `handle`
    parks the record's key (`ordering="key"`) or stops its partition (`"partition"`); a `Retriable`, a
    ConnectionError or a TimeoutError does neither: the record is tried again after a while.

    With `batch`, `handle` takes a list of neighbouring records of one partition. With `concurrency` above 1, so many
    calls run at once: one at a time for each key, or for each partition where there are stores.
    """

    app: str
    name: str
    inputs: tuple[str, ...]
    handle: Handle
    stores: tuple[str, ...] = ()
    options: Mapping[str, StateOptions] = field(default_factory=dict)
    """Limits of stores, where they are not the usual ones."""
    ordering: Ordering = "key"
    batch: bool = False
    concurrency: int = 1
    delivery: Delivery = "exactly-once"
    latency: float | None = None
    """Seconds from a record's arrival to its committed effects, for which interval and size of units are chosen."""
    deadline: float | None = None
    """Seconds that one call of the handler may take."""
    codecs: Mapping[str, int] = field(default_factory=dict)
    """How batches are compressed, by output, where they are."""
    plain: tuple[Topic[Any, Any], Callable[[Any], Any]] | None = None
    """The input and a handler that sees its decoded records one by one and nothing else, where that is all there is."""

    def __post_init__(self) -> None:
        check_name(self.name, "a component")
        if not self.inputs:
            raise ConfigurationError(f"component {self.name} reads no topic.")
        if self.stores and len(self.inputs) != 1:
            raise ConfigurationError(
                f"component {self.name} keeps state and reads {len(self.inputs)} topics: state belongs to the "
                "partitions of one input. Make one processor for each topic."
            )
        if self.ordering not in ("key", "partition"):
            raise ConfigurationError(f"component {self.name}: ordering {self.ordering!r} is neither key nor partition.")
        if self.delivery not in DELIVERIES:
            raise ConfigurationError(
                f"component {self.name}: delivery {self.delivery!r} is none of {', '.join(DELIVERIES)}."
            )
        if not 1 <= self.concurrency <= CONCURRENCY_MAX:
            raise ConfigurationError(
                f"component {self.name}: concurrency={self.concurrency!r}, but 1 to {CONCURRENCY_MAX} calls at once "
                "are possible."
            )
        if self.batch and self.concurrency > 1:
            raise ConfigurationError(
                f"component {self.name} takes batches and has concurrency={self.concurrency}: batches of a partition "
                "are worked on one after the other. Use one of the two."
            )

    @property
    def group(self) -> str:
        """The consumer group."""
        return f"{self.app}.{self.name}"

    @property
    def changelogs(self) -> dict[str, str]:
        """Changelog topic by store."""
        return {store: state_topic(self.app, store) for store in self.stores}

    @property
    def state_options(self) -> dict[str, StateOptions]:
        """Limits of every store."""
        return {store: self.options.get(store, StateOptions()) for store in self.stores}

    @property
    def parks(self) -> dict[str, str]:
        """Park topic by input; empty where a poison record stops its partition."""
        return {topic: park_topic(self.app, topic) for topic in self.inputs} if self.ordering == "key" else {}


@dataclass(frozen=True, slots=True)
class ProcessorSpec:
    """A processor as the app declares it: `handler(record, *views of states)` gives effects.

    With `batch` it is `handler(records, *views of states)`.
    """

    name: str
    topic: Topic[Any, Any]
    handler: Callable[..., Any]
    states: tuple[State[Any, Any], ...] = ()
    ordering: Ordering = "key"
    batch: bool = False
    concurrency: int = 1
    delivery: Delivery = "exactly-once"
    latency: float | None = None
    deadline: float | None = None
    trace: bool = False
    """Whether outputs belong to the trace of their input."""

    def component(self, app: str) -> Component:
        """The component that decodes records and calls the handler."""
        return Component(
            app=app,
            name=self.name,
            inputs=(self.topic.name,),
            handle=self._traced(f"{app}.{self.name}") if self.trace else self._handle(),
            plain=self._plain(),
            stores=tuple(state.name for state in self.states),
            options={state.name: state.options for state in self.states},
            ordering=self.ordering,
            batch=self.batch,
            concurrency=self.concurrency,
            delivery=self.delivery,
            latency=self.latency,
            deadline=self.deadline,
        )

    def _traced(self, name: str) -> Handle:
        handle, is_batch = self._handle(), self.batch

        def traced(item: Any, stores: StoreReader) -> Any:
            records = item if is_batch else (item,)
            return follow(lambda: handle(item, stores), [record.headers for record in records], name)

        return traced

    def _plain(self) -> tuple[Topic[Any, Any], Callable[[Any], Any]] | None:
        more = self.states or self.batch or self.concurrency > 1 or self.trace or self.deadline is not None
        return None if more else (self.topic, self.handler)

    def _handle(self) -> Handle:
        decode: Callable[[Any], Any] = self.topic.decode_all if self.batch else self.topic.decode
        handler, states = self.handler, self.states

        def handle(item: Any, stores: StoreReader) -> Any:
            return handler(decode(item), *(StateView(state, stores) for state in states))

        def handle_stateless(item: Any, _: StoreReader) -> Any:
            return handler(decode(item))

        return handle if states else handle_stateless

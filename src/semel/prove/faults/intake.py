"""Where something can go into an app from outside, and the groups that read it: for poison and for rebalances."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from semel.app import App
from semel.prove.drain import consumers_of

__all__ = ["Intake"]

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Intake:
    """What `Intake.of` finds in an app, and how it is reached without any proxy."""

    bootstrap: str
    settings: Mapping[str, str]
    """Of Kafka's clients."""
    addresses: Callable[[], Sequence[Address]]
    """Where HTTP instances listen."""
    topics: Sequence[str]
    """Topics whose readers all set aside the key of a record that cannot be read, and whose values have a form."""
    paths: Sequence[str]
    """Endpoints of which any body can be posted: their path has no parameters, and JSON is wanted."""
    groups: Mapping[str, Sequence[str]]
    """By consumer group: the topics that it reads."""

    @classmethod
    def of(
        cls, app: App, bootstrap: str, settings: Mapping[str, str], addresses: Callable[[], Sequence[Address]]
    ) -> Intake:
        """The intake of this app."""
        consumers = consumers_of(app)
        read = {item.topic for item in consumers}
        stopping = {spec.topic.name for spec in app.processors.values() if spec.ordering != "key"}
        groups: dict[str, list[str]] = {}
        for item in consumers:
            groups.setdefault(item.group, []).append(item.topic)
        return cls(
            bootstrap,
            settings,
            addresses,
            topics=[
                name for name, topic in app.topics.items() if name in read - stopping and topic.value_type is not bytes
            ],
            paths=[
                spec.path
                for spec in app.endpoints.values()
                if spec.method == "POST" and not spec.is_raw and "{" not in spec.path and spec.principal is None
            ],
            groups=groups,
        )

"""The topics that an app needs, and making sure that they are there.

A changelog and a park topic have as many partitions as the input they belong to, because their records go to the
partition of the input record. The number is what the cluster has: it is fixed when a topic is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from semel.client.admin import Admin, TopicSpec
from semel.errors import ConfigurationError
from semel.processing.component import Component
from semel.processing.limits import PARK_TOPIC_BYTES_MAX
from semel.processing.topics import Topic

__all__ = ["component_topics", "prepare_topics"]


def component_topics(component: Component, partitions: Mapping[str, int]) -> dict[str, TopicSpec]:
    """The topics that a component keeps for itself; `partitions` says how many each of its inputs has."""
    specs = {}
    for topic in component.changelogs.values():
        specs[topic] = TopicSpec(partitions[component.inputs[0]], {"cleanup.policy": "compact"})
    for source, topic in component.parks.items():
        configs = {"retention.ms": "-1", "retention.bytes": "-1", "max.message.bytes": str(PARK_TOPIC_BYTES_MAX)}
        specs[topic] = TopicSpec(partitions[source], configs)
    return specs


async def prepare_topics(
    admin: Admin,
    topics: Iterable[Topic[Any, Any]],
    components: Iterable[Component],
    default_partitions: int,
    *,
    more: Mapping[str, TopicSpec] | None = None,
) -> dict[str, int]:
    """Make what is missing of the app's topics, of `more`, and of what the components keep; partitions by topic.

    A topic that says no number has that of the cluster, or `default_partitions` when it is new. Raises
    `ConfigurationError` when a topic is there with another number than was declared.
    """
    there = await admin.list_topics()
    wanted = dict(more or {})
    for topic in topics:
        known = there.get(topic.name)
        count = topic.partitions or (known.partitions if known is not None else default_partitions)
        wanted[topic.name] = TopicSpec(count)
    await admin.create_topics(wanted)
    partitions = {name: info.partitions for name, info in there.items()}
    partitions.update({name: spec.partitions for name, spec in wanted.items()})
    own: dict[str, TopicSpec] = {}
    for component in components:
        for source in component.inputs:
            if source not in partitions:
                raise ConfigurationError(f"component {component.name} reads topic {source}, which nobody makes.")
        own.update(component_topics(component, partitions))
    await admin.create_topics(own)
    return partitions | {name: spec.partitions for name, spec in own.items()}

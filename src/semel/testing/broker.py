"""A broker that a test may look into and break."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from semel.broker.config import BrokerConfig
from semel.broker.embedded import EmbeddedBroker
from semel.processing.ports import free_ports
from semel.testing.reading import Isolation, read_topic, topic_names
from semel.types import Record

__all__ = ["BrokerForTests"]


class BrokerForTests(EmbeddedBroker):
    """An `EmbeddedBroker` on 127.0.0.1, on the same port after `restart`, whose answers `control` may falsify.

    `bootstrap_servers` and any Kafka client are enough; `records` and `create_topic` save a test the client.
    """

    def __init__(self, data: Path, config: BrokerConfig | None = None) -> None:
        super().__init__(data, port=free_ports(1)[0], config=config or BrokerConfig(allow_faults=True))

    @property
    def bootstrap_servers(self) -> str:
        """What clients want in the setting of this name."""
        return self.address

    def create_topic(self, name: str, partitions: int = 1, configs: Mapping[str, str] | None = None) -> None:
        """Create a topic. Raises `TopicError`: it exists already, or cannot be made like this."""
        self.call(lambda node: node.topics.create(name, partitions, dict(configs or {})))

    def topics(self) -> list[str]:
        """The names of all topics, without Kafka's own."""
        return self.call(topic_names)

    def records(self, topic: str, *, isolation: Isolation = "read_committed") -> list[Record]:
        """Every record of a topic that a consumer with this isolation level would get, by partition and offset.

        Raises `ConfigurationError` when there is no such topic.
        """
        return self.call(lambda node: read_topic(node, topic, isolation))

    def restart(self) -> None:
        """Stop and start it over the same data. Rules of `control` are gone."""
        self.stop()
        self.start()

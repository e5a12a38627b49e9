"""A broker that a test may look into and break."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from semel.broker.config import BrokerConfig
from semel.broker.embedded import EmbeddedBroker
from semel.broker.node import Node
from semel.errors import ConfigurationError
from semel.log.log import PartitionLog
from semel.processing.ports import free_ports
from semel.types import Record
from semel.wire.records import decode_records, iter_batches, read_control

__all__ = ["BrokerForTests"]

Isolation = Literal["read_committed", "read_uncommitted"]
_READ_BYTES = 1 << 20


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
        return self.call(_topic_names)

    def records(self, topic: str, *, isolation: Isolation = "read_committed") -> list[Record]:
        """Every record of a topic that a consumer with this isolation level would get, by partition and offset.

        Raises `ConfigurationError` when there is no such topic.
        """
        return self.call(lambda node: _records(node, topic, isolation))

    def restart(self) -> None:
        """Stop and start it over the same data. Rules of `control` are gone."""
        self.stop()
        self.start()


def _topic_names(node: Node) -> list[str]:
    return sorted(topic.info.name for topic in node.topics if not topic.info.name.startswith("__"))


def _records(node: Node, name: str, isolation: Isolation) -> list[Record]:
    topic = node.topics.get(name)
    if topic is None:
        raise ConfigurationError(f"There is no topic {name!r}; there are: {', '.join(_topic_names(node)) or 'none'}.")
    found: list[Record] = []
    for partition in topic.partitions:
        found += _read(partition.log, isolation)
    return found


def _read(log: PartitionLog, isolation: Isolation) -> list[Record]:
    """A partition as a consumer sees it: markers and, read_committed, what was aborted or is open left out."""
    committed = isolation == "read_committed"
    end = log.last_stable_offset if committed else log.high_watermark
    at, found = log.log_start_offset, []
    aborted = sorted(log.aborted_transactions(at, end), key=lambda item: item[1]) if committed else []
    aborting: set[int] = set()
    while at < end:
        data = log.read_bytes(at, _READ_BYTES, end)
        for position, header in iter_batches(data):
            while aborted and aborted[0][1] <= header.last_offset:
                aborting.add(aborted.pop(0)[0])
            if header.is_control:
                if not read_control(data, position, header)[0]:
                    aborting.discard(header.producer_id)
            elif not (header.is_transactional and header.producer_id in aborting):
                found += decode_records(data, position, header, log.topic, log.partition)
            at = header.next_offset
    return found

"""What a consumer would get, read from the logs of a broker in this process."""

from __future__ import annotations

from typing import Literal, NamedTuple

from semel.broker.node import Node
from semel.errors import ConfigurationError
from semel.log.log import PartitionLog
from semel.types import Record
from semel.wire.records import decode_records, iter_batches, read_control

__all__ = ["Isolation", "Read", "read_log", "read_topic", "topic_names"]

Isolation = Literal["read_committed", "read_uncommitted"]
_READ_BYTES = 1 << 20


class Read(NamedTuple):
    """Records in order, and the offset behind everything that was looked at."""

    records: list[Record]
    end: int


def topic_names(node: Node) -> list[str]:
    """The names of all topics, without Kafka's own."""
    return sorted(topic.info.name for topic in node.topics if not topic.info.name.startswith("__"))


def read_topic(node: Node, name: str, isolation: Isolation = "read_committed") -> list[Record]:
    """Every record of a topic, by partition and offset. Raises `ConfigurationError` when there is no such topic."""
    topic = node.topics.get(name)
    if topic is None:
        raise ConfigurationError(f"There is no topic {name!r}; there are: {', '.join(topic_names(node)) or 'none'}.")
    return [record for partition in topic.partitions for record in read_log(partition.log, isolation).records]


def read_log(
    log: PartitionLog, isolation: Isolation = "read_committed", start: int = 0, max_records: int | None = None
) -> Read:
    """A partition from `start` on as a consumer sees it: without markers and, read_committed, without what was aborted
    or is open. It ends before the batch that would come after `max_records`.
    """
    committed = isolation == "read_committed"
    end = log.last_stable_offset if committed else log.high_watermark
    at, found = max(start, log.log_start_offset), list[Record]()
    aborted = sorted(log.aborted_transactions(at, end), key=lambda item: item[1]) if committed and at < end else []
    aborting: set[int] = set()
    while at < end:
        data = log.read_bytes(at, _READ_BYTES, end)
        for position, header in iter_batches(data):
            if max_records is not None and len(found) >= max_records:
                return Read(found, at)
            while aborted and aborted[0][1] <= header.last_offset:
                aborting.add(aborted.pop(0)[0])
            if header.is_control:
                if not read_control(data, position, header)[0]:
                    aborting.discard(header.producer_id)
            elif not (header.is_transactional and header.producer_id in aborting):
                batch = decode_records(data, position, header, log.topic, log.partition)
                found += batch if header.base_offset >= start else [item for item in batch if item.offset >= start]
            at = header.next_offset
    return Read(found, at)

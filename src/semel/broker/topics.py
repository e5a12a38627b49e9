"""Topics and their partitions: which exist, their logs, and who waits for their data."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol
from uuid import UUID

from semel.broker.config import BrokerConfig, log_config
from semel.broker.config_keys import TOPIC_KEYS
from semel.broker.dynamic_config import ConfigError, DynamicConfig
from semel.broker.metadata import MetadataStore, TopicInfo
from semel.disk import disk
from semel.env import Env
from semel.errors import ErrorCode, SemelError
from semel.log.log import LogConfig, LogError, PartitionLog

__all__ = ["Partition", "Topic", "TopicError", "Topics", "Waiter", "check_name"]

log = logging.getLogger("semel.broker")

_LEGAL_NAME = re.compile(r"[a-zA-Z0-9._-]{1,249}")
"""Kafka's rule (org.apache.kafka.common.internals.Topic)."""


def check_name(name: str) -> None:
    """Raise `TopicError` for a name that no topic can have."""
    if not _LEGAL_NAME.fullmatch(name) or name in (".", ".."):
        raise TopicError(
            ErrorCode.INVALID_TOPIC_EXCEPTION,
            f"Topic name {name!r} is illegal: 1 to 249 of the characters a-z A-Z 0-9 . _ - are allowed.",
        )


class TopicError(SemelError):
    """A topic cannot be created or changed as asked; nothing was changed."""

    def __init__(self, code: ErrorCode, text: str) -> None:
        super().__init__(text)
        self.code: ErrorCode = code


class Waiter(Protocol):
    """Something that waits for a partition to move: a parked fetch."""

    def wake(self) -> None:
        """The partition's readable end moved, or the partition is gone."""


class Partition:
    """One partition's log and the fetches that wait for it."""

    __slots__ = ("deleted", "log", "waiters")

    def __init__(self, partition_log: PartitionLog) -> None:
        self.log = partition_log
        self.waiters: dict[Waiter, None] = {}
        self.deleted = False

    def __repr__(self) -> str:
        return f"<Partition {self.log.topic}-{self.log.partition}, {len(self.waiters)} waiting>"

    def advanced(self) -> None:
        """Tell those who wait that the log's readable end moved."""
        for waiter in tuple(self.waiters):
            waiter.wake()


class Topic:
    """A topic and its open partitions, in order."""

    __slots__ = ("info", "partitions")

    def __init__(self, info: TopicInfo, partitions: list[Partition]) -> None:
        self.info = info
        self.partitions = partitions

    def partition(self, index: int) -> Partition | None:
        """The partition of this index, if there is one."""
        return self.partitions[index] if 0 <= index < len(self.partitions) else None


class Topics:
    """Every topic of the broker. Directories are named by topic id, so that a re-created topic never sees old files."""

    def __init__(
        self, directory: Path, metadata: MetadataStore, config: BrokerConfig, settings: DynamicConfig, env: Env
    ) -> None:
        self.directory = directory
        self._metadata = metadata
        self._config = config
        self._settings = settings
        settings.after_change = self._reconfigure
        self._env = env
        self._by_name: dict[str, Topic] = {}
        self._by_id: dict[UUID, Topic] = {}
        self._partition_count = 0
        self.version = 0
        """Rises when a topic is made, extended or deleted."""
        self.after_delete: Callable[[TopicInfo], None] = lambda _: None
        """Called when a topic is gone; the groups forget its offsets."""

    def __repr__(self) -> str:
        return f"<Topics {len(self._by_name)} topics, {self._partition_count} partitions>"

    def __iter__(self) -> Iterator[Topic]:
        return iter(self._by_name.values())

    def open(self) -> None:
        """Open every topic's logs, recovering them, and remove what deleted topics left behind."""
        disk.make_directory(self.directory)
        disk.sync_directory(self.directory.parent)
        for info in self._metadata.topics.values():
            self._add(info)
        known = {str(topic_id) for topic_id in self._by_id}
        for name in disk.list(self.directory):
            if name not in known:
                log.info("removing %s: its topic was deleted", self.directory / name)
                disk.remove_tree(self.directory / name)

    def close(self) -> None:
        """Close every log; one that cannot be synced is an error in the log file, its records stay where they are."""
        for topic in self:
            for partition in topic.partitions:
                try:
                    partition.log.close()
                except LogError as error:
                    log.error("closing %s-%d: %s", topic.info.name, partition.log.partition, error)

    @property
    def default_partitions(self) -> int:
        """Partitions of a topic that is created without saying how many."""
        return self._config.num_partitions

    def get(self, name: str) -> Topic | None:
        """The topic of this name."""
        return self._by_name.get(name)

    def by_id(self, topic_id: UUID | None) -> Topic | None:
        """The topic of this id; None for the zero id."""
        return None if topic_id is None else self._by_id.get(topic_id)

    def partition(self, name: str, index: int) -> Partition | None:
        """One partition, if it exists."""
        topic = self._by_name.get(name)
        return None if topic is None else topic.partition(index)

    def check_settings(self, name: str, configs: Mapping[str, str | None]) -> None:
        """Raise `TopicError` when no topic can have this name and these settings, however many partitions it has."""
        check_name(name)
        if name in self._by_name:
            raise TopicError(ErrorCode.TOPIC_ALREADY_EXISTS, f"Topic '{name}' already exists.")
        try:
            self._settings.check_topic(configs)
        except ConfigError as error:
            raise TopicError(error.code, str(error)) from error

    def check_new(self, name: str, partitions: int, configs: Mapping[str, str | None]) -> None:
        """Raise `TopicError` when this topic cannot be created."""
        self.check_settings(name, configs)
        if partitions < 1:
            raise TopicError(
                ErrorCode.INVALID_PARTITIONS, "Number of partitions must be larger than 0, or -1 for the default."
            )
        self._check_room(partitions)

    def create(self, name: str, partitions: int, configs: Mapping[str, str | None]) -> Topic:
        """Create a topic. Raises `TopicError`."""
        self.check_new(name, partitions, configs)
        values = {key: TOPIC_KEYS[key].clean(value) for key, value in configs.items() if value is not None}
        info = TopicInfo(name, self._env.new_id(), partitions, values)
        try:
            self._metadata.put_topic(info)
            topic = self._add(info)
        except LogError as error:
            if name in self._metadata.topics:
                self._metadata.delete_topic(name)
            raise TopicError(ErrorCode.KAFKA_STORAGE_ERROR, f"Topic '{name}' cannot be created: {error}") from error
        log.info("topic %s created with %d partitions, id %s", name, partitions, info.topic_id)
        return topic

    def check_more_partitions(self, topic: Topic, count: int) -> None:
        """Raise `TopicError` when a topic cannot be extended to `count` partitions."""
        present = len(topic.partitions)
        if count <= present:
            raise TopicError(
                ErrorCode.INVALID_PARTITIONS,
                f"The topic {topic.info.name} currently has {present} partition(s); {count} would not be an increase.",
            )
        self._check_room(count - present)

    def add_partitions(self, topic: Topic, count: int) -> None:
        """Extend a topic to `count` partitions. Raises `TopicError`; empty logs that it leaves are of no harm."""
        self.check_more_partitions(topic, count)
        present = len(topic.partitions)
        try:
            config = self._log_config(topic.info)
            added = [self._open_partition(topic.info, index, config) for index in range(present, count)]
            topic.info = self._metadata.set_partitions(topic.info.name, count)
        except LogError as error:
            raise TopicError(ErrorCode.KAFKA_STORAGE_ERROR, f"No partition can be added: {error}") from error
        topic.partitions += added
        self._partition_count += len(added)
        self.version += 1

    def set_configs(self, topic: Topic, configs: Mapping[str, str]) -> None:
        """Replace a topic's own settings, checked before; they are durable and hold when it returns."""
        info = replace(topic.info, configs=dict(configs))
        self._metadata.put_topic(info)
        topic.info = info
        self._configure(topic)
        log.info("topic %s is configured with %s", info.name, dict(configs))

    def _configure(self, topic: Topic) -> None:
        config = self._log_config(topic.info)
        for partition in topic.partitions:
            partition.log.config = config

    def _reconfigure(self) -> None:
        """What stands behind the topics' own settings changed."""
        for topic in self:
            self._configure(topic)

    def _log_config(self, info: TopicInfo) -> LogConfig:
        return log_config(self._config, self._settings.topic_values(info.configs))

    def delete(self, topic: Topic) -> None:
        """Delete a topic and its records. The deletion is durable first: files left by a crash go at the next start."""
        name = topic.info.name
        self._metadata.delete_topic(name)
        del self._by_name[name]
        del self._by_id[topic.info.topic_id]
        for partition in topic.partitions:
            partition.deleted = True
            partition.advanced()
        self._partition_count -= len(topic.partitions)
        self.version += 1
        self.after_delete(topic.info)  # Before the files: a new topic of this name must not begin with its offsets.
        for partition in topic.partitions:
            partition.log.delete()
        with contextlib.suppress(OSError):  # What is left goes at the next start.
            disk.remove_tree(self.directory / str(topic.info.topic_id))
        log.info("topic %s deleted, id %s", name, topic.info.topic_id)

    def expire(self, now_ms: int) -> None:
        """Close segments whose time has come, delete what retention says, forget producers silent for a day."""
        for topic in self:
            for partition in topic.partitions:
                start = partition.log.log_start_offset
                try:
                    if partition.log.tend(now_ms) != start:
                        partition.advanced()
                except LogError as error:
                    log.error("retention of %s-%d: %s", topic.info.name, partition.log.partition, error)
                partition.log.expire_producers(now_ms)

    def _check_room(self, partitions: int) -> None:
        limit = self._config.max_topic_partitions
        if self._partition_count + partitions > limit:
            raise TopicError(
                ErrorCode.INVALID_PARTITIONS,
                f"{partitions} more partitions would exceed this broker's limit of {limit} in all.",
            )

    def _add(self, info: TopicInfo) -> Topic:
        config = self._log_config(info)  # Once: a hundred settings are looked up for it.
        topic = Topic(info, [self._open_partition(info, index, config) for index in range(info.partitions)])
        self._partition_count += info.partitions
        self.version += 1
        self._by_name[info.name] = topic
        self._by_id[info.topic_id] = topic
        return topic

    def _open_partition(self, info: TopicInfo, index: int, config: LogConfig) -> Partition:
        directory = self.directory / str(info.topic_id) / str(index)
        return Partition(
            PartitionLog.open(directory, info.name, index, info.topic_id, config, now_ms=self._env.wall_ms())
        )

"""Settings that change while the broker runs: what holds now, where it comes from, and what may be set.

A topic's setting is its own, else the broker's of the matching name (dynamic, dynamic default, given at start), else
Kafka's default. Changes are in the metadata log before anybody hears of them. Answers follow Apache Kafka 4.3.1
(KIP-226, KIP-339, KIP-848), except that an unknown broker setting is refused instead of kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import IntEnum
from typing import NamedTuple

from semel.broker.config import NODE_ID, OFFSETS_RETENTION_MS, BrokerConfig
from semel.broker.config_keys import (
    BROKER_KEYS,
    GROUP_KEYS,
    INERT_KEYS,
    READ_ONLY_KEYS,
    TOPIC_KEYS,
    ConfigKey,
    ConfigType,
)
from semel.broker.metadata import MetadataStore
from semel.errors import ErrorCode, SemelError

__all__ = [
    "BROKER",
    "GROUP",
    "TOPIC",
    "Change",
    "ConfigError",
    "DynamicConfig",
    "Entry",
    "Operation",
    "Source",
    "changed",
]

TOPIC, BROKER, GROUP = 2, 4, 32
"""Types of a resource that has settings (org.apache.kafka.common.config.ConfigResource.Type)."""
_DEFAULT_BROKER = ""
_GROUP_LIMITS = {"consumer.session.timeout.ms": (1_000, 60_000), "consumer.heartbeat.interval.ms": (100, 15_000)}
"""group.consumer.min.* and .max.* of the two. Kafka's minima (45000 and 5000) would make every fault test wait."""


class Operation(IntEnum):
    """What IncrementalAlterConfigs does with a value (org.apache.kafka.clients.admin.AlterConfigOp.OpType)."""

    SET, DELETE, APPEND, SUBTRACT = range(4)


class Source(IntEnum):
    """Where a value comes from (org.apache.kafka.clients.admin.ConfigEntry.ConfigSource)."""

    DYNAMIC_TOPIC, DYNAMIC_BROKER, DYNAMIC_DEFAULT_BROKER, STATIC_BROKER, DEFAULT = range(1, 6)
    GROUP = 8


class ConfigError(SemelError):
    """Settings cannot be changed as asked; nothing was changed."""

    def __init__(self, code: ErrorCode, text: str) -> None:
        super().__init__(text)
        self.code: ErrorCode = code


class Change(NamedTuple):
    """One operation of IncrementalAlterConfigs."""

    name: str
    operation: int
    value: str | None


class Synonym(NamedTuple):
    name: str
    value: str
    source: Source


class Entry(NamedTuple):
    """A setting as it is described. The first synonym is where its value comes from; the others stand behind it."""

    key: ConfigKey
    synonyms: tuple[Synonym, ...]
    read_only: bool

    @property
    def value(self) -> str | None:
        return None if self.key.is_sensitive else self.synonyms[0].value

    @property
    def source(self) -> Source:
        return self.synonyms[0].source


class DynamicConfig:
    """The settings of one broker. `after_change` is called when what stands behind the topics' settings changed."""

    def __init__(self, metadata: MetadataStore, config: BrokerConfig) -> None:
        self._metadata = metadata
        self._static = _static_values(config)
        self.after_change: Callable[[], None] = lambda: None

    def __repr__(self) -> str:
        return f"<DynamicConfig of {len(self._metadata.configs)} resources>"

    def listens(self, listeners: Sequence[tuple[str, str, str]]) -> None:
        """Say where the broker listens: protocol, `host:port`, and the `host:port` that clients are told."""
        self._static["listeners"] = ",".join(f"{protocol}://{address}" for protocol, address, _ in listeners)
        self._static["advertised.listeners"] = ",".join(f"{protocol}://{told}" for protocol, _, told in listeners)

    # --- What holds ---

    def topic(self, own: Mapping[str, str]) -> list[Entry]:
        """Every setting of a topic, in order of their names."""
        return [Entry(key, self._topic_chain(key, own), read_only=False) for key in TOPIC_KEYS.values()]

    def topic_values(self, own: Mapping[str, str]) -> dict[str, str]:
        """What a topic's log goes by, where that is not Kafka's default."""
        values = {}
        for key in TOPIC_KEYS.values():
            first = self._topic_chain(key, own)[0]
            if first.source is not Source.DEFAULT:
                values[key.name] = first.value
        return values

    def broker(self) -> list[Entry]:
        """Every setting of the broker."""
        dynamic = [*BROKER_KEYS.values(), *INERT_KEYS.values()]
        entries = [Entry(key, self._broker_chain(key), read_only=False) for key in dynamic]
        entries += [Entry(key, self._broker_chain(key), read_only=True) for key in READ_ONLY_KEYS.values()]
        return sorted(entries, key=lambda entry: entry.key.name)

    def broker_defaults(self) -> list[Entry]:
        """What was set for all brokers."""
        entries = []
        for name, value in sorted(self.own(BROKER, _DEFAULT_BROKER).items()):
            synonym = Synonym(name, value, Source.DYNAMIC_DEFAULT_BROKER)
            entries.append(Entry(_changeable_broker_keys()[name], (synonym,), read_only=False))
        return entries

    def group(self, group_id: str) -> list[Entry]:
        """Every setting of a group, whether the group is there or not."""
        own = self.own(GROUP, group_id)
        entries = []
        for key in GROUP_KEYS.values():
            chain = [Synonym(key.broker_name, key.default, Source.DEFAULT)]
            if key.name in own:
                chain.insert(0, Synonym(key.name, own[key.name], Source.GROUP))
            entries.append(Entry(key, tuple(chain), read_only=False))
        return entries

    def group_value(self, group_id: str, name: str) -> int:
        """One setting of a group as a number."""
        return int(self.own(GROUP, group_id).get(name, GROUP_KEYS[name].default))

    def own(self, kind: int, name: str) -> Mapping[str, str]:
        """What was set for one broker (or all: the empty name) or group."""
        return self._metadata.configs.get((kind, name), {})

    def resources(self, kind: int) -> list[str]:
        """Names of the brokers or groups of which something was set."""
        return sorted(name for found, name in self._metadata.configs if found == kind)

    def _topic_chain(self, key: ConfigKey, own: Mapping[str, str]) -> tuple[Synonym, ...]:
        chain: tuple[Synonym, ...] = ()
        if key.name in own:
            chain = (Synonym(key.name, own[key.name], Source.DYNAMIC_TOPIC),)
        if key.broker_name:
            return chain + self._broker_chain(BROKER_KEYS[key.broker_name])
        return (*chain, Synonym(key.name, key.default, Source.DEFAULT))

    def _broker_chain(self, key: ConfigKey) -> tuple[Synonym, ...]:
        sources = (
            (self.own(BROKER, str(NODE_ID)), Source.DYNAMIC_BROKER),
            (self.own(BROKER, _DEFAULT_BROKER), Source.DYNAMIC_DEFAULT_BROKER),
            (self._static, Source.STATIC_BROKER),
        )
        chain = tuple(Synonym(key.name, values[key.name], source) for values, source in sources if key.name in values)
        return (*chain, Synonym(key.name, key.default, Source.DEFAULT))

    # --- What may be set ---

    def check_topic(self, values: Mapping[str, str | None]) -> None:
        """Raise `ConfigError` when a topic cannot have these settings."""
        for name, value in values.items():
            if name not in TOPIC_KEYS:
                raise ConfigError(ErrorCode.INVALID_CONFIG, f"Unknown topic config name: {name}")
            if value is None:
                raise ConfigError(ErrorCode.INVALID_CONFIG, f"Null value not supported for topic configs: {name}")
            _check_value(TOPIC_KEYS[name], value, ErrorCode.INVALID_CONFIG)

    def check(self, kind: int, name: str, values: Mapping[str, str]) -> None:
        """Raise `ConfigError` when a broker (empty name: all) or group cannot have these settings."""
        if kind == BROKER:
            _check_broker(values)
        else:
            _check_group(name, values)

    def set(self, kind: int, name: str, values: Mapping[str, str]) -> None:
        """Replace the settings of a broker or group, checked before; durable when it returns."""
        self._metadata.put_configs(kind, name, values)
        self.after_change()


def changed(
    current: Mapping[str, str], changes: Iterable[Change], keys: Mapping[str, ConfigKey], resource: str
) -> dict[str, str]:
    """The settings of a resource after the operations. Raises `ConfigError`."""
    values = dict(current)
    seen: set[str] = set()
    for name, operation, value in changes:
        if name in seen:
            raise ConfigError(ErrorCode.INVALID_REQUEST, "Error due to duplicate config keys")
        seen.add(name)
        if operation not in set(Operation):
            raise ConfigError(ErrorCode.INVALID_REQUEST, f"Unknown operation {operation} for {name}.")
        if operation == Operation.DELETE:
            values.pop(name, None)
            continue
        if value is None:
            raise ConfigError(ErrorCode.INVALID_REQUEST, f"Null value not supported for : {name}")
        key = keys.get(name)
        if operation == Operation.SET:
            values[name] = value if key is None else key.clean(value)
            continue
        if key is None:
            raise ConfigError(ErrorCode.INVALID_CONFIG, f"Unknown {resource} config name: {name}")
        if key.type is not ConfigType.LIST:
            text = f"Can't {Operation(operation).name} to key {name} because its type is not LIST."
            raise ConfigError(ErrorCode.INVALID_CONFIG, text)
        values[name] = _combined(values.get(name, key.default), value, add=operation == Operation.APPEND)
    return values


def _combined(present: str, value: str, *, add: bool) -> str:
    items = [item.strip() for item in present.split(",") if item.strip()]
    given = [item.strip() for item in value.split(",") if item.strip()]
    kept = items + given if add else [item for item in items if item not in given]
    return ",".join(dict.fromkeys(kept))


def _check_value(key: ConfigKey, value: str, code: ErrorCode) -> None:
    problem = key.problem(value)
    if problem is not None:
        raise ConfigError(code, problem)


def _changeable_broker_keys() -> Mapping[str, ConfigKey]:
    return {**BROKER_KEYS, **INERT_KEYS}


def _check_broker(values: Mapping[str, str]) -> None:
    known = _changeable_broker_keys()
    refused = sorted(set(values) - set(known))
    if refused:
        text = f"Cannot update these configs dynamically: [{', '.join(refused)}]"
        raise ConfigError(ErrorCode.INVALID_REQUEST, text)
    for key, value in values.items():
        _check_value(known[key], value, ErrorCode.INVALID_REQUEST)


def _check_group(name: str, values: Mapping[str, str]) -> None:
    for key, value in values.items():
        if key not in GROUP_KEYS:
            raise ConfigError(ErrorCode.INVALID_CONFIG, f"Unknown group config name: {key}")
        _check_value(GROUP_KEYS[key], value, ErrorCode.INVALID_CONFIG)
    for key, (low, high) in _GROUP_LIMITS.items():
        number = int(values.get(key, GROUP_KEYS[key].default))
        setting = GROUP_KEYS[key].broker_name.removeprefix("group.consumer.")
        if number < low:
            text = f"{key} must be greater than or equal to group.consumer.min.{setting}"
            raise ConfigError(ErrorCode.INVALID_CONFIG, text)
        if number > high:
            text = f"{key} must be less than or equal to group.consumer.max.{setting}"
            raise ConfigError(ErrorCode.INVALID_CONFIG, text)
    session, heartbeat = (int(values.get(key, GROUP_KEYS[key].default)) for key in _GROUP_LIMITS)
    if session <= heartbeat:
        raise ConfigError(
            ErrorCode.INVALID_CONFIG,
            f"consumer.session.timeout.ms must be greater than consumer.heartbeat.interval.ms (group {name})",
        )


def _static_values(config: BrokerConfig) -> dict[str, str]:
    """What this process was started with, where it is not Kafka's default."""
    (least_session, most_session), (least_heartbeat, most_heartbeat) = _GROUP_LIMITS.values()
    values = {
        "auto.create.topics.enable": str(config.auto_create_topics).lower(),
        "broker.id": str(NODE_ID),
        "connections.max.idle.ms": str(int(config.connection_idle_seconds * 1000)),
        "connections.max.reauth.ms": str(int(config.security.reauth_seconds * 1000)),
        "group.consumer.max.heartbeat.interval.ms": str(most_heartbeat),
        "group.consumer.max.session.timeout.ms": str(most_session),
        "group.consumer.max.size": "1000",
        "group.consumer.migration.policy": "disabled",
        "group.consumer.min.heartbeat.interval.ms": str(least_heartbeat),
        "group.consumer.min.session.timeout.ms": str(least_session),
        "group.coordinator.rebalance.protocols": "classic,consumer",
        "group.initial.rebalance.delay.ms": str(config.group_initial_rebalance_delay_ms),
        "group.max.size": "1000",
        "group.min.session.timeout.ms": "1000",
        "log.segment.bytes": str(config.segment_bytes),
        "max.connections": str(config.max_connections),
        "message.max.bytes": str(config.max_message_bytes),
        "node.id": str(NODE_ID),
        "num.partitions": str(config.num_partitions),
        "offsets.retention.minutes": str(OFFSETS_RETENTION_MS // 60_000),
        "offsets.topic.num.partitions": "1",
        "offsets.topic.replication.factor": "1",
        "process.roles": "broker,controller",
        "socket.request.max.bytes": str(config.max_frame_bytes),
        "transaction.abort.timed.out.transaction.cleanup.interval.ms": str(
            int(config.transaction_sweep_seconds * 1000)
        ),
        "transaction.max.timeout.ms": str(config.transaction_max_timeout_ms),
        "transaction.state.log.num.partitions": "1",
        "transaction.state.log.replication.factor": "1",
        "transaction.two.phase.commit.enable": str(config.two_phase_commit).lower(),
    }
    defaults = {**BROKER_KEYS, **READ_ONLY_KEYS}
    return {name: value for name, value in values.items() if value != defaults[name].default}

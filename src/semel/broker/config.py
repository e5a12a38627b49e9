"""Settings of the broker and of its topics, with Kafka's names and defaults for the latter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, cast

from semel.broker.security.settings import Listener, Security
from semel.errors import ConfigurationError
from semel.log.log import LogConfig
from semel.wire.frames import MAX_FRAME_BYTES

__all__ = [
    "LEADER_EPOCH",
    "NODE_ID",
    "TOPIC_CONFIGS",
    "BrokerConfig",
    "TopicConfig",
    "check_topic_configs",
    "log_config",
]

NODE_ID = 1
"""This broker's id in Metadata; it is the only node, its own controller, and leads every partition."""
LEADER_EPOCH = 0
"""The leader never changes, so its epoch does not either."""


@dataclass(frozen=True, slots=True)
class BrokerConfig:
    """What can be set about the broker. Every limit has its reason beside it."""

    num_partitions: int = 4
    """Partitions of a topic that is created without saying how many; client suites expect 4."""
    auto_create_topics: bool = True
    transaction_version: int = 2
    """The finalized feature transaction.version: 2 (KIP-890) or 1."""
    two_phase_commit: bool = True
    """Kafka's transaction.two.phase.commit.enable: clients may have transactions that never time out (KIP-939). Kafka's
    default is false, because a forgotten one stops every read_committed reader; here the one app that the broker is
    for asks for it, or nobody does."""
    fsync: Literal["os", "always"] = "os"
    """`os`: acknowledged records survive kill -9. `always`: loss of power too; each append waits for the disk."""
    segment_bytes: int = 1 << 30
    max_message_bytes: int = 1_048_588
    """Kafka's message.max.bytes: limit of one record batch as sent."""
    advertised: str = ""
    """`host:port` that clients are told to connect to; empty: the address by which they came."""
    listeners: tuple[Listener, ...] = ()
    """Where to listen and how; empty: PLAINTEXT on the host and port that the broker is given."""
    security: Security = field(default_factory=Security)
    max_connections: int = 10_000
    """A connection costs about 1 KiB; more than this is a leak in a client."""
    max_frame_bytes: int = MAX_FRAME_BYTES
    connection_idle_seconds: float = 600.0
    """Kafka's connections.max.idle.ms."""
    transaction_max_timeout_ms: int = 900_000
    transaction_sweep_seconds: float = 1.0
    """How often timed-out transactions are looked for; Kafka takes 10 s, and readers wait that much longer."""
    group_initial_rebalance_delay_ms: int = 0
    """How long an empty group's first rebalance waits for more members; Kafka waits 3000."""
    max_topic_partitions: int = 10_000
    """Partitions of all topics together: each costs memory and directory entries."""
    allow_faults: bool = False
    """Whether `control` may install rules that drop, delay and falsify answers: for tests, never for people's data."""

    def __post_init__(self) -> None:
        if self.transaction_version not in (1, 2):
            raise ConfigurationError(f"transaction_version={self.transaction_version} is neither 1 nor 2.")
        if self.fsync not in ("os", "always"):
            raise ConfigurationError(f"fsync={self.fsync!r} is neither 'os' nor 'always'.")
        _, colon, port = self.advertised.rpartition(":")
        if self.advertised and not (colon and port.isdigit()):
            raise ConfigurationError(f"advertised={self.advertised!r} is not host:port, for example 127.0.0.1:9092.")
        self.security.check(self.listeners)
        if self.num_partitions < 1:
            raise ConfigurationError(f"num_partitions={self.num_partitions} must be at least 1.")


_BOOLEAN, _STRING, _INT, _LONG, _DOUBLE, _LIST = 1, 2, 3, 5, 6, 7
"""Types of a config value in DescribeConfigs (org.apache.kafka.clients.admin.ConfigEntry.ConfigType)."""


class TopicConfig(NamedTuple):
    """One topic setting: its default as a string, its type on the wire, its check."""

    default: str
    type: int
    check: Callable[[str], bool]


def _whole(low: int, high: int = (1 << 63) - 1) -> Callable[[str], bool]:
    def check(text: str) -> bool:
        try:
            return low <= int(text) <= high
        except ValueError:
            return False

    return check


def _one_of(*values: str) -> Callable[[str], bool]:
    return lambda text: text in values


def _fraction(text: str) -> bool:
    try:
        return 0.0 <= float(text) <= 1.0
    except ValueError:
        return False


def _policies(text: str) -> bool:
    return all(item.strip() in ("delete", "compact") for item in text.split(",") if item.strip())


_MAX_LONG = str((1 << 63) - 1)
_INT_MAX = (1 << 31) - 1
_YES_NO = _one_of("true", "false")

TOPIC_CONFIGS: Mapping[str, TopicConfig] = {
    "cleanup.policy": TopicConfig("delete", _LIST, _policies),
    "compression.gzip.level": TopicConfig("-1", _INT, _whole(-1, 9)),
    "compression.lz4.level": TopicConfig("9", _INT, _whole(1, 17)),
    "compression.type": TopicConfig(
        "producer", _STRING, _one_of("producer", "uncompressed", "gzip", "snappy", "lz4", "zstd")
    ),
    "compression.zstd.level": TopicConfig("3", _INT, _whole(-131072, 22)),
    "delete.retention.ms": TopicConfig("86400000", _LONG, _whole(0)),
    "file.delete.delay.ms": TopicConfig("60000", _LONG, _whole(0)),
    "flush.messages": TopicConfig(_MAX_LONG, _LONG, _whole(1)),
    "flush.ms": TopicConfig(_MAX_LONG, _LONG, _whole(0)),
    "index.interval.bytes": TopicConfig("4096", _INT, _whole(0, _INT_MAX)),
    "max.compaction.lag.ms": TopicConfig(_MAX_LONG, _LONG, _whole(1)),
    "max.message.bytes": TopicConfig("1048588", _INT, _whole(0, _INT_MAX)),
    "message.timestamp.after.max.ms": TopicConfig("3600000", _LONG, _whole(0)),
    "message.timestamp.before.max.ms": TopicConfig(_MAX_LONG, _LONG, _whole(0)),
    "message.timestamp.type": TopicConfig("CreateTime", _STRING, _one_of("CreateTime", "LogAppendTime")),
    "min.cleanable.dirty.ratio": TopicConfig("0.5", _DOUBLE, _fraction),
    "min.compaction.lag.ms": TopicConfig("0", _LONG, _whole(0)),
    "min.insync.replicas": TopicConfig("1", _INT, _whole(1, _INT_MAX)),
    "preallocate": TopicConfig("false", _BOOLEAN, _YES_NO),
    "retention.bytes": TopicConfig("-1", _LONG, _whole(-1)),
    "retention.ms": TopicConfig("604800000", _LONG, _whole(-1)),
    "segment.bytes": TopicConfig("1073741824", _INT, _whole(14, _INT_MAX)),
    "segment.index.bytes": TopicConfig("10485760", _INT, _whole(4, _INT_MAX)),
    "segment.jitter.ms": TopicConfig("0", _LONG, _whole(0)),
    "segment.ms": TopicConfig("604800000", _LONG, _whole(1)),
    "unclean.leader.election.enable": TopicConfig("false", _BOOLEAN, _YES_NO),
}
"""Every topic setting that Kafka 4.3 knows and a single node can hold, so that clients which set them are served."""


def check_topic_configs(configs: Mapping[str, str | None]) -> str | None:
    """What is wrong with a topic's settings, or None."""
    for name, value in configs.items():
        known = TOPIC_CONFIGS.get(name)
        if known is None:
            return f"Unknown topic config name: {name}"
        if value is None or not known.check(value):
            return f"Invalid value {value} for configuration {name}"
    return None


def log_config(config: BrokerConfig, overrides: Mapping[str, str]) -> LogConfig:
    """The log settings of a topic: its own, else the broker's."""
    retention = int(overrides.get("retention.ms", TOPIC_CONFIGS["retention.ms"].default))
    after_max = int(
        overrides.get("message.timestamp.after.max.ms", TOPIC_CONFIGS["message.timestamp.after.max.ms"].default)
    )
    timestamp_type = cast(Literal["CreateTime", "LogAppendTime"], overrides.get("message.timestamp.type", "CreateTime"))
    return LogConfig(
        segment_bytes=int(overrides.get("segment.bytes", config.segment_bytes)),
        max_message_bytes=int(overrides.get("max.message.bytes", config.max_message_bytes)),
        timestamp_type=timestamp_type,
        cleanup_policy=overrides.get("cleanup.policy", "delete"),
        retention_ms=retention,
        fsync=config.fsync,
        timestamp_after_max_ms=after_max,
    )

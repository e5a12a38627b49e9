"""Settings of the broker and of its topics, with Kafka's names and defaults for the latter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, cast

from semel.broker.config_keys import TOPIC_KEYS
from semel.broker.security.settings import Listener, Security
from semel.errors import ConfigurationError
from semel.log.log import LogConfig
from semel.wire.frames import MAX_FRAME_BYTES

__all__ = [
    "LEADER_EPOCH",
    "NODE_ID",
    "OFFSETS_RETENTION_MS",
    "BrokerConfig",
    "log_config",
]

NODE_ID = 1
"""This broker's id in Metadata; it is the only node, its own controller, and leads every partition."""
LEADER_EPOCH = 0
"""The leader never changes, so its epoch does not either."""
OFFSETS_RETENTION_MS = 400 * 86_400_000
"""Kafka's default is a week: an app that was off for longer would begin again and do everything it finds twice. Still
finite, because tools leave a group behind with every run."""


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
    cleaner_backoff_seconds: float = 15.0
    """How often topics are looked at for compaction: Kafka's log.cleaner.backoff.ms."""
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


def log_config(config: BrokerConfig, overrides: Mapping[str, str]) -> LogConfig:
    """The log settings of a topic: `overrides` by the topic settings' names, else the broker's."""

    def whole(name: str) -> int:
        return int(overrides.get(name, TOPIC_KEYS[name].default))

    timestamp_type = cast(Literal["CreateTime", "LogAppendTime"], overrides.get("message.timestamp.type", "CreateTime"))
    return LogConfig(
        segment_bytes=int(overrides.get("segment.bytes", config.segment_bytes)),
        max_message_bytes=int(overrides.get("max.message.bytes", config.max_message_bytes)),
        timestamp_type=timestamp_type,
        cleanup_policy=overrides.get("cleanup.policy", "delete"),
        retention_ms=whole("retention.ms"),
        retention_bytes=whole("retention.bytes"),
        segment_ms=whole("segment.ms"),
        delete_retention_ms=whole("delete.retention.ms"),
        min_cleanable_dirty_ratio=float(overrides.get("min.cleanable.dirty.ratio", "0.5")),
        min_compaction_lag_ms=whole("min.compaction.lag.ms"),
        max_compaction_lag_ms=whole("max.compaction.lag.ms"),
        fsync=config.fsync,
        timestamp_after_max_ms=whole("message.timestamp.after.max.ms"),
    )

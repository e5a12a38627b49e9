"""Every setting of topics, the broker and groups by Kafka's name: default, type, check, what it does. Tables only.

What the values are at the moment is in `dynamic_config.py`. Defaults and checks are those of Apache Kafka 4.3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import NamedTuple

__all__ = [
    "BROKER_KEYS",
    "GROUP_KEYS",
    "INERT_KEYS",
    "NO_SYNONYM_KEYS",
    "READ_ONLY_KEYS",
    "TOPIC_KEYS",
    "ConfigKey",
    "ConfigType",
]


class ConfigType(IntEnum):
    """Types of a value in DescribeConfigs (org.apache.kafka.clients.admin.ConfigEntry.ConfigType)."""

    BOOLEAN, STRING, INT, SHORT, LONG, DOUBLE, LIST, CLASS, PASSWORD = range(1, 10)


Check = Callable[[str], str | None]
"""What is wrong with a value, in Kafka's words; None when it is good."""


class ConfigKey(NamedTuple):
    """One setting. A topic's has in `broker_name` the broker setting that stands behind it when it is not set."""

    name: str
    default: str
    type: ConfigType
    check: Check
    doc: str
    broker_name: str = ""

    @property
    def is_sensitive(self) -> bool:
        """Passwords are never shown."""
        return self.type is ConfigType.PASSWORD

    def clean(self, value: str) -> str:
        """The value as it is kept and shown."""
        return value.strip().lower() if self.type is ConfigType.BOOLEAN else value.strip()

    def problem(self, value: str) -> str | None:
        """What is wrong with this value, as Kafka says it, or None."""
        wrong = self.check(value.strip())
        return None if wrong is None else f"Invalid value {value} for configuration {self.name}: {wrong}"


_LIMITS = {
    ConfigType.SHORT: (1 << 15) - 1,
    ConfigType.INT: (1 << 31) - 1,
    ConfigType.LONG: (1 << 63) - 1,
}


def _number(kind: ConfigType, low: int | None, high: int | None = None) -> Check:
    def check(text: str) -> str | None:
        try:
            value = int(text)
        except ValueError:
            return f"Not a number of type {kind.name}"
        if not -_LIMITS[kind] - 1 <= value <= _LIMITS[kind]:
            return f"Not a number of type {kind.name}"
        if low is not None and value < low:
            return f"Value must be at least {low}"
        return f"Value must be no more than {high}" if high is not None and value > high else None

    return check


def _fraction(text: str) -> str | None:
    try:
        value = float(text)
    except ValueError:
        return "Not a number of type DOUBLE"
    if not value >= 0:
        return "Value must be at least 0"
    return "Value must be no more than 1" if value > 1 else None


def _double(text: str) -> str | None:
    try:
        float(text)
    except ValueError:
        return "Not a number of type DOUBLE"
    return None


def _one_of(*values: str) -> Check:
    return lambda text: None if text in values else f"String must be one of: {', '.join(values)}"


def _list_of(*values: str) -> Check:
    def check(text: str) -> str | None:
        items = [item.strip() for item in text.split(",") if item.strip()]
        return None if set(items) <= set(values) else f"String must be one of: {', '.join(values)}"

    return check


def _boolean(text: str) -> str | None:
    return None if text.lower() in ("true", "false") else "Expected value to be either true or false"


def _never(text: str) -> str | None:
    return None if text.lower() == "false" else "there is no tiered storage here"


def _anything(_: str) -> str | None:
    return None


def _gzip_level(text: str) -> str | None:
    problem = _number(ConfigType.INT, None)(text)
    if problem is not None or int(text) == -1 or 1 <= int(text) <= 9:
        return problem
    return "Value must be between 1 and 9 or equal to -1"


def _int(name: str, default: int, low: int | None, doc: str, broker: str = "", high: int | None = None) -> ConfigKey:
    return ConfigKey(name, str(default), ConfigType.INT, _number(ConfigType.INT, low, high), doc, broker)


def _long(name: str, default: int, low: int | None, doc: str, broker: str = "") -> ConfigKey:
    return ConfigKey(name, str(default), ConfigType.LONG, _number(ConfigType.LONG, low), doc, broker)


def _flag(name: str, default: bool, doc: str, broker: str = "") -> ConfigKey:
    return ConfigKey(name, str(default).lower(), ConfigType.BOOLEAN, _boolean, doc, broker)


def _text(name: str, default: str, doc: str, check: Check = _anything, broker: str = "") -> ConfigKey:
    return ConfigKey(name, default, ConfigType.STRING, check, doc, broker)


def _list(name: str, default: str, doc: str, check: Check = _anything, broker: str = "") -> ConfigKey:
    return ConfigKey(name, default, ConfigType.LIST, check, doc, broker)


def _secret(name: str) -> ConfigKey:
    return ConfigKey(name, "", ConfigType.PASSWORD, _anything, "Never shown.")


def _table(*keys: ConfigKey) -> Mapping[str, ConfigKey]:
    return {key.name: key for key in keys}


_MAX_LONG = (1 << 63) - 1
_NO_EFFECT = "Kept and shown, without effect: "
_ALONE = _NO_EFFECT + "this broker is alone."
_NOT_TIERED = _NO_EFFECT + "there is no tiered storage here."
_CODECS = ("uncompressed", "zstd", "lz4", "snappy", "gzip", "producer")

TOPIC_KEYS = _table(
    _list(
        "cleanup.policy",
        "delete",
        "What happens to old records: delete drops old segments, compact keeps the last record of each key.",
        _list_of("compact", "delete"),
        "log.cleanup.policy",
    ),
    ConfigKey(
        "compression.gzip.level",
        "-1",
        ConfigType.INT,
        _gzip_level,
        _NO_EFFECT + "batches stay as they were sent.",
        "compression.gzip.level",
    ),
    _int(
        "compression.lz4.level",
        9,
        1,
        _NO_EFFECT + "batches stay as they were sent.",
        "compression.lz4.level",
        17,
    ),
    _text(
        "compression.type",
        "producer",
        "Batches stay as the producer sent them, whatever is set.",
        _one_of(*_CODECS),
        "compression.type",
    ),
    _int(
        "compression.zstd.level",
        3,
        -131072,
        _NO_EFFECT + "batches stay as they were sent.",
        "compression.zstd.level",
        22,
    ),
    _long(
        "delete.retention.ms",
        86_400_000,
        0,
        "How long a compacted topic keeps the record that says a key is gone.",
        "log.cleaner.delete.retention.ms",
    ),
    _long(
        "file.delete.delay.ms",
        60_000,
        0,
        _NO_EFFECT + "files go at once, readers that have one open keep it.",
        "log.segment.delete.delay.ms",
    ),
    _long(
        "flush.messages",
        _MAX_LONG,
        1,
        _NO_EFFECT + "see the broker's --fsync.",
        "log.flush.interval.messages",
    ),
    _long("flush.ms", _MAX_LONG, 0, _NO_EFFECT + "see the broker's --fsync.", "log.flush.interval.ms"),
    _list("follower.replication.throttled.replicas", "", _ALONE),
    _int("index.interval.bytes", 4096, 0, _NO_EFFECT + "indexes are made in memory.", "log.index.interval.bytes"),
    _list("leader.replication.throttled.replicas", "", _ALONE),
    _long("local.retention.bytes", -2, -2, _NOT_TIERED, "log.local.retention.bytes"),
    _long("local.retention.ms", -2, -2, _NOT_TIERED, "log.local.retention.ms"),
    _long(
        "max.compaction.lag.ms",
        _MAX_LONG,
        1,
        "Compaction looks at a record this long after it came, at the latest.",
        "log.cleaner.max.compaction.lag.ms",
    ),
    _int("max.message.bytes", 1_048_588, 0, "Largest record batch, as sent.", "message.max.bytes"),
    _long(
        "message.timestamp.after.max.ms",
        3_600_000,
        0,
        "How far a record's own timestamp may lie in the future.",
        "log.message.timestamp.after.max.ms",
    ),
    _long(
        "message.timestamp.before.max.ms",
        _MAX_LONG,
        0,
        "How far a record's own timestamp may lie in the past.",
        "log.message.timestamp.before.max.ms",
    ),
    _text(
        "message.timestamp.type",
        "CreateTime",
        "Whose clock a record's timestamp is: the producer's (CreateTime) or the broker's (LogAppendTime).",
        _one_of("CreateTime", "LogAppendTime"),
        "log.message.timestamp.type",
    ),
    ConfigKey(
        "min.cleanable.dirty.ratio",
        "0.5",
        ConfigType.DOUBLE,
        _fraction,
        "Share of a compacted log that is new before it is compacted again.",
        "log.cleaner.min.cleanable.ratio",
    ),
    _long(
        "min.compaction.lag.ms",
        0,
        0,
        "Compaction leaves a record alone for this long.",
        "log.cleaner.min.compaction.lag.ms",
    ),
    _int("min.insync.replicas", 1, 1, _ALONE, "min.insync.replicas"),
    _flag("preallocate", False, _NO_EFFECT + "files grow as they are written.", "log.preallocate"),
    _flag("remote.log.copy.disable", False, _NOT_TIERED),
    _flag("remote.log.delete.on.disable", False, _NOT_TIERED),
    ConfigKey("remote.storage.enable", "false", ConfigType.BOOLEAN, _never, _NOT_TIERED),
    _long(
        "retention.bytes", -1, None, "Size of a partition above which old segments go; -1: any.", "log.retention.bytes"
    ),
    _long("retention.ms", 604_800_000, -1, "Age at which segments go; -1: never.", "log.retention.ms"),
    _int("segment.bytes", 1 << 30, 1 << 20, "Size at which a new segment begins.", "log.segment.bytes"),
    _int("segment.index.bytes", 10_485_760, 4, _NO_EFFECT + "indexes are made in memory.", "log.index.size.max.bytes"),
    _long("segment.jitter.ms", 0, 0, "At most so much is taken off segment.ms.", "log.roll.jitter.ms"),
    _long("segment.ms", 604_800_000, 1, "Age at which a new segment begins.", "log.roll.ms"),
    _flag("unclean.leader.election.enable", False, _ALONE, "unclean.leader.election.enable"),
)
"""Every topic setting that Kafka 4.3.1 shows."""


def _behind(key: ConfigKey) -> ConfigKey:
    return key._replace(name=key.broker_name, broker_name="", doc=f"Of topics that do not set {key.name}: {key.doc}")


BROKER_KEYS = _table(*(_behind(key) for key in TOPIC_KEYS.values() if key.broker_name))
"""Broker settings that can change while it runs and act at once: they stand behind the topics' own."""

_LOGINS = _NO_EFFECT + "there are no Kerberos logins here."
_THREADS = _NO_EFFECT + "this broker has one thread."
_CLEANER = _NO_EFFECT + "the compaction here needs no tuning."
INERT_KEYS = _table(
    _int("background.threads", 10, 1, _THREADS),
    _int("group.consumer.assignment.interval.ms", 1000, 0, _NO_EFFECT + "assignments are made at once."),
    _long("log.cleaner.backoff.ms", 15_000, 0, _CLEANER),
    _long("log.cleaner.dedupe.buffer.size", 134_217_728, None, _CLEANER),
    ConfigKey("log.cleaner.io.buffer.load.factor", "0.9", ConfigType.DOUBLE, _double, _CLEANER),
    _int("log.cleaner.io.buffer.size", 524_288, 0, _CLEANER),
    ConfigKey("log.cleaner.io.max.bytes.per.second", "1.7976931348623157E308", ConfigType.DOUBLE, _double, _CLEANER),
    _int("log.cleaner.threads", 1, 0, _CLEANER),
    _int("num.io.threads", 8, 1, _THREADS),
    _int("num.network.threads", 3, 1, _THREADS),
    _int("num.recovery.threads.per.data.dir", 2, 1, _THREADS),
    _int("num.replica.fetchers", 1, None, _ALONE),
    _long("sasl.kerberos.min.time.before.relogin", 60_000, None, _LOGINS),
    ConfigKey("sasl.kerberos.ticket.renew.jitter", "0.05", ConfigType.DOUBLE, _double, _LOGINS),
    ConfigKey("sasl.kerberos.ticket.renew.window.factor", "0.8", ConfigType.DOUBLE, _double, _LOGINS),
)
"""Settings that tools change on any Kafka broker and that mean nothing here: kept and shown."""

READ_ONLY_KEYS = _table(
    _list("advertised.listeners", "", "Where clients are told to connect."),
    _list("listeners", "PLAINTEXT://:9092", "Where the broker listens."),
    _flag("auto.create.topics.enable", True, "Whether a topic that somebody asks for is made."),
    _int("broker.id", -1, None, "This node."),
    _long("connections.max.idle.ms", 600_000, None, "A connection that is silent for this long is closed."),
    _long("connections.max.reauth.ms", 0, None, "How long a login is good for; 0: as long as the connection."),
    _int("default.replication.factor", 1, 1, "There is one node."),
    _flag("delete.topic.enable", True, "Topics can be deleted."),
    _list("group.consumer.assignors", "uniform,range", "Assignors of consumer groups, the default one first."),
    _int("group.consumer.heartbeat.interval.ms", 5000, 1, "See the group setting consumer.heartbeat.interval.ms."),
    _int("group.consumer.max.heartbeat.interval.ms", 15_000, 1, "Longest consumer.heartbeat.interval.ms."),
    _int("group.consumer.max.session.timeout.ms", 60_000, 1, "Longest consumer.session.timeout.ms."),
    _int("group.consumer.max.size", (1 << 31) - 1, 1, "Members of one consumer group."),
    _text("group.consumer.migration.policy", "bidirectional", "Which groups may change their protocol online."),
    _int("group.consumer.min.heartbeat.interval.ms", 5000, 1, "Shortest consumer.heartbeat.interval.ms."),
    _int("group.consumer.min.session.timeout.ms", 45_000, 1, "Shortest consumer.session.timeout.ms."),
    _int("group.consumer.session.timeout.ms", 45_000, 1, "See the group setting consumer.session.timeout.ms."),
    _list("group.coordinator.rebalance.protocols", "classic,consumer,streams", "Group protocols that are served."),
    _int("group.initial.rebalance.delay.ms", 3000, 0, "How long an empty group waits for more members."),
    _int("group.max.session.timeout.ms", 1_800_000, None, "Longest session of a member of a classic group."),
    _int("group.max.size", (1 << 31) - 1, 1, "Members of one classic group."),
    _int("group.min.session.timeout.ms", 6000, None, "Shortest session of a member of a classic group."),
    _list("log.dirs", "", "Where the records are."),
    _long("log.retention.check.interval.ms", 300_000, 1, "How often old segments are looked for."),
    _int("max.connections", (1 << 31) - 1, 0, "Connections at once."),
    _int("node.id", -1, None, "This node."),
    _int("num.partitions", 1, 1, "Partitions of a topic that is made without saying how many."),
    _int("offset.metadata.max.bytes", 4096, None, "Largest text beside a committed offset."),
    _int("offsets.retention.minutes", 10_080, 1, "Offsets of an empty group go after this time."),
    _int("offsets.topic.num.partitions", 50, 1, "Partitions of __consumer_offsets."),
    _int("offsets.topic.replication.factor", 3, 1, "There is one node."),
    _list("process.roles", "", "This node is everything."),
    _secret("sasl.jaas.config"),
    _int("socket.request.max.bytes", 104_857_600, 1, "Largest request."),
    _secret("ssl.key.password"),
    _secret("ssl.keystore.password"),
    _secret("ssl.truststore.password"),
    _int(
        "transaction.abort.timed.out.transaction.cleanup.interval.ms",
        10_000,
        1,
        "How often transactions that are over time are looked for.",
    ),
    _int("transaction.max.timeout.ms", 900_000, 1, "Longest transaction.timeout.ms of a producer."),
    _int("transaction.state.log.num.partitions", 50, 1, "Partitions of __transaction_state."),
    _int("transaction.state.log.replication.factor", 3, 1, "There is one node."),
    _flag("transaction.two.phase.commit.enable", False, "Transactions without time-out (KIP-939)."),
)
"""Settings of the process: chosen when it starts, shown, changed by no request. Defaults are Kafka's, not ours."""

GROUP_KEYS = _table(
    _int(
        "consumer.assignment.interval.ms",
        1000,
        0,
        _NO_EFFECT + "assignments are made at once.",
        "group.consumer.assignment.interval.ms",
    ),
    _int(
        "consumer.heartbeat.interval.ms",
        5000,
        1,
        "How often members of a consumer group (KIP-848) are told to report.",
        "group.consumer.heartbeat.interval.ms",
    ),
    _int(
        "consumer.session.timeout.ms",
        45_000,
        1,
        "A member of a consumer group (KIP-848) that is silent for this long is out.",
        "group.consumer.session.timeout.ms",
    ),
)
"""Settings of one group (KIP-848)."""

NO_SYNONYM_KEYS = frozenset(
    {
        # These have no value in Apache Kafka until they are set: a coarser setting (hours, the checkpoint) holds.
        "log.flush.interval.ms",
        "log.retention.ms",
        "log.roll.jitter.ms",
        "log.roll.ms",
        # And nothing of the broker's stands behind these.
        *(key.name for key in TOPIC_KEYS.values() if not key.broker_name),
    }
)
"""Defaults that DescribeConfigs does not list among a setting's synonyms."""

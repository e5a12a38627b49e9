"""Settings of our Kafka client, under librdkafka's names: the ones that it knows, and what it says to all others.

Producers, consumers and admin calls take the same settings. What would weaken a promise is refused by name, and so is
what nobody here would follow: a setting that is ignored in silence is a mistake that nobody finds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from semel.client.fetcher import FetchLimits
from semel.client.security import REFUSED, SECURITY_SETTINGS, ClientSecurity
from semel.errors import ConfigurationError

__all__ = ["CONSUMER_DEFAULTS", "DEFAULTS", "SETTINGS", "ClientSettings", "ConsumerSettings", "Default"]


@dataclass(frozen=True, slots=True)
class Default:
    """One setting's default value and why it is that."""

    value: int
    reason: str


DEFAULTS: dict[str, Default] = {
    "socket.timeout.ms": Default(
        10_000, "an unanswered request: above any sane pause of a broker, far below librdkafka's 60 s"
    ),
    "request.timeout.ms": Default(5_000, "how long the broker may wait for replicas; it must answer before we give up"),
    "socket.connection.setup.timeout.ms": Default(5_000, "a SYN that nobody answers; librdkafka waits 30 s"),
    "reconnect.backoff.ms": Default(20, "a restarted embedded broker is back in well under a second"),
    "reconnect.backoff.max.ms": Default(1_000, "a broker that stays away must not be hammered"),
    "retry.backoff.ms": Default(5, "CONCURRENT_TRANSACTIONS clears within milliseconds"),
    "retry.backoff.max.ms": Default(500, "leader elections take seconds; half a second keeps the recovery short"),
    "delivery.timeout.ms": Default(
        30_000, "every retry ends here; transactions live 10 s by default, so later is too late anyway"
    ),
    "max.in.flight.requests.per.connection": Default(5, "a broker remembers five batches a producer for duplicates"),
    "queue.buffering.max.kbytes": Default(65_536, "records waiting in memory; above it produce() waits"),
    "batch.size": Default(524_288, "upper bound of one non-transactional batch; half of max.message.bytes' default"),
}

CONSUMER_DEFAULTS: dict[str, Default] = {
    "fetch.wait.max.ms": Default(500, "a broker without news answers twice a second"),
    "fetch.min.bytes": Default(1, "what is there is wanted"),
    "fetch.max.bytes": Default(8 * 1_048_576, "one answer: a quarter of what may wait in memory"),
    "max.partition.fetch.bytes": Default(1_048_576, "one partition's part of an answer, as in every other client"),
    "max.poll.interval.ms": Default(300_000, "who asks for nothing for so long shall not keep others from the work"),
}

_ALIASES = {
    "fetch.message.max.bytes": "max.partition.fetch.bytes",
    "message.timeout.ms": "delivery.timeout.ms",
    "max.in.flight": "max.in.flight.requests.per.connection",
    "message.max.bytes": "batch.size",
}
_GROUP_SETTINGS = ("group.protocol", "group.remote.assignor")
_NO = ("false", "False", "0")
_YES = ("true", "True", "1")
_WRITING = "exactly-once writing needs an idempotent producer"
_FIXED = {
    "enable.idempotence": (_YES, _WRITING),
    "acks": (("all", "-1"), _WRITING),
    "request.required.acks": (("all", "-1"), _WRITING),
    "isolation.level": (("read_committed",), "a reader of uncommitted records sees aborted ones"),
    "enable.auto.commit": (_NO, "positions are committed with the effects, never beside them"),
    "auto.offset.reset": (
        ("error", "none"),
        "a group without a position begins at the start of the log, and one whose position is gone stops and says so",
    ),
    "allow.auto.create.topics": (_NO, "topics are made as the app declares them"),
    "check.crcs": (_YES, "every batch's checksum is checked"),
    "partition.assignment.strategy": (
        ("range",),
        "members keep their place over a restart, and with cooperative rebalances that can leave a partition without "
        "an owner; with group.protocol=consumer the broker shares them out, and who has nothing to give back goes on",
    ),
}
"""Settings that may be given as long as they say what is done anyway: the values, and why it is so."""

_ELSEWHERE = {
    "bootstrap.servers": "the address is SEMEL_KAFKA",
    "client.id": "every client of Semel has a name that says what it does",
    "client.rack": "records are read from the leaders of partitions, never from followers",
    "compression.codec": 'each topic says it: app.topic(..., compression="lz4"); all of Kafka\'s compressions are read',
    "compression.type": 'each topic says it: app.topic(..., compression="lz4"); all of Kafka\'s compressions are read',
    "group.id": "each component's group is named after the app and the component",
    "group.instance.id": "a worker's place in its groups is made from SEMEL_INSTANCE and its slot",
    "heartbeat.interval.ms": "they are sent four times a session, whose length is SEMEL_SESSION_TIMEOUT_MS",
    "linger.ms": "SEMEL_COMMIT_INTERVAL_MS, or latency= in the app, says how long records gather",
    "queue.buffering.max.ms": "SEMEL_COMMIT_INTERVAL_MS, or latency= in the app, says how long records gather",
    "session.timeout.ms": "set SEMEL_SESSION_TIMEOUT_MS",
    "transaction.timeout.ms": "set SEMEL_TRANSACTION_TIMEOUT_MS",
    "transactional.id": "it is made from the app, the component, SEMEL_INSTANCE and the slot",
}
"""What others' clients call so, and what says it here."""

SETTINGS = frozenset([*DEFAULTS, *CONSUMER_DEFAULTS, *_ALIASES, *_FIXED, *_GROUP_SETTINGS, *SECURITY_SETTINGS])
"""Every name that may be given."""


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """The checked settings; times in seconds."""

    socket_timeout: float
    request_timeout_ms: int
    connect_timeout: float
    reconnect_backoff: float
    reconnect_backoff_max: float
    retry_backoff: float
    retry_backoff_max: float
    delivery_timeout: float
    max_in_flight: int
    buffer_bytes_max: int
    batch_bytes_max: int
    security: ClientSecurity
    consumer: ConsumerSettings

    @classmethod
    def read(cls, settings: Mapping[str, object] | None) -> ClientSettings:
        """Check all of them and read; raises `ConfigurationError`, which names the setting and what would be right."""
        given = settings or {}
        _check_names(given)
        security = ClientSecurity.read(given)
        values = _numbers(DEFAULTS, given)
        if values["max.in.flight.requests.per.connection"] > 5:
            raise ConfigurationError(
                "max.in.flight.requests.per.connection above 5 is refused: a broker remembers five batches a producer, "
                "and a sixth would be written twice when it is sent again. Set 1 to 5."
            )
        return cls(
            socket_timeout=values["socket.timeout.ms"] / 1000,
            request_timeout_ms=min(values["request.timeout.ms"], values["socket.timeout.ms"]),
            connect_timeout=values["socket.connection.setup.timeout.ms"] / 1000,
            reconnect_backoff=values["reconnect.backoff.ms"] / 1000,
            reconnect_backoff_max=values["reconnect.backoff.max.ms"] / 1000,
            retry_backoff=values["retry.backoff.ms"] / 1000,
            retry_backoff_max=values["retry.backoff.max.ms"] / 1000,
            delivery_timeout=values["delivery.timeout.ms"] / 1000,
            max_in_flight=values["max.in.flight.requests.per.connection"],
            buffer_bytes_max=values["queue.buffering.max.kbytes"] * 1024,
            batch_bytes_max=values["batch.size"],
            security=security,
            consumer=ConsumerSettings.read(given),
        )


@dataclass(frozen=True, slots=True)
class ConsumerSettings:
    """The checked settings of a consumer; times in seconds."""

    limits: FetchLimits
    poll_interval: float
    group_protocol: str
    assignor: str | None

    @classmethod
    def read(cls, given: Mapping[str, object]) -> ConsumerSettings:
        """A consumer's part of settings whose names are checked; raises `ConfigurationError`."""
        values = _numbers(CONSUMER_DEFAULTS, given)
        protocol = str(given.get("group.protocol", "classic"))
        if protocol not in ("classic", "consumer"):
            raise ConfigurationError(f"group.protocol={protocol} is not known. Set it to classic or consumer.")
        assignor = given.get("group.remote.assignor")
        if assignor is not None and protocol == "classic":
            raise ConfigurationError(
                f"group.remote.assignor={assignor} has no meaning with group.protocol=classic, in which a member "
                "shares the partitions out. Leave it out, or set group.protocol=consumer."
            )
        return cls(
            limits=FetchLimits(
                values["fetch.wait.max.ms"],
                values["fetch.min.bytes"],
                values["fetch.max.bytes"],
                values["max.partition.fetch.bytes"],
            ),
            poll_interval=values["max.poll.interval.ms"] / 1000,
            group_protocol=protocol,
            assignor=None if assignor is None else str(assignor),
        )


def _check_names(settings: Mapping[str, object]) -> None:
    """Raise `ConfigurationError` for a name that nobody here follows, and for a value that is not what is done."""
    for name, value in settings.items():
        allowed, why = _FIXED.get(name, ((), ""))
        if allowed and str(value) not in allowed:
            raise ConfigurationError(f"{name}={value} is refused: {why}. Leave it out or set it to {allowed[0]}.")
        if name in SETTINGS or name in REFUSED:
            continue
        if name in _ELSEWHERE:
            raise ConfigurationError(f"{name} is no setting of Semel's Kafka client: {_ELSEWHERE[name]}. Leave it out.")
        close = get_close_matches(name, SETTINGS, 1, 0.8)
        raise ConfigurationError(
            f"{name} is no setting of Semel's Kafka client, so nobody would follow it. "
            + (f"Did you mean {close[0]}?" if close else "Leave it out; docs/howto.md lists those that it knows.")
        )


def _numbers(defaults: Mapping[str, Default], given: Mapping[str, object]) -> dict[str, int]:
    values = {name: default.value for name, default in defaults.items()}
    for name, value in given.items():
        known = _ALIASES.get(name, name)
        if known in values:
            values[known] = _positive(name, value)
    return values


def _positive(name: str, value: object) -> int:
    try:
        number = int(str(value))
    except ValueError:
        raise ConfigurationError(f"{name}={value!r} is not a whole number.") from None
    if number < 1:
        raise ConfigurationError(f"{name}={number} must be at least 1.")
    return number

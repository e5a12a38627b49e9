"""Settings of our Kafka client, under librdkafka's names.

The producer and the admin calls read the ones in `DEFAULTS`, consumers those in `CONSUMER_DEFAULTS` too; settings of
librdkafka that have no meaning here are left alone. What would weaken a promise is refused, by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from semel.client.fetcher import FetchLimits
from semel.client.security import ClientSecurity
from semel.errors import ConfigurationError

__all__ = ["CONSUMER_DEFAULTS", "DEFAULTS", "ClientSettings", "ConsumerSettings", "Default"]


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
_REFUSED = {
    "enable.idempotence": ("true", "True", "1"),
    "acks": ("all", "-1"),
    "request.required.acks": ("all", "-1"),
    "isolation.level": ("read_committed",),
    "enable.auto.commit": ("false", "False", "0"),
}
_WHY_REFUSED = {
    "isolation.level": "a reader of uncommitted records sees aborted ones",
    "enable.auto.commit": "positions are committed with the effects, never beside them",
}


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

    @classmethod
    def read(cls, settings: Mapping[str, object] | None) -> ClientSettings:
        """Check and read; raises `ConfigurationError`, which names the setting and what would be right."""
        values = {name: default.value for name, default in DEFAULTS.items()}
        for name, value in (settings or {}).items():
            allowed = _REFUSED.get(name)
            if allowed is not None and str(value) not in allowed:
                why = _WHY_REFUSED.get(name, "exactly-once writing needs an idempotent producer")
                raise ConfigurationError(f"{name}={value} is refused: {why}. Leave it out or set it to {allowed[0]}.")
            known = _ALIASES.get(name, name)
            if known in values:
                values[known] = _positive(name, value)
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
            security=ClientSecurity.read(settings or {}),
        )


@dataclass(frozen=True, slots=True)
class ConsumerSettings:
    """The checked settings of a consumer; times in seconds."""

    limits: FetchLimits
    poll_interval: float
    group_protocol: str
    assignor: str | None

    @classmethod
    def read(cls, settings: Mapping[str, object] | None) -> ConsumerSettings:
        """Check and read; raises `ConfigurationError`, which names the setting and what would be right."""
        values = {name: default.value for name, default in CONSUMER_DEFAULTS.items()}
        given = {_ALIASES.get(name, name): value for name, value in (settings or {}).items()}
        values |= {name: _positive(name, value) for name, value in given.items() if name in values}
        protocol = str(given.get("group.protocol", "classic"))
        if protocol not in ("classic", "consumer"):
            raise ConfigurationError(f"group.protocol={protocol} is not known. Set it to classic or consumer.")
        assignor = given.get("group.remote.assignor")
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


def _positive(name: str, value: object) -> int:
    try:
        number = int(str(value))
    except ValueError:
        raise ConfigurationError(f"{name}={value!r} is not a whole number.") from None
    if number < 1:
        raise ConfigurationError(f"{name}={number} must be at least 1.")
    return number

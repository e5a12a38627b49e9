"""`semel broker --config FILE`: listeners, security and limits under the names of Kafka's server.properties.

What has an option on the command line is not in here, so nothing can be said in two places. Passwords stand in files
or in the environment, never in an argument that `ps` shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from semel.broker.config import BrokerConfig
from semel.broker.security.settings import Listener, Security, TlsFiles
from semel.errors import ConfigurationError

__all__ = ["USERS_VARIABLE", "configured", "read_users"]

USERS_VARIABLE = "SEMEL_BROKER_USERS"
"""Environment: `name:password` a line, beside those of users.file."""
_ELSEWHERE = {
    "auto.create.topics.enable": "--auto-create-topics",
    "log.dirs": "--data",
    "num.partitions": "--partitions",
    "transaction.two.phase.commit.enable": "--two-phase-commit",
}
_LIMITS: Mapping[str, tuple[str, Callable[[int], int | float]]] = {
    "connections.max.idle.ms": ("connection_idle_seconds", lambda ms: ms / 1000),
    "group.initial.rebalance.delay.ms": ("group_initial_rebalance_delay_ms", int),
    "log.segment.bytes": ("segment_bytes", int),
    "max.connections": ("max_connections", int),
    "message.max.bytes": ("max_message_bytes", int),
    "socket.request.max.bytes": ("max_frame_bytes", int),
    "transaction.max.timeout.ms": ("transaction_max_timeout_ms", int),
}
_SECURITY = frozenset(
    {
        "advertised.listeners",
        "allow.everyone.if.no.acl.found",
        "authorizer.class.name",
        "connections.max.reauth.ms",
        "listener.security.protocol.map",
        "listeners",
        "sasl.enabled.mechanisms",
        "ssl.client.auth",
        "ssl.key.location",
        "ssl.key.password",
        "ssl.keystore.location",
        "ssl.keystore.type",
        "ssl.truststore.location",
        "ssl.truststore.type",
        "super.users",
        "users.file",
    }
)
_AUTHORIZERS = ("org.apache.kafka.metadata.authorizer.StandardAuthorizer", "kafka.security.authorizer.AclAuthorizer")
"""Names that Kafka users write; both mean the rules of `broker.security.acls`."""


def read_users(text: str, where: str) -> dict[str, str]:
    """`name:password` a line. Raises `ConfigurationError`, which never shows the line."""
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, colon, password = line.strip().partition(":")
        if not (name and colon and password):
            raise ConfigurationError(f"{where}, line {number} is not name:password.")
        found[name] = password
    return found


def configured(base: BrokerConfig, properties: Mapping[str, str], environ: Mapping[str, str]) -> BrokerConfig:
    """The configuration with what the file and the environment say. Raises `ConfigurationError`."""
    for name in properties:
        if name in _ELSEWHERE:
            raise ConfigurationError(f"{name} is an option of `semel broker`: {_ELSEWHERE[name]}.")
        if name not in _SECURITY and name not in _LIMITS:
            known = ", ".join(sorted(_SECURITY | _LIMITS.keys()))
            raise ConfigurationError(f"{name} is not known to this broker. It knows: {known}.")
    changes: dict[str, Any] = {}
    for name, (attribute, convert) in _LIMITS.items():
        if name in properties:
            changes[attribute] = convert(_whole(name, properties[name]))
    return replace(base, listeners=_listeners(properties), security=_security(properties, environ), **changes)


def _listeners(properties: Mapping[str, str]) -> tuple[Listener, ...]:
    protocols = dict(_pair(item) for item in _list(properties, "listener.security.protocol.map"))
    listeners = [Listener.parse(item, protocols) for item in _list(properties, "listeners")]
    names = [item.partition("://")[0] for item in _list(properties, "listeners")]
    advertised = dict(item.partition("://")[::2] for item in _list(properties, "advertised.listeners"))
    if advertised.keys() - set(names):
        unknown = ", ".join(sorted(advertised.keys() - set(names)))
        raise ConfigurationError(f"advertised.listeners names {unknown}, and listeners does not.")
    for text in _list(properties, "advertised.listeners"):
        if not Listener.parse(text, protocols).port:
            raise ConfigurationError(f"advertised.listeners={text}: clients cannot connect to port 0.")
    return tuple(
        replace(listener, advertised=advertised.get(name, "")) for name, listener in zip(names, listeners, strict=True)
    )


def _pair(item: str) -> tuple[str, str]:
    name, colon, protocol = item.partition(":")
    if not (name and colon and protocol):
        raise ConfigurationError(f"listener.security.protocol.map={item!r} is not NAME:PROTOCOL.")
    return name, protocol


def _security(properties: Mapping[str, str], environ: Mapping[str, str]) -> Security:
    for name in ("ssl.keystore.type", "ssl.truststore.type"):
        if properties.get(name, "PEM").upper() != "PEM":
            raise ConfigurationError(f"{name}={properties[name]} is not supported: use PEM files.")
    authorizer = properties.get("authorizer.class.name", "")
    if authorizer and authorizer not in _AUTHORIZERS:
        raise ConfigurationError(f"authorizer.class.name={authorizer} is not supported: use {_AUTHORIZERS[0]}.")
    users: dict[str, str] = {}
    if "users.file" in properties:
        path = Path(properties["users.file"])
        try:
            users |= read_users(path.read_text(), str(path))
        except (OSError, UnicodeDecodeError):
            raise ConfigurationError(f"users.file={path} cannot be read.") from None
    users |= read_users(environ.get(USERS_VARIABLE, ""), USERS_VARIABLE)
    given: dict[str, Any] = {}
    if "sasl.enabled.mechanisms" in properties:
        given["mechanisms"] = tuple(_list(properties, "sasl.enabled.mechanisms"))
    return Security(
        users=users,
        authorize=bool(authorizer),
        super_users=tuple(item.strip() for item in properties.get("super.users", "").split(";") if item.strip()),
        allow_everyone_if_no_acl=_yes(properties, "allow.everyone.if.no.acl.found"),
        reauth_seconds=_whole("connections.max.reauth.ms", properties.get("connections.max.reauth.ms", "0")) / 1000,
        tls=_tls(properties),
        **given,
    )


def _tls(properties: Mapping[str, str]) -> TlsFiles | None:
    keystore = properties.get("ssl.keystore.location", "")
    if not keystore:
        return None
    key, truststore = properties.get("ssl.key.location", ""), properties.get("ssl.truststore.location", "")
    return TlsFiles(
        Path(keystore),
        Path(key) if key else None,
        properties.get("ssl.key.password", ""),
        Path(truststore) if truststore else None,
        cast(Any, properties.get("ssl.client.auth", "none")),
    )


def _list(properties: Mapping[str, str], name: str) -> list[str]:
    return [item.strip() for item in properties.get(name, "").split(",") if item.strip()]


def _whole(name: str, text: str) -> int:
    if not text.isdecimal():
        raise ConfigurationError(f"{name}={text!r} is not a whole number.")
    return int(text)


def _yes(properties: Mapping[str, str], name: str) -> bool:
    text = properties.get(name, "false").lower()
    if text not in ("true", "false"):
        raise ConfigurationError(f"{name}={text!r} is neither true nor false.")
    return text == "true"

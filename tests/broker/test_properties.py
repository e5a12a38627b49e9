"""The broker's file: Kafka's names, and nothing that cannot work."""

from __future__ import annotations

from pathlib import Path

import pytest

from semel.broker.config import BrokerConfig
from semel.broker.properties import USERS_VARIABLE, configured
from semel.broker.security.settings import Listener
from semel.errors import ConfigurationError

SECRET = "canary-secret"


def read(properties: dict[str, str], environ: dict[str, str] | None = None) -> BrokerConfig:
    return configured(BrokerConfig(), properties, environ or {})


def test_nothing_said_is_the_default() -> None:
    assert read({}) == BrokerConfig()


def test_what_a_kafka_user_writes(tmp_path: Path) -> None:
    users = tmp_path / "users"
    users.write_text(f"# people\nadmin:{SECRET}:with:colons\n\nalice:pw\n")
    config = read(
        {
            "listeners": "INSIDE://127.0.0.1:9092, OUTSIDE://0.0.0.0:9093",
            "advertised.listeners": "OUTSIDE://kafka.example:443",
            "listener.security.protocol.map": "INSIDE:PLAINTEXT,OUTSIDE:SASL_SSL",
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": "/etc/broker.pem",
            "ssl.key.password": SECRET,
            "sasl.enabled.mechanisms": "SCRAM-SHA-512",
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:admin;User:CN=broker,O=Example",
            "connections.max.reauth.ms": "3600000",
            "users.file": str(users),
            "connections.max.idle.ms": "60000",
            "max.connections": "5",
        },
        {USERS_VARIABLE: "bob:pw2\n"},
    )
    assert config.listeners == (
        Listener("PLAINTEXT", "127.0.0.1", 9092),
        Listener("SASL_SSL", "0.0.0.0", 9093, "kafka.example:443"),
    )
    security = config.security
    assert security.users == {"admin": f"{SECRET}:with:colons", "alice": "pw", "bob": "pw2"}
    assert security.super_users == ("User:admin", "User:CN=broker,O=Example")
    assert security.authorize
    assert not security.allow_everyone_if_no_acl
    assert security.mechanisms == ("SCRAM-SHA-512",)
    assert (security.reauth_seconds, config.connection_idle_seconds, config.max_connections) == (3600, 60, 5)
    assert SECRET not in repr(config)


@pytest.mark.parametrize(
    ("properties", "word"),
    [
        ({"listners": "PLAINTEXT://a:1"}, "listners is not known"),
        ({"num.partitions": "3"}, "--partitions"),
        ({"listeners": "PLAINTEXT:9092"}, "PROTOCOL://host:port"),
        ({"listeners": "OUTSIDE://a:9092"}, "none of PLAINTEXT"),
        ({"listeners": "SSL://a:9092"}, "ssl.keystore.location"),
        ({"listeners": "SASL_SSL://a:9092", "ssl.keystore.type": "JKS"}, "PEM"),
        ({"listeners": "SASL_PLAINTEXT://a:1", "sasl.enabled.mechanisms": "GSSAPI"}, "GSSAPI"),
        ({"listeners": "SASL_PLAINTEXT://a:1", "sasl.enabled.mechanisms": ""}, "sasl.enabled.mechanisms"),
        ({"listeners": "PLAINTEXT://a:1", "advertised.listeners": "SSL://a:1"}, "advertised.listeners names SSL"),
        ({"listeners": "PLAINTEXT://a:1", "advertised.listeners": "PLAINTEXT://a:0"}, "port 0"),
        ({"listener.security.protocol.map": "X"}, "NAME:PROTOCOL"),
        ({"super.users": "admin"}, "User:<name>"),
        ({"authorizer.class.name": "com.example.Own"}, "StandardAuthorizer"),
        ({"allow.everyone.if.no.acl.found": "maybe"}, "true nor false"),
        ({"connections.max.reauth.ms": "-1"}, "whole number"),
        ({"ssl.keystore.location": "x", "ssl.client.auth": "always"}, "ssl.client.auth"),
        ({"ssl.keystore.location": "x", "ssl.client.auth": "required"}, "ssl.truststore.location"),
        ({"users.file": "/none"}, "users.file"),
        ({"max.connections": "many"}, "max.connections"),
    ],
)
def test_what_cannot_work_is_refused_by_name(properties: dict[str, str], word: str) -> None:
    with pytest.raises(ConfigurationError, match=word):
        read(properties)


@pytest.mark.parametrize("line", [SECRET, f":{SECRET}", "name:"])
def test_wrong_user_line_is_not_shown(line: str) -> None:
    with pytest.raises(ConfigurationError, match="line 2 is not name:password") as raised:
        read({}, {USERS_VARIABLE: f"alice:pw\n{line}\n"})
    assert SECRET not in str(raised.value)

"""Where the broker listens and how clients prove who they are: settings as values, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

from semel.errors import ConfigurationError
from semel.wire.scram import MECHANISMS

__all__ = ["PLAIN", "Listener", "Protocol", "Security", "TlsFiles"]

PLAIN = "PLAIN"
Protocol = Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"]
PROTOCOLS = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
_KNOWN_MECHANISMS = (*MECHANISMS, PLAIN)
_EVERYWHERE = "0.0.0.0"  # noqa: S104 - what an empty host means in Kafka's listeners
_LOOPBACK = ("127.", "::1", "localhost")


@dataclass(frozen=True, slots=True)
class Listener:
    """One address to listen on. `advertised` is the `host:port` clients are told; empty: the one they came by."""

    protocol: Protocol
    host: str
    port: int
    advertised: str = ""

    def __str__(self) -> str:
        return f"{self.protocol}://{self.host}:{self.port}"

    @property
    def tls(self) -> bool:
        """Whether the bytes are encrypted."""
        return self.protocol in ("SSL", "SASL_SSL")

    @property
    def sasl(self) -> bool:
        """Whether a client must log in."""
        return self.protocol.startswith("SASL_")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        return self.host.startswith(_LOOPBACK)

    @classmethod
    def parse(cls, text: str, protocols: Mapping[str, str] | None = None) -> Listener:
        """Read `SASL_SSL://host:port`. `protocols` gives the protocol of other names. Raises `ConfigurationError`."""
        name, separator, address = text.strip().partition("://")
        protocol = (protocols or {}).get(name, name).upper()
        host, colon, port = address.rpartition(":")
        if not (separator and colon and port.isdecimal() and int(port) <= 65_535):
            raise ConfigurationError(f"listeners={text!r} is not PROTOCOL://host:port, e.g. SASL_SSL://0.0.0.0:9093.")
        if protocol not in PROTOCOLS:
            raise ConfigurationError(f"listeners={text!r}: {protocol} is none of {', '.join(PROTOCOLS)}.")
        return cls(cast(Protocol, protocol), host.strip("[]") or _EVERYWHERE, int(port))


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files. `keystore`: the certificate chain, and the key unless `key` has it; `truststore`: the clients' CAs."""

    keystore: Path
    key: Path | None = None
    key_password: str = field(default="", repr=False)
    truststore: Path | None = None
    client_auth: Literal["none", "requested", "required"] = "none"

    def __post_init__(self) -> None:
        if self.client_auth not in ("none", "requested", "required"):
            raise ConfigurationError(f"ssl.client.auth={self.client_auth!r} is none of none, requested, required.")
        if self.client_auth != "none" and self.truststore is None:
            raise ConfigurationError(
                f"ssl.client.auth={self.client_auth} needs ssl.truststore.location: the certificates (PEM) of those "
                "who sign the clients' certificates."
            )


@dataclass(frozen=True, slots=True)
class Security:
    """Mechanisms, users and rights; nothing of it matters to a PLAINTEXT listener without an authorizer."""

    mechanisms: tuple[str, ...] = tuple(MECHANISMS)
    """sasl.enabled.mechanisms: SCRAM-SHA-256, SCRAM-SHA-512, PLAIN."""
    users: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Name to password: these users exist, with these passwords, when the broker has started."""
    authorize: bool = False
    """authorizer.class.name is set: nobody may do anything without a rule."""
    super_users: tuple[str, ...] = ()
    """super.users: principals, e.g. `User:admin`."""
    allow_everyone_if_no_acl: bool = False
    """allow.everyone.if.no.acl.found."""
    reauth_seconds: float = 0.0
    """connections.max.reauth.ms: a login is good for so long; 0: for as long as the connection."""
    tls: TlsFiles | None = None

    def __post_init__(self) -> None:
        for mechanism in self.mechanisms:
            if mechanism not in _KNOWN_MECHANISMS:
                raise ConfigurationError(
                    f"sasl.enabled.mechanisms={mechanism!r} is none of {', '.join(_KNOWN_MECHANISMS)}."
                )
        for principal in self.super_users:
            if not principal.startswith("User:") or principal == "User:":
                raise ConfigurationError(f"super.users={principal!r} is not User:<name>.")
        for user, password in self.users.items():
            if not user or not password:
                raise ConfigurationError(f"The user {user!r} needs a name and a password.")
        if self.reauth_seconds < 0:
            raise ConfigurationError("connections.max.reauth.ms must not be negative.")

    def check(self, listeners: tuple[Listener, ...]) -> None:
        """Raise `ConfigurationError` when these listeners cannot work with these settings."""
        for listener in listeners:
            if listener.tls and self.tls is None:
                raise ConfigurationError(f"{listener} needs ssl.keystore.location: a PEM file of certificate and key.")
            if listener.sasl and not self.mechanisms:
                raise ConfigurationError(f"{listener} needs sasl.enabled.mechanisms.")

"""How our client proves who it is, and that the broker is who it should be: TLS and SASL, under librdkafka's names."""

from __future__ import annotations

import secrets
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from semel.errors import ConfigurationError, ErrorCode, Fatal, kafka_error
from semel.wire.scram import MECHANISMS, ScramClient, ScramError

__all__ = ["REFUSED", "SECRETS", "SECURITY_SETTINGS", "ClientSecurity", "tls_failure"]

SASL_HANDSHAKE, SASL_AUTHENTICATE = 17, 36
SECRETS = frozenset({"sasl.password", "ssl.key.password", "ssl.keystore.password", "ssl.key.pem", "sasl.jaas.config"})
"""Settings that are never shown."""
PLAIN = "PLAIN"
SECURITY_SETTINGS = (
    "security.protocol",
    "sasl.mechanism",
    "sasl.mechanisms",
    "sasl.username",
    "sasl.password",
    "ssl.ca.location",
    "ssl.ca.pem",
    "ssl.certificate.location",
    "ssl.key.location",
    "ssl.key.password",
    "ssl.endpoint.identification.algorithm",
    "enable.ssl.certificate.verification",
)
"""The settings that `ClientSecurity` follows."""
_PROTOCOLS = ("plaintext", "ssl", "sasl_plaintext", "sasl_ssl")
_KNOWN = (*MECHANISMS, PLAIN)
_NONCE_BYTES = 18
_YES, _NO = ("true", "1", "yes"), ("false", "0", "no")
REFUSED = {
    "ssl.keystore.location": "Semel's client reads PEM: use ssl.certificate.location and ssl.key.location",
    "ssl.certificate.pem": "give the file: ssl.certificate.location",
    "ssl.key.pem": "give the file: ssl.key.location",
    "ssl.crl.location": "revocation lists are not supported by Semel's client",
    "ssl.engine.location": "engines are not supported by Semel's client",
    "sasl.jaas.config": "that is Java's; use sasl.username and sasl.password",
    "ssl.truststore.location": "that is Java's; use ssl.ca.location, a file of PEM certificates",
    "sasl.oauthbearer.config": "OAUTHBEARER is not supported by Semel's client",
    "sasl.kerberos.principal": "GSSAPI is not supported by Semel's client",
}
"""Names of librdkafka's and Java's that people try, and what to set in their place."""


@dataclass(frozen=True, slots=True)
class ClientSecurity:
    """The checked settings. `context()` and `log_in` are what a connection does with them."""

    protocol: str = "plaintext"
    mechanism: str = ""
    username: str = ""
    password: str = field(default="", repr=False)
    ca_location: str = ""
    ca_pem: str = field(default="", repr=False)
    certificate: str = ""
    key: str = ""
    key_password: str = field(default="", repr=False)
    check_name: bool = True
    verify: bool = True

    @property
    def tls(self) -> bool:
        """Whether bytes are encrypted."""
        return self.protocol in ("ssl", "sasl_ssl")

    @property
    def sasl(self) -> bool:
        """Whether we log in."""
        return self.protocol.startswith("sasl_")

    @classmethod
    def read(cls, settings: Mapping[str, object]) -> ClientSecurity:
        """Check and read. Raises `ConfigurationError`, which names the setting and never shows a secret."""
        for name, why in REFUSED.items():
            if settings.get(name):
                raise ConfigurationError(f"{name} is refused: {why}.")
        text = {name: str(value) for name, value in settings.items() if value is not None}
        protocol = text.get("security.protocol", "plaintext").lower()
        if protocol not in _PROTOCOLS:
            raise ConfigurationError(f"security.protocol={protocol} is none of {', '.join(_PROTOCOLS)}.")
        found = cls(
            protocol=protocol,
            mechanism=text.get("sasl.mechanism", text.get("sasl.mechanisms", "")).upper(),
            username=text.get("sasl.username", ""),
            password=text.get("sasl.password", ""),
            ca_location=text.get("ssl.ca.location", ""),
            ca_pem=text.get("ssl.ca.pem", ""),
            certificate=text.get("ssl.certificate.location", ""),
            key=text.get("ssl.key.location", ""),
            key_password=text.get("ssl.key.password", ""),
            check_name=_check_name(text.get("ssl.endpoint.identification.algorithm", "https")),
            verify=_boolean("enable.ssl.certificate.verification", text),
        )
        found._check_sasl()
        return found

    def _check_sasl(self) -> None:
        if not self.sasl:
            if self.username or self.password:
                raise ConfigurationError(
                    f"sasl.username or sasl.password is set, and security.protocol={self.protocol} would not use it. "
                    "Set security.protocol to sasl_ssl (or sasl_plaintext)."
                )
            return
        if self.mechanism not in _KNOWN:
            raise ConfigurationError(
                f"sasl.mechanism={self.mechanism or '(not set)'} is none of {', '.join(_KNOWN)}, which "
                f"security.protocol={self.protocol} needs."
            )
        if not self.username or not self.password:
            raise ConfigurationError(f"sasl.mechanism={self.mechanism} needs sasl.username and sasl.password.")

    def context(self) -> ssl.SSLContext | None:
        """The TLS context, None for a plain connection. Raises `ConfigurationError` for files that cannot be read."""
        if not self.tls:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.check_hostname = self.verify and self.check_name
        context.verify_mode = ssl.CERT_REQUIRED if self.verify else ssl.CERT_NONE
        try:
            if self.ca_pem:
                context.load_verify_locations(cadata=self.ca_pem)
            elif self.ca_location and self.ca_location != "probe":
                context.load_verify_locations(self.ca_location)
            else:
                context.load_default_certs()
        except (OSError, ValueError) as error:
            where = "ssl.ca.pem" if self.ca_pem else f"ssl.ca.location={self.ca_location}"
            raise ConfigurationError(f"{where} cannot be read: {_why(error)}. It must be PEM certificates.") from None
        if self.certificate:
            try:
                # A function, because OpenSSL asks on the terminal where it is given no password.
                context.load_cert_chain(self.certificate, self.key or None, lambda: self.key_password)
            except (OSError, ValueError) as error:
                raise ConfigurationError(
                    f"ssl.certificate.location={self.certificate} with ssl.key.location={self.key or self.certificate} "
                    f"cannot be read: {_why(error)}. Both must be PEM; an encrypted key needs ssl.key.password."
                ) from None
        return context

    async def log_in(self, address: str, ask: Callable[..., Awaitable[Any]]) -> int:
        """The SASL conversation on one connection; `ask(api_key, **fields)` sends a request and gives the answer.

        Returns after how many milliseconds the login expires (KIP-368), 0 for never. Raises `Fatal` when the broker
        refuses us, or cannot prove that it knows our password.
        """
        answer = await ask(SASL_HANDSHAKE, mechanism=self.mechanism)
        if answer.error_code == ErrorCode.UNSUPPORTED_SASL_MECHANISM:
            offered = ", ".join(answer.mechanisms) or "none"
            text = f"Kafka at {address} does not offer the SASL mechanism {self.mechanism}"
            raise kafka_error(answer.error_code, text, f"Set sasl.mechanism to one of: {offered}.", Fatal)
        if answer.error_code == ErrorCode.ILLEGAL_SASL_STATE:
            text = f"Kafka at {address} wants no login on this listener"
            raise kafka_error(answer.error_code, text, "Use its SASL listener, or security.protocol without sasl_.")
        if answer.error_code != ErrorCode.NONE:
            raise kafka_error(answer.error_code, f"logging in to Kafka at {address}")
        if self.mechanism == PLAIN:
            token = f"\0{self.username}\0{self.password}".encode()
            return self._lifetime(await self._exchange(address, ask, token))
        client = ScramClient(self.mechanism, self.username, self.password, secrets.token_urlsafe(_NONCE_BYTES))
        try:
            first = await self._exchange(address, ask, client.first())
            last = await self._exchange(address, ask, client.final(bytes(first.auth_bytes)))
            client.verify(bytes(last.auth_bytes))
        except ScramError as error:
            raise Fatal(
                f"the login of {self.username!r} to Kafka at {address} failed: {error}. Check the address: something "
                "between may pretend to be your broker."
            ) from None
        return self._lifetime(last)

    async def _exchange(self, address: str, ask: Callable[..., Awaitable[Any]], token: bytes) -> Any:
        answer = await ask(SASL_AUTHENTICATE, auth_bytes=token)
        if answer.error_code != ErrorCode.NONE:
            text = f"Kafka at {address} refuses the login of {self.username!r} with {self.mechanism}"
            said = f" It says: {answer.error_message}" if answer.error_message else ""
            raise kafka_error(answer.error_code, text, f"Check sasl.username and sasl.password.{said}", Fatal)
        return answer

    @staticmethod
    def _lifetime(answer: Any) -> int:
        lifetime = getattr(answer, "session_lifetime", None)
        return 0 if lifetime is None else round(lifetime.total_seconds() * 1000)


def tls_failure(address: str, error: ssl.SSLError) -> Fatal | None:
    """What a failed handshake means, where trying again cannot help; None where it may."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return Fatal(
            f"the certificate of Kafka at {address} cannot be trusted: {error.verify_message}. Set ssl.ca.location to "
            "the certificate of whoever signed it, and use the host name that stands in it."
        )
    reason = error.reason or ""
    if "ALERT" in reason:
        return Fatal(
            f"Kafka at {address} ends the TLS connection: {reason}. If it asks for a client certificate, set "
            "ssl.certificate.location and ssl.key.location."
        )
    if reason in ("WRONG_VERSION_NUMBER", "PACKET_LENGTH_TOO_LONG", "UNSUPPORTED_PROTOCOL", "HTTP_REQUEST"):
        return Fatal(f"Kafka at {address} does not speak TLS ({reason}). Check the port and security.protocol.")
    return None


def _check_name(algorithm: str) -> bool:
    if algorithm.lower() not in ("https", "none", ""):
        raise ConfigurationError(f"ssl.endpoint.identification.algorithm={algorithm} is neither https nor none.")
    return algorithm.lower() == "https"


def _boolean(name: str, text: Mapping[str, str]) -> bool:
    value = text.get(name, "true").lower()
    if value not in _YES + _NO:
        raise ConfigurationError(f"{name}={value} is neither true nor false.")
    return value in _YES


def _why(error: Exception) -> str:
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__

"""SCRAM (RFC 5802, RFC 7677), both sides of the conversation, without any I/O: tokens in, tokens out.

Nonces and salts come in as arguments. Names and passwords are used as their UTF-8 bytes, without SASLprep, as Apache
Kafka and librdkafka do. Channel binding is not used: Kafka's clients do not know it.
"""

from __future__ import annotations

import hashlib
import hmac
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from collections.abc import Callable
from dataclasses import dataclass

from semel.errors import SemelError

__all__ = [
    "ITERATIONS_MAX",
    "ITERATIONS_MIN",
    "MECHANISMS",
    "ScramClient",
    "ScramCredential",
    "ScramError",
    "ScramServer",
    "derive",
    "make_credential",
    "matches",
]

MECHANISMS = {"SCRAM-SHA-256": "sha256", "SCRAM-SHA-512": "sha512"}
"""SASL mechanism to hash."""
ITERATIONS_MIN = 4096
"""RFC 7677's least, and Kafka's."""
ITERATIONS_MAX = 16_384
"""What a broker lets anybody store (Kafka's limit)."""
_CLIENT_ITERATIONS_MAX = 1_000_000
"""What a client computes for a server: a hostile one could keep it busy for hours with a number."""
_MESSAGE_CHARACTERS_MAX = 4096
"""Names, nonces, salts and proofs are short; a longer message is none of ours."""
_HEADER = "n,,"


class ScramError(SemelError):
    """The conversation ends here. The text holds no secret and may be shown to the other side."""


@dataclass(frozen=True, slots=True, repr=False)
class ScramCredential:
    """What a server keeps of a password: with it a password can be checked, but not found."""

    salt: bytes
    iterations: int
    stored_key: bytes
    server_key: bytes

    def __repr__(self) -> str:
        return f"<ScramCredential, {self.iterations} iterations>"


def _mac(algorithm: str, key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, algorithm)


def derive(mechanism: str, salted_password: bytes, salt: bytes, iterations: int) -> ScramCredential:
    """The credential of a password that was salted already (RFC 5802's SaltedPassword)."""
    algorithm = MECHANISMS[mechanism]
    stored_key = hashlib.new(algorithm, _mac(algorithm, salted_password, b"Client Key")).digest()
    return ScramCredential(salt, iterations, stored_key, _mac(algorithm, salted_password, b"Server Key"))


def make_credential(mechanism: str, password: str, salt: bytes, iterations: int = ITERATIONS_MIN) -> ScramCredential:
    """The credential of a password; takes milliseconds, on purpose."""
    salted = hashlib.pbkdf2_hmac(MECHANISMS[mechanism], password.encode(), salt, iterations)
    return derive(mechanism, salted, salt, iterations)


def matches(mechanism: str, credential: ScramCredential, password: str) -> bool:
    """Whether this is the password; takes milliseconds too."""
    given = make_credential(mechanism, password, credential.salt, credential.iterations)
    return hmac.compare_digest(given.stored_key, credential.stored_key)


def _attributes(message: bytes) -> dict[str, str]:
    """`r=...,s=...` as a mapping. Raises `ScramError`."""
    try:
        text = message.decode()
    except UnicodeDecodeError:
        raise ScramError("a SCRAM message is not UTF-8") from None
    if len(text) > _MESSAGE_CHARACTERS_MAX:
        raise ScramError("a SCRAM message is too long")
    found: dict[str, str] = {}
    for item in text.split(","):
        name, equals, value = item.partition("=")
        if not equals or name in found:
            raise ScramError("a SCRAM message is malformed")
        found[name] = value
    return found


def _need(attributes: dict[str, str], name: str) -> str:
    value = attributes.get(name)
    if not value:
        raise ScramError(f"a SCRAM message lacks its attribute {name!r}")
    return value


def _bytes(text: str) -> bytes:
    try:
        return b64decode(text, validate=True)
    except (Base64Error, ValueError):
        raise ScramError("a SCRAM message is not Base64 where it must be") from None


def _text(data: bytes) -> str:
    return b64encode(data).decode()


def _xor(left: bytes, right: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(left, right, strict=True))


def _escaped(name: str) -> str:
    return name.replace("=", "=3D").replace(",", "=2C")


def _unescaped(name: str) -> str:
    rest = name.replace("=2C", "").replace("=3D", "")
    if "=" in rest:
        raise ScramError("the user name in a SCRAM message is malformed")
    return name.replace("=2C", ",").replace("=3D", "=")


class ScramClient:
    """The client's side: `first`, then `final` with the server's first answer, then `verify` with its last."""

    def __init__(self, mechanism: str, username: str, password: str, nonce: str) -> None:
        self._mechanism = mechanism
        self._algorithm = MECHANISMS[mechanism]
        self._password = password
        self._nonce = nonce
        self._first_bare = f"n={_escaped(username)},r={nonce}"
        self._server_signature = b""

    def __repr__(self) -> str:
        return f"<ScramClient {self._mechanism}>"

    def first(self) -> bytes:
        """The message that begins the conversation."""
        return (_HEADER + self._first_bare).encode()

    def final(self, server_first: bytes) -> bytes:
        """The proof that we know the password. Raises `ScramError` for an answer that no sound server gives."""
        attributes = _attributes(server_first)
        nonce = _need(attributes, "r")
        if not nonce.startswith(self._nonce) or nonce == self._nonce:
            raise ScramError("the server's nonce does not continue ours")
        salt, count = _bytes(_need(attributes, "s")), _need(attributes, "i")
        if not count.isdecimal() or not ITERATIONS_MIN <= int(count) <= _CLIENT_ITERATIONS_MAX:
            raise ScramError(f"the server asks for {count[:12]} iterations; {ITERATIONS_MIN} is the least that is safe")
        salted = hashlib.pbkdf2_hmac(self._algorithm, self._password.encode(), salt, int(count))
        without_proof = f"c={_text(_HEADER.encode())},r={nonce}"
        signed = ",".join((self._first_bare, server_first.decode(), without_proof)).encode()
        client_key = _mac(self._algorithm, salted, b"Client Key")
        stored_key = hashlib.new(self._algorithm, client_key).digest()
        proof = _xor(client_key, _mac(self._algorithm, stored_key, signed))
        self._server_signature = _mac(self._algorithm, _mac(self._algorithm, salted, b"Server Key"), signed)
        return f"{without_proof},p={_text(proof)}".encode()

    def verify(self, server_final: bytes) -> None:
        """Raise `ScramError` unless the server knows the password's verifier too."""
        attributes = _attributes(server_final)
        if "e" in attributes:
            raise ScramError(f"the server refused: {attributes['e'][:100]}")
        given = _bytes(_need(attributes, "v"))
        if not self._server_signature or not hmac.compare_digest(given, self._server_signature):
            raise ScramError("the server does not know this password: it is not the server it claims to be")


class ScramServer:
    """The server's side: `respond` to two messages; then `user` is who proved to know the password.

    `find` gives the credential of a user. For an unknown one it must give a made-up credential, always the same, so
    that nobody learns from the answers which users there are.
    """

    def __init__(self, mechanism: str, find: Callable[[str], ScramCredential], nonce: str) -> None:
        self._mechanism = mechanism
        self._algorithm = MECHANISMS[mechanism]
        self._find = find
        self._nonce = nonce
        self._claimed = ""
        self._credential: ScramCredential | None = None
        self._signed = ""
        self._binding = ""
        self.user: str | None = None
        """Set when the conversation is over and the proof was right."""

    def __repr__(self) -> str:
        return f"<ScramServer {self._mechanism}, {self.user or 'unproven'}>"

    def respond(self, token: bytes) -> bytes:
        """The answer to the client's next message. Raises `ScramError`: the client is refused."""
        if self._credential is None:
            return self._respond_first(token)
        return self._respond_final(token, self._credential)

    def _respond_first(self, token: bytes) -> bytes:
        if token[:2] not in (b"n,", b"y,"):
            raise ScramError("channel binding is not supported")
        authorization, comma, bare = token[2:].partition(b",")
        if not comma:
            raise ScramError("a SCRAM message is malformed")
        attributes = _attributes(bare)
        if "m" in attributes:
            raise ScramError("a mandatory SCRAM extension is not supported")
        if attributes.get("tokenauth") == "true":
            raise ScramError("delegation tokens are not supported")
        self._claimed = _unescaped(_need(attributes, "n"))
        if authorization not in (b"", b"a=" + _escaped(self._claimed).encode()):
            raise ScramError("the authorization id differs from the user name")
        self._nonce = _need(attributes, "r") + self._nonce
        credential = self._credential = self._find(self._claimed)
        answer = f"r={self._nonce},s={_text(credential.salt)},i={credential.iterations}"
        self._signed = f"{bare.decode()},{answer}"
        self._binding = _text(token[: len(token) - len(bare)])
        return answer.encode()

    def _respond_final(self, token: bytes, credential: ScramCredential) -> bytes:
        attributes = _attributes(token)
        proof = _bytes(_need(attributes, "p"))
        if _need(attributes, "r") != self._nonce or _need(attributes, "c") != self._binding:
            raise ScramError("the nonce or the channel binding of a SCRAM message is not the one of its conversation")
        end = token.rfind(b",p=")  # The proof comes last and covers all before it.
        signed = f"{self._signed},{token[: max(end, 0)].decode()}".encode()
        signature = _mac(self._algorithm, credential.stored_key, signed)
        if len(proof) != len(signature):
            raise ScramError("invalid credentials")
        client_key = _xor(proof, signature)
        if not hmac.compare_digest(hashlib.new(self._algorithm, client_key).digest(), credential.stored_key):
            raise ScramError("invalid credentials")
        self.user = self._claimed
        return f"v={_text(_mac(self._algorithm, credential.server_key, signed))}".encode()

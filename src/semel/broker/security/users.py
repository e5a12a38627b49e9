"""Users and their passwords' verifiers: nothing from which a password could be found is kept or shown."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping

from semel.broker.metadata import MetadataStore
from semel.wire.scram import ITERATIONS_MIN, MECHANISMS, ScramCredential, make_credential, matches

__all__ = ["USERS_MAX", "Users"]

USERS_MAX = 10_000
"""Users of one broker; each is a few hundred bytes in memory and in the metadata log."""
_SALT_BYTES = 20
_REMEMBERED_MAX = 1_000
"""Passwords that were right, as keyed hashes: a reconnect storm must not cost milliseconds a connection."""


class Users:
    """SCRAM verifiers in the metadata log, and the check of a plain password against them."""

    def __init__(self, metadata: MetadataStore) -> None:
        self._metadata = metadata
        self._secret = secrets.token_bytes(32)
        self._right: dict[tuple[str, str], bytes] = {}

    def __repr__(self) -> str:
        return f"<Users, {len(self._metadata.credentials)} credentials>"

    def ensure(self, passwords: Mapping[str, str]) -> None:
        """Give these users these passwords; one that has its password already is left as it is."""
        for user, password in passwords.items():
            for mechanism in MECHANISMS:
                known = self._metadata.credentials.get((user, mechanism))
                if known is None or not matches(mechanism, known, password):
                    fresh = make_credential(mechanism, password, secrets.token_bytes(_SALT_BYTES))
                    self._metadata.put_credential(user, mechanism, fresh)

    def credential(self, mechanism: str, user: str) -> ScramCredential:
        """The user's verifier; for an unknown user a made-up one, always the same, that no password fits."""
        found = self._metadata.credentials.get((user, mechanism))
        if found is not None:
            return found
        noise = hmac.digest(self._secret, f"{mechanism} {user}".encode(), hashlib.sha512)
        size = hashlib.new(MECHANISMS[mechanism]).digest_size
        return ScramCredential(noise[:_SALT_BYTES], ITERATIONS_MIN, noise[-size:], bytes(size))

    def remembers(self, user: str, password: str) -> bool:
        """Whether this password was found to be right, and the user's verifiers are still the same ones."""
        mechanism, credential = self._any(user)
        known = self._right.get((user, mechanism))
        return known is not None and hmac.compare_digest(known, self._hash(credential, password))

    def check(self, user: str, password: str) -> bool:
        """Whether this is the user's password. Takes milliseconds, for an unknown user too; safe in any thread."""
        mechanism, credential = self._any(user)
        return matches(mechanism, credential, password)

    def remember(self, user: str, password: str) -> None:
        """This password was right."""
        if len(self._right) >= _REMEMBERED_MAX:
            self._right.clear()
        mechanism, credential = self._any(user)
        self._right[user, mechanism] = self._hash(credential, password)

    def _any(self, user: str) -> tuple[str, ScramCredential]:
        """PLAIN has no verifier of its own: any of the user's will do."""
        for mechanism in MECHANISMS:
            found = self._metadata.credentials.get((user, mechanism))
            if found is not None:
                return mechanism, found
        mechanism = next(iter(MECHANISMS))
        return mechanism, self.credential(mechanism, user)

    def _hash(self, credential: ScramCredential, password: str) -> bytes:
        return hmac.digest(self._secret, credential.stored_key + password.encode(), hashlib.sha256)

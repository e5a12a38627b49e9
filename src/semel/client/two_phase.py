"""Two-phase commit (KIP-939) as values: the name of a prepared transaction, and what a broker offers. Sans-IO.

The recipe. A producer writes a transaction, flushes and *prepares* it, which only this client knows: with every
acknowledgement the broker promised to keep it open. A database transaction stores `str(prepared)` beside its own
changes; its COMMIT decides. Then Kafka is told. Whoever dies in between is recovered by comparing what the database
holds with what the broker still has open.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, NamedTuple, Self

from semel.errors import ConfigurationError, ErrorCode

__all__ = ["NOTHING_PREPARED", "NO_TIMEOUT_MS", "PROBE", "PreparedState", "TwoPhaseMode", "mode_of"]


class PreparedState(NamedTuple):
    """Names a prepared transaction by the identity that wrote it. `str()` is `"pid:epoch"`, or `""` for none."""

    producer_id: int = -1
    epoch: int = -1

    def __str__(self) -> str:
        return f"{self.producer_id}:{self.epoch}" if self.is_transaction else ""

    @property
    def is_transaction(self) -> bool:
        """False for the state of a transaction to which nothing was written: there is nothing to decide."""
        return self.producer_id >= 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `str()` gave, as Kafka's PreparedTxnState writes it. Raises `ConfigurationError`."""
        if not text:
            return cls()
        parts = text.split(":")
        if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
            raise ConfigurationError(
                f"{text!r} names no prepared transaction: wanted is 'producer id:epoch', for example '1000:7', or an "
                "empty text for none. Store what str(prepared) gives."
            )
        return cls(int(parts[0]), int(parts[1]))


NOTHING_PREPARED = PreparedState()
NO_TIMEOUT_MS = 2_147_483_647
"""The time-out by which a coordinator knows a transaction with two-phase commit: it never ends by itself."""


class TwoPhaseMode(StrEnum):
    """What a broker offers; the value is for people."""

    FULL = "two-phase commit with recovery"
    NO_RECOVERY = "two-phase commit without recovery"
    REFUSED = "refused"
    UNSUPPORTED = "unsupported"
    TRANSACTIONS_V1 = "impossible: transactions V1"

    @property
    def meaning(self) -> str:
        """One sentence: what it means for a dual write, and what would change it."""
        return _MEANINGS[self]


_MEANINGS = {
    TwoPhaseMode.FULL: (
        "A prepared transaction never times out, and a restarted process ends its predecessor's as the database says."
    ),
    TwoPhaseMode.NO_RECOVERY: (
        "A prepared transaction never times out, but the broker cannot hand it over (Apache Kafka 4.3.1 answers "
        "UNSUPPORTED_VERSION to keepPreparedTxn): a restart aborts it, also where the database has committed."
    ),
    TwoPhaseMode.REFUSED: (
        "The broker has it switched off (transaction.two.phase.commit.enable), or this client has no right "
        "TWO_PHASE_COMMIT and WRITE on the transactional id."
    ),
    TwoPhaseMode.UNSUPPORTED: (
        "The broker does not offer InitProducerId v6; Apache Kafka 4.x does with unstable.api.versions.enable=true."
    ),
    TwoPhaseMode.TRANSACTIONS_V1: (
        "The cluster has transaction.version below 2: one identity stands for many transactions, so a database cannot "
        "say which one it decided about."
    ),
}

PROBE: dict[str, Any] = {
    "transaction_timeout": 1,
    "producer_id": 0,
    "producer_epoch": 0,
    "enable2_pc": True,
    "keep_prepared_txn": True,
}
"""An InitProducerId v6 that no broker grants, but that each refuses for its own reason and without any effect."""
_ANSWERS = {
    ErrorCode.TRANSACTIONAL_ID_AUTHORIZATION_FAILED: TwoPhaseMode.REFUSED,
    ErrorCode.UNSUPPORTED_VERSION: TwoPhaseMode.NO_RECOVERY,
    # Keeping is for a producer's first call, which has no identity to give.
    ErrorCode.INVALID_REQUEST: TwoPhaseMode.FULL,
    ErrorCode.PRODUCER_FENCED: TwoPhaseMode.FULL,
}


def mode_of(code: int) -> TwoPhaseMode | None:
    """What the error code in the answer to `PROBE` says; None where it says nothing about two-phase commit."""
    return _ANSWERS.get(ErrorCode(code)) if code in ErrorCode._value2member_map_ else None

"""Settings: read once from the environment, checked, immutable.

Kafka client settings keep librdkafka's names where users type them (`bootstrap.servers`, `transaction.timeout.ms`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from semel.errors import ConfigurationError

__all__ = ["KAFKA_ADDRESS", "Settings"]

KAFKA_ADDRESS = "kafka.address"
"""A file in the data folder, while `semel run` is at work: where its embedded broker listens."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What `SEMEL_*` variables and the command line say. Units are in the names."""

    kafka: str = ""
    """`host:port[,host:port]` of Kafka; empty means the embedded broker under `data`."""
    data: Path = Path(".semel")
    """Where the embedded broker and the instance id live."""
    profile: str = "dev"
    """`dev` or `production`; production refuses failpoints."""
    instance: str = ""
    """Identity of this deployment's host in transactional ids; empty: made once and kept in `data`."""
    failpoint: str = ""
    transaction_timeout_ms: int = 10_000
    commit_interval_ms: int = 100
    session_timeout_ms: int = 6_000
    drain_seconds: float = 25.0
    partitions: int = 4
    """Partitions of topics that the app creates without saying how many."""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None, **overrides: object) -> Settings:
        """Read `SEMEL_<NAME>`; `overrides` that are not None win. Raises `ConfigurationError`, naming the variable."""
        source = os.environ if environ is None else environ
        values: dict[str, object] = {}
        for item in fields(cls):
            name = f"SEMEL_{item.name.upper()}"
            raw = source.get(name)
            if raw is None:
                continue
            default: Any = item.default
            try:
                values[item.name] = type(default)(raw)
            except (TypeError, ValueError):
                kind = "a whole number" if isinstance(default, int) else "a number"
                raise ConfigurationError(f"{name}={raw!r} is not {kind}.") from None
        values.update({key: value for key, value in overrides.items() if value is not None})
        settings = cls(**values)  # type: ignore[arg-type]
        settings.check()
        return settings

    def check(self) -> None:
        """Raise `ConfigurationError` for values that cannot work."""
        if self.profile not in ("dev", "production"):
            raise ConfigurationError(f"SEMEL_PROFILE={self.profile!r} is neither dev nor production.")
        for name in ("transaction_timeout_ms", "commit_interval_ms", "session_timeout_ms", "partitions"):
            if getattr(self, name) <= 0:
                raise ConfigurationError(f"SEMEL_{name.upper()} must be greater than 0.")
        if self.commit_interval_ms >= self.transaction_timeout_ms:
            raise ConfigurationError(
                "SEMEL_COMMIT_INTERVAL_MS must be below SEMEL_TRANSACTION_TIMEOUT_MS, or every transaction times out."
            )

"""What is said about a Kafka that cannot be reached: that it is gone, now and then that it still is, that it is back.

Every attempt that fails is reported here, and every answer that comes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

__all__ = ["Outage"]

log = logging.getLogger("semel.client.consumer")

REPEAT_SECONDS = 10.0
"""The same trouble is told at most this often."""


class Outage:
    """The log lines about one consumer's connection. `monotonic` gives seconds."""

    def __init__(self, name: str, monotonic: Callable[[], float]) -> None:
        self._name = name
        self._monotonic = monotonic
        self._since: float | None = None
        self._told: dict[str, float] = {}

    def __repr__(self) -> str:
        return f"<Outage {self._name} [{'away' if self.is_away else 'there'}]>"

    @property
    def is_away(self) -> bool:
        """Kafka as a whole cannot be reached."""
        return self._since is not None

    def lost(self, why: str) -> None:
        """No broker can be reached."""
        now = self._monotonic()
        if self._since is None:
            self._since = self._told["away"] = now
            log.warning("the consumer %s lost the connection to Kafka and goes on when it is back: %s", self._name, why)
        else:
            self._repeat(now, why)

    def trouble(self, kind: str, why: str) -> None:
        """Something failed that passes by itself; `kind` is the same for the same trouble."""
        now = self._monotonic()
        if self._since is not None:
            self._repeat(now, why)
        elif now - self._told.get(kind, -REPEAT_SECONDS) >= REPEAT_SECONDS:
            self._told[kind] = now
            log.info("the consumer %s: %s", self._name, why)

    def back(self) -> None:
        """The cluster answered."""
        if self._since is not None:
            seconds = self._monotonic() - self._since
            log.info("the consumer %s has its connection to Kafka again, after %.1f s", self._name, seconds)
        self._since = None
        self._told.clear()

    def _repeat(self, now: float, why: str) -> None:
        assert self._since is not None
        if now - self._told["away"] >= REPEAT_SECONDS:
            self._told["away"] = now
            log.warning("the consumer %s has been without Kafka for %.0f s: %s", self._name, now - self._since, why)

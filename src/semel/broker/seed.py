"""Topics that a broker has from its start: `orders:3,prices:1:compact`."""

from __future__ import annotations

import logging
from typing import NamedTuple, Self

from semel.broker.topics import TopicError, Topics
from semel.errors import ConfigurationError

__all__ = ["SeedTopic"]

log = logging.getLogger("semel.broker")

_SHAPE = "NAME, NAME:PARTITIONS or NAME:PARTITIONS:compact"


class SeedTopic(NamedTuple):
    """One topic to have; `partitions` 0 means the broker's default."""

    name: str
    partitions: int = 0
    cleanup_policy: str = "delete"

    @classmethod
    def parse(cls, text: str) -> list[Self]:
        """Read a comma-separated list. Raises `ConfigurationError`."""
        return [cls._one(item.strip()) for item in text.split(",") if item.strip()]

    @classmethod
    def _one(cls, text: str) -> Self:
        name, *rest = text.split(":")
        partitions = rest[0] if rest else "0"
        policy = rest[1] if len(rest) > 1 else "delete"
        if not name or len(rest) > 2 or not partitions.isdigit() or policy not in ("compact", "delete"):
            raise ConfigurationError(f"--seed-topics: {text!r} is not {_SHAPE}.")
        return cls(name, int(partitions), policy)

    def create(self, topics: Topics) -> None:
        """Create it unless it is there. Raises `ConfigurationError` when it cannot be."""
        present = topics.get(self.name)
        if present is not None:
            if self.partitions not in (0, len(present.partitions)):
                log.warning(
                    "topic %s has %d partitions, not %d: it is left as it is",
                    self.name,
                    len(present.partitions),
                    self.partitions,
                )
            return
        configs = {} if self.cleanup_policy == "delete" else {"cleanup.policy": self.cleanup_policy}
        try:
            topics.create(self.name, self.partitions or topics.default_partitions, configs)
        except TopicError as error:
            raise ConfigurationError(f"--seed-topics: {error}") from error

"""The bounds of the dual write, each with its reason."""

from __future__ import annotations

__all__ = [
    "BACKOFF_SECONDS",
    "BEAT_SECONDS",
    "CLOSE_SECONDS",
    "KAFKA_SECONDS",
    "LEASE_SECONDS",
]

KAFKA_SECONDS = 5.0
"""How long a block's end waits for Kafka while its database transaction holds locks. Half of what the database lets a
transaction stand still."""
BEAT_SECONDS = 3.0
"""Between two signs of life of a process, and between two looks for slots whose owner is gone."""
LEASE_SECONDS = 15.0
"""A slot whose sign of life did not change for so long is recovered by somebody else. Being too early costs the owner
an error and nothing else; being late holds up whoever reads the topics."""
BACKOFF_SECONDS = (0.05, 2.0)
"""Between two tries to tell Kafka how a transaction ends, first and longest."""
CLOSE_SECONDS = 5.0
"""How long the end of a program waits for what Kafka was not told yet. What is left then is recovered by the next
process."""

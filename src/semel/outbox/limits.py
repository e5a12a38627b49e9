"""The bounds of the relay, each with its reason."""

from __future__ import annotations

__all__ = [
    "BYTES_IN_HAND_MAX",
    "CHECK_SECONDS",
    "COUNT_ROWS",
    "MANIFEST_TOPIC",
    "READ_BYTES",
    "READ_ROWS",
    "SMALL_BYTES",
    "TIDY_BYTES",
    "TIDY_KEPT_BYTES",
    "TIDY_LANE_BYTES",
    "TIDY_ROWS",
    "TIDY_WAIT_MS",
    "TRANSACTIONS_MAX",
    "TRANSACTION_SECONDS",
]

READ_ROWS = 4_000
"""Rows of one SELECT, and so of one batch: two such batches, with ids of 64 characters, make a manifest of about
560 KB, and Kafka takes a record of 1 MB."""
READ_BYTES = 8 * 1_048_576
"""Bytes of one SELECT, but for its last row."""
SMALL_BYTES = READ_BYTES // READ_ROWS
"""So many rows of this size are no more than that: only where one is larger the database has to add up their sizes."""
BYTES_IN_HAND_MAX = 32 * 1_048_576
"""Bytes that are read and not committed: with more, nothing is read until Kafka took some."""
TRANSACTION_SECONDS = 5.0
"""A Kafka transaction is not open for longer: readers of its topics wait behind it."""
TRANSACTIONS_MAX = 8
"""Lanes of one relay in Kafka at the same time: more of them share the same processor and connections, and each of
their transactions is open for longer."""
CHECK_SECONDS = 5.0
"""How often age and depth are measured, and whether the tables need tidying."""
TIDY_BYTES = 64 * 1_048_576
"""PostgreSQL: the size from which on a table of dead rows is made small. Below it vacuum does that well enough."""
TIDY_LANE_BYTES = 4 * 1_048_576
"""The same for the lanes' table, whose rows change with every batch."""
TIDY_ROWS = 20_000
"""With more rows than this in a large table, it is a backlog: they are published first. A relay that is always busy has
some thousands of them at any moment."""
TIDY_KEPT_BYTES = 8 * 1_048_576
"""Nor is more than this copied: writers wait meanwhile, for some 100 ms."""
TIDY_WAIT_MS = 100
"""How long it waits for writers that are just committing; those who come after it wait behind it."""
COUNT_ROWS = 100_000
"""As far as rows are counted for the metrics: counting all of a large backlog would take longer than a part of it."""
MANIFEST_TOPIC = {
    "cleanup.policy": "compact",
    "segment.bytes": str(16 * 1_048_576),
    "min.cleanable.dirty.ratio": "0.1",
    "max.message.bytes": str(2 * 1_048_576),
}
"""Small segments, for compaction leaves the last one alone and who takes a lane over may have to read it."""

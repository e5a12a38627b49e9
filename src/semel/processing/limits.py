"""Every bound of this room, with its reason. Nothing here grows without one."""

from __future__ import annotations

__all__ = [
    "BATCH_BYTES_MAX",
    "BATCH_RECORDS_MAX",
    "CONCURRENCY_MAX",
    "DEADLINE_SECONDS_MAX",
    "IDLE_COMMIT_SECONDS",
    "OUTPUT_BYTES_MAX",
    "PARKED_KEYS_MAX",
    "PARKED_RECORDS_MAX",
    "PARK_LOOK_SECONDS",
    "PARK_READ_SECONDS",
    "PARK_TOPIC_BYTES_MAX",
    "POLL_PAUSE_SECONDS",
    "POLL_RECORDS_MAX",
    "POLL_RECORDS_SLOW",
    "RECORD_EFFECTS_MAX",
    "RELEASE_BYTES_MAX",
    "RELEASE_RECORDS_MAX",
    "SLICE_SECONDS",
    "STATE_CACHE_BYTES_MAX",
    "STATE_EXPIRED_PER_SWEEP",
    "STATE_FRESH_KEYS_MAX",
    "STATE_FRESH_SECONDS",
    "STATE_RECENT_BYTES_MAX",
    "STATE_RESTORE_KEYS",
    "STATE_SEEN_SECONDS",
    "STATE_SWEEP_PAUSE_MS",
    "UNIT_BYTES_MAX",
    "UNIT_RECORDS_MAX",
]

BATCH_BYTES_MAX = 524_288
"""A batch is closed at this size: half of what a topic takes by default, so that one more record always fits."""

OUTPUT_BYTES_MAX = 1_048_588 - 1_024
"""Key, value and headers of one output: Kafka's default max.message.bytes, less the batch around it."""

PARK_TOPIC_BYTES_MAX = 4 * 1_048_576
"""max.message.bytes of park topics: the largest record that a topic takes by default, and the error beside it."""

POLL_RECORDS_MAX = 500
"""Records taken from the consumer at once; they are worked on before the next ones are asked for."""

BATCH_RECORDS_MAX = POLL_RECORDS_MAX
"""Records in one call of a batch handler: those of one poll, as far as they are of one partition."""

POLL_PAUSE_SECONDS = 10.0
"""With slow handlers the consumer is asked this often all the same: far below max.poll.interval.ms (five minutes),
after which the group would take our partitions away."""

POLL_RECORDS_SLOW = 2
"""Records taken when the ones before are still being worked on."""

UNIT_RECORDS_MAX = 10_000
"""Records in one Kafka transaction: at 50,000 records a second a fifth of a second's work to repeat after an abort."""

UNIT_BYTES_MAX = 16 * 1_048_576
"""Bytes of input and output in one Kafka transaction, all of which wait in memory for it."""

CONCURRENCY_MAX = 1_000
"""Calls of an async handler at once: what they ask has limits of its own, and each costs memory here."""

DEADLINE_SECONDS_MAX = 240.0
"""How long one call of a handler may be allowed to take: a group gives up a member that is not asked for records for
max.poll.interval.ms, five minutes."""

RECORD_EFFECTS_MAX = 100_000
"""Effects of one call of a handler; a handler that yields without end must not take the process with it."""

PARKED_KEYS_MAX = 10_000
"""Parked keys of one partition; above it something is wrong with the handler, not with the data."""

PARKED_RECORDS_MAX = 100_000
"""Parked records of one partition: they are read again whenever the partition gets a new owner."""

PARK_LOOK_SECONDS = 1.0
"""How often a park topic in which something waits is looked at for commands: a person waits for the answer."""

PARK_READ_SECONDS = 2.0
"""How long the loop may wait for the park topic. What could not be read then is read the next time."""

RELEASE_RECORDS_MAX = 1_000
"""Parked records in one unit of work: live records wait meanwhile."""

RELEASE_BYTES_MAX = 8 * 1_048_576
"""Bytes of parked records in one unit of work; one is always taken, whatever its size."""

IDLE_COMMIT_SECONDS = 5.0
"""A position that moved past markers only is committed this late: such a transaction has no other purpose."""

SLICE_SECONDS = 0.02
"""How long records are handled before the event loop's other tasks, the heartbeat among them, get their turn."""

STATE_FRESH_KEYS_MAX = 2_000
"""Committed changes of one partition of a store that wait in memory for its table: writing them takes some 50 ms."""

STATE_FRESH_SECONDS = 1.0
"""How long they wait: a key that changes often is written once a second; a restart after a kill reads so much more."""

STATE_RESTORE_KEYS = 20_000
"""Changes that are written to a table at once while it is restored: there is nothing else to do meanwhile."""

STATE_SEEN_SECONDS = 60.0
"""A table without changes is marked as up to date this often: far below any delete.retention.ms."""

STATE_RECENT_BYTES_MAX = 16 * 1_048_576
"""Entries that an engine remembers beside its tables, of all partitions together."""

STATE_CACHE_BYTES_MAX = 16 * 1_048_576
"""Pages that the tables of an engine keep in memory, together; the system keeps more of them in its own."""

STATE_EXPIRED_PER_SWEEP = 1_000
"""Entries whose time is over that one record takes out: each is a tombstone in its transaction."""

STATE_SWEEP_PAUSE_MS = 1_000
"""Between two looks for such entries, by the time of records, unless there were more of them than one takes."""

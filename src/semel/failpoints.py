"""Failpoints: named lines at which a process can be made to die, stop, fail, wait, be cancelled or tear a write.

One stands in every durable step and in every await between two durable steps, so that a test can name the moment at
which something goes wrong instead of waiting for chance. Nothing is armed unless `SEMEL_FAILPOINT` says so; a point
then costs a call and one truth test.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import threading
import time
from typing import NamedTuple

from semel.errors import ConfigurationError, SemelError

__all__ = ["FAILPOINTS", "FailpointRaised", "Point", "arm_failpoints", "failpoint", "failpoint_hits", "is_armed"]


log = logging.getLogger("semel.failpoints")


class FailpointRaised(SemelError):
    """Raised by a failpoint with the action `raise`; stands for any unexpected exception at that line."""


class Point(NamedTuple):
    """One failpoint: what has and has not happened there, and what besides dying can be done there."""

    what: str
    role: str
    """The process that comes by: `http`, `worker`, `relay`, `broker`, `app` for a program of one's own, `program` for
    one that writes to its database, `dual` for one that writes to both at once, `endpoint` for a web framework's that
    writes to a database under a key, or `search` for a worker whose sink writes to an OpenSearch."""
    in_task: bool = False
    """An asyncio task runs there, which `cancel` ends as a shutdown or a client that goes away would."""
    writes: bool = False
    """A file is about to be written, of which `torn` writes the beginning."""

    @property
    def actions(self) -> tuple[str, ...]:
        """The actions that can be armed here, as an error message shows them."""
        more = (("cancel",) if self.in_task else ()) + (("torn=BYTES",) if self.writes else ())
        return ("kill", "stop", "raise", "delay=SECONDS", *more)


_HTTP, _WORKER, _RELAY, _BROKER, _APP, _PROGRAM = "http", "worker", "relay", "broker", "app", "program"
_ENDPOINT, _DUAL, _SEARCH = "endpoint", "dual", "search"

FAILPOINTS: dict[str, Point] = {
    # An HTTP instance.
    "ingress.topics_made": Point("the topics are there, this instance has no producer identity", _HTTP, in_task=True),
    "ingress.before_open": Point(
        "the end of the reply partition is known, and nothing is read up to it", _HTTP, in_task=True
    ),
    "ingress.admitted": Point("a request is read and checked, and has no number yet", _HTTP, in_task=True),
    "ingress.before_append": Point(
        "an HTTP instance is about to append a request to the requests topic", _HTTP, in_task=True
    ),
    "ingress.after_append": Point("the request is in the log, the client has no answer yet", _HTTP, in_task=True),
    "ingress.replies_read": Point("replies were read, and nobody who waits for them has heard", _HTTP, in_task=True),
    "ingress.after_reply": Point("the reply to a request is here, its client was not answered", _HTTP, in_task=True),
    "ingress.before_look_up": Point(
        "somebody asks for an operation, and the question is not in the log", _HTTP, in_task=True
    ),
    "ingress.after_look_up": Point("the operation is known, who asked was not answered", _HTTP, in_task=True),
    "ingress.before_purge": Point(
        "it is known which requests are answered, none of them is deleted", _WORKER, in_task=True
    ),
    # The owner of requests.
    "owner.before_handler": Point("a request is new, and its handler has not run", _WORKER, in_task=True),
    "owner.after_handler": Point(
        "the handler ran; its effects, the outcome and the reply are in memory only", _WORKER, in_task=True
    ),
    "owner.before_replay": Point(
        "the outcome of a request is known already, the reply to this copy is in no unit", _WORKER, in_task=True
    ),
    "owner.before_look_up": Point("a look-up was read, its reply is in no unit", _WORKER, in_task=True),
    # An engine comes up.
    "engine.before_identity": Point("Kafka answers, the transactional id was not taken over", _WORKER, in_task=True),
    "engine.after_identity": Point(
        "the predecessor is fenced and its transaction aborted, the group was not joined", _WORKER, in_task=True
    ),
    # Partitions come and go.
    "consume.before_poll": Point("nothing is in hand, and the consumer is about to be asked", _WORKER, in_task=True),
    "consume.after_poll": Point("records are in memory, and none of them was worked on", _WORKER, in_task=True),
    "consume.before_assign": Point("partitions were given to us, and nothing is known of them", _WORKER, in_task=True),
    "consume.after_assign": Point(
        "position and state of new partitions are in place, nothing of them was read", _WORKER, in_task=True
    ),
    "consume.before_revoke": Point(
        "partitions are to be given back, the unit in hand is not committed", _WORKER, in_task=True
    ),
    "consume.after_revoke": Point(
        "the unit in hand is committed, the partitions are still in memory", _WORKER, in_task=True
    ),
    "restore.after_offsets": Point(
        "the committed offsets are known, the ends of the changelogs are not", _WORKER, in_task=True
    ),
    "restore.after_ends": Point(
        "the ends of the changelogs are known, nothing of them was read", _WORKER, in_task=True
    ),
    "restore.between_polls": Point("a part of the state is read", _WORKER, in_task=True),
    "restore.after_state": Point("the state is read, and not in its place", _WORKER, in_task=True),
    "state.before_clear": Point("a table of state is of no use, its rows are still there", _WORKER, in_task=True),
    "state.before_delete": Point("a file of state is of no use, and still there", _WORKER, in_task=True),
    "state.before_write": Point(
        "committed changes of state are in memory, their table is as it was", _WORKER, in_task=True
    ),
    "state.before_commit": Point(
        "changes and the new mark of a table of state are written, and do not count", _WORKER, in_task=True
    ),
    "state.after_write": Point(
        "a table of state has the changes and its mark, the memory has them too", _WORKER, in_task=True
    ),
    # A processor's unit of work.
    "handler.before": Point("a record is about to be handled, earlier ones of the unit were", _WORKER, in_task=True),
    "handler.between_effects": Point("the handler of a record gave some of its effects", _WORKER, in_task=True),
    "handler.after": Point("all effects of a record are known, none is in the unit", _WORKER, in_task=True),
    "handler.before_park": Point(
        "a record cannot be processed, and is not in the unit as a parked one", _WORKER, in_task=True
    ),
    "release.asked": Point(
        "it is known what is to be done with parked records, and nothing of it is done", _WORKER, in_task=True
    ),
    "release.handled": Point(
        "parked records were handled again, what they gave and that they are released is in memory only",
        _WORKER,
        in_task=True,
    ),
    "unit.before_produce": Point("handlers ran, nothing of the transaction was sent", _WORKER, in_task=True),
    "unit.between_batches": Point("the first batch is handed to the producer, others are not", _WORKER, in_task=True),
    "unit.after_produce": Point(
        "outputs are handed to the producer, the input offset is not in the transaction", _WORKER, in_task=True
    ),
    "unit.before_end_transaction": Point(
        "outputs and offset are handed to the producer, the end was not asked for", _WORKER, in_task=True
    ),
    "unit.after_end_transaction": Point(
        "the transaction is committed, local state is not updated", _WORKER, in_task=True
    ),
    "unit.under_way": Point(
        "a transaction is on its way, what comes after it is worked on in memory", _WORKER, in_task=True
    ),
    "unit.before_landing": Point(
        "it is known how the transaction ended, nothing in memory has changed for it", _WORKER, in_task=True
    ),
    "unit.after_state": Point(
        "local state is updated, the committed offset is not remembered here", _WORKER, in_task=True
    ),
    "unit.before_recovery": Point(
        "a unit failed, its transaction is open or its end is unknown", _WORKER, in_task=True
    ),
    "unit.after_abort": Point(
        "the failed transaction has ended, positions and state are those of before", _WORKER, in_task=True
    ),
    "unit.after_recovery": Point("positions and state are read again, nothing was worked on", _WORKER, in_task=True),
    # The transactional producer.
    "producer.before_init": Point("InitProducerId was not sent", _WORKER, in_task=True),
    "producer.after_init": Point(
        "the coordinator gave an identity, the producer does not have it", _WORKER, in_task=True
    ),
    "producer.after_send": Point("a batch is on its way, and nobody knows whether it arrived", _WORKER),
    "producer.after_answer": Point("the broker acknowledged a batch, the producer does not know", _WORKER),
    "producer.before_offsets": Point("the offsets were not sent, some batches may have been", _WORKER, in_task=True),
    "producer.after_offsets": Point(
        "the group's coordinator staged the offsets, the producer does not know", _WORKER, in_task=True
    ),
    "producer.before_end": Point("everything is acknowledged, EndTxn was not sent", _WORKER, in_task=True),
    "producer.after_end": Point("EndTxn was answered, the producer does not know", _WORKER, in_task=True),
    "producer.before_resolve": Point(
        "the end of a transaction is unknown, and was not asked for again", _WORKER, in_task=True
    ),
    "producer.before_prepare": Point(
        "everything is acknowledged, the transaction is not closed to writes (KIP-939)", _APP, in_task=True
    ),
    "producer.after_prepare": Point(
        "the transaction has its name, the database does not know it (KIP-939)", _APP, in_task=True
    ),
    "producer.before_complete": Point("the database has decided, Kafka was not told (KIP-939)", _APP, in_task=True),
    "producer.after_complete": Point(
        "Kafka has ended the prepared transaction as decided (KIP-939)", _APP, in_task=True
    ),
    "shared.before_write": Point(
        "committed offsets, metrics or a status are to be written for the host's processes", _WORKER, writes=True
    ),
    "shared.before_rename": Point("the new file for the host's processes is whole, the old one counts", _WORKER),
    # A sink.
    "sink.before_take_over": Point(
        "partitions are given to a sink, their fences are not raised", _WORKER, in_task=True
    ),
    "sink.before_fence_commit": Point("the fences are raised in an open transaction of the database", _WORKER),
    "sink.after_fence": Point(
        "the fences are raised and committed, the positions are not held against the log", _WORKER, in_task=True
    ),
    "sink.before_seek": Point("a partition is ours, the consumer stands elsewhere", _WORKER, in_task=True),
    "sink.after_poll": Point("a sink's records are in memory, and none was applied", _WORKER, in_task=True),
    "sink.before_begin": Point("no transaction of the database is open for the records in hand", _WORKER),
    "sink.before_advance": Point("the database transaction is open, the position row is as it was", _WORKER),
    "sink.before_effects": Point("the position row is locked and moved, no effect was written", _WORKER),
    "sink.between_effects": Point("a statement of the handler was executed, others may follow", _WORKER),
    "sink.before_release": Point(
        "the fence is checked, nothing was done about what is asked for of parked records", _WORKER
    ),
    "sink.inbox_written": Point("the ids of a batch are in its transaction, its handler did not run", _WORKER),
    "sink.inbox_floor_raised": Point("ids below the new floor count as unknown, and none of them is deleted", _WORKER),
    "sink.before_park": Point("the effects are written, the parked records of the batch are not", _WORKER),
    "sink.before_db_commit": Point("all effects are written, COMMIT was not sent", _WORKER),
    "sink.before_position": Point(
        "the documents of a search sink's batch are durable, its position is as it was", _SEARCH
    ),
    "sink.after_db_commit": Point("the database committed, the sink does not know yet", _WORKER),
    "sink.before_settle": Point("a COMMIT was not answered, its rows were not read", _WORKER),
    "sink.after_settle": Point(
        "the rows said how the unanswered COMMIT ended, the sink does not act on it yet", _WORKER
    ),
    "sink.after_apply": Point(
        "records are applied and counted, the next ones were not asked for", _WORKER, in_task=True
    ),
    # A program's database transaction with records.
    "idempotency.claimed": Point("a key is claimed in an open transaction, nothing else is in it", _ENDPOINT),
    "idempotency.stored": Point("rows and response are in the transaction, COMMIT was not sent", _ENDPOINT),
    "transaction.before_rows": Point("the block has ended, none of its records is in the database", _PROGRAM),
    "transaction.before_mark": Point("the records are in the transaction, its number is not", _PROGRAM),
    "transaction.before_commit": Point("records and number are in the transaction, COMMIT was not sent", _PROGRAM),
    "transaction.after_commit": Point("the database committed, the program does not know yet", _PROGRAM),
    "transaction.before_settle": Point("a COMMIT was not answered, its number was not looked for", _PROGRAM),
    "transaction.after_settle": Point(
        "the number said how the unanswered COMMIT ended, the program does not know yet", _PROGRAM
    ),
    # A program that writes to a database and to Kafka at once.
    "dual.claim.after_reserve": Point(
        "a slot that nobody had bears our name, nothing of it was taken over", _DUAL, in_task=True
    ),
    "dual.claim.after_init": Point(
        "the slot's former producer is fenced, the database knows nothing of it", _DUAL, in_task=True
    ),
    "dual.claim.before_fence": Point("the fence of a slot is raised, and COMMIT was not sent", _DUAL),
    "dual.claim.after_fence": Point(
        "the fence of a slot is raised, and nothing was compared with what Kafka has open", _DUAL, in_task=True
    ),
    "dual.claim.before_complete": Point(
        "it is known how what a dead owner left open has to end, Kafka was not told", _DUAL, in_task=True
    ),
    "dual.claim.after_complete": Point(
        "what a dead owner left open is ended, its slot is not in use again", _DUAL, in_task=True
    ),
    "dual.claim.after_ended": Point(
        "conditional recipe: a former owner's transaction is committed under its saved name, and its row says so",
        _DUAL,
        in_task=True,
    ),
    "dual.claim.after_old_fence": Point(
        "conditional recipe: a former owner's transactional id is fenced, and not marked as resolved",
        _DUAL,
        in_task=True,
    ),
    "dual.claim.before_release": Point("a slot is recovered, and not given back", _DUAL, in_task=True),
    "dual.before_prepare": Point(
        "records of a transaction are handed to the producer, it is not prepared", _DUAL, in_task=True
    ),
    "dual.after_prepare": Point("Kafka keeps the transaction open, the database has not its name", _DUAL, in_task=True),
    "dual.before_mark": Point("the session knows that Kafka is prepared, its name is not in the database", _DUAL),
    "dual.before_commit": Point("rows and the name of the Kafka transaction are written, COMMIT was not sent", _DUAL),
    "dual.after_commit": Point("the database committed, nobody has told Kafka", _DUAL),
    "dual.before_complete": Point("the decision is known, EndTxn was not sent", _DUAL, in_task=True),
    "dual.after_complete": Point("Kafka has the decision, its slot is not free yet", _DUAL, in_task=True),
    "dual.settle.before": Point("COMMIT was not answered, the slot's row was not read", _DUAL),
    "dual.settle.after": Point("the slot's row says how the unanswered COMMIT ended, nobody acted on it", _DUAL),
    # The relay of an outbox.
    "outbox.before_take_over": Point("lanes are given to a relay, nothing is done about it", _RELAY, in_task=True),
    "outbox.before_owner_commit": Point("the owner epochs of lanes are raised in an open transaction", _RELAY),
    "outbox.after_owner": Point(
        "the owner epochs are raised and committed, the predecessor's producers are not fenced", _RELAY, in_task=True
    ),
    "outbox.after_init": Point(
        "the predecessor is fenced in Kafka, the manifests' ends are not known", _RELAY, in_task=True
    ),
    "outbox.after_ends": Point("the ends of the manifests are known, nothing of them was read", _RELAY, in_task=True),
    "outbox.between_polls": Point("a part of a topic is read, a manifest's or one to compare", _RELAY, in_task=True),
    "outbox.after_manifest": Point(
        "the last manifests are known, what they list may still be in the table", _RELAY, in_task=True
    ),
    "outbox.after_clean_up": Point(
        "what a dead relay had published is deleted, the lanes are not at work", _RELAY, in_task=True
    ),
    "outbox.after_compare": Point(
        "it is known which resurrected rows are in their topics, all are in the table", _RELAY, in_task=True
    ),
    "outbox.after_reconcile": Point(
        "Kafka has the empty manifest that ends a comparison, the database does not know", _RELAY, in_task=True
    ),
    "outbox.after_take_over": Point("lanes are ours, nothing of them was read", _RELAY, in_task=True),
    "outbox.after_read": Point("rows are in memory, and none of them was published", _RELAY, in_task=True),
    "outbox.before_hold_commit": Point(
        "a row is marked as held with its key in an open transaction of the database", _RELAY
    ),
    "outbox.after_hold": Point(
        "a row is held with its key, the others of its batch are in memory", _RELAY, in_task=True
    ),
    "outbox.before_begin": Point("the records of a batch are encoded, no transaction is open", _RELAY, in_task=True),
    "outbox.before_manifest": Point(
        "the records are handed to the producer, the manifest that lists them is not", _RELAY, in_task=True
    ),
    "outbox.before_commit": Point(
        "records and manifest are handed to the producer, the end was not asked for", _RELAY, in_task=True
    ),
    "outbox.after_commit": Point(
        "Kafka has records and manifest, the relay does not count them as published", _RELAY, in_task=True
    ),
    "outbox.after_abort": Point(
        "a transaction was refused and is aborted, its rows are in no lane's hand", _RELAY, in_task=True
    ),
    "outbox.before_delete": Point(
        "the lanes' rows name the batches that are deleted, in a transaction that has not deleted them", _RELAY
    ),
    "outbox.before_delete_commit": Point("published rows are deleted in an open transaction", _RELAY),
    "outbox.after_delete": Point(
        "the database has deleted published rows, the relay still has them in hand", _RELAY, in_task=True
    ),
    "outbox.after_truncate": Point(
        "a table of dead rows is truncated, what was left is not back in it, nothing is committed", _RELAY
    ),
    # The broker: records.
    "broker.after_join": Point(
        "a partition is in the transaction, durably; the batch that it came with is not appended", _BROKER
    ),
    "broker.before_append": Point("the broker is about to append a batch", _BROKER),
    "broker.after_append": Point("the batch is in the file, the producer has no answer", _BROKER),
    # The broker: transactions.
    "broker.before_init": Point("InitProducerId arrived, nothing of it is durable", _BROKER),
    "broker.after_init": Point("a new identity is durable, the producer has no answer", _BROKER),
    "broker.before_prepare": Point("EndTxn arrived, its decision is not durable", _BROKER),
    "broker.after_prepare": Point("the decision is durable, no marker was written", _BROKER),
    "broker.between_markers": Point("some of the transaction's markers were written", _BROKER),
    "broker.after_markers": Point("all markers were written, the transaction is not complete in the log", _BROKER),
    "broker.after_complete": Point("the transaction is complete in the log, the producer has no answer", _BROKER),
    "broker.before_time_out": Point("a transaction is open for too long, its abort is not decided", _BROKER),
    "broker.before_finish": Point(
        "a decided transaction without its end was found, nothing was written for it", _BROKER
    ),
    "broker.before_orphan": Point("a transaction that no coordinator knows was found in a log, and is open", _BROKER),
    # The broker: groups and its own topics.
    "broker.before_offsets": Point("offsets of a group arrived and are allowed, nothing is written", _BROKER),
    "broker.after_offsets": Point("offsets of a group are durable, the client has no answer", _BROKER),
    "broker.before_offsets_end": Point(
        "staged offsets are to count or to go, the batch that says so is not written", _BROKER
    ),
    "broker.before_group": Point("a group changed in memory, its records are not written", _BROKER),
    "broker.after_group": Point("a group's change is durable, no member has heard of it", _BROKER),
    "broker.after_checkpoint": Point(
        "a coordinator's state is written whole, the changes before it are still there", _BROKER
    ),
    "broker.before_metadata": Point(
        "a change of topics or identities is to be written to metadata.log", _BROKER, writes=True
    ),
    "broker.after_metadata": Point("a change of topics or identities is durable, and does not count yet", _BROKER),
    "broker.before_metadata_rename": Point("metadata.log was written anew at the start, the old file counts", _BROKER),
    # The log.
    "log.before_write": Point("a batch or marker is to be written behind the last one", _BROKER, writes=True),
    "log.after_write": Point("a batch or marker is in the file, and not in the log's state", _BROKER),
    "log.before_sync": Point("bytes of the log are in the file, the disk was not asked for them", _BROKER),
    "log.after_sync": Point("the disk has the bytes, nobody heard of it", _BROKER),
    "log.before_roll": Point("the growing segment is full, and not closed", _BROKER),
    "log.after_seal": Point("the closed segment has its index, the next one does not exist", _BROKER),
    "log.after_roll": Point("the next segment exists and is empty, there is no snapshot of it", _BROKER),
    "log.before_snapshot": Point("a snapshot of the log is to be written", _BROKER),
    "log.after_snapshot": Point("the new snapshot counts, the older ones are not deleted", _BROKER),
    "file.before_write": Point(
        "an index, a snapshot or another small file is to be written beside the one that counts", _BROKER, writes=True
    ),
    "file.before_rename": Point("the new small file is whole, the old one counts", _BROKER),
    "recovery.before_scan": Point("a log is about to be read as far as no snapshot tells", _BROKER),
    "recovery.before_cut": Point("a torn tail was found, and is still in the file", _BROKER),
    "recovery.after_cut": Point("the torn tail is cut off, the log is not open", _BROKER),
    "recovery.before_index": Point("an index is missing or damaged, and not made anew", _BROKER),
    "recovery.after_index": Point("the indexes are made anew in memory", _BROKER),
    "retention.before_start": Point("records are to be deleted, the log's new start is not remembered", _BROKER),
    "retention.after_start": Point("the log's new start is remembered, the segments below it are there", _BROKER),
    "retention.between_deletions": Point("some of the segments below the log's start are deleted", _BROKER),
    "compaction.before_write": Point(
        "a part of a compacted segment is to be written, into a file that does not count", _BROKER, writes=True
    ),
    "compaction.after_write": Point("the compacted segment is whole on the disk and has no index", _BROKER),
    "compaction.before_swap": Point(
        "a compacted segment and its index are on the disk, the segments that it replaces count", _BROKER
    ),
    "compaction.after_swap": Point(
        "the compacted segment counts, the others that it replaces are still there", _BROKER
    ),
    "compaction.between_deletions": Point("some of the segments that were replaced are deleted", _BROKER),
    "compaction.after_snapshot": Point("the compacted segment is in place, and the next start knows it", _BROKER),
}
"""Every failpoint by its name. What is not here cannot be armed, and every one here has its cases in the tests."""

_COUNT_ALL = "*:count"

_armed: dict[str, tuple[str, int]] = {}
_hits: dict[str, int] = {}
_counting = threading.Lock()
"""Sinks and files have threads of their own."""


def arm_failpoints(spec: str, *, profile: str = "dev") -> None:
    """Arm failpoints from `name:action:nth[,...]`: the nth hit acts, once; without a number the first.

    Actions: `kill` and `stop` send this process the signal, `raise` raises `FailpointRaised`, `delay=SECONDS` blocks
    the thread, `cancel` cancels the asyncio task, `torn=BYTES` writes only so many bytes (modulo the length) of what
    is about to be written and then kills. `*:count` does nothing but count every hit, for `failpoint_hits`.

    Raises `ConfigurationError`, with nothing armed, for an unknown name or action, for an action that the point does
    not have, and in a production profile.
    """
    _armed.clear()
    _hits.clear()
    armed: dict[str, tuple[str, int]] = {}
    for item in filter(None, spec.split(",")):
        if profile == "production":
            raise ConfigurationError(
                "SEMEL_FAILPOINT is set but SEMEL_PROFILE is production: failpoints kill processes on purpose. "
                "Unset one of the two."
            )
        if item == _COUNT_ALL:
            armed["*"] = ("count", 0)
            continue
        name, _, rest = item.partition(":")
        action, _, nth = rest.partition(":")
        _check(name, action, nth)
        armed[name] = (action, int(nth or 1))
    _armed.update(armed)


def _check(name: str, action: str, nth: str) -> None:
    point = FAILPOINTS.get(name)
    if point is None:
        raise ConfigurationError(
            f"SEMEL_FAILPOINT names {name!r}, which does not exist. Known: {', '.join(sorted(FAILPOINTS))}."
        )
    if not _is_action(action):
        every = "kill, stop, raise, delay=SECONDS, cancel, torn=BYTES"
        raise ConfigurationError(f"SEMEL_FAILPOINT action {action!r} is not one of {every}.")
    kind = action.partition("=")[0]
    allowed = [text.partition("=")[0] for text in point.actions]
    if kind not in allowed:
        why = "no asyncio task runs there" if kind == "cancel" else "nothing is written there"
        raise ConfigurationError(
            f"SEMEL_FAILPOINT action {action!r} is not possible at {name}: {why}. Possible: {', '.join(point.actions)}."
        )
    if nth and (not nth.isdigit() or int(nth) == 0):
        raise ConfigurationError(f"SEMEL_FAILPOINT hit number {nth!r} is not a whole number from 1.")


def _is_action(action: str) -> bool:
    kind, equals, value = action.partition("=")
    if kind == "torn":
        return value.isascii() and value.isdigit()
    if kind == "delay":
        try:
            return math.isfinite(float(value)) and float(value) >= 0
        except ValueError:
            return False
    return kind in ("kill", "stop", "raise", "cancel") and not equals


def failpoint_hits() -> dict[str, int]:
    """How often each point was passed since failpoints were armed; empty when none are."""
    with _counting:
        return dict(_hits)


def is_armed() -> bool:
    """Whether any point is armed in this process."""
    return bool(_armed)


def failpoint(name: str, file: int = -1, data: bytes | bytearray | memoryview = b"", position: int = 0) -> None:
    """Do what was armed for this point, if anything; costs one truth test when nothing is armed.

    A point that writes hands over what it is about to write: the open file, the bytes, and where they go.
    """
    if _armed:
        _passed(name, file, data, position)


def _passed(name: str, file: int, data: bytes | bytearray | memoryview, position: int) -> None:
    with _counting:
        hit = _hits[name] = _hits.get(name, 0) + 1
    action, nth = _armed.get(name, ("", 0))
    if hit != nth:
        return
    log.warning("failpoint %s acts: %s at hit %d", name, action, hit)
    kind, _, value = action.partition("=")
    if kind == "delay":
        time.sleep(float(value))  # Blocks the thread on purpose, as a long pause would.
    elif kind == "raise":
        raise FailpointRaised(f"failpoint {name} (hit {nth})")
    elif kind == "cancel":
        _cancel(name)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        if kind == "torn":
            os.pwrite(file, memoryview(data)[: int(value) % len(data)], position)
        os.kill(os.getpid(), signal.SIGKILL)


def _cancel(name: str) -> None:
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    if task is None:
        raise ConfigurationError(
            f"failpoint {name} was passed outside of an asyncio task, so nothing can be cancelled."
        )
    task.cancel(f"failpoint {name}")

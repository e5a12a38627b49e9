"""Failpoints: named lines at which a process can be made to die, stop, fail, wait, be cancelled or tear a write.

One stands in every durable step and in every await between two durable steps, so that a test can name the moment at
which something goes wrong instead of waiting for chance. Nothing is armed unless `SEMEL_FAILPOINT` says so; a point
then costs a call and one truth test.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import threading
import time
from typing import NamedTuple

from semel.errors import ConfigurationError, SemelError

__all__ = ["FAILPOINTS", "FailpointRaised", "Point", "arm_failpoints", "failpoint", "failpoint_hits"]


class FailpointRaised(SemelError):
    """Raised by a failpoint with the action `raise`; stands for any unexpected exception at that line."""


class Point(NamedTuple):
    """One failpoint: what has and has not happened there, and what besides dying can be done there."""

    what: str
    in_task: bool = False
    """An asyncio task runs there, which `cancel` ends as a shutdown or a client that goes away would."""
    writes: bool = False
    """A file is about to be written, of which `torn` writes the beginning."""

    @property
    def actions(self) -> tuple[str, ...]:
        """The actions that can be armed here, as an error message shows them."""
        more = (("cancel",) if self.in_task else ()) + (("torn=BYTES",) if self.writes else ())
        return ("kill", "stop", "raise", "delay=SECONDS", *more)


def _task(what: str) -> Point:
    return Point(what, in_task=True)


def _write(what: str) -> Point:
    return Point(what, writes=True)


FAILPOINTS: dict[str, Point] = {
    # An HTTP instance.
    "ingress.topics_made": _task("the topics are there, this instance has no producer identity"),
    "ingress.before_open": _task("the end of the reply partition is known, and nothing is read up to it"),
    "ingress.admitted": _task("a request is read and checked, and has no number yet"),
    "ingress.before_append": _task("an HTTP instance is about to append a request to the requests topic"),
    "ingress.after_append": _task("the request is in the log, the client has no answer yet"),
    "ingress.replies_read": _task("replies were read, and nobody who waits for them has heard"),
    "ingress.after_reply": _task("the reply to a request is here, its client was not answered"),
    "ingress.before_look_up": _task("somebody asks for an operation, and the question is not in the log"),
    "ingress.after_look_up": _task("the operation is known, who asked was not answered"),
    "ingress.before_purge": _task("it is known which requests are answered, none of them is deleted"),
    # The owner of requests.
    "owner.before_handler": _task("a request is new, and its handler has not run"),
    "owner.after_handler": _task("the handler ran; its effects, the outcome and the reply are in memory only"),
    "owner.before_replay": _task("the outcome of a request is known already, the reply to this copy is in no unit"),
    "owner.before_look_up": _task("a look-up was read, its reply is in no unit"),
    # An engine comes up.
    "engine.before_identity": _task("Kafka answers, the transactional id was not taken over"),
    "engine.after_identity": _task("the predecessor is fenced and its transaction aborted, the group was not joined"),
    # Partitions come and go.
    "consume.before_poll": _task("nothing is in hand, and the consumer is about to be asked"),
    "consume.after_poll": _task("records are in memory, and none of them was worked on"),
    "consume.before_assign": _task("partitions were given to us, and nothing is known of them"),
    "consume.after_assign": _task("position and state of new partitions are in place, nothing of them was read"),
    "consume.before_revoke": _task("partitions are to be given back, the unit in hand is not committed"),
    "consume.after_revoke": _task("the unit in hand is committed, the partitions are still in memory"),
    "restore.after_offsets": _task("the committed offsets are known, the ends of the changelogs are not"),
    "restore.after_ends": _task("the ends of the changelogs are known, nothing of them was read"),
    "restore.between_polls": _task("a part of the state is read"),
    "restore.after_state": _task("the state is read, and not in its place"),
    # A processor's unit of work.
    "handler.before": _task("a record is about to be handled, earlier ones of the unit were"),
    "handler.between_effects": _task("the handler of a record gave some of its effects"),
    "handler.after": _task("all effects of a record are known, none is in the unit"),
    "handler.before_park": _task("a record cannot be processed, and is not in the unit as a parked one"),
    "unit.before_produce": _task("handlers ran, nothing of the transaction was sent"),
    "unit.between_batches": _task("the first batch is handed to the producer, others are not"),
    "unit.after_produce": _task("outputs are handed to the producer, the input offset is not in the transaction"),
    "unit.before_end_transaction": _task("outputs and offset are handed to the producer, the end was not asked for"),
    "unit.after_end_transaction": _task("the transaction is committed, local state is not updated"),
    "unit.after_state": _task("local state is updated, the committed offset is not remembered here"),
    "unit.before_recovery": _task("a unit failed, its transaction is open or its end is unknown"),
    "unit.after_abort": _task("the failed transaction has ended, positions and state are those of before"),
    "unit.after_recovery": _task("positions and state are read again, nothing was worked on"),
    # The transactional producer.
    "producer.before_init": _task("InitProducerId was not sent"),
    "producer.after_init": _task("the coordinator gave an identity, the producer does not have it"),
    "producer.after_send": Point("a batch is on its way, and nobody knows whether it arrived"),
    "producer.after_answer": Point("the broker acknowledged a batch, the producer does not know"),
    "producer.before_offsets": _task("the offsets were not sent, some batches may have been"),
    "producer.after_offsets": _task("the group's coordinator staged the offsets, the producer does not know"),
    "producer.before_end": _task("everything is acknowledged, EndTxn was not sent"),
    "producer.after_end": _task("EndTxn was answered, the producer does not know"),
    "producer.before_resolve": _task("the end of a transaction is unknown, and was not asked for again"),
    "producer.before_prepare": _task("everything is acknowledged, the transaction is not closed to writes (KIP-939)"),
    "producer.after_prepare": _task("the transaction has its name, the database does not know it (KIP-939)"),
    "producer.before_complete": _task("the database has decided, Kafka was not told (KIP-939)"),
    "producer.after_complete": _task("Kafka has ended the prepared transaction as decided (KIP-939)"),
    "shared.before_write": _write("committed offsets, metrics or a status are to be written for the host's processes"),
    "shared.before_rename": Point("the new file for the host's processes is whole, the old one counts"),
    # A sink.
    "sink.before_take_over": _task("partitions are given to a sink, their fences are not raised"),
    "sink.before_fence_commit": Point("the fences are raised in an open transaction of the database"),
    "sink.after_fence": _task("the fences are raised and committed, the positions are not held against the log"),
    "sink.before_seek": _task("a partition is ours, the consumer stands elsewhere"),
    "sink.after_poll": _task("a sink's records are in memory, and none was applied"),
    "sink.before_begin": Point("no transaction of the database is open for the records in hand"),
    "sink.before_advance": Point("the database transaction is open, the position row is as it was"),
    "sink.before_effects": Point("the position row is locked and moved, no effect was written"),
    "sink.between_effects": Point("a statement of the handler was executed, others may follow"),
    "sink.before_park": Point("the effects are written, the parked records of the batch are not"),
    "sink.before_db_commit": Point("all effects are written, COMMIT was not sent"),
    "sink.after_db_commit": Point("the database committed, the sink does not know yet"),
    "sink.before_settle": Point("a COMMIT was not answered, its rows were not read"),
    "sink.after_settle": Point("the rows said how the unanswered COMMIT ended, the sink does not act on it yet"),
    "sink.after_apply": _task("records are applied and counted, the next ones were not asked for"),
    # The broker: records.
    "broker.after_join": Point(
        "a partition is in the transaction, durably; the batch that it came with is not appended"
    ),
    "broker.before_append": Point("the broker is about to append a batch"),
    "broker.after_append": Point("the batch is in the file, the producer has no answer"),
    # The broker: transactions.
    "broker.before_init": Point("InitProducerId arrived, nothing of it is durable"),
    "broker.after_init": Point("a new identity is durable, the producer has no answer"),
    "broker.before_prepare": Point("EndTxn arrived, its decision is not durable"),
    "broker.after_prepare": Point("the decision is durable, no marker was written"),
    "broker.between_markers": Point("some of the transaction's markers were written"),
    "broker.after_markers": Point("all markers were written, the transaction is not complete in the log"),
    "broker.after_complete": Point("the transaction is complete in the log, the producer has no answer"),
    "broker.before_time_out": Point("a transaction is open for too long, its abort is not decided"),
    "broker.before_finish": Point("a decided transaction without its end was found, nothing was written for it"),
    "broker.before_orphan": Point("a transaction that no coordinator knows was found in a log, and is open"),
    # The broker: groups and its own topics.
    "broker.before_offsets": Point("offsets of a group arrived and are allowed, nothing is written"),
    "broker.after_offsets": Point("offsets of a group are durable, the client has no answer"),
    "broker.before_offsets_end": Point("staged offsets are to count or to go, the batch that says so is not written"),
    "broker.before_group": Point("a group changed in memory, its records are not written"),
    "broker.after_group": Point("a group's change is durable, no member has heard of it"),
    "broker.after_checkpoint": Point("a coordinator's state is written whole, the changes before it are still there"),
    "broker.before_metadata": _write("a change of topics or identities is to be written to metadata.log"),
    "broker.after_metadata": Point("a change of topics or identities is durable, and does not count yet"),
    "broker.before_metadata_rename": Point("metadata.log was written anew at the start, the old file counts"),
    # The log.
    "log.before_write": _write("a batch or marker is to be written behind the last one"),
    "log.after_write": Point("a batch or marker is in the file, and not in the log's state"),
    "log.before_sync": Point("bytes of the log are in the file, the disk was not asked for them"),
    "log.after_sync": Point("the disk has the bytes, nobody heard of it"),
    "log.before_roll": Point("the growing segment is full, and not closed"),
    "log.after_seal": Point("the closed segment has its index, the next one does not exist"),
    "log.after_roll": Point("the next segment exists and is empty, there is no snapshot of it"),
    "log.before_snapshot": Point("a snapshot of the log is to be written"),
    "log.after_snapshot": Point("the new snapshot counts, the older ones are not deleted"),
    "file.before_write": _write(
        "an index, a snapshot or another small file is to be written beside the one that counts"
    ),
    "file.before_rename": Point("the new small file is whole, the old one counts"),
    "recovery.before_scan": Point("a log is about to be read as far as no snapshot tells"),
    "recovery.before_cut": Point("a torn tail was found, and is still in the file"),
    "recovery.after_cut": Point("the torn tail is cut off, the log is not open"),
    "recovery.before_index": Point("an index is missing or damaged, and not made anew"),
    "recovery.after_index": Point("the indexes are made anew in memory"),
    "retention.before_start": Point("records are to be deleted, the log's new start is not remembered"),
    "retention.after_start": Point("the log's new start is remembered, the segments below it are there"),
    "retention.between_deletions": Point("some of the segments below the log's start are deleted"),
    "compaction.before_write": _write(
        "a part of a compacted segment is to be written, into a file that does not count"
    ),
    "compaction.after_write": Point("the compacted segment is whole on the disk and has no index"),
    "compaction.before_swap": Point(
        "a compacted segment and its index are on the disk, the segments that it replaces count"
    ),
    "compaction.after_swap": Point("the compacted segment counts, the others that it replaces are still there"),
    "compaction.between_deletions": Point("some of the segments that were replaced are deleted"),
    "compaction.after_snapshot": Point("the compacted segment is in place, and the next start knows it"),
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

"""What an open transaction is, which decision about it is right, and why. Sans-IO: facts in, a finding out.

The rules are those of the dual write (design, 3.10): the database decides. A row that holds the name of the transaction
that is open means that the database committed with it: commit. A row that holds another name, or none, means that it
did not, and, once its fence is raised, never will: abort. Where the row cannot be read nobody knows, and nothing is
done. Everything else that is open has an owner of its own, and the question is only whether to wait for him.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from semel.client.two_phase import NO_TIMEOUT_MS, PreparedState
from semel.dualwrite.conditional import ConditionalName
from semel.types import TopicPartition

__all__ = ["UNKNOWN", "Decision", "Finding", "Kind", "OpenTransaction", "Slot", "TxnRow", "judge"]


class Kind(StrEnum):
    """Whose transaction it is."""

    SLOT = "dual write"
    LANE = "outbox lane"
    COMPONENT = "component"
    FOREIGN = "foreign client"
    HANGING = "hanging"


class Decision(StrEnum):
    """What is right to do about it."""

    COMMIT = "commit"
    ABORT = "abort"
    WAIT = "wait"
    """It ends without anybody's help; to abort it by hand is safe and seldom worth it."""
    NOTHING = "nothing"
    """It is decided, or not open any more: there is nothing to choose."""
    UNKNOWN = "unknown"
    """What would tell cannot be read: do nothing until it can."""


@dataclass(frozen=True, slots=True)
class TxnRow:
    """The row of a slot in `semel_txn`."""

    owner_epoch: int
    owner: str
    prepared: str
    resolved_epoch: int = -1


@dataclass(frozen=True, slots=True)
class Slot:
    """What the database says of a slot."""

    name: str
    database: str
    """Its name in the app, or its URL without the password."""
    row: TxnRow | None = None
    problem: str = ""
    """Why the row says nothing: the database is away, is of another environment, or nobody said which it is."""
    owner_runs: bool | None = None
    """Whether the owner's process runs on this host; None where that cannot be seen from here."""
    owner_epoch: int | None = None
    """Of the conditional recipe: the epoch that is part of the transactional id."""


@dataclass(frozen=True, slots=True)
class OpenTransaction:
    """What Kafka says of one transaction, and what is known of who began it."""

    transactional_id: str
    """Empty for a hanging one: no coordinator knows it."""
    name: PreparedState
    state: str
    age_seconds: float
    timeout_ms: int
    partitions: tuple[TopicPartition, ...]
    kind: Kind
    app: str = ""
    component: str = ""
    slot: Slot | None = None
    start_offset: int = -1
    """Of a hanging one: where readers of committed records stand."""
    ended_as: str = ""
    """Of a hanging one: the transactional id whose coordinator still says how this transaction ended."""
    is_committed: bool = False
    """Where `ended_as` is given: how."""

    @property
    def id(self) -> str:
        """What the doctor's verbs call it: the transactional id, or where it hangs (`topic-0@pid:epoch`)."""
        return self.transactional_id or f"{self.partitions[0]}@{self.name}"

    @property
    def never_ends(self) -> bool:
        """Whether only its owner or an operator ends it."""
        return self.kind is Kind.HANGING or self.timeout_ms == NO_TIMEOUT_MS

    @property
    def ends_in_seconds(self) -> float | None:
        """Until the coordinator aborts it, None where it never does, or where nothing is open."""
        return (
            None if self.never_ends or self.state != "Ongoing" else max(0.0, self.timeout_ms / 1000 - self.age_seconds)
        )


@dataclass(frozen=True, slots=True)
class Finding:
    """The answer: what is right, why, what happens to whoever reads and writes, and what to run."""

    decision: Decision
    title: str
    why: str
    then: str


_DECIDED = {"PrepareCommit": "committed", "PrepareAbort": "aborted"}
_OPEN = ("Ongoing", "Hanging")
UNKNOWN = "Unknown"
"""The state of an id that no coordinator knows, and a row does."""


def judge(item: OpenTransaction) -> Finding:
    """Which decision about an open transaction is right, and why."""
    if item.state in _DECIDED:
        return _decided(item)
    if item.state not in _OPEN:
        return _closed(item)
    return {
        Kind.SLOT: _slot,
        Kind.LANE: _lane,
        Kind.COMPONENT: _component,
        Kind.FOREIGN: _foreign,
        Kind.HANGING: _hanging,
    }[item.kind](item)


def _decided(item: OpenTransaction) -> Finding:
    end = _DECIDED[item.state]
    places = ", ".join(map(str, item.partitions)) or "its partitions"
    return Finding(
        Decision.NOTHING,
        f"decided: {end}",
        f"EndTxn was accepted and is in Kafka's transaction log: it is {end}, and cannot go back. Its markers are "
        f"being written into {places}.",
        "Wait. Where it stays like this, a partition cannot be written: look at the brokers that lead these.",
    )


def _closed(item: OpenTransaction) -> Finding:
    slot = item.slot
    if slot is not None and slot.row is not None and slot.owner_epoch is not None:
        held = ConditionalName.parse(slot.row.prepared)
        if held is not None and held.owner_epoch == slot.owner_epoch and _may_be_lost(item, held, slot.row):
            return _lost(item, slot, held)
    last = {"CompleteCommit": "its last transaction is committed", "CompleteAbort": "its last transaction is aborted"}
    state = last.get(item.state, "it waits for its next transaction")
    return Finding(
        Decision.NOTHING,
        "nothing is open",
        f"Nothing is open under {item.transactional_id!r}: {state}.",
        "There is nothing to do.",
    )


# --- The dual write ---


def _slot(item: OpenTransaction) -> Finding:
    slot = item.slot
    assert slot is not None
    if slot.problem:
        return Finding(
            Decision.UNKNOWN,
            "in doubt: the database does not say",
            f"The row of slot {slot.name} decides, and {slot.problem}. The database may have committed with this "
            "transaction, and then an abort would lose its records.",
            "Do nothing to it. Readers of its partitions wait; ask again when the database can be read.",
        )
    if slot.row is None:
        return _lost_row(item, slot)
    if slot.owner_epoch is not None:
        return _conditional(item, slot, slot.row)
    if slot.row.prepared == str(item.name):
        return _with_owner(slot, _committed(item, slot))
    return _with_owner(slot, _not_committed(item, slot, slot.row))


def _committed(item: OpenTransaction, slot: Slot) -> Finding:
    return Finding(
        Decision.COMMIT,
        "the database committed with it",
        f"Row {slot.name} of semel_txn in {slot.database} holds {item.name}, and that is the transaction that is open: "
        "it was written there by the database transaction that decided. Its process ended, or was cut off, before "
        "it told Kafka.",
        "The app's next process that claims the slot commits it by itself. To do it now: `semel doctor txn commit`. An "
        "abort would lose its records while the rows stay.",
    )


def _not_committed(item: OpenTransaction, slot: Slot, row: TxnRow) -> Finding:
    holds = f"holds {row.prepared}, an earlier transaction" if row.prepared else "holds no transaction yet"
    return Finding(
        Decision.ABORT,
        "the database did not commit with it",
        f"Row {slot.name} of semel_txn in {slot.database} {holds}; open is {item.name}. So the database transaction "
        "that would have decided for it is not committed. Nobody was told that it was.",
        "The app's next process that claims the slot aborts it by itself. To do it now: `semel doctor txn abort`, "
        "which raises the database's fence before it decides, so that the rows cannot come after all.",
    )


def _with_owner(slot: Slot, finding: Finding) -> Finding:
    """The same, where the owner's process is seen to run: then it is most likely just at work on it."""
    if not slot.owner_runs:
        return finding
    assert slot.row is not None
    return Finding(
        finding.decision,
        finding.title,
        f"{finding.why} Its owner runs on this host ({slot.row.owner}) and may just be at work on it: look again.",
        f"Wait for the owner first. {finding.then} A running owner is fenced by that, and claims another slot.",
    )


def _lost_row(item: OpenTransaction, slot: Slot) -> Finding:
    return Finding(
        Decision.ABORT,
        "its row is not there",
        f"semel_txn in {slot.database} has no row {slot.name}. A slot's row is written before its first transaction, "
        "and the rows of a transaction are committed together with it: a database without the row has none of what "
        f"{item.name} was written with. It was restored to an earlier state or made anew, or this is not the "
        "database that the app worked on.",
        "Make sure that this is the app's database. If it is, abort: `semel doctor txn abort`. If its newest state may "
        "come back from elsewhere, wait for that: nothing is lost while the transaction is open.",
    )


def _may_be_lost(item: OpenTransaction, held: ConditionalName, row: TxnRow) -> bool:
    """Whether the row names a transaction of this id that Kafka did not commit, as far as it can tell."""
    if held.is_ended or row.resolved_epoch >= held.owner_epoch:
        return False
    if item.state == "CompleteAbort":
        return item.name.epoch == held.name.epoch + 1
    return item.state in ("Empty", UNKNOWN)


def _lost(item: OpenTransaction, slot: Slot, held: ConditionalName) -> Finding:
    certain = item.state == "CompleteAbort"
    if certain:
        fate = "Kafka aborted it: nobody recovered the slot within the transaction's time-out, or somebody ended it"
    elif item.state == UNKNOWN:
        fate = "Kafka has forgotten the id, as it does a week after its last use, and does not tell how it ended"
    else:
        fate = "somebody began the id anew, so that Kafka does not tell any more how it ended"
    return Finding(
        Decision.ABORT,
        "LOST: the database committed it, Kafka aborted it" if certain else "it may be lost",
        f"Row {slot.name} of semel_txn in {slot.database} holds {held.name}: the database committed with it. {fate}. "
        f"Its rows are there{', and readers do not see what was sent with them' if certain else ''}.",
        ("" if certain else "Look whether its records can be read; if not, send them again. ")
        + "They are in the log until retention deletes them: read them with isolation.level=read_uncommitted "
        f"(producer {held.name.producer_id}, epoch {held.name.epoch}), and send them again. Then give the slot back: "
        "`semel doctor txn abort`.",
    )


def _conditional(item: OpenTransaction, slot: Slot, row: TxnRow) -> Finding:
    """The recipe without keepPreparedTxn: the transactional id carries the epoch of the owner, the name too."""
    held = ConditionalName.parse(row.prepared)
    if held is not None and held[:2] == (slot.owner_epoch, item.name):
        found = _committed(item, slot)
        if item.never_ends:
            return _with_owner(slot, found)
        left = item.ends_in_seconds or 0.0
        return Finding(
            found.decision,
            f"{found.title}; {left:.0f} s are left",
            f"{found.why} This Kafka cannot keep it open: in {left:.0f} s it aborts it, and then its records are lost.",
            "Commit it now: `semel doctor txn commit --yes`, or start the app, which does it first of all.",
        )
    return _with_owner(slot, _not_committed(item, slot, row))


# --- Everything else ---


def _ends(item: OpenTransaction) -> str:
    left = item.ends_in_seconds
    return "It never ends by itself" if left is None else f"Kafka aborts it in {left:.0f} s"


def _lane(item: OpenTransaction) -> Finding:
    return Finding(
        Decision.WAIT,
        "a relay is publishing",
        f"Lane {item.transactional_id.rpartition('.')[2]} of an outbox: a relay is publishing rows, or was killed "
        "while it did. The rows stay in the outbox until their transaction is committed: nothing is lost either way.",
        f"{_ends(item)}; the next relay of the lane does so as soon as it starts. Start a relay (`semel run`) rather "
        "than abort by hand, which fences the one that may be at work and changes nothing else.",
    )


def _component(item: OpenTransaction) -> Finding:
    return Finding(
        Decision.WAIT,
        f"{item.component} is at work",
        f"A transaction of {item.component} of app {item.app}: its outputs and its position in the input. It is open "
        "while a unit of work is written, or its process was killed; then its input is handled again.",
        f"{_ends(item)}; a restart of the same slot does so at once. To abort by hand is safe: the worker, if it "
        "runs, ends as fenced and is started again.",
    )


def _foreign(item: OpenTransaction) -> Finding:
    if item.never_ends:
        return Finding(
            Decision.UNKNOWN,
            "prepared by another client",
            f"{item.transactional_id!r} is no id of this app. It was made for two-phase commit, so it waits for a "
            "decision that only its owner knows: some database or checkpoint may have committed with it already.",
            "Find its owner and let him end it. Kafka can only abort it from outside (`semel doctor txn abort` with "
            "--against-the-database), which loses its records if it was decided to commit.",
        )
    return Finding(
        Decision.WAIT,
        "another client's transaction",
        f"{item.transactional_id!r} is no id of this app: a producer of somebody else has it open. Whether it should "
        "commit only that producer knows; from outside Kafka can abort, never commit.",
        f"{_ends(item)}. To abort it now, which fences the producer: `semel doctor txn abort`.",
    )


def _hanging(item: OpenTransaction) -> Finding:
    at = item.partitions[0]
    if item.ended_as:
        return _unmarked(item, at)
    return Finding(
        Decision.ABORT,
        "hanging: no coordinator knows it",
        f"{at} has a transaction of producer {item.name} open since offset {item.start_offset}, and no coordinator has "
        "it among its open ones. So nobody will ever write its marker: a late write after the end, or a "
        "coordinator that lost it (KAFKA-14402). Readers of committed records stand there for ever.",
        "Abort it: `semel doctor txn abort` writes the marker into this one partition (KIP-664). A late write was "
        "never answered as committed. On Apache Kafka 4, where the partition has one replica and its broker was "
        "killed, it may also be a committed transaction whose marker was given up (KAFKA-20734), and whose producer "
        "has gone on since: look at its records first (isolation.level=read_uncommitted).",
    )


def _unmarked(item: OpenTransaction, at: TopicPartition) -> Finding:
    verb, done = ("commit", "committed") if item.is_committed else ("abort", "aborted")
    return Finding(
        Decision.COMMIT if item.is_committed else Decision.ABORT,
        f"hanging: {done}, and its marker is missing",
        f"{at} has transaction {item.name} open since offset {item.start_offset}. The coordinator of {item.ended_as} "
        f"says that it is {done} and complete, so it will not write the marker any more: it gave it up while the "
        "partition had no leader (KAFKA-20734). Readers of committed records stand there.",
        f"A worker of the app writes the marker within half a minute. To do it now: `semel doctor txn {verb}`.",
    )

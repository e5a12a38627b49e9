"""A transaction on a document store: one new document, and the decision in it.

1. The intent is inserted into the slot's log: from here on whoever takes the slot over knows which document to settle.
2. The document is inserted, with the name of the Kafka transaction in its field `semel`. That decides.

Both are inserts of something that must not be there yet, so both may be repeated until they are answered. What stands
in their place tells the rest: ourselves, a successor's claim, a fence.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple, Protocol, TypeVar

from semel.databases.database import without_password
from semel.databases.settling import SETTLE_SECONDS, insist
from semel.dualwrite.documents.log import Documents, Intent, SlotLog, fence, mark
from semel.dualwrite.target import Guard
from semel.errors import Conflict, Fatal, Fenced, OutcomeUnknown, Retriable, SemelError
from semel.failpoints import failpoint

__all__ = ["DocumentSession", "NewDocument"]

_FORGET_EVERY: Final = 100
"""Transactions after which a slot's old intents are deleted: each is a small document."""

T = TypeVar("T")


class _InDoubt(Retriable):
    """Nobody knows what a call did."""


class NewDocument(NamedTuple):
    """What a transaction inserts; the document has an `_id`."""

    collection: str
    document: dict[str, Any]


class _Database(Documents, Protocol):
    url: str

    def check(self) -> None: ...

    def close(self) -> None: ...


class DocumentSession:
    """See `semel.dualwrite.target.Target`. `database` may be shared; it is not closed here."""

    def __init__(self, database: _Database, *, settle_seconds: float = SETTLE_SECONDS) -> None:
        self._database = database
        self._settle_seconds = settle_seconds
        self._position: tuple[str, int, int] = ("", -1, 0)
        """Slot, owner epoch, and where its next entry goes."""
        self._is_open = self._is_checked = False
        self._done = 0
        self.is_fence_raised = False

    def __repr__(self) -> str:
        return f"<DocumentSession {self._position} on {without_password(self._database.url)}>"

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction was begun."""
        return self._is_open

    def begin(self) -> None:
        """Begin. Raises `Retriable` when the store is away, at the first time."""
        if not self._is_checked:
            self._database.check()
            self._is_checked = True
        self.is_fence_raised = False
        self._is_open = True

    def commit(self, work: NewDocument | None, guard: Guard | None) -> None:
        """Insert the document, with the decision if there is one. Raises as `Target.commit` says."""
        try:
            if guard is not None:
                if work is None:
                    raise Fatal(
                        "the transaction sends records and inserts no document, and the document is what decides about "
                        "them: insert one with tx.insert(collection, document). Nothing happened."
                    )
                self._decide(work, guard)
            elif work is not None:
                self._insert_alone(work)
        finally:
            self._is_open = False

    def rollback(self) -> None:
        """Nothing was done yet."""
        self._is_open = False

    def close(self) -> None:
        """Nothing is ours to close."""

    # --- With records ---

    def _decide(self, work: NewDocument, guard: Guard) -> None:
        slot, epoch, position = self._position
        if (slot, epoch) != (guard.slot, guard.owner_epoch):
            position = guard.owner_epoch + 1
        log = SlotLog(self._database, guard.slot)
        intent = Intent(work.collection, work.document["_id"], guard.decision)
        deadline = time.monotonic() + self._settle_seconds
        # Nothing is decided before the document is on its way, so an intent that cannot be told is no doubt.
        where, _ = self._insisting(lambda: log.intend(position, guard.owner, intent), deadline)
        if where is None:
            raise self._fenced(guard)
        self._position = (guard.slot, guard.owner_epoch, where + 1)
        document = {**work.document, "semel": mark(guard.slot, guard.decision)}
        failpoint("dual.before_commit")
        try:
            self._insert(NewDocument(work.collection, document), intent, guard)
        finally:
            self._forget(log, where)

    def _insert(self, work: NewDocument, intent: Intent, guard: Guard) -> None:
        deadline = time.monotonic() + self._settle_seconds
        try:
            inserted, doubts = self._insisting(lambda: self._database.insert(work.collection, work.document), deadline)
        except _InDoubt as error:
            raise self._unknown(error, guard, work) from error
        if inserted:
            return
        if doubts:
            there = self._settle(work, intent, guard, deadline)
        else:  # Something was there before us. Whatever it is, nothing of ours is on its way.
            there, _ = self._insisting(lambda: self._database.find(work.collection, intent.name), deadline)
        found: Any = None if there is None else there.get("semel")
        if found == work.document["semel"]:
            return
        is_fence = isinstance(found, dict) and found.get("slot") == guard.slot and "fence" in found
        if is_fence and found["fence"] > guard.owner_epoch:
            raise self._fenced(guard)
        raise self._taken(work, there)

    def _settle(self, work: NewDocument, intent: Intent, guard: Guard, deadline: float) -> dict[str, Any] | None:
        """What is in the document's place, for good, after an answer was lost."""
        try:
            failpoint("dual.settle.before")
            there, _ = self._insisting(lambda: self._database.find(work.collection, intent.name), deadline)
            if there is None:
                # Another unique index has no place for it now. A copy may still be on its way, and find one later:
                # after a fence it cannot.
                fence(self._database, guard.slot, intent, guard.owner_epoch)
                there, _ = self._insisting(lambda: self._database.find(work.collection, intent.name), deadline)
            failpoint("dual.settle.after")
        except Exception as error:
            raise self._unknown(error, guard, work) from error
        return there

    def _forget(self, log: SlotLog, position: int) -> None:
        self._done += 1
        if self._done % _FORGET_EVERY == 0:
            try:
                log.forget(position)
            except SemelError:
                return  # The next time.

    # --- Without ---

    def _insert_alone(self, work: NewDocument) -> None:
        """There is no slot that would tell, but the document tells of itself."""
        own = {"transaction": f"alone/{work.document['_id']}/{time.monotonic_ns()}"}
        document = {**work.document, "semel": own}
        deadline = time.monotonic() + self._settle_seconds
        try:
            inserted, _ = self._insisting(lambda: self._database.insert(work.collection, document), deadline)
            if inserted:
                return
            there, _ = self._insisting(lambda: self._database.find(work.collection, document["_id"]), deadline)
        except _InDoubt as error:
            raise OutcomeUnknown(
                f"{error}. The document {document['_id']!r} is in {work.collection} or not: look before you repeat it."
            ) from error
        if there is None or there.get("semel") != own:
            raise self._taken(work, there)

    # --- Waiting and errors ---

    def _insisting(self, call: Callable[[], T], deadline: float) -> tuple[T, int]:
        """The call's answer, and how often there was none before it. Raises `_InDoubt` at the deadline, and when it is
        refused after it was in doubt."""
        doubts = 0

        def is_away(error: Exception) -> bool:
            nonlocal doubts
            doubts += isinstance(error, Retriable)
            return isinstance(error, Retriable)

        try:
            return insist(call, is_away, deadline), doubts
        except SemelError as error:
            if doubts:
                raise _InDoubt(str(error)) from error
            raise

    def _fenced(self, guard: Guard) -> Fenced:
        return Fenced(
            f"slot {guard.slot} in {without_password(self._database.url)} belongs to another process now, which took "
            "this one for dead. Nothing happened."
        )

    def _taken(self, work: NewDocument, there: dict[str, Any] | None) -> Conflict:
        name, collection = work.document["_id"], work.collection
        if there is None:
            return Conflict(f"a unique index of {collection} has no place for document {name!r}. Nothing happened.")
        if isinstance(there.get("semel"), dict) and "fence" in there["semel"]:
            return Conflict(
                f"document {name!r} of {collection} is the fence of a transaction whose process died, and keeps it "
                "from happening late. Take another _id. Nothing happened."
            )
        return Conflict(f"document {name!r} is in {collection} already. Nothing happened.")

    def _unknown(self, cause: Exception, guard: Guard, work: NewDocument) -> OutcomeUnknown:
        return OutcomeUnknown(
            f"{cause}. The document and its records are there or neither is; recovery settles it. Look before you "
            f"repeat it: document {work.document['_id']!r} of {work.collection} has semel.transaction "
            f"{guard.decision!r} if it was done, and semel.fence if it never will be."
        )

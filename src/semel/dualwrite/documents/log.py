"""The log of a slot: claims and intents at positions that are taken once.

Everything rests on one thing: a document is inserted where none with its `_id` is, or not at all. An owner inserts at
the position behind its own last entry. Who takes a slot over inserts its claim behind the last entry of all, so the
former owner finds its next position taken, and is fenced. An insert may be repeated, and a copy that comes late changes
nothing.

Intents before an owner's last one are deleted. Claims never are: a position that is free again must not be one at which
a former owner would go on. (`tests/coordinator/test_document_dual_write_model.py` goes through every interleaving.)
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from semel.errors import Fatal, Retriable

__all__ = ["LOG", "Documents", "Intent", "SlotLog", "fence", "mark"]

LOG = "semel_txn"
_TRIES = 20
"""How often a claim is repeated because an owner or somebody else was quicker."""

Document = dict[str, Any]


class Documents(Protocol):
    """See `semel.dualwrite.documents.connection.DocumentDatabase`."""

    def insert(self, collection: str, document: Document) -> bool: ...

    def find(self, collection: str, name: Any) -> Document | None: ...

    def last(self, collection: str, match: dict[str, Any]) -> Document | None: ...

    def delete(self, collection: str, match: dict[str, Any]) -> None: ...


class Intent(NamedTuple):
    """The document that a transaction is about to insert, and what it says when it is there."""

    collection: str
    name: Any
    decision: str


def mark(slot: str, decision: str) -> Document:
    """What the field `semel` of a document holds that was inserted by a transaction."""
    return {"slot": slot, "transaction": decision}


class SlotLog:
    """The entries of one slot."""

    def __init__(self, documents: Documents, slot: str) -> None:
        self._documents = documents
        self._slot = slot

    def __repr__(self) -> str:
        return f"<SlotLog {self._slot}>"

    def begin(self, owner: str) -> bool:
        """The first entry; False where there is one."""
        return self._insert(0, "claim", owner)

    def claim(self, owner: str) -> tuple[int, Intent | None]:
        """Insert a claim behind everything: its position, which is the fence, and the last intent before it.

        Raises `Fatal` where there is no slot.
        """
        for _ in range(_TRIES):
            head = self._documents.last(LOG, {"slot": self._slot})
            if head is None:
                raise Fatal(f"slot {self._slot} has no entry in {LOG}.")
            position = head["at"] + 1
            if self._insert(position, "claim", owner):
                return position, self.last_intent(position)
        raise Retriable(f"slot {self._slot} was claimed by others {_TRIES} times meanwhile.")

    def last_intent(self, before: int) -> Intent | None:
        """The last intent below a position; what is deleted is below it."""
        found = self._documents.last(LOG, {"slot": self._slot, "kind": "intent", "at": {"$lt": before}})
        return None if found is None else Intent(found["collection"], found["document"], found["decision"])

    def last_claim(self) -> tuple[int, str] | None:
        """Position and owner of the last claim; None where there is no slot."""
        found = self._documents.last(LOG, {"slot": self._slot, "kind": "claim"})
        return None if found is None else (found["at"], found["owner"])

    def intend(self, position: int, owner: str, intent: Intent) -> int | None:
        """Insert an intent at this position, or behind own ones that are there; where it went, or None if fenced."""
        while not self._insert(position, "intent", owner, intent):
            there = self._documents.find(LOG, self._name(position))
            if there is None:
                continue  # Deleted by us in this moment, in another thread's name; the next try tells.
            if there["owner"] != owner or there["kind"] != "intent":
                return None
            if there["decision"] == intent.decision:
                break  # An earlier copy of this one.
            position += 1
        return position

    def forget(self, before: int) -> None:
        """Delete intents below a position."""
        self._documents.delete(LOG, {"slot": self._slot, "kind": "intent", "at": {"$lt": before}})

    def _name(self, position: int) -> str:
        return f"{self._slot}#{position}"

    def _insert(self, position: int, kind: str, owner: str, intent: Intent | None = None) -> bool:
        entry: Document = {
            "_id": self._name(position),
            "slot": self._slot,
            "at": position,
            "kind": kind,
            "owner": owner,
        }
        if intent is not None:
            entry |= {"collection": intent.collection, "document": intent.name, "decision": intent.decision}
        return self._documents.insert(LOG, entry)


def fence(documents: Documents, slot: str, intent: Intent, position: int) -> bool:
    """Settle for good whether the intended document is there: a fence in its place if it is not. True if it is there.

    Raises `Fatal` where a fence cannot be put there.
    """
    fenced = {"_id": intent.name, "semel": {"slot": slot, "fence": position}}
    if documents.insert(intent.collection, fenced):
        return False
    there = documents.find(intent.collection, intent.name)
    if there is None:
        raise Fatal(
            f"the place of document {intent.name!r} in {intent.collection} can be taken by nothing that has no other "
            "field: a unique index of the collection takes documents without its field for equal. Make it sparse, or "
            "partial."
        )
    found = there.get("semel")
    return isinstance(found, dict) and found == mark(slot, intent.decision)

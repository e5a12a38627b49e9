"""The seam to whatever holds the decisions: a row for each slot, with a fence that is our own counter.

A *slot* is one transactional id with its row. The row says who owns it (`owner`), how often it changed hands
(`owner_epoch`, the fence) and which Kafka transaction the database committed last (`prepared`). The business commit
writes `prepared` in the same atomic step as the business data, and only where `owner_epoch` and `owner` are still its
own. So the row is the decision, and whoever raises the fence and reads in one step knows that no older owner can
change it any more.

Kafka's epoch cannot be this fence: it starts again at 0 with a new producer id.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from semel.errors import Fatal

__all__ = [
    "ENDED",
    "LEAVE_RELEASED",
    "OUT_OF_USE",
    "Claim",
    "Decision",
    "ResolvingStore",
    "SlotOutOfUse",
    "SlotRow",
    "Store",
    "slot_prefix",
]

LEAVE_RELEASED = ""
"""The `owner` of a slot that was given back with nothing open: anybody may take it."""

OUT_OF_USE = "out of use: "
"""Begins the `owner` of a slot that nobody may take before an operator has looked at it; the rest says why."""


ENDED = "/committed"
"""Ends the `prepared` of a slot of the conditional recipe whose transaction Kafka is known to have committed."""


class SlotOutOfUse(Fatal):
    """What the database decided about this slot cannot be carried out in Kafka: a person has to look at it."""


def slot_prefix(app: str, database: str) -> str:
    """What the slots of one database of an app are called, before their number; they are the transactional ids."""
    return f"{app}.dual.{database}."


class SlotRow(NamedTuple):
    """What a candidate is chosen by. `prepared` is left out on purpose: it counts only when read by `Store.claim`."""

    slot: str
    owner: str
    owner_epoch: int
    beat: int


class Claim(NamedTuple):
    """A fence that was raised, and what the row held in that moment."""

    owner_epoch: int
    prepared: str


class Decision(NamedTuple):
    """A row as it is when nobody is changing it."""

    owner: str
    owner_epoch: int
    prepared: str


class Store(Protocol):
    """The rows of one database. Used by one thread at a time; every call blocks.

    All raise `Retriable` when the database is away or somebody is in the way for long (what was asked may have
    happened: each call may be repeated, a repeated `claim` raises the fence again), and `ConfigurationError` when it
    cannot be worked with as it is set up.
    """

    def open(self, app: str, environment: str, *, create_tables: bool) -> None:
        """Connect, and check that the rows belong to this app and this Kafka cluster; whose they are is written down
        where nobody did so yet."""

    def slots(self) -> list[SlotRow]:
        """Every slot that there is. Takes no lock, and reads nothing that counts."""

    def add(self, owner: str) -> SlotRow:
        """A slot that was never there, owned by `owner`. Its number is not one of a slot that was deleted: for such a
        one Kafka may hold a transaction that nobody can decide about any more."""

    def reserve(self, row: SlotRow, owner: str) -> bool:
        """Take a released slot as a candidate, so that two who come at once try different ones; whether it was free.
        It is no claim: the fence stays as it is."""

    def claim(self, slot: str, owner: str) -> Claim:
        """Raise the fence, become the owner and read, in one atomic step that waits for a commit under way.

        Raises `Fatal` when the slot is not there. Who holds the row and is stopped, on this machine, is ended.
        """

    def decided(self, slot: str) -> Decision | None:
        """The row, read in a way that waits for a commit under way; None when it is gone. What it says is durable."""

    def beat(self, owned: Mapping[str, str]) -> None:
        """Change the `beat` of slots that are still owned by these owners: they are alive."""

    def release(self, slot: str, owner: str) -> None:
        """Give a slot back that has nothing open; nothing happens when it has another owner by now."""

    def close(self) -> None:
        """Close the connection, without raising."""


class ResolvingStore(Store, Protocol):
    """What the conditional recipe asks besides: its transactional ids carry the epoch of their owner, and each has to
    be ended once. All changes are made by the slot's owner only, and say whether he still is."""

    def resolved(self, slot: str) -> int:
        """Up to which owner's epoch the transactional ids of the slot are ended; -1 for none."""

    def mark_resolved(self, slot: str, owner: str, epoch: int) -> bool:
        """The ids of all owners up to `epoch` are ended."""

    def replace_prepared(self, slot: str, owner: str, before: str, after: str) -> bool:
        """Say more about the decision that the row holds, if it is still `before` (or `after` already)."""

    def retire(self, slot: str, owner: str, why: str) -> bool:
        """Take the slot out of use: nobody's any more, and nobody's to take."""

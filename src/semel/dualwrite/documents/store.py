"""Slots in a document store: a log for each, and hints about who is alive."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Protocol

from semel.databases.database import without_password
from semel.dualwrite.documents.log import LOG, Documents, SlotLog, fence
from semel.dualwrite.store import LEAVE_RELEASED, Claim, Decision, SlotRow, slot_prefix
from semel.errors import ConfigurationError, Fatal, Retriable
from semel.failpoints import failpoint

__all__ = ["HINTS", "SCHEMA_VERSION", "DocumentStore"]

SCHEMA_VERSION: Final = 1
SLOTS_MAX: Final = 1_000
HINTS = "semel_txn_slots"
"""A document for each slot: owner and sign of life. Nothing in it counts; the log does."""


class _Database(Documents, Protocol):
    url: str

    def check(self) -> None: ...

    def all(self, collection: str) -> list[dict[str, Any]]: ...

    def replace(self, collection: str, document: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class DocumentStore:
    """See `semel.dualwrite.store.Store`. The fence is the position of a claim in the slot's log."""

    def __init__(self, database: _Database, app: str, name: str) -> None:
        self._database = database
        self._prefix = slot_prefix(app, name)

    def __repr__(self) -> str:
        return f"<DocumentStore {self._prefix}* {self._database!r}>"

    def migrate(self, app: str) -> None:
        """Make the place for the slots; it may run again. Which Kafka they belong to is written by the first claim."""
        self.open(app, "", create_tables=True)

    def environment_of(self, slot: str) -> str | None:
        """The Kafka cluster that a slot belongs to: empty where nobody wrote it yet, None where there are no slots."""
        found = self._database.find(HINTS, f"meta:{slot.rstrip('0123456789')}")
        return None if found is None else self._environment(found)

    def _environment(self, meta: dict[str, Any]) -> str:
        """As it was made, or as the first claim wrote it beside: who comes first writes, and that stays."""
        later = None if meta["environment"] else self._database.find(HINTS, f"{meta['_id']}#environment")
        return str(later["environment"] if later else meta["environment"])

    def open(self, app: str, environment: str, *, create_tables: bool) -> None:
        self._database.check()
        name = f"meta:{self._prefix}"
        if create_tables:
            meta = {"_id": name, "schema_version": SCHEMA_VERSION, "environment": environment, "app": app}
            self._database.insert(HINTS, meta)
        found = self._database.find(HINTS, name)
        where = without_password(self._database.url)
        if found is None:
            raise ConfigurationError(
                f"there are no slots of {self._prefix}* in {where}: either the app was never set up there, or the "
                "server lost its data, and then nobody can decide about what Kafka holds open. Look with `semel doctor "
                "txn list`; when nothing is open, semel migrate makes them."
            )
        if found["schema_version"] != SCHEMA_VERSION:
            raise ConfigurationError(
                f"the slots of {self._prefix}* in {where} have schema version {found['schema_version']}, and this "
                f"version of Semel works with {SCHEMA_VERSION}. Use the version that made them."
            )
        if environment and not found["environment"]:
            self._database.insert(HINTS, {"_id": f"{name}#environment", "environment": environment})
        theirs = self._environment(found)
        if environment and theirs != environment:
            raise ConfigurationError(
                f"the dual write of {self._prefix}* in {where} belongs to the Kafka cluster {theirs!r}, "
                f"and this process is connected to {environment!r}, which would decide about transactions of the "
                f"other. If this database is a copy for another environment, drop {LOG} and {HINTS}; if the cluster "
                f"was replaced on purpose, set environment of {name!r} in {HINTS} to the new one."
            )

    def slots(self) -> list[SlotRow]:
        found = [item for item in self._database.all(HINTS) if str(item["_id"]).startswith(self._prefix)]
        return [
            SlotRow(item["_id"], item["owner"], item["epoch"], item["beat"])
            for item in sorted(found, key=lambda item: str(item["_id"]))
        ]

    def add(self, owner: str) -> SlotRow:
        numbers = [int(row.slot.removeprefix(self._prefix)) for row in self.slots()]
        for number in range(max(numbers, default=-1) + 1, SLOTS_MAX):
            slot = f"{self._prefix}{number}"
            if SlotLog(self._database, slot).begin(owner):
                return self._hint(SlotRow(slot, owner, 0, 0))
        raise ConfigurationError(
            f"the dual write in {without_password(self._database.url)} has {SLOTS_MAX} slots, and more are not made: "
            "as many transactions were open at once, or left in doubt. Lower connections=, and let the processes that "
            "own them end."
        )

    def reserve(self, row: SlotRow, owner: str) -> bool:
        now = self._row(row.slot)
        if now is None or now.owner != LEAVE_RELEASED or now.owner_epoch != row.owner_epoch:
            return False
        self._hint(now._replace(owner=owner))
        return True

    def claim(self, slot: str, owner: str) -> Claim:
        log = SlotLog(self._database, slot)
        failpoint("dual.claim.before_fence")
        try:
            position, intent = log.claim(owner)
            prepared = ""
            if intent is not None and fence(self._database, slot, intent, position):
                prepared = intent.decision
        except Retriable:
            raise
        except Fatal as error:
            if log.last_claim() is not None:
                raise
            raise Fatal(
                f"slot {slot} is gone from {LOG} in {without_password(self._database.url)}: it was deleted, or the "
                "database was restored. Nothing is decided about what Kafka holds open: `semel doctor txn list` shows "
                "it."
            ) from error
        before = self._row(slot)
        self._hint(SlotRow(slot, owner, position, before.beat + 1 if before else 0))
        return Claim(position, prepared)

    def decided(self, slot: str) -> Decision | None:
        log = SlotLog(self._database, slot)
        claim = log.last_claim()
        if claim is None:
            return None
        hint = self._row(slot)
        owner = LEAVE_RELEASED if hint and (hint.owner, hint.owner_epoch) == (LEAVE_RELEASED, claim[0]) else claim[1]
        intent = log.last_intent(2**53)
        prepared = ""
        if intent is not None:
            there = self._database.find(intent.collection, intent.name)
            mark = (there or {}).get("semel")
            if isinstance(mark, dict) and mark.get("transaction") == intent.decision:
                prepared = intent.decision
        return Decision(owner, claim[0], prepared)

    def beat(self, owned: Mapping[str, str]) -> None:
        for slot, owner in owned.items():
            row = self._row(slot)
            if row is not None and row.owner == owner:
                self._hint(row._replace(beat=row.beat + 1))

    def release(self, slot: str, owner: str) -> None:
        row = self._row(slot)
        if row is not None and row.owner == owner:
            self._hint(row._replace(owner=LEAVE_RELEASED))

    def close(self) -> None:
        self._database.close()

    def _row(self, slot: str) -> SlotRow | None:
        found = self._database.find(HINTS, slot)
        return None if found is None else SlotRow(slot, found["owner"], found["epoch"], found["beat"])

    def _hint(self, row: SlotRow) -> SlotRow:
        hint = {"_id": row.slot, "owner": row.owner, "epoch": row.owner_epoch, "beat": row.beat}
        self._database.replace(HINTS, hint)
        return row

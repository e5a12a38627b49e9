"""What clients were told and what readers saw, and whether the two fit: the promises, checked.

A value names who wrote it: `writer/life/transaction/number`. So every record in a log has one entry here, and the
fate of every entry can be demanded of the log.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from semel.types import TopicPartition

__all__ = ["Entry", "History", "Seen", "Transaction", "Violation"]


class Violation(AssertionError):
    """A promise is broken. `kind` is short and the same for every seed that breaks it."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


@dataclass
class Transaction:
    """One transaction of one life of a writer. `fate`: open, aborted, asked (to commit; outcome unknown), committed."""

    owner: str
    life: int
    number: int
    fate: str = "open"
    records: list[tuple[TopicPartition, str]] = field(default_factory=list)
    sources: list[tuple[TopicPartition, int]] = field(default_factory=list)
    """Of a processor: the input of each record, by its number."""

    def __str__(self) -> str:
        return f"{self.owner}/{self.life}/{self.number} ({self.fate})"


@dataclass
class Entry:
    """One record outside transactions. `fate`: sent (unknown), acknowledged, refused (never written)."""

    partition: TopicPartition
    owner: str
    life: int
    number: int
    fate: str = "sent"
    offset: int = -1


class Seen(NamedTuple):
    """One record as it stands in a log."""

    offset: int
    value: str
    producer_id: int
    producer_epoch: int
    transactional: bool


class History:
    """The ledger of one run."""

    def __init__(self) -> None:
        self.transactions: dict[str, Transaction] = {}
        self.entries: dict[str, Entry] = {}
        self.observed: dict[TopicPartition, dict[int, Seen]] = defaultdict(dict)
        """Every record that any reader was ever served."""
        self.committed_reads: dict[TopicPartition, list[tuple[int, int, list[Seen]]]] = defaultdict(list)
        """read_committed: (from, to, what was there)."""
        self.deleted_below: dict[TopicPartition, int] = {}
        self.expected: tuple[type[BaseException], ...] = ()
        """What a run raises on purpose: may be logged as an error."""
        self.problem: Violation | None = None

    def fail(self, kind: str, text: str) -> None:
        """Note the first broken promise."""
        if self.problem is None:
            self.problem = Violation(kind, text)

    # --- Noting ---

    def begin(self, owner: str, life: int, number: int) -> Transaction:
        transaction = Transaction(owner, life, number)
        self.transactions[f"{owner}/{life}/{number}"] = transaction
        return transaction

    def served(self, partition: TopicPartition, records: Iterable[Seen]) -> None:
        """A reader got these records: they may never change, move or go."""
        known = self.observed[partition]
        for record in records:
            before = known.setdefault(record.offset, record)
            if before != record:
                self.fail("offset moved", f"{partition} offset {record.offset} was {before}, now {record}")

    # --- The end ---

    def check(
        self,
        logs: dict[TopicPartition, list[Seen]],
        committed: dict[TopicPartition, list[Seen]],
        starts: dict[TopicPartition, int],
    ) -> None:
        """`logs` are read_uncommitted, `committed` read_committed, both whole."""
        for partition, seen in logs.items():
            self._check_origin(partition, seen)
            self._check_kept(partition, seen, starts[partition])
            self._check_order(partition, committed[partition])
        self._check_reads(committed, starts)
        self._check_transactions(committed, starts)
        self._check_entries(logs, starts)
        self._check_identities(logs)

    def _check_origin(self, partition: TopicPartition, seen: list[Seen]) -> None:
        places: dict[str, int] = {}
        for record in seen:
            if record.value in places:
                self.fail(
                    "duplicate", f"{record.value} is in {partition} at {places[record.value]} and {record.offset}"
                )
            places[record.value] = record.offset
            owner, life, number, *_ = record.value.split("/")
            key = f"{owner}/{life}/{number}"
            if record.transactional:
                transaction = self.transactions.get(key)
                if transaction is None or (partition, record.value) not in transaction.records:
                    self.fail("stray record", f"nobody wrote {record.value} to {partition}")
            elif record.value not in self.entries or self.entries[record.value].partition != partition:
                self.fail("stray record", f"nobody wrote {record.value} to {partition}")

    def _check_kept(self, partition: TopicPartition, seen: list[Seen], start: int) -> None:
        if start > self.deleted_below.get(partition, 0):
            self.fail("log start moved", f"{partition} starts at {start}")
        now = {record.offset: record for record in seen}
        for offset, record in self.observed[partition].items():
            if offset >= start and now.get(offset) != record:
                self.fail("served record gone", f"{partition} offset {offset} was {record}, is {now.get(offset)}")

    def _check_order(self, partition: TopicPartition, seen: list[Seen]) -> None:
        """Each life's transactions in its order, and no life after another one took over: that one was fenced."""
        current: dict[str, tuple[int, ...]] = {}
        over: set[tuple[str, int]] = set()
        for record in seen:
            if not record.transactional:
                continue
            owner, *place = record.value.split("/")
            here = tuple(map(int, place[:3]))
            before = current.get(owner)
            if before is not None and before[0] != here[0]:
                over.add((owner, before[0]))
            if (owner, here[0]) in over or (before is not None and before[0] == here[0] and here <= before):
                self.fail("order", f"{owner}'s {here} follows its {before} in {partition}")
            current[owner] = here

    def _check_reads(self, committed: dict[TopicPartition, list[Seen]], starts: dict[TopicPartition, int]) -> None:
        for partition, reads in self.committed_reads.items():
            if partition not in committed:
                continue
            for first, end, records in reads:
                first = max(first, starts[partition])
                expected = [record for record in committed[partition] if first <= record.offset < end]
                got = [record for record in records if record.offset >= first]
                if got != expected:
                    extra = [record.value for record in got if record not in expected]
                    missing = [record.value for record in expected if record not in got]
                    self.fail(
                        "uncommitted record served" if extra else "committed record hidden",
                        f"read_committed of {partition} {first}..{end}: too many {extra}, too few {missing}",
                    )

    def _check_transactions(
        self, committed: dict[TopicPartition, list[Seen]], starts: dict[TopicPartition, int]
    ) -> None:
        there = {(partition, record.value) for partition, seen in committed.items() for record in seen}
        for transaction in self.transactions.values():
            found = [item in there for item in transaction.records]
            # Of a partition whose first records were deleted on purpose nothing can be said.
            may_miss = [bool(starts.get(partition, 0)) for partition, _ in transaction.records]
            if transaction.fate in ("open", "aborted") and any(found):
                self.fail("uncommitted record served", f"{transaction} was not committed, but is there: {found}")
            if transaction.fate == "committed" and not all(map(max, found, may_miss)):
                self.fail("committed record lost", f"{transaction}: {transaction.records} {found}")
            sure = [item for item, excused in zip(found, may_miss, strict=True) if not excused or item]
            if any(sure) and not all(sure):
                self.fail("torn transaction", f"{transaction}: {transaction.records} {found}")

    def _check_entries(self, logs: dict[TopicPartition, list[Seen]], starts: dict[TopicPartition, int]) -> None:
        places = {
            (partition, record.value): record.offset for partition, seen in logs.items() for record in seen
        }  # fmt: skip
        last: dict[tuple[TopicPartition, str, int], tuple[int, int]] = {}
        for value, entry in self.entries.items():
            at = places.get((entry.partition, value))
            if entry.fate == "refused" and at is not None:
                self.fail("refused record written", f"{value} is in {entry.partition} at {at}")
            if entry.fate != "acknowledged":
                continue
            if at is None:
                if entry.partition in starts and not 0 <= entry.offset < starts[entry.partition]:
                    self.fail("acknowledged record lost", f"{value} of {entry.partition} at {entry.offset}")
                continue
            if entry.offset not in (-1, at):
                self.fail("offset moved", f"{value} was acknowledged at {entry.offset}, is at {at}")
            key = (entry.partition, entry.owner, entry.life)
            before = last.get(key, (-1, -1))
            if entry.number > before[0] and at < before[1]:
                self.fail("order", f"{value} stands before its predecessor {before} in {entry.partition}")
            last[key] = (entry.number, at)

    def _check_identities(self, logs: dict[TopicPartition, list[Seen]]) -> None:
        owners: dict[int, str] = {}
        for seen in logs.values():
            for record in seen:
                owner = record.value.split("/")[0]
                if owners.setdefault(record.producer_id, owner) != owner:
                    self.fail(
                        "identity shared", f"producer id {record.producer_id}: {owners[record.producer_id]}, {owner}"
                    )

    def check_one_transaction_an_epoch(self, logs: dict[TopicPartition, list[Seen]]) -> None:
        """Transactions V2: each has an epoch of its own, which is what keeps late requests out of the next one."""
        used: dict[tuple[int, int], str] = {}
        for seen in logs.values():
            for record in seen:
                if record.transactional:
                    name = record.value.rsplit("/", 1)[0]
                    key = (record.producer_id, record.producer_epoch)
                    if used.setdefault(key, name) != name:
                        self.fail("identity used twice", f"{key} in {used[key]} and {name}")

    def check_processing(
        self,
        inputs: dict[TopicPartition, list[Seen]],
        offsets: dict[TopicPartition, int],
        results: dict[TopicPartition, list[Seen]],
    ) -> None:
        """Each input below the committed offset has one result that is committed, and no other has any."""
        done: dict[tuple[TopicPartition, int], int] = defaultdict(int)
        for seen in results.values():
            for record in seen:
                owner, life, number, *_ = record.value.split("/")
                transaction = self.transactions[f"{owner}/{life}/{number}"]
                where = int(record.value.split("/")[3])
                partition, offset = transaction.sources[where]
                done[partition, offset] += 1
        for partition, seen in inputs.items():
            for record in seen:
                expected = 1 if record.offset < offsets.get(partition, 0) else 0
                got = done.pop((partition, record.offset), 0)
                if got != expected:
                    kind = "input lost" if got < expected else "input processed twice"
                    self.fail(kind, f"{partition} offset {record.offset} has {got} results, {expected} are due")
        if done:
            self.fail("result of nothing", f"{dict(done)}")

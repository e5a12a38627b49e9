"""Keyed state: what is committed, by store and partition.

A `Store` is written only after Kafka answered "committed", or from the changelog. Changes gather in memory first and go
to its table together, now and then: what a killed process had not written is in the changelog above the table's mark.
What a unit of work changes lives in the unit until it is committed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from heapq import merge
from typing import TypeVar

from semel.failpoints import failpoint
from semel.processing.limits import (
    STATE_FRESH_KEYS_MAX,
    STATE_FRESH_SECONDS,
    STATE_RECENT_BYTES_MAX,
    STATE_RESTORE_KEYS,
    STATE_SEEN_SECONDS,
)
from semel.processing.recent import MISSING, Recent
from semel.processing.tables import (
    Changed,
    Changelog,
    Entry,
    Mark,
    PassingTables,
    Table,
    Tables,
    TableTrouble,
    behind,
)
from semel.processing.topics import StateOptions

__all__ = ["Changes", "Store", "Stores", "entry_size"]

log = logging.getLogger("semel.state")

T = TypeVar("T")

Changes = dict[tuple[str, int], dict[bytes, Entry | None]]
"""By store and partition: new entries by key; None takes the key out."""

Clock = Callable[[], tuple[str, float]]
"""Which start of the machine this is, and seconds since then (`disk.boot_id`, `Env.boot_seconds`)."""

PAGE_ROWS = 500
"""Rows of a table that are looked at together: nobody holds a table's cursor while a handler runs."""


class Store:
    """One partition of a store. `is_measured`: keep count of its bytes."""

    def __init__(self, name: str, partition: int, tables: Tables, *, is_measured: bool = False) -> None:
        self.name = name
        self.partition = partition
        self._tables = tables
        self._table: Table = tables.open(name, partition)
        self._is_measured = is_measured
        self._fresh: dict[bytes, Entry | None] = {}
        self._recent = Recent(STATE_RECENT_BYTES_MAX)
        self._fresh_since = 0.0
        self._mark: Mark | None = None
        """Of what is here, in the table and in memory; None before `begin`."""
        self.bytes = 0
        """Of all keys and values, where it is measured."""
        self.sweep_ms = 0
        """When entries whose time is over are looked for again, by the time of records."""
        self.trouble: TableTrouble | None = None
        """Why its table is of no use any more; nothing is read or written before `begin`."""
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<Store {self.name}-{self.partition} {self._mark}, {len(self._fresh)} fresh>"

    # --- Reading ---

    def get(self, key: bytes) -> Entry | None:
        """The committed entry of a key. Raises `TableTrouble`."""
        if key in self._fresh:
            return self._fresh[key]
        found = self._recent.get(key)
        if found is MISSING:
            found = self._read(partial(self._table.get, key))
            self._recent.put(key, found)
        return found  # type: ignore[return-value]

    def items(self) -> Iterator[tuple[bytes, Entry]]:
        """Every key, those that were written longest ago first, as they are when this begins. Raises `TableTrouble`."""
        fresh, age = dict(self._fresh), -1
        while page := self._read(partial(self._table.oldest, age, PAGE_ROWS)):
            yield from ((key, entry) for _, key, entry in page if key not in fresh)
            age = page[-1][0]
        yield from ((key, entry) for key, entry in fresh.items() if entry is not None)

    def prefixed(self, prefix: bytes) -> Iterator[tuple[bytes, Entry]]:
        """The keys that begin with `prefix`, in their order. Raises `TableTrouble`."""
        fresh = {key: entry for key, entry in self._fresh.items() if key.startswith(prefix)}
        written = ((key, entry) for key, entry in sorted(fresh.items()) if entry is not None)
        stored = ((key, entry) for key, entry in self._stored(prefix) if key not in fresh)
        return merge(stored, written)

    def _stored(self, prefix: bytes) -> Iterator[tuple[bytes, Entry]]:
        low = prefix
        while page := self._read(partial(self._table.span, low, PAGE_ROWS)):
            for key, entry in page:
                if not key.startswith(prefix):
                    return
                yield key, entry
            low = page[-1][0] + b"\0"

    def _read(self, read: Callable[[], T]) -> T:
        if self.trouble is not None:
            raise self.trouble
        try:
            return read()
        except TableTrouble as error:
            self.trouble = error
            raise

    # --- Restoring ---

    def begin(self, changelog: Changelog, boot: str, now: float) -> int:
        """Make it ready for what its changelog has more than it; returns the offset to read from.

        What is of no use is thrown away. `now` must be of before the changelog's end was asked for. Raises
        `TableTrouble`.
        """
        if self._is_closed:
            raise TableTrouble(f"state {self.name}-{self.partition} was given back")
        if self.trouble is not None:
            self._reopen(self.trouble)
        mark = self._mark or self._table.mark
        why = "it is new" if mark is None else behind(mark, changelog, boot, now)
        if why:
            if mark is not None:
                log.warning("state %s-%d is restored from nothing: %s", self.name, self.partition, why)
                failpoint("state.before_clear")
                self._forget()
                self._table.clear()
            mark = Mark(changelog.topic, changelog.start, boot, now)
        assert mark is not None
        self._mark = mark
        return mark.position

    def restored(self, key: bytes, entry: Entry | None) -> None:
        """Take one change of the changelog, in its order."""
        self._fresh.pop(key, None)
        self._fresh[key] = entry

    def reached(self, position: int, seen: float | None = None) -> None:
        """Every change below this offset was taken; `seen`: and at this moment there was none above. May raise."""
        if self._is_closed or self._mark is None:
            raise TableTrouble(f"state {self.name}-{self.partition} was given back while it was restored")
        mark = self._mark._replace(position=max(position, self._mark.position))
        self._mark = mark if seen is None else mark._replace(seen=seen)
        if seen is not None or len(self._fresh) >= STATE_RESTORE_KEYS:
            self.write()
        if seen is not None and self._is_measured:
            self.bytes = self._read(self._table.size)

    def _reopen(self, trouble: TableTrouble) -> None:
        log.error("state %s-%d is opened again: %s", self.name, self.partition, trouble)
        self._forget()
        if trouble.is_damaged:
            self._table.discard()
        else:
            with suppress(TableTrouble):
                self._table.close()
        self._table = self._tables.open(self.name, self.partition)
        self.trouble = None

    def _forget(self) -> None:
        self._fresh = {}
        self._recent.clear()
        self._mark = None

    # --- Writing ---

    def apply(self, changed: Changed, position: int | None, now: float) -> None:
        """Take the changes of a committed unit of work, which end below `position` in the changelog.

        Without a position (the broker did not say it) the changelog is read again from the last one that is known.
        """
        assert self._mark is not None
        if not self._fresh:
            self._fresh_since = now
        for key, entry in changed.items():
            if self._is_measured:
                self.bytes += entry_size(key, entry) - entry_size(key, self.get(key))
            self.restored(key, entry)
        if position is not None:
            self._mark = self._mark._replace(position=max(position, self._mark.position))

    def owned(self, seen: float) -> None:
        """At this moment the partition was ours: nobody else can have written to its changelog before it."""
        if self._mark is not None:
            self._mark = self._mark._replace(seen=max(seen, self._mark.seen))

    def is_due(self, now: float) -> bool:
        """Whether its table should be written now."""
        if self.trouble is not None or self._mark is None:
            return False
        if self._fresh:
            return len(self._fresh) >= STATE_FRESH_KEYS_MAX or now - self._fresh_since >= STATE_FRESH_SECONDS
        written = self._table.mark
        return written is not None and self._mark.seen - written.seen >= STATE_SEEN_SECONDS

    def write(self) -> None:
        """Bring the table up to date. Raises `TableTrouble`."""
        if self.trouble is not None:
            raise self.trouble
        assert self._mark is not None
        failpoint("state.before_write")
        try:
            self._table.write(self._fresh, self._mark)
        except TableTrouble as error:
            self.trouble = error
            raise
        failpoint("state.after_write")
        self._recent.update(self._fresh)
        self._fresh = {}

    def close(self) -> None:
        """Write what is not written, and let go of the table. What cannot be written is in the changelog."""
        self._is_closed = True
        try:
            if self._mark is not None and self.trouble is None:
                self.write()
        except TableTrouble as error:
            log.warning("state %s-%d: its last changes are not in its table: %s", self.name, self.partition, error)
        finally:
            with suppress(TableTrouble):
                self._table.close()

    def share(self, size: int) -> None:
        """Remember so many bytes of what was read or written lately."""
        self._recent.limit(size)


def entry_size(key: bytes, entry: Entry | None) -> int:
    """Bytes that count against the limit of a store."""
    return 0 if entry is None else len(key) + len(entry.value)


class Stores:
    """The stores of an engine."""

    def __init__(
        self, clock: Clock, tables: Tables | None = None, options: Mapping[str, StateOptions] | None = None
    ) -> None:
        self._clock = clock
        self._tables = tables or PassingTables()
        self._measured = {name for name, option in (options or {}).items() if option.bytes_max is not None}
        self._stores: dict[tuple[str, int], Store] = {}

    def __repr__(self) -> str:
        return f"<Stores {len(self._stores)} partitions>"

    def now(self) -> tuple[str, float]:
        """Which start of the machine this is, and seconds since then."""
        return self._clock()

    def open(self, store: str, partition: int) -> Store:
        """The store's partition, to be restored. Raises `TableTrouble` when it cannot be kept anywhere."""
        found = self._stores.get((store, partition))
        if found is None:
            found = Store(store, partition, self._tables, is_measured=store in self._measured)
            self._stores[store, partition] = found
            self._share()
        return found

    def __len__(self) -> int:
        return len(self._stores)

    def __getitem__(self, at: tuple[str, int]) -> Store:
        """A partition that is ours, by store and number."""
        return self._stores[at]

    @property
    def trouble(self) -> str:
        """What keeps a table from being used, or ""; restoring mends it."""
        return "; ".join(str(item.trouble) for item in self._stores.values() if item.trouble is not None)

    def drop(self, partitions: Iterable[int]) -> None:
        """Let go of partitions that are no longer ours."""
        gone = set(partitions)
        for at in [at for at in self._stores if at[1] in gone]:
            self._stores.pop(at).close()
        self._share()

    def close(self) -> None:
        """Let go of everything."""
        self.drop({partition for _, partition in self._stores})

    def apply(self, changes: Changes, written: Mapping[tuple[str, int], int], began: float) -> None:
        """Make the changes of a committed unit of work.

        `written` says by store and partition where the unit's records end in the changelog, `began` when its
        transaction began. A table in trouble is told by `trouble`.
        """
        now = self._clock()[1]
        for at, changed in changes.items():
            self._stores[at].apply(changed, written.get(at), now)
        for store in self._stores.values():
            store.owned(began)
        self.write_due(now)

    def write_due(self, now: float | None = None) -> None:
        """Write the tables whose time has come."""
        now = self._clock()[1] if now is None else now
        for store in self._stores.values():
            if store.is_due(now):
                with suppress(TableTrouble):  # `trouble` tells.
                    store.write()

    def _share(self) -> None:
        for store in self._stores.values():
            store.share(STATE_RECENT_BYTES_MAX // len(self._stores))

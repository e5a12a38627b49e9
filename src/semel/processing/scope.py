"""What one call of a handler sees of keyed state, and where its effects gather until it is done.

Three layers: what this call changed, over what the units of work on their way changed, over what is committed. An entry
whose time to live is over at the time of the record in hand is not seen, whether it was taken out already or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from heapq import merge
from itertools import islice
from typing import Any, Protocol

from semel import history
from semel.processing.effects import Change, Effect, Write, lower
from semel.processing.limits import (
    OUTPUT_BYTES_MAX,
    RECORD_EFFECTS_MAX,
    STATE_EXPIRED_PER_SWEEP,
    STATE_SWEEP_PAUSE_MS,
)
from semel.processing.stores import Changes, Stores, entry_size
from semel.processing.tables import Entry
from semel.processing.topics import DataError, StateOptions
from semel.types import Record

__all__ = ["RecordScope", "check_write", "write_size"]

_RECORD_OVERHEAD = 32
"""Lengths, deltas and attributes of one record in a batch, at their largest."""


class Unit(Protocol):
    """What a scope looks at of a unit of work."""

    @property
    def changes(self) -> Changes: ...
    @property
    def growth(self) -> Mapping[tuple[str, int], int]: ...
    @property
    def beneath(self) -> Unit | None: ...


class RecordScope:
    """One call at a time; `options` names the stores that the handler may use."""

    def __init__(self, stores: Stores, options: Mapping[str, StateOptions]) -> None:
        self._stores = stores
        self._options = options
        self._mortal = [store for store, option in options.items() if option.ttl_ms is not None]
        self._layers: tuple[Changes, ...] = ()
        self._unit: Unit | None = None
        self._partition = 0
        self._now_ms = 0
        self._effects = 0
        self.writes: list[Write] = []
        self.changes: dict[str, dict[bytes, Entry | None]] = {}
        self.growth: dict[str, int] = {}
        """Bytes by which stores with a limit grow by this call."""
        self.before: dict[tuple[str, bytes], str] = {}
        """Digests of what this call found where it changed something, while a history is written."""
        self.rest: Any = None
        """What of the handler's call is left to be awaited."""

    def begin(self, unit: Unit, record: Record, now_ms: int) -> None:
        """Start with another call: forget the effects of the one before. `now_ms` is for a record without a time."""
        self._unit = unit
        self._layers = (unit.changes,) if unit.beneath is None else (unit.changes, unit.beneath.changes)
        self._partition = record.partition
        self._now_ms = record.timestamp_ms if record.timestamp_ms >= 0 else now_ms
        self._effects = 0
        self.writes = []
        self.changes = {}
        self.growth = {}
        self.before = {}

    # --- Reading ---

    def get(self, store: str, key: bytes) -> bytes | None:
        """The value of a key: what this call changed, else the units of work, else what is committed."""
        entry = self._entry(store, key)
        return None if entry is None or self._is_over(store, entry) else entry.value

    def _entry(self, store: str, key: bytes) -> Entry | None:
        changed = self.changes.get(store)
        if changed is not None and key in changed:
            return changed[key]
        for layer in self._layers:
            changed = layer.get((store, self._partition))
            if changed is not None and key in changed:
                return changed[key]
        return self._stores[store, self._partition].get(key)

    def _is_over(self, store: str, entry: Entry) -> bool:
        ttl_ms = self._options[store].ttl_ms
        return ttl_ms is not None and entry.written_ms + ttl_ms <= self._now_ms

    def _changed(self, store: str) -> dict[bytes, Entry | None]:
        """What is not committed of a store, the youngest last."""
        changed: dict[bytes, Entry | None] = {}
        for layer in reversed(self._layers):
            changed |= layer.get((store, self._partition), {})
        return changed | self.changes.get(store, {})

    def items(self, store: str) -> Iterator[tuple[bytes, bytes]]:
        """Every key and value, those that were written longest ago first."""
        for key, entry in self._entries(store):
            if not self._is_over(store, entry):
                yield key, entry.value

    def _entries(self, store: str) -> Iterator[tuple[bytes, Entry]]:
        changed = self._changed(store)
        for key, entry in self._stores[store, self._partition].items():
            if key not in changed:
                yield key, entry
        for key, new in changed.items():
            if new is not None:
                yield key, new

    def prefixed(self, store: str, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        """The keys that begin with `prefix` and their values, in the order of keys, as they are when this begins."""
        changed = {key: entry for key, entry in self._changed(store).items() if key.startswith(prefix)}
        new = ((key, entry) for key, entry in sorted(changed.items()) if entry is not None)
        committed = self._stores[store, self._partition].prefixed(prefix)
        for key, entry in merge(((key, entry) for key, entry in committed if key not in changed), new):
            if not self._is_over(store, entry):
                yield key, entry.value

    # --- Effects ---

    def expire(self) -> None:
        """Take out a few entries whose time is over; nobody sees them anyway, so this only bounds the stores."""
        for name in self._mortal:
            store = self._stores[name, self._partition]
            if self._now_ms < store.sweep_ms <= self._now_ms + STATE_SWEEP_PAUSE_MS:
                continue  # A due time that lies farther away was set by a record whose clock was ahead.
            store.sweep_ms = self._now_ms + STATE_SWEEP_PAUSE_MS
            found = list(islice(self._entries(name), STATE_EXPIRED_PER_SWEEP))
            for key, entry in found:
                if not self._is_over(name, entry):
                    break
                self._put(name, key, None)
            else:
                if len(found) == STATE_EXPIRED_PER_SWEEP:
                    store.sweep_ms = 0

    def emit(self, effect: Effect) -> None:
        """Take one effect. Raises `DataError` for one that cannot be written."""
        self._effects += 1
        if self._effects > RECORD_EFFECTS_MAX:
            raise DataError(f"one call has more than {RECORD_EFFECTS_MAX} effects; split the work over records")
        lowered = lower(effect)
        if isinstance(lowered, Write):
            check_write(lowered, OUTPUT_BYTES_MAX)
            self.writes.append(lowered)
            return
        self._change(lowered)

    def _change(self, change: Change) -> None:
        option = self._options.get(change.store)
        if option is None:
            raise DataError(f"the handler changes state {change.store}, which is not its own: declare it with state=")
        size = len(change.key) + len(change.value or b"")
        if size > option.value_bytes_max:
            raise DataError(
                f"a value of state {change.store} has {size} bytes with its key; the limit is {option.value_bytes_max}"
            )
        self._put(change.store, change.key, change.value)

    def _put(self, store: str, key: bytes, value: bytes | None) -> None:
        entry = None if value is None else Entry(value, self._now_ms)
        if history.on() and (store, key) not in self.before:
            found = self._entry(store, key)
            self.before[store, key] = history.digest(None if found is None else found.value)
        limit = self._options[store].bytes_max
        if limit is not None:
            before = self._entry(store, key)
            grown = entry_size(key, entry) - entry_size(key, before)
            total = self._total(store) + grown
            if grown > 0 and total > limit:
                raise DataError(
                    f"state {store} would have {total} bytes in partition {self._partition}; the limit is {limit}. "
                    "Delete keys, give it a time to live, or raise bytes_max="
                )
            self.growth[store] = self.growth.get(store, 0) + grown
        changed = self.changes.setdefault(store, {})
        changed.pop(key, None)
        changed[key] = entry

    def _total(self, store: str) -> int:
        """Bytes of a store with all that is not committed."""
        total = self._stores[store, self._partition].bytes + self.growth.get(store, 0)
        unit = self._unit
        while unit is not None:
            total += unit.growth.get((store, self._partition), 0)
            unit = unit.beneath
        return total

    def check_partitions(self, partitions: Mapping[str, int]) -> bool:
        """Whether the partitions of every output's topic are known.

        Raises `DataError` for an output to a partition that its topic does not have.
        """
        for write in self.writes:
            count = partitions.get(write.topic)
            if count is None:
                return False
            if write.partition is not None and not 0 <= write.partition < count:
                raise DataError(f"topic {write.topic} has {count} partitions and no number {write.partition}")
        return True


def check_write(write: Write, limit: int) -> None:
    """Raise `DataError` for a record that no topic would take."""
    for name, value in write.headers:
        if not isinstance(name, str) or not (value is None or isinstance(value, bytes)):
            raise DataError(f"a header of a record for topic {write.topic} is not a (str, bytes) pair: {name!r:.80}")
        if not name.isascii():
            try:
                name.encode()
            except UnicodeEncodeError as error:
                raise DataError(f"the header name {name!r:.80} is not valid text") from error
    size = write_size(write)
    if size > limit:
        raise DataError(f"a record for topic {write.topic} has {size} bytes; the limit is {limit}")


def write_size(write: Write) -> int:
    """Bytes in a batch, or a few more."""
    size = len(write.key or b"") + len(write.value or b"") + _RECORD_OVERHEAD
    for name, value in write.headers:
        size += 4 * len(name) + len(value or b"") + 8
    return size

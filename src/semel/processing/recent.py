"""What was read or written lately, within a limit of bytes: two generations, so that a look-up costs no bookkeeping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from semel.processing.tables import Entry

__all__ = ["MISSING", "Recent"]

MISSING: Final = object()
"""Nothing is known of a key; None says that it has no entry."""

_OVERHEAD = 250
"""Bytes that a key and its entry take here beside their content, about."""


class Recent:
    """Entries by key. What is looked up stays; what nobody asked for while half of the limit filled up, goes."""

    def __init__(self, limit: int) -> None:
        self._half = max(1, limit // 2)
        self._young: dict[bytes, Entry | None] = {}
        self._old: dict[bytes, Entry | None] = {}
        self._size = 0

    def __repr__(self) -> str:
        return f"<Recent {len(self._young) + len(self._old)} keys>"

    def limit(self, limit: int) -> None:
        """Hold so many bytes from now on."""
        self._half = max(1, limit // 2)

    def get(self, key: bytes) -> object:
        """The entry of a key, None when it is known to have none, else `MISSING`."""
        found = self._young.get(key, MISSING)
        if found is MISSING and self._old:
            found = self._old.get(key, MISSING)
            if found is not MISSING:
                self.put(key, found)  # type: ignore[arg-type]
        return found

    def put(self, key: bytes, entry: Entry | None) -> None:
        """Remember the entry of a key."""
        self._young[key] = entry
        self._size += len(key) + (len(entry.value) if entry is not None else 0) + _OVERHEAD
        if self._size >= self._half:
            self._old, self._young, self._size = self._young, {}, 0

    def update(self, changed: Mapping[bytes, Entry | None]) -> None:
        """Remember what was written."""
        for key, entry in changed.items():
            self._old.pop(key, None)
            self.put(key, entry)

    def clear(self) -> None:
        """Forget everything."""
        self._young, self._old, self._size = {}, {}, 0

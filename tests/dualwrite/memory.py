"""What the dual write asks of a document store, in memory: unique inserts. Answers can be lost on purpose."""

from __future__ import annotations

import copy
import threading
from typing import Any

from semel.errors import Retriable

__all__ = ["MemoryDocuments", "memory_at"]

Document = dict[str, Any]


class MemoryDocuments:
    def __init__(self, url: str = "memory://") -> None:
        self.url = url
        self.collections: dict[str, dict[Any, Document]] = {}
        self.unique: dict[str, str] = {}
        """A unique index of a collection: the field; what lacks it is not in the index."""
        self.lose: list[tuple[str, bool]] = []
        """Of the next calls that insert into these collections the answers are lost, with the insert or without."""
        self.away = False
        self._lock = threading.Lock()

    def check(self) -> None:
        self._reach()

    def _reach(self) -> None:
        if self.away:
            raise Retriable("the store is away")

    def insert(self, collection: str, document: Document) -> bool:
        self._reach()
        lost = next((item for item in self.lose if item[0] == collection), None)
        if lost is not None:
            self.lose.remove(lost)
        if lost is None or lost[1]:
            done = self._insert(collection, document)
        if lost is not None:
            raise Retriable("the answer is lost")
        return done

    def _insert(self, collection: str, document: Document) -> bool:
        with self._lock:
            found = self.collections.setdefault(collection, {})
            field = self.unique.get(collection)
            if document["_id"] in found or (
                field in document and any(other.get(field) == document[field] for other in found.values())
            ):
                return False
            found[document["_id"]] = copy.deepcopy(document)
            return True

    def find(self, collection: str, name: Any) -> Document | None:
        self._reach()
        return copy.deepcopy(self.collections.get(collection, {}).get(name))

    def last(self, collection: str, match: Document) -> Document | None:
        self._reach()
        found = [item for item in self.all(collection) if _matches(item, match)]
        return max(found, key=lambda item: int(item["at"]), default=None)

    def all(self, collection: str) -> list[Document]:
        self._reach()
        return copy.deepcopy(list(self.collections.get(collection, {}).values()))

    def replace(self, collection: str, document: Document) -> None:
        self._reach()
        self.collections.setdefault(collection, {})[document["_id"]] = copy.deepcopy(document)

    def delete(self, collection: str, match: Document) -> None:
        self._reach()
        kept = {name: item for name, item in self.collections.get(collection, {}).items() if not _matches(item, match)}
        self.collections[collection] = kept

    def close(self) -> None:
        pass


def _matches(item: Document, match: Document) -> bool:
    return all(
        name in item and (item[name] < value["$lt"] if isinstance(value, dict) else item[name] == value)
        for name, value in match.items()
    )


_PLACES: dict[str, MemoryDocuments] = {}


def memory_at(url: str) -> MemoryDocuments:
    """The same store for the same URL."""
    return _PLACES.setdefault(url, MemoryDocuments(url))

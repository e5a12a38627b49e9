"""What a handler gets as `index`: it notes documents by their ids, each with a version."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from semel.errors import SemelError

__all__ = [
    "DELETED",
    "DOCUMENT_BYTES_MAX",
    "EFFECTS_MAX",
    "EFFECT_BYTES_MAX",
    "DocumentRefused",
    "Note",
    "SearchEffects",
    "newest",
]

EFFECTS_MAX: Final = 20_000
"""Documents that one call of a handler may note."""
EFFECT_BYTES_MAX: Final = 32 * 1024 * 1024
"""Bytes of all of them: they wait in memory."""
DOCUMENT_BYTES_MAX: Final = 8 * 1024 * 1024
"""Of one document, which is sent alone where it is large; a server takes requests of 100 MB, and searches none so."""
ID_BYTES_MAX: Final = 512
"""OpenSearch's own limit."""
VERSION_MAX: Final = 2**63 - 1
DELETED: Final = "deleted"
"""The field that only the marker of a deleted document has."""
_MARKER = msgspec.json.encode({DELETED: True})


class DocumentRefused(SemelError):
    """A document that cannot be written as it is."""


class Note(NamedTuple):
    """One document and its version. `by_position`: the version is an offset of the topic."""

    into: str
    """The index, as the app calls it."""
    id: str
    version: int
    body: bytes
    by_position: bool = False


class SearchEffects:
    """Documents in the order in which they were noted. Nothing is read here. Valid while the handler runs.

    `records` are those that the handler is given, `indexes` the names that the app declared (None: any).
    """

    __slots__ = ("_bytes", "_indexes", "_offsets", "_open", "notes")

    def __init__(self, records: Sequence[Any] = (), indexes: Collection[str] | None = None) -> None:
        self._open = True
        self._bytes = 0
        self._indexes = indexes
        self._offsets = {record.key: record.offset for record in records}
        self.notes: list[Note] = []

    def __repr__(self) -> str:
        return f"<SearchEffects {len(self.notes)} documents, {self._bytes} bytes>"

    @property
    def noted(self) -> list[Note]:
        """The documents."""
        return self.notes

    def put(self, index: str, id: str | int, document: Any, *, version: Any = None) -> None:  # noqa: A002
        """Make `document` the one with this id, if its version is not lower than that of the one that is there.

        `document` is a dict, or whatever msgspec writes as an object. `version` is a number that grows with every
        change of what the document shows, 0 to 2**63 - 1; or the record whose offset is to be it, which holds while all
        changes of a document come from one partition. Left out, the id has to be the key of one of the handler's
        records, and that one's offset (the last one's) is the version.
        """
        try:
            body = msgspec.json.encode(document)
        except (TypeError, ValueError, RecursionError) as error:
            raise DocumentRefused(f"{index}/{id}: the document cannot be written as JSON: {error}") from error
        if not body.startswith(b"{"):
            raise DocumentRefused(f"{index}/{id}: a document is an object; this is {document!r:.100}.")
        if b'"deleted"' in body and DELETED in msgspec.json.decode(body):
            raise DocumentRefused(
                f"{index}/{id}: the field {DELETED!r} marks documents that were deleted. Use index.delete(...), or "
                "give the field another name."
            )
        self._note(index, id, body, version)

    def delete(self, index: str, id: str | int, *, version: Any = None) -> None:  # noqa: A002
        """Leave `{"deleted": true}` in the document's place, with its version as in `put`.

        OpenSearch forgets the version of a deleted document, and an older one could come back: a marker keeps it.
        """
        self._note(index, id, _MARKER, version)

    def end(self) -> None:
        """The handler returned or raised: nothing can be noted any more."""
        self._open = False

    def _note(self, index: str, id: str | int, body: bytes, version: Any) -> None:  # noqa: A002
        if not self._open:
            raise DocumentRefused("index is used after the handler ended: what it noted is sent. Use it inside only.")
        if self._indexes is not None and index not in self._indexes:
            raise DocumentRefused(f"{index!r:.100} is no index of the app, which declares {', '.join(self._indexes)}.")
        name = str(id) if isinstance(id, str | int) and not isinstance(id, bool) else ""
        if not 1 <= len(name.encode("utf-8", "surrogatepass")) <= ID_BYTES_MAX:
            raise DocumentRefused(f"{index}: an id is text of 1 to {ID_BYTES_MAX} bytes or an int: {id!r:.100}.")
        number, by_position = self._version(index, id, version)
        if len(body) > DOCUMENT_BYTES_MAX:
            raise DocumentRefused(f"{index}/{name}: the document has {len(body)} bytes, above {DOCUMENT_BYTES_MAX}.")
        self._bytes += len(body)
        if len(self.notes) >= EFFECTS_MAX or self._bytes > EFFECT_BYTES_MAX:
            raise DocumentRefused(f"the effects are more than {EFFECTS_MAX} documents or {EFFECT_BYTES_MAX} bytes.")
        self.notes.append(Note(index, name, number, body, by_position))

    def _version(self, index: str, id: str | int, version: Any) -> tuple[int, bool]:  # noqa: A002
        if version is None:
            found = self._offsets.get(id)
            if found is None:
                raise DocumentRefused(
                    f"{index}/{id}: no record of this call has the key {id!r}, so the document has no version. Give it "
                    "one: version=record, or a number that grows with every change."
                )
            return found, True
        if isinstance(version, int) and not isinstance(version, bool):
            if not 0 <= version <= VERSION_MAX:
                raise DocumentRefused(f"{index}/{id}: the version {version} is not between 0 and {VERSION_MAX}.")
            return version, False
        offset = getattr(version, "offset", None)
        if not isinstance(offset, int):
            raise DocumentRefused(f"{index}/{id}: a version is an int or a record; this is {version!r:.100}.")
        return offset, True


def newest(notes: Iterable[Note]) -> list[Note]:
    """Of each document the newest version; of equal ones the one that was noted last."""
    kept: dict[tuple[str, str], Note] = {}
    for note in notes:
        before = kept.get((note.into, note.id))
        if before is None or note.version >= before.version:
            kept[note.into, note.id] = note
    return list(kept.values())

"""`app.transaction(documents)`: one new document in a store that speaks MongoDB's protocol, and its records."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from semel.dualwrite.documents.connection import DocumentRefused, checked
from semel.dualwrite.documents.session import NewDocument
from semel.outbox.transaction import Block, Sending

if TYPE_CHECKING:
    from semel.outbox.writer import AnySession, Writer

__all__ = ["DocumentBlock", "DocumentTransaction"]


class DocumentTransaction(Sending):
    """The inside of `with app.transaction(documents) as tx:`, and of `async with`: nothing in it waits."""

    def __init__(self, writer: Writer, session: AnySession) -> None:
        super().__init__(writer, session)
        self._new: NewDocument | None = None

    def insert(self, collection: str, document: Mapping[str, Any]) -> Any:
        """Insert a new document when the block ends; its `_id`, which is made where the document has none.

        A transaction inserts one document: the store changes no two of them in one step. Raises `DocumentRefused` for
        what cannot be written, and for a second document.
        """
        self._check_open("inserts a document")
        if self._new is not None:
            raise DocumentRefused(
                "a transaction inserts one document, because the store changes no two of them in one step. Put what "
                "belongs together into one document, or use a database with transactions."
            )
        if not isinstance(collection, str) or not collection or collection.startswith(("semel_txn", "system.")):
            raise DocumentRefused(f"{collection!r} is no collection of yours.")
        found = checked(document)
        found.setdefault("_id", uuid.uuid4().hex)
        self._new = NewDocument(collection, found)
        return found["_id"]

    def _commit(self) -> None:
        self._writer.commit(self._session, self._outgoing.rows, self._new)


class DocumentBlock(Block[DocumentTransaction, DocumentTransaction]):
    """`app.transaction(documents)`. The end raises `Conflict` where the document's place is taken."""

    _colours = (DocumentTransaction, DocumentTransaction)

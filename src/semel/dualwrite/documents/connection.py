"""A database that speaks MongoDB's protocol, through the few things that the dual write asks of it.

Only the insert of a document whose `_id` must not be there yet is taken for atomic: FerretDB 1.24 compares and writes
in two steps when it updates (of 400 increments by four clients at once 102 were left).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final
from urllib.parse import urlsplit

from semel.databases.database import without_password
from semel.errors import ConfigurationError, Retriable, SemelError
from semel.processing.shortage import is_shortage

try:
    import bson
    import pymongo
    from pymongo.errors import ConfigurationError as WrongSettings
    from pymongo.errors import ConnectionFailure, DuplicateKeyError, OperationFailure, PyMongoError, WriteConcernError
    from pymongo.read_concern import ReadConcern
    from pymongo.write_concern import WriteConcern
except ImportError as error:
    if is_shortage(error):
        raise  # It is there, and cannot be loaded at this moment.
    raise ConfigurationError(
        f"MongoDB's protocol needs pymongo, which is not there ({error}). Install it with: pip install 'semel[mongodb]'"
    ) from error

__all__ = ["DOCUMENT_BYTES_MAX", "DocumentDatabase", "DocumentRefused"]

CONNECT_MS: Final = 5_000
ANSWER_MS: Final = 30_000
DOCUMENT_BYTES_MAX: Final = 16_000_000
"""One document: the protocol's limit is 16 MiB, and ours adds a few words to it."""

Document = dict[str, Any]


class DocumentRefused(SemelError):
    """A document that cannot be inserted as it is. Nothing happened."""


class DocumentDatabase:
    """Any thread may use it; every call blocks. Raises `Retriable` when nobody knows whether a call was carried out,
    with nothing known about it but that it may be repeated."""

    def __init__(self, url: str) -> None:
        self.url = url
        name = urlsplit(url).path.lstrip("/")
        if not url.startswith(("mongodb://", "mongodb+srv://")) or not name:
            raise ConfigurationError(f"{without_password(url)!r} names no database. Use mongodb://HOST:PORT/NAME.")
        try:
            self._client: Any = pymongo.MongoClient(
                url,
                connectTimeoutMS=CONNECT_MS,
                serverSelectionTimeoutMS=CONNECT_MS,
                socketTimeoutMS=ANSWER_MS,
                appname="semel",
                # What was not answered is found out by its `_id`, not sent again by the driver.
                retryWrites=False,
                retryReads=False,
            )
        except (PyMongoError, ValueError) as error:
            raise ConfigurationError(f"{without_password(url)!r}: {error}") from error
        # What was answered survives the server, and where there are several the loss of one.
        self._written = WriteConcern(w="majority", j=True)
        self._database: Any = self._client.get_database(name, write_concern=self._written)
        self._reading: Any = self._database

    def __repr__(self) -> str:
        return f"<DocumentDatabase {without_password(self.url)}>"

    def check(self) -> None:
        """Raises `ConfigurationError` for a server that cannot keep what it is given; `Retriable` when it is away."""
        with self._reaching():
            hello = self._client.admin.command("hello")
        if hello.get("msg") == "isdbgrid":
            raise ConfigurationError(
                f"{without_password(self.url)} is a sharded cluster, where `_id` is unique in each shard only. Use a "
                "replica set, or a single server."
            )
        if hello.get("setName"):
            # A primary that was deposed and does not know it yet must not answer about one document.
            self._reading = self._database.with_options(read_concern=ReadConcern("linearizable"))

    def insert(self, collection: str, document: Document) -> bool:
        """Insert; False where a document with this `_id`, or another unique key of it, is there.

        Raises `DocumentRefused` for what the server does not take.
        """
        try:
            with self._reaching():
                self._database[collection].insert_one(document)
        except DuplicateKeyError:
            return False
        return True

    def find(self, collection: str, name: Any) -> Document | None:
        """The document with this `_id`."""
        with self._reaching():
            found: Document | None = self._reading[collection].find_one({"_id": name})
            return found

    def last(self, collection: str, match: Mapping[str, Any]) -> Document | None:
        """The matching document with the highest `at`."""
        with self._reaching():
            found = list(self._database[collection].find(dict(match)).sort("at", -1).limit(1))
            return found[0] if found else None

    def all(self, collection: str) -> list[Document]:
        """Every document of a small collection."""
        with self._reaching():
            return list(self._database[collection].find({}))

    def replace(self, collection: str, document: Document) -> None:
        """Put a document in the place of whatever has its `_id`. Not atomic everywhere: for hints only."""
        with self._reaching():
            self._database[collection].replace_one({"_id": document["_id"]}, document, upsert=True)

    def delete(self, collection: str, match: Mapping[str, Any]) -> None:
        """Delete what matches."""
        with self._reaching():
            self._database[collection].delete_many(dict(match))

    def close(self) -> None:
        """Close the connections, without raising."""
        with contextlib.suppress(Exception):
            self._client.close()

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except DuplicateKeyError:
            raise
        except WrongSettings as error:
            raise ConfigurationError(f"{without_password(self.url)}: {error}") from error
        except (ConnectionFailure, WriteConcernError) as error:
            raise Retriable(f"{without_password(self.url)}: {type(error).__name__}: {_one_line(error)}") from error
        except OperationFailure as error:
            text = f"{without_password(self.url)} refused it: {_one_line(error)} (code {error.code})"
            if error.code in (13, 18, 8000):  # Unauthorized, AuthenticationFailed, Atlas' own.
                raise ConfigurationError(text) from error
            raise DocumentRefused(text) from error
        except PyMongoError as error:
            raise Retriable(f"{without_password(self.url)}: {type(error).__name__}: {_one_line(error)}") from error


def checked(document: Mapping[str, Any]) -> Document:
    """A copy that can be inserted. Raises `DocumentRefused`."""
    found = dict(document)
    if "semel" in found:
        raise DocumentRefused("a document's field 'semel' is Semel's own: name yours otherwise.")
    try:
        size = len(bson.encode(found))
    except (bson.errors.BSONError, TypeError, ValueError, OverflowError) as error:
        raise DocumentRefused(f"the document cannot be written as BSON: {error}") from error
    if size > DOCUMENT_BYTES_MAX:
        raise DocumentRefused(f"the document has {size} bytes, and {DOCUMENT_BYTES_MAX} is the most.")
    return found


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]

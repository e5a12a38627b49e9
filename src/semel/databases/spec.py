"""What an app declares about its databases. Values only: nothing here connects to anything."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from semel.errors import ConfigurationError

__all__ = ["CacheSpec", "DatabaseSpec", "DocumentsSpec", "SearchSpec", "check_indexes"]

_INDEX = re.compile(r"[a-z0-9][a-z0-9._-]{0,199}")


@dataclass(frozen=True, slots=True)
class DatabaseSpec:
    """A database of the app: `sqlite:///PATH`, `sqlite:////ABSOLUTE/PATH` or `postgresql://...`.

    `schema` is SQL that may run again at every start: `CREATE TABLE IF NOT EXISTS ...; ...`.
    """

    kind: ClassVar[str] = "database"
    """The method of `App` that declares one, and the word in its variable: SEMEL_DATABASE."""
    noun: ClassVar[str] = "database"
    """What messages call it."""

    name: str
    url: str
    schema: str | None = None
    outbox: bool = False
    """Whether transactions on it send records, which a relay brings into Kafka."""
    dual_write: Literal["conditional"] | bool = False
    """Whether Kafka and this database commit together (KIP-939): True, or "conditional" on a Kafka that keeps no
    prepared transactions."""
    connections: int | None = None
    """Most transactions of one process at the same time; None leaves it to Semel."""

    @property
    def sends(self) -> bool:
        """Whether transactions on it may send records, whichever way."""
        return self.outbox or bool(self.dual_write)


class DocumentsSpec(DatabaseSpec):
    """A document store of the app that speaks MongoDB's protocol: `mongodb://HOST:PORT/NAME`."""

    __slots__ = ()
    kind = "documents"
    noun = "document store"


class CacheSpec(DatabaseSpec):
    """A Valkey or Redis of the app: `valkey://HOST:PORT/NUMBER`, `valkeys://` with TLS, `redis://` and `rediss://`."""

    __slots__ = ()
    kind = noun = "cache"


@dataclass(frozen=True, slots=True)
class SearchSpec(DatabaseSpec):
    """An OpenSearch of the app: `opensearch://HOST:PORT`, `opensearchs://` with TLS."""

    kind: ClassVar[str] = "search"
    noun: ClassVar[str] = "search"

    indexes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The indexes that sinks write to, by name, each with what it is made with (`mappings`, `settings`, `aliases`)."""


def check_indexes(indexes: Mapping[str, Mapping[str, Any]], what: str) -> None:
    """Raise `ConfigurationError` for what cannot be the indexes of a search."""
    for index, body in indexes.items():
        if not isinstance(index, str) or not _INDEX.fullmatch(index) or index.startswith("semel-"):
            raise ConfigurationError(
                f"{what}: {index!r} is no name for an index: small letters, digits, '-', '_' and '.', a letter or "
                "digit first, and not 'semel-', which is Semel's own."
            )
        if not isinstance(body, Mapping):
            raise ConfigurationError(f"{what}: index {index} is made with {body!r:.100}, which is no dict.")
    if not indexes:
        raise ConfigurationError(f"{what} has no index: indexes={{'products': {{}}}} declares one.")

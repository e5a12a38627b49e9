"""What an app declares about its databases. Values only: nothing here connects to anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["CacheSpec", "DatabaseSpec", "SearchSpec"]


@dataclass(frozen=True, slots=True)
class DatabaseSpec:
    """A database of the app: `sqlite:///PATH`, `sqlite:////ABSOLUTE/PATH` or `postgresql://...`.

    `schema` is SQL that may run again at every start: `CREATE TABLE IF NOT EXISTS ...; ...`.
    """

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


class CacheSpec(DatabaseSpec):
    """A Valkey or Redis of the app: `valkey://HOST:PORT/NUMBER`, `valkeys://` with TLS, `redis://` and `rediss://`."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class SearchSpec(DatabaseSpec):
    """An OpenSearch of the app: `opensearch://HOST:PORT`, `opensearchs://` with TLS."""

    indexes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The indexes that sinks write to, by name, each with what it is made with (`mappings`, `settings`, `aliases`)."""

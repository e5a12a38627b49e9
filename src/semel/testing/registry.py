"""A schema registry in memory, for tests: it takes every schema, and knows what it took."""

from __future__ import annotations

from uuid import UUID

from semel.processing.serdes.registry import Schema
from semel.processing.topics import DataError

__all__ = ["MemoryRegistry"]


class MemoryRegistry:
    """See `semel.processing.serdes.registry.Registry`. Whether schemas are compatible only a real one can say."""

    def __init__(self) -> None:
        self._schemas: list[Schema] = []
        self._subjects: dict[str, list[Schema]] = {}

    def __repr__(self) -> str:
        return f"<MemoryRegistry {len(self._schemas)} schemas>"

    def register(self, subject: str, schema: Schema) -> int:
        """The id of a schema: its number, from 1."""
        versions = self._subjects.setdefault(subject, [])
        if schema not in versions:
            versions.append(schema)
        if schema not in self._schemas:
            self._schemas.append(schema)
        return self._schemas.index(schema) + 1

    def look_up(self, subject: str, schema: Schema) -> int | None:
        """As if somebody had registered it."""
        return self.register(subject, schema)

    def version_of(self, subject: str, schema: Schema) -> int:
        """Its number among those of the subject, from 1."""
        return self._subjects[subject].index(schema) + 1

    def guid_of(self, subject: str, schema: Schema) -> UUID:
        """Its number as a GUID."""
        return UUID(int=self.register(subject, schema))

    def find(self, schema: int | UUID) -> Schema:
        """A schema by its id or GUID. Raises `DataError`."""
        if isinstance(schema, UUID):
            schema = schema.int
        if isinstance(schema, int) and 1 <= schema <= len(self._schemas):
            return self._schemas[schema - 1]
        raise DataError(f"the registry has no schema {schema}")

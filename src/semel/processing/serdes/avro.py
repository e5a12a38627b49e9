"""`Avro(Order)`: a topic's values in Avro, with a schema registry. Needs `semel[avro]` (fastavro)."""

from __future__ import annotations

import datetime
import decimal
import io
import json
import uuid
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import msgspec

from semel.errors import ConfigurationError
from semel.processing.serdes.avro_schema import avro_schema
from semel.processing.serdes.formats import Registered, guarded, imported
from semel.processing.serdes.registry import Schema
from semel.processing.topics import DataError, Format

__all__ = ["Avro"]

V = TypeVar("V")
_KEPT = (bytes, datetime.datetime, datetime.date, datetime.time, decimal.Decimal, uuid.UUID)
"""Types that fastavro writes by its schema's logical types."""


class Avro(Format[V], Generic[V]):
    """Values of type `kind` in Avro. The schema is that of the type, or `schema` (a document, or its JSON).

    `register=False`: the schema has to be in the registry already. `subject` is `<topic>-value` unless it is given.
    With `guid` the schema is named in the header `__value_schema_id` and not in front of the value.
    """

    content_type = "application/avro"

    def __init__(
        self,
        kind: type[V],
        *,
        schema: Mapping[str, Any] | str | None = None,
        namespace: str | None = None,
        subject: str | None = None,
        register: bool = True,
        guid: bool = False,
    ) -> None:
        self.kind, self._guid = kind, guid
        self._schema, self._namespace = schema, namespace
        self._subject, self._register = subject, register

    def __repr__(self) -> str:
        return f"Avro({getattr(self.kind, '__name__', self.kind)})"

    def bind(self, topic: str) -> Registered:
        """See `Format`. Raises `ConfigurationError` for a type without a schema, and one that is not valid."""
        what = f"the value of topic {topic}"
        schema: Any = self._schema
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except ValueError as error:
                raise ConfigurationError(f"{what}: schema= is not JSON: {error}.") from error
        if schema is None:
            schema = avro_schema(self.kind, what, self._namespace)
        bound = _Avro(topic, self.kind, schema, subject=self._subject or f"{topic}-value", register=self._register)
        bound.by_guid = self._guid
        return bound


class _Avro(Registered):
    def __init__(self, topic: str, kind: Any, schema: Any, *, subject: str, register: bool) -> None:
        super().__init__(topic, subject=subject, register=register)
        self._fastavro = imported("fastavro", "avro")
        self._kind = kind
        try:
            self._parsed = self._fastavro.parse_schema(schema)
        except Exception as error:  # fastavro raises several classes, and KeyError for what is missing.
            raise ConfigurationError(f"{self.what}: its Avro schema is not valid: {error!r}.") from error
        self.schema = Schema(json.dumps(schema), "AVRO")
        self._writers: dict[Any, Any] = {}

    def encode(self, value: Any) -> bytes:
        if isinstance(self._kind, type) and not isinstance(value, self._kind):
            raise DataError(
                f"{self.what} is declared as {self._kind.__name__}, got {type(value).__name__} {value!r:.80}"
            )
        out = io.BytesIO()
        plain = guarded(f"{self.what} cannot be written", lambda: msgspec.to_builtins(value, builtin_types=_KEPT))
        write = self._fastavro.schemaless_writer
        guarded(f"{self.what} cannot be written as Avro", lambda: write(out, self._parsed, plain, strict=True))
        return out.getvalue()

    def decode(self, schema: Any, indexes: tuple[int, ...], data: bytes) -> Any:  # noqa: ARG002
        writer = self._parsed if schema == self._id else self._writer(schema)
        source = io.BytesIO(data)
        read = self._fastavro.schemaless_reader
        plain = guarded(f"{self.what} is no Avro of schema {schema}", lambda: read(source, writer, self._parsed))
        if source.tell() != len(data):
            raise DataError(f"{self.what} has {len(data) - source.tell()} bytes behind its Avro of schema {schema}")
        return guarded(f"{self.what} is not valid", lambda: msgspec.convert(plain, self._kind, builtin_types=_KEPT))

    def _writer(self, schema: Any) -> Any:
        """The parsed schema of this id. Raises `Retriable` while it is fetched."""
        known = self._writers.get(schema)
        if known is None:
            found = self._find(schema)
            if found.kind != "AVRO" or found.references:
                what = (
                    f"is {found.kind}" if found.kind != "AVRO" else "refers to other subjects, which is not supported"
                )
                raise DataError(f"{self.what}: schema {schema} {what}")
            parse = self._fastavro.parse_schema
            known = guarded(f"{self.what}: schema {schema} is not valid", lambda: parse(json.loads(found.text)))
            self._writers[schema] = known
        return known

"""`JsonSchema(Order)`: a topic's values in JSON, with a schema registry.

Values go through msgspec as plain JSON does, checked against their type when read; with a `schema` of your own they are
checked against that too, in both directions (`semel[jsonschema]`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import msgspec

from semel.errors import ConfigurationError
from semel.processing.serdes.formats import Registered, guarded, imported
from semel.processing.serdes.registry import Schema
from semel.processing.topics import DataError, Format, serde

__all__ = ["JsonSchema"]

V = TypeVar("V")
DRAFT = "http://json-schema.org/draft-07/schema#"
"""Every registry can compare schemas of this draft; later ones only some."""


class JsonSchema(Format[V], Generic[V]):
    """Values of type `kind` in JSON. The schema is that of the type, or `schema` (a document, or its JSON).

    `register=False`: the schema has to be in the registry already. `subject` is `<topic>-value` unless it is given.
    With `guid` the schema is named in the header `__value_schema_id` and not in front of the value.
    """

    content_type = "application/json"

    def __init__(
        self,
        kind: type[V],
        *,
        schema: Mapping[str, Any] | str | None = None,
        subject: str | None = None,
        register: bool = True,
        guid: bool = False,
    ) -> None:
        self.kind, self._guid = kind, guid
        self._schema, self._subject, self._register = schema, subject, register

    def __repr__(self) -> str:
        return f"JsonSchema({getattr(self.kind, '__name__', self.kind)})"

    def bind(self, topic: str) -> Registered:
        """See `Format`. Raises `ConfigurationError` for a type or schema that is not valid."""
        subject = self._subject or f"{topic}-value"
        bound = _Json(topic, self.kind, self._schema, subject=subject, register=self._register)
        bound.by_guid = self._guid
        return bound


class _Json(Registered):
    def __init__(self, topic: str, kind: Any, schema: Any, *, subject: str, register: bool) -> None:
        super().__init__(topic, subject=subject, register=register)
        if kind in (str, bytes):
            raise ConfigurationError(f"{self.what}: JsonSchema({kind.__name__}) is no JSON document.")
        self._serde = serde(kind, self.what)
        self._validate: Any = None
        if schema is None:
            document: Any = _of_type(kind, self.what)
        else:
            try:
                document = json.loads(schema) if isinstance(schema, str) else dict(schema)
                validators = imported("jsonschema", "jsonschema")
                cls = validators.validators.validator_for(document, default=validators.Draft202012Validator)
                cls.check_schema(document)
            except (ValueError, TypeError) as error:
                raise ConfigurationError(f"{self.what}: schema= is not JSON: {error}.") from error
            except Exception as error:
                if isinstance(error, ConfigurationError):
                    raise
                raise ConfigurationError(f"{self.what}: schema= is no JSON Schema: {error}.") from error
            self._validate = cls(document).iter_errors
        self.schema = Schema(json.dumps(document), "JSON")

    def encode(self, value: Any) -> bytes:
        data = self._serde.encode(value)
        if self._validate is not None:
            self._check(data)
        return data

    def decode(self, schema: Any, indexes: tuple[int, ...], data: bytes) -> Any:  # noqa: ARG002
        value = self._serde.decode(data)
        if self._validate is not None:
            self._check(data)
        return value

    def _check(self, data: bytes) -> None:
        document = guarded(f"{self.what} is no JSON", lambda: msgspec.json.decode(data))
        for error in self._validate(document):
            raise DataError(f"{self.what} is not as its schema says: {error.json_path}: {error.message:.500}")


def _of_type(kind: Any, what: str) -> dict[str, Any]:
    try:
        (schema,), parts = msgspec.json.schema_components([kind], ref_template="#/definitions/{name}")
    except (TypeError, NameError) as error:
        raise ConfigurationError(f"{what}: {kind!r} has no JSON Schema: {error}. Give schema=.") from error
    document: dict[str, Any] = _draft_7(schema)
    return {"$schema": DRAFT, **document, **({"definitions": _draft_7(parts)} if parts else {})}


def _draft_7(schema: Any) -> Any:
    """The same in draft 7; of what msgspec says only tuples have another form there."""
    if isinstance(schema, list):
        return [_draft_7(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: _draft_7(item) for name, item in schema.items()}
    if isinstance(found.get("prefixItems"), list):
        found["additionalItems"] = found.pop("items", True)
        found["items"] = found.pop("prefixItems")
    return found

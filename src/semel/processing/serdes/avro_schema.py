"""The Avro schema of a Python type, as msgspec sees the type."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import inspect as shapes

from semel.errors import ConfigurationError

__all__ = ["avro_schema"]

_PLAIN: dict[type[shapes.Type], Any] = {
    shapes.NoneType: "null",
    shapes.BoolType: "boolean",
    shapes.IntType: "long",
    shapes.FloatType: "double",
    shapes.StrType: "string",
    shapes.BytesType: "bytes",
    shapes.DateTimeType: {"type": "long", "logicalType": "timestamp-micros"},
    shapes.DateType: {"type": "int", "logicalType": "date"},
    shapes.TimeType: {"type": "long", "logicalType": "time-micros"},
    shapes.UUIDType: {"type": "string", "logicalType": "uuid"},
}
_LISTS = (shapes.ListType, shapes.SetType, shapes.FrozenSetType, shapes.VarTupleType)
_RECORDS = (shapes.StructType, shapes.DataclassType, shapes.TypedDictType, shapes.NamedTupleType)


def avro_schema(kind: Any, what: str, namespace: str | None = None) -> dict[str, Any]:
    """A record schema (Avro 1.11): fields in the order of the type, with its defaults.

    Raises `ConfigurationError` for a type that has no one form in Avro: give `schema=` then.
    """
    try:
        shape = msgspec.inspect.type_info(kind)
    except (TypeError, NameError) as error:
        raise ConfigurationError(f"{what}: {kind!r} has no Avro schema: {error}. Give schema=.") from error
    if not isinstance(shape, _RECORDS):
        raise ConfigurationError(
            f"{what}: {kind!r} is no record; use a msgspec.Struct or a dataclass, or give schema=."
        )
    schema: dict[str, Any] = _Schemas(what).of(shape)
    if namespace:
        schema = {"type": schema["type"], "name": schema["name"], "namespace": namespace, "fields": schema["fields"]}
    return schema


class _Schemas:
    """Gives each named type its schema once, and its name from then on."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._named: dict[str, type] = {}

    def of(self, shape: shapes.Type) -> Any:
        plain = _PLAIN.get(type(shape))
        if plain is not None:
            return plain
        if isinstance(shape, shapes.Metadata):
            return self.of(shape.type)
        if isinstance(shape, _RECORDS):
            return self._record(shape)
        if isinstance(shape, _LISTS):
            return {"type": "array", "items": self.of(shape.item_type)}
        if isinstance(shape, shapes.DictType):
            if not isinstance(shape.key_type, shapes.StrType):
                raise self._unknown("a dict whose keys are not str")
            return {"type": "map", "values": self.of(shape.value_type)}
        if isinstance(shape, shapes.EnumType):
            return self._enum(shape)
        if isinstance(shape, shapes.UnionType):
            return self._union(shape)
        raise self._unknown(type(shape).__name__.removesuffix("Type"))

    def _record(self, shape: Any) -> Any:
        if self._is_known(shape.cls):
            return shape.cls.__name__
        return {
            "type": "record",
            "name": shape.cls.__name__,
            "fields": [self._field(field) for field in shape.fields],
        }

    def _is_known(self, cls: type) -> bool:
        """Whether this named type stands in the schema already; from now on it does."""
        known = self._named.get(cls.__name__)
        if known is not None and known is not cls:
            raise self._unknown(f"two different types of the name {cls.__name__}")
        self._named[cls.__name__] = cls
        return known is not None

    def _field(self, field: Any) -> dict[str, Any]:
        default = getattr(field, "default", msgspec.NODEFAULT)
        factory = getattr(field, "default_factory", msgspec.NODEFAULT)
        kind = self.of(field.type)
        found: dict[str, Any] = {"name": field.encode_name, "type": kind}
        if factory not in (msgspec.NODEFAULT, msgspec.UNSET):
            default = factory()
        if default is msgspec.NODEFAULT or default is msgspec.UNSET:
            return found
        if isinstance(kind, list):  # A union's default is of its first branch.
            first = [item for item in kind if (item == "null") == (default is None)]
            found["type"] = [*first, *(item for item in kind if item not in first)]
        found["default"] = _json_default(default)
        return found

    def _enum(self, shape: shapes.EnumType) -> Any:
        symbols = [item.value for item in shape.cls]
        if not all(isinstance(item, str) and item.isidentifier() and item.isascii() for item in symbols):
            raise self._unknown(f"{shape.cls.__name__}: the values of an Avro enum are names")
        if self._is_known(shape.cls):
            return shape.cls.__name__
        return {"type": "enum", "name": shape.cls.__name__, "symbols": symbols}

    def _union(self, shape: shapes.UnionType) -> list[Any]:
        kinds = [self.of(item) for item in shape.types]
        if sum(isinstance(item, dict) and item["type"] in ("record", "map") for item in kinds) > 1:
            raise self._unknown("a union of several records")
        return ["null", *(item for item in kinds if item != "null")] if "null" in kinds else kinds

    def _unknown(self, kind: str) -> ConfigurationError:
        return ConfigurationError(f"{self._what}: {kind} has no one form in Avro. Give Avro(..., schema=...).")


def _json_default(value: Any) -> Any:
    """A default as Avro writes it: bytes as text of code points 0 to 255."""
    if isinstance(value, bytes):
        return value.decode("latin-1")
    return msgspec.to_builtins(value)

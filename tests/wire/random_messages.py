"""Random messages of any schema, for round trips over every API that there is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, get_args
from uuid import UUID

from kio.schema.errors import ErrorCode
from kio.schema.index import api_key_map, schema_name_map
from kio.serial._introspect import (
    EntityField,
    EntityTupleField,
    PrimitiveTupleField,
    classify_field,
    get_schema_field_type,
    is_optional,
)

__all__ = ["SCHEMAS", "random_message"]

SCHEMAS: list[tuple[int, int, str]] = [
    (key, version, kind)
    for key, name in sorted(api_key_map.items())
    for version in sorted(schema_name_map[name])
    for kind in ("request", "response")
]
"""API key, version, and request or response."""

_VALUES: dict[str, Callable[[Random], Any]] = {
    "bool": lambda rng: rng.random() < 0.5,
    "int8": lambda rng: rng.randrange(-(2**7), 2**7),
    "int16": lambda rng: rng.randrange(-(2**15), 2**15),
    "uint16": lambda rng: rng.randrange(2**16),
    "int32": lambda rng: rng.randrange(-(2**31), 2**31),
    "int64": lambda rng: rng.randrange(-(2**63), 2**63),
    "float64": lambda rng: rng.random(),
    "error_code": lambda rng: rng.choice(list(ErrorCode)),
    "timedelta_i32": lambda rng: timedelta(milliseconds=rng.randrange(-(2**31), 2**31)),
    "timedelta_i64": lambda rng: timedelta(milliseconds=rng.randrange(-(2**40), 2**40)),
    "datetime_i64": lambda rng: datetime.fromtimestamp(rng.randrange(2**31), UTC),
    "uuid": lambda rng: UUID(int=rng.randrange(1, 2**128)),
    "string": lambda rng: "é" * rng.choice((0, 1, 3, 70)),
    "bytes": lambda rng: rng.randbytes(rng.choice((0, 1, 200))),
    "records": lambda rng: rng.randbytes(rng.choice((0, 1, 200, 20_000))),
}


def random_message(entity: Any, rng: Random) -> Any:
    """One value of this schema, nested structures and nulls included."""
    values: dict[str, Any] = {}
    for item in fields(entity):
        kind = classify_field(item)
        nullable = is_optional(item) or type(None) in get_args(item.type)
        if nullable and rng.random() < 0.25:
            values[item.name] = None
        elif isinstance(kind, EntityField):
            values[item.name] = random_message(kind.type_, rng)
        elif isinstance(kind, EntityTupleField):
            values[item.name] = tuple(random_message(kind.type_, rng) for _ in range(rng.choice((0, 1, 2))))
        elif isinstance(kind, PrimitiveTupleField):
            make = _VALUES[get_schema_field_type(item)]
            values[item.name] = tuple(make(rng) for _ in range(rng.choice((0, 1, 3, 130))))
        else:
            values[item.name] = _VALUES[get_schema_field_type(item)](rng)
    return entity(**values)

"""Values of a type, made up: what an input looks like where no proof plan says it."""

from __future__ import annotations

import string
from random import Random
from typing import Any

import msgspec
from msgspec import inspect

from semel.errors import ConfigurationError

__all__ = ["made_up"]

_DEPTH_MAX = 4
"""Deeper than this, optional parts and containers stay empty: a type that contains itself must come to an end."""
_ITEMS_MAX = 3
_TEXT_MAX = 12
_INTEGER_MAX = 100
"""Above the least that is allowed. A handler may take a number for a count and yield as many effects."""


def made_up(kind: Any, rng: Random) -> Any:
    """A value of this type as JSON would have it (dict, list, str, int, ...); `rng` alone decides which.

    Bounds of `msgspec.Meta` hold. Raises `ConfigurationError` for a type with a pattern, which nobody can guess.
    """
    return _value(inspect.type_info(kind), rng, 0)


def _value(info: Any, rng: Random, depth: int) -> Any:
    simple = _SIMPLE.get(type(info))
    if simple is not None:
        return simple(info, rng)
    if isinstance(info, inspect.Metadata):
        return _value(info.type, rng, depth)
    if isinstance(info, inspect.UnionType):
        plain = [item for item in info.types if isinstance(item, inspect.NoneType)]
        return _value(rng.choice(plain if plain and depth >= _DEPTH_MAX else info.types), rng, depth)
    if isinstance(info, inspect.StructType):
        return _struct(info, rng, depth)
    if isinstance(info, inspect.TypedDictType | inspect.DataclassType | inspect.NamedTupleType):
        wanted = [field for field in info.fields if field.required or (depth < _DEPTH_MAX and rng.random() < 0.5)]
        values = {field.encode_name: _value(field.type, rng, depth + 1) for field in wanted}
        return list(values.values()) if isinstance(info, inspect.NamedTupleType) else values
    if isinstance(info, inspect.TupleType):
        return [_value(item, rng, depth + 1) for item in info.item_types]
    if isinstance(info, inspect.DictType):
        return {
            str(_value(info.key_type, rng, depth + 1)): _value(info.value_type, rng, depth + 1)
            for _ in range(_count(info, rng, depth))
        }
    if isinstance(info, inspect.CollectionType):
        return [_value(info.item_type, rng, depth + 1) for _ in range(_count(info, rng, depth))]
    raise ConfigurationError(
        f"inputs of type {info} cannot be made up. Write a proof plan (semel.prove.plan.ProofPlan) that yields them."
    )


def _struct(info: inspect.StructType, rng: Random, depth: int) -> Any:
    values: dict[str, Any] = {}
    if info.tag_field is not None:
        values[info.tag_field] = info.tag
    for field in info.fields:
        if field.required or info.array_like or (depth < _DEPTH_MAX and rng.random() < 0.5):
            values[field.encode_name] = _value(field.type, rng, depth + 1)
    return list(values.values()) if info.array_like else values


def _count(info: Any, rng: Random, depth: int) -> int:
    least = info.min_length or 0
    most = least if depth >= _DEPTH_MAX else least + _ITEMS_MAX
    return rng.randint(least, min(most, info.max_length if info.max_length is not None else most))


def _integer(info: inspect.IntType, rng: Random) -> int:
    least = info.ge if info.ge is not None else info.gt + 1 if info.gt is not None else None
    most = info.le if info.le is not None else info.lt - 1 if info.lt is not None else None
    if least is None:
        least = 0 if most is None or most >= 0 else most - _INTEGER_MAX
    step = info.multiple_of or 1
    first = -(-least // step)
    last = (most if most is not None else least + _INTEGER_MAX * step) // step
    return rng.randint(first, max(first, last)) * step


def _float(info: inspect.FloatType, rng: Random) -> float:
    bounds = (info.ge, info.gt, info.le, info.lt)
    least, over, most, under = (float(bound) if bound is not None else None for bound in bounds)
    low = least if least is not None else over if over is not None else 0.0
    high = most if most is not None else under if under is not None else low + 1_000.0
    return low + (high - low) * rng.uniform(0.01, 0.99)


def _text(info: inspect.StrType, rng: Random) -> str:
    if info.pattern is not None:
        raise ConfigurationError(
            f"text of the pattern {info.pattern!r} cannot be made up. Write a proof plan (semel.prove.plan.ProofPlan) "
            "that yields the inputs."
        )
    least = max(info.min_length or 1, 1)
    most = max(least, min(_TEXT_MAX, info.max_length if info.max_length is not None else _TEXT_MAX))
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(least, most)))


def _moment(rng: Random) -> str:
    return f"20{rng.randint(10, 30)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"


def _clock(rng: Random) -> str:
    return f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}:{rng.randint(0, 59):02d}Z"


_SIMPLE: dict[type, Any] = {
    inspect.IntType: _integer,
    inspect.FloatType: _float,
    inspect.StrType: _text,
    inspect.AnyType: lambda _info, rng: rng.randint(0, _INTEGER_MAX),
    inspect.NoneType: lambda _info, _rng: None,
    inspect.BoolType: lambda _info, rng: rng.random() < 0.5,
    inspect.BytesType: lambda _info, rng: msgspec.to_builtins(rng.randbytes(rng.randint(1, _TEXT_MAX))),
    inspect.DateTimeType: lambda _info, rng: f"{_moment(rng)}T{_clock(rng)}",
    inspect.DateType: lambda _info, rng: _moment(rng),
    inspect.TimeType: lambda _info, rng: _clock(rng),
    inspect.TimeDeltaType: lambda _info, rng: f"PT{rng.randint(0, 86_400)}S",
    inspect.UUIDType: lambda _info, rng: f"{rng.getrandbits(128):032x}",
    inspect.DecimalType: lambda _info, rng: f"{rng.randint(0, _INTEGER_MAX)}.{rng.randint(0, 99):02d}",
    inspect.EnumType: lambda info, rng: rng.choice(list(info.cls)).value,
    inspect.LiteralType: lambda info, rng: rng.choice(info.values),
}

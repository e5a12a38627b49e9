"""Made-up values are of their type, and the seed alone decides them."""

from __future__ import annotations

import datetime
import enum
import uuid
from dataclasses import dataclass
from decimal import Decimal
from random import Random
from typing import Annotated, Any, Literal, NamedTuple, TypedDict

import msgspec
import pytest

from semel.errors import ConfigurationError
from semel.prove.values import made_up


class Color(enum.Enum):
    RED = 1
    BLUE = 2


class First(msgspec.Struct, tag=True):
    x: int


class Second(msgspec.Struct, tag="two"):
    y: str


class Tree(msgspec.Struct):
    left: Tree | None
    children: list[Tree]
    depth: int


class Row(msgspec.Struct, array_like=True, tag=True):
    a: int
    b: str = "b"


@dataclass
class Plain:
    a: int
    b: str = "b"


class Loose(TypedDict, total=False):
    a: int


class Pair(NamedTuple):
    a: int
    b: float


class Everything(msgspec.Struct, rename="camel"):
    an_int: int
    a_float: float
    some_bytes: bytes
    a_flag: bool
    nothing: None
    moment: datetime.datetime
    day: datetime.date
    clock: datetime.time
    span: datetime.timedelta
    id: uuid.UUID
    price: Decimal
    color: Color
    literal: Literal[1, "x"]
    items: list[int]
    names: set[str]
    pair: tuple[int, str]
    table: dict[int, float]
    either: First | Second
    tree: Tree
    plain: Plain
    loose: Loose
    named: Pair
    whatever: Any
    bounded: Annotated[int, msgspec.Meta(gt=3, lt=7)]
    stepped: Annotated[int, msgspec.Meta(multiple_of=5, ge=-20, le=-3)]
    share: Annotated[float, msgspec.Meta(gt=0, le=1)]
    code: Annotated[str, msgspec.Meta(min_length=5, max_length=6)]
    two: Annotated[list[int], msgspec.Meta(min_length=2, max_length=2)]
    optional: int | None = None


@pytest.mark.parametrize("kind", [Everything, Row, First | Second, Tree, int, dict[str, Any], list[Plain]])
def test_a_made_up_value_is_of_its_type(kind: Any) -> None:
    values = [made_up(kind, Random(seed)) for seed in range(200)]
    for value in values:
        msgspec.json.decode(msgspec.json.encode(value), type=kind)
    assert values == [made_up(kind, Random(seed)) for seed in range(200)]
    assert len({msgspec.json.encode(value) for value in values}) > 50


def test_what_nobody_can_guess_is_said() -> None:
    with pytest.raises(ConfigurationError, match="proof plan"):
        made_up(Annotated[str, msgspec.Meta(pattern="^[0-9]{4}$")], Random(1))

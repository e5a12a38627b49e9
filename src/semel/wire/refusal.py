"""The response that says one error code for everything a request asked for, for any API and version.

Nearly every response mirrors its request: a list for each list, the same names in each element, an error code at
every leaf. So the refusal is read off the two schemas instead of being written once for each API.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, get_args

from kio.serial._introspect import EntityField, EntityTupleField, classify_field, get_schema_field_type

from semel.wire.messages import response_entity

__all__ = ["can_refuse", "refusal"]

_IDENTITY = frozenset(
    {
        "group_id",
        "group_instance_id",
        "key",
        "member_id",
        "name",
        "resource_name",
        "resource_type",
        "topic",
        "topic_id",
        "transactional_id",
    }
)
"""Fields by which a client finds its item in the response; only these are copied."""
_INDEX = ("partition_index", "partition", "index")
"""The names that one and the same thing has in different APIs."""
_NEUTRAL: dict[str | None, Any] = {
    "string": "",
    "bytes": b"",
    "bool": False,
    "uuid": None,
    "records": None,
    "datetime_i64": 0,
}
"""What a field holds that has nothing to say; numbers hold -1, as Kafka's do."""


def refusal(api_key: int, version: int, request: Any, code: int) -> dict[str, Any]:
    """The response's fields, every error code in it `code`. `request` is the decoded request."""
    return _mirror(response_entity(api_key, version), request, code)


@cache
def can_refuse(entity: Any) -> bool:
    """Whether a response (or a part of one) has a place for an error code."""
    for item in fields(entity):
        kind = classify_field(item)
        if isinstance(kind, EntityField | EntityTupleField):
            if can_refuse(kind.type_):
                return True
        elif get_schema_field_type(item) == "error_code":
            return True
    return False


def _mirror(entity: Any, asked: Any, code: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    key_given = False
    for item in fields(entity):
        kind = classify_field(item)
        if isinstance(kind, EntityTupleField):
            values[item.name] = (
                [_mirror(kind.type_, part, code) for part in _list_of(asked, item.name)]
                if can_refuse(kind.type_)
                else []
            )
            continue
        if isinstance(kind, EntityField) or item.name == "throttle_time":
            continue
        if get_schema_field_type(item) == "error_code":
            values[item.name] = code
        elif not is_dataclass(asked) and not key_given and item.name != "error_message":
            values[item.name], key_given = asked, True  # The list was one of names or numbers: this is the element.
        elif (found := _identity(asked, item.name)) is not MISSING:
            values[item.name] = found
        elif item.default is MISSING:
            values[item.name] = None if type(None) in get_args(item.type) else _neutral(item)
    return values


def _neutral(item: Any) -> Any:
    if str(item.type).startswith("tuple"):
        return []
    return _NEUTRAL.get(get_schema_field_type(item), -1)


def _identity(asked: Any, name: str) -> Any:
    names = _INDEX if name in _INDEX else (name,) if name in _IDENTITY else ()
    for candidate in names:
        if hasattr(asked, candidate):
            return getattr(asked, candidate)
    return MISSING


def _list_of(asked: Any, name: str) -> Iterable[Any]:
    """The request's list that a response list answers: the one of the same name, else its first one."""
    found = getattr(asked, name, None)
    if found is None:
        lists = [getattr(asked, item.name) for item in fields(asked)] if is_dataclass(asked) else []
        found = next((value for value in lists if isinstance(value, tuple)), ())
    return found if isinstance(found, tuple) else ()

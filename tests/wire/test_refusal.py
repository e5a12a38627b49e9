"""A refusal can be made for every request that the broker serves, and says its code wherever a client looks for one."""

from __future__ import annotations

from dataclasses import fields
from typing import Any
from uuid import UUID

import pytest
from kio.serial._introspect import (
    EntityField,
    EntityTupleField,
    PrimitiveTupleField,
    classify_field,
    get_schema_field_type,
)

from semel.broker.apis import APIS
from semel.wire import messages
from semel.wire.messages import decode_request, decode_request_header, decode_response, encode_request, encode_response
from semel.wire.refusal import refusal

VERSIONS = [
    pytest.param(api.key, version, id=f"{messages.api_name(api.key)} v{version}")
    for api in APIS.values()
    for version in range(api.min_version, api.max_version + 1)
    if version in messages.schema_name_map[messages.api_name(api.key)]
]
CODE = 16
SCALARS = {"string": "name", "bytes": b"", "bool": False, "uuid": UUID(int=9), "records": None, "error_code": 0}


def sample(entity: Any) -> dict[str, Any]:
    """A request with one element in each of its lists."""
    values: dict[str, Any] = {}
    for item in fields(entity):
        kind = classify_field(item)
        if isinstance(kind, EntityTupleField):
            values[item.name] = [sample(kind.type_)]
        elif isinstance(kind, EntityField):
            continue
        else:
            value = SCALARS.get(get_schema_field_type(item) or "", 3)
            values[item.name] = [value] if isinstance(kind, PrimitiveTupleField) else value
    return values


def codes(value: Any) -> list[int]:
    """Every error code in a decoded response."""
    found: list[int] = []
    for item in fields(value):
        inner = getattr(value, item.name)
        if isinstance(inner, tuple):
            found += [code for part in inner if hasattr(part, "__dataclass_fields__") for code in codes(part)]
        elif hasattr(inner, "__dataclass_fields__"):
            found += codes(inner)
        elif item.metadata.get("kafka_type") == "error_code":
            found.append(int(inner))
    return found


@pytest.mark.parametrize(("api_key", "version"), VERSIONS)
def test_every_place_for_an_error_says_it(api_key: int, version: int) -> None:
    entity = messages._entity(api_key, version, "request")
    frame = encode_request(api_key, version, 1, "client", **sample(entity))[4:]
    request = decode_request(decode_request_header(frame), frame)
    answer = encode_response(api_key, version, 1, **refusal(api_key, version, request, CODE))
    found = codes(decode_response(api_key, version, answer[4:]))
    assert found
    assert set(found) == {CODE}

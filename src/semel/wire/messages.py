"""Requests and responses of every Kafka API as values, for both sides of a connection.

The schemas are kio's, generated from Apache Kafka's own JSON files. This module adds what both our client and our
broker want: plain Python values in (ints for milliseconds and error codes, dicts for nested structures), fields that
a version does not have left out, and the choice of header version.

Decoded messages are kio's dataclasses: attributes are named as in the schema files, in snake_case; a duration is a
`timedelta` (see `to_ms`), a zero UUID is None, an error code is an `IntEnum`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from datetime import UTC, datetime, timedelta
from functools import cache
from io import BytesIO
from typing import Any, Literal, NamedTuple, get_args
from uuid import UUID

from kio.index import KioIndexError, load_payload_module
from kio.schema.errors import ErrorCode as KioErrorCode
from kio.schema.index import api_key_map, schema_name_map
from kio.serial import entity_reader, entity_writer
from kio.serial._introspect import (
    EntityField,
    EntityTupleField,
    PrimitiveTupleField,
    classify_field,
    get_schema_field_type,
)
from kio.serial.errors import SerialError
from kio.static.constants import EntityType

from semel.errors import ProtocolError
from semel.wire.bounds import checked, skip_tags

__all__ = [
    "RequestHeader",
    "api_key_of",
    "api_name",
    "decode_request",
    "decode_request_header",
    "decode_response",
    "encode_request",
    "encode_response",
    "is_flexible",
    "latest_version",
    "response_entity",
    "to_ms",
]

Kind = Literal["request", "response"]
API_VERSIONS = 18
"""Its response header is version 0 at every request version, so that a client can read an error from any broker."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DECODE_ERRORS = (ProtocolError, SerialError, ValueError, LookupError, OverflowError, EOFError)


class RequestHeader(NamedTuple):
    """The head of a request frame; `body` is where the request itself begins."""

    api_key: int
    api_version: int
    correlation_id: int
    client_id: str | None
    body: int


def api_name(api_key: int) -> str:
    """The schema name of an API key (`end_txn` for 26), or `api_<key>` when it is unknown."""
    return api_key_map.get(api_key, f"api_{api_key}")


def api_key_of(name: str) -> int | None:
    """The key of an API by its name as Kafka writes it or in snake_case (`EndTxn`, `end_txn`), None if unknown."""
    plain = name.replace("_", "").lower()
    return next((key for key, known in api_key_map.items() if known.replace("_", "") == plain), None)


@cache
def latest_version(api_key: int) -> int:
    """The newest version of this API whose schema we have."""
    return max(schema_name_map[api_name(api_key)])


@cache
def _entity(api_key: int, version: int, kind: Kind) -> type[Any]:
    try:
        module = load_payload_module(api_key, version, EntityType[kind])  # type: ignore[arg-type]
    except KioIndexError as error:
        raise ProtocolError(f"no schema for {api_name(api_key)} version {version}") from error
    for value in vars(module).values():
        if getattr(value, "__type__", None) is EntityType[kind]:
            return value  # type: ignore[no-any-return]
    raise ProtocolError(f"no {kind} schema for {api_name(api_key)} version {version}")


def response_entity(api_key: int, version: int) -> type[Any]:
    """The schema of a response. Raises `ProtocolError` for an unknown API or version."""
    return _entity(api_key, version, "response")


@cache
def is_flexible(api_key: int, version: int) -> bool:
    """Whether this version has tagged fields and compact encodings (KIP-482)."""
    return bool(_entity(api_key, version, "request").__flexible__)


def to_ms(value: timedelta) -> int:
    """A decoded duration in whole milliseconds."""
    return round(value.total_seconds() * 1000)


# --- Building kio's dataclasses from plain values ---


def _duration(value: Any) -> Any:
    return timedelta(milliseconds=value) if isinstance(value, int) else value


def _timestamp(value: Any) -> Any:
    """A time that must be there; -1 ms ("none" by convention, as in DescribeTransactions) is written as it is."""
    return _EPOCH + timedelta(milliseconds=value) if isinstance(value, int) else value


def _nullable_timestamp(value: Any) -> Any:
    return None if isinstance(value, int) and value == -1 else _timestamp(value)


def _error(value: Any) -> Any:
    return KioErrorCode(int(value))


def _tuple(value: Any) -> Any:
    return value if value is None else tuple(value)


def _uuid(value: Any) -> Any:
    return None if isinstance(value, UUID) and value.int == 0 else value


@cache
def _converters(entity: Any) -> dict[str, Callable[[Any], Any] | None]:
    converters: dict[str, Callable[[Any], Any] | None] = {}
    for item in fields(entity):
        kind = classify_field(item)
        nullable = type(None) in get_args(item.type)
        if isinstance(kind, EntityField):
            converters[item.name] = _nested(kind.type_)
        elif isinstance(kind, EntityTupleField):
            converters[item.name] = _nested_tuple(kind.type_)
        elif isinstance(kind, PrimitiveTupleField):
            converters[item.name] = _tuple
        else:
            converters[item.name] = {
                "timedelta_i32": _duration,
                "timedelta_i64": _duration,
                "datetime_i64": _nullable_timestamp if nullable else _timestamp,
                "error_code": _error,
                "uuid": _uuid if nullable else None,
            }.get(get_schema_field_type(item))
    return converters


def _nested(entity: type[Any]) -> Callable[[Any], Any]:
    return lambda value: value if value is None or not isinstance(value, Mapping) else _build(entity, value)


def _nested_tuple(entity: type[Any]) -> Callable[[Any], Any]:
    return lambda values: values if values is None else tuple(_build(entity, value) for value in values)


@cache
def _implied(entity: Any) -> dict[str, Any]:
    """Values for fields that have no default in the schema but only one sensible value."""
    names = {item.name for item in fields(entity) if item.default is MISSING}
    return {"throttle_time": timedelta(0)} if "throttle_time" in names else {}


@cache
def _known_elsewhere(api_key: int, entity_name: str, field: str) -> bool:
    """Whether another version of this API has the field; a name that no version has is a slip of ours."""
    for version, kinds in schema_name_map[api_name(api_key)].items():
        for kind in kinds:
            module = load_payload_module(api_key, version, kind)  # type: ignore[arg-type]
            other = getattr(module, entity_name, None)
            if other is not None and any(item.name == field for item in fields(other)):
                return True
    return False


def _build(entity: Any, values: Mapping[str, Any]) -> Any:
    converters = _converters(entity)
    arguments = dict(_implied(entity))
    for name, value in values.items():
        try:
            convert = converters[name]
        except KeyError:
            if _known_elsewhere(int(entity.__api_key__), entity.__name__, name):
                continue
            raise TypeError(f"{entity.__name__} has no field {name!r} in any version") from None
        arguments[name] = convert(value) if convert is not None else value
    return entity(**arguments)


# --- Bytes ---


@cache
def _writer(api_key: int, version: int, kind: Kind) -> tuple[type[Any], Callable[[Any, Any], None]]:
    entity = _entity(api_key, version, kind)
    return entity, entity_writer(entity)


@cache
def _reader(api_key: int, version: int, kind: Kind) -> Callable[[Any, int], tuple[Any, int]]:
    return entity_reader(_entity(api_key, version, kind))


def _encode(api_key: int, version: int, kind: Kind, head: bytes, values: Mapping[str, Any]) -> bytes:
    entity, write = _writer(api_key, version, kind)
    buffer = BytesIO()
    buffer.write(b"\0\0\0\0" + head)
    write(buffer, _build(entity, values))
    size = buffer.tell() - 4
    buffer.seek(0)
    buffer.write(size.to_bytes(4, "big"))
    return buffer.getvalue()


def encode_request(api_key: int, version: int, correlation_id: int, client_id: str, /, **values: Any) -> bytes:
    """One whole request frame, length prefix included."""
    name = client_id.encode()
    head = (
        api_key.to_bytes(2, "big")
        + version.to_bytes(2, "big")
        + correlation_id.to_bytes(4, "big", signed=True)
        + len(name).to_bytes(2, "big")
        + name
        + (b"\0" if is_flexible(api_key, version) else b"")
    )
    return _encode(api_key, version, "request", head, values)


def encode_response(api_key: int, version: int, correlation_id: int, /, **values: Any) -> bytes:
    """One whole response frame, length prefix included."""
    flexible_head = api_key != API_VERSIONS and is_flexible(api_key, version)
    head = correlation_id.to_bytes(4, "big", signed=True) + (b"\0" if flexible_head else b"")
    return _encode(api_key, version, "response", head, values)


def decode_request_header(frame: bytes | bytearray | memoryview) -> RequestHeader:
    """Read the head of a request frame (without its length prefix). Raises `ProtocolError`."""
    if len(frame) < 10:
        raise ProtocolError(f"a request frame of {len(frame)} bytes is shorter than its header")
    api_key = int.from_bytes(frame[0:2], "big", signed=True)
    version = int.from_bytes(frame[2:4], "big", signed=True)
    correlation_id = int.from_bytes(frame[4:8], "big", signed=True)
    size = int.from_bytes(frame[8:10], "big", signed=True)
    at = 10 + max(size, 0)
    if at > len(frame):
        raise ProtocolError("the client id runs past the end of the frame")
    try:
        client_id = None if size < 0 else bytes(frame[10:at]).decode()
    except UnicodeDecodeError:
        raise ProtocolError("the client id is not UTF-8") from None
    known = version in schema_name_map.get(api_name(api_key), {})
    if known and is_flexible(api_key, version):
        at = skip_tags(frame, at)
    return RequestHeader(api_key, version, correlation_id, client_id, at)


def _decode(api_key: int, version: int, kind: Kind, frame: bytes | bytearray | memoryview, at: int) -> Any:
    read = _reader(api_key, version, kind)
    if not isinstance(frame, bytes):
        frame = memoryview(frame).toreadonly()  # kio takes no buffer that could change under it.
    try:
        entity, _ = read(checked(_entity(api_key, version, kind), frame, at), at)
    except _DECODE_ERRORS as error:
        raise ProtocolError(f"{api_name(api_key)} v{version} {kind} cannot be read: {error}") from error
    return entity


def decode_request(header: RequestHeader, frame: bytes | bytearray | memoryview) -> Any:
    """The request behind a header. Raises `ProtocolError` for an unknown version or malformed bytes."""
    return _decode(header.api_key, header.api_version, "request", frame, header.body)


def decode_response(api_key: int, version: int, frame: bytes | bytearray | memoryview) -> Any:
    """The response in a frame without its length prefix; the correlation id is the frame's first four bytes."""
    at = 4
    if api_key != API_VERSIONS and is_flexible(api_key, version):
        at = skip_tags(frame, at)
    return _decode(api_key, version, "response", frame, at)

"""The indexes that a sink writes to: making them, and knowing them again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import msgspec

from semel.errors import ConfigurationError
from semel.sinks.contract import Unavailable
from semel.sinks.search.effects import DELETED
from semel.sinks.search.http import Answer, SearchConnection

__all__ = ["KEPT", "body_of", "migrate", "prepare", "uuids"]

KEPT = "semel-sink"
"""Where positions, parked records and outcomes are."""
_KEPT_BODY = {
    "settings": {"number_of_shards": 1, "auto_expand_replicas": "0-1"},
    "mappings": {"dynamic": False, "properties": {"kind": {"type": "keyword"}}},
}
_MARKER = {"type": "boolean"}


def body_of(declared: Mapping[str, Any]) -> dict[str, Any]:
    """What an index is made with: as declared, and the field that marks a deleted document."""
    mappings = dict(declared.get("mappings") or {})
    mappings["properties"] = {**(mappings.get("properties") or {}), DELETED: _MARKER}
    return {**declared, "mappings": mappings}


def migrate(url: str, declared: Mapping[str, Mapping[str, Any]], *, print_only: bool) -> str:
    """Make what is missing of an app's indexes and of Semel's own. The requests, as text.

    Raises `ConfigurationError` for an index that cannot be made, `Unavailable` when the server cannot be reached.
    """
    connection = SearchConnection(url)
    bodies = {KEPT: _KEPT_BODY, **{name: body_of(body) for name, body in declared.items()}}
    text = "\n\n".join(
        f"PUT /{connection.prefix}{name}\n{msgspec.json.format(msgspec.json.encode(body)).decode()}"
        for name, body in bodies.items()
    )
    if not print_only:
        try:
            prepare(connection, declared, create=True)
        finally:
            connection.close()
    return text


def prepare(connection: SearchConnection, declared: Mapping[str, Mapping[str, Any]], *, create: bool) -> None:
    """Make sure that every index is there and has the field of markers; with `create` what is missing is made.

    Raises `ConfigurationError` for what is missing or cannot be made.
    """
    version = connection.call("GET", "/")
    number = version.body.get("version", {}).get("number") if isinstance(version.body, dict) else None
    if version.status != 200 or not isinstance(number, str):
        raise Unavailable(f"{connection.url} does not say that it is an OpenSearch: {version.reason}")
    for name, body in ((KEPT, _KEPT_BODY), *declared.items()):
        full = connection.prefix + name
        mapping = connection.call("GET", f"/{quote(full)}/_mapping")
        if mapping.status == 404:
            if not create:
                raise ConfigurationError(f"{connection.url} has no index {full}. Make it: semel migrate APP.")
            _create(connection, full, body if name == KEPT else body_of(body))
        elif mapping.status != 200:
            raise Unavailable(f"{connection.url}: index {full} cannot be looked at: {mapping.reason}")
        elif name != KEPT:
            _check_marker(connection, full, mapping, create)


def _create(connection: SearchConnection, full: str, body: Mapping[str, Any]) -> None:
    made = connection.call("PUT", f"/{quote(full)}", msgspec.json.encode(body))
    if made.status == 400 and made.type != "resource_already_exists_exception":
        raise ConfigurationError(f"{connection.url}: index {full} cannot be made: {made.reason}.")
    if made.status >= 300 and made.status != 400:
        raise Unavailable(f"{connection.url}: index {full} cannot be made now: {made.reason}")


def _check_marker(connection: SearchConnection, full: str, mapping: Answer, create: bool) -> None:
    for concrete, found in mapping.body.items():
        kind = found.get("mappings", {}).get("properties", {}).get(DELETED)
        if kind is not None and kind.get("type") != "boolean":
            raise ConfigurationError(
                f"{connection.url}: the field {DELETED!r} of index {concrete} is {kind.get('type')}, but it marks "
                "deleted documents and has to be boolean. Make the index anew with that field under another name."
            )
        if kind is None and not create:
            raise ConfigurationError(
                f"{connection.url}: index {concrete} has no boolean field {DELETED!r}, which marks deleted documents. "
                "Add it: semel migrate APP."
            )
        if kind is None:
            added = connection.call(
                "PUT", f"/{quote(full)}/_mapping", msgspec.json.encode({"properties": {DELETED: _MARKER}})
            )
            if added.status != 200:
                raise Unavailable(f"{connection.url}: the mapping of {full} cannot be changed now: {added.reason}")


def uuids(connection: SearchConnection, names: Mapping[str, Any]) -> dict[str, str]:
    """Which index each name stands for now; a name whose index is gone is left out.

    Raises `ConfigurationError` for an alias of several indexes of which none is to be written to.
    """
    found = {}
    for name in names:
        full = connection.prefix + name
        answer = connection.call("GET", f"/{quote(full)}?filter_path=*.aliases,*.settings.index.uuid")
        if answer.status == 404:
            continue
        if answer.status != 200:
            raise Unavailable(f"{connection.url}: index {full} cannot be looked at: {answer.reason}")
        written = [
            item for item in answer.body.values() if (item.get("aliases") or {}).get(full, {}).get("is_write_index")
        ]
        chosen = list(answer.body.values()) if len(answer.body) == 1 else written
        if len(chosen) != 1:
            raise ConfigurationError(
                f"{connection.url}: {full} is an alias of {', '.join(sorted(answer.body))}, and none of them is its "
                "write index."
            )
        found[name] = str(chosen[0]["settings"]["index"]["uuid"])
    return found

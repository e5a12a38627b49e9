"""The verbs of `semel park`, from names on the command line to rows of what came of it."""

from __future__ import annotations

import base64
import getpass
import os
from collections.abc import Mapping
from typing import Any

import msgspec

from semel.env import Env
from semel.errors import ConfigurationError
from semel.ops.loading import load_app
from semel.ops.parking import Item, Request, ask, chosen, groups, open_shelves, rows, wait_for
from semel.processing.parklog import Verb
from semel.settings import Settings
from semel.types import Record

__all__ = ["command", "list_all", "show", "who"]


async def list_all(app: str, settings: Settings, *, by_group: bool) -> list[dict[str, Any]]:
    """Everything that is parked, a row a record or a row a cause."""
    async with open_shelves(load_app(app), settings) as shelves:
        items = [item for shelf in shelves for item in await shelf.items()]
    return groups(items) if by_group else rows(items)


async def show(app: str, settings: Settings, name: str, output: str) -> str:
    """One record and its reason. Raises `ConfigurationError` when it is not parked."""
    async with open_shelves(load_app(app), settings) as shelves:
        for shelf in shelves:
            for item in await shelf.items():
                if item.id == name:
                    record = await shelf.record(item)
                    if record is not None:
                        return _shown(item, record, output)
    raise ConfigurationError(f"{name}: nothing of that id is parked (any more).")


async def command(
    app: str,
    settings: Settings,
    verb: Verb,
    names: Mapping[str, Any],
    *,
    wait: float,
    reason: str = "",
    build: str = "",
    value: bytes | None = None,
) -> list[dict[str, Any]]:
    """Leave commands for what is named, and wait for what comes of them."""
    env = Env()
    request = Request(verb, who(), reason, build, value)
    async with open_shelves(load_app(app), settings) as shelves:
        items = [item for shelf in shelves for item in await shelf.items()]
        asked = await ask(shelves, chosen(items, **names), request, env)
        return await wait_for(asked, wait, env)


def who() -> str:
    """Who asks, as the operating system knows them."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _shown(item: Item, record: Record, output: str) -> str:
    [row] = rows([item])
    row["timestamp_ms"] = record.timestamp_ms
    row["headers"] = {name: _text(data) for name, data in record.headers}
    row["value"] = _text(record.value)
    if output == "json":
        return msgspec.json.encode(row).decode()
    width = max(map(len, row))
    return "\n".join(f"{name.ljust(width)}  {_line(value)}" for name, value in row.items())


def _text(data: bytes | None) -> str | None:
    """UTF-8 as it is, anything else as base64."""
    if data is None:
        return None
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "base64:" + base64.b64encode(data).decode()


def _line(value: object) -> str:
    text = "" if value is None else str(value)
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)

"""Databases and sinks as an app declares them. They hold data and know no rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from semel.processing.topics import Topic

__all__ = ["DatabaseSpec", "SinkSpec"]


@dataclass(frozen=True, slots=True)
class DatabaseSpec:
    """A database: its URL (`sqlite:///FILE`, `postgresql://...`) and the statements that make the app's tables."""

    name: str
    url: str
    schema: str = ""


@dataclass(frozen=True, slots=True)
class SinkSpec:
    """A sink: `handler(records, db)` writes a batch of a topic; the position moves in the same transaction."""

    name: str
    topic: Topic[Any, Any]
    database: DatabaseSpec
    handler: Callable[..., Any]

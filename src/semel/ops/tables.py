"""Listings for people and for programs: the same rows as an aligned table or as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

__all__ = ["render"]


def render(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], output: str) -> str:
    """`output` is `text` or `json`. JSON is one array of objects with all fields; text shows the named columns."""
    if output == "json":
        return msgspec.json.encode(list(rows)).decode()
    cells = [[column.upper().replace("_", "-") for column in columns]]
    cells += [["" if row.get(column) is None else _printable(str(row[column])) for column in columns] for row in rows]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def _printable(text: str) -> str:
    """Keys and error messages come from outside: a terminal must not obey what is in them."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)

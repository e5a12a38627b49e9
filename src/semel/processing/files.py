"""Small files that other processes read while they are written."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["replace_file"]


def replace_file(path: Path, data: bytes) -> None:
    """Write a file in one step, so that a reader never sees half of it. Raises OSError; the old one is there then.

    The name in between is this process's own: a zombie of the same role may be writing too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.write_bytes(data)
    fresh.replace(path)

"""Small files that other processes read while they are written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from semel.failpoints import failpoint

__all__ = ["replace_file"]


def replace_file(path: Path, data: bytes) -> None:
    """Write a file in one step, so that a reader never sees half of it. Raises OSError; the old one is there then.

    The name in between is this process's own: a zombie of the same role may be writing too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    file = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        failpoint("shared.before_write", file, data)
        if os.pwrite(file, data, 0) != len(data):
            raise OSError(errno.ENOSPC, f"only a part of {fresh} could be written")
    finally:
        os.close(file)
    failpoint("shared.before_rename")
    fresh.replace(path)

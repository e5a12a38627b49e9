"""Small files that are whole or not there, and file descriptors that close themselves."""

from __future__ import annotations

import os
import sys
import weakref
from collections import deque
from pathlib import Path
from struct import Struct
from typing import Protocol

from crc32c import crc32c

from semel.disk import disk
from semel.failpoints import failpoint

__all__ = [
    "CLEANED_SUFFIX",
    "OPEN_FILES",
    "TEMPORARY_SUFFIX",
    "FileHandle",
    "OpenFiles",
    "read_checked",
    "write_atomically",
    "write_checked",
]

_ENVELOPE = Struct("<4sHBxIQ")
_MARK = b"SMLG"
_VERSION = 1
_BYTE_ORDER = 1 if sys.byteorder == "little" else 2
"""Arrays are stored as they are in memory; a file from a machine of the other byte order does not count."""

TEMPORARY_SUFFIX = ".tmp"
CLEANED_SUFFIX = ".cleaned"
"""A compacted segment that has not taken its place yet."""


class FileHandle(int):
    """A file descriptor, closed when nobody holds it any more.

    Readers hold it through their slices, so a segment may be deleted, or its descriptor given up, while it is sent.
    """

    def __init__(self, _descriptor: int) -> None:
        self._close = disk.close  # Of the file system that opened it, which a simulation may have replaced since.

    def __del__(self) -> None:
        self._close(self)


def write_atomically(path: Path, data: bytes, *, durable: bool) -> None:
    """Replace `path` by `data`: readers find the old file or the new one, after the end of the process too.

    With `durable` also after a loss of power. Raises OSError; the old file is still there then.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        file = FileHandle(disk.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644))
        failpoint("file.before_write", file, data)
        if disk.pwrite(file, data, 0) != len(data):
            raise OSError(f"only part of {temporary} could be written")
        if durable:
            disk.sync(file)
        failpoint("file.before_rename")
        disk.rename(temporary, path)
    except OSError:
        disk.unlink(temporary)
        raise
    if durable:
        disk.sync_directory(path.parent)


def write_checked(path: Path, payload: bytes, *, durable: bool) -> None:
    """Write `payload` so that `read_checked` can tell whether it is whole. Raises OSError."""
    envelope = _ENVELOPE.pack(_MARK, _VERSION, _BYTE_ORDER, crc32c(payload), len(payload))
    write_atomically(path, envelope + payload, durable=durable)


def read_checked(path: Path) -> bytes | None:
    """The payload; None when the file is missing, damaged, or of another version or byte order."""
    try:
        data = disk.read(path)
    except OSError:
        return None
    if len(data) < _ENVELOPE.size:
        return None
    mark, version, byte_order, crc, length = _ENVELOPE.unpack_from(data)
    payload = data[_ENVELOPE.size :]
    if (mark, version, byte_order, length) != (_MARK, _VERSION, _BYTE_ORDER, len(payload)):
        return None
    return payload if crc32c(payload) == crc else None


class _Closeable(Protocol):
    def close(self) -> None: ...


class OpenFiles:
    """Bounds how many segment files are open at once in this process; the one opened first is given up first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._owners: deque[weakref.ref[_Closeable]] = deque()

    def __len__(self) -> int:
        return len(self._owners)

    def opened(self, owner: _Closeable) -> None:
        """`owner` opened its file; it is asked to close it when too many others were opened since."""
        self._owners.append(weakref.ref(owner))
        while len(self._owners) > self._limit:
            oldest = self._owners.popleft()()
            if oldest is not None:
                oldest.close()


OPEN_FILES = OpenFiles(limit=256)
"""Descriptors belong to the process, so one bound holds for all logs; 256 leave room for sockets below 1024."""

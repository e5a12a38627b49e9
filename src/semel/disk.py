"""The file system as the broker uses it: one object through which every file operation of its rooms goes.

`disk` is the kernel's unless a simulation has put its own in its place (`Disk.replaced_by`), as the machine has one
file system and a process one set of descriptors. An operation is one call further away than `os`, and no more.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from functools import cache
from os import PathLike
from pathlib import Path

__all__ = ["Disk", "disk"]


class Disk:
    """The kernel's file system. Every operation raises OSError; a file is a descriptor, never a file object."""

    open = staticmethod(os.open)
    close = staticmethod(os.close)
    pread = staticmethod(os.pread)
    pwrite = staticmethod(os.pwrite)
    """May write less than it was given."""
    truncate = staticmethod(os.truncate)
    """Takes a descriptor or a path."""
    sync = staticmethod(getattr(os, "fdatasync", os.fsync))
    """Bring a file's bytes and length to the disk; macOS has no fdatasync."""
    rename = staticmethod(os.replace)
    """Replaces what has the new name."""

    @staticmethod
    def preadv(file: int, buffers: Sequence[bytearray | memoryview], position: int) -> int:
        """Fill buffers from a position on; returns how many bytes were there."""
        return os.preadv(file, buffers, position)

    @staticmethod
    def sendfile(socket: int, file: int, position: int, count: int) -> int:
        """Send bytes of a file to a socket without copying them here; returns how many went."""
        return os.sendfile(socket, file, position, count)

    @staticmethod
    def size(file: int) -> int:
        """Length of an open file."""
        return os.fstat(file).st_size

    @staticmethod
    def size_at(path: PathLike[str]) -> int | None:
        """Length of the file of this name; None when there is none."""
        try:
            return os.stat(path).st_size
        except FileNotFoundError:
            return None

    @staticmethod
    def exists(path: PathLike[str]) -> bool:
        return os.path.exists(path)

    @staticmethod
    def read(path: PathLike[str]) -> bytes:
        """A whole file."""
        return Path(path).read_bytes()

    @staticmethod
    def list(directory: PathLike[str]) -> list[str]:
        """The names in a directory, sorted."""
        return sorted(os.listdir(directory))

    @staticmethod
    def make_directory(directory: PathLike[str]) -> None:
        """Make a directory and those above it, as far as they are missing. Their names are not synced."""
        os.makedirs(directory, exist_ok=True)

    @staticmethod
    def sync_directory(directory: PathLike[str]) -> None:
        """Make the names in a directory durable."""
        descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @staticmethod
    def unlink(path: PathLike[str]) -> None:
        """Delete a file; one that is not there is as good as deleted."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    @staticmethod
    def remove_tree(directory: PathLike[str]) -> None:
        """Delete a directory with all that is in it; one that is not there is as good as deleted."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(directory)

    @staticmethod
    def usage(directory: PathLike[str]) -> tuple[int, int]:
        """Bytes of the whole file system, and how many of them are free."""
        usage = shutil.disk_usage(directory)
        return usage.total, usage.free

    @staticmethod
    def lock(file: int) -> None:
        """Take a file for this process until the descriptor is closed. Raises OSError when another one has it."""
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    @staticmethod
    @cache
    def boot_id() -> str:
        """Which start of the machine this is; empty where the system does not say.

        What was written without a sync is there as long as this is the same, however the process ended.
        """
        try:
            return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            return ""

    @contextlib.contextmanager
    def replaced_by(self, other: Disk) -> Iterator[None]:
        """Let every operation go to `other` for the time of the block."""
        before = dict(vars(self))
        vars(self).update({name: getattr(other, name) for name in _OPERATIONS})
        try:
            yield
        finally:
            vars(self).clear()
            vars(self).update(before)


_OPERATIONS = [name for name in vars(Disk) if not name.startswith("_") and name != "replaced_by"]

disk = Disk()
"""What the rooms use."""

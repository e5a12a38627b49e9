"""One process a data folder: a lock that the kernel releases when the process ends, however it ends."""

from __future__ import annotations

import os
from pathlib import Path

from semel.disk import disk
from semel.errors import ConfigurationError

__all__ = ["DirectoryLock"]


class DirectoryLock:
    """Holds a folder until `release`. `who` says in messages what holds it, for example `broker`."""

    def __init__(self, data: Path, who: str) -> None:
        """Raises `ConfigurationError` when the folder cannot be written or another process holds it."""
        try:
            disk.make_directory(data)
            disk.sync_directory(data.parent)
            self._file = disk.open(data / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigurationError(
                f"The data directory {data} cannot be written: {error.strerror}. "
                "Give another one (--data DIR), or change its owner or permissions."
            ) from error
        try:
            disk.lock(self._file)
        except OSError as error:
            holder = disk.pread(self._file, 32, 0).decode(errors="replace").strip() or "unknown"
            disk.close(self._file)
            raise ConfigurationError(
                f"The data directory {data} is in use by another {who} (process {holder}). "
                "Stop that one, or give another directory (--data DIR)."
            ) from error
        disk.truncate(self._file, 0)
        disk.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let go of the folder."""
        disk.close(self._file)

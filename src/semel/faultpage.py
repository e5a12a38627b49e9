"""What a campaign of faults tells a running process: by how much its wall clock is off, and which syncs fail.

A page is a file that both map. `SEMEL_FAULT_PAGE` names it to a process of a campaign; without that nothing here is
consulted. It stands for what no program can do to another without being root: set its clock alone, make its disk fail.
The clock is the one of `Env`, so the app's own, and of nothing else: what a handler reads from `time` stays right. The
monotonic clock is never touched, as no machine's ever jumps.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from pathlib import Path

from semel import env
from semel.disk import disk
from semel.errors import ConfigurationError

__all__ = ["FaultPage", "use_fault_page"]


class FaultPage:
    """One process' page: three int64, little-endian. A campaign makes it, the process opens it."""

    def __init__(self, view: mmap.mmap) -> None:
        self._view = view

    @classmethod
    def make(cls, path: Path) -> FaultPage:
        """Make the page, with nothing wrong on it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(mmap.PAGESIZE))
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> FaultPage:
        """Map a page that is there. Raises `OSError`, and `ValueError` when the file is no page."""
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            return cls(mmap.mmap(file, mmap.PAGESIZE))
        finally:
            os.close(file)

    @property
    def clock_off_ms(self) -> int:
        """By how much the wall clock is wrong; below 0 it is behind."""
        return self._get(0)

    @clock_off_ms.setter
    def clock_off_ms(self, value: int) -> None:
        self._set(0, value)

    @property
    def failing_syncs(self) -> int:
        """How many of the next syncs are to fail."""
        return self._get(1)

    @failing_syncs.setter
    def failing_syncs(self, value: int) -> None:
        self._set(1, value)

    @property
    def failed_syncs(self) -> int:
        """How many failed so far."""
        return self._get(2)

    def sync(self, file: int) -> None:
        """What stands in for the disk's sync: the system's, or its failure. Raises OSError."""
        if self.failing_syncs > 0:
            self._set(1, self.failing_syncs - 1)
            self._set(2, self.failed_syncs + 1)
            raise OSError(errno.EIO, "the sync failed, as the fault page says")
        _sync(file)

    def close(self) -> None:
        """Let go of the mapping."""
        self._view.close()

    def _get(self, number: int) -> int:
        value: int = struct.unpack_from("<q", self._view, 8 * number)[0]
        return value

    def _set(self, number: int, value: int) -> None:
        struct.pack_into("<q", self._view, 8 * number, value)


_sync = disk.sync


def use_fault_page(path: str, *, profile: str = "dev") -> None:
    """Obey the page of this name from now on; an empty name is none. Raises `ConfigurationError`."""
    if not path:
        return
    if profile == "production":
        raise ConfigurationError(
            "SEMEL_FAULT_PAGE is set but SEMEL_PROFILE is production: it makes clocks jump and syncs fail on purpose. "
            "Unset one of the two."
        )
    try:
        page = FaultPage.open(Path(path))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"SEMEL_FAULT_PAGE={path!r} is no fault page: {error}. `semel prove` makes them; unset the variable."
        ) from error
    env.clock_off_ms = lambda: page.clock_off_ms
    vars(disk)["sync"] = page.sync

"""One sync of one file, run by whoever comes first: the disk's thread, or an append that cannot wait for it."""

from __future__ import annotations

from threading import Lock

from semel.disk import disk
from semel.failpoints import failpoint
from semel.log.files import FileHandle

__all__ = ["Sync"]


class Sync:
    """Brings to the disk what a segment held when this was made: everything below `end_offset`.

    The kernel reports a failed sync once. So two syncs of one file never overlap, or the one that sees no error would
    take the other's lost bytes for safe: whoever needs the outcome calls `run` and finds it in `problem`.
    """

    def __init__(self, file: FileHandle, end_offset: int) -> None:
        self._file: FileHandle | None = file
        self._lock = Lock()
        self.end_offset = end_offset
        self.problem: OSError | None = None

    def __repr__(self) -> str:
        state = "waiting" if self._file is not None else f"failed: {self.problem}" if self.problem else "done"
        return f"<Sync up to {self.end_offset} {state}>"

    def run(self) -> None:
        """Sync, once; a second caller waits for the first one's end. Safe from any thread."""
        with self._lock:
            if self._file is not None:
                try:
                    failpoint("log.before_sync")
                    disk.sync(self._file)
                    failpoint("log.after_sync")
                except OSError as problem:
                    self.problem = problem
                self._file = None

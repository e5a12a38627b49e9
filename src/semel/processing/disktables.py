"""Tables on disk: one SQLite file for each partition of a store.

A file belongs to the process that has it open: SQLite's exclusive lock, which the kernel releases however the process
ends. Whoever finds a file locked - by a process that stands still and does not know yet that it lost the partition -
does not wait for it, but begins another file beside it. Nothing is synced: a file is used again only within the same
start of the machine (`tables.behind`), where what was written is there however its process ended.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import UUID
from zlib import crc32

from semel.failpoints import failpoint
from semel.processing.limits import STATE_CACHE_BYTES_MAX
from semel.processing.tables import Changed, Entry, Mark, TableTrouble

__all__ = ["DiskTable", "DiskTables"]

log = logging.getLogger("semel.state")

FOLDER = "state"
_VERSION = 1
_CHECKPOINT_PAGES = 4_000
"""16 MiB in the write-ahead log before they are copied into the file: so many changes of one page are one write."""
_SCHEMA = (
    # The age is the rowid, so order of age costs no index; a written key gets the next one.
    "CREATE TABLE row (age INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, value BLOB NOT NULL, "
    "written_ms INTEGER NOT NULL, sum INTEGER NOT NULL)",
    "CREATE TABLE mark (one INTEGER PRIMARY KEY, topic TEXT NOT NULL, position INTEGER NOT NULL, "
    "boot TEXT NOT NULL, seen REAL NOT NULL)",
    f"PRAGMA user_version={_VERSION}",
)


_BESIDE = ("-wal", "-shm", "-journal")
"""What SQLite keeps beside a file."""


class _Locked(Exception):
    """Another process has the file open."""


class DiskTable:
    """The rows of one partition of a store in one file. `_Locked` and `TableTrouble` come from opening it, too."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_closed = False
        try:
            self._connection = sqlite3.connect(path, isolation_level=None, timeout=0)
        except sqlite3.Error as error:
            raise _trouble(path, error) from error
        try:
            with self._told():
                self._open()
        except BaseException:
            self._connection.close()
            raise

    def _open(self) -> None:
        execute = self._connection.execute
        execute("PRAGMA locking_mode=EXCLUSIVE")
        try:
            execute("PRAGMA journal_mode=WAL")
            execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise _Locked from error
            raise
        version = execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, _VERSION):
            raise TableTrouble(f"{self.path} has layout {version}, and this Semel writes {_VERSION}", is_damaged=True)
        if version == 0:
            for statement in _SCHEMA:
                execute(statement)
        execute("COMMIT")
        execute("PRAGMA synchronous=OFF")
        execute(f"PRAGMA wal_autocheckpoint={_CHECKPOINT_PAGES}")
        found = execute("SELECT topic, position, boot, seen FROM mark").fetchone()
        self.mark: Mark | None = None if found is None else Mark(*found)
        self._age = execute("SELECT coalesce(max(age), 0) FROM row").fetchone()[0]

    def __repr__(self) -> str:
        return f"<DiskTable {self.path} {self.mark}>"

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Errors of SQLite as ours."""
        try:
            yield
        except sqlite3.Error as error:
            raise _trouble(self.path, error) from error

    def _entry(self, key: bytes, value: bytes, written_ms: int, checksum: int) -> Entry:
        if crc32(value, crc32(key)) != checksum:
            raise TableTrouble(f"{self.path}: the row of key {key[:40]!r} is not as it was written", is_damaged=True)
        return Entry(value, written_ms)

    def cache(self, size: int) -> None:
        """Keep so many bytes of pages in memory at most."""
        with self._told():
            self._connection.execute(f"PRAGMA cache_size=-{max(1, size // 1024)}")

    def get(self, key: bytes) -> Entry | None:
        """See `Table`."""
        with self._told():
            found = self._connection.execute("SELECT value, written_ms, sum FROM row WHERE key = ?", (key,)).fetchone()
        return None if found is None else self._entry(key, *found)

    def oldest(self, after: int, limit: int) -> list[tuple[int, bytes, Entry]]:
        """See `Table`."""
        query = "SELECT age, key, value, written_ms, sum FROM row WHERE age > ? ORDER BY age LIMIT ?"
        with self._told():
            found = self._connection.execute(query, (after, limit)).fetchall()
        return [(age, key, self._entry(key, *rest)) for age, key, *rest in found]

    def span(self, low: bytes, limit: int) -> list[tuple[bytes, Entry]]:
        """See `Table`."""
        query = "SELECT key, value, written_ms, sum FROM row WHERE key >= ? ORDER BY key LIMIT ?"
        with self._told():
            found = self._connection.execute(query, (low, limit)).fetchall()
        return [(key, self._entry(key, *rest)) for key, *rest in found]

    def size(self) -> int:
        """See `Table`."""
        with self._told():
            found = self._connection.execute("SELECT total(length(key) + length(value)) FROM row").fetchone()
        return int(found[0])

    def write(self, changed: Changed, mark: Mark) -> None:
        """See `Table`."""
        rows, gone, age = [], [], self._age
        for key, entry in changed.items():
            if entry is None:
                gone.append((key,))
            else:
                age += 1
                rows.append((age, key, entry.value, entry.written_ms, crc32(entry.value, crc32(key))))
        rows.sort(key=_key)  # Neighbours of the index by key are written together: a page of it once, not once a row.
        with self._told(), self._transaction() as execute:
            if gone:
                self._connection.executemany("DELETE FROM row WHERE key = ?", gone)
            self._connection.executemany("REPLACE INTO row VALUES (?, ?, ?, ?, ?)", rows)
            execute("REPLACE INTO mark VALUES (1, ?, ?, ?, ?)", mark)
            failpoint("state.before_commit")
        self._age, self.mark = age, mark

    @contextmanager
    def _transaction(self) -> Iterator[Callable[..., sqlite3.Cursor]]:
        execute = self._connection.execute
        execute("BEGIN")
        try:
            yield execute
            execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                execute("ROLLBACK")
            raise

    def clear(self) -> None:
        """See `Table`."""
        with self._told(), self._transaction() as execute:
            execute("DELETE FROM mark")
            execute("DELETE FROM row")
        self._age, self.mark = 0, None

    def close(self) -> None:
        """See `Table`."""
        self.is_closed = True
        with self._told():
            self._connection.close()

    def discard(self) -> None:
        """See `Table`."""
        failpoint("state.before_delete")
        with suppress(TableTrouble):
            self.close()
        _delete(self.path)


def _trouble(path: Path, error: sqlite3.Error) -> TableTrouble:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    name = getattr(error, "sqlite_errorname", type(error).__name__)
    return TableTrouble(f"{path}: {error} ({name})", is_damaged=code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB))


def _key(row: tuple[int, bytes, bytes, int, int]) -> bytes:
    return row[1]


def _delete(path: Path) -> None:
    """The file goes first: without its log it would be a table of long ago, or half of one."""
    try:
        for suffix in ("", *_BESIDE):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
    except OSError as error:
        raise TableTrouble(f"{path} cannot be deleted: {error}") from error


class DiskTables:
    """The tables of an app below a folder: `<data>/state/<app>/<store>/<partition>/<id>.db`."""

    def __init__(self, data: Path, app: str, new_id: Callable[[], UUID]) -> None:
        self._folder = data / FOLDER / app
        self._new_id = new_id
        self._open: list[DiskTable] = []

    def __repr__(self) -> str:
        return f"<DiskTables {self._folder}>"

    def open(self, store: str, partition: int) -> DiskTable:
        """See `Tables`: of several files the one that is complete up to where no other is; the rest is deleted."""
        folder = self._folder / store / str(partition)
        best: DiskTable | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _sweep(folder)
            for path in sorted(folder.glob("*.db")):
                found = self._try(path)
                if found is None:
                    continue
                if best is None or _position(found) > _position(best):
                    best, found = found, best
                if found is not None:
                    found.discard()
            if best is None:
                best = DiskTable(folder / f"{self._new_id().hex}.db")
        except (OSError, _Locked) as error:
            raise TableTrouble(f"no table can be kept in {folder}: {error!r}") from error
        self._share_cache(best)
        return best

    def _share_cache(self, table: DiskTable) -> None:
        """However many tables are open, their pages have one limit."""
        self._open = [item for item in self._open if not item.is_closed] + [table]
        for item in self._open:
            with suppress(TableTrouble):  # Whoever uses that one is told.
                item.cache(STATE_CACHE_BYTES_MAX // len(self._open))

    def _try(self, path: Path) -> DiskTable | None:
        """The table in a file; None when another process has it, or when it was damaged and is gone now."""
        try:
            return DiskTable(path)
        except _Locked:
            log.warning("%s is in use by another process, which may not know yet that it lost the partition", path)
        except TableTrouble as error:
            if not error.is_damaged:
                raise
            log.error("a table of state is thrown away and restored from its changelog: %s", error)
            failpoint("state.before_delete")
            _delete(path)
        return None


def _sweep(folder: Path) -> None:
    """Delete what a process that died while it deleted a table left of it."""
    for path in folder.glob("*.db-*"):
        if not path.with_name(path.name.partition("-")[0]).exists():
            path.unlink(missing_ok=True)


def _position(table: DiskTable) -> int:
    return -1 if table.mark is None else table.mark.position

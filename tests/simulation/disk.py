"""A file system in memory with a page cache: what was synced survives a loss of power, of the rest only some.

A killed process loses nothing that it wrote. When the power goes, each file keeps what was synced and some of the
writes since (none, all, the first ones, any of them; the last one torn, or its bytes zero), and each directory keeps
the first few of its changes since it was synced. A failed sync marks the pages clean: they never reach the disk.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any

from semel.disk import Disk
from tests.simulation.loop import PROCESS, Crash, Process

__all__ = ["SimulatedDisk"]


class _File:
    """Bytes as processes see them, as the disk has them, and the writes between the two."""

    __slots__ = ("data", "durable", "lock", "pending")

    def __init__(self) -> None:
        self.data = bytearray()
        self.durable = b""
        self.pending: list[tuple[int, bytes | None]] = []
        """(position, bytes) of writes, (length, None) of truncations."""
        self.lock: Process | None = None


_Node = _File | None
"""What a name stands for; None is a directory."""


class SimulatedDisk(Disk):
    """Replaces `semel.disk.disk`. A descriptor belongs to the process that opened it."""

    def __init__(self, rng: random.Random, trace: Callable[..., None], on_crash: Callable[[], None]) -> None:
        self._rng = rng
        self._trace = trace
        self._on_crash = on_crash
        self._names: dict[str, _Node] = {"/": None}
        self._durable_names: dict[str, _Node] = {"/": None}
        self._changes: dict[str, list[list[tuple[str, _Node | bool]]]] = {}
        """By directory, each whole or not: (path, node) of a name that was made, (path, False) of a gone one."""
        self._open: dict[int, _File] = {}
        self._next_fd = 1 << 40  # No descriptor of the kernel's.
        self._boots = 0
        self.full = False
        self.sync_fails = 0
        """How many of the next syncs fail."""
        self.crash_in = 0
        """The operation that ends the process, counted from here; 0 for none."""
        self.operations = 0
        self.faults_seen = False
        """Whether an operation failed since this was last made False."""
        self.sync_failed = False

    # --- What every operation begins with ---

    def _step(self, what: str, target: object = "") -> bool:
        """Count and record one operation. True: it is the one in whose middle the process dies."""
        process = PROCESS.get()
        if process is not None and not process.alive:
            raise Crash
        self.operations += 1
        self._trace("disk", what, str(target)[-60:])
        if self.crash_in:
            self.crash_in -= 1
            return self.crash_in == 0
        return False

    def _before(self, what: str, target: object = "") -> None:
        if self._step(what, target):
            self._die()

    def _die(self) -> None:
        self._on_crash()
        raise Crash

    # --- Files ---

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:  # type: ignore[override]
        name = str(path)
        self._before("open", name)
        file = self._names.get(name)
        if file is None:
            if name in self._names:
                raise IsADirectoryError(errno.EISDIR, "Is a directory", name)
            if not flags & os.O_CREAT or str(PurePosixPath(name).parent) not in self._names:
                raise FileNotFoundError(errno.ENOENT, "No such file or directory", name)
            self._check_space()
            file = _File()
            self._link(name, file)
        if flags & os.O_TRUNC and file.data:
            file.data.clear()
            file.pending.append((0, None))
        self._next_fd += 1
        self._open[self._next_fd] = file
        return self._next_fd

    def close(self, file: int) -> None:  # type: ignore[override]
        self._open.pop(int(file), None)  # A handle of a dead process may be collected at any time.

    def _file(self, file: int | Any) -> _File:
        if isinstance(file, int):
            found = self._open.get(int(file))
            if found is None:
                raise OSError(errno.EBADF, "Bad file descriptor")
            return found
        node = self._names.get(str(file))
        if node is None:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(file))
        return node

    def pread(self, file: int, length: int, position: int) -> bytes:  # type: ignore[override]
        self._before("pread", int(file))
        return bytes(self._file(file).data[position : position + length])

    def preadv(self, file: int, buffers: Sequence[Any], position: int) -> int:  # type: ignore[override]
        self._before("preadv", int(file))
        data = self._file(file).data
        done = 0
        for buffer in buffers:
            piece = data[position + done : position + done + len(buffer)]
            buffer[: len(piece)] = piece
            done += len(piece)
        return done

    def pwrite(self, file: int, data: Any, position: int) -> int:  # type: ignore[override]
        dies = self._step("pwrite", f"{int(file)} {len(data)} at {position}")
        target = self._file(file)
        piece = bytes(data)
        if dies:
            self._put(target, piece[: self._rng.randrange(len(piece) + 1)], position)
            self._die()
        if self.full:
            count = self._rng.randrange(len(piece))
            self.faults_seen = True
            if count == 0 or self._rng.random() < 0.5:
                raise OSError(errno.ENOSPC, "No space left on device")
            piece = piece[:count]
        self._put(target, piece, position)
        return len(piece)

    @staticmethod
    def _put(file: _File, data: bytes, position: int) -> None:
        _write(file.data, data, position)
        file.pending.append((position, data))

    def sendfile(self, socket: int, file: int, position: int, count: int) -> int:  # type: ignore[override]
        raise NotImplementedError("the simulation's sockets are not the kernel's: slices are copied")

    def truncate(self, path: Any, length: int) -> None:  # type: ignore[override]
        self._before("truncate", f"{path} to {length}")
        file = self._file(path)
        _cut(file.data, length)
        file.pending.append((length, None))

    def sync(self, file: int) -> None:  # type: ignore[override]
        self._before("sync", int(file))
        target = self._file(file)
        if self.sync_fails:
            self.sync_fails -= 1
            self.sync_failed = self.faults_seen = True
            target.pending.clear()
            raise OSError(errno.EIO, "Input/output error")
        target.durable = bytes(target.data)
        target.pending.clear()

    def size(self, file: int) -> int:  # type: ignore[override]
        return len(self._file(file).data)

    def size_at(self, path: Any) -> int | None:  # type: ignore[override]
        node = self._names.get(str(path))
        return None if node is None else len(node.data)

    def exists(self, path: Any) -> bool:  # type: ignore[override]
        return str(path) in self._names

    def read(self, path: Any) -> bytes:  # type: ignore[override]
        self._before("read", path)
        return bytes(self._file(PurePosixPath(path)).data)

    # --- Names ---

    def list(self, directory: Any) -> list[str]:  # type: ignore[override]
        self._before("list", directory)
        name = str(directory)
        if name not in self._names:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", name)
        prefix = name.rstrip("/") + "/"
        return sorted(
            path[len(prefix) :] for path in self._names if path.startswith(prefix) and "/" not in path[len(prefix) :]
        )

    def make_directory(self, directory: Any) -> None:  # type: ignore[override]
        path = PurePosixPath(directory)
        for part in [*reversed(path.parents), path]:
            if str(part) not in self._names:
                self._before("mkdir", part)
                self._check_space()
                self._link(str(part), None)

    def sync_directory(self, directory: Any) -> None:  # type: ignore[override]
        self._before("sync_directory", directory)
        if self.sync_fails:
            self.sync_fails -= 1
            self.sync_failed = self.faults_seen = True
            raise OSError(errno.EIO, "Input/output error")
        for change in self._changes.pop(str(directory), []):
            _apply(self._durable_names, change)

    def rename(self, old: Any, new: Any) -> None:  # type: ignore[override]
        self._before("rename", new)
        old, new = str(old), str(new)
        if old not in self._names:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", old)
        self._check_space()
        change: list[tuple[str, _Node | bool]] = []
        for path in [old, *(path for path in self._names if path.startswith(old + "/"))]:
            node = self._names.pop(path)
            self._names[new + path[len(old) :]] = node
            change += [(path, False), (new + path[len(old) :], node)]
        self._changed(old, change)

    def unlink(self, path: Any) -> None:  # type: ignore[override]
        self._before("unlink", path)
        if str(path) in self._names:
            self._unlink(str(path))

    def remove_tree(self, directory: Any) -> None:  # type: ignore[override]
        name = str(directory)
        for path in sorted((path for path in self._names if path.startswith(name + "/")), reverse=True):
            self.unlink(path)
        self.unlink(name)

    def usage(self, directory: Any) -> tuple[int, int]:  # type: ignore[override]
        return 1 << 30, 0 if self.full else 1 << 29

    def lock(self, file: int) -> None:  # type: ignore[override]
        target = self._file(file)
        if target.lock is not None and target.lock.alive and target.lock is not PROCESS.get():
            raise BlockingIOError(errno.EWOULDBLOCK, "Resource temporarily unavailable")
        target.lock = PROCESS.get()

    def boot_id(self) -> str:  # type: ignore[override]
        return f"boot {self._boots}"

    def _check_space(self) -> None:
        if self.full and self._rng.random() < 0.5:
            self.faults_seen = True
            raise OSError(errno.ENOSPC, "No space left on device")

    def _link(self, path: str, node: _Node) -> None:
        self._names[path] = node
        self._changed(path, [(path, node)])

    def _unlink(self, path: str) -> None:
        del self._names[path]
        self._changed(path, [(path, False)])

    def _changed(self, path: str, change: list[tuple[str, _Node | bool]]) -> None:
        self._changes.setdefault(str(PurePosixPath(path).parent), []).append(change)

    # --- Power ---

    def lose_power(self) -> None:
        """The machine starts again with what its disk has."""
        self._boots += 1
        self._open.clear()
        names = dict(self._durable_names)
        for _, changes in sorted(self._changes.items()):
            for change in changes[: self._kept(len(changes))]:
                _apply(names, change)
        self._changes.clear()
        # A directory that is not there has nothing in it.
        reachable: dict[str, _Node] = {}
        for path in sorted(names):
            if path == "/" or str(PurePosixPath(path).parent) in reachable:
                reachable[path] = names[path]
        self._names = reachable
        self._durable_names = dict(reachable)
        for file in {id(node): node for node in reachable.values() if node is not None}.values():
            self._lose(file)

    def _kept(self, count: int) -> int:
        return self._rng.choice((0, count, self._rng.randint(0, count)))

    def _lose(self, file: _File) -> None:
        file.lock = None
        if not file.pending:
            file.data[:] = file.durable
            return
        rng = self._rng
        data = bytearray(file.durable)
        writes = file.pending
        kept = self._kept(len(writes))
        any_of_them = rng.random() < 0.3
        for number, (position, piece) in enumerate(writes):
            if any_of_them and piece is not None and rng.random() < 0.5:
                continue
            if not any_of_them and number > kept:
                break
            if piece is None:
                _cut(data, position)
                continue
            if not any_of_them and number == kept:
                whole = len(piece)
                piece = piece[: rng.randrange(whole + 1)]  # The last one is torn.
                if rng.random() < 0.5:
                    piece += bytes(whole - len(piece))  # The length was written, all the bytes were not.
            _write(data, piece, position)
        file.data[:] = data
        file.durable = bytes(data)
        file.pending.clear()


def _write(into: bytearray, data: bytes, position: int) -> None:
    if len(into) < position:
        into.extend(bytes(position - len(into)))
    into[position : position + len(data)] = data


def _cut(data: bytearray, length: int) -> None:
    if len(data) > length:
        del data[length:]
    else:
        data.extend(bytes(length - len(data)))


def _apply(names: dict[str, _Node], change: Sequence[tuple[str, _Node | bool]]) -> None:
    for path, node in change:
        if node is False:
            names.pop(path, None)
        else:
            names[path] = node  # type: ignore[assignment]

"""The history: what every process of an app tried, before it tried it, and what came of it.

Off unless `SEMEL_HISTORY` names a folder; then each process appends JSON lines to a file of its own there. A line is
one write to the kernel and comes before the thing it tells of, so kill -9 loses nothing that matters: what is not in
the file was not tried. An attempt without an outcome may have happened, like one whose outcome is `info`.

A history never changes what the app does. Lines that cannot be written are counted, told once in the log, and stand
in the file as a `Gap` as soon as it takes lines again.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from heapq import heapify, heappop, heapreplace
from itertools import chain, count
from pathlib import Path
from typing import Final, Literal, NamedTuple

import msgspec

from semel.errors import ConfigurationError

__all__ = [
    "PROOF",
    "Batch",
    "BatchPart",
    "Event",
    "Gap",
    "Http",
    "Outcome",
    "Read",
    "Send",
    "Strike",
    "Torn",
    "Unit",
    "UnitChange",
    "UnitInput",
    "UnitParked",
    "attempt",
    "captured",
    "digest",
    "note",
    "on",
    "read_history",
    "start",
    "stop",
]

log = logging.getLogger("semel.history")

PROOF: Final = "semel-proof"
"""The header of a record that says where it came from, ASCII. Of one from outside: the attempt of its `Send`. Of a
unit's output `attempt|topic|partition|offset|j|n`: the j-th of n outputs of the input that stands there; `|parked`
behind it for the input itself in its park topic. Changelogs have no such header."""

Outcome = Literal["invoke", "ok", "fail", "info"]
"""Begun; done; certainly not done; unknown (it may have happened at any time since it began, or never)."""


class UnitInput(NamedTuple):
    """The records of one partition that a unit worked on: their offsets, and how many outputs each had."""

    topic: str
    partition: int
    offsets: list[int]
    outputs: list[int]


class UnitParked(NamedTuple):
    """One record that a unit parked; it is in no `UnitInput`."""

    topic: str
    partition: int
    offset: int


class UnitChange(NamedTuple):
    """What one call of a handler does to a key of a store: the digest of the value that it found, and of the one that
    it left; "" is no value. `key` is its bytes as Latin-1."""

    store: str
    partition: int
    key: str
    before: str
    after: str


class BatchPart(NamedTuple):
    """One partition's part of a sink's transaction: the position moves from `from_offset` to `to_offset`."""

    topic: str
    partition: int
    owner_epoch: int
    from_offset: int
    to_offset: int
    handed: list[int]
    """Offsets given to the handler, in calls whose effects are in the transaction."""
    parked: list[int]
    released: tuple[int, ...] = ()
    """Offsets that an earlier transaction parked: those among `handed` were worked on now, the others discarded."""


class _Event(msgspec.Struct, tag_field="op", omit_defaults=True, kw_only=True, gc=False):
    """`t` is the machine's monotonic clock in nanoseconds, the same for all its processes; set when written."""

    t: int = 0
    type: Outcome
    a: str = ""
    """The attempt: an outcome belongs to the `invoke` with the same one. Never used twice."""


class Unit(_Event, tag="unit"):
    """A Kafka transaction of a component, from before its first record is sent. Everything but `a` is at the invoke."""

    component: str = ""
    transactional_id: str = ""
    inputs: list[UnitInput] = []
    parked: list[UnitParked] = []
    released: list[UnitParked] = []
    """Records that an earlier unit parked: those among `inputs` were worked on now, the others were discarded."""
    changes: list[UnitChange] = []
    """What it does to keyed state, in the order of its inputs."""


class Batch(_Event, tag="batch"):
    """A sink's database transaction, from before its COMMIT. Everything but `a` is at the invoke.

    After an `info` the sink reads how the COMMIT ended: an `ok` or a `fail` of the same attempt may follow.
    """

    component: str = ""
    parts: list[BatchPart] = []


class Http(_Event, tag="http"):
    """A request as its sender sees it. `body` and `reply` are digests; `fail` is a definite refusal."""

    key: str = ""
    route: str = ""
    body: str = ""
    status: int = 0
    reply: str = ""
    replayed: bool = False


class Send(_Event, tag="send"):
    """One record that comes into the app from outside. `id` is in the record; the place is known with the `ok`."""

    id: str = ""
    topic: str = ""
    partition: int = -1
    offset: int = -1


class Read(_Event, tag="read"):
    """Records that a read_committed reader got in one poll, in its order; `a` names the reader."""

    topic: str = ""
    partition: int = -1
    offsets: list[int] = []
    digests: list[str] = []


class Strike(_Event, tag="fault"):
    """A fault: `invoke` when it begins, `ok` when it is over."""

    kind: str = ""
    target: str = ""
    detail: str = ""
    outcome: str = ""


class Gap(_Event, tag="gap"):
    """So many lines before this one could not be written."""

    lost: int = 0


Event = Unit | Batch | Http | Send | Read | Strike | Gap


def digest(data: bytes | None) -> str:
    """16 hex digits that stand for a value; no value is the empty string."""
    return "" if data is None else blake2b(data, digest_size=8).hexdigest()


# --- Writing ---

_PASSING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE})
"""Errors that go away by themselves: the file is opened later."""

_encode = msgspec.json.Encoder().encode


class _Writer:
    """Appends lines to this process' file. Its lock keeps a file's lines in the order of their times."""

    def __init__(self, folder: Path, role: str, slot: int, clock: Callable[[], int]) -> None:
        self.name = _free_name(folder, f"{role}-{slot}-{os.getpid()}")
        self._folder = folder
        self._clock = clock
        self._lock = threading.Lock()
        self._numbers = count(1)
        self._file = -1
        self._lost = 0
        self._is_torn = False
        self._is_told = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._open()
        except OSError as error:
            if error.errno not in _PASSING:
                raise ConfigurationError(
                    f"SEMEL_HISTORY={folder}: no history can be written there: {error.strerror or error}. "
                    "Name a folder that this user can write, or unset it."
                ) from error

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._file = os.open(self._folder / f"{self.name}.jsonl", flags, 0o644)

    def attempt(self) -> str:
        return f"{self.name}-{next(self._numbers)}"

    def note(self, event: Event) -> None:
        with self._lock:
            try:
                if self._file < 0:
                    self._open()
                if self._lost:
                    self._write(Gap(type="info", lost=self._lost))
                    self._lost = 0
                self._write(event)
            except OSError as error:
                self._lost += 1
                if not self._is_told:
                    self._is_told = True
                    log.error("the history in %s has a gap from here on: %s", self._folder, error.strerror or error)

    def _write(self, event: Event) -> None:
        event.t = self._clock()
        line = _encode(event) + b"\n"
        if self._is_torn:
            line = b"\n" + line
        written = os.write(self._file, line)
        self._is_torn = written != len(line)
        if self._is_torn:
            raise OSError(errno.ENOSPC, f"only {written} of {len(line)} bytes were written")

    def close(self) -> None:
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1


def _free_name(folder: Path, name: str) -> str:
    """A name that no file has: a process id may come again, its attempts may not."""
    names = chain([name], (f"{name}.{number}" for number in count(2)))
    return next(free for free in names if not (folder / f"{free}.jsonl").exists())


class _Memory:
    """Keeps events, for tests and simulations."""

    def __init__(self, events: list[Event], clock: Callable[[], int]) -> None:
        self._events = events
        self._clock = clock
        self._numbers = count(1)

    def attempt(self) -> str:
        return f"memory-{next(self._numbers)}"

    def note(self, event: Event) -> None:
        event.t = self._clock()
        self._events.append(event)

    def close(self) -> None:
        """There is nothing to give back."""


_writer: _Writer | _Memory | None = None


def start(folder: Path | str, role: str, slot: int, *, clock: Callable[[], int] = time.monotonic_ns) -> None:
    """Write this process' history to `folder`; an empty name leaves it off. Once in a process.

    Raises `ConfigurationError` when the folder cannot be written. A full disk is no such reason: what is lost by it is
    counted.
    """
    global _writer
    stop()
    if str(folder):
        _writer = _Writer(Path(folder), role, slot, clock)


def stop() -> None:
    """Write nothing more."""
    global _writer
    writer, _writer = _writer, None
    if writer is not None:
        writer.close()


def _forget() -> None:
    """In a fork: it would give out its parent's attempts a second time, and a thread there may hold the lock."""
    global _writer
    _writer = None


os.register_at_fork(after_in_child=_forget)


@contextmanager
def captured(clock: Callable[[], int] = time.monotonic_ns) -> Iterator[list[Event]]:
    """Keep what is noted inside of the block in a list."""
    global _writer
    events: list[Event] = []
    before = _writer
    _writer = _Memory(events, clock)
    try:
        yield events
    finally:
        _writer = before


def on() -> bool:
    """Whether a history is written."""
    return _writer is not None


def attempt() -> str:
    """A name for one attempt that no other has; empty when the history is off."""
    return "" if _writer is None else _writer.attempt()


def note(event: Event) -> None:
    """Append one event. Never raises, and does nothing when the history is off."""
    if _writer is not None:
        _writer.note(event)


# --- Reading ---


class Torn(NamedTuple):
    """A line that is not whole: a process was killed, or its disk was full, while it was written."""

    file: str
    line: int
    size: int
    is_last: bool
    """Then nothing of what it would have told was tried."""


_decode = msgspec.json.Decoder(Event).decode


def read_history(folder: Path | str, torn: list[Torn] | None = None) -> Iterator[Event]:
    """Every event of the folder's files in the order of their times, reading each file once, a line at a time.

    Lines that are not whole are passed over: they are added to `torn`, or without it told in the log. Files are open
    only while their process lived, so that thousands of killed processes need few descriptors. Raises `OSError`.
    """
    told: list[Torn] = []
    waiting: list[tuple[int, int, Event | None, Iterator[Event]]] = []
    for number, path in enumerate(sorted(Path(folder).glob("*.jsonl"))):
        events = _events(path, told if torn is None else torn)
        first = next(_events(path, []), None)
        if first is not None:
            waiting.append((first.t, number, None, events))
        else:
            list(events)  # Only for its torn lines.
    heapify(waiting)
    while waiting:
        _, number, event, events = waiting[0]
        if event is not None:
            yield event
        following = next(events, None)
        if following is None:
            heappop(waiting)
        else:
            heapreplace(waiting, (following.t, number, following, events))
    for line in told:
        log.warning("%s, line %d is not whole (%d bytes): passed over", line.file, line.line, line.size)


def _events(path: Path, torn: list[Torn]) -> Iterator[Event]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                event = _decode(line)
            except msgspec.DecodeError:
                if line != b"\n":
                    torn.append(Torn(path.name, number, len(line), not line.endswith(b"\n")))
                continue
            yield event

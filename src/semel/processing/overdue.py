"""Handlers that do not come back: a deadline for each call, and what is remembered of it over restarts.

An async handler is cancelled. A sync one cannot be interrupted: it holds the event loop, and all of this process with
it. So a thread watches it; when its time is over, the thread writes down which record it was and ends the process with
an exit code of its own. The supervisor starts it again, and a record that ended so many lives is parked untried.

While a sync handler is within its deadline the thread beats for the event loop, which cannot: else the supervisor
would take a handler that is allowed to be slow for a process that hangs.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import msgspec

from semel.errors import ConfigurationError, HandlerOverdue
from semel.processing import EXIT_OVERDUE
from semel.processing.files import replace_file
from semel.processing.limits import DEADLINE_SECONDS_MAX
from semel.processing.pace import parse_seconds
from semel.types import Record

__all__ = ["LIVES", "Overdue", "overdue", "parse_deadline"]

log = logging.getLogger("semel.engine")

LIVES = 3
"""So many processes may end over one record before it is parked: once may be a busy machine, twice a coincidence."""
WATCH_SECONDS = 0.25
"""How often the thread looks, as often as the event loop beats: a deadline is this much longer at most."""
SUSPECTS_MAX = 10_000
"""Records that are remembered; above it the one longest known is forgotten."""
FOLDER = "overdue"


def parse_deadline(text: object, what: str) -> float:
    """Seconds of `"30s"` or `"500ms"`. Raises `ConfigurationError`."""
    seconds = parse_seconds(text)
    if seconds is None or not 2 * WATCH_SECONDS <= seconds <= DEADLINE_SECONDS_MAX:
        raise ConfigurationError(
            f"{what}: deadline={text!r}, but a deadline is stated as '30s' or '500ms', from "
            f"{2000 * WATCH_SECONDS:g}ms to {DEADLINE_SECONDS_MAX:g}s."
        )
    return seconds


def overdue(component: str, records: Sequence[Record], why: str) -> HandlerOverdue:
    """The error of a call that took too long."""
    first = records[0]
    more = f" and {len(records) - 1} more" if len(records) > 1 else ""
    return HandlerOverdue(f"the handler of {component} at {first.topic}-{first.partition}@{first.offset}{more}: {why}")


class _Suspect(msgspec.Struct):
    """A record that was in hand when a process ended itself, as its file has it."""

    record: str
    lives: int


class _Call(NamedTuple):
    """A call that runs, and when its time is over, in monotonic seconds."""

    component: str
    records: Sequence[Record]
    seconds: float
    until: float


class Overdue:
    """Watches the sync calls of a process, one at a time, and knows which records ended processes of this host.

    `data` is the folder that the processes of a host share, None: memory only, and nobody is ended by it. `beat` tells
    the supervisor that all is well; it is called in the thread.
    """

    def __init__(
        self,
        data: Path | None = None,
        beat: Callable[[], None] = lambda: None,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self._folder = None if data is None else data / FOLDER
        self._beat, self._end = beat, end
        self._lives: dict[str, int] = {}
        self._call: _Call | None = None
        self._thread: threading.Thread | None = None
        self._load()

    def __repr__(self) -> str:
        return f"<Overdue {len(self._lives)} suspects, {'a call runs' if self._call else 'no call'}>"

    # --- What is known ---

    @property
    def has_suspects(self) -> bool:
        """Whether any record is known to have been in a call that ended a process."""
        return bool(self._lives)

    def lives(self, component: str, record: Record) -> int | None:
        """How many processes ended while they worked on this record alone; 0 for one among others, None for none."""
        key = _key(component, record)
        path = self._path(key) if key in self._lives else None
        if path is not None and not path.exists():
            del self._lives[key]  # Another process was through with it.
        return self._lives.get(key)

    def passed(self, component: str, records: Sequence[Record]) -> None:
        """These records are dealt with."""
        for record in records:
            key = _key(component, record)
            if key in self._lives:
                self._forget(key)

    # --- One call ---

    def begin(self, component: str, records: Sequence[Record], seconds: float) -> None:
        """A handler is called now, and may take so long."""
        self._call = _Call(component, records, seconds, time.monotonic() + seconds)
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="semel overdue", daemon=True)
            self._thread.start()

    def done(self) -> None:
        """It came back."""
        self._call = None

    def _watch(self) -> None:
        while True:
            time.sleep(WATCH_SECONDS)
            call = self._call
            if call is None:
                continue
            if time.monotonic() < call.until:
                self._beat()
            elif self._give_up(call):
                return

    def _give_up(self, call: _Call) -> bool:
        """Write down what is in hand and end the process; False when the call came back meanwhile."""
        is_alone = len(call.records) == 1
        for record in call.records:
            self._remember(_key(call.component, record), int(is_alone))
        if self._call is not call:
            return False
        error = overdue(call.component, call.records, f"it took longer than its deadline of {call.seconds:g} s")
        log.critical("%s and cannot be interrupted: this process ends and another one goes on", error)
        self._end(EXIT_OVERDUE)
        return True

    # --- The files, one for each record: whoever is through with it removes it ---

    def _load(self) -> None:
        for path in [] if self._folder is None else self._folder.glob("*.json"):
            suspect = _read(path)
            if suspect is not None:
                self._lives[suspect.record] = suspect.lives

    def _remember(self, key: str, more: int) -> None:
        while len(self._lives) >= SUSPECTS_MAX:
            self._forget(next(iter(self._lives)))
        self._lives[key] = self._lives.get(key, 0) + more
        path = self._path(key)
        try:
            if path is not None:
                replace_file(path, msgspec.json.encode(_Suspect(key, self._lives[key])))
        except OSError as error:
            log.warning("%s cannot be written: %s; the next process does not know of it", path, error)

    def _forget(self, key: str) -> None:
        self._lives.pop(key, None)
        path = self._path(key)
        if path is not None:
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def _path(self, key: str) -> Path | None:
        return (
            None if self._folder is None else self._folder / f"{blake2b(key.encode(), digest_size=16).hexdigest()}.json"
        )


def _read(path: Path) -> _Suspect | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Suspect)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        log.warning("%s cannot be read: %s; its record is tried again", path, error)
        return None


def _key(component: str, record: Record) -> str:
    return f"{component}/{record.topic}/{record.partition}/{record.offset}"

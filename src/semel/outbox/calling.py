"""The call that wakes relays in other processes: NOTIFY, after the COMMIT and on a connection of its own.

Inside of the business transaction NOTIFY would take a lock that all who notify share, and let them commit one after the
other. A call may be lost with its connection; relays look by themselves, too, only later.
"""

from __future__ import annotations

import logging
import os
import threading

from semel.databases.database import Database, open_database
from semel.outbox.waking import CHANNEL

__all__ = ["Caller", "call"]

log = logging.getLogger("semel.outbox")

PAUSE_SECONDS = 0.005
"""Between two calls: who commits more often calls once for several transactions."""


class Caller:
    """A thread that calls; it starts with the first `wake`, and at most one call is on its way."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._wanted = threading.Event()
        self._ended = threading.Event()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"<Caller on {CHANNEL} {'at work' if self._thread else 'asleep'}>"

    def wake(self) -> None:
        """Call, from any thread and without waiting for it."""
        self._wanted.set()
        if self._thread is None:
            with self._starting:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="semel outbox caller", daemon=True)
                    self._thread.start()

    def stop(self) -> None:
        """End the thread, after the call that it is at."""
        self._ended.set()
        self._wanted.set()

    def _run(self) -> None:
        database = open_database(self._url)
        try:
            while self._wanted.wait() and not self._ended.is_set():
                self._wanted.clear()
                self._call(database)
                self._ended.wait(PAUSE_SECONDS)
        finally:
            database.close()

    def _call(self, database: Database) -> None:
        try:
            if not database.connected:
                database.connect()
            database.execute(f"NOTIFY {CHANNEL}")
        except Exception as error:
            log.debug("relays could not be called, they look by themselves: %s", error)
            database.close()


_callers: dict[tuple[int, str], Caller] = {}
"""By process and URL: one for each database to which sessions of this process write."""


def call(url: str) -> None:
    """Call the relays of this database from this process."""
    place = (os.getpid(), url)
    caller = _callers.get(place)
    if caller is None:
        caller = _callers.setdefault(place, Caller(url))
    caller.wake()

"""When a relay looks for rows: when it is called, and now and then in case that nobody called."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from semel.databases.database import Database

__all__ = ["CHANNEL", "Listener", "Pace"]

log = logging.getLogger("semel.outbox")

CHANNEL = "semel_outbox"
"""NOTIFY on this channel, on a connection of its own and after the COMMIT, wakes the relays of the database."""
WAIT_SECONDS = 0.5
"""How long the listening thread waits at a time: it notices after so long that it shall end."""
RETRY_SECONDS = 1.0
SHORTEST_SECONDS = 0.002
LONGEST_SECONDS = 0.05
"""Without a call: how soon a row is looked for after the last one came, and how late when none came for long."""
CALLED_SECONDS = 0.25
"""With a call: a call may be lost with its connection."""


class Pace:
    """How long to wait before looking again. It is the shorter the more there was to find lately."""

    def __init__(self) -> None:
        self._seconds = SHORTEST_SECONDS

    def __repr__(self) -> str:
        return f"<Pace {self._seconds * 1000:.0f} ms>"

    def seconds(self, *, is_called: bool) -> float:
        """Wait so long; the next time it is longer."""
        if is_called:
            return CALLED_SECONDS
        wait, self._seconds = self._seconds, min(LONGEST_SECONDS, self._seconds * 1.5)
        return wait

    def busy(self) -> None:
        """There were rows."""
        self._seconds = SHORTEST_SECONDS

    woken = busy


class Listener:
    """A thread that waits for NOTIFY and calls `wake`; it does nothing on a database that cannot call."""

    def __init__(self, database: Database, wake: Callable[[], None]) -> None:
        self._database = database
        self._wake = wake
        self._ended = threading.Event()
        self.is_listening = False
        """Whether a call would be heard now."""
        self._thread = threading.Thread(target=self._run, name="semel outbox listener", daemon=True)

    def __repr__(self) -> str:
        return f"<Listener {'listening' if self.is_listening else 'deaf'}>"

    def start(self) -> None:
        """Listen."""
        self._thread.start()

    def stop(self) -> None:
        """Stop, within `WAIT_SECONDS`."""
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self._database.connect()
                if not self._database.listen(CHANNEL):
                    return
                self.is_listening = True
                self._wake()  # What was called for before is not heard.
                while not self._ended.is_set():
                    if self._database.wait(WAIT_SECONDS):
                        self._wake()
            except Exception as error:
                # The relay itself says that the database is away; until it is back it looks by itself.
                log.debug("listening on %s: %s", CHANNEL, error)
            finally:
                self.is_listening = False
                self._database.close()
            self._ended.wait(RETRY_SECONDS)

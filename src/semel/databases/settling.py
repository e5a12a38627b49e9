"""Connections that break: a transaction is begun on one that works, and who was not answered asks until it knows."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from semel.databases.database import Cause, Database, without_password
from semel.errors import OutcomeUnknown, Retriable

__all__ = ["SETTLE_SECONDS", "begin", "insist", "one_line", "settled"]

SETTLE_SECONDS = 30.0
"""How long a transaction without an answer looks for it before it tells that it does not know. A server that was
killed is back within seconds, a switch-over takes longer: then a person decides, with the ids that the error names."""
_PAUSE_SECONDS = (0.05, 1.0)
"""Between two questions, first and longest."""

T = TypeVar("T")


def _nothing() -> None:
    """What there is to do before a transaction, where there is nothing."""


def begin(database: Database, *, opened: Callable[[], None] = _nothing, reused: Callable[[], None] = _nothing) -> None:
    """Begin a transaction, on a new connection if need be: before it `opened` is called, or else `reused`.

    Raises `Retriable` when the database cannot be reached or somebody holds SQLite's lock for long, and what the two
    calls raise that is not the driver's: nothing was begun.
    """
    if database.connected:
        try:
            reused()
            database.begin()
        except Exception as error:
            # The server closed an idle connection, or was restarted: nothing was begun.
            if database.cause(error) is Cause.LOCKED:
                database.rollback()
                raise _unreachable(database, error) from error
            database.close()
        else:
            return
    try:
        database.connect()
        opened()
        database.begin()
    except Exception as error:
        database.close()
        if _is_away(database, error):
            raise _unreachable(database, error) from error
        raise


def settled(database: Database, read: Callable[[], T], seconds: float) -> T:
    """What `read` finds on a new connection; tried again, on another one each time, while the database is away.

    `read` ends in a COMMIT of its own, whose answer can be lost as well: then it runs again. Raises what the last one
    raised, after so many seconds, or at once what is not the driver's; the connection is closed then.
    """

    def ask() -> T:
        try:
            database.connect()
            return read()
        except Exception:
            database.close()
            raise

    return insist(ask, lambda error: _is_away(database, error), time.monotonic() + seconds)


def insist(call: Callable[[], T], is_away: Callable[[Exception], bool], deadline: float) -> T:
    """Call until it is answered, with pauses that double. Raises what the call raised last, at the deadline (of
    `time.monotonic`), and at once what does not mean that somebody is away."""
    pause, longest = _PAUSE_SECONDS
    while True:
        try:
            return call()
        except Exception as error:
            if not is_away(error) or time.monotonic() >= deadline:
                raise
        time.sleep(pause)
        pause = min(pause * 2, longest)


def one_line(error: Exception) -> str:
    """An error's text as a part of another one's."""
    return " ".join(str(error).split())


def _is_away(database: Database, error: Exception) -> bool:
    return isinstance(error, OutcomeUnknown) or database.driver_cause(error) is not None


def _unreachable(database: Database, error: Exception) -> Retriable:
    where = without_password(database.url)
    return Retriable(f"no transaction could be begun on {where}, nothing happened: {one_line(error)}")

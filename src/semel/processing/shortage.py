"""Records that found no memory or no descriptor: whose fault that was, only time can tell.

It may be the machine that had none for a moment, and then the record is as good as any other. It may be this record,
which needs more than there will ever be. So it is tried again for a while before it counts as one that cannot be
processed.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

__all__ = ["PATIENCE_SECONDS", "Shortages", "is_shortage"]

PATIENCE_SECONDS = 30.0
"""As long as a delivery may take: whatever has taken the memory is gone by then, or stays."""
_RECORDS_MAX = 1_000
"""What found nothing is at the head of a partition: these are few. Above it, the one longest known is forgotten."""
_SHORT = frozenset({errno.ENOMEM, errno.EMFILE, errno.ENFILE})

_SHORT_LOADER = ("failed to map segment", "annot allocate memory", "oo many open files")
"""What the dynamic loader says when it is short of something; all that Python makes of it is an ImportError."""

Place = tuple[str, int, int]
"""Topic, partition and offset."""


def is_shortage(error: BaseException) -> bool:
    """Whether this error says that the process has no memory, descriptor or thread left, now."""
    match error:
        case MemoryError():
            return True
        case OSError(errno=number):
            return number in _SHORT
        case ImportError():
            return any(text in str(error) for text in _SHORT_LOADER)
        case RuntimeError():
            return str(error) == "can't start new thread"
    return False


class Shortages:
    """Since when each record found nothing; `monotonic` is in seconds."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._since: dict[Place, float] = {}

    def may_pass(self, place: Place, error: BaseException) -> bool:
        """Whether this error is a shortage that may pass, so that the record is to be tried again later."""
        if not is_shortage(error):
            return False
        now = self._monotonic()
        if place not in self._since and len(self._since) >= _RECORDS_MAX:
            del self._since[next(iter(self._since))]
        return now - self._since.setdefault(place, now) < PATIENCE_SECONDS

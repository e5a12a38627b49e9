"""How a worker's process handles memory: it works in units of some thousand records, of which nothing is left after.

By default glibc gives the pages of a unit back to the kernel when it is freed, and gets as many for the next one,
zeroed, one page fault after the other: at records of 1 KB a third of the worker's processor time. And Python's garbage
collector looks through all there is while a unit grows, for cycles that records are never part of.
"""

from __future__ import annotations

import ctypes
import gc
from functools import cache

__all__ = ["prepare_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3)."""
KEPT_BYTES = 64 * 1_048_576
"""So much free memory at the heap's end stays: a full unit's inputs and outputs, twice, and what was fetched ahead."""
IN_HEAP_BYTES = 8 * 1_048_576
"""Smaller blocks come from the heap; larger ones get pages of their own, which go back to the kernel at once."""
COLLECT_EVERY = 20_000
"""Objects that a collection waits for: twice the records of the largest unit."""


@cache
def prepare_memory() -> bool:
    """Set the whole process up for units of work, once; False where the C library cannot be told."""
    gc.collect()
    gc.freeze()  # Modules and classes stay as long as the process.
    gc.set_threshold(COLLECT_EVERY, *gc.get_threshold()[1:])
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_TRIM_THRESHOLD, KEPT_BYTES) and mallopt(_MMAP_THRESHOLD, IN_HEAP_BYTES))

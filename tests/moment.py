"""When the records of tests were written, for every test that has a broker of its own time behind it."""

from __future__ import annotations

import time

__all__ = ["NOW_MS"]

NOW_MS = int(time.time() * 1000)
"""Now, in milliseconds: a broker looks every five minutes for what is a week old and deletes it, also under a test."""

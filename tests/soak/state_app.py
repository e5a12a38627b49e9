"""An app with much state, for `test_state.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from semel.app import App

PARTITIONS = 4

app = App("much")
asked: Any = app.topic("asked", key=str, value=str, partitions=PARTITIONS)
told: Any = app.topic("told", key=str, value=str, partitions=1)
known = app.state("known", key=str, value=str)


@app.processor(asked, state=known)
def tell(record: Any, known: Any) -> Iterator[Any]:
    """Say what is known of a key, and know the record's value from now on."""
    yield told.record(record.key, f"{record.value}: {(known.get(record.key) or 'nothing')[:12]}")
    yield known.put(record.key, record.value)

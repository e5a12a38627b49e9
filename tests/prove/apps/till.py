"""A small app without an endpoint and without a proof plan: records come in from outside."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from semel import App


class Payment(msgspec.Struct):
    till: int
    cents: int


app = App("till")
payments = app.topic("payments", key=int, value=Payment, partitions=2)
receipts = app.topic("receipts", key=int, value=Payment, partitions=2)
sums = app.state("sums", key=int, value=int)
database = app.database(
    "sqlite:///till.db", schema="CREATE TABLE IF NOT EXISTS taken (till BIGINT PRIMARY KEY, cents BIGINT NOT NULL);"
)


@app.processor(payments, state=sums)
def pay(record: Any, view: Any) -> Iterator[Any]:
    yield view.put(record.key, view.get(record.key, 0) + record.value.cents)
    yield receipts.record(record.key, record.value)


@app.sink(receipts, database)
def taken(records: Any, db: Any) -> None:
    db.executemany(
        "INSERT INTO taken VALUES (?, ?) ON CONFLICT (till) DO UPDATE SET cents = taken.cents + excluded.cents",
        sorted((record.value.till, record.value.cents) for record in records),
    )

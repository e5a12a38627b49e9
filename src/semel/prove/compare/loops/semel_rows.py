"""Semel: a sink. The rows and the position are one database transaction, and a former owner is fenced in it."""

import msgspec

from semel import App
from semel.prove.compare.loops import rows, work


class Order(msgspec.Struct, frozen=True):
    id: int
    items: int


app = App(work.GROUP)
orders = app.topic(work.ORDERS, key=str, value=Order, partitions=work.ORDER_PARTITIONS)
database = app.database(f"sqlite:///{rows.DATABASE}", schema=rows.SCHEMA)


@app.sink(orders, database)
def reserve(records, db):
    found = [row for record in records for row in rows.rows_of({"id": record.value.id, "items": record.value.items})]
    db.executemany(rows.INSERT, found)

"""A shop: orders come in by HTTP, each becomes stock movements, and both end as rows - each exactly once.

    semel run shop:app --http 2 --workers 2

    curl -X POST http://127.0.0.1:8000/orders -H 'Idempotency-Key: "line-1"' -H 'Content-Type: application/json' \\
         -d '{"id": 1, "customer_id": "00001", "cds": 3, "cents": 2976}'

The stock service is a legacy interface that takes one item at a time, so an order of n CDs becomes n records.
"""

import os
from collections import Counter

import msgspec

from semel import App, Created, Problem

TITLES = 1_000


class Order(msgspec.Struct, frozen=True):
    id: int
    customer_id: str
    cds: int
    cents: int


class Taken(msgspec.Struct, frozen=True):
    order_id: int
    position: int
    sku: str


def sku(order_id: int, position: int) -> str:
    """Which CD it is: the order's number and the position in it decide."""
    return f"cd-{(order_id * 7 + position * 13) % TITLES:04d}"


app = App("shop")
orders = app.topic("orders", key=str, value=Order, partitions=4)
inventory = app.topic("inventory", key=str, value=Taken, partitions=4)
database = app.database(
    os.environ.get("SHOP_DATABASE", "sqlite:///shop.db"),
    schema="""
    CREATE TABLE IF NOT EXISTS customer_totals
        (customer_id TEXT PRIMARY KEY, orders BIGINT NOT NULL, cds BIGINT NOT NULL, cents BIGINT NOT NULL);
    CREATE TABLE IF NOT EXISTS stock (sku TEXT PRIMARY KEY, taken BIGINT NOT NULL);
    """,
)


@app.post("/orders", request=Order)  # runs once per Idempotency-Key
def place(order: Order):
    if order.cds < 1:
        raise Problem(422, "an order has at least one CD")
    yield orders.record(order.customer_id, order)
    return Created({"order": order.id})


@app.processor(orders)  # one Kafka transaction: the items and the position in orders
def reserve(record):
    order = record.value
    for position in range(order.cds):
        item = sku(order.id, position)
        yield inventory.record(item, Taken(order.id, position, item))


@app.sink(orders, database)  # one database transaction: the rows and the position in orders
def customer_totals(records, db):
    db.executemany(
        "INSERT INTO customer_totals (customer_id, orders, cds, cents) VALUES (?, 1, ?, ?) "
        "ON CONFLICT (customer_id) DO UPDATE SET orders = customer_totals.orders + 1, "
        "cds = customer_totals.cds + excluded.cds, cents = customer_totals.cents + excluded.cents",
        sorted((r.value.customer_id, r.value.cds, r.value.cents) for r in records),
    )


@app.sink(inventory, database)
def stock(records, db):
    taken = Counter(record.value.sku for record in records)
    db.executemany(
        "INSERT INTO stock (sku, taken) VALUES (?, ?) "
        "ON CONFLICT (sku) DO UPDATE SET taken = stock.taken + excluded.taken",
        sorted(taken.items()),
    )

"""Semel: a processor. The transaction, the fence, the retry and the way back are the framework's."""

import time

import msgspec

from semel import App
from semel.prove.compare.loops import work


class Order(msgspec.Struct, frozen=True):
    id: int
    items: int


class Item(msgspec.Struct, frozen=True):
    order: int
    position: int


app = App(work.GROUP)
orders = app.topic(work.ORDERS, key=str, value=Order, partitions=work.ORDER_PARTITIONS)
items = app.topic(work.ITEMS, key=str, value=Item, partitions=work.ITEM_PARTITIONS)


@app.processor(orders)
def reserve(record):
    time.sleep(work.STEP_SECONDS)
    for key, value in work.items_of({"id": record.value.id, "items": record.value.items}):
        yield items.record(key, Item(**value))

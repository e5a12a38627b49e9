"""`TestApp(app, replay=True)`: what a handler would do differently after a crash is found, and named."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from semel import App, Created, Problem
from semel.errors import Retriable
from semel.testing import NotDeterministic, TestApp


class Order(msgspec.Struct, frozen=True):
    id: str
    cds: int = 1


class Fixture:
    """An app with a topic in, a topic out, a store and a table."""

    def __init__(self) -> None:
        self.app = App("shop")
        self.orders = self.app.topic("orders", value=Order, partitions=1)
        self.done = self.app.topic("done", value=Order, partitions=1)
        self.totals = self.app.state("totals", key=str, value=int)
        self.database = self.app.database(
            "sqlite:///never.db", schema="CREATE TABLE IF NOT EXISTS cds (id TEXT, cds INTEGER)"
        )

    def run(self, *records: Order) -> Any:
        with TestApp(self.app, replay=True) as t:
            t.send_many(self.orders, [("a", item) for item in records or (Order("1"),)])
            return {item.value.id for item in t.sent(self.done)}, t.state(self.totals), t.query("SELECT * FROM cds")


_calls = itertools.count()
_seen: set[str] = set()


def by_clock(item: Any, done: Any) -> Iterator[Any]:
    yield done.record(item.key, Order(str(time.perf_counter_ns())))


def by_chance(item: Any, done: Any) -> Iterator[Any]:
    yield done.record(str(uuid.uuid4()), item.value)


def by_memory(item: Any, done: Any) -> Iterator[Any]:
    if item.value.id not in _seen:
        _seen.add(item.value.id)
        yield done.record(item.key, item.value)


def by_mood(item: Any, done: Any) -> Iterator[Any]:
    if next(_calls) % 2:
        raise ValueError("not today")
    yield done.record(item.key, item.value)


def by_header(item: Any, done: Any) -> Iterator[Any]:
    yield done.record(item.key, item.value, headers=[("id", random.randbytes(8))])


KINDS = ["coroutine", "async generator", "function", "returned generator"]


@pytest.mark.parametrize(
    ("handler", "kind"),
    [
        *((handler, "generator") for handler in (by_clock, by_chance, by_memory, by_mood, by_header)),
        *((by_clock, kind) for kind in KINDS),
    ],
    ids=lambda item: item if isinstance(item, str) else item.__name__,
)
def test_what_differs_is_found_in_every_kind_of_handler(handler: Callable[..., Iterator[Any]], kind: str) -> None:
    f = Fixture()
    _seen.clear()

    def generator(item: Any) -> Iterator[Any]:
        yield from handler(item, f.done)

    async def coroutine(item: Any) -> Any:
        await asyncio.sleep(1)
        return list(handler(item, f.done))

    async def async_generator(item: Any) -> Any:
        for effect in handler(item, f.done):
            await asyncio.sleep(1)
            yield effect

    def function(item: Any) -> Any:
        return list(handler(item, f.done))

    def returned_generator(item: Any) -> Any:
        return handler(item, f.done)

    f.app.processor(f.orders, name="copy")(locals()[kind.replace(" ", "_")])
    with pytest.raises((NotDeterministic, ValueError)) as caught:
        f.run()
    if handler is not by_mood:  # There the test may see what was raised first.
        assert isinstance(caught.value, NotDeterministic)


def test_the_error_names_handler_record_and_both_effects() -> None:
    f = Fixture()

    @f.app.processor(f.orders)
    def copy(item: Any) -> Iterator[Any]:
        yield f.done.record("same", item.value)
        yield f.done.record(item.key, Order(f"n{next(_calls)}"))

    with pytest.raises(NotDeterministic) as caught:
        f.run(Order("seven", 7))
    text = str(caught.value)
    assert (
        "processor copy did two different things for record orders-0@0, key 'a', value Order(id='seven', cds=7)" in text
    )
    assert " yield done.record('same', Order(id='seven', cds=7))" in text
    assert "-yield done.record('a', Order(id='n" in text
    assert "+yield done.record('a', Order(id='n" in text


def test_what_is_the_same_passes_whatever_it_reads() -> None:
    """State, the database and the record are answered as in the first run, also what the first run has changed."""
    f = Fixture()

    @f.app.processor(f.orders, state=f.totals)
    def total(item: Any, view: Any) -> Iterator[Any]:
        if item.value.cds > 5:
            raise Problem(409, "too many")  # No more than an error here; the key is parked.
        before = view.get(item.key, 0) if item.key in view else 0
        yield view.put(item.key, before + item.value.cds)
        assert view.get(item.key) == before + item.value.cds, "it sees its own change"
        yield f.done.record(item.key, Order(f"{item.value.id}/{before}"))

    @f.app.sink(f.done, f.database)
    def keep(records: Any, db: Any) -> None:
        for item in records:
            [(count,)] = db.query("SELECT count(*) FROM cds")
            db.execute("INSERT INTO cds VALUES (?, ?)", (item.value.id, count))
        db.executemany("UPDATE cds SET cds = cds + ?", ((0,) for _ in range(2)))

    sent, totals, rows = f.run(Order("1", 2), Order("2", 3))
    assert sent == {"1/0", "2/2"}
    assert totals == {"a": 5}
    assert rows == [("1/0", 0), ("2/2", 1)]


def test_batches_and_handlers_at_once() -> None:
    f = Fixture()

    @f.app.processor(f.orders, batch=True)
    def in_batches(records: Any) -> Iterator[Any]:
        for item in records:
            yield f.done.record(item.key, Order(f"{item.value.id} of a batch"))

    @f.app.processor(f.orders, concurrency=8)
    async def at_once(item: Any) -> Any:
        await asyncio.sleep(1)
        return f.done.record(item.key, Order(f"{item.value.id} at once", next(_calls) if item.value.cds > 1 else 1))

    with TestApp(f.app, replay=True) as t:
        t.send_many(f.orders, [(str(number), Order(str(number))) for number in range(20)])
        ids = {item.value.id for item in t.sent(f.done)}
        assert ids == {f"{number} {how}" for number in range(20) for how in ("of a batch", "at once")}
        with pytest.raises(NotDeterministic, match=r"processor at_once .* value Order\(id='x', cds=2\)"):
            t.send(f.orders, "x", Order("x", 2))


def test_a_sink_that_does_something_else_the_second_time() -> None:
    f = Fixture()

    @f.app.sink(f.orders, f.database)
    def keep(records: Any, db: Any) -> None:
        db.executemany("INSERT INTO cds VALUES (?, ?)", [(item.value.id, next(_calls)) for item in records])

    with pytest.raises(NotDeterministic, match=r"(?s)sink keep .*for 1 records, orders-0@0.*-db\.executemany"):
        f.run()


def test_a_sink_that_asks_something_else_the_second_time() -> None:
    f = Fixture()

    @f.app.sink(f.orders, f.database)
    def keep(records: Any, db: Any) -> None:
        db.query(f"SELECT {next(_calls)}")

    with pytest.raises(NotDeterministic, match=r"\+db\.query\('SELECT "):
        f.run()


def test_answers_of_endpoints() -> None:
    f = Fixture()

    @f.app.post("/chance", request=Order)
    def chance(order: Order) -> Iterator[Any]:
        yield f.orders.record("a", order)
        return Created({"order": next(_calls)})

    @f.app.post("/sure", request=Order)
    def sure(order: Order) -> Iterator[Any]:
        if order.cds < 1:
            raise Problem(422, "an order has at least one CD")
        yield f.orders.record("a", order)
        return Created({"order": order.id})

    with TestApp(f.app, replay=True) as t:
        with pytest.raises(NotDeterministic, match=r"endpoint POST /chance .*\n.*\n.*\n.*\n.*\n-return Created\(201"):
            t.post("/chance", Order("1"))
        assert t.post("/sure", Order("1")).status == 201
        assert t.post("/sure", Order("1", 0)).status == 422
        t.assert_sent(f.orders, times=1)


def test_a_world_that_is_away_is_no_difference() -> None:
    f = Fixture()

    @f.app.processor(f.orders)
    def copy(item: Any) -> Iterator[Any]:
        if next(_calls) < 10_000:
            for _ in range(4_000):
                next(_calls)
            raise Retriable("the stock service is away")
        yield f.done.record(item.key, item.value)

    with TestApp(f.app, replay=True) as t:
        t.send(f.orders, "a", Order("1"))
        t.assert_sent(f.done, value=Order("1"), times=1)

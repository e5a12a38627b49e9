"""A user's app in a user's tests: what was caused is done, what failed is seen, and nothing waits for a clock."""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import time
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from semel import App, Created, Problem
from semel.errors import ConfigurationError, Retriable
from semel.testing import ANY, NotSettled, TestApp, UnexpectedlyParked, record


class Order(msgspec.Struct, frozen=True):
    id: int
    cds: int


def make(handler: Any = None, *, name: str = "shop", **options: Any) -> Any:
    """An app that copies orders to `done` by `handler`, and counts them in a database."""
    app = App(name)
    app.orders = app.topic("orders", value=Order)  # type: ignore[attr-defined]
    app.done = app.topic("done", value=Order)  # type: ignore[attr-defined]
    database = app.database("sqlite:///never.db", schema="CREATE TABLE IF NOT EXISTS cds (id INTEGER, cds INTEGER)")

    def copy(item: Any) -> Iterator[Any]:
        yield app.done.record(item.key, item.value)  # type: ignore[attr-defined]

    app.processor(app.orders, name="copy", **options)(handler or copy)  # type: ignore[attr-defined]

    @app.sink(app.done, database)  # type: ignore[attr-defined]
    def count(records: Any, db: Any) -> None:
        db.executemany("INSERT INTO cds VALUES (?, ?)", [(item.value.id, item.value.cds) for item in records])

    return app


def endpoint(app: Any) -> None:
    @app.post("/orders", request=Order)
    def place(order: Order) -> Iterator[Any]:
        if order.cds < 1:
            raise Problem(422, "an order has at least one CD")
        yield app.orders.record(str(order.id), order)
        return Created({"order": order.id})


# --- What was caused is done ---


def test_a_record_goes_through_processor_and_sink() -> None:
    app = make()
    with TestApp(app) as t:
        t.send(app.orders, "a", Order(1, 3))
        [sent] = t.assert_sent(app.done, key="a", value=Order(1, 3), times=1)
        assert sent.value.cds == 3
        assert t.query("SELECT id, cds FROM cds") == [(1, 3)]


def test_many_records_keep_the_order_of_their_keys() -> None:
    app = make()
    with TestApp(app) as t:
        t.send_many(app.orders, [(str(number % 7), Order(number, 1)) for number in range(200)])
        for key in map(str, range(7)):
            numbers = [item.value.id for item in t.sent(app.done) if item.key == key]
            assert numbers == sorted(numbers)
        assert t.query("SELECT count(*), count(DISTINCT id) FROM cds") == [(200, 200)]


def test_an_endpoint_answers_when_all_that_it_caused_is_done() -> None:
    app = make()
    endpoint(app)
    with TestApp(app) as t:
        answer = t.post("/orders", Order(7, 2), key="line-1")
        assert (answer.status, answer.json(), answer.is_replayed) == (201, {"order": 7}, False)
        assert t.query("SELECT * FROM cds") == [(7, 2)]
        again = t.post("/orders", {"id": 7, "cds": 2}, key="line-1")
        assert (again.status, again.body, again.is_replayed) == (201, answer.body, True)
        t.assert_sent(app.orders, times=1)
        assert t.post("/orders", {"id": 8, "cds": 2}, key="line-1").status == 422
        assert t.post("/orders", {"id": 8, "cds": 0}).json()["detail"] == "an order has at least one CD"
        assert t.get("/readyz").status == 200
        assert t.post("/nowhere").status == 404


def test_a_stored_response_ends_with_its_time() -> None:
    app = make()
    endpoint(app)
    with TestApp(app, now=datetime(2030, 1, 1, tzinfo=UTC)) as t:
        assert not t.post("/orders", Order(7, 2), key="line-1").is_replayed
        t.advance(23 * 3_600)
        assert t.post("/orders", Order(7, 2), key="line-1").is_replayed
        t.advance(2 * 3_600)
        assert not t.post("/orders", Order(7, 2), key="line-1").is_replayed
        assert (t.now.day, t.now.hour) == (2, 1)


def test_state_is_there_and_survives_a_restart() -> None:
    app = App("counter")
    orders = app.topic("orders", value=Order)
    totals = app.state("totals", key=str, value=int)

    @app.processor(orders, state=totals)
    def total(item: Any, view: Any) -> Iterator[Any]:
        yield view.put(item.key, view.get(item.key, 0) + item.value.cds)

    with TestApp(app) as t:
        t.send_many(orders, [("a", Order(1, 3)), ("b", Order(2, 1))])
        t.restart()
        t.send(orders, "a", Order(3, 2))
        assert t.state(totals) == {"a": 5, "b": 1}


def test_what_waits_for_minutes_takes_no_time() -> None:
    """Real minutes would end in the test's own time-out."""
    app = App("patient")
    orders = app.topic("orders", value=Order)
    asked = itertools.count(1)

    @app.processor(orders)
    async def wait(item: Any) -> None:
        await asyncio.sleep(300 if next(asked) == 1 else 0)
        if item.value.cds and next(asked) < 6:
            raise Retriable("the stock service is away")

    with TestApp(app, now=datetime(2030, 1, 1, tzinfo=UTC)) as t:
        t.send(orders, "a", Order(1, 0))
        assert t.now.minute == 5
        t.send(orders, "a", Order(1, 1))
        assert next(asked) > 6


def test_real_waiting_is_real() -> None:
    """A thread and a connection of a handler's own are waited for; the app's clock goes meanwhile as clocks do."""
    app = App("outside")
    orders = app.topic("orders", value=Order)
    copies = app.topic("copies", value=str)

    @app.processor(orders)
    async def ask(item: Any) -> Any:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write((await reader.readline()).upper())
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        await asyncio.to_thread(time.sleep, 0.05)
        writer.write(b"hello\n")
        text = (await reader.readline()).decode().strip()
        writer.close()
        server.close()
        return copies.record(item.key, text)

    with TestApp(app) as t:
        t.send(orders, "a", Order(1, 1))
        t.assert_sent(copies, "a", "HELLO")


def test_two_runs_are_the_same() -> None:
    def run() -> Any:
        app = make()
        endpoint(app)
        with TestApp(app, now=datetime(2030, 1, 1, tzinfo=UTC)) as t:
            for number in range(5):
                t.post("/orders", Order(number, 1))
            return t.sent(app.orders), t.sent(app.done)

    assert run() == run()


def test_the_app_is_as_it_was() -> None:
    app = make()
    before = dict(app.processors), dict(app.sinks), dict(app.databases)
    for _ in range(2):
        with TestApp(app) as t:
            t.send(app.orders, "a", Order(1, 3))
            assert t.query("SELECT count(*) FROM cds") == [(1,)], "each has databases and topics of its own"
    assert (app.processors, app.sinks, app.databases) == before


async def use_it_async(app: Any) -> None:
    async with TestApp(app) as t:
        answer = await t.post("/orders", Order(7, 2), key="line-1")
        assert answer.status == 201
        await t.send(app.orders, "b", Order(8, 1))
        t.assert_sent(app.done, times=2)
        assert sorted(t.query("SELECT * FROM cds")) == [(7, 2), (8, 1)]
        await t.advance(25 * 3_600)
        assert not (await t.post("/orders", Order(7, 2), key="line-1")).is_replayed


def test_in_async_tests() -> None:
    app = make()
    endpoint(app)
    asyncio.run(use_it_async(app))


def test_a_test_costs_little() -> None:
    """An app with a processor and a sink, one record through both: measured 0.03 s of CPU where the first one in a
    process takes 0.1 s."""
    app = make()
    costs = []
    for _ in range(3):
        before = time.process_time()
        with TestApp(app) as t:
            t.send(app.orders, "a", Order(1, 3))
        costs.append(time.process_time() - before)
    assert min(costs) < 0.3


# --- What failed is seen ---


def test_what_a_handler_raises_is_raised_in_the_test_from_its_line() -> None:
    def fail(item: Any) -> Iterator[Any]:
        if item.value.cds > 10:
            raise ValueError("no more than ten")
        yield app.done.record(item.key, item.value)

    app = make(fail)
    with TestApp(app) as t:
        with pytest.raises(ValueError, match="no more than ten") as caught:
            t.send(app.orders, "a", Order(1, 11))
        assert "fail" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
        [note] = caught.value.__notes__
        assert "processor copy for record orders-" in note
        assert "Order(id=1, cds=11)" in note
        [parked] = t.parked()
        assert (parked.component, parked.key, parked.error) == ("copy", b"a", "ValueError")
        t.send(app.orders, "a", Order(2, 1))
        assert [item.error for item in t.parked()] == ["ValueError", ""], "its key waits"
        t.send(app.orders, "b", Order(3, 1))
        assert [item.value.id for item in t.sent(app.done)] == [3]


def test_errors_can_be_left_to_parked() -> None:
    def fail(item: Any) -> None:
        raise ValueError("never")

    app = make(fail)
    with TestApp(app, raise_errors=False) as t:
        t.send(app.orders, "a", Order(1, 11))
        assert [item.message for item in t.parked()] == ["never"]
        with pytest.raises(AssertionError, match=r"parked: .*never"):
            t.assert_sent(app.done)


def test_bytes_that_nobody_can_read_are_not_overlooked() -> None:
    app = make()
    with TestApp(app) as t:
        with pytest.raises(UnexpectedlyParked, match="value of topic orders"):
            t.send_bytes(app.orders, b"a", b"{")
        assert len(t.parked()) == 1


def test_an_effect_of_the_wrong_type_is_named() -> None:
    def wrong(item: Any) -> Iterator[Any]:
        yield app.done.record(item.key, "three")

    app = make(wrong)
    with TestApp(app) as t, pytest.raises(Exception, match="declared as Order, got str"):
        t.send(app.orders, "a", Order(1, 3))


def test_an_endpoint_that_fails() -> None:
    app = App("shop")

    @app.post("/orders", request=Order)
    def place(order: Order) -> Any:
        raise KeyError("who?")

    with TestApp(app) as t, pytest.raises(KeyError, match="who"):
        t.post("/orders", Order(1, 1))
    with TestApp(app, raise_errors=False) as t:
        assert t.post("/orders", Order(1, 1)).status == 500


def test_a_sink_that_fails() -> None:
    app = App("shop")
    orders = app.topic("orders", value=Order)
    database = app.database("sqlite:///never.db", schema="CREATE TABLE IF NOT EXISTS cds (id INTEGER PRIMARY KEY)")

    @app.sink(orders, database)
    def keep(records: Any, db: Any) -> None:
        for item in records:
            db.execute("INSERT INTO cds VALUES (?)", (item.value.id,))

    with TestApp(app) as t:
        t.send(orders, "a", Order(1, 1))
        with pytest.raises(Exception, match="UNIQUE constraint failed"):
            t.send(orders, "b", Order(1, 1))
        assert [(item.component, item.error) for item in t.parked()] == [("shop.keep", "sqlite3.IntegrityError")]
        assert t.query("SELECT id FROM cds") == [(1,)]


def test_a_sink_without_its_table() -> None:
    app = App("shop")
    orders = app.topic("orders", value=Order)
    database = app.database("sqlite:///never.db")

    @app.sink(orders, database)
    def keep(records: Any, db: Any) -> None:
        db.execute("INSERT INTO cds VALUES (1)")

    with TestApp(app) as t, pytest.raises(Exception, match="no such table: cds"):
        t.send(orders, "a", Order(1, 1))


def test_what_never_comes_to_rest_is_named() -> None:
    async def away(item: Any) -> None:
        raise Retriable("the stock service is away")

    app = make(away)
    with TestApp(app) as t, pytest.raises(NotSettled, match=r"copy has work left at orders-\d \(up to 1 offsets\)"):
        t.send(app.orders, "a", Order(1, 3))


def test_assert_sent_shows_what_was_sent() -> None:
    app = make()
    with TestApp(app) as t:
        t.send(app.orders, "a", Order(1, 3))
        with pytest.raises(AssertionError) as caught:
            t.assert_sent(app.done, key="b")
        assert "0 records with key='b', and at least one" in str(caught.value)
        assert "'a': Order(id=1, cds=3)" in str(caught.value)
        with pytest.raises(AssertionError, match="1 records with any key and value, and 0 records"):
            t.assert_sent(app.done, ANY, ANY, times=0)


def test_mistakes_of_a_test_are_named() -> None:
    app = make()
    with pytest.raises(ConfigurationError, match=r"databases=\['stock'\], but app shop has \['database'\]"):
        TestApp(app, databases={"stock": "sqlite:///x.db"})
    idle = TestApp(app)
    with TestApp(app) as t:
        with pytest.raises(ConfigurationError, match="no endpoints"):
            t.post("/orders")
        with pytest.raises(ConfigurationError, match="does not go back"):
            t.advance(-1)
        with pytest.raises(ConfigurationError, match="no database 'stock'"):
            t.query("SELECT 1", database="stock")
    with pytest.raises(ConfigurationError, match="use it inside of"):
        idle.settle()


# --- Records for handlers ---


def test_a_handler_needs_nothing_but_a_record() -> None:
    app = App("shop")
    orders = app.topic("orders", value=Order)
    done = app.topic("done", value=Order)

    @app.processor(orders)
    def copy(item: Any) -> Iterator[Any]:
        yield done.record(item.key, item.value)

    given = record(orders, "a", Order(1, 3), offset=7, headers=[("trace", b"1")])
    assert (given.topic, given.offset, given.headers) == ("orders", 7, (("trace", b"1"),))
    [effect] = list(copy(given))
    assert (effect.topic, effect.key, effect.value) == (done, "a", Order(1, 3))
    with pytest.raises(Exception, match="declared as Order"):
        record(orders, "a", 3)  # type: ignore[arg-type]


def test_a_record_is_what_comes_out_of_kafka() -> None:
    """A value that JSON changes on its way is changed for the handler's test, too."""
    topic = App("shop").topic("pairs", value=tuple[int, int])
    assert record(topic, "a", [1, 2]).value == (1, 2)  # type: ignore[arg-type]


def test_random_programs_leave_nothing_behind() -> None:
    """Whatever is sent in whatever pieces: every input has its row, once."""
    rng = random.Random(6)
    app = make()
    with TestApp(app) as t:
        sent = 0
        for _ in range(8):
            count = rng.randrange(1, 30)
            t.send_many(app.orders, [(str(rng.randrange(5)), Order(sent + item, 1)) for item in range(count)])
            sent += count
            if rng.random() < 0.3:
                t.restart()
            t.advance(rng.random() * 100)
        assert t.query("SELECT count(*), count(DISTINCT id) FROM cds") == [(sent, sent)]


@pytest.mark.parametrize("way", [{"outbox": True}, {"dual_write": True}, {"outbox": True, "dual_write": True}])
def test_records_of_a_transaction_are_there_whichever_way_they_go(way: dict[str, bool]) -> None:
    app = App("bank")
    paid = app.topic("paid", key=str, value=Order)
    bank = app.database("sqlite:///never.db", schema="CREATE TABLE IF NOT EXISTS account (id TEXT)", **way)
    with TestApp(app) as t:
        with app.transaction(bank) as tx:
            tx.execute("INSERT INTO account (id) VALUES ('ann')")
            tx.send(paid.record("ann", Order(1, 2)))
        t.settle()
        assert [item.key for item in t.sent(paid)] == ["ann"]
        assert t.query("SELECT id FROM account") == [("ann",)]


def bank_of(**declared: Any) -> tuple[App, Any, Any]:
    """An app with a database that a transaction could be opened on, and what opens one in a coroutine."""
    app = App("bank")
    schema = "CREATE TABLE IF NOT EXISTS account (id TEXT)"
    bank = app.database("sqlite:///never.db", schema=schema, outbox=True)
    orders = app.topic("orders", key=str, value=Order)

    async def apart(item: Any) -> None:
        async with app.transaction(bank) as tx:
            await tx.execute("INSERT INTO account (id) VALUES (?)", (item.key,))

    def apart_sync(item: Any, db: Any = None) -> None:
        with app.transaction(bank) as tx:
            tx.execute("INSERT INTO account (id) VALUES ('ann')")

    if "sink" in declared:
        app.sink(orders, bank, name="apart")(apart_sync)
    elif "endpoint" in declared:
        app.post("/orders", request=Order)(lambda order: apart_sync(order))
    else:
        app.processor(orders, name="apart", **declared)(apart)
        if "concurrency" not in declared:
            app.processor(orders, name="apart_sync", **declared)(apart_sync)
    return app, orders, bank


@pytest.mark.parametrize(
    ("declared", "instead", "times"),
    [
        ({}, "Yield records, and let a sink write them", 2),
        ({"concurrency": 4}, "Yield records, and let a sink write them", 1),
        ({"sink": True}, r"Write with what the handler is given, and send with enqueue_in", 1),
    ],
)
def test_a_handler_that_may_run_again_commits_nothing_apart(declared: Any, instead: str, times: int) -> None:
    app, orders, bank = bank_of(**declared)
    with TestApp(app, raise_errors=False) as t:
        t.send(orders, "ann", Order(1, 1))
        assert len(t.parked()) == times
        for item in t.parked():
            assert re.search(f"the handler of .* may run again, .*{instead}", item.message)
        assert t.query("SELECT id FROM account") == []
        with app.transaction(bank) as tx:  # What the test does itself is no handler's.
            tx.execute("INSERT INTO account (id) VALUES ('bob')")
        assert t.query("SELECT id FROM account") == [("bob",)]


def test_an_endpoint_that_may_run_again_commits_nothing_apart() -> None:
    app, _, _ = bank_of(endpoint=True)
    with TestApp(app) as t, pytest.raises(ConfigurationError, match=r"may run again, .*with app.idempotency"):
        t.post("/orders", Order(1, 1))


def test_a_processor_that_says_what_a_crash_may_cost_may_commit_apart() -> None:
    app, orders, _ = bank_of(delivery="at-least-once")
    with TestApp(app, raise_errors=False) as t:
        t.send(orders, "ann", Order(1, 1))
        assert t.query("SELECT id FROM account") == [("ann",)]
        [parked] = t.parked()
        assert "write 'async with" in parked.message, "of the one without await"

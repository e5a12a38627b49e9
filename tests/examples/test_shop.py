"""The shop as its own team would test it: handlers alone, then the whole app in memory."""

from __future__ import annotations

import pytest

from semel import Problem
from semel.examples.shop import Order, Taken, app, inventory, orders, place, reserve, sku
from semel.testing import TestApp, record

ORDER = Order(id=1, customer_id="00001", cds=3, cents=2976)

# --- Handlers alone: no Kafka, no app ---


def test_an_order_is_kept_under_its_customer() -> None:
    [effect] = list(place(ORDER))
    assert (effect.topic, effect.key, effect.value) == (orders, "00001", ORDER)


def test_an_order_without_a_cd_is_refused() -> None:
    with pytest.raises(Problem, match="at least one CD"):
        list(place(Order(id=1, customer_id="00001", cds=0, cents=0)))


def test_each_cd_is_reserved_by_itself() -> None:
    effects = list(reserve(record(orders, "00001", ORDER)))
    assert [effect.value for effect in effects] == [Taken(1, number, sku(1, number)) for number in range(3)]
    assert all(effect.key == effect.value.sku for effect in effects)


# --- The whole app ---


def test_an_order_ends_in_the_tables() -> None:
    with TestApp(app, replay=True) as t:
        assert t.post("/orders", ORDER).status == 201
        t.assert_sent(inventory, times=3)
        assert t.query("SELECT * FROM customer_totals") == [("00001", 1, 3, 2976)]
        assert t.query("SELECT sum(taken) FROM stock") == [(3,)]


def test_a_retry_changes_nothing() -> None:
    with TestApp(app) as t:
        first = t.post("/orders", ORDER, key="line-1")
        t.restart()
        again = t.post("/orders", ORDER, key="line-1")
        assert (again.status, again.body, again.is_replayed) == (first.status, first.body, True)
        assert t.query("SELECT orders, cds FROM customer_totals") == [(1, 3)]


def test_a_day_later_the_key_is_free() -> None:
    with TestApp(app) as t:
        t.post("/orders", ORDER, key="line-1")
        t.advance(25 * 3_600)
        assert not t.post("/orders", ORDER, key="line-1").is_replayed


def test_an_order_that_cannot_be_is_answered_and_leaves_nothing() -> None:
    with TestApp(app) as t:
        assert t.post("/orders", {"id": 1, "customer_id": "00001", "cds": 0, "cents": 0}).status == 422
        assert t.post("/orders", {"id": "one"}).status == 422
        assert t.sent(orders) == []


def test_totals_add_up_over_many_orders() -> None:
    with TestApp(app) as t:
        made = [Order(number, f"{number % 5:05}", 1 + number % 3, 100 * number) for number in range(60)]
        t.send_many(orders, [(order.customer_id, order) for order in made])
        assert t.query("SELECT sum(orders), sum(cds), sum(cents) FROM customer_totals") == [
            (60, sum(order.cds for order in made), sum(order.cents for order in made))
        ]
        assert t.query("SELECT sum(taken) FROM stock") == [(sum(order.cds for order in made),)]

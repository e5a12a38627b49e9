"""The guarantee report: each promise that is weaker than one may think has its reason, and `require` is held."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from semel import App, Created
from semel.client.two_phase import TwoPhaseMode
from semel.errors import ConfigurationError
from semel.ops.guarantees import check_required, edges_of, report
from semel.settings import Settings


class Order(msgspec.Struct):
    id: int


def shop(*, require: Any = None, require_key: bool = True, principal: Any = None) -> App:
    app = App("shop", require=require)
    orders = app.topic("orders", value=Order)
    counts = app.state("counts", key=str, value=int)
    database = app.database("postgresql://user@host/shop")

    @app.post("/orders", request=Order, require_key=require_key, principal=principal)
    def place(order: Order) -> Any:
        yield orders.record("k", order)
        return Created({})

    @app.processor(orders, state=counts)
    def count(record: Any, counts: Any) -> Any:
        yield counts.put("k", 1)

    @app.sink(orders, database)
    def rows(records: Any, db: Any) -> None:
        db.execute("SELECT 1")

    return app


def test_every_edge_says_what_is_atomic_what_fences_and_what_removes_duplicates() -> None:
    endpoint, processor, sink = edges_of(shop(), 2)
    assert endpoint.edge == "POST /orders -> shop.requests"
    assert "Idempotency-Key" in endpoint.dedup
    assert "shop.requests.*" in endpoint.fence
    assert processor.edge == "orders -> count"
    assert "state counts" in processor.atomic_unit
    assert sink.edge == "orders -> rows (PostgreSQL)"
    assert "owner_epoch" in sink.fence
    assert all(edge.as_json()["exactly_once"] for edge in (endpoint, processor, sink))


def test_an_endpoint_without_a_principal_shares_its_responses() -> None:
    retention, shared = edges_of(shop(), 2)[0].weakened
    assert "principal=" in shared
    assert edges_of(shop(principal=lambda request: "me"), 2)[0].weakened == (retention,)


def test_what_reads_from_a_group_is_told_how_long_kafka_keeps_its_offsets() -> None:
    endpoint, processor, sink = edges_of(shop(principal=lambda request: "me"), 2)
    assert "offsets.retention.minutes" in endpoint.weakened[0]
    assert endpoint.weakened == processor.weakened
    assert sink.weakened == (), "a sink's position is in its database"


def test_an_older_transaction_protocol_is_told_and_is_still_exactly_once() -> None:
    edges = edges_of(shop(), 1)
    assert "transaction.version is 1" in edges[1].weakened[0]
    assert edges[1].breaks == ()
    check_required(shop(require="exactly-once"), edges)


def test_what_breaks_exactly_once_is_refused_only_where_it_is_required() -> None:
    loose = shop(require_key=False)
    edge = edges_of(loose, 2)[0]
    assert edge.as_json()["exactly_once"] is False
    assert set(edge.breaks) <= set(edge.weakened), "what refuses to start is also told"
    check_required(loose, edges_of(loose, 2))
    strict = shop(require="exactly-once", require_key=False)
    with pytest.raises(ConfigurationError, match=r"POST /orders.*require_key=False.*drop require="):
        check_required(strict, edges_of(strict, 2))


def test_the_report_asks_the_cluster_for_its_transaction_version(embedded: Any, embedded_v1: Any) -> None:
    def notes(kafka: str) -> str:
        return " ".join(asyncio.run(report(shop(), Settings(kafka=kafka)))[1].weakened)

    assert "was not asked" in notes("")
    assert "transaction.version" not in notes(embedded.bootstrap)
    assert "transaction.version is 1" in notes(embedded_v1.bootstrap)


@pytest.mark.parametrize("delivery", ["at-least-once", "at-most-once"])
def test_a_weaker_delivery_is_named_with_what_it_costs_and_refused_where_exactly_once_is_required(
    delivery: Any,
) -> None:
    app = App("shop", require="exactly-once")
    orders = app.topic("orders", value=Order)
    app.processor(orders, name="copy", delivery=delivery)(lambda record: None)
    (edge,) = edges_of(app, 2)
    assert edge.atomic_unit.startswith("none")
    assert edge.as_json()["exactly_once"] is False
    assert any(delivery in reason for reason in edge.weakened)
    with pytest.raises(ConfigurationError, match=delivery):
        check_required(app, [edge])


@pytest.mark.parametrize("delivery", ["at-least-once", "at-most-once"])
def test_the_same_for_a_sink(delivery: Any) -> None:
    app = App("shop", require="exactly-once")
    orders = app.topic("orders", value=Order)
    app.sink(orders, app.database("sqlite:///x.db"), name="rows", delivery=delivery)(lambda records, db: None)
    (edge,) = edges_of(app, 2)
    assert edge.atomic_unit.startswith("two database transactions")
    with pytest.raises(ConfigurationError, match=delivery):
        check_required(app, [edge])


def test_an_outbox_is_an_edge_of_its_own() -> None:
    app = App("bank", require="exactly-once")
    app.database("sqlite:///bank.db", name="accounts", outbox=True)
    app.database("sqlite:///other.db", name="other")
    (edge,) = edges_of(app, 2)
    assert edge.edge == "transactions on accounts (SQLite) -> outbox -> their topics"
    assert edge.atomic_unit.startswith("one database transaction: rows, records")
    assert not any("handler" in reason for reason in edge.weakened)
    check_required(app, [edge])  # What is told does not break exactly-once.


def test_a_transaction_inside_of_a_handler_is_told_to_run_again() -> None:
    app = App("bank")
    app.database("sqlite:///bank.db", outbox=True)
    topic = app.topic("orders", key=str, value=str)

    @app.processor(topic)
    def work(record: object) -> None: ...

    reasons = next(edge for edge in edges_of(app, 2) if "outbox" in edge.edge).weakened
    assert any("again when the handler runs again" in reason for reason in reasons)


def dual(**declared: Any) -> App:
    app = App("bank", require=declared.pop("require", None))
    app.database("postgresql://user@host/bank", name="accounts", **declared)
    return app


def test_a_dual_write_says_which_plan_it_has_and_why() -> None:
    (full,) = edges_of(dual(dual_write=True), 2, TwoPhaseMode.FULL)
    assert full.edge == "transactions on accounts (PostgreSQL) -> dual write -> their topics"
    assert "the broker keeps prepared transactions" in full.atomic_unit
    assert "bank.dual.accounts.*" in full.fence
    assert not full.breaks
    (refused,) = edges_of(dual(dual_write=True), 2, TwoPhaseMode.UNSUPPORTED)
    assert "cannot be done on this Kafka" in refused.breaks[0]
    (outbox,) = edges_of(dual(dual_write=True, outbox=True), 2, TwoPhaseMode.UNSUPPORTED)
    assert "-> outbox ->" in outbox.edge
    assert outbox.weakened[0].startswith("the outbox is used, because the broker cannot do the dual write")
    assert not outbox.breaks
    (asked,) = edges_of(dual(dual_write=True), None)
    assert "was not asked" in asked.weakened[0]


def test_the_condition_of_the_conditional_dual_write_is_stated_and_breaks_exactly_once() -> None:
    conditional = dual(dual_write="conditional", require="exactly-once")
    (edge,) = edges_of(conditional, 2, TwoPhaseMode.UNSUPPORTED)
    assert "conditional dual write" in edge.edge
    assert "within 15 minutes" in edge.breaks[0]
    with pytest.raises(ConfigurationError, match="within 15 minutes"):
        check_required(conditional, [edge])
    (granted,) = edges_of(conditional, 2, TwoPhaseMode.NO_RECOVERY)
    assert not granted.breaks, "where no transaction times out there is no condition"
    (v1,) = edges_of(conditional, 1, TwoPhaseMode.TRANSACTIONS_V1)
    assert "transaction.version below 2" in v1.breaks[0]


def test_the_report_asks_the_broker_what_it_offers(embedded: Any, embedded_v1: Any) -> None:
    for address, said in ((embedded, "dual write"), (embedded_v1, "outbox")):
        (edge,) = asyncio.run(report(dual(dual_write=True, outbox=True), Settings(kafka=address.bootstrap)))
        assert f"-> {said} ->" in edge.edge


def test_stores_that_are_no_database_say_what_decides_and_what_has_no_order() -> None:
    app = App("bank")
    app.cache("valkey://host/0", dual_write=True)
    app.documents("mongodb://host/bank")
    cache, documents = edges_of(app, 2, TwoPhaseMode.FULL)
    assert cache.edge == "transactions on cache (Valkey) -> dual write -> their topics"
    assert "one script of cache: what was read is unchanged, conditions" in cache.atomic_unit
    assert any("those that only count have no order" in reason for reason in cache.weakened)
    assert any("a fail-over to a replica loses" in reason for reason in cache.weakened)
    assert documents.edge == "transactions on documents (MongoDB's protocol) -> dual write -> their topics"
    assert "one new document of documents, which holds its name and decides" in documents.atomic_unit
    assert any("have no order" in reason for reason in documents.weakened)
    refused = edges_of(app, 2, TwoPhaseMode.NO_RECOVERY)
    assert all(edge.breaks for edge in refused)

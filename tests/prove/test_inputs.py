"""What is sent into an app: its plan's inputs, or made-up ones, the same for the same seed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from random import Random
from typing import Any

import msgspec
import pytest

from semel import App, Created
from semel.errors import ConfigurationError
from semel.examples import shop, shop_proof
from semel.prove.inputs import InputSource, source_topics
from semel.prove.plan import ProofPlan, Request, SourceRecord


class Payment(msgspec.Struct):
    cents: int


app = App("till")
payments = app.topic("payments", key=str, value=Payment)
receipts = app.topic("receipts", key=str, value=Payment)
refunds = app.topic("refunds", key=int, value=Payment)
unread = app.topic("unread", key=str, value=Payment)
database = app.database("sqlite:///till.db")


def receipt(payment: Payment) -> Any:
    return [receipts.record("all", payment) for _ in range(2)]


@app.processor(payments)
def pay(record: Any) -> Any:
    yield from receipt(record.value)


@app.sink(receipts, database)
def rows(records: Any, db: Any) -> None: ...


@app.post("/tills/{till}/refunds", request=Payment)
def refund(payment: Payment, till: str) -> Any:
    def give() -> Any:
        yield refunds.record(1, payment)

    yield from give()
    return Created({})


@app.sink(refunds, database)
def refund_rows(records: Any, db: Any) -> None: ...


def test_source_topics_are_those_that_no_handler_names() -> None:
    assert source_topics(app) == [payments]
    assert source_topics(shop.app) == []


def test_inputs_are_made_up_from_types_and_by_the_seed() -> None:
    source = InputSource(app, None, 7)
    assert source.chosen[:2] == [
        "inputs: made up for POST /tills/{till}/refunds (Payment)",
        "inputs: made up for topic payments (Payment)",
    ]
    jobs = list(islice(source.jobs("run"), 300))
    assert jobs == list(islice(InputSource(app, None, 7).jobs("run"), 300))
    assert jobs != list(islice(InputSource(app, None, 8).jobs("run"), 300))
    assert len({job.key for job in jobs}) == 300
    for job in jobs:
        assert isinstance(msgspec.json.decode(job.body, type=Payment), Payment)
        if job.topic:
            assert job.topic == "payments"
            assert job.record_key is not None
        else:
            assert b"{" not in job.data.split(b"\r\n")[0]
    assert {job.topic for job in jobs} == {"payments", ""}


def test_the_plan_decides_where_there_is_one() -> None:
    source = InputSource(shop.app, shop_proof.plan, 1, name="shop_proof:plan")
    assert source.chosen == ["inputs: the proof plan shop_proof:plan"]
    orders = [msgspec.json.decode(job.body, type=shop.Order) for job in islice(source.jobs("r"), 150_000)]
    assert len({order.id for order in orders}) == 150_000


def plan_of(*items: Any) -> InputSource:
    def inputs(_: Random) -> Iterator[Any]:
        for item in items:
            if isinstance(item, Exception):
                raise item
            yield item

    return InputSource(app, ProofPlan(inputs), 1)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (SourceRecord("paymnts", "a", Payment(1)), "input 0 of the proof plan cannot be sent: the app has no topic"),
        (SourceRecord("payments", 1, Payment(1)), "declared as str, got int"),
        (Request("POST", "/tills/a\r\nX: y/refunds", {}), "line break"),
        (Request("POST", "/tills/1/refunds", object()), "cannot be sent"),
        (Request("POST", "/til", {}), "the app has no endpoint POST /til"),
        ("no input", "neither a Request nor a SourceRecord"),
        (KeyError("cents"), "the proof plan failed after 0 inputs: KeyError: 'cents'"),
    ],
)
def test_a_plan_that_cannot_be_followed_is_told(item: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        list(plan_of(item).jobs("run"))


def test_an_app_that_takes_nothing_from_outside_needs_a_plan() -> None:
    loop = App("loop")
    numbers = loop.topic("numbers", key=str, value=int)

    @loop.processor(numbers)
    def more(record: Any) -> Any:
        yield numbers.record("k", record.value + 1)

    with pytest.raises(ConfigurationError, match="Write a proof plan"):
        InputSource(loop, None, 1)

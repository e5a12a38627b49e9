"""What the history tells of units of work, and the header that says where each output came from."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from semel import Created, history
from semel.app import App
from semel.env import Env
from semel.errors import AbortTransaction, Fatal, Fenced, OutcomeUnknown, Retriable
from semel.history import PROOF, Event, Unit, UnitInput, UnitParked
from semel.ingress.owner import owner_component
from semel.ingress.requests import STORE, Request, requests_topic, responses_topic, write
from semel.processing.component import park_topic, state_topic
from semel.processing.effects import Write
from semel.types import Record, TopicPartition
from tests.processing import test_engine
from tests.processing.fake_kafka import FakeKafka
from tests.processing.test_engine import app_with, copy, engine_of, kafka_with, process, run_until
from tests.processing.test_handling import component


@pytest.fixture(autouse=True)
def _quick(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # What is there at the start is one unit, however slow the machine is.
    monkeypatch.setattr(test_engine, "SETTINGS", replace(test_engine.SETTINGS, commit_interval_ms=5_000))


@pytest.fixture
def events() -> Iterator[list[Event]]:
    with history.captured() as found:
        yield found


def proofs(records: list[Record]) -> list[list[str]]:
    """The header of each record, cut in pieces; every record has exactly one."""
    found = []
    for record in records:
        [value] = [value for name, value in record.headers if name == PROOF]
        assert value is not None
        found.append(value.decode().split("|"))
    return found


def told(events: list[Event]) -> list[tuple[str, list[int]]]:
    """Each unit's outcome, or `open`, with the offsets of its inputs; in order."""
    units: dict[str, Unit] = {}
    outcomes: dict[str, str] = {}
    for event in events:
        assert isinstance(event, Unit)
        if event.type == "invoke":
            assert event.a not in units
            units[event.a] = event
        else:
            assert event.a in units
            assert event.a not in outcomes
            outcomes[event.a] = event.type
    return [
        (outcomes.get(a, "open"), sorted(offset for part in unit.inputs for offset in part.offsets))
        for a, unit in units.items()
    ]


def two_of(record: Any, target: Any) -> Any:
    """As many outputs as the value says, one of them without a key."""
    for number in range(record.value % 3):
        yield target.record(record.key if number else "other", record.value)


def test_a_commit_is_told_with_its_inputs_and_every_output_says_where_it_is_from(events: list[Event]) -> None:
    kafka = kafka_with(6)
    process(kafka, app_with(two_of))
    invoke, done = events
    assert isinstance(invoke, Unit)
    assert (invoke.component, invoke.transactional_id) == ("p", "a.p.test.0")
    assert sorted(invoke.inputs) == [UnitInput("in", 0, [0, 1, 2, 3], [0, 2, 1, 2]), UnitInput("in", 1, [0, 1], [1, 0])]
    assert done == Unit(t=done.t, type="ok", a=invoke.a)
    assert invoke.t < done.t
    wanted = [
        [invoke.a, part.topic, str(part.partition), str(offset), str(j), str(count)]
        for part in invoke.inputs
        for offset, count in zip(part.offsets, part.outputs, strict=True)
        for j in range(count)
    ]
    assert sorted(proofs(kafka.records("out"))) == sorted(wanted)


def test_the_outputs_of_a_batch_are_its_last_inputs_and_a_failing_record_is_told_apart(events: list[Event]) -> None:
    def double(target: Any) -> Any:
        def handle(records: Any) -> Any:
            for record in records:
                if record.value < 0:
                    raise ValueError("not this one")
                yield target.record(record.key, record.value)
                yield target.record(record.key, record.value)

        return handle

    kafka = kafka_with(0)
    for number, value in enumerate((b"0", b"1", b"2", b"3", b"-4", b"5", b"6", b"7")):
        kafka.append("in", b"k%d" % number, value)
    process(kafka, component(double, batch=True))
    invoke = events[0]
    assert isinstance(invoke, Unit)
    # Halved twice: 0 to 3 went well together, 4 is parked, 5 by itself, 6 and 7 together.
    assert invoke.inputs == [UnitInput("in", 0, [0, 1, 2, 3, 5, 6, 7], [0, 0, 0, 8, 2, 0, 4])]
    assert [parked.offset for parked in invoke.parked] == [4]
    wanted = [("3", str(j), "8") for j in range(8)] + [("5", "0", "2"), ("5", "1", "2")]
    wanted += [("7", str(j), "4") for j in range(4)]
    assert sorted((p[3], p[4], p[5]) for p in proofs(kafka.records("out"))) == sorted(wanted)


@pytest.mark.parametrize("call", ["begin", "produce", "send_offsets"])
@pytest.mark.parametrize("error", [AbortTransaction("a"), Retriable("r"), OutcomeUnknown("u")])
def test_before_the_commit_was_asked_for_every_failure_is_certain(
    events: list[Event], call: str, error: Exception
) -> None:
    kafka = kafka_with(4)
    kafka.fail(call, error)
    process(kafka, app_with(copy))
    assert told(events) == [("fail", [0, 0, 1, 1]), ("ok", [0, 0, 1, 1])]
    assert {proof[0] for proof in proofs(kafka.records("out"))} == {events[-1].a}


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(AbortTransaction("a"), "fail"), (OutcomeUnknown("u"), "info"), (Retriable("r"), "info")],
)
def test_an_end_is_told_as_the_client_tells_it(events: list[Event], error: Exception, outcome: str) -> None:
    kafka = kafka_with(4)
    kafka.fail("end", error)
    process(kafka, app_with(copy))
    assert told(events) == [(outcome, [0, 0, 1, 1]), ("ok", [0, 0, 1, 1])]


def test_a_commit_whose_answer_was_lost_is_unknown_and_is_not_done_again(events: list[Event]) -> None:
    kafka = kafka_with(4)
    kafka.fail("after_end", OutcomeUnknown("the answer was lost"))
    process(kafka, app_with(copy))
    assert told(events) == [("info", [0, 0, 1, 1])]
    assert {proof[0] for proof in proofs(kafka.records("out"))} == {events[0].a}


@pytest.mark.parametrize(("call", "outcome"), [("produce", "fail"), ("end", "info")])
@pytest.mark.parametrize("error", [Fenced("f"), Fatal("f")])
def test_a_fenced_unit_failed_unless_its_commit_was_asked_for(
    events: list[Event], call: str, outcome: str, error: Exception
) -> None:
    """A commit may have been carried out before another owner took over: the fence does not tell."""
    kafka = kafka_with(4)
    kafka.fail(call, error)
    with pytest.raises(type(error)):
        process(kafka, app_with(copy))
    assert told(events) == [(outcome, [0, 0, 1, 1])]


def test_a_cancelled_commit_is_unknown(events: list[Event]) -> None:
    kafka = kafka_with(2)
    kafka.fail("end", asyncio.CancelledError())

    async def cancelled() -> None:
        with pytest.raises(asyncio.CancelledError):
            await run_until(engine_of(kafka, app_with(copy)), lambda: False)

    asyncio.run(cancelled())
    assert told(events)[0] == ("info", [0, 0])


def test_a_parked_input_is_told_apart_and_its_copy_says_so(events: list[Event]) -> None:
    def refuse(record: Any, target: Any) -> Any:
        if record.value == 0:
            raise ValueError("zero")
        yield target.record(record.key, record.value)

    kafka = kafka_with()
    inherited = [(PROOF, b"older|x|0|0|0|1"), ("other", b"1")]
    kafka.append("in", b"k", b"0", headers=inherited)
    kafka.append("in", b"k", b"1", headers=inherited)
    kafka.append("in", b"free", b"2", headers=inherited)
    process(kafka, app_with(refuse))
    [invoke, _] = events
    assert isinstance(invoke, Unit)
    assert invoke.parked == [UnitParked("in", 0, 0), UnitParked("in", 0, 1)]
    assert invoke.inputs == [UnitInput("in", 0, [2], [1])]
    parked = kafka.records("a.semel.park.in")
    assert proofs(parked) == [[invoke.a, "in", "0", str(offset), "0", "1", "parked"] for offset in (0, 1)]
    assert all(("other", b"1") in record.headers for record in parked)
    assert proofs(kafka.records("out")) == [[invoke.a, "in", "0", "2", "0", "1"]]


def test_an_output_that_passes_its_inputs_headers_on_has_one_header_all_the_same(events: list[Event]) -> None:
    def passing(record: Any, target: Any) -> Any:
        yield Write("out", b"k", b"1", record.headers)

    kafka = kafka_with()
    kafka.append("in", b"k", b"1", headers=[(PROOF, b"older|x|0|0|0|1")])
    process(kafka, app_with(passing))
    assert proofs(kafka.records("out")) == [[events[0].a, "in", "0", "0", "0", "1"]]


def test_changelogs_have_no_header_and_positions_alone_are_told(events: list[Event]) -> None:
    def count(record: Any, counts: Any, target: Any) -> Any:
        yield App("a").state("counts", key=str, value=int).put(record.key, 1)

    kafka = kafka_with(3)
    process(kafka, app_with(count, state=True))
    assert [record.headers for record in kafka.records("a.semel.state.counts")] == [()] * 3
    assert told(events) == [("ok", [0, 0, 1])]


def test_a_unit_that_is_thrown_away_leaves_no_trace_and_its_attempt_is_not_used_again(events: list[Event]) -> None:
    kafka = kafka_with(4)
    at = TopicPartition("in", 0)

    async def lose() -> None:
        assert kafka.consumer_made is not None
        await kafka.consumer_made.lose(at)
        kafka.consumer_made.own.remove(at)

    engine = engine_of(kafka, app_with(copy))
    assert kafka.consumer_made is not None
    kafka.consumer_made.script = [lose]
    asyncio.run(run_until(engine, lambda: kafka.committed.get(TopicPartition("in", 1)) == 2))
    assert told(events) == [("ok", [0, 1])]


def test_replies_and_outputs_of_requests_say_which_request_they_are_from(events: list[Event]) -> None:
    app = App("shop")
    orders = app.topic("orders", key=str, value=int)

    @app.post("/orders", request=int)
    def place(order: int) -> Any:
        yield orders.record("k", order)
        return Created({"order": order})

    kafka = FakeKafka(orders=2)
    requests = requests_topic("shop")
    for name in (requests, responses_topic("shop"), state_topic("shop", STORE), park_topic("shop", requests)):
        kafka.create(name, 1)
    request = Request(b"i" * 16, 1, 0, "POST /orders", "application/json", b"7")
    kafka.append(requests, b"key", write(request))
    kafka.append(requests, b"key", write(request))
    component = owner_component("shop", app.endpoints.values(), wall_ms=Env().wall_ms)
    process(kafka, component, lambda: kafka.lag(requests) == 0)
    a = events[0].a
    assert proofs(kafka.records("orders")) == [[a, requests, "0", "0", "0", "2"]]
    assert proofs(kafka.records(responses_topic("shop"))) == [
        [a, requests, "0", "0", "1", "2"],
        [a, requests, "0", "1", "0", "1"],  # The second asks again: only its reply.
    ]
    assert [record.headers for record in kafka.records(state_topic("shop", STORE))] == [()]


def test_off_nothing_is_added() -> None:
    kafka = kafka_with(4)
    engine = process(kafka, app_with(copy))
    assert [record.headers for record in kafka.records("out")] == [()] * 4
    assert engine._unit.provenance is None

"""The quick way in C takes records as `handling.py` does without it: the same outputs, parked records and calls."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from semel import history
from semel.app import App
from semel.env import Env
from semel.errors import Fenced, Retriable
from semel.failpoints import arm_failpoints
from semel.processing import quick as module
from semel.processing.handling import Handling
from semel.processing.inputs import Input, Inputs
from semel.processing.limits import OUTPUT_BYTES_MAX
from semel.processing.measures import Measures
from semel.processing.metrics import Metrics
from semel.processing.parklog import ParkLog
from semel.processing.stores import Stores
from semel.types import Record
from tests.services.extensions import compiled


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return compiled("semel/processing/_quick", tmp_path_factory.mktemp("quick")).run


class Order(msgspec.Struct):
    what: str
    number: int = 0


class Kafka:
    async def partitions(self, _topic: str) -> int:
        return 3


WHAT = [
    *("one", "one", "one", "two", "none", "headers", "keyless", "tombstone", "other topic", "raises", "returns"),
    *("not an effect", "wrong value", "wrong key", "surrogate", "large", "list", "single", "async", "many", "nothing"),
    *("late", "bytes"),
]
VALUES = st.sampled_from(WHAT).map(lambda what: msgspec.json.encode(Order(what, 7))) | st.sampled_from(
    [b"{}", b"\xff", b"", b'{"what": 1}', None]
)
KEYS = st.sampled_from([b"a", b"b", b"c", b"\xff", None])
RECORDS = st.lists(st.tuples(st.integers(0, 2), KEYS, VALUES, st.integers(1, 2)), max_size=30)


def ran(records: list[Record], run: Any, until: float = 100.0) -> dict[str, Any]:
    """Everything that came of records, with `run` as the quick way or None without it."""
    calls: list[Any] = []
    app = App("a")
    source = app.topic("in", key=str, value=Order)
    target = app.topic("out", key=str, value=Order)
    raw = app.topic("raw", key=bytes, value=bytes)
    numbers = app.topic("numbers", key=str, value=int)

    def strange(record: Any) -> Any:
        what = record.value.what
        return {
            "headers": target.record("k", Order("x"), headers=[("h", b"1")]),
            "keyless": target.record(None, Order("x")),
            "tombstone": target.record("k", None),
            "other topic": numbers.record("n", 5),
            "not an effect": "something",
            "wrong value": target.record("k", 5),  # type: ignore[arg-type]
            "wrong key": target.record(5, Order("x")),  # type: ignore[arg-type]
            "surrogate": target.record("\ud800", Order("x")),
            "large": target.record("k", Order("x" * OUTPUT_BYTES_MAX)),
            "bytes": raw.record(b"\xff", b"\xfe"),
        }.get(what)

    async def waited() -> Any:
        await asyncio.sleep(0)
        return [target.record("waited", Order("x"))]

    def yielding(record: Any) -> Any:
        what = record.value.what
        yield target.record(record.key, Order(what, record.value.number + 1))
        if what == "raises":
            raise ValueError("no")
        if what == "many":
            for number in range(1_100):
                yield target.record(f"k{number}", Order("x"))
        if what == "returns":
            return target.record("k", Order("x"))
        found = strange(record)
        if what == "two" or found is not None:
            yield found or target.record("second", Order("x"))
        return None

    def handle(record: Any) -> Any:
        calls.append(tuple(record))
        if record.value is None:
            return None
        plain = {
            "none": None,
            "nothing": iter(()),
            "list": [target.record("l", Order("x")), numbers.record("l", 1)],
            "single": target.record("s", Order("x")),
        }
        what = record.value.what
        if what == "async":
            return waited()
        return plain[what] if what in plain else yielding(record)

    app.processor(source, name="p")(handle)
    inputs = Inputs("p", Measures(Metrics(), "p"))
    for number in range(3):
        inputs["in", number] = Input(0, 0, ParkLog("p"))
    later: list[str] = []
    before, module._run = module._run, run
    try:
        handling = Handling(
            *(app.components()[0], Kafka(), Env(wall_ms=lambda: 1), inputs, Stores(lambda: ("boot", 0.0))),  # type: ignore[arg-type]
            build="b",
            may_work=lambda: not later,
            later=later.append,
            may_commit=lambda: True,
        )
    finally:
        module._run = before
    assert (handling._quick is None) == (run is None)
    handling.pending = deque(records)
    unit = handling.new_unit()
    unit.now_ms = 1
    asyncio.run(handling.work(unit, time.monotonic() + until, 10_000))
    return {
        "calls": [[call[0], msgspec.to_builtins(call[1]), *call[2:]] for call in calls],
        # Headers of parked records say when and where it went wrong: not the same twice.
        "outputs": {
            topic: [
                (*output[:4], [item for item in output[4] if "semel.processing" not in str(item)][:1])
                for output in made
            ]
            for topic, made in unit.outputs.items()
            if made
        },
        "parked": {at: (sorted(parked.keys), parked.records) for at, parked in unit.parked.items()},
        "records": (unit.records, unit.size if not unit.parked else None, unit.last),
        "positions": {at: (held.position, held.stopped) for at, held in inputs.items()},
        "pending": list(handling.pending),
        "later": later,
    }


def records_of(drawn: list[tuple[int, bytes | None, bytes | None, int]]) -> list[Record]:
    ends = {0: 0, 1: 0, 2: 0}
    made = []
    for partition, key, value, step in drawn:
        ends[partition] += step
        made.append(Record("in", partition, ends[partition], 5, key, value, (("h", b"v"),)))
    return made


@given(RECORDS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_comes_the_quick_way_takes_it_as_the_other_does(native: Any, drawn: Any) -> None:
    logging.disable(logging.CRITICAL)
    try:
        records = records_of(drawn)
        assert ran(records, native) == ran(records, None)
    finally:
        logging.disable(logging.NOTSET)


def test_most_records_go_the_quick_way(native: Any) -> None:
    """All but the first of a topic, from which it is learned."""
    taken = 0

    def counting(*args: Any) -> Any:
        nonlocal taken
        try:
            return native(*args)
        finally:
            taken += args[-1][0]

    records = records_of([(0, b"k", msgspec.json.encode(Order("one")), 1)] * 500)
    assert ran(records, counting) == ran(records, None)
    assert taken == 499


def test_time_ends_it_after_a_record(native: Any) -> None:
    records = records_of([(0, b"k", msgspec.json.encode(Order("one")), 1)] * 50)
    found = ran(records, native, until=-1.0)
    assert found["records"][0] == 1
    assert len(found["pending"]) == 49


@pytest.mark.parametrize("error", [Retriable("away"), ConnectionError("away"), Fenced("no"), KeyboardInterrupt()])
def test_what_is_not_the_records_fault_keeps_what_was_done_before_it(native: Any, error: BaseException) -> None:
    seen: list[int] = []

    def run(*args: Any) -> Any:
        *_, progress = args
        if len(seen) > 5:
            seen.append(0)
            raise error
        result = native(*args[:8], (*args[8][:2], 3, *args[8][3:]), progress)
        seen.append(progress[0])
        return result

    records = records_of([(0, b"k", msgspec.json.encode(Order("one")), 1)] * 50)
    if isinstance(error, Retriable | ConnectionError):
        found = ran(records, run)
        done = found["records"][0]
        assert 0 < done < 50
        assert found["positions"]["in", 0] == (done + 1, "")
        assert len(found["calls"]) == done
    else:
        with pytest.raises(type(error)):
            ran(records, run)


def test_who_watches_every_record_sees_every_record(native: Any, tmp_path: Any) -> None:
    """Failpoints and a history have steps within a record."""

    def never(*_: Any) -> Any:
        raise AssertionError("the quick way was taken")

    records = records_of([(0, b"k", msgspec.json.encode(Order("one")), 1)] * 5)
    arm_failpoints("handler.after:delay=0:3")
    try:
        assert ran(records, never)["records"][0] == 5
    finally:
        arm_failpoints("")
    history.start(str(tmp_path), "worker", 0)
    try:
        assert ran(records, never)["records"][0] == 5
    finally:
        history.stop()

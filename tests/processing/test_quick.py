"""The quick way in C takes records as `handling.py` does without it: the same outputs, parked records and calls."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from semel import history
from semel.app import App
from semel.env import Env
from semel.errors import Fenced, Retriable
from semel.failpoints import FailpointRaised, arm_failpoints, failpoint
from semel.processing import effects as effects_module
from semel.processing import handling as handling_module
from semel.processing import quick as module
from semel.processing.handling import Handling
from semel.processing.inputs import Input, Inputs
from semel.processing.limits import OUTPUT_BYTES_MAX
from semel.processing.measures import Measures
from semel.processing.metrics import Metrics
from semel.processing.parklog import ParkLog
from semel.processing.stores import Stores
from semel.types import Record


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


def ran(
    records: list[Record], run: Any, until: float = 100.0, *, armed: str = "", raising: BaseException | None = None
) -> dict[str, Any]:
    """Everything that came of records, with `run` as the quick way or None without it.

    The handler raises `raising` when it sees the value "trouble", and failpoints are `armed`.
    """
    calls: list[Any] = []
    hits: list[str] = []
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
        if what == "trouble" and raising is not None:
            raise raising
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
        env = Env(wall_ms=lambda: 1, monotonic=lambda: 0.0)  # No slice ends, whatever the machine does beside.
        handling = Handling(
            *(app.components()[0], Kafka(), env, inputs, Stores(lambda: ("boot", 0.0))),  # type: ignore[arg-type]
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
    raised = ""
    try:
        if armed:
            arm_failpoints(f"*:count,{armed}")
        with pytest.MonkeyPatch.context() as patch:
            for place in (handling_module, effects_module):
                patch.setattr(place, "failpoint", lambda name: (hits.append(name), failpoint(name)))
            asyncio.run(handling.work(unit, until, 10_000))
    except (FailpointRaised, asyncio.CancelledError, Fenced) as error:
        raised = repr(error)
    finally:
        arm_failpoints("")
    if unit.provenance is not None:
        unit.provenance.begin("p", "id")
    return {
        "raised": raised,
        "hits": hits,
        "calls": [[call[0], msgspec.to_builtins(call[1]), *call[2:]] for call in calls],
        # Headers of parked records say when and where it went wrong: not the same twice.
        "outputs": {
            topic: [
                (
                    *output[:4],
                    [item for item in output[4] if item[0] == history.PROOF or "semel.processing" not in str(item)][:1],
                )
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


ARMED = st.sampled_from(["handler.before", "handler.between_effects", "handler.after", "handler.before_park"])
ARMED_AT = st.builds("{}:{}:{}".format, ARMED, st.sampled_from(["raise", "cancel", "delay=0"]), st.integers(1, 8))


@pytest.fixture
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@given(RECORDS)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.usefixtures("_quiet")
def test_whatever_comes_the_quick_way_takes_it_as_the_other_does(native: Any, drawn: Any) -> None:
    """Whoever watches sees the same, too: every failpoint in its order."""
    records = records_of(drawn)
    assert ran(records, native) == ran(records, None)


@given(RECORDS, ARMED_AT)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.usefixtures("_quiet")
def test_a_failpoint_strikes_there_and_leaves_what_it_leaves_in_the_other(native: Any, drawn: Any, armed: str) -> None:
    records = records_of(drawn)
    assert ran(records, native, armed=armed) == ran(records, None, armed=armed)


@given(RECORDS)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.usefixtures("_quiet")
def test_a_history_tells_the_same(native: Any, drawn: Any) -> None:
    """Which inputs were worked on, how many outputs each had, and in every output's header where it comes from."""
    records = records_of(drawn)
    told = []
    for run in (native, None):
        with history.captured(lambda: 0) as events:
            found = ran(records, run)
        told.append((found, [(type(event), msgspec.to_builtins(event)) for event in events]))
    assert told[0] == told[1]
    outputs = [output for made in told[0][0]["outputs"].values() for output in made]
    assert all(output[4] for output in outputs)


def counted(native: Any, taken: list[int]) -> Any:
    """The quick way, with the number of records that each of its calls took."""

    def run(*args: Any) -> Any:
        try:
            return native(*args)
        finally:
            taken.append(args[-1][0])

    return run


@pytest.mark.parametrize("watched", ["", "failpoints", "history"])
def test_most_records_go_the_quick_way_whoever_watches(native: Any, watched: str) -> None:
    """All but the first of a topic, from which it is learned."""
    taken: list[int] = []
    records = records_of([(0, b"k", msgspec.json.encode(Order("one")), 1)] * 500)
    armed = "handler.after:raise:501" if watched == "failpoints" else ""
    with history.captured() if watched == "history" else nullcontext():
        assert ran(records, counted(native, taken), armed=armed)["records"][0] == 500
    assert sum(taken) == 499


def test_time_ends_it_after_a_record(native: Any) -> None:
    records = records_of([(0, b"k", msgspec.json.encode(Order("one")), 1)] * 50)
    found = ran(records, native, until=-1.0)
    assert found["records"][0] == 1
    assert len(found["pending"]) == 49


@pytest.mark.parametrize("error", [Retriable("away"), ConnectionError("away"), Fenced("no"), KeyboardInterrupt()])
def test_what_is_not_the_records_fault_keeps_what_was_done_before_it(native: Any, error: BaseException) -> None:
    good, bad = (msgspec.json.encode(Order(what)) for what in ("one", "trouble"))
    records = records_of([(0, b"k", good, 1)] * 30 + [(0, b"k", bad, 1)] + [(0, b"k", good, 1)] * 5)
    if isinstance(error, KeyboardInterrupt):
        for run in (native, None):
            with pytest.raises(KeyboardInterrupt):
                ran(records, run, raising=error)
        return
    found = ran(records, native, raising=error)
    assert found == ran(records, None, raising=error)
    assert found["records"][0] == 30
    assert found["positions"]["in", 0] == (31, "")
    assert found["raised"] == ("Fenced('no')" if isinstance(error, Fenced) else "")

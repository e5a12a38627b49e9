"""A committed offset that goes back is not followed: what was done since then would be done again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from semel.env import Env
from semel.errors import ErrorCode, Retriable
from semel.processing.engine import Engine
from semel.processing.metrics import Metrics
from semel.processing.watermarks import Watermarks
from semel.testing import Answered, BrokerForTests
from semel.types import TopicPartition
from tests.processing.running import (
    PARTITIONS,
    check_counts,
    counting_app,
    drained,
    feed,
    prepare,
    read_all,
    settings_for,
    while_running,
)
from tests.processing.test_engine import app_with, copied, copy, engine_of, everything, kafka_with, run_until

AT = TopicPartition("orders", 2)


def told(watermarks: Watermarks, offset: int, topic: str = "cluster/orders/1", group: str = "g") -> bool:
    """Whether this offset is taken as it is."""
    try:
        watermarks.check(group, topic, {AT: offset})
    except Retriable:
        return False
    return True


def test_what_was_committed_is_known_and_nothing_else() -> None:
    watermarks = Watermarks()
    assert told(watermarks, -1)
    watermarks.note("g", "cluster/orders/1", 2, 10)
    watermarks.note("g", "cluster/orders/1", 2, 7)
    assert told(watermarks, 10)
    assert told(watermarks, 11)
    assert not told(watermarks, 9)
    assert not told(watermarks, -1), "a group whose offsets Kafka forgot must not start over"
    assert told(watermarks, 0, topic="cluster/orders/2"), "another topic of the same name begins anew"
    assert told(watermarks, 0, topic="other/orders/1"), "so does another cluster"
    assert told(watermarks, 0, group="h")


def test_the_error_says_what_to_do(tmp_path: Path) -> None:
    watermarks = Watermarks(tmp_path)
    watermarks.note("g", "t", 2, 10)
    with pytest.raises(Retriable, match=r"OFFSET_BACK: .* up to 10, and Kafka now says 4\..* 6 offsets again") as info:
        watermarks.check("g", "t", {AT: 4})
    assert f"remove {tmp_path / 'positions'}" in str(info.value)


def test_it_is_known_to_the_next_process_and_to_the_others(tmp_path: Path) -> None:
    async def live(process: str, offset: int) -> None:
        watermarks = Watermarks(tmp_path, process)
        async with watermarks.written():
            watermarks.note("g", "cluster/orders/1", 2, offset)

    asyncio.run(live("worker-0", 10))
    assert not told(Watermarks(tmp_path, "worker-0"), 9)
    assert not told(Watermarks(tmp_path, "worker-1"), 9)
    asyncio.run(live("worker-1", 8))
    assert not told(Watermarks(tmp_path, "worker-1"), 9), "the highest of all counts"
    assert told(Watermarks(tmp_path, "worker-1"), 10)
    assert sorted(path.name for path in (tmp_path / "positions").iterdir()) == ["worker-0.json", "worker-1.json"]


def test_a_file_that_cannot_be_read_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "positions").mkdir()
    (tmp_path / "positions" / "worker-1.json").write_text("{half")
    assert told(Watermarks(tmp_path, "worker-0"), 0)
    assert "worker-1.json cannot be read" in caplog.text


def test_it_is_written_while_the_worker_runs(tmp_path: Path) -> None:
    """A kill forgets a second of progress, not all of it."""

    async def live() -> None:
        watermarks = Watermarks(tmp_path, "worker-0")
        async with watermarks.written(), asyncio.timeout(10):
            watermarks.note("g", "cluster/orders/1", 2, 10)
            while told(Watermarks(tmp_path, "killed"), 9):
                await asyncio.sleep(0.02)

    asyncio.run(live())


# --- The engine ---


def test_the_engine_waits_until_the_offsets_are_back() -> None:
    kafka = kafka_with(50)
    engine = engine_of(kafka, app_with(copy))

    async def scenario() -> None:
        running = asyncio.create_task(run_until(engine, lambda: finished))
        async with asyncio.timeout(10):
            while kafka.lag("in"):
                await asyncio.sleep(0.001)
            now = dict(kafka.committed)
            kafka.committed.update(dict.fromkeys(now, 3))  # The coordinator replays old commits.
            kafka.fail("begin", Retriable("a coordinator that loads"))
            kafka.append("in", b"k", b"50", 0)
            asked = kafka.calls.count("committed_offsets")
            while kafka.calls.count("committed_offsets") < asked + 3:
                await asyncio.sleep(0.001)
            assert copied(kafka) == everything(50), "nothing is done again"
            kafka.committed.update(now)
            while kafka.lag("in"):
                await asyncio.sleep(0.001)
        finished.append(True)
        await running

    finished: list[bool] = []
    asyncio.run(scenario())
    assert copied(kafka) == everything(51)


def stale_offsets(broker: BrokerForTests, group: str, topic: str, offset: int) -> Answered:
    """An answer to OffsetFetch that a coordinator gives which has replayed only a part of its log."""
    partitions = [
        {"partition_index": number, "committed_offset": offset, "metadata": "", "error_code": ErrorCode.NONE}
        for number in range(PARTITIONS)
    ]
    topic_id = broker.call(lambda node: next(item.info.topic_id for item in node.topics if item.info.name == topic))
    topics = [{"name": topic, "topic_id": topic_id, "partitions": partitions}]
    return Answered({"groups": [{"group_id": group, "topics": topics, "error_code": ErrorCode.NONE}]})


def test_a_restarted_worker_does_not_follow_offsets_of_long_ago(semel_broker: BrokerForTests, tmp_path: Path) -> None:
    """As Apache Kafka 4.3.1 was seen to do after kill -9 on a busy machine; here the broker is told to."""
    bootstrap = semel_broker.bootstrap_servers
    app = counting_app("back")
    component = app.components()[0]
    [source] = component.inputs
    items = [(f"k{number % 20}", number) for number in range(300)]

    async def work(until: Callable[[], Awaitable[None]]) -> None:
        watermarks = Watermarks(tmp_path, "worker-0")
        settings = settings_for(bootstrap)
        engine = Engine(component, bootstrap, settings, Env(), Metrics(), watermarks=watermarks)
        async with watermarks.written():
            await while_running([engine], until)

    async def first() -> None:
        await feed(bootstrap, source, items[:200])
        await drained(bootstrap, component.group, source)

    async def second() -> None:
        await feed(bootstrap, source, items[200:])
        await asyncio.to_thread(rule.wait, 3)
        assert len(semel_broker.records("back.out")) == 200, "it must not go on before the offsets are back"
        rule.remove()
        await drained(bootstrap, component.group, source)

    asyncio.run(prepare(bootstrap, app))
    asyncio.run(work(first))
    stale = stale_offsets(semel_broker, component.group, source, 1)
    rule = semel_broker.control("OffsetFetch", stale, times=1_000, when=lambda request: request.require_stable)
    asyncio.run(work(second))
    check_counts(asyncio.run(read_all(bootstrap, "back.out", 3)), items)


def test_a_topic_that_was_made_again_is_known_by_its_other_id(tmp_path: Path) -> None:
    marks = Watermarks(tmp_path, "worker-0")
    marks.note("g", "cluster/in/old", 0, 41)
    assert marks.recreated("g", "cluster/in/old") == ""
    assert marks.recreated("g", "cluster/other/new") == ""
    assert marks.recreated("another", "cluster/in/new") == ""
    why = marks.recreated("g", "cluster/in/new")
    assert why.startswith("TOPIC_RECREATED: g was at offset 41 of old/0")
    assert "semel accept-gap" in why

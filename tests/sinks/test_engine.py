"""The engine's loop: what happens when the target, the group or the log is not as it should be."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from semel.databases import connect
from semel.env import Env
from semel.errors import ConfigurationError, Fatal
from semel.processing.metrics import Metrics
from semel.settings import Settings
from semel.sinks import engine as engine_module
from semel.sinks.contract import Applied, Claim, Slice, Stop, Unavailable
from semel.sinks.engine import SinkEngine
from semel.sinks.spec import SinkSpec
from semel.sinks.sql import SqlSink
from semel.types import TopicPartition
from tests.sinks import ledger
from tests.sinks.fake_source import FakeBatch, FakeSource
from tests.sinks.ledger import partition

Scenario = Callable[["Run"], Awaitable[None]]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/sink.db"


class FlakySink(SqlSink):
    """A SQL sink whose database can be away, before it works or after it did (an unanswered call)."""

    away = ""
    applied: list[list[Slice]]

    def apply(self, slices: Sequence[Slice]) -> Applied:
        if self.away == "before":
            raise Unavailable("the database is away")
        applied = super().apply(slices)
        if self.away == "after" and applied.transactions:
            raise Unavailable("the answer did not come")
        if slices:
            self.applied.append(list(slices))
        return applied

    def take_over(self, claims: Sequence[Claim]) -> dict[TopicPartition, int | Stop]:
        if self.away:
            raise Unavailable("the database is away")
        return super().take_over(claims)


class Run:
    """An engine over a source in memory and a real SQLite file."""

    def __init__(self, url: str, folder: Path, **changes: Any) -> None:
        self.url = url
        self.source = FakeSource()
        self.spec: SinkSpec = ledger.spec(url, **({"linger_ms": 0} | changes))
        self.metrics = Metrics()
        self.sink: FlakySink
        self.engine = SinkEngine(
            "shop",
            self.spec,
            "",
            Settings(data=folder, instance="one"),
            Env(rng=random.Random(1)),
            self.metrics,
            source=self.source,
            make_sink=self._make_sink,
        )

    def _make_sink(self, cluster_id: str) -> FlakySink:
        self.sink = FlakySink(self.engine._spec, "shop.totals", cluster_id, env=Env(), create_tables=True)
        self.sink.applied = []
        return self.sink

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 15
        while not condition():
            assert time.monotonic() < deadline, f"did not come about: {what}; {self.engine!r} {self.engine.problems}"
            await asyncio.sleep(0.01)

    async def seen(self, expected: list[tuple[int, int]]) -> None:
        await self.until(lambda: len(ledger.seen(self.url)) >= len(expected), f"{len(expected)} effects")
        assert ledger.seen(self.url) == sorted(expected)

    def value(self, name: str, **labels: str) -> float:
        for line in self.metrics.render().splitlines():
            if line.startswith(name) and all(f'{key}="{value}"' in line for key, value in labels.items()):
                return float(line.rpartition(" ")[2])
        return math.nan  # Not there yet; it equals nothing.


def play(url: str, folder: Path, scenario: Scenario, **changes: Any) -> Run:
    """Run the engine, play the scenario beside it, drain."""

    async def main() -> Run:
        run = Run(url, folder, **changes)
        task = asyncio.create_task(run.engine.run())
        playing = asyncio.ensure_future(scenario(run))
        await asyncio.wait({task, playing}, return_when=asyncio.FIRST_COMPLETED)
        if not playing.done():
            playing.cancel()
            await task
        await playing
        await run.engine.drain()
        await asyncio.wait_for(task, 10)
        return run

    return asyncio.run(main())


def test_records_become_effects_and_a_drain_leaves_nothing_behind(url: str, tmp_path: Path) -> None:
    async def scenario(run: Run) -> None:
        for number in range(50):
            run.source.append(number % 2, f"k{number % 5}", 1)
        run.source.marker(0)
        await run.seen([(number % 2, number // 2) for number in range(50)])

    run = play(url, tmp_path, scenario)
    assert ledger.position(url, 0) == (26, 1), "the position does not stand behind the trailing marker after a drain"
    assert run.source.latest.closed
    assert run.value("semel_records_total", component="totals") == 50


def test_an_outage_pauses_polls_on_and_loses_nothing(url: str, tmp_path: Path) -> None:
    async def scenario(run: Run) -> None:
        run.source.append(0, "ann", 1)
        await run.seen([(0, 0)])
        run.sink.away = "before"
        for _ in range(5):
            run.source.append(0, "ann", 1)
            run.source.append(1, "bob", 1)
        await run.until(lambda: run.source.latest.paused == set(run.source.logs), "everything is paused")
        polls = run.source.latest.polls
        await run.until(lambda: run.source.latest.polls > polls + 5, "polls go on, or the group throws us out")
        assert "database" in run.engine.problems[0]
        run.sink.away = ""
        await run.seen([(0, n) for n in range(6)] + [(1, n) for n in range(5)])
        await run.until(lambda: not run.engine.problems and not run.source.latest.paused, "ready again")

    run = play(url, tmp_path, scenario)
    assert ledger.totals(url) == {"ann": (6, 6), "bob": (5, 5)}
    assert ledger.parked(url) == []
    assert run.value("semel_sink_database_up", component="totals") == 1


def test_a_batch_that_was_applied_without_an_answer_is_not_applied_again(url: str, tmp_path: Path) -> None:
    async def scenario(run: Run) -> None:
        run.source.append(0, "ann", 1)
        await run.seen([(0, 0)])
        for number in range(16):
            run.sink.away = "after" if number % 4 == 0 else ""
            run.source.append(number % 2, "bob", 1)
            failed = run.value("semel_sink_transactions_total", outcome="failed")
            if run.sink.away:
                await run.until(
                    lambda failed=failed: run.value("semel_sink_transactions_total", outcome="failed") > failed,
                    "failed",
                )
        await run.seen([(0, n) for n in range(9)] + [(1, n) for n in range(8)])

    play(url, tmp_path, scenario)


def test_partitions_that_come_during_an_outage_are_taken_over_later(url: str, tmp_path: Path) -> None:
    async def scenario(run: Run) -> None:
        run.source.to_give = [partition(0)]
        run.source.append(0, "ann", 1)
        await run.seen([(0, 0)])
        run.sink.away = "before"
        run.source.append(0, "ann", 1)
        run.source.append(1, "bob", 1)
        await run.until(lambda: bool(run.engine.problems), "the outage is noticed")
        run.source.to_give = [partition(1)]
        await run.until(lambda: partition(1) in run.source.latest.paused, "the new partition waits")
        run.source.append(1, "bob", 1)
        run.sink.away = ""
        await run.seen([(0, 0), (0, 1), (1, 0), (1, 1)])

    play(url, tmp_path, scenario)


def test_a_zombie_stops_writing_and_takes_back_what_the_group_leaves_it(url: str, tmp_path: Path) -> None:
    async def scenario(run: Run) -> None:
        run.engine._fence_seconds = 0.3
        run.source.append(0, "ann", 1)
        await run.seen([(0, 0)])
        other = ledger.sink(url)
        other.take_over([ledger.claim(0)])
        other.apply([ledger.a_slice(ledger.record(1, "ann", 1))])
        run.source.append(0, "ann", 1)
        run.source.append(1, "bob", 1)
        await run.seen([(0, 0), (0, 1), (1, 0)])
        await run.until(lambda: ledger.position(url) == (2, 3), "taken back")
        run.source.append(0, "ann", 1)
        await run.seen([(0, 0), (0, 1), (0, 2), (1, 0)])
        other.close()

    run = play(url, tmp_path, scenario)
    assert run.value("semel_sink_transactions_total", outcome="fenced") == 1


def test_deleted_records_stop_their_partition_only(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "STOPPED_RETRY_SECONDS", 0.1)

    async def scenario(run: Run) -> None:
        run.source.append(0, "ann", 1)
        await run.seen([(0, 0)])
        run.source.to_take = [partition(0)]
        await run.until(lambda: partition(0) not in run.source.latest.positions, "revoked")
        for _ in range(9):
            run.source.append(0, "ann", 1)
        run.source.starts[partition(0)] = 5
        run.source.to_give = [partition(0)]
        run.source.append(1, "bob", 1)
        await run.until(lambda: bool(run.engine.problems), "stopped")
        assert "DATA_GAP" in run.engine.problems[0]
        assert "the next offset to apply is 1" in run.engine.problems[0]
        assert "begins at 5" in run.engine.problems[0]
        await run.seen([(0, 0), (1, 0)])
        assert run.value("semel_stopped_partitions") == 1
        tool = connect(url)
        tool.execute("UPDATE semel_position SET next_offset = 5 WHERE part = 0")
        tool.close()
        await run.seen([(0, 0), *((0, n) for n in range(5, 10)), (1, 0)])
        await run.until(lambda: not run.engine.problems, "the operator's decision is seen")

    play(url, tmp_path, scenario)


def test_a_shortened_log_stops_its_partition(url: str, tmp_path: Path) -> None:
    async def scenario(run: Run) -> None:
        for _ in range(5):
            run.source.append(0, "ann", 1)
        await run.seen([(0, n) for n in range(5)])
        run.source.to_take = [partition(0)]
        await run.until(lambda: partition(0) not in run.source.latest.positions, "revoked")
        run.source.ends[partition(0)] = 3
        run.source.to_give = [partition(0)]
        await run.until(lambda: bool(run.engine.problems), "stopped")
        assert "OFFSET_AHEAD" in run.engine.problems[0]
        assert "is 5" in run.engine.problems[0]
        assert "ends at 3" in run.engine.problems[0]

    play(url, tmp_path, scenario)
    assert ledger.position(url)[0] == 5


def test_a_topic_that_is_made_again_under_us_stops(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "LAG_SECONDS", 0.05)

    async def scenario(run: Run) -> None:
        run.source.append(0, "ann", 1)
        await run.seen([(0, 0)])
        run.source.recreate_topic()
        await run.until(lambda: len(run.engine.problems) == 2, "both partitions stop")
        assert all("TOPIC_RECREATED" in problem for problem in run.engine.problems)
        run.source.append(0, "ann", 1)
        polls = run.source.latest.polls
        await run.until(lambda: run.source.latest.polls > polls + 5, "some polls")

    play(url, tmp_path, scenario)
    assert ledger.seen(url) == [(0, 0)]


def test_full_parking_stops_the_partition_and_says_so(url: str, tmp_path: Path) -> None:
    async def scenario(run: Run) -> None:
        for number in range(4):
            run.source.append(0, f"k{number}", -1)
        run.source.append(1, "bob", 1)
        await run.until(lambda: "PARKING_FULL" in "".join(run.engine.problems), "it says that it stopped, and why")
        await run.seen([(1, 0)])

    play(url, tmp_path, scenario, max_parked_keys=2)
    assert ledger.position(url, 0)[0] == 0


def test_a_transaction_has_at_most_so_many_bytes(url: str, tmp_path: Path) -> None:
    async def scenario(run: Run) -> None:
        for _ in range(20):
            run.source.append(0, "k" * 99, 1)
        await run.seen([(0, n) for n in range(20)])
        sizes = [sum(len(item.records) for item in slices) for slices in run.sink.applied]
        assert max(sizes) == 3
        assert sum(sizes) == 20

    play(url, tmp_path, scenario, max_bytes=300)


def test_a_backlog_does_not_wait_for_more(url: str, tmp_path: Path) -> None:
    """Full transactions follow each other at once; only a small one gathers first (`linger_ms`)."""

    async def scenario(run: Run) -> None:
        for number in range(40):
            run.source.append(0, f"k{number}", 1)
        await run.seen([(0, number) for number in range(40)])  # It has 15 s, and to wait 20 times would take 20.

    run = play(url, tmp_path, scenario, linger_ms=1_000, max_records=2)
    assert [len(slices[0].records) for slices in run.sink.applied] == [2] * 20


class Waiting:
    """A handler that ends its first call, which has a full batch, when `condition` is true."""

    def __init__(self) -> None:
        self.calls = 0
        self.run: Run
        self.condition: Callable[[], bool]
        self.failure: Exception | None = None

    def __call__(self, records: Sequence[Any], db: Any) -> None:
        self.calls += 1
        if self.calls == 1:
            deadline = time.monotonic() + 15
            while not self.condition():
                assert time.monotonic() < deadline, "nothing happened while the handler was at work"
                time.sleep(0.001)
            if self.failure is not None:
                raise self.failure
        ledger.count(records, db)

    def has_polled_ahead(self) -> bool:
        """More was read than the first batch has."""
        return self.run.source.latest.positions[partition(0)] > 2


@pytest.mark.parametrize("failure", [None, ConnectionRefusedError("the price service")])
def test_the_next_batch_is_polled_while_one_is_applied(url: str, tmp_path: Path, failure: Exception | None) -> None:
    """What was polled ahead does not come before what failed."""
    handler = Waiting()

    async def scenario(run: Run) -> None:
        handler.run, handler.condition, handler.failure = run, handler.has_polled_ahead, failure
        for number in range(7):
            run.source.append(0, f"k{number}", 1)
        await run.seen([(0, number) for number in range(7)])

    run = play(url, tmp_path, scenario, handler=handler, max_records=2)
    assert handler.calls == (4 if failure is None else 5)
    assert [[record.offset for record in slices[0].records] for slices in run.sink.applied] == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6],
    ]
    assert ledger.parked(url) == []


def test_partitions_go_when_the_batch_in_hand_is_applied_to_its_end(url: str, tmp_path: Path) -> None:
    """The group takes one during the poll ahead; the batch in hand has two transactions."""
    handler = Waiting()
    when_released: list[int] = []

    async def scenario(run: Run) -> None:
        handler.run, handler.condition = run, lambda: not run.source.to_take
        await run.until(lambda: bool(run.engine._partitions), "joined")
        await run.until(lambda: run.sink.position(partition(1)) is not None, "taken over")
        consumer, release = run.source.latest, run.sink.release
        poll = consumer.poll

        async def asked_for_one(max_records: int, timeout: float) -> FakeBatch:
            batch = await poll(max_records, timeout)
            if batch.records and not handler.calls:
                run.source.to_take.append(partition(0))
            return batch

        def noted(partitions: Sequence[TopicPartition]) -> None:
            when_released.append(len(run.sink.applied))
            release(partitions)

        consumer.poll = asked_for_one  # type: ignore[method-assign]
        run.sink.release = noted  # type: ignore[method-assign, assignment]
        for number in range(4):
            run.source.append(0, "k" * 99, number)
        run.source.append(1, "bob", 1)
        await run.until(lambda: bool(when_released), "given away")
        await run.seen([(0, 0), (0, 1), (1, 0)])
        run.source.to_give = [partition(0)]
        await run.seen([(0, number) for number in range(4)] + [(1, 0)])

    play(url, tmp_path, scenario, handler=handler, max_records=2, max_bytes=100)
    assert when_released[0] == 2, "a partition was given away in the middle of a batch"


def test_markers_move_the_position_when_nothing_else_comes(url: str, tmp_path: Path) -> None:
    async def scenario(run: Run) -> None:
        run.source.append(0, "ann", 1)
        run.source.marker(0)
        await run.until(lambda: bool(ledger.seen(url)), "applied")
        run.source.marker(0)
        await run.until(lambda: ledger.position(url)[0] == 3, "past the markers")

    play(url, tmp_path, scenario)


def test_a_consumer_without_a_position_joins_anew_once(url: str, tmp_path: Path) -> None:
    async def scenario(run: Run) -> None:
        run.source.append(0, "ann", 1)
        await run.seen([(0, 0)])
        run.source.poll_errors = [Fatal("the position is not in the log any more")]
        run.source.append(0, "ann", 1)
        await run.seen([(0, 0), (0, 1)])
        assert len(run.source.consumers) == 2
        assert run.source.consumers[0].closed

    play(url, tmp_path, scenario)

    async def twice(run: Run) -> None:
        await run.until(lambda: bool(run.source.consumers), "joined")
        run.source.poll_errors = [Fatal("the second"), Fatal("the first")]
        await asyncio.Event().wait()

    with pytest.raises(Fatal, match="the second"):
        play(url, tmp_path, twice)


def test_a_database_that_is_not_there_yet_is_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "mount"
    folder.mkdir()
    blocked = folder / "sink.db"
    blocked.mkdir()  # Not a file: it cannot be opened.
    url = f"sqlite:///{blocked}"

    async def scenario(run: Run) -> None:
        run.source.append(0, "ann", 1)
        await run.until(lambda: "the database is away" in "".join(run.engine.problems), "it says what it waits for")
        assert run.source.consumers == [], "it joined the group although it cannot work"
        blocked.rmdir()
        await run.seen([(0, 0)])

    play(url, tmp_path, scenario)


def test_a_folder_that_does_not_exist_is_a_mistake_not_an_outage(tmp_path: Path) -> None:
    async def scenario(run: Run) -> None:
        await asyncio.Event().wait()

    with pytest.raises(ConfigurationError, match="does not exist"):
        play(f"sqlite:///{tmp_path}/nowhere/sink.db", tmp_path, scenario)

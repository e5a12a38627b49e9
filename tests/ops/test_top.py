"""`semel top`: rates between two looks, sums and worst values over processes, and what it cannot read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from semel.databases.processes import ProcessIdentity
from semel.errors import ConfigurationError, Retriable
from semel.ops.cli import main
from semel.ops.exposition import join
from semel.ops.top import from_folder, from_url, parse, rows
from semel.processing.measures import Measures
from semel.processing.metrics import Metrics
from semel.processing.pace import LatencyPace
from semel.types import TopicPartition


class Process:
    """One worker's registry, with one processor in it."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.measures = Measures(self.metrics, "count")
        self.pace = LatencyPace(0.050)
        self.measures.pace(self.pace)

    def work(self, records: int, commits: int, latency: float, lag: int) -> None:
        for _ in range(commits):
            self.measures.committed(records // commits)
            self.pace.landed(0.001, latency)
        self.measures.lag(TopicPartition("in", id(self) % 7), lag)


def look(*processes: Process) -> list[Any]:
    return list(parse(join({f"worker-{number}": one.metrics.render() for number, one in enumerate(processes)})))


def test_a_row_has_the_rates_of_all_processes_and_their_worst_latency() -> None:
    one, two = Process(), Process()
    one.work(100, 10, 0.004, 5)
    before = look(one, two)
    one.work(400, 20, 0.010, 3)
    two.work(200, 10, 0.030, 4)
    one.measures.transaction("aborted")
    (row,) = rows(before, look(one, two), 2.0)
    assert (row["component"], row["records_s"], row["commits_s"], row["failed_s"]) == ("count", 300.0, 15.0, 0.5)
    assert row["lag"] == 7
    assert row["p99_ms"] == 30.0
    assert row["objective_ms"] == 50.0
    assert 0 <= row["interval_ms"] <= 50
    assert row["parked"] == row["stopped"] == 0


def test_a_process_that_began_again_counts_from_nothing() -> None:
    one = Process()
    one.work(1_000, 10, 0.004, 0)
    before = look(one)
    again = Process()
    again.work(50, 5, 0.004, 0)
    (row,) = rows(before, look(again), 1.0)
    assert (row["records_s"], row["commits_s"]) == (50.0, 5.0)


def test_a_label_may_hold_anything_and_lines_that_say_nothing_are_passed_over() -> None:
    metrics = Metrics()
    name = 'a "quoted" \\ name\nwith two lines, and="x"}'
    metrics.counter("semel_records_total", "Records.", ("component",)).add(3, component=name)
    page = metrics.render() + "not a series\nsemel_x{ 1\nsemel_y nothing\n\x00\n"
    found = [sample for sample in parse(page) if sample.name == "semel_records_total"]
    assert [(sample.labels["component"], sample.value) for sample in found] == [(name, 3.0)]


def test_the_command_shows_what_the_processes_of_the_folder_publish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = Process()
    process.work(10, 1, 0.004, 0)
    (tmp_path / "metrics").mkdir()
    page = f"# semel process worker-0 {ProcessIdentity.current()}\n{process.metrics.render()}"
    (tmp_path / "metrics" / "worker-0.prom").write_text(page)
    monkeypatch.setenv("SEMEL_DATA", str(tmp_path))
    done = CliRunner().invoke(main, ["top", "--count", "2", "--every", "0.01"])
    assert done.exit_code == 0, done.output
    assert done.output.count("COMPONENT") == 2
    assert done.output.count("count ") == 2


def test_a_folder_and_an_address_without_metrics_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="semel run"):
        from_folder(tmp_path)
    with pytest.raises(ConfigurationError, match="http://"):
        from_url("file:///etc/passwd")
    with pytest.raises(Retriable, match=r"127\.0\.0\.1:9/metrics"):
        from_url("http://127.0.0.1:9")

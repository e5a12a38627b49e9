"""The metrics of all processes on one page: whose they are, each name once, and nothing of the dead."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from semel.ops import exposition
from semel.ops.exposition import join, publishing, read_others
from semel.processing.metrics import Metrics

PAGE = """
import asyncio, sys
from pathlib import Path
from semel.ops.exposition import publishing
from semel.processing.metrics import Metrics

async def main():
    metrics = Metrics()
    metrics.counter("semel_transactions_total", "By outcome.", ("outcome",)).add(3, outcome="committed")
    async with publishing(metrics, Path(sys.argv[1]), "worker-0"):
        print("published", flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


def registry(outcome: str) -> Metrics:
    metrics = Metrics()
    metrics.counter("semel_transactions_total", "Kafka transactions by outcome.", ("outcome",)).add(outcome=outcome)
    metrics.gauge("semel_http_in_flight", "Requests that wait.").set(2)
    return metrics


def test_series_say_whose_they_are_and_each_name_has_one_help() -> None:
    page = join({"http-0": registry("aborted").render(), "worker-1": registry('com"mitted').render()})
    assert page == (
        "# HELP semel_http_in_flight Requests that wait.\n"
        "# TYPE semel_http_in_flight gauge\n"
        'semel_http_in_flight{process="http-0"} 2\n'
        'semel_http_in_flight{process="worker-1"} 2\n'
        "# HELP semel_transactions_total Kafka transactions by outcome.\n"
        "# TYPE semel_transactions_total counter\n"
        'semel_transactions_total{process="http-0",outcome="aborted"} 1\n'
        'semel_transactions_total{process="worker-1",outcome="com\\"mitted"} 1\n'
    )


def test_a_process_publishes_while_it_lives_and_is_left_out_when_it_was_killed(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", PAGE, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    path = tmp_path / "metrics" / "worker-0.prom"
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "published\n"
        asyncio.run(until(path.exists))
        others = read_others(tmp_path, "http-0")
        assert list(others) == ["worker-0"]
        assert 'semel_transactions_total{outcome="committed"} 3' in others["worker-0"]
        assert read_others(tmp_path, "worker-0") == {}, "one's own registry is fresher in memory"
        child.send_signal(signal.SIGSTOP)
        assert list(read_others(tmp_path, "http-0")) == ["worker-0"], "a stopped process still has its transactions"
    finally:
        child.kill()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()
    assert path.exists()
    assert read_others(tmp_path, "http-0") == {}, "its successor has not published yet, and the dead count nothing"


def test_another_process_with_the_same_number_is_not_the_one_that_published(tmp_path: Path) -> None:
    folder = tmp_path / "metrics"
    folder.mkdir()
    reused = exposition.ProcessIdentity.current()._replace(started=1)
    (folder / "worker-0.prom").write_text(f"# semel process worker-0 {reused}\nsemel_x 1\n")
    elsewhere = exposition.ProcessIdentity.current()._replace(host="elsewhere/boot/ns")
    (folder / "worker-1.prom").write_text(f"# semel process worker-1 {elsewhere}\nsemel_x 1\n")
    (folder / "foreign.prom").write_text("node_load1 0.3\n")
    (folder / "torn.prom").write_bytes(b"\xff\xfe")
    assert read_others(tmp_path, "http-0") == {}
    mine = exposition.ProcessIdentity.current()
    (folder / "worker-2.prom").write_text(f"# semel process worker-2 {mine}\nsemel_x 1\n")
    assert list(read_others(tmp_path, "http-0")) == ["worker-2"]


def test_the_file_follows_the_registry_and_goes_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposition, "PUBLISH_SECONDS", 0.01)
    metrics = registry("committed")
    path = tmp_path / "metrics" / "worker-0.prom"

    async def main() -> None:
        async with publishing(metrics, tmp_path, "worker-0"):
            await until(lambda: path.exists() and 'outcome="committed"} 1' in path.read_text())
            metrics.counter("semel_transactions_total", "", ("outcome",)).add(41, outcome="committed")
            await until(lambda: 'outcome="committed"} 42' in path.read_text())

    asyncio.run(main())
    assert os.listdir(tmp_path / "metrics") == []


def test_a_folder_that_cannot_be_written_is_told_once_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(exposition, "PUBLISH_SECONDS", 0.01)
    caplog.set_level(logging.INFO)
    (tmp_path / "metrics").write_text("a file where the folder should be")

    async def main() -> None:
        async with publishing(Metrics(), tmp_path, "worker-0"):
            await until(lambda: bool(caplog.records))
            await asyncio.sleep(0.1)
            (tmp_path / "metrics").unlink()
            await until((tmp_path / "metrics" / "worker-0.prom").exists)

    asyncio.run(main())
    assert [record.levelname for record in caplog.records] == ["WARNING"]


async def until(condition: object) -> None:
    assert callable(condition)
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)

"""kill -9 and SIGSTOP at every failpoint of the sink, then a takeover, then the exact comparison."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from semel.databases import sqlite
from semel.failpoints import FailpointRaised, arm_failpoints
from semel.sinks.contract import Unavailable
from tests.services.postgres import PostgresServer
from tests.sinks import child, ledger

ROOT = Path(__file__).resolve().parents[2]
TOTAL = 40


def start(url: str, failpoint: str = "", **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.sinks.child", url, str(TOTAL)],
        cwd=ROOT,
        env=os.environ | {"SEMEL_FAILPOINT": failpoint} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def expected() -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """What must be applied and what parked: a poison record and the later ones of its key."""
    applied, parked = [], []
    for part in range(child.PARTITIONS):
        for record in child.all_records(part, TOTAL):
            assert record.key is not None
            (parked if record.key.startswith(b"poison") else applied).append((part, record.offset))
    return sorted(applied), sorted(parked)


def check_exact(url: str) -> None:
    applied, parked = expected()
    assert ledger.seen(url) == applied
    assert [(part, offset) for part, offset, _, _ in ledger.parked(url)] == parked
    assert sum(times for times, _ in ledger.totals(url).values()) == len(applied)
    for part in range(child.PARTITIONS):
        assert ledger.position(url, part)[0] == TOTAL


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"


@pytest.mark.parametrize(
    ("point", "nth"), [("sink.before_effects", 3), ("sink.before_db_commit", 1), ("sink.after_db_commit", 3)]
)
def test_a_kill_at_any_point_loses_and_doubles_nothing(any_url: str, point: str, nth: int) -> None:
    process = start(any_url, f"{point}:kill:{nth}")
    assert process.wait(30) == -signal.SIGKILL, "the failpoint was not reached"
    process.communicate()
    applied, _ = expected()
    seen = ledger.seen(any_url)
    assert len(seen) < len(applied), "it died too late to prove anything"
    child.work(any_url, TOTAL)
    check_exact(any_url)


def test_an_exception_after_the_commit_is_settled_by_the_same_process(
    any_url: str,
) -> None:
    sink = ledger.sink(any_url)
    sink.take_over([ledger.claim()])
    batch = [ledger.a_slice(ledger.record(0, "ann", 1))]
    arm_failpoints("sink.after_db_commit:raise")
    try:
        with pytest.raises(FailpointRaised):
            sink.apply(batch)
    finally:
        arm_failpoints("")
    assert sink.apply(batch).records == 1  # Settled, not repeated.
    assert ledger.seen(any_url) == [(0, 0)]
    sink.close()


@pytest.mark.postgres
@pytest.mark.parametrize("point", ["sink.before_effects", "sink.before_db_commit"])
def test_a_stopped_owner_delays_a_takeover_only_for_a_while(point: str, postgres: PostgresServer) -> None:
    """PostgreSQL: it holds the row's lock until idle_in_transaction_session_timeout ends its session."""
    url = postgres.new_database()
    process = start(url, f"{point}:stop:2", IDLE_IN_TRANSACTION="1500ms")
    try:
        wait_until(lambda: is_stopped(process.pid), "the failpoint was not reached")
        began = time.monotonic()
        heir = ledger.sink(url)
        heir.take_over([ledger.claim(part) for part in range(child.PARTITIONS)])
        assert time.monotonic() - began < 5
        heir.close()
        child.work(url, TOTAL)
        os.kill(process.pid, signal.SIGCONT)
        assert process.wait(30) != 0, "the zombie did not notice that it is fenced"
        check_exact(url)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("while_opening", [False, True])
def test_a_stopped_process_with_the_write_lock_is_ended_by_whoever_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, while_opening: bool
) -> None:
    monkeypatch.setattr(sqlite, "LOCK_WAIT_SECONDS", 0.3)
    url = f"sqlite:///{tmp_path}/sink.db"
    process = start(url, "sink.before_db_commit:stop:2")
    try:
        wait_until(lambda: is_stopped(process.pid), "the failpoint was not reached")
        if while_opening:
            with pytest.raises(Unavailable, match="was ended"):
                ledger.sink(url)
        else:
            heir = ledger.sink(url, create_tables=False)
            heir.take_over([ledger.claim(part) for part in range(child.PARTITIONS)])
            heir.close()
        assert process.wait(10) == -signal.SIGKILL
        child.work(url, TOTAL)
        check_exact(url)
    finally:
        process.kill()
        process.communicate()


def test_a_process_that_is_only_slow_is_left_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "LOCK_WAIT_SECONDS", 0.3)
    url = f"sqlite:///{tmp_path}/sink.db"
    process = start(url, "sink.before_db_commit:delay=3:2")
    try:
        holds = sqlite.SqliteDatabase(url).write_lock_holder
        wait_until(lambda: len(ledger.seen(url)) >= 5 and holds() == process.pid, "it did not begin")
        heir = ledger.sink(url, create_tables=False)
        with pytest.raises(Unavailable, match="locked"):
            heir.take_over([ledger.claim()])
        heir.close()
        assert process.wait(30) == 0
        check_exact(url)
    finally:
        process.kill()
        process.communicate()


def test_a_zombie_that_wakes_up_writes_nothing(any_url: str) -> None:
    process = start(any_url, "sink.after_db_commit:stop:2")
    try:
        wait_until(lambda: is_stopped(process.pid), "the failpoint was not reached")
        child.work(any_url, TOTAL)
        check_exact(any_url)
        os.kill(process.pid, signal.SIGCONT)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 1
        assert "PartitionsLost" in errors
        assert "taken over by" in errors
        check_exact(any_url)
    finally:
        process.kill()
        process.communicate()

"""A sink's parked records that are released: in order, once, by the owner, whatever fails on the way."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from semel import history
from semel.databases import connect
from semel.errors import OutcomeUnknown
from semel.processing.parklog import ParkPolicy
from semel.sinks import engine as engine_module
from semel.sinks.contract import Applied, PartitionsLost, Unavailable
from semel.sinks.sql import sink as sink_module
from tests.sinks import child, ledger
from tests.sinks.ledger import a_slice, claim, count_all, record
from tests.sinks.test_engine import Run, play

ROOT = Path(__file__).resolve().parents[2]


def parked_sink(url: str, **changes: Any) -> Any:
    """bob: 1 is poison, 3 and 5 wait behind it; eve: 4 is poison; ann: 0 and 2 are applied."""
    sink = ledger.sink(url, **changes)
    sink.take_over([claim()])
    amounts = [("ann", 1), ("bob", -1), ("ann", 2), ("bob", 3), ("eve", -4), ("bob", 5)]
    sink.apply([a_slice(*(record(offset, key, value) for offset, (key, value) in enumerate(amounts)))])
    assert [offset for _, offset, _, _ in ledger.parked(url)] == [1, 3, 4, 5]
    return sink


def mended(url: str, **changes: Any) -> Any:
    """The next owner, whose handler takes everything."""
    sink = ledger.sink(url, count_all, **changes)
    sink.take_over([claim()])
    return sink


def test_a_released_key_is_applied_in_order_and_goes_on_live(any_url: str) -> None:
    parked_sink(any_url).close()
    sink = mended(any_url)
    ledger.ask(any_url, "retry", 3)
    assert sink.carry_out().records == 3
    sink.apply([a_slice(record(6, "bob", 6), record(7, "eve", 7))])
    assert [offset for key, offset in ledger.in_order(any_url) if key == "bob"] == [1, 3, 5, 6]
    assert [offset for _, offset, _, _ in ledger.parked(any_url)] == [4, 7], "another key is not touched"
    found = ledger.outcome(any_url)
    assert (found.released, found.finished, found.by, found.command) == ([1, 3, 5], True, "me", "c1")
    assert sink.carry_out() == Applied(), "what is done is not asked for any more"
    sink.close()


def test_a_record_that_fails_again_stays_with_everything_behind_it(any_url: str) -> None:
    sink = parked_sink(any_url)
    ledger.ask(any_url, "retry", 1, 3, 4, 5)
    sink.carry_out()
    assert [offset for _, offset, _, _ in ledger.parked(any_url)] == [1, 3, 4, 5]
    found = ledger.outcome(any_url)
    assert [failed.offset for failed in found.failed] == [1, 4]
    assert found.finished
    sink.apply([a_slice(record(6, "bob", 6))])
    assert [offset for _, offset, _, _ in ledger.parked(any_url)] == [1, 3, 4, 5, 6]
    sink.close()


def test_a_discarded_record_is_gone_visibly_and_what_is_behind_it_stays(any_url: str) -> None:
    sink = parked_sink(any_url)
    ledger.ask(any_url, "discard", 1)
    sink.carry_out()
    assert [offset for _, offset, _, _ in ledger.parked(any_url)] == [3, 4, 5]
    assert ledger.outcome(any_url).discarded == [1]
    sink.apply([a_slice(record(6, "bob", 6))])
    ledger.ask(any_url, "retry", 3, name="c2")
    sink.carry_out()
    assert [offset for key, offset in ledger.in_order(any_url) if key == "bob"] == [3, 5, 6]
    sink.close()


def test_an_edit_is_refused_unless_it_is_switched_on_and_leaves_both_digests(any_url: str) -> None:
    sink = parked_sink(any_url)
    ledger.ask(any_url, "edit", 1, value=b"9")
    sink.carry_out()
    assert "SEMEL_PARK_EDIT" in ledger.outcome(any_url).refused
    assert [offset for _, offset, _, _ in ledger.parked(any_url)] == [1, 3, 4, 5]
    sink.close()
    sink = ledger.sink(any_url, policy=ParkPolicy(edit="yes"))
    sink.take_over([claim()])
    ledger.ask(any_url, "edit", 1, value=b"9", name="c2")
    sink.carry_out()
    assert ledger.totals(any_url)["bob"] == (3, 9 + 3 + 5)
    found = ledger.outcome(any_url, "c2")
    assert (found.old, found.new) == (history.digest(b"-1"), history.digest(b"9"))
    sink.close()


def test_builds_wait_for_each_other_and_a_new_one_tries_once(any_url: str) -> None:
    parked_sink(any_url, policy=ParkPolicy("1")).close()
    sink = mended(any_url, policy=ParkPolicy("1.9"))
    ledger.ask(any_url, "retry", 4, build="1.10")
    sink.carry_out()
    assert not ledger.outcome(any_url).finished
    sink.close()
    calls: list[int] = []

    def still_wrong(records: Sequence[Any], db: Any) -> None:
        calls.extend(item.offset for item in records)
        raise ValueError("not yet")

    for _ in range(2):
        sink = ledger.sink(any_url, still_wrong, policy=ParkPolicy("1.10", "build"))
        sink.take_over([claim()])
        sink.carry_out()
        sink.close()
    assert sorted(calls) == [1, 4, 4], "once by the command, once because of the build: then never again"
    sink = mended(any_url, policy=ParkPolicy("2", "build"))
    sink.carry_out()
    assert ledger.parked(any_url) == []
    assert [offset for key, offset in ledger.in_order(any_url) if key == "bob"] == [1, 3, 5]
    sink.close()


def test_a_large_release_goes_in_steps_and_a_failed_key_is_not_tried_twice(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink_module, "RELEASE_RECORDS_MAX", 4)
    sink = ledger.sink(url)
    sink.take_over([claim()])
    records = [record(n, f"k{n % 3}", -1 if n < 3 else n) for n in range(30)]
    sink.apply([a_slice(*records)])
    sink.close()
    calls: list[int] = []

    def all_but_one(records: Sequence[Any], db: Any) -> None:
        calls.extend(item.offset for item in records)
        if any(item.key == "k1" for item in records):
            raise ValueError("never")
        count_all(records, db)

    sink = ledger.sink(url, all_but_one)
    sink.take_over([claim()])
    ledger.ask(url, "retry", *range(30))
    sink.carry_out()
    assert sorted(calls) == [n for n in range(30) if n % 3 != 1 or n == 1]
    for key in ("k0", "k2"):
        offsets = [offset for name, offset in ledger.in_order(url) if name == key]
        assert offsets == list(range(int(key[1]), 30, 3))
    assert [offset for _, offset, _, _ in ledger.parked(url)] == list(range(1, 30, 3))
    sink.close()


def test_a_zombie_releases_nothing(any_url: str) -> None:
    zombie = parked_sink(any_url)
    ledger.ask(any_url, "retry", 1)
    successor = mended(any_url)
    with pytest.raises(PartitionsLost):
        zombie.carry_out()
    assert not ledger.outcome(any_url).finished
    successor.carry_out()
    assert ledger.totals(any_url)["bob"] == (3, 9)
    zombie.close()
    successor.close()


@pytest.mark.parametrize("is_there", [True, False])
def test_an_unanswered_commit_of_a_release_is_found_out(
    url: str, is_there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    parked_sink(url).close()
    sink = mended(url)
    ledger.ask(url, "retry", 1)
    commit = sink._database.commit

    def lose() -> None:
        monkeypatch.undo()
        if is_there:
            commit()
        sink._database.close()
        raise OutcomeUnknown("the answer was lost")

    monkeypatch.setattr(sink._database, "commit", lose)
    with pytest.raises(Unavailable):
        sink.carry_out()
    sink.carry_out()
    sink.apply([a_slice(record(6, "bob", 6))])
    assert [offset for key, offset in ledger.in_order(url) if key == "bob"] == [1, 3, 5, 6]
    assert ledger.outcome(url).released == [1, 3, 5]
    sink.close()


def test_a_constraint_that_only_commit_reports_keeps_its_record_parked(deferring_url: str) -> None:
    parked_sink(deferring_url).close()
    tool = connect(deferring_url)
    tool.execute("CREATE TABLE parent (id BIGINT PRIMARY KEY)")
    tool.execute("CREATE TABLE child (id BIGINT REFERENCES parent(id) DEFERRABLE INITIALLY DEFERRED)")
    tool.close()

    def orphan(records: Sequence[Any], db: Any) -> None:
        count_all(records, db)
        db.executemany("INSERT INTO child (id) VALUES (?)", [(1,) for item in records if item.key == "eve"])

    sink = ledger.sink(deferring_url, orphan)
    sink.take_over([claim()])
    ledger.ask(deferring_url, "retry", 1, 4)
    sink.carry_out()
    assert [offset for _, offset, _, _ in ledger.parked(deferring_url)] == [4]
    assert [offset for key, offset in ledger.in_order(deferring_url)] == [0, 2, 1, 3, 5]
    assert [failed.offset for failed in ledger.outcome(deferring_url).failed] == [4]
    sink.close()


# What is between the points is the same code on every store: the two that came last take the one that is hardest.
KILLS = [
    *(("sqlite", at) for at in ("sink.before_release", "sink.before_db_commit:kill:2", "sink.after_db_commit")),
    pytest.param("postgres", "sink.before_db_commit:kill:2", marks=pytest.mark.postgres),
    pytest.param("postgres", "sink.after_db_commit", marks=pytest.mark.postgres),
    pytest.param("mariadb", "sink.before_db_commit:kill:2", marks=pytest.mark.mariadb),
    pytest.param("valkey", "sink.after_db_commit", marks=pytest.mark.valkey),
]


@pytest.mark.parametrize(("any_url", "point"), KILLS, indirect=["any_url"])
def test_a_kill_within_a_release_leaves_all_or_nothing_of_it(any_url: str, point: str) -> None:
    child.work(any_url, 40)
    before = ledger.in_order(any_url)
    heads = {
        part: [offset for at, offset, _, error in ledger.parked(any_url) if at == part and error] for part in (0, 1)
    }
    for part, offsets in heads.items():
        ledger.ask(any_url, "retry", *offsets, part=part, name=f"c{part}")
    spec = point if point.count(":") else f"{point}:kill:1"
    command = [sys.executable, "-m", "tests.sinks.child", any_url, "40"]
    for failpoint, code in ((spec, -signal.SIGKILL), ("", 0)):
        environment = os.environ | {"SEMEL_FAILPOINT": failpoint, "RELEASE": "yes"}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == code, done.stderr
    assert ledger.parked(any_url) == []
    everything = [(part, item.offset) for part in range(child.PARTITIONS) for item in child.all_records(part, 40)]
    assert ledger.seen(any_url) == sorted(everything)
    released = ledger.in_order(any_url)[len(before) :]
    assert len(released) == len(everything) - len(before)
    for part in range(child.PARTITIONS):
        assert ledger.outcome(any_url, f"c{part}").finished


def test_the_engine_carries_out_what_is_asked_for_while_records_flow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "PARK_LOOK_SECONDS", 0.02)
    url = f"sqlite:///{tmp_path}/sink.db"

    async def scenario(run: Run) -> None:
        for key, value in (("bob", -1), ("bob", 2), ("ann", 3)):
            run.source.append(0, key, value)
        await run.until(lambda: len(ledger.parked(url)) == 2, "two parked records")
        await run.until(lambda: run.value("semel_parked_keys", partition="purchases-0") == 1, "the gauge")
        monkeypatch.setattr(run.sink, "_spec", ledger.spec(url, count_all))
        await asyncio.to_thread(ledger.ask, url, "retry", 0)
        await run.until(lambda: ledger.outcome(url).finished, "the release")
        run.source.append(0, "bob", 4)
        await run.until(lambda: len(ledger.seen(url)) == 4, "four effects")
        await run.until(lambda: run.value("semel_parked_keys", partition="purchases-0") == 0, "the gauge again")

    play(url, tmp_path, scenario)
    assert [offset for key, offset in ledger.in_order(url) if key == "bob"] == [0, 1, 3]

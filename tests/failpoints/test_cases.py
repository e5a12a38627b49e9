"""A sample of the enumeration in `make test`, all of it in `make soak`; see `tests/failpoints/run.py`."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from tests.failpoints import run
from tests.failpoints.chain import Chain, Result
from tests.failpoints.plan import Case

SAMPLE = [
    Case("ingress.after_append", "kill", "second", 2),
    Case("ingress.after_reply", "cancel", "first", 1),
    Case("unit.between_batches", "stop", "second", 2),
    Case("unit.before_end_transaction", "raise", "second", 2),
    Case("producer.after_end", "kill", "first", 1),
    Case("sink.before_db_commit", "kill", "second", 2),
    Case("sink.after_settle", "kill", "first", 1),
    Case("broker.after_prepare", "kill", "second", 2),
    Case("log.before_write", "torn=71", "second", 2),
    Case("producer.before_complete", "kill", "first", 1),
]


def test_a_sample_of_cases_loses_and_doubles_nothing(tmp_path: Path) -> None:
    async def test() -> list[Result]:
        async with Chain(tmp_path / "chain") as chain:
            results = [await chain.run(case) for case in SAMPLE]
            assert chain.check().clean, chain.check().summary()
        return results

    results = asyncio.run(test())
    assert [result for result in results if result.outcome != "clean"] == []


def test_a_zombie_says_that_it_was_fenced_and_by_whom(tmp_path: Path) -> None:
    async def test() -> Result:
        async with Chain(tmp_path / "chain") as chain:
            return await chain.run(Case("producer.before_end", "stop", "first", 1), pause=2.0)

    result = asyncio.run(test())
    assert result.outcome == "clean"
    assert re.search(r"another process owns it|Another process owns the id now as \d+:\d+", result.zombie), result


@pytest.mark.soak
def test_every_case_loses_and_doubles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["run", "--results", str(tmp_path), "--jobs", "2"])
    assert run.main() == 0

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


ZOMBIE = Case("producer.before_end", "stop", "first", 1)
FENCED_BY_WHOM = (
    r"process owns it now|Another process owns the id now as \d+:\d+|another process joined with instance id"
    r"|was taken over by .* pid=\d+"
)
"""The transactional id, the place in the group or a position row, whichever of its components notices first."""


def test_a_sample_of_cases_loses_and_doubles_nothing_and_a_zombie_says_who_fenced_it(tmp_path: Path) -> None:
    async def test() -> list[Result]:
        async with Chain(tmp_path / "chain") as chain:
            results = [await chain.run(case) for case in SAMPLE]
            results.append(await chain.run(ZOMBIE, pause=2.0))
            assert chain.check().clean, chain.check().summary()
        return results

    results = asyncio.run(test())
    assert [result for result in results if result.outcome != "clean"] == []
    assert re.search(FENCED_BY_WHOM, results[-1].zombie), results[-1]


@pytest.mark.soak
def test_every_case_loses_and_doubles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["run", "--results", str(tmp_path), "--jobs", "2"])
    assert run.main() == 0

"""Random programs of requests to Apache Kafka 4.3.1 and to ours: the same answers, or docs/broker.md says why not."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from random import SystemRandom
from typing import NamedTuple

import pytest

from tests.conftest import unavailable
from tests.differential import brokers
from tests.differential.compare import Outcome, compare, run_seed, shrink
from tests.differential.deliberate import DELIBERATE
from tests.differential.program import THEMES, make_program
from tests.differential.regressions import REGRESSIONS
from tests.services.kafka import missing_tools

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS, SOAK_PROGRAMS = 150, 10_000
WORKERS = 4
"""Programs under way at a time; most of their time goes by in waiting for Apache Kafka."""


class Pair(NamedTuple):
    ours: str
    kafka: str


@contextmanager
def new_pair(folder: Path) -> Iterator[Pair]:
    tools = missing_tools()
    if tools:
        unavailable("Apache Kafka", f"{' and '.join(tools)} not found")
    with brokers.embedded(folder) as ours, brokers.kafka() as kafka:
        yield Pair(ours, kafka)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with new_pair(tmp_path_factory.mktemp("ours")) as pair:
        yield pair


def first_seed() -> int:
    """In CI the programs are the same every time; elsewhere every run looks further."""
    return 0 if os.environ.get("CI") == "true" else SystemRandom().randrange(1 << 40)


def run(pair: Pair, seeds: Iterable[int]) -> tuple[Counter[str], list[str]]:
    """How often each deliberate difference was met, and the others in words, made small."""
    began, steps, done = time.monotonic(), 0, 0
    met: Counter[str] = Counter()
    found: list[str] = []
    with ThreadPoolExecutor(WORKERS) as pool:
        running = {pool.submit(run_seed, *pair, seed): seed for seed in seeds}
        for future in as_completed(running):
            seed = running[future]
            try:
                outcome: Outcome = future.result()
            except Exception as problem:
                found.append(f"program {seed} did not come to its end: {problem!r}")
                continue
            done += 1
            steps += outcome.compared
            met.update(reason.name for reason in outcome.used)
            if outcome.difference is not None:
                found.append(f"program {seed}: {shrink(*pair, outcome.difference)}")
    seconds = time.monotonic() - began
    print(f"{done} programs, {steps} answers compared in {seconds:.0f} s; deliberate differences: {dict(met)}")
    return met, found


@pytest.mark.kafka
def test_new_programs_are_answered_alike(pair: Pair) -> None:
    first = first_seed()
    print(f"first seed {first}")
    _, found = run(pair, range(first, first + PROGRAMS))
    assert not found, "\n\n".join(found[:5])


@pytest.mark.kafka
@pytest.mark.parametrize("name", REGRESSIONS)
def test_programs_that_were_answered_differently(pair: Pair, name: str) -> None:
    outcome = compare(*pair, REGRESSIONS[name])
    assert outcome.difference is None, str(outcome.difference)


@pytest.mark.soak
@pytest.mark.kafka
@pytest.mark.timeout(7200)
def test_ten_thousand_programs_are_answered_alike(tmp_path: Path) -> None:
    first = int(os.environ.get("SEMEL_FIRST_SEED", first_seed()))
    print(f"first seed {first}")
    met: Counter[str] = Counter()
    found: list[str] = []
    for start in range(first, first + SOAK_PROGRAMS, SOAK_PROGRAMS // 4):
        # The heap that Kafka is given here does not hold the topics of six thousand programs.
        with new_pair(tmp_path / str(start)) as pair:
            more, differences = run(pair, range(start, start + SOAK_PROGRAMS // 4))
        met += more
        found += differences
    print("\n\n".join(found))
    assert not found, f"{len(found)} programs, see above"
    never = {reason.name for reason in DELIBERATE if not reason.rare} - met.keys()
    assert not never, f"these differences are no more, or no program finds them: {never}"


def test_a_broker_that_behaves_differently_is_told_apart(tmp_path: Path) -> None:
    """The comparison itself: two brokers that differ in one rule, found by random programs and made small."""
    with brokers.embedded(tmp_path / "a") as one, brokers.embedded(tmp_path / "b", max_message_bytes=100) as other:
        for seed in range(100):
            found = compare(one, other, make_program(seed)).difference
            if found is not None and found.program[found.at][0] == "produce":
                small = shrink(one, other, found, attempts=30)
                break
    assert small.at <= 2, str(small)
    assert "error_code: 0\n      / 10" in str(small)


def test_every_theme_makes_programs_of_many_kinds() -> None:
    kinds = Counter(name for seed in range(300) for name, _ in make_program(seed))
    assert len(THEMES) == 7
    assert len(kinds) > 30, kinds
    assert make_program(5) == make_program(5)


def test_deliberate_differences_are_in_the_documentation() -> None:
    page = " ".join((ROOT / "docs" / "broker.md").read_text().split())
    missing = [reason.sentence for reason in DELIBERATE if reason.sentence not in page]
    assert not missing, missing

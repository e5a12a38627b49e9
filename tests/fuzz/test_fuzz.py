"""A short run of every target with our own mutations, and the inputs that once found something."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from random import Random, SystemRandom

import pytest

from tests.fuzz.findings import FINDINGS
from tests.fuzz.harness import Harness
from tests.fuzz.mutate import mutated
from tests.fuzz.targets import TARGETS

CPU_SECONDS = 1.0
"""For each target."""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("semel")
    before = logger.level
    logger.setLevel(logging.CRITICAL)  # Thousands of damaged logs have much to say.
    yield
    logger.setLevel(before)


@pytest.mark.parametrize("name", TARGETS)
def test_a_short_run(name: str) -> None:
    seed = 1 if os.environ.get("CI") == "true" else SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    rng = Random(seed)
    target = TARGETS[name]
    seeds = target.seeds()
    harness = Harness(target)
    for data in seeds:
        harness(data)
    end = time.process_time() + CPU_SECONDS
    while time.process_time() < end:
        harness(mutated(rng.choice(seeds), seeds, rng))
    assert harness.executions > 100, "too slow to find anything"


@pytest.mark.parametrize(("name", "data"), FINDINGS, ids=lambda value: value if isinstance(value, str) else "")
def test_what_was_found(name: str, data: bytes) -> None:
    Harness(TARGETS[name])(data)


def test_the_harness_finds() -> None:
    """A target with a bug, found by the mutations and named with its input."""

    def broken(data: bytes) -> None:
        if len(data) > 4 and data[4] == 0xFF:
            raise KeyError("not there")

    target = TARGETS["frames"]._replace(run=broken)
    harness, rng = Harness(target), Random(3)
    inputs = (mutated(b"\0\0\0\3abc", [b"other"], rng) for _ in range(100_000))
    with pytest.raises(AssertionError, match="KeyError: 'not there'; the input is"):
        all(harness(data) is None for data in inputs)

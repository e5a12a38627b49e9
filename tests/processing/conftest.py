"""The engine's suites run twice: with the inner loop in C for plain processors, and without it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from semel.failpoints import arm_failpoints
from semel.processing import engine, quick
from tests.services.extensions import compiled

TWICE = (
    *("test_blame", "test_engine", "test_handling", "test_latency"),
    *("test_overlap", "test_provenance", "test_release"),
)
WAYS = ("general", "quick")


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The inner loop, from the source as it is."""
    return compiled("semel/processing/_quick", tmp_path_factory.mktemp("quick")).run


@pytest.fixture(autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The way that records of plain processors take; what is not plain takes the general one in both."""
    chosen: str = getattr(request, "param", "")
    if chosen:
        monkeypatch.setattr(quick, "_run", request.getfixturevalue("native") if chosen == "quick" else None)
    return chosen


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An engine waits for nothing as long as it does elsewhere; failpoints are off again when the test is over."""
    monkeypatch.setattr(engine, "BACKOFF_SECONDS", (0.001, 0.01))
    monkeypatch.setattr(engine, "IDLE_POLL_SECONDS", 0.005)
    yield
    arm_failpoints("")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__.rpartition(".")[2] in TWICE:
        metafunc.parametrize("way", WAYS, indirect=True)

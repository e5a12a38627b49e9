"""The controller alone, against a model of the engine: it holds what can be held, and settles."""

from __future__ import annotations

import random

import pytest

from semel.errors import ConfigurationError
from semel.processing.limits import UNIT_RECORDS_MAX
from semel.processing.pace import LatencyPace, parse_latency


class Plant:
    """Records come at `rate` a second; a commit of n records takes `base + each * n` seconds, and some chance more.

    The engine as it is: one unit on its way, the next one gathers until its interval is over and the other has landed.
    """

    def __init__(self, pace: LatencyPace, seed: int = 0) -> None:
        self.pace = pace
        self.rng = random.Random(seed)
        self.now = 0.0
        self.landing = 0.0
        self.rate, self.base, self.each, self.noise = 1_000.0, 0.002, 0.0, 0.1
        self.latencies: list[float] = []
        self.intervals: list[float] = []

    def unit(self) -> None:
        self.now += 1 / self.rate  # The first record comes.
        began = self.now
        launch = max(began + self.pace.interval, self.landing)
        records = max(1, int((launch - began) * self.rate))
        self.pace.handled(records, records / 50_000)
        if records > self.pace.records and self.landing <= began:
            launch = began + self.pace.records / self.rate
            records = self.pace.records
        commit = (self.base + self.each * records) * (1 + self.noise * self.rng.expovariate(1))
        self.now = launch
        self.landing = launch + commit
        self.latencies.append(self.landing - began)
        self.intervals.append(self.pace.interval)
        self.pace.landed(commit, self.landing - began)

    def run(self, units: int) -> None:
        for _ in range(units):
            self.unit()


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


@pytest.mark.parametrize("rate", [100, 1_000, 20_000])
@pytest.mark.parametrize("base", [0.0005, 0.003, 0.012])
def test_fifty_milliseconds_are_held_at_every_rate_with_few_commits(rate: float, base: float) -> None:
    pace = LatencyPace(0.050)
    plant = Plant(pace)
    plant.rate, plant.base, plant.each = rate, base, 0.2 / rate
    plant.run(400)
    assert quantile(plant.latencies[20:], 0.99) <= 0.050
    per_unit = rate * sum(plant.intervals[100:]) / 300
    assert per_unit >= rate * 0.008, "what is left of the objective is used: many records share a commit"


def test_a_step_of_the_commit_latency_is_followed_within_some_units() -> None:
    pace = LatencyPace(0.050)
    plant = Plant(pace)
    plant.run(200)
    before = pace.interval
    plant.base = 0.015
    plant.run(40)
    assert pace.interval < before - 0.010
    late = len(plant.latencies)
    plant.run(200)
    assert quantile(plant.latencies[late:], 0.99) <= 0.050
    plant.base = 0.002
    plant.run(200)
    assert pace.interval == pytest.approx(before, rel=0.2), "what is there to be had again is taken again"


@pytest.mark.parametrize("load", [0.1, 0.5, 0.9, 3.0])
def test_the_loop_of_interval_and_commit_settles(load: float) -> None:
    """`load` is how much longer a commit takes for each second of gathering: above 1 nothing could hold the rate."""
    pace = LatencyPace(0.100)
    plant = Plant(pace)
    plant.rate, plant.base, plant.each, plant.noise = 10_000, 0.004, load / 10_000, 0.0
    plant.run(300)
    early = plant.intervals[20:60]
    late = plant.intervals[-40:]
    assert max(late) - min(late) <= max(0.002, 0.5 * (max(early) - min(early))), "it must not swing for ever"
    assert all(0 <= interval <= 0.100 for interval in plant.intervals)


@pytest.mark.parametrize("seed", range(10))
def test_whatever_is_measured_the_answer_is_within_bounds(seed: int) -> None:
    rng = random.Random(seed)
    pace = LatencyPace(0.050)
    for _ in range(2_000):
        pace.handled(rng.randint(0, 10_000), rng.choice([0.0, 1e-9, 0.01, 100.0]))
        pace.landed(rng.choice([0.0, 1e-6, 0.01, 0.3, 120.0]), rng.random())
        assert 0 <= pace.interval <= 0.050
        assert 1 <= pace.records <= UNIT_RECORDS_MAX


def test_an_objective_that_cannot_be_held_is_served_as_well_as_can_be_and_recovers() -> None:
    pace = LatencyPace(0.010)
    plant = Plant(pace)
    plant.base = 0.030
    plant.run(50)
    assert pace.interval == 0
    plant.base = 0.001
    plant.run(100)
    assert pace.interval > 0.003


def test_nothing_is_held_back_before_anything_was_measured() -> None:
    assert LatencyPace(0.050).interval == 0


def test_slow_handlers_get_small_units() -> None:
    pace = LatencyPace(0.050)
    for _ in range(50):
        pace.handled(10, 0.1)  # Ten milliseconds each.
        pace.landed(0.005, 0.03)
    assert 1 <= pace.records <= 4


@pytest.mark.parametrize(("text", "seconds"), [("50ms", 0.05), ("1.5s", 1.5), ("2ms", 0.002), ("60s", 60.0)])
def test_a_latency_is_read(text: str, seconds: float) -> None:
    assert parse_latency(text, "x") == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["50", "", "fast", "1ms", "61s", "-5ms", "5 ms", 50, None, "0s", "1e3ms"])
def test_what_is_no_latency_is_refused(text: object) -> None:
    with pytest.raises(ConfigurationError, match=r"processor p: latency=.*'50ms'"):
        parse_latency(text, "processor p")

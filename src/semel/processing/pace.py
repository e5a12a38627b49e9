"""How long a unit of work may gather and how large it may become, for a stated latency: sans-IO.

A record that just missed a unit waits until that one has landed or the next one has gathered long enough, whichever is
later, and then for the commit of its own: about `max(interval, commit) + commit`. So the interval that is left of the
objective is what the commits do not need. Commit latency is estimated as TCP estimates round trips (RFC 6298): a
smoothed mean and a smoothed deviation. A larger unit commits more slowly, so interval and estimate feed back on each
other; the smoothing makes that loop slow, the deviation makes it careful while it moves, and the bounds end it.

Times are seconds and come in as arguments.
"""

from __future__ import annotations

import re
from collections import deque

from semel.errors import ConfigurationError
from semel.processing.limits import UNIT_RECORDS_MAX

__all__ = [
    "OBJECTIVE_SECONDS_MAX",
    "OBJECTIVE_SECONDS_MIN",
    "FixedPace",
    "LatencyPace",
    "Pace",
    "parse_latency",
    "parse_seconds",
]

OBJECTIVE_SECONDS_MIN = 0.002
"""Below, not even one commit fits."""
OBJECTIVE_SECONDS_MAX = 60.0
"""Above, a commit interval says it better."""

_OWN_SHARE = 0.7
"""Of the objective, for what is measured here: the rest is for the way into the log, the fetch and the reader's."""
_MEAN_GAIN, _DEVIATION_GAIN = 1 / 8, 1 / 4
_DEVIATIONS = 4
_RATE_GAIN = 1 / 8
_KEPT = 512
"""Latencies of units that the quantiles are taken of."""

_LATENCY = re.compile(r"(\d+(?:\.\d+)?)(ms|s)")


def parse_seconds(text: object) -> float | None:
    """Seconds of `"50ms"` or `"1.5s"`; None for anything else."""
    found = _LATENCY.fullmatch(text) if isinstance(text, str) else None
    return None if found is None else float(found[1]) / (1000 if found[2] == "ms" else 1)


def parse_latency(text: object, what: str) -> float:
    """Seconds of `"50ms"` or `"1.5s"`. Raises `ConfigurationError`."""
    seconds = parse_seconds(text) or 0.0
    if not OBJECTIVE_SECONDS_MIN <= seconds <= OBJECTIVE_SECONDS_MAX:
        raise ConfigurationError(
            f"{what}: latency={text!r}, but a latency is stated as '50ms' or '1.5s', from "
            f"{OBJECTIVE_SECONDS_MIN * 1000:g}ms to {OBJECTIVE_SECONDS_MAX:g}s."
        )
    return seconds


class _Latencies:
    """Quantiles of the last units' latencies, from the first record's arrival to the end of the commit."""

    def __init__(self) -> None:
        self._kept: deque[float] = deque(maxlen=_KEPT)

    def add(self, seconds: float) -> None:
        self._kept.append(seconds)

    def quantile(self, share: float) -> float:
        """0 while nothing was measured."""
        if not self._kept:
            return 0.0
        ranked = sorted(self._kept)
        return ranked[min(len(ranked) - 1, int(share * len(ranked)))]


class FixedPace:
    """The interval of the settings: a unit ends when nothing more is there, or after this time."""

    objective: float | None = None
    records = UNIT_RECORDS_MAX

    def __init__(self, interval: float) -> None:
        self.interval = interval
        self.latencies = _Latencies()

    def __repr__(self) -> str:
        return f"<FixedPace {self.interval * 1000:g} ms>"

    def handled(self, records: int, seconds: float) -> None:
        """Nothing follows from it."""

    def landed(self, commit: float, total: float) -> None:  # noqa: ARG002 - as the other one
        """A unit was committed: so long on its way, so long since its first record came."""
        self.latencies.add(total)


class LatencyPace:
    """The longest interval and the largest unit that hold an objective, by what is measured.

    Units wait for their interval even when nothing more is there at the moment: that is what makes few commits of many
    records. At first it commits at once.
    """

    def __init__(self, objective: float) -> None:
        self.objective: float | None = objective
        self.latencies = _Latencies()
        self._budget = objective * _OWN_SHARE
        self._mean: float | None = None
        self._deviation = 0.0
        self._rate: float | None = None

    def __repr__(self) -> str:
        return f"<LatencyPace {self._budget * 1000:g} ms: {self.interval * 1000:.1f} ms, {self.records} records>"

    @property
    def commit(self) -> float:
        """How long a commit takes at most, as far as can be told."""
        return self._budget if self._mean is None else self._mean + _DEVIATIONS * self._deviation

    @property
    def interval(self) -> float:
        """How long a unit may gather, from its first record on; 0 when the commit alone needs everything."""
        return max(0.0, self._budget - self.commit)

    @property
    def records(self) -> int:
        """How many records a unit may take: as many as are handled within the interval, and at least one."""
        if self._rate is None:
            return UNIT_RECORDS_MAX
        return max(1, min(UNIT_RECORDS_MAX, int(self._rate * max(self.interval, self._budget / 8))))

    def handled(self, records: int, seconds: float) -> None:
        """So many records were handled in so much time, without any waiting for more."""
        if records < 1 or seconds <= 0:
            return
        rate = records / seconds
        self._rate = rate if self._rate is None else self._rate + _RATE_GAIN * (rate - self._rate)

    def landed(self, commit: float, total: float) -> None:
        """A unit was committed: so long on its way, so long since its first record came."""
        self.latencies.add(total)
        if self._mean is None:
            self._mean, self._deviation = commit, commit / 2
            return
        error = commit - self._mean
        self._deviation += _DEVIATION_GAIN * (abs(error) - self._deviation)
        self._mean += _MEAN_GAIN * error


Pace = FixedPace | LatencyPace

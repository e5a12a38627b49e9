"""`semel top`: what every component does now, from the metrics that its processes publish.

Counters become rates between two looks; of gauges the sum or the worst over the processes is shown.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError
from urllib.request import urlopen

from semel.errors import ConfigurationError, Retriable
from semel.ops.exposition import join, read_others

__all__ = ["COLUMNS", "Sample", "from_folder", "from_url", "parse", "rows"]

URL_SECONDS = 5.0
"""How long an HTTP instance may take for its metrics."""
PAGE_BYTES_MAX = 16 * 1_048_576
"""A page of metrics: a thousand components with a thousand partitions each are less."""

COLUMNS = (
    "component",
    "records_s",
    "commits_s",
    "failed_s",
    "lag",
    "p50_ms",
    "p99_ms",
    "objective_ms",
    "interval_ms",
    "parked",
    "stopped",
    "open_s",
)

_OPEN = (
    "semel_open_transaction_age_seconds",
    "semel_dual_prepared_age_seconds",
    "semel_cluster_open_transaction_age_seconds",
)
_LINE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+)")
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')


class Sample(NamedTuple):
    """One series' value."""

    name: str
    labels: Mapping[str, str]
    value: float


def from_folder(data: Path) -> list[Sample]:
    """What the processes of a deployment on this host publish. Raises `ConfigurationError` when there are none."""
    texts = read_others(data, "")
    if not texts:
        raise ConfigurationError(
            f"no process publishes metrics in {data / 'metrics'}: start the app with `semel run`, name its folder with "
            "SEMEL_DATA, or an HTTP instance with --url."
        )
    return list(parse(join(texts)))


def from_url(url: str) -> list[Sample]:
    """What an HTTP instance shows. Raises `Retriable` when it does not answer with a page of metrics."""
    if not url.startswith(("http://", "https://")):
        raise ConfigurationError(f"--url {url!r} does not begin with http:// or https://.")
    page = url if url.rstrip("/").endswith("/metrics") else url.rstrip("/") + "/metrics"
    try:
        with urlopen(page, timeout=URL_SECONDS) as answer:  # noqa: S310 - http and https only, see above
            return list(parse(answer.read(PAGE_BYTES_MAX).decode(errors="replace")))
    except (URLError, OSError, ValueError) as error:
        raise Retriable(f"{page} gives no metrics: {error}") from error


def parse(text: str) -> Iterator[Sample]:
    """The series of a page in Prometheus' text format; lines that are none are passed over."""
    for line in text.splitlines():
        found = _LINE.fullmatch(line)
        if found is None:
            continue
        try:
            value = float(found[3])
        except ValueError:
            continue
        labels = {name: re.sub(r"\\(.)", _unescape, raw) for name, raw in _LABEL.findall(found[2] or "")}
        yield Sample(found[1], labels, value)


def _unescape(found: re.Match[str]) -> str:
    return "\n" if found[1] == "n" else found[1]


def rows(before: list[Sample], after: list[Sample], seconds: float) -> list[dict[str, Any]]:
    """One row for each component, between two looks that are so far apart; fields as in `COLUMNS`.

    A counter that went back is of a process that began again: what it says now is counted.
    """
    components = sorted({sample.labels["component"] for sample in after if "component" in sample.labels})
    return [_row(component, before, after, seconds) for component in components]


def _row(component: str, before: list[Sample], after: list[Sample], seconds: float) -> dict[str, Any]:
    def values(name: str, **labels: str) -> list[float]:
        return [
            sample.value
            for sample in after
            if sample.name == name
            and labels.items() <= sample.labels.items()
            and sample.labels["component"] == component
        ]

    def rate(*names: str, which: Callable[[str], bool] = lambda _: True) -> float:
        known = {(sample.name, *sorted(sample.labels.items())): sample.value for sample in before}
        grown = 0.0
        for sample in after:
            if sample.name in names and sample.labels.get("component") == component:
                was = known.get((sample.name, *sorted(sample.labels.items())), 0.0)
                if which(sample.labels.get("outcome", "")):
                    grown += sample.value - was if sample.value >= was else sample.value
        return round(grown / seconds, 1)

    def worst_ms(name: str, **labels: str) -> float | None:
        found = values(name, **labels)
        return round(max(found) * 1000, 1) if found else None

    transactions = ("semel_transactions_total", "semel_sink_transactions_total")
    return {
        "component": component,
        "records_s": rate("semel_records_total"),
        "commits_s": rate(*transactions, which=lambda outcome: outcome == "committed"),
        "failed_s": rate(*transactions, which=lambda outcome: outcome != "committed"),
        "lag": int(sum(values("semel_lag_records"))),
        "p50_ms": worst_ms("semel_unit_latency_seconds", quantile="0.5"),
        "p99_ms": worst_ms("semel_unit_latency_seconds", quantile="0.99"),
        "objective_ms": worst_ms("semel_latency_objective_seconds"),
        "interval_ms": worst_ms("semel_commit_interval_seconds"),
        "parked": int(sum(values("semel_parked_keys"))),
        "stopped": int(sum(values("semel_stopped_partitions"))),
        "open_s": max((round(age, 1) for name in _OPEN for age in values(name)), default=None),
    }

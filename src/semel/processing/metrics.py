"""Counters and gauges with Prometheus' text format (version 0.0.4), and nothing else.

One registry a process. A gauge can be a function that is asked when somebody looks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

__all__ = ["Counter", "Gauge", "Metrics"]

LabelValues = tuple[str, ...]


class _Metric:
    kind = ""

    def __init__(self, name: str, help_text: str, labels: Sequence[str]) -> None:
        self.name = name
        self.help = help_text
        self.labels = tuple(labels)
        self._values: dict[LabelValues, float] = {}

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {len(self._values)} series>"

    def _key(self, labels: dict[str, str]) -> LabelValues:
        if len(labels) != len(self.labels):
            raise ValueError(f"metric {self.name} has the labels {self.labels}, got {tuple(labels)}")
        return tuple(labels[name] for name in self.labels)

    def value(self, **labels: str) -> float:
        """The value of one series; 0 when it was never touched."""
        return self._values.get(self._key(labels), 0.0)

    def samples(self) -> list[tuple[LabelValues, float]]:
        """Every series with its value."""
        return sorted(self._values.items())


class Counter(_Metric):
    """A number that only rises."""

    kind = "counter"

    def add(self, amount: float = 1, **labels: str) -> None:
        """Raise one series."""
        assert amount >= 0
        key = self._key(labels)
        self._values[key] = self._values.get(key, 0.0) + amount


class Gauge(_Metric):
    """A number that is what it is now."""

    kind = "gauge"

    def __init__(self, name: str, help_text: str, labels: Sequence[str]) -> None:
        super().__init__(name, help_text, labels)
        self._functions: dict[LabelValues, Callable[[], float]] = {}

    def set(self, value: float, **labels: str) -> None:
        """Give one series a value."""
        self._values[self._key(labels)] = value

    def watch(self, function: Callable[[], float], **labels: str) -> None:
        """From now on one series is whatever `function` says."""
        self._functions[self._key(labels)] = function

    def remove(self, **labels: str) -> None:
        """Forget one series: what it measured is gone."""
        key = self._key(labels)
        self._values.pop(key, None)
        self._functions.pop(key, None)

    def value(self, **labels: str) -> float:
        """The value of one series; 0 when it was never touched."""
        function = self._functions.get(self._key(labels))
        return super().value(**labels) if function is None else function()

    def samples(self) -> list[tuple[LabelValues, float]]:
        """Every series with its value."""
        return sorted({**self._values, **{key: function() for key, function in self._functions.items()}}.items())


M = TypeVar("M", "Counter", "Gauge")


class Metrics:
    """The registry. Asking for a name again gives the same metric, so that rooms can share one."""

    def __init__(self) -> None:
        self._metrics: dict[str, Counter | Gauge] = {}

    def __repr__(self) -> str:
        return f"<Metrics {len(self._metrics)} names>"

    def counter(self, name: str, help_text: str, labels: Sequence[str] = ()) -> Counter:
        """The counter of this name."""
        return self._get(Counter(name, help_text, labels))

    def gauge(self, name: str, help_text: str, labels: Sequence[str] = ()) -> Gauge:
        """The gauge of this name."""
        return self._get(Gauge(name, help_text, labels))

    def _get(self, metric: M) -> M:
        found = self._metrics.setdefault(metric.name, metric)
        if type(found) is not type(metric) or found.labels != metric.labels:
            raise ValueError(f"metric {metric.name} exists as a {found.kind} with the labels {found.labels}")
        return found

    def render(self) -> str:
        """All of it in Prometheus' text format."""
        lines = []
        for metric in sorted(self._metrics.values(), key=lambda item: item.name):
            lines += [f"# HELP {metric.name} {_escape(metric.help)}", f"# TYPE {metric.name} {metric.kind}"]
            for key, value in metric.samples():
                pairs = ",".join(
                    f'{name}="{_escape(text, quote=True)}"' for name, text in zip(metric.labels, key, strict=True)
                )
                lines.append(f"{metric.name}{{{pairs}}} {value:.15g}" if pairs else f"{metric.name} {value:.15g}")
        return "\n".join(lines) + "\n"


def _escape(text: str, *, quote: bool = False) -> str:
    escaped = text.replace("\\", "\\\\").replace("\n", "\\n")
    return escaped.replace('"', '\\"') if quote else escaped

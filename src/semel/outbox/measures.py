"""What a relay counts. Ages and depths are of the whole outbox, whichever relay shows them."""

from __future__ import annotations

from semel.outbox.store import Depth
from semel.processing.metrics import Metrics

__all__ = ["Measures"]


class Measures:
    """The metrics of one relay; `component` is its name in the app."""

    def __init__(self, metrics: Metrics, component: str) -> None:
        self._component = component
        self._transactions = metrics.counter(
            "semel_outbox_transactions_total", "Kafka transactions by outcome.", ("component", "outcome")
        )
        self._records = metrics.counter("semel_outbox_published_total", "Rows that are in Kafka.", ("component",))
        self._rows = metrics.gauge(
            "semel_outbox_rows", "Rows that wait in the outbox, counted up to 100,000.", ("component",)
        )
        self._held = metrics.gauge("semel_outbox_held_rows", "Those of them that are held back.", ("component",))
        self._age = metrics.gauge("semel_outbox_age_seconds", "Age of the oldest row that is not held.", ("component",))
        self._lanes = metrics.gauge("semel_outbox_lanes", "Lanes that this relay publishes.", ("component",))
        self._up = metrics.gauge("semel_outbox_database_up", "1 while the database does its work.", ("component",))
        for outcome in ("committed", "failed", "fenced"):
            self._transactions.add(0, component=component, outcome=outcome)
        self._records.add(0, component=component)
        self._lanes.set(0, component=component)
        self._up.set(0, component=component)

    def committed(self, records: int) -> None:
        """A transaction is in Kafka."""
        self._transactions.add(component=self._component, outcome="committed")
        self._records.add(records, component=self._component)

    def failed(self, outcome: str) -> None:
        """A transaction ended without effect, or nobody knows how: `failed` or `fenced`."""
        self._transactions.add(component=self._component, outcome=outcome)

    def depth(self, depth: Depth, now_ms: int) -> None:
        """What is in the outbox now."""
        age = 0.0 if depth.oldest_ms is None else max(0.0, (now_ms - depth.oldest_ms) / 1000)
        self._rows.set(depth.rows, component=self._component)
        self._held.set(depth.held, component=self._component)
        self._age.set(age, component=self._component)

    def lanes(self, count: int) -> None:
        """How many lanes are ours."""
        self._lanes.set(count, component=self._component)

    def database_up(self, up: bool) -> None:
        """Whether the database does its work."""
        self._up.set(float(up), component=self._component)

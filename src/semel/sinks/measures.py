"""What a sink counts. The names are the processors' where they mean the same, so that one dashboard shows both."""

from __future__ import annotations

from collections.abc import Mapping

from semel.processing.metrics import Metrics
from semel.sinks.contract import Applied
from semel.types import TopicPartition

__all__ = ["Measures"]


class Measures:
    """The metrics of one sink; `component` is its name in the app."""

    def __init__(self, metrics: Metrics, component: str) -> None:
        self._component = component
        self._lags: set[str] = set()
        self._parked_partitions: set[str] = set()
        self._transactions = metrics.counter(
            "semel_sink_transactions_total", "Database transactions by outcome.", ("component", "outcome")
        )
        self._parked_records = metrics.counter(
            "semel_sink_parked_records_total", "Records that were parked instead of applied.", ("component",)
        )
        self._records = metrics.counter(
            "semel_records_total", "Input records whose effects are committed.", ("component",)
        )
        self._copies = metrics.counter(
            "semel_sink_copies_total", "Records whose message had been applied already.", ("component",)
        )
        self._lag = metrics.gauge(
            "semel_lag_records", "Offsets between the committed position and the log's end.", ("component", "partition")
        )
        self._parked = metrics.gauge(
            "semel_parked_keys", "Keys whose records wait in a park topic.", ("component", "partition")
        )
        self._stopped = metrics.gauge("semel_stopped_partitions", "Partitions that wait for a person.", ("component",))
        self._up = metrics.gauge("semel_sink_database_up", "1 while the sink's database does its work.", ("component",))
        for outcome in ("committed", "failed", "fenced"):
            self._transactions.add(0, component=component, outcome=outcome)
        self._records.add(0, component=component)
        self._stopped.set(0, component=component)
        self._up.set(0, component=component)

    def applied(self, applied: Applied) -> None:
        """A call of the sink made this durable."""
        self._transactions.add(applied.transactions, component=self._component, outcome="committed")
        self._records.add(applied.records, component=self._component)
        self._parked_records.add(applied.parked, component=self._component)
        self._copies.add(applied.copies, component=self._component)

    def failed(self, outcome: str) -> None:
        """A transaction ended without effect: `failed` or `fenced`."""
        self._transactions.add(component=self._component, outcome=outcome)

    def database_up(self, up: bool) -> None:
        """Whether the database does its work."""
        self._up.set(float(up), component=self._component)

    def stopped(self, count: int) -> None:
        """How many partitions wait for a person."""
        self._stopped.set(count, component=self._component)

    def parked(self, keys: Mapping[TopicPartition, int]) -> None:
        """Parked keys of every partition of ours."""
        now = {str(partition): count for partition, count in keys.items()}
        for gone in self._parked_partitions - now.keys():
            self._parked.remove(component=self._component, partition=gone)
        self._parked_partitions = set(now)
        for partition, count in now.items():
            self._parked.set(count, component=self._component, partition=partition)

    def lag(self, lags: Mapping[TopicPartition, int]) -> None:
        """The lag of every partition of ours, in offsets."""
        now = {str(partition): lag for partition, lag in lags.items()}
        for gone in self._lags - now.keys():
            self._lag.remove(component=self._component, partition=gone)
        self._lags = set(now)
        for partition, lag in now.items():
            self._lag.set(lag, component=self._component, partition=partition)

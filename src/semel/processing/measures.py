"""What the engine counts: names, help and labels of its metrics in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from semel.processing.metrics import Metrics
from semel.processing.pace import Pace
from semel.types import TopicPartition

__all__ = ["Measures"]

QUANTILES = (0.5, 0.99)
OUTCOMES = ("committed", "aborted", "fenced", "unknown")


class Measures:
    """The metrics of one component."""

    def __init__(self, metrics: Metrics, component: str) -> None:
        self._component = component
        self._partitions: set[TopicPartition] = set()
        self._parked_partitions: set[str] = set()
        self._transactions = metrics.counter(
            "semel_transactions_total", "Kafka transactions by outcome.", ("component", "outcome")
        )
        self._records = metrics.counter(
            "semel_records_total", "Input records whose effects are committed.", ("component",)
        )
        self._lag = metrics.gauge(
            "semel_lag_records", "Offsets between the committed position and the log's end.", ("component", "partition")
        )
        self._age = metrics.gauge(
            "semel_open_transaction_age_seconds", "Age of the oldest open transaction; 0 for none.", ("component",)
        )
        self._parked = metrics.gauge(
            "semel_parked_keys", "Keys whose records wait in a park topic.", ("component", "partition")
        )
        self._stopped = metrics.gauge("semel_stopped_partitions", "Partitions that wait for a person.", ("component",))
        self._restored = metrics.counter(
            "semel_restored_records_total", "Records read to restore state and parked keys.", ("component",)
        )
        self._restoring = metrics.gauge(
            "semel_restore_remaining_offsets",
            "Offsets that a restore has yet to read; 0: none is on.",
            ("component",),
        )
        self._restored.add(0, component=component)
        self._restoring.set(0, component=component)
        self._interval = metrics.gauge(
            "semel_commit_interval_seconds", "How long a unit of work gathers at most, as chosen now.", ("component",)
        )
        self._unit_records = metrics.gauge(
            "semel_unit_records_limit", "How many records a unit of work takes, as chosen now.", ("component",)
        )
        self._objective = metrics.gauge(
            "semel_latency_objective_seconds", "The latency that is stated; none without one.", ("component",)
        )
        self._latency = metrics.gauge(
            "semel_unit_latency_seconds",
            "From a unit's first record to the end of its commit, over the last units.",
            ("component", "quantile"),
        )
        for outcome in OUTCOMES:
            self._transactions.add(0, component=component, outcome=outcome)
        self._records.add(0, component=component)
        self._age.set(0, component=component)
        self._stopped.set(0, component=component)

    def pace(self, pace: Pace) -> None:
        """Show what was chosen, and what came of it."""
        self._interval.watch(lambda: pace.interval, component=self._component)
        self._unit_records.watch(lambda: pace.records, component=self._component)
        if pace.objective is not None:
            self._objective.set(pace.objective, component=self._component)
        for share in QUANTILES:
            quantile = partial(pace.latencies.quantile, share)
            self._latency.watch(quantile, component=self._component, quantile=f"{share:g}")

    def transaction(self, outcome: str) -> None:
        """One transaction ended like this."""
        self._transactions.add(component=self._component, outcome=outcome)

    def committed(self, records: int) -> None:
        """A unit of work was committed."""
        self.transaction("committed")
        self._records.add(records, component=self._component)

    def transaction_began(self, monotonic: Callable[[], float]) -> None:
        """From now on a transaction is open."""
        start = monotonic()
        self._age.watch(lambda: monotonic() - start, component=self._component)

    def transaction_ended(self) -> None:
        """No transaction is open."""
        self._age.remove(component=self._component)
        self._age.set(0, component=self._component)

    def parked(self, keys: Mapping[str, int]) -> None:
        """Parked keys by partition."""
        for partition in self._parked_partitions - keys.keys():
            self._parked.remove(component=self._component, partition=partition)
        self._parked_partitions = set(keys)
        for partition, count in keys.items():
            self._parked.set(count, component=self._component, partition=partition)

    def stopped(self, count: int) -> None:
        """How many partitions stopped."""
        self._stopped.set(count, component=self._component)

    def restored(self, records: int) -> None:
        """So many records were read to restore state."""
        self._restored.add(records, component=self._component)

    def restoring(self, remaining: int) -> None:
        """A restore has so many offsets to read yet."""
        self._restoring.set(remaining, component=self._component)

    def lag(self, partition: TopicPartition, records: int) -> None:
        """The lag of one partition of ours."""
        self._partitions.add(partition)
        self._lag.set(records, component=self._component, partition=str(partition))

    def forget(self, partition: TopicPartition) -> None:
        """A partition is no longer ours to speak of."""
        self._partitions.discard(partition)
        self._lag.remove(component=self._component, partition=str(partition))

    def close(self) -> None:
        """Forget every partition."""
        for partition in list(self._partitions):
            self.forget(partition)
        self.parked({})

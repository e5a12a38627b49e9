"""What the dual write counts, in one process and for one database."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from semel.dualwrite.slots import SlotState
from semel.processing.metrics import Metrics

__all__ = ["Measures"]


class Measures:
    """`component` is the name of the dual write in the app: `dual`, or `dual-<database>`."""

    def __init__(self, metrics: Metrics, component: str) -> None:
        self._component = component
        self._transactions = metrics.counter(
            "semel_dual_transactions_total", "Transactions that sent records, by outcome.", ("component", "outcome")
        )
        self._recovered = metrics.counter(
            "semel_dual_recovered_total",
            "Slots that were taken over, by what became of what was open.",
            ("component", "found"),
        )
        self._slots = metrics.gauge("semel_dual_slots", "Slots of this process by state.", ("component", "state"))
        self._age = metrics.gauge(
            "semel_dual_prepared_age_seconds",
            "Age of the oldest transaction of this process that is prepared in Kafka and not ended.",
            ("component",),
        )
        self._doubt = metrics.gauge(
            "semel_dual_unrecovered_slots", "Slots whose owner is gone and that nobody recovered yet.", ("component",)
        )
        for outcome in ("committed", "aborted", "fenced", "unknown", "lost"):
            self._transactions.add(0, component=component, outcome=outcome)
        for found in ("nothing", "committed", "aborted"):
            self._recovered.add(0, component=component, found=found)
        self._doubt.set(0, component=component)

    def watch(self, count: Callable[[SlotState], int], oldest: Callable[[], float]) -> None:
        """From now on slots and age are what these say."""
        for state in SlotState:
            if state is not SlotState.LOST:
                self._slots.watch(partial(_as_float, count, state), component=self._component, state=state.value)
        self._age.watch(oldest, component=self._component)

    def ended(self, outcome: str) -> None:
        """A transaction with records: `committed`, `aborted`, `fenced`, `unknown`, or `lost` when Kafka forgot what
        the database committed."""
        self._transactions.add(component=self._component, outcome=outcome)

    def recovered(self, found: str) -> None:
        """A slot was taken over: `nothing`, `committed` or `aborted`."""
        self._recovered.add(component=self._component, found=found)

    def in_doubt(self, count: int) -> None:
        """So many slots of dead owners are not recovered."""
        self._doubt.set(count, component=self._component)


def _as_float(count: Callable[[SlotState], int], state: SlotState) -> float:
    return float(count(state))

"""The definitions, one small function each: what is wrong with an attempt, an input, a position, a sink's row.

The passes over the evidence only gather; here it is decided. Each docstring has the definition and where it is from:
[Jepsen] jepsen.tests.kafka, [Adya] "Weak Consistency" (1999), [KIP-890], [KIP-447], [Kafka] its ducktape tests,
[Semel] docs/guarantees.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from semel.prove.check.findings import Anomaly
from semel.prove.check.logs import ABORTED, COMMITTED, SPLIT
from semel.prove.check.model import FAIL, OK, OUTCOME_NAMES

__all__ = ["ATTEMPT_RULES", "INPUT_RULES", "AttemptFate", "InputFate"]


class AttemptFate(NamedTuple):
    """One attempt: what it was told, what it should have written, and what of it can be read."""

    name: str
    component: str
    outcome: int
    expected: int
    visible: int
    flags: int
    is_batch: bool = False
    """A sink's batch: offsets in the ledger instead of records in a log."""

    @property
    def what(self) -> str:
        kind = "batch" if self.is_batch else "transaction"
        return f"{self.component}'s {kind}, told {OUTCOME_NAMES[self.outcome]!r}"

    def found(self, kind: str, why: str) -> Anomaly:
        return Anomaly(kind, (self.name,), f"{self.what}: {why}", (self.name,))


def lost_write(fate: AttemptFate) -> Anomaly | None:
    """L3: told committed, and not everything of it is visible in the final log. [Jepsen: lost-write]"""
    if not fate.is_batch and fate.outcome == OK and fate.visible < fate.expected:
        return fate.found("L3", f"{fate.expected - fate.visible} of {fate.expected} records cannot be read")
    return None


def aborted_read(fate: AttemptFate) -> Anomaly | None:
    """L4: told that it definitely failed, and something of it is visible. [Adya: G1a; Jepsen: aborted-read]"""
    if not fate.is_batch and fate.outcome == FAIL and fate.visible:
        return fate.found("L4", f"{fate.visible} of {fate.expected} records can be read")
    return None


def torn_transaction(fate: AttemptFate) -> Anomaly | None:
    """L6: at quiescence, some of its records are visible and others are not. [KIP-890; Jepsen: torn transactions]"""
    if not fate.is_batch and 0 < fate.visible < fate.expected:
        return fate.found("L6", f"{fate.visible} of {fate.expected} records can be read, the others cannot")
    return None


def wrong_end(fate: AttemptFate) -> Anomaly | None:
    """L7: the marker is not what its owner was told, or ended more, or less, than one attempt. [KIP-890]"""
    if fate.is_batch:
        return None
    if fate.flags & SPLIT:
        return fate.found("L7", "a marker lies between its records, or ended it together with another attempt")
    if fate.outcome == OK and fate.flags & ABORTED:
        return fate.found("L7", "a marker in the log says aborted")
    if fate.outcome == FAIL and fate.flags & COMMITTED:
        return fate.found("L7", "a marker in the log says committed")
    return None


def undeclared(fate: AttemptFate) -> Anomaly | None:
    """E3: more is visible of it than its inputs were said to have. [Semel: effects are values, known beforehand]"""
    if not fate.is_batch and fate.visible > fate.expected:
        return fate.found("E3", f"{fate.visible} records can be read, and it named {fate.expected}")
    return None


def torn_batch(fate: AttemptFate) -> Anomaly | None:
    """E4: of a sink's batch, which is one database transaction, only a part is in the ledger. [Semel: atomic unit]"""
    if fate.is_batch and 0 < fate.visible < fate.expected:
        return fate.found("E4", f"{fate.visible} of {fate.expected} records are in the ledger, the others are not")
    return None


def false_report(fate: AttemptFate) -> Anomaly | None:
    """E17: a definite answer that is not true: committed and not there, or failed and there. [Semel; Jepsen: :fail]"""
    if fate.outcome == OK and fate.visible < fate.expected:
        return fate.found("E17", f"only {fate.visible} of {fate.expected} effects exist")
    if fate.outcome == FAIL and fate.visible:
        return fate.found("E17", f"{fate.visible} of {fate.expected} effects exist")
    return None


ATTEMPT_RULES: tuple[Callable[[AttemptFate], Anomaly | None], ...] = (
    lost_write,
    aborted_read,
    torn_transaction,
    wrong_end,
    undeclared,
    torn_batch,
    false_report,
)


class InputFate(NamedTuple):
    """One input of one component: how often it was worked on, and which of its outputs can be read."""

    component: str
    topic: str
    partition: int
    offset: int
    covered: int
    """Attempts that took effect with it."""
    is_passed: bool
    """Whether the component's position lies behind it."""
    is_there: bool
    """Whether it is a visible record of its log."""
    outputs: int = 0
    expected: int = 0
    is_parked: bool = False
    is_split: bool = False
    """Its outputs are of several attempts, and none is there twice."""
    attempts: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        return f"{self.topic}-{self.partition}@{self.offset}"

    def found(self, kind: str, why: str) -> Anomaly:
        return Anomaly(kind, (self.component, self.place), why, self.attempts)


def lost(item: InputFate) -> Anomaly | None:
    """E1: the position passed a visible input, and it has neither effects nor was it parked. [Kafka: lost; Semel 2]"""
    if item.is_there and item.is_passed and not item.covered and not item.is_parked:
        return item.found("E1", "it was passed and nothing was done for it")
    return None


def doubled(item: InputFate) -> Anomaly | None:
    """E2: more than one attempt took effect with an input. [Kafka: duplicates; Semel 2]"""
    if item.covered > 1 and not item.is_split and not item.is_parked:
        return item.found("E2", f"{item.covered} attempts took effect with it")
    return None


def phantom(item: InputFate) -> Anomaly | None:
    """E3: effects of an input that is not there: never written, aborted, or a marker. [Semel 2, 5]"""
    if (item.covered or item.is_parked) and not item.is_there:
        return item.found("E3", "it has effects, and no reader can see such an input")
    return None


def torn(item: InputFate) -> Anomaly | None:
    """E4: some of an input's outputs are visible and others are not. [Semel: atomic unit]"""
    if 0 < item.outputs < item.expected:
        return item.found("E4", f"{item.outputs} of its {item.expected} outputs can be read")
    return None


def skewed(item: InputFate) -> Anomaly | None:
    """E5: an input has its effects and the position lies before it: the next owner does it again. [KIP-447]"""
    if item.covered and not item.is_passed:
        return item.found("E5", "it is done, and the position has not passed it")
    return None


def mixed(item: InputFate) -> Anomaly | None:
    """E6: every output once, and from more than one attempt: right by luck. [Semel: atomic unit]"""
    if item.is_split and not item.is_parked:
        return item.found("E6", "its outputs come from several attempts")
    return None


def parked_and_done(item: InputFate) -> Anomaly | None:
    """E10: an input waits among the parked ones and has effects as well. [Semel 1]"""
    if item.is_parked and item.covered > 0:
        return item.found("E10", "it is parked, and something was done for it")
    return None


INPUT_RULES: tuple[Callable[[InputFate], Anomaly | None], ...] = (
    lost,
    doubled,
    phantom,
    torn,
    skewed,
    mixed,
    parked_and_done,
)


def judged(item: InputFate) -> Iterator[Anomaly]:
    """Every rule of inputs."""
    for rule in INPUT_RULES:
        found = rule(item)
        if found is not None:
            yield found

"""What is wrong, by class: the classes with their meaning, one anomaly, and all that a check found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["CLASSES", "DETAILS_MAX", "Anomaly", "Findings", "Kind"]

DETAILS_MAX = 1_000
"""Anomalies of one class that are kept whole; the others are counted. Nobody reads the thousand and first."""


class Kind(NamedTuple):
    """A class of anomalies."""

    name: str
    meaning: str


CLASSES: dict[str, Kind] = {
    "L1": Kind("inconsistent offset", "Two observers saw different records at one offset."),
    "L2": Kind("duplicate append", "One record of one attempt stands twice in its topic."),
    "L3": Kind("lost write", "A write was acknowledged, and a reader of the final log does not see it."),
    "L4": Kind("aborted read", "What definitely failed or was aborted can be read, or was read."),
    "L5": Kind("read before the write", "A record was read before the attempt that wrote it had begun."),
    "L6": Kind("torn transaction", "Some of a transaction's records are visible and others are not."),
    "L7": Kind("wrong end", "A transaction ended in another way, or at another place, than its owner was told."),
    "L8": Kind("zombie append", "A producer wrote under an epoch that was already replaced."),
    "L9": Kind("sequence gap", "A producer's batches do not follow each other by their sequence numbers."),
    "L10": Kind("order inside a transaction", "Records of one attempt stand in another order than it made them."),
    "L11": Kind("poll skip", "A reader skipped or repeated visible offsets of a partition."),
    "L12": Kind("circular flow", "Transactions read each other's writes in a circle."),
    "L14": Kind("isolation leak", "A reader was given a marker, or a record whose transaction was still open."),
    "L15": Kind("hanging transaction", "A transaction is still open after everything was drained."),
    "L16": Kind(
        "damaged log", "Bytes or offsets of a log are missing or damaged, or it ends before what it acknowledged."
    ),
    "L17": Kind("vanished read", "A record that a reader was given is not in the final log."),
    "E1": Kind("lost", "An input is passed by its consumer's position and has no effects, nor was it parked."),
    "E2": Kind("doubled", "An input has its effects more than once."),
    "E3": Kind("phantom", "An effect has no input, or nobody made it."),
    "E4": Kind("torn", "An input, or a batch of them, has some of its effects and lacks others."),
    "E5": Kind("skewed position", "A position does not agree with the effects: behind them, or beyond the log's end."),
    "E6": Kind("mixed attempts", "An input's effects come from several attempts, each with a part."),
    "E7": Kind("out of order", "Effects stand in another order than their inputs."),
    "E8": Kind("wrong effect", "A value differs from what the inputs add up to."),
    "E9": Kind("broken invariant", "A rule that the app states about its data does not hold."),
    "E10": Kind("parked and done", "An input is parked and has effects as well."),
    "E12": Kind("zombie at the sink", "A sink's row was written by an owner after a later owner had written."),
    "E13": Kind("in doubt", "A prepared transaction was left, and nobody will end it."),
    "E14": Kind("key not unique", "One Idempotency-Key had two answers, two effects, or took two different requests."),
    "E16": Kind("not done", "Faults are over, everything was waited for, and an input is still not worked on."),
    "E17": Kind("false report", "What an attempt was told of its end is not what happened."),
}
"""Every class that is checked, by its id in the literature's table (docs/proof.md has sources and what is left out)."""


class Anomaly(NamedTuple):
    """One thing that is wrong. `ids` name it (attempts, places, keys); `attempts` have a timeline to show."""

    kind: str
    ids: tuple[str, ...]
    why: str
    attempts: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind} {CLASSES[self.kind].name}: {', '.join(self.ids)}: {self.why}"


@dataclass(slots=True)
class Findings:
    """All that is wrong. `counts` is complete; of each class at most `DETAILS_MAX` are in `anomalies`."""

    anomalies: list[Anomaly] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    """What could not be judged, and why: limits of the claim."""
    checked: Counter[str] = field(default_factory=Counter)
    """How much was looked at: records, attempts, inputs, ledger rows, requests, reads."""

    @property
    def clean(self) -> bool:
        return not self.counts

    def add(self, kind: str, ids: str | tuple[str, ...], why: str, attempts: tuple[str, ...] = ()) -> None:
        """Count one anomaly, and keep it while there are few of its class."""
        self.counts[kind] += 1
        if self.counts[kind] <= DETAILS_MAX:
            self.anomalies.append(Anomaly(kind, (ids,) if isinstance(ids, str) else ids, why, attempts))

    def extend(self, found: Iterable[Anomaly]) -> None:
        for anomaly in found:
            self.add(*anomaly)

    def merge(self, other: Findings) -> None:
        """Add what another check found."""
        kept = Counter(anomaly.kind for anomaly in other.anomalies)
        self.extend(other.anomalies)
        self.counts += other.counts - kept
        self.notes += other.notes
        self.checked += other.checked

    def of(self, *kinds: str) -> int:
        """How many there are of these classes."""
        return sum(self.counts[kind] for kind in kinds)

    def summary(self) -> str:
        """One line for people."""
        if self.clean:
            return "0 lost, 0 duplicated"
        first: dict[str, Anomaly] = {}
        for anomaly in self.anomalies:
            first.setdefault(anomaly.kind, anomaly)
        return ", ".join(
            f"{count} {kind} {CLASSES[kind].name} ({', '.join(first[kind].ids)})" for kind, count in self.counts.items()
        )

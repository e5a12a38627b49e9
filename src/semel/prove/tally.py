"""What a history adds up to, in one pass: effects, how often handlers ran, and how long each recovery took.

A recovery begins when a fault is over (a kill: when it struck) and ends when every partition that the struck process
had been committing to was committed to again, by whomever. For a fault that strikes no single process, that is every
partition of the app. Where faults overlap, it begins when the last one that struck before its end was over: how long
one fault is felt cannot be told apart from the next.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from semel.history import Batch, Event, Strike, Unit

__all__ = ["Recovery", "Runs", "Tally", "tally"]

_RECENT_NS = 10_000_000_000
"""A process is held to have owned a partition if it committed to it so shortly before it was struck."""
_AGAIN = 2
_GENTLE = frozenset({"duplicate", "poison", "clock"})
"""Faults that take nothing away that would have to come back."""


class Recovery(NamedTuple):
    """One fault and what came after it. Times are nanoseconds of the monotonic clock, as in the history."""

    kind: str
    target: str
    began: int
    ended: int
    done: str
    """What it did, in words."""
    back: int | None
    """When all was committed to again; None: the load ended before, or nothing had to come back."""
    seconds: float | None


@dataclass(slots=True)
class Runs:
    """How often one component's handler was given its inputs, as far as the history tells."""

    inputs: int = 0
    again: int = 0
    """Inputs that it was given more than once."""
    executions: int = 0


@dataclass(slots=True)
class Tally:
    """The figures of one campaign."""

    outputs: int = 0
    """Records that committed units produced."""
    applied: int = 0
    """Records that committed batches of sinks applied."""
    commits: int = 0
    runs: dict[str, Runs] = field(default_factory=dict)
    """By component."""
    recoveries: list[Recovery] = field(default_factory=list)
    """One for each fault that struck, in the order in which they were over."""

    @property
    def effects(self) -> int:
        return self.outputs + self.applied

    def recovery_seconds(self, share: float) -> float | None:
        """The time below which this share of the recoveries came; None when none was measured."""
        known = sorted(item.seconds for item in self.recoveries if item.seconds is not None)
        return known[min(len(known) - 1, int(len(known) * share))] if known else None


Lane = tuple[str, str, int]
"""Component, topic and partition."""


@dataclass(slots=True)
class _Open:
    """A fault that is over, and the lanes that were not committed to since."""

    strike: Strike
    began: int
    ended: int
    since: int
    waiting: set[Lane]


class _Pass:
    def __init__(self) -> None:
        self.result = Tally()
        self._trying: dict[str, Unit | Batch] = {}
        self._given: dict[Lane, bytearray] = {}
        self._last: dict[Lane, tuple[int, str]] = {}
        """When a lane was last committed to, and by which process."""
        self._struck: dict[str, tuple[Strike, set[Lane]]] = {}
        self._open: list[_Open] = []
        self.ends: list[int] = []
        """When faults were over that keep partitions from being worked on."""

    def take(self, event: Event) -> None:
        if isinstance(event, Unit | Batch):
            if event.type == "invoke":
                self._trying[event.a] = event
                self._count_runs(event)
            elif event.type == "fail":
                self._trying.pop(event.a, None)
            elif event.type == "ok" and event.a in self._trying:
                self._committed(self._trying.pop(event.a), event.t)
        elif isinstance(event, Strike):
            self._fault(event)

    def finish(self) -> Tally:
        for item in self._open:
            self._recovered(item, None)
        for (component, _, _), given in self._given.items():
            runs = self.result.runs.setdefault(component, Runs())
            runs.inputs += len(given) - given.count(0)
            runs.again += sum(times >= _AGAIN for times in given)
        self.result.recoveries.sort(key=lambda item: item.ended)
        return self.result

    def _count_runs(self, event: Unit | Batch) -> None:
        runs = self.result.runs.setdefault(event.component, Runs())
        for lane, offsets in _given(event):
            runs.executions += len(offsets)
            counts = self._given.setdefault(lane, bytearray())
            if offsets and len(counts) <= max(offsets):
                counts.extend(bytes(max(offsets) + 1 - len(counts)))
            for offset in offsets:
                counts[offset] = min(_AGAIN, counts[offset] + 1)

    def _committed(self, tried: Unit | Batch, at: int) -> None:
        self.result.commits += 1
        process = tried.a.rsplit("-", 2)[0]
        if isinstance(tried, Unit):
            self.result.outputs += sum(sum(item.outputs) for item in tried.inputs)
        for lane, offsets in _given(tried):
            if isinstance(tried, Batch):
                self.result.applied += len(offsets)
            self._last[lane] = (at, process)
            for item in self._open:
                item.waiting.discard(lane)
        over = [item for item in self._open if not item.waiting]
        for item in over:
            self._recovered(item, at)
        self._open = [item for item in self._open if item.waiting]

    def _fault(self, event: Strike) -> None:
        if event.type == "invoke":
            owned = {
                lane
                for lane, (at, process) in self._last.items()
                if event.t - at <= _RECENT_NS and (process == event.target or not event.target.startswith("worker-"))
            }
            self._struck[event.a] = (event, owned)
            return
        begun, owned = self._struck.pop(event.a, (None, set()))
        if begun is not None and event.type == "ok":
            if event.kind not in _GENTLE and not _is_http(event.target):  # Nor do these take a partition away.
                self.ends.append(event.t)
                for other in self._open:
                    other.since = event.t
            item = _Open(event, begun.t, event.t, event.t, owned)
            if owned and event.kind not in _GENTLE and not _is_http(event.target):
                self._open.append(item)
            else:
                self._recovered(item, None)

    def _recovered(self, item: _Open, at: int | None) -> None:
        strike = item.strike
        seconds = None if at is None else (at - item.since) / 1e9
        done = strike.detail if strike.outcome in ("", "healed") else f"{strike.detail}; {strike.outcome}"
        found = Recovery(strike.kind, strike.target, item.began, item.ended, done, at, seconds)
        self.result.recoveries.append(found)


def _given(event: Unit | Batch) -> list[tuple[Lane, list[int]]]:
    if isinstance(event, Unit):
        return [((event.component, item.topic, item.partition), item.offsets) for item in event.inputs]
    return [((event.component, item.topic, item.partition), item.handed) for item in event.parts]


def tally(events: Iterable[Event], answered: Mapping[str, Iterable[int]] | None = None) -> Tally:
    """Add up a history. `answered`: when each HTTP instance, by name, gave final answers, in nanoseconds, in order."""
    work = _Pass()
    for event in events:
        work.take(event)
    result = work.finish()
    for index, item in enumerate(result.recoveries):
        if _is_http(item.target) and item.kind not in _GENTLE:
            back = next((at for at in (answered or {}).get(item.target, ()) if at >= item.ended), None)
            if back is not None:
                before = work.ends[: bisect_right(work.ends, back)]
                since = max(item.ended, before[-1] if before else 0)
                result.recoveries[index] = item._replace(back=back, seconds=(back - since) / 1e9)
    return result


def _is_http(target: str) -> bool:
    return target.startswith("http-")

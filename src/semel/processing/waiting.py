"""Partitions whose next record is tried again later, each at its own time; when too much fails, all of them at one."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from semel.env import Env
from semel.processing.blame import Breaker
from semel.processing.inputs import Inputs
from semel.types import Record

__all__ = ["Later", "Waiting"]

log = logging.getLogger("semel.engine")


class Later(Exception):
    """A record has to wait, at least `after` seconds: says why."""

    def __init__(self, why: str, after: float = 0.0) -> None:
        super().__init__(why)
        self.after = after


@dataclass(slots=True)
class _Held:
    """A partition that waits; `records` are those that were polled meanwhile, and the one that failed."""

    until: float = 0.0
    records: deque[Record] = field(default_factory=deque)
    is_over: bool = False
    """Something of it succeeded: it flows again."""


class Waiting:
    """The partitions of one component that wait, by topic and number. It pauses them and lets them flow."""

    def __init__(self, component: str, env: Env, inputs: Inputs) -> None:
        self._component = component
        self._env = env
        self._inputs = inputs
        self._breaker = Breaker(env)
        self._held: dict[tuple[str, int], _Held] = {}

    def __repr__(self) -> str:
        return f"<Waiting of {self._component}: {len(self._held)} partitions, {self._breaker!r}>"

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, at: tuple[str, int]) -> bool:
        return at in self._held

    def idle_seconds(self, limit: float) -> float:
        """How long nothing of what waits may be tried, at most `limit`."""
        now = self._env.monotonic()
        due = (
            self._breaker.open_until
            if self._breaker.is_open
            else min((held.until for held in self._held.values() if held.records), default=now + limit)
        )
        return min(limit, max(0.0, due - now))

    def hold(self, record: Record, later: Later) -> None:
        """Let a record's partition wait, and everything when too much fails."""
        at = (record.topic, record.partition)
        was_open = self._breaker.is_open
        held = self._held.pop(at, None) or _Held()
        held.until, held.is_over = self._breaker.failed(record.key, later.after), False
        self._held[at] = held  # At the end: the others have their turn first.
        paused = [at]
        if self._breaker.is_open and not was_open:
            paused = [at for at, item in self._inputs.items() if not item.stopped]
            for other in paused:
                self._held.setdefault(other, _Held(held.until))
        self._inputs.pause(paused)
        seconds = held.until - self._env.monotonic()
        what = "everything waits" if self._breaker.is_open else f"{record.topic}-{record.partition} waits"
        log.warning("%s: %s %.2f s, nothing is lost: %s", self._component, what, seconds, later)

    def keeps(self, record: Record, now: float) -> bool:
        """Whether the record's partition waits; then the record is kept here with the others of it."""
        held = self._held.get((record.topic, record.partition))
        if held is None or held.is_over or (held.until <= now and self._breaker.may_try()):
            return False
        held.records.append(record)
        return True

    def bring_back(self, pending: deque[Record]) -> None:
        """What has waited long enough is pending again; one partition alone while the breaker is open."""
        if not self._held or not self._breaker.may_try():
            return
        now = self._env.monotonic()
        for at, held in list(self._held.items()):
            if held.is_over or held.until <= now or self._breaker.is_open:
                pending.extendleft(reversed(held.records))
                has_records = bool(held.records)
                held.records.clear()
                held.until = 0.0
                if held.is_over or (not self._breaker.is_open and not has_records):
                    del self._held[at]
                    self._inputs.resume([at])
                elif self._breaker.is_open and has_records:
                    return

    def flows(self, at: tuple[str, int]) -> None:
        """A record of this partition succeeded."""
        self._breaker.succeeded()
        if at in self._held:
            self._held[at].is_over = True

    def try_at_once(self, at: tuple[str, int]) -> None:
        """The partition's next record need not wait any longer."""
        self._held[at].until = 0.0

    def clear(self) -> None:
        """Let everything flow, and forget what was kept: it is read again."""
        self._inputs.resume(self._held)
        self._held.clear()

    def forget(self, partitions: Collection[tuple[str, int]]) -> None:
        """These partitions are not ours any more."""
        self._held = {at: held for at, held in self._held.items() if at not in partitions}

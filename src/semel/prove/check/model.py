"""What the processes say of themselves, in columns: attempts, the inputs they name, sends, reads, HTTP requests.

Numbers stand in arrays, an element an attempt or an offset, so that ten million events fit into memory: about 250
bytes an attempt (most of it is its name), 15 an input of a component, 12 a record from outside, 16 a read record and
300 an Idempotency-Key.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import pairwise
from typing import NamedTuple

from semel.history import Batch, Event, Gap, Http, Read, Send, Strike, Unit
from semel.prove.check.findings import Findings

__all__ = [
    "FAIL",
    "INFO",
    "OK",
    "OPEN",
    "PARKED",
    "RELEASED",
    "Attempts",
    "Lane",
    "Model",
    "ReadLane",
    "Run",
    "runs_of",
    "value_digest",
]

OPEN, OK, FAIL, INFO = 0, 1, 2, 3
OUTCOMES = {"ok": OK, "fail": FAIL, "info": INFO}
OUTCOME_NAMES = ("no answer", "committed", "failed", "unknown")

NARROW = 63
"""Outputs of an input whose bits stand in the array; those of an input with more are in a dictionary."""
PARKED_BIT = 1 << NARROW
WIDE, PARKED = 254, 255
"""How many outputs an input has is one byte; these two stand for "look it up" and for a parked input."""
EXPECTED = [*((1 << count) - 1 for count in range(NARROW + 1)), *([PARKED_BIT] * (256 - NARROW - 1))]
"""The bits of all outputs, by that byte."""

RELEASED = " (released)"
"""Behind a component's name: what it did with records that were parked before. They have columns of their own, because
in the others they are done already: parked."""

ATTEMPT_BITS = "i"
_NO_VALUE = 1
Key = tuple[str, str, int]


class Run(NamedTuple):
    """Neighbouring offsets of one lane that one attempt worked on. `counts` is where its bytes begin."""

    lane: int
    low: int
    size: int
    counts: int


def runs_of(offsets: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first offset, how many) of neighbours, in the order given."""
    if not offsets:
        return
    if offsets[-1] - offsets[0] + 1 == len(offsets) and (len(offsets) < 3 or _is_dense(offsets)):
        yield offsets[0], len(offsets)
        return
    low, size = offsets[0], 1
    for before, after in pairwise(offsets):
        if after == before + 1:
            size += 1
        else:
            yield low, size
            low, size = after, 1
    yield low, size


def _is_dense(offsets: Sequence[int]) -> bool:
    low = offsets[0]
    return list(offsets) == list(range(low, low + len(offsets)))


class Lane:
    """What one component or sink did with one partition of its input; an element an offset, from `low` on."""

    __slots__ = (
        "component",
        "cover",
        "high",
        "low",
        "mask",
        "number",
        "owner",
        "partition",
        "possible",
        "topic",
        "wide",
    )

    def __init__(self, key: Key, number: int) -> None:
        self.component, self.topic, self.partition = key
        self.number = number
        self.low, self.high = 1 << 62, -1
        self.mask: array[int] = array("Q")
        """Which outputs of the input are visible, a bit each."""
        self.owner: array[int] = array(ATTEMPT_BITS)
        """The attempt that the first of them came from."""
        self.cover = bytearray()
        """How often it was worked on for certain."""
        self.possible = bytearray()
        """Whether an attempt whose end nobody knows may have worked on it; it had no outputs, so no log tells."""
        self.wide: dict[int, int] = {}

    def __str__(self) -> str:
        return f"{self.component} at {self.topic}-{self.partition}"

    @property
    def place(self) -> tuple[str, int]:
        return self.topic, self.partition

    def widen(self, low: int, high: int) -> None:
        """The lane has these offsets, both included."""
        self.low, self.high = min(self.low, low), max(self.high, high)

    def allocate(self, *, outputs: bool) -> None:
        """Make the columns once every offset is known."""
        size = max(0, self.high - self.low + 1)
        if outputs:
            self.mask = array("Q", bytes(8 * size))
            self.owner = array(ATTEMPT_BITS, bytes(4 * size))
        self.cover = bytearray(size)
        self.possible = bytearray(size)


class Attempts:
    """Units of work, or batches of sinks. Number 0 is nobody."""

    def __init__(self) -> None:
        self.index: dict[str, int] = {}
        self.names: list[str] = [""]
        self.components: list[str] = []
        self.component = array("H", [0])
        self.begun = array("q", [0])
        self.ended = array("q", [0])
        self.outcome = bytearray(1)
        self.expected = array("l", [0])
        """How many outputs it should have, or offsets handed to the handler."""
        self.visible = array("l", [0])
        self.flags = bytearray(1)
        self.first_run = array("l", [0, 0])
        self.lanes: list[Lane] = []
        self.lane_numbers: dict[Key, int] = {}
        self.run_lane = array("i")
        self.run_low = array("q")
        self.run_size = array("i")
        self.run_counts = array("q")
        self.counts = bytearray()
        self.wide: dict[int, int] = {}
        self._component_numbers: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.index)

    def begin(self, name: str, component: str, t: int) -> int:
        number = len(self.names)
        self.index[name] = number
        self.names.append(name)
        known = self._component_numbers.get(component)
        if known is None:
            known = self._component_numbers[component] = len(self.components)
            self.components.append(component)
        self.component.append(known)
        self.begun.append(t)
        self.ended.append(0)
        self.outcome.append(OPEN)
        self.expected.append(0)
        self.visible.append(0)
        self.flags.append(0)
        self.first_run.append(len(self.run_low))
        return number

    def end(self, name: str, kind: str, t: int) -> bool:
        """Note an outcome; what is certain stays. False for an attempt that nobody began."""
        number = self.index.get(name)
        if number is None:
            return False
        if self.outcome[number] in (OPEN, INFO):
            self.outcome[number] = OUTCOMES[kind]
            self.ended[number] = t
        return True

    def lane(self, key: Key) -> Lane:
        number = self.lane_numbers.get(key)
        if number is None:
            number = self.lane_numbers[key] = len(self.lanes)
            self.lanes.append(Lane(key, number))
        return self.lanes[number]

    def add_inputs(self, lane: Lane, offsets: Sequence[int], outputs: Sequence[int]) -> None:
        """Inputs of the attempt that was begun last, with the number of outputs of each."""
        at = len(self.counts)
        try:
            packed = bytes(outputs)
            if packed and NARROW < max(packed) != PARKED:
                raise ValueError
        except ValueError:
            packed = bytes(count if count <= NARROW else WIDE for count in outputs)
            self.wide.update((at + i, count) for i, count in enumerate(outputs) if count > NARROW)
        self.counts += packed
        for low, size in runs_of(offsets):
            self.run_lane.append(lane.number)
            self.run_low.append(low)
            self.run_size.append(size)
            self.run_counts.append(at)
            lane.widen(low, low + size - 1)
            at += size
        self.first_run[-1] = len(self.run_low)

    def runs(self, number: int) -> Iterator[Run]:
        """What this attempt worked on."""
        for i in range(self.first_run[number], self.first_run[number + 1]):
            yield Run(self.run_lane[i], self.run_low[i], self.run_size[i], self.run_counts[i])

    def count(self, at: int) -> int:
        """How many outputs the input has whose byte is there."""
        count = self.counts[at]
        return self.wide[at] if count == WIDE else count


class ReadLane:
    """What readers were given of one partition."""

    __slots__ = ("digests", "readers", "runs")

    def __init__(self) -> None:
        self.digests = array("Q")
        self.runs: dict[str, array[int]] = {}
        """Reader to (first offset, last offset, time), flat."""


class _Request:
    """What was asked and answered under one Idempotency-Key."""

    __slots__ = ("answered", "asked", "body", "failed", "first", "reply", "route", "status")

    def __init__(self, route: str, t: int) -> None:
        self.route = route
        self.first = t
        self.asked = 0
        self.answered = 0
        self.failed = 0
        """Definite refusals."""
        self.status = 0
        self.reply = ""
        self.body = ""
        """The body of the first success."""


class Sent(NamedTuple):
    """A record from outside whose sender has no certain success."""

    id: str
    topic: str
    outcome: int


class Model:
    """The history, taken in event by event."""

    def __init__(self, findings: Findings) -> None:
        self.findings = findings
        self.units = Attempts()
        self.batches = Attempts()
        self.releases: set[int] = set()
        """Those of `batches` that are about parked records, in an order of their own."""
        self.sent: dict[tuple[str, int], array[int]] = {}
        """Place to the hash of the attempt that was told it, an element an offset."""
        self.unsettled: dict[str, Sent] = {}
        self.reads: dict[tuple[str, int], ReadLane] = {}
        self.requests: dict[str, _Request] = {}
        self.strikes: list[Strike] = []
        self.lost_lines = 0
        self.orphans = 0
        self._asking: dict[str, tuple[str, str]] = {}

    def take_in(self, events: Iterable[Event]) -> None:
        """Read the whole history. An attempt's `invoke` comes before its outcome."""
        handlers = {
            Unit: self._unit,
            Batch: self._batch,
            Http: self._http,
            Send: self._send,
            Read: self._read,
            Strike: self.strikes.append,
            Gap: self._gap,
        }
        count = 0
        for event in events:
            count += 1
            handlers[type(event)](event)  # type: ignore[operator]
        self.findings.checked["history lines"] += count
        for lane in self.units.lanes:
            lane.allocate(outputs=True)
        for name, attempts in (("units", self.units), ("batches", self.batches)):
            self.findings.checked[name] += len(attempts)
        if self.lost_lines:
            self.findings.notes.append(
                f"{self.lost_lines} lines of the history could not be written: attempts that it does not name are not "
                "taken for phantoms."
            )
        if self.orphans:
            self.findings.notes.append(f"{self.orphans} outcomes are of attempts whose beginning is not there.")

    def _gap(self, event: Gap) -> None:
        self.lost_lines += event.lost

    def _unit(self, event: Unit) -> None:
        units = self.units
        if event.type != "invoke":
            self.orphans += not units.end(event.a, event.type, event.t)
            return
        # A unit that releases records does nothing else.
        component = event.component + RELEASED if event.released else event.component
        number = units.begin(event.a, component, event.t)
        expected = len(event.parked)
        for topic, partition, offsets, outputs in event.inputs:
            if offsets:
                units.add_inputs(units.lane((component, topic, partition)), offsets, outputs)
                expected += sum(outputs)
        for topic, partition, offset in event.parked:
            units.add_inputs(units.lane((component, topic, partition)), (offset,), (PARKED,))
        units.expected[number] = expected

    def _batch(self, event: Batch) -> None:
        batches = self.batches
        if event.type != "invoke":
            self.orphans += not batches.end(event.a, event.type, event.t)
            return
        number = batches.begin(event.a, event.component, event.t)
        handed = 0
        for topic, partition, _, _, _, offsets, _, released in event.parts:
            if released:
                self.releases.add(number)
            if offsets:
                lane = batches.lane((event.component, topic, partition))
                batches.add_inputs(lane, sorted(offsets), bytes(len(offsets)))
                handed += len(offsets)
        batches.expected[number] = handed

    def _send(self, event: Send) -> None:
        if event.type == "invoke":
            self.unsettled[event.a] = tuple.__new__(Sent, (event.id, event.topic, OPEN))
            return
        known = self.unsettled.get(event.a)
        if known is None:
            self.orphans += 1
            return
        if event.type != "ok":
            self.unsettled[event.a] = known._replace(outcome=OUTCOMES[event.type])
            return
        del self.unsettled[event.a]
        place = (event.topic or known.topic, event.partition)
        told = self.sent.setdefault(place, array("q"))
        offset = event.offset
        if offset >= len(told):
            told.frombytes(bytes(8 * (offset - len(told) + 1024)))
        if told[offset]:
            self.findings.add(
                "L1", f"{place[0]}-{place[1]}@{offset}", f"two sends were told that they stand there, one is {known.id}"
            )
        told[offset] = hash(event.a) | 1

    def _read(self, event: Read) -> None:
        if event.type != "ok" or not event.offsets:
            return
        lane = self.reads.setdefault((event.topic, event.partition), ReadLane())
        runs = lane.runs.setdefault(event.a, array("q"))
        digests = lane.digests
        if (top := max(event.offsets)) >= len(digests):
            digests.frombytes(bytes(8 * (top - len(digests) + 1024)))
        at = 0
        for low, size in runs_of(event.offsets):
            given = digests_of(event.digests[at : at + size])
            at += size
            if not any(digests[low : low + size]):
                digests[low : low + size] = given
            for offset, digest in enumerate(given, low) if digests[low : low + size] != given else ():
                if digests[offset] not in (0, digest):
                    why = f"reader {event.a} got another value than before"
                    self.findings.add("L1", f"{event.topic}-{event.partition}@{offset}", why)
                digests[offset] = digest
            runs.extend((low, low + size - 1, event.t))
        self.findings.checked["reads"] += len(event.offsets)

    def _http(self, event: Http) -> None:
        if event.type == "invoke":
            request = self.requests.get(event.key)
            if request is None:
                request = self.requests[event.key] = _Request(event.route, event.t)
            request.asked += 1
            self._asking[event.a] = event.key, event.body
            return
        asked = self._asking.pop(event.a, None)
        if asked is None:
            self.orphans += 1
            return
        if event.type == "fail":
            self.requests[asked[0]].failed += 1
        if event.type != "ok" or not 200 <= event.status < 300 or event.status == 202:
            return
        key, body = asked
        request = self.requests[key]
        if event.t < request.first:
            self.findings.add("E14", key, "a success came before anybody asked")
        if not request.answered:
            request.status, request.reply, request.body = event.status, event.reply, body
        elif body != request.body:
            self.findings.add("E14", key, "two requests with different bodies were both accepted under this key")
        elif (event.status, event.reply) != (request.status, request.reply):
            self.findings.add(
                "E14",
                key,
                f"answered {request.status} with body {request.reply} and {event.status} with body {event.reply}",
            )
        request.answered += 1


def value_digest(value: bytes | None) -> int:
    """What stands for a record's value, as `digests_of` has it."""
    return _NO_VALUE if value is None else int.from_bytes(blake2b(value, digest_size=8).digest(), "big")


def digests_of(texts: Sequence[str]) -> array[int]:
    """Digests of the history (`semel.history.digest`) as numbers."""
    found = array("Q", bytes.fromhex("".join(text or f"{_NO_VALUE:016x}" for text in texts)))
    if sys.byteorder == "little":
        found.byteswap()
    return found

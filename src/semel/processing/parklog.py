"""A partition of a park topic, read from its beginning: what waits, what was asked for, and what came of it.

Besides parked records it holds commands, which the command line appends, and outcomes, which the partition's owner
writes in the transaction that carries a command out. Nothing is ever taken out, so the topic is its own audit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, Literal, NamedTuple

import msgspec

from semel.processing.effects import Write
from semel.processing.faults import Fault
from semel.processing.parking import BUILD, BY_KEY, COMPONENT, ERROR, FRAMES, GROUP, KIND, LANE, MESSAGE, as_it_came
from semel.types import Record

__all__ = [
    "COMMAND_OFFSETS_MAX",
    "Command",
    "Failed",
    "Outcome",
    "ParkLog",
    "ParkPolicy",
    "Verb",
    "Waiting",
    "command_record",
]

Verb = Literal["retry", "discard", "edit", "assume"]

COMMAND: Final = b"command"
OUTCOME: Final = b"outcome"

COMMAND_OFFSETS_MAX = 10_000
"""Records that one command names; more of them take several commands."""


class ParkPolicy(NamedTuple):
    """What the settings say about parked records (`Settings.build`, `.park_retry`, `.park_edit`)."""

    build: str = ""
    retry: str = "asked"
    edit: str = "no"


class Command(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What an operator asks for. `offsets` are the input's.

    `retry` handles again, in order, everything that waits with the keys of these records. `discard` drops exactly
    these records. `edit` is a retry in which the one record named has `value` in place of its own. `assume` is a
    retry that also applies messages of which nobody can say whether they were: the operator says that they were not.
    """

    id: str
    verb: Verb
    offsets: list[int]
    by: str = ""
    reason: str = ""
    at_ms: int = 0
    build: str = ""
    """Only a worker of this build or a later one carries it out."""
    value: bytes | None = None


class Failed(msgspec.Struct, frozen=True, omit_defaults=True):
    """A parked record that was tried again in vain."""

    offset: int
    fault: Fault


class Outcome(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What one transaction did for a command; for none (an empty id) when a new build tried again by itself."""

    command: str = ""
    released: list[int] = []
    discarded: list[int] = []
    failed: list[Failed] = []
    finished: bool = False
    """Nothing of the command is left to do."""
    refused: str = ""
    """Why nothing was done."""
    old: str = ""
    new: str = ""
    """Digests of the value before and after an edit."""
    by: str = ""
    at_ms: int = 0
    build: str = ""

    def write(self, topic: str, partition: int, component: str) -> Write:
        """As it stands in the park topic."""
        headers = ((KIND, OUTCOME), (COMPONENT, component.encode()))
        return Write(topic, None, msgspec.json.encode(self), headers, partition)


def command_record(command: Command, component: str) -> tuple[bytes, tuple[tuple[str, bytes], ...]]:
    """Value and headers of a command in the park topic."""
    return msgspec.json.encode(command), ((KIND, COMMAND), (COMPONENT, component.encode()))


class Waiting(msgspec.Struct):
    """One parked record: where it stands in the park topic, and with whom it waits."""

    offset: int
    at: int
    lane: bytes | int
    """Its key; or its own offset where it waits alone."""
    fault: Fault | None
    """What happened when it was tried last; None for one that waits behind another."""


class ParkLog:
    """What one component has in one partition. `next` is the park topic's offset up to which it was read."""

    def __init__(self, component: str) -> None:
        self._component = component.encode()
        self.next = 0
        self.waiting: dict[int, Waiting] = {}
        """By offset in the input, in the order in which they were parked."""
        self.lanes: dict[bytes | int, dict[int, Waiting]] = {}
        self.commands: dict[str, Command] = {}
        """Those that are not finished, by id."""
        self._targets: dict[str, set[bytes | int]] = {}
        """For each command the lanes that it means and that have not failed or come to their end since."""

    def __repr__(self) -> str:
        return f"<ParkLog {len(self.waiting)} records in {len(self.lanes)} lanes, {len(self.commands)} commands>"

    def take(self, record: Record) -> Command | Outcome | Waiting | None:
        """Take in the next record; what it was, or None when it is not of this component."""
        self.next = record.offset + 1
        headers = dict(record.headers)
        if headers.get(COMPONENT) != self._component:
            return None
        kind = headers.get(KIND)
        if kind is None:
            return self._park(record, headers)
        try:
            if kind == COMMAND:
                command = msgspec.json.decode(record.value or b"", type=Command)
                self.commands[command.id] = command
                self._targets[command.id] = {self.waiting[at].lane for at in command.offsets if at in self.waiting}
                return command
            if kind == OUTCOME:
                outcome = msgspec.json.decode(record.value or b"", type=Outcome)
                self._apply(outcome)
                return outcome
        except msgspec.MsgspecError:
            return None  # Nobody of ours wrote it, so nobody waits for it.
        return None

    def counts(self) -> tuple[dict[bytes, int], int]:
        """Waiting records by key, and of all lanes."""
        keys = {lane: len(waiting) for lane, waiting in self.lanes.items() if isinstance(lane, bytes)}
        return keys, len(self.waiting)

    def wanted(self, command: Command) -> list[Waiting]:
        """What is left to do for a command, in the order of the park topic, which is that of every lane."""
        if command.verb == "discard":
            return sorted((self.waiting[at] for at in command.offsets if at in self.waiting), key=_place)
        return self.behind(self._targets.get(command.id, ()))

    def behind(self, lanes: Iterable[bytes | int]) -> list[Waiting]:
        """Everything that waits in these lanes, in the order of the park topic."""
        return sorted((waiting for lane in lanes for waiting in self.lanes[lane].values()), key=_place)

    def heads(self) -> list[Waiting]:
        """The first record of every lane."""
        return [next(iter(waiting.values())) for waiting in self.lanes.values()]

    def _park(self, record: Record, headers: Mapping[str, bytes | None]) -> Waiting | None:
        came = as_it_came(record)
        if came is None:
            return None
        waits_alone = headers.get(LANE) != BY_KEY or record.key is None
        lane = came.offset if waits_alone or record.key is None else record.key
        waiting = Waiting(came.offset, record.offset, lane, _fault(headers))
        self.waiting[came.offset] = waiting
        self.lanes.setdefault(lane, {})[came.offset] = waiting
        return waiting

    def _apply(self, outcome: Outcome) -> None:
        for offset in (*outcome.released, *outcome.discarded):
            gone = self.waiting.pop(offset, None)
            if gone is not None:
                lane = self.lanes[gone.lane]
                del lane[offset]
                if not lane:
                    del self.lanes[gone.lane]
                    for targets in self._targets.values():
                        targets.discard(gone.lane)
        for failed in outcome.failed:
            waiting = self.waiting.get(failed.offset)
            if waiting is not None:
                waiting.fault = failed.fault.short()
                self._targets.get(outcome.command, set()).discard(waiting.lane)
        if outcome.finished:
            self.commands.pop(outcome.command, None)
            self._targets.pop(outcome.command, None)


def _place(waiting: Waiting) -> int:
    return waiting.at


def _fault(headers: Mapping[str, bytes | None]) -> Fault | None:
    if headers.get(ERROR) is None:
        return None
    texts = [(headers.get(name) or b"").decode(errors="replace") for name in (ERROR, MESSAGE, FRAMES, GROUP, BUILD)]
    return Fault(*texts).short()

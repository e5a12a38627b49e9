"""Where each output came from, and how each unit of work ended: for the history, and only while one is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from semel import history
from semel.history import PROOF, Outcome, Unit, UnitChange, UnitInput, UnitParked
from semel.processing.effects import Write
from semel.processing.tables import Entry
from semel.types import Record

__all__ = ["Provenance"]


class Provenance:
    """One unit of work as the history tells of it. A unit that is thrown away leaves no trace."""

    __slots__ = ("_changes", "_inputs", "_parked", "_released", "attempt")

    def __init__(self) -> None:
        self.attempt = history.attempt()
        self._inputs: dict[tuple[str, int], UnitInput] = {}
        self._parked: list[UnitParked] = []
        self._released: list[UnitParked] = []
        self._changes: list[UnitChange] = []

    def quick(self, topic: str, partition: int) -> tuple[str, bytes, list[int], list[int]]:
        """For the quick way: the header's name, how its value begins, and where it adds offsets and their outputs."""
        held = self._input(topic, partition)
        return PROOF, f"{self.attempt}|{topic}|{partition}|".encode(), held.offsets, held.outputs

    def _input(self, topic: str, partition: int) -> UnitInput:
        held = self._inputs.get((topic, partition))
        if held is None:
            held = self._inputs[topic, partition] = UnitInput(topic, partition, [], [])
        return held

    def worked_on(self, records: Sequence[Record], writes: Sequence[Write]) -> Sequence[Write]:
        """The outputs of one input, each with its header; those of a batch count as its last input's."""
        last = records[-1]
        held = self._input(last.topic, last.partition)
        for record in records:
            held.offsets.append(record.offset)
            held.outputs.append(0)
        if not writes:
            return writes
        held.outputs[-1] = len(writes)
        place, count = self._place(last), len(writes)
        return [_marked(write, b"%b|%d|%d" % (place, number, count)) for number, write in enumerate(writes)]

    def changed(
        self, store: str, partition: int, changes: Mapping[bytes, Entry | None], before: Mapping[tuple[str, bytes], str]
    ) -> None:
        """What one call changed of a store, and the digests of what it found there."""
        for key, entry in changes.items():
            left = history.digest(None if entry is None else entry.value)
            name = key.decode("latin-1")
            self._changes.append(UnitChange(store, partition, name, before.get((store, key), ""), left))

    def parked(self, record: Record, write: Write) -> Write:
        """A parked input, with its header in the place of the one that it came with."""
        self._parked.append(UnitParked(record.topic, record.partition, record.offset))
        return _marked(write, b"%b|0|1|parked" % self._place(record))

    def released(self, record: Record) -> None:
        """A parked input that waits no longer, whether it was worked on or discarded."""
        self._released.append(UnitParked(record.topic, record.partition, record.offset))

    def _place(self, record: Record) -> bytes:
        return f"{self.attempt}|{record.topic}|{record.partition}|{record.offset}".encode()

    def begin(self, component: str, transactional_id: str) -> None:
        """The transaction is about to be tried."""
        history.note(
            Unit(
                type="invoke",
                a=self.attempt,
                component=component,
                transactional_id=transactional_id,
                inputs=[held for _, held in sorted(self._inputs.items()) if held.offsets],
                parked=self._parked,
                released=self._released,
                changes=self._changes,
            )
        )

    def end(self, outcome: Outcome) -> None:
        """It is over."""
        history.note(Unit(type=outcome, a=self.attempt))


def _marked(write: Write, proof: bytes) -> Write:
    headers = write.headers
    if headers:
        headers = tuple(header for header in headers if header[0] != PROOF)
    return Write(write.topic, write.key, write.value, (*headers, (PROOF, proof)), write.partition)

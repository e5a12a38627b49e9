"""The partitions that are ours: how far each was worked on and committed, what of it is parked, why it stands still."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from semel.processing.measures import Measures
from semel.processing.parking import ParkedKeys
from semel.processing.parklog import ParkLog
from semel.types import Record, TopicPartition

__all__ = ["Input", "Inputs"]

log = logging.getLogger("semel.engine")


@dataclass(slots=True)
class Input:
    """One partition that is ours."""

    position: int
    """The next offset to work on."""
    committed: int
    park_log: ParkLog
    parked: ParkedKeys = field(init=False)
    is_asked: bool = False
    """Something may be asked for about its parked records."""
    stopped: str = ""
    """Why the partition is not worked on; empty when it is."""
    is_full: bool = False
    """It stopped because nothing more may be parked: it goes on when something is released."""

    def __post_init__(self) -> None:
        self.parked = ParkedKeys(*self.park_log.counts())


class Inputs(dict[tuple[str, int], Input]):
    """Every partition of a component that is ours, by topic and number."""

    def __init__(self, component: str, measures: Measures) -> None:
        super().__init__()
        self._component = component
        self._measures = measures
        self._ends: dict[TopicPartition, int] = {}
        self._to_pause: set[TopicPartition] = set()
        self._to_resume: set[TopicPartition] = set()

    def __repr__(self) -> str:
        return f"<Inputs {len(self)} partitions, {sum(1 for held in self.values() if held.stopped)} stopped>"

    def partitions(self) -> list[TopicPartition]:
        """What is ours, in order."""
        return sorted(TopicPartition(*at) for at in self)

    def moved(self, also: Container[tuple[str, int]] = ()) -> dict[TopicPartition, int]:
        """The positions that are not committed as they are, and those of the partitions in `also`."""
        return {
            TopicPartition(*at): held.position
            for at, held in self.items()
            if held.position != held.committed or at in also
        }

    def reached(self, ends: Mapping[TopicPartition, int]) -> None:
        """Remember how far the log was read; see `pass_ends`."""
        self._ends.update(ends)

    def forget_ends(self) -> None:
        """What was read is thrown away."""
        self._ends.clear()

    def pass_ends(self) -> None:
        """Move positions past what no record stands for: markers and aborted records at a partition's end.

        Everything that was read must have been worked on.
        """
        for at, end in self._ends.items():
            held = self.get(at)
            if held is not None and not held.stopped and end > held.position:
                held.position = end
        self._ends.clear()

    def stop(self, at: TopicPartition, why: str, error: BaseException | None = None) -> None:
        """Do not work on a partition any more, until somebody has looked."""
        held = self[at]
        held.stopped = why
        self.pause([at])
        self._count_stopped()
        log.error("%s stops reading %s: %s", self._component, at, why, exc_info=error)

    def stop_at(self, record: Record, why: str, error: BaseException | None) -> None:
        """A record can neither be worked on nor parked."""
        advice = "The other partitions go on. Mend the handler or the data and restart."
        self.stop(TopicPartition(record.topic, record.partition), f"{why}. {advice}", error)

    def go_on(self, at: TopicPartition) -> None:
        """Work on a partition again that had stopped because its park was full."""
        self[at].stopped, self[at].is_full = "", False
        self.resume([at])
        self._count_stopped()
        log.info("%s goes on reading %s: parked records were released", self._component, at)

    def pause(self, partitions: Iterable[tuple[str, int]]) -> None:
        """Read nothing more of these for now."""
        for at in partitions:
            self._to_resume.discard(TopicPartition(*at))
            self._to_pause.add(TopicPartition(*at))

    def resume(self, partitions: Iterable[tuple[str, int]]) -> None:
        """Read these again, unless they have stopped."""
        for at in partitions:
            if at in self and not self[at].stopped:
                self._to_pause.discard(TopicPartition(*at))
                self._to_resume.add(TopicPartition(*at))

    def to_resume(self) -> list[TopicPartition]:
        """What is to be read again since this was asked last, as far as it is still ours."""
        found = [at for at in self._to_resume if at in self]
        self._to_resume.clear()
        return found

    def to_pause(self) -> list[TopicPartition]:
        """What stopped since this was asked last, as far as it is still ours."""
        found = [at for at in self._to_pause if at in self]
        self._to_pause.clear()
        return found

    def forget(self, partitions: Sequence[TopicPartition]) -> None:
        """These are not ours any more."""
        for at in partitions:
            self.pop(at, None)
            self._ends.pop(at, None)
            self._to_pause.discard(at)
            self._to_resume.discard(at)
            self._measures.forget(at)

    def measure(self) -> None:
        """Show what is parked and how many partitions stand still."""
        self._count_stopped()
        self._measures.parked({f"{topic}-{number}": len(held.parked.keys) for (topic, number), held in self.items()})

    def _count_stopped(self) -> None:
        self._measures.stopped(sum(1 for held in self.values() if held.stopped))

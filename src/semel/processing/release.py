"""What is to be done with parked records: reading what was asked for, and finding what it means, one unit at a time.

Who owns a partition of the input owns the same partition of its park topic, so there is one reader who acts, and what
it does is in its own transactions: outputs of the records that it releases, and the `Outcome` that says so.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from semel import history
from semel.env import Env
from semel.processing.component import Component
from semel.processing.faults import Fault, build_at_least
from semel.processing.limits import PARK_READ_SECONDS, RELEASE_BYTES_MAX, RELEASE_RECORDS_MAX
from semel.processing.parking import as_it_came
from semel.processing.parklog import Command, Failed, Outcome, ParkLog, Waiting
from semel.processing.seams import Kafka
from semel.processing.unit import UnitOfWork
from semel.settings import Settings
from semel.types import Record, TopicPartition

__all__ = ["Job", "Releases", "Replay"]

_POLL_RECORDS = 1_000
_POLL_SECONDS = 0.1

Replay = Callable[[Record, "bytes | int", UnitOfWork], Awaitable[Exception | None]]
"""Handle a parked record again and release it in the unit; what it failed with, if the record is at fault."""


class Job(NamedTuple):
    """One step of a command, which fits into one unit of work."""

    command: Command
    """With an empty id where nobody asked and a new build tries again."""
    records: Sequence[tuple[Waiting, Record]]
    """What to handle again or to discard, in order within each lane."""
    is_last: bool
    """Nothing of the command is left after this."""
    refused: str = ""


class Releases:
    """Reads the park topics of one component, and does what they ask for."""

    def __init__(self, kafka: Kafka, component: Component, settings: Settings, env: Env) -> None:
        self._kafka = kafka
        self._component = component
        self._settings = settings
        self._env = env

    def __repr__(self) -> str:
        return f"<Releases of {self._component.name}>"

    async def moved(self, logs: Mapping[TopicPartition, ParkLog]) -> list[TopicPartition]:
        """Those partitions of the input whose park topic has something that was not read. Raises as Kafka does."""
        parks = {self._park_of(at): at for at in logs}
        ends = await self._kafka.admin.list_offsets(list(parks), at="high_watermark")
        return [at for park, at in parks.items() if ends[park] > logs[at].next]

    def may_be_asked(self, log: ParkLog) -> bool:
        """Whether something is to be done with what was just read."""
        return bool(log.commands) or self.is_for_this_build(log)

    def is_for_this_build(self, log: ParkLog) -> bool:
        """Whether something waits that failed under another build, where each new one is to try."""
        return self._settings.park_retry == "build" and bool(self._of_other_builds(log))

    async def next_job(self, at: TopicPartition, log: ParkLog, records_max: int = RELEASE_RECORDS_MAX) -> Job | None:
        """Read what is new, and say what to do next; None when nothing is asked for. Raises as Kafka does.

        Raises `TimeoutError` when something could not be read in time, as behind an open transaction of somebody else.
        """
        park = self._park_of(at)
        end = (await self._kafka.admin.list_offsets([park], at="high_watermark"))[park]
        if end > log.next:
            await self._read(park, log.next, end, lambda record: log.take(record) is None or True)
            log.next = end
        for command in list(log.commands.values()):
            if not build_at_least(self._settings.build, command.build):
                continue
            if command.verb == "edit" and self._settings.park_edit != "yes":
                return Job(command, (), True, "edits are off: SEMEL_PARK_EDIT=yes on the workers allows them")
            return await self._job(park, command, log.wanted(command), records_max)
        if self.is_for_this_build(log):
            command = Command(id="", verb="retry", offsets=[], by="a new build")
            return await self._job(park, command, log.behind(self._of_other_builds(log)), records_max)
        return None

    async def perform(self, job: Job, at: TopicPartition, unit: UnitOfWork, replay: Replay) -> None:
        """Do a step inside a unit of work that has nothing else in it. Raises what says that the world is at fault."""
        command, build = job.command, self._settings.build
        released: list[int] = []
        discarded: list[int] = []
        failed: list[Failed] = []
        stuck: set[bytes | int] = set()
        old = new = ""
        is_last = job.is_last
        for waiting, record in job.records:
            if unit.is_full:
                is_last = False
                break
            if waiting.lane in stuck:
                continue
            if command.verb == "discard":
                unit.release(record, waiting.lane, scope=None)
                discarded.append(waiting.offset)
                continue
            if command.verb == "edit" and waiting.offset in command.offsets:
                old, new = history.digest(record.value), history.digest(command.value)
                record = record._replace(value=command.value)
            error = await replay(record, waiting.lane, unit)
            if error is None:
                released.append(waiting.offset)
            else:
                failed.append(Failed(waiting.offset, Fault.of(error, build).short()))
                stuck.add(waiting.lane)
        outcome = Outcome(
            command=command.id,
            released=released,
            discarded=discarded,
            failed=failed,
            finished=is_last,
            refused=job.refused,
            old=old,
            new=new,
            by=command.by,
            at_ms=self._env.wall_ms(),
            build=build,
        )
        unit.note(at, outcome.write(self._component.parks[at.topic], at.partition, self._component.name))

    def _park_of(self, at: TopicPartition) -> TopicPartition:
        return TopicPartition(self._component.parks[at.topic], at.partition)

    def _of_other_builds(self, log: ParkLog) -> list[bytes | int]:
        build = self._settings.build
        return [head.lane for head in log.heads() if head.fault is not None and head.fault.build != build]

    async def _job(self, park: TopicPartition, command: Command, wanted: Sequence[Waiting], records_max: int) -> Job:
        chosen = wanted[:records_max]
        found = await self._fetch(park, {waiting.at for waiting in chosen})
        # They are in the order of the park topic, so those that fitted are the first ones.
        records = [(waiting, found[waiting.at]) for waiting in chosen[: len(found)]]
        return Job(command, records, len(records) == len(wanted))

    async def _fetch(self, park: TopicPartition, places: Collection[int]) -> dict[int, Record]:
        """The records at these places of the park topic, as they came; as many as fit into one unit, from the first."""
        found: dict[int, Record] = {}
        size = 0

        def keep(record: Record) -> bool:
            nonlocal size
            came = as_it_came(record) if record.offset in places else None
            if came is not None:
                found[record.offset] = came
                size += len(record.key or b"") + len(record.value or b"")
            return size < RELEASE_BYTES_MAX

        if places:
            await self._read(park, min(places), max(places) + 1, keep)
        return found

    async def _read(self, park: TopicPartition, start: int, end: int, take: Callable[[Record], bool]) -> None:
        """Hand over the committed records from `start` to before `end`, until `take` says that it has enough."""
        reader = self._kafka.reader()
        deadline = self._env.monotonic() + PARK_READ_SECONDS
        position = start
        try:
            await reader.start({park: start})
            while position < end:
                if self._env.monotonic() > deadline:
                    raise TimeoutError(f"{park} could not be read from {position} to {end} in {PARK_READ_SECONDS:g} s")
                batch = await reader.poll(_POLL_RECORDS, _POLL_SECONDS)
                for record in batch.records:
                    position = record.offset + 1
                    if position > end or not take(record):
                        return
                position = max(position, batch.end_offsets.get(park, position))
        finally:
            await reader.close()

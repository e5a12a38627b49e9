"""How far groups are known to have committed, so that a position that goes back is noticed and not followed.

A processor goes on at its group's committed offset, which Kafka keeps in memory beside its log. After a quick restart
Apache Kafka 4.3.1 can serve offsets of long ago: two loads of one partition of `__consumer_offsets` overlap, and the
second replays old commits over the state in use. Whoever follows does everything since then again. The same happens
when Kafka forgets the offsets of a group (after 7 days without members) or loses them with a disk.

So each process remembers what it has committed, and keeps it in a file beside those of the others on its host; who
takes over a partition does not begin below that. The file is written every second and at the end, which is enough: it
may be behind the truth, never ahead of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from semel.errors import Retriable
from semel.processing.files import replace_file
from semel.types import TopicPartition

__all__ = ["WRITE_SECONDS", "Watermarks"]

log = logging.getLogger("semel.engine")

WRITE_SECONDS = 1.0
"""How much progress a kill may make the file forget."""
FOLDER = "positions"

Positions = dict[str, int]


class Watermarks:
    """Offsets that groups have committed; `data` is the folder that a host's processes share, None: memory only."""

    def __init__(self, data: Path | None = None, process: str = "worker") -> None:
        self._folder = None if data is None else data / FOLDER
        self._path = None if self._folder is None else self._folder / f"{process}.json"
        self._mine: Positions = {} if self._path is None else _read(self._path)
        self._written = dict(self._mine)

    def __repr__(self) -> str:
        return f"<Watermarks of {len(self._mine)} partitions>"

    def note(self, group: str, topic: str, partition: int, offset: int) -> None:
        """This offset is committed: Kafka has said so. `topic` is the topic's identity, not only its name."""
        key = _key(group, topic, partition)
        if offset > self._mine.get(key, -1):
            self._mine[key] = offset

    def check(self, group: str, topic: str, committed: Mapping[TopicPartition, int]) -> None:
        """Compare what Kafka says now (-1: nothing) with what is known.

        Raises `Retriable` when it is less: asked again in a moment, a Kafka that is still loading says more.
        """
        known = self._known()
        for at, offset in committed.items():
            least = known.get(_key(group, topic, at.partition), -1)
            if offset < least:
                said = "nothing" if offset < 0 else str(offset)
                folder = "" if self._folder is None else f", remove {self._folder}"
                raise Retriable(
                    f"OFFSET_BACK: group {group!r} has committed {at} up to {least}, and Kafka now says {said}. "
                    f"Going on there would do {least - max(offset, 0)} offsets again. Kafka may still be loading its "
                    f"offsets (restart it if this stays) or has lost them (set the group's offset to {least}). If they "
                    f"were set back on purpose, stop the workers{folder} and start them again."
                )

    def recreated(self, group: str, topic: str) -> str:
        """What is known of a topic that had this one's name before; empty when nothing is. `topic` is an identity."""
        prefix = f"{group}/{topic.rpartition('/')[0]}/"
        for key, offset in self._known().items():
            if key.startswith(prefix) and not key.startswith(f"{group}/{topic}/"):
                return (
                    f"TOPIC_RECREATED: {group} was at offset {offset} of {key.removeprefix(prefix)} (id/partition), "
                    f"but the topic of that name is {topic.rpartition('/')[2]} now: it was deleted and made again. To "
                    "read the new one from its start, stop the workers, run semel accept-gap on each of their hosts, "
                    "start them. If the old records are in it once more, they would be worked on twice."
                )
        return ""

    def of_others(self, group: str, topic: str) -> dict[int, tuple[int, str]]:
        """What is known of topics that had this one's name before: offset and topic id by partition."""
        prefix, own = f"{group}/{topic.rpartition('/')[0]}/", f"{group}/{topic}/"
        found = {}
        for key, offset in self._known().items():
            if key.startswith(prefix) and not key.startswith(own):
                topic_id, _, partition = key.removeprefix(prefix).rpartition("/")
                found[int(partition)] = (offset, topic_id)
        return found

    def forget_others(self, group: str, topic: str, partition: int) -> None:
        """Nothing is known any more of a partition of topics that had this one's name before.

        Only while no process of this host works: it would write down again what it knows. Raises `OSError`.
        """
        prefix, own = f"{group}/{topic.rpartition('/')[0]}/", f"{group}/{topic}/"
        for path in [] if self._folder is None else self._folder.glob("*.json"):
            known = _read(path)
            kept = {
                key: offset
                for key, offset in known.items()
                if not key.startswith(prefix) or key.startswith(own) or key.rpartition("/")[2] != str(partition)
            }
            if kept != known:
                replace_file(path, msgspec.json.encode(kept))

    @asynccontextmanager
    async def written(self) -> AsyncIterator[None]:
        """Keep the file up to date while this is open."""
        task = asyncio.create_task(self._keep_writing(), name="positions")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self._write(dict(self._mine))

    async def _keep_writing(self) -> None:
        while True:
            await asyncio.sleep(WRITE_SECONDS)
            if self._mine != self._written:
                await asyncio.to_thread(self._write, dict(self._mine))

    def _write(self, positions: Positions) -> None:
        if self._path is None:
            return
        try:
            replace_file(self._path, msgspec.json.encode(positions))
            self._written = positions
        except OSError as error:
            log.warning("positions cannot be written to %s: %s; a restart knows only older ones", self._path, error)

    def _known(self) -> Positions:
        """The highest of what all processes of this host know."""
        known = dict(self._mine)
        others = [] if self._folder is None else sorted(self._folder.glob("*.json"))
        for path in others:
            for key, offset in _read(path).items():
                known[key] = max(offset, known.get(key, -1))
        return known


def _key(group: str, topic: str, partition: int) -> str:
    return f"{group}/{topic}/{partition}"


def _read(path: Path) -> Positions:
    """A file's positions; none when it is not there. One that cannot be read is told and passed over."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Positions)
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.MsgspecError) as error:
        log.warning("positions in %s cannot be read: %s; an offset that goes back may not be noticed", path, error)
        return {}

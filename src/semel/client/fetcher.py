"""Which partition is read where, from which offset, and what of it waits to be delivered [sans-IO].

The shell (`client/fetching.py`) asks `next_request` for each broker in `nodes`, sends it, and reports every request
exactly once: `answered`, or `failed`. It finds leaders for `unled`, and asks about epochs for `unchecked`.

    UNLED --leader known--> UNCHECKED --same log (KIP-320)--> FLOWING --error, or broker away--> UNLED

A partition whose leader changed is checked before it is read again: a new leader may have been elected without the
records that we have read, and others may stand at their offsets now. Every fetch names the epoch that was checked, so
a broker refuses it when there is a newer one.

An answer counts only for the position it was asked for: what was in flight when a partition was sought, revoked or
assigned anew is dropped by its version. At most `BUFFER_BYTES` and one answer of every broker wait in memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from enum import Enum, auto
from typing import Any, NamedTuple
from uuid import UUID

from semel.client.chunks import Chunk
from semel.client.fetch_session import Asked, FetchSession
from semel.errors import CorruptBatch, ErrorCode, Fatal, SemelError
from semel.types import Record, TopicPartition

__all__ = ["FetchLimits", "FetchRequest", "Fetcher"]

BUFFER_BYTES = 32 * 1_048_576
"""Fetched and not delivered yet, as it came over the wire. A worker is to need 200 MB at most."""
PARTITION_BUFFER_BYTES = 4 * 1_048_576
"""The same of one partition: a full one waits, and the others go on."""
RETRY_SECONDS = (0.02, 1.0)
"""How long a partition waits after an error: the first time, and doubled up to the most."""

_SESSION_LOST = (
    ErrorCode.FETCH_SESSION_ID_NOT_FOUND,
    ErrorCode.INVALID_FETCH_SESSION_EPOCH,
    ErrorCode.FETCH_SESSION_TOPIC_ID_ERROR,
)
_DECIDE = "Records were deleted before they were read, or the topic was made anew; decide where to go on."


class Stage(Enum):
    """What a partition waits for."""

    UNLED = auto()
    UNCHECKED = auto()
    FLOWING = auto()


class FetchLimits(NamedTuple):
    """How much one request may bring, and how long a broker may wait for the first byte of it (milliseconds)."""

    wait_ms: int = 500
    min_bytes: int = 1
    max_bytes: int = 8 * 1_048_576
    partition_bytes: int = 1_048_576


class FetchRequest(NamedTuple):
    """One Fetch: what to send to whom, and what was asked."""

    node_id: int
    version: int
    fields: dict[str, Any]
    asked: dict[TopicPartition, int]
    """The version of each partition's position."""


class _Partition:
    """One partition that is ours."""

    __slots__ = (
        "at", "buffered", "checked_epoch", "chunks", "epoch", "fetch_offset", "is_fresh", "is_paused",
        "is_ready", "leader", "leader_epoch", "position", "retry_at", "stable_end", "stage", "told_end",
        "topic_id", "tries", "version",
    )  # fmt: skip

    def __init__(self, at: TopicPartition, offset: int, version: int) -> None:
        self.at = at
        self.stage = Stage.UNLED
        self.leader = -1
        self.leader_epoch = -1
        self.checked_epoch = -1
        """The leader epoch in which the log was found to have what we read."""
        self.topic_id: UUID | None = None
        self.retry_at = 0.0
        self.tries = 0
        self.is_paused = False
        self.set(offset, version)

    def set(self, offset: int, version: int) -> None:
        """Read from here on; whatever was fetched or is in flight is of no use."""
        self.version = version
        self.position = self.fetch_offset = offset
        self.epoch = -1
        """The leader epoch of the last batch that was fetched; -1 while the position was only given to us."""
        self.chunks: deque[Chunk] = deque()
        self.buffered = 0
        self.stable_end = -1
        self.told_end = -1
        self.is_fresh = True
        """No answer came for this position yet."""
        self.is_ready = False


class Fetcher:
    """The partitions of one consumer. Times are seconds of a clock that only runs forward."""

    def __init__(self, limits: FetchLimits | None = None) -> None:
        self.failure: SemelError | None = None
        """Why nothing can be read any more."""
        self.limits = limits or FetchLimits()
        self._partitions: dict[TopicPartition, _Partition] = {}
        self._sessions: dict[int, FetchSession] = {}
        self._ready: deque[_Partition] = deque()
        """Those that have something to deliver, in the order in which they are asked."""
        self._version = 0
        self._buffered = 0

    def __repr__(self) -> str:
        flowing = sum(item.stage is Stage.FLOWING for item in self._partitions.values())
        return f"<Fetcher {flowing} of {len(self._partitions)} partitions flow, {self._buffered} bytes wait>"

    # --- What the consumer wants ---

    @property
    def positions(self) -> dict[TopicPartition, int]:
        """The next offset to be delivered of each partition."""
        return {at: item.position for at, item in self._partitions.items()}

    @property
    def has_ready(self) -> bool:
        """Whether `take` may have something to give."""
        return bool(self._ready)

    def assign(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Read these partitions too, from these offsets on."""
        for at, offset in offsets.items():
            self._drop(at)
            self._version += 1
            self._partitions[at] = _Partition(at, offset, self._version)

    def revoke(self, partitions: Iterable[TopicPartition]) -> None:
        """Read these no more; what was fetched of them is dropped, and a pause ends."""
        for at in partitions:
            self._drop(at)
            self._partitions.pop(at, None)

    def seek(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Go on at these offsets. Raises `KeyError` for a partition that is not ours, and changes nothing then."""
        items = [(self._partitions[at], offset) for at, offset in offsets.items()]
        for item, offset in items:
            self._drop(item.at)
            self._version += 1
            item.set(offset, self._version)

    def pause(self, partitions: Iterable[TopicPartition]) -> None:
        """Deliver nothing of these until `resume`; what was fetched of them stays."""
        for at in partitions:
            item = self._partitions.get(at)
            if item is not None:
                item.is_paused = True
                self._make_unready(item)

    def resume(self, partitions: Iterable[TopicPartition]) -> None:
        """Deliver these again."""
        for at in partitions:
            item = self._partitions.get(at)
            if item is not None and item.is_paused:
                item.is_paused = False
                self._make_ready(item)

    def take(self, count: int) -> tuple[list[Record], dict[TopicPartition, int]]:
        """Up to `count` records in the order of each partition, and the positions at ends that were reached.

        A batch that cannot be read makes the consumer fail when everything before it was delivered.
        """
        records: list[Record] = []
        ends: dict[TopicPartition, int] = {}
        while self._ready and len(records) < count:
            item = self._ready.popleft()
            item.is_ready = False
            if item.chunks and not self._take_from(item, count - len(records), records):
                break
            if item.chunks:
                # The others have their turn when this one's chunk is through, not before.
                (self._ready.appendleft if len(records) >= count else self._ready.append)(item)
                item.is_ready = True
            elif item.position >= item.stable_end >= 0 and item.told_end != item.position:
                item.told_end = ends[item.at] = item.position
        return records, ends

    def _take_from(self, item: _Partition, count: int, records: list[Record]) -> bool:
        """Records of the first chunk; False when it cannot be read."""
        chunk = item.chunks[0]
        try:
            records += chunk.take(count)
        except CorruptBatch as error:
            item.position = chunk.position
            self.failure = Fatal(
                f"{error} What Kafka has at {item.at} from offset {item.position} on cannot be read: look at the "
                "disks of its brokers, or decide where to go on."
            )
            return False
        item.position = chunk.position
        if chunk.is_empty:
            item.chunks.popleft()
            item.buffered -= chunk.size
            self._buffered -= chunk.size
        return True

    # --- Leaders and their epochs ---

    def unled(self, now: float) -> set[str]:
        """The topics whose leaders have to be looked up."""
        return {at.topic for at, item in self._partitions.items() if item.stage is Stage.UNLED and item.retry_at <= now}

    def led_by(self, topic: str, topic_id: UUID | None, leaders: Mapping[int, tuple[int, int]], now: float) -> None:
        """What the cluster says of a topic: (node, leader epoch) of each partition that has a leader."""
        for at, item in self._partitions.items():
            if at.topic != topic or item.stage is not Stage.UNLED or item.retry_at > now:
                continue
            if item.topic_id is not None and topic_id is not None and item.topic_id != topic_id:
                self._fail(f"{at}: the topic was deleted and made anew, and its old offsets mean nothing. {_DECIDE}")
                return
            item.topic_id = item.topic_id or topic_id
            leader = leaders.get(at.partition)
            if leader is None:
                self._wait(item, now)
                continue
            item.leader, item.leader_epoch = leader
            if item.epoch >= 0 and item.leader_epoch > max(item.checked_epoch, item.epoch):
                item.stage = Stage.UNCHECKED
            else:
                self._flow(item)

    def unchecked(self) -> dict[int, dict[TopicPartition, tuple[int, int]]]:
        """By node: partitions to ask it about, each with (the leader's epoch, the epoch of what we read last)."""
        found: dict[int, dict[TopicPartition, tuple[int, int]]] = {}
        for at, item in self._partitions.items():
            if item.stage is Stage.UNCHECKED:
                found.setdefault(item.leader, {})[at] = (item.leader_epoch, item.epoch)
        return found

    def checked(
        self, at: TopicPartition, asked: tuple[int, int], code: int, epoch: int, end_offset: int, now: float
    ) -> None:
        """What OffsetForLeaderEpoch said: where the leader's log ends in that epoch, or in the last one before it."""
        item = self._partitions.get(at)
        if item is None or item.stage is not Stage.UNCHECKED or (item.leader_epoch, item.epoch) != asked:
            return
        if code != ErrorCode.NONE:
            self._look_again(item, now)
        elif epoch < 0 or end_offset < item.fetch_offset:
            where = f"ends at offset {end_offset}" if end_offset >= 0 else "does not know that epoch"
            self._fail(
                f"{at}: the log was cut behind our back. We have read up to offset {item.fetch_offset} in leader epoch "
                f"{item.epoch}, but the log of the leader of epoch {item.leader_epoch} {where} there: records that "
                "were committed are lost (an unclean leader election). Compare what was processed with the log, and "
                "decide where to go on."
            )
        else:
            self._flow(item)

    def _flow(self, item: _Partition) -> None:
        item.stage = Stage.FLOWING
        item.checked_epoch = item.leader_epoch

    def lost(self, node_id: int, now: float) -> None:
        """A broker cannot be reached: whatever it leads needs a leader."""
        self._sessions.pop(node_id, None)
        for item in self._partitions.values():
            if item.leader == node_id and item.stage is not Stage.UNLED:
                self._look_again(item, now)

    def _look_again(self, item: _Partition, now: float) -> None:
        item.stage = Stage.UNLED
        self._wait(item, now)

    def _wait(self, item: _Partition, now: float) -> None:
        first, most = RETRY_SECONDS
        item.retry_at = now + min(most, first * (1 << min(item.tries, 16)))
        item.tries += 1

    def next_look(self) -> float | None:
        """When the next leader has to be looked up; None when every partition has one."""
        return min((item.retry_at for item in self._partitions.values() if item.stage is Stage.UNLED), default=None)

    # --- Fetching ---

    def nodes(self) -> set[int]:
        """The brokers that lead something we may read."""
        return {item.leader for item in self._partitions.values() if item.stage is Stage.FLOWING}

    def next_request(self, node_id: int, newest: int) -> FetchRequest | None:
        """What to ask this broker now, None for nothing; `newest` is the highest version of Fetch that it offers."""
        if self._buffered >= BUFFER_BYTES or self.failure is not None:
            return None
        wanted: dict[TopicPartition, Asked] = {}
        items = [item for item in self._partitions.values() if item.leader == node_id and self._may_fetch(item)]
        items.sort(key=lambda item: item.buffered)  # A broker fills its answer in this order.
        for item in items:
            wanted[item.at] = Asked(item.version, item.fetch_offset, item.leader_epoch, item.topic_id)
        if not wanted:
            return None
        with_ids = newest >= _WITH_IDS and all(item.topic_id is not None for item in items)
        session = self._sessions.get(node_id)
        if session is None or session.with_ids != with_ids:
            session = self._sessions[node_id] = FetchSession(with_ids)
        limits = self.limits
        fields = {
            # Whoever set a position wants to know what is there now, even if it is nothing.
            "max_wait": 0 if any(item.is_fresh for item in items) else limits.wait_ms,
            "min_bytes": limits.min_bytes,
            "max_bytes": min(limits.max_bytes, BUFFER_BYTES - self._buffered),
            "isolation_level": _READ_COMMITTED,
            **session.ask(wanted, limits.partition_bytes),
        }
        version = min(newest, _NEWEST) if with_ids else min(newest, _WITH_IDS - 1)
        if version < _REPLICA_STATE:
            fields["replica_id"] = -1
        return FetchRequest(node_id, version, fields, {at: asked.version for at, asked in wanted.items()})

    def _may_fetch(self, item: _Partition) -> bool:
        return item.stage is Stage.FLOWING and not item.is_paused and item.buffered < PARTITION_BUFFER_BYTES

    def answered(self, request: FetchRequest, answer: Any, now: float) -> list[tuple[TopicPartition, int]]:
        """Take an answer; returns the error codes in it that pass by themselves, with their partitions."""
        session = self._sessions.get(request.node_id)
        if session is None:
            return []
        code = answer.error_code
        if code != ErrorCode.NONE:
            session.reset()
            if code in _SESSION_LOST:
                return []
            self._look_again_for(request, now)
            return [(at, code) for at in request.asked]
        session.answered(answer.session_id)
        troubles = []
        for topic in answer.responses:
            name = session.name_of(topic)
            for found in topic.partitions:
                at = TopicPartition(name or "", found.partition_index)
                item = self._partitions.get(at)
                if item is None or request.asked.get(at) != item.version or item.stage is not Stage.FLOWING:
                    continue
                if found.error_code != ErrorCode.NONE:
                    if self._refused(item, found.error_code, now):
                        troubles.append((at, int(found.error_code)))
                    continue
                self._arrived(item, found)
        return troubles

    def failed(self, request: FetchRequest, now: float) -> None:
        """A request has no answer, or was not sent: its session is of no further use, the leader may be another."""
        self._sessions.pop(request.node_id, None)
        self._look_again_for(request, now)

    def _look_again_for(self, request: FetchRequest, now: float) -> None:
        for at, version in request.asked.items():
            item = self._partitions.get(at)
            if item is not None and item.version == version and item.leader == request.node_id:
                self._look_again(item, now)

    def _refused(self, item: _Partition, code: int, now: float) -> bool:
        """An error of one partition; False when it is the end of this consumer."""
        if code == ErrorCode.OFFSET_OUT_OF_RANGE:
            self._fail(
                f"{item.at}: the position to read from is not in the log any more (offset {item.fetch_offset}: "
                f"OFFSET_OUT_OF_RANGE). {_DECIDE}"
            )
            return False
        self._look_again(item, now)
        return True

    def _arrived(self, item: _Partition, found: Any) -> None:
        item.tries = 0
        item.is_fresh = False
        item.stable_end = found.last_stable_offset
        data = found.records
        if data:
            aborted = ((each.first_offset, each.producer_id) for each in found.aborted_transactions or ())
            try:
                chunk = Chunk(item.at, item.fetch_offset, data, aborted)
            except CorruptBatch as error:
                self._fail(f"{item.at}: what Kafka sent for offset {item.fetch_offset} cannot be read: {error}")
                return
            if (last := chunk.last) is not None:
                item.fetch_offset, item.epoch = last.next_offset, last.partition_leader_epoch
                item.chunks.append(chunk)
                item.buffered += chunk.size
                self._buffered += chunk.size
        self._make_ready(item)

    # --- Common ---

    def _make_ready(self, item: _Partition) -> None:
        has_end = item.position >= item.stable_end >= 0 and item.told_end != item.position
        if (item.chunks or has_end) and not item.is_ready and not item.is_paused:
            item.is_ready = True
            self._ready.append(item)

    def _make_unready(self, item: _Partition) -> None:
        if item.is_ready:
            item.is_ready = False
            self._ready.remove(item)

    def _drop(self, at: TopicPartition) -> None:
        item = self._partitions.get(at)
        if item is not None:
            self._buffered -= item.buffered
            self._make_unready(item)

    def _fail(self, why: str) -> None:
        self.failure = self.failure or Fatal(why)


_READ_COMMITTED = 1
_WITH_IDS = 13
"""From this version of Fetch on topics are named by their ids."""
_REPLICA_STATE = 15
"""From this version on who is no replica says nothing of it."""
_NEWEST = 17

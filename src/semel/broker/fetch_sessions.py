"""Fetch sessions (KIP-227): the broker remembers what a consumer reads, and both sides tell only what changed.

An entry is told by its partition when something moved there. So a fetch over a thousand partitions of which three moved
costs three look-ups.
"""

from __future__ import annotations

from collections.abc import Iterable
from random import Random
from typing import Any, Protocol
from uuid import UUID

from semel.broker.topics import Partition
from semel.errors import ErrorCode

__all__ = ["Entry", "FetchSessions", "Reader", "Session", "SessionError", "TopicKey"]

MAX_SESSIONS = 1000
"""Kafka's max.incremental.fetch.session.cache.slots; who gets none goes on with full requests."""
MAX_ENTRIES = 200_000
"""Partitions of all sessions together, about 400 bytes each."""
KEPT_MS = 120_000
"""Kafka's min.incremental.fetch.session.eviction.ms: a younger session, and one used since, is not taken away."""
_LAST_EPOCH = (1 << 31) - 1

TopicKey = str | UUID | None
"""A topic's name; its id from Fetch v13 on."""
Asked = Iterable[tuple[TopicKey, Any]]
"""Topics and the partitions of a request, as kio decodes them."""


class Parked(Protocol):
    """A fetch that waits for one of its partitions to move."""

    def wake(self) -> None:
        """Something moved."""

    def end(self) -> None:
        """Answer with what there is."""


class SessionError(Exception):
    """The request does not fit its session; the client starts over with a full one."""

    def __init__(self, code: ErrorCode) -> None:
        super().__init__(code.name)
        self.code = code


class Entry:
    """One partition that somebody reads: where, and what the reader was told last."""

    __slots__ = (
        "high_watermark",
        "index",
        "leader_epoch",
        "log_start_offset",
        "max_bytes",
        "offset",
        "reader",
        "source",
        "topic",
        "was_there",
    )

    def __init__(self, reader: Reader, topic: TopicKey, index: int) -> None:
        self.reader = reader
        self.topic = topic
        self.index = index
        self.offset = 0
        self.max_bytes = 0
        self.leader_epoch = -1
        self.high_watermark = -1
        self.log_start_offset = -1
        self.source: Partition | None = None
        self.was_there = False
        """Whether there ever was such a partition. To a reader who knew it, a deleted topic's id is no unknown id."""

    def __repr__(self) -> str:
        return f"<Entry {self.topic}-{self.index} at {self.offset}>"

    def wake(self) -> None:
        """The partition moved, or is gone."""
        self.reader.moved(self)

    def is_news(self, error: int, high_watermark: int, log_start_offset: int) -> bool:
        """Whether an incremental response has to name the partition even if it has no records."""
        return bool(error) or (high_watermark, log_start_offset) != (self.high_watermark, self.log_start_offset)

    def told(self, error: int, high_watermark: int, log_start_offset: int) -> None:
        """The reader was told. After an error the partition counts as never told, so that its recovery is news."""
        self.high_watermark = -1 if error else high_watermark
        self.log_start_offset = log_start_offset


class Reader:
    """What a client reads: in one request, or over a session."""

    def __init__(self) -> None:
        self.entries: dict[tuple[TopicKey, int], Entry] = {}
        self.changed: dict[Entry, None] = {}
        """Those that may have something for the reader, whose turn comes first in front."""
        self.parked: dict[Parked, None] = {}
        self._is_watching = False

    def update(self, asked: Asked) -> None:
        """Add partitions, or move where they are read."""
        for topic, item in asked:
            key = (topic, item.partition)
            entry = self.entries.get(key)
            if entry is None:
                entry = self.entries[key] = Entry(self, *key)
            entry.offset = item.fetch_offset
            entry.max_bytes = item.partition_max_bytes
            entry.leader_epoch = getattr(item, "current_leader_epoch", -1)
            self.changed[entry] = None

    def forget(self, keys: Iterable[tuple[TopicKey, int]]) -> None:
        """Read these no more."""
        for key in keys:
            entry = self.entries.pop(key, None)
            if entry is not None:
                self.changed.pop(entry, None)
                self.attach(entry, None)

    def attach(self, entry: Entry, source: Partition | None) -> None:
        """`source` is what the entry reads now: a topic may come, go, and come again under its name."""
        if source is not entry.source:
            if entry.source is not None:
                entry.source.waiters.pop(entry, None)
            entry.source = source
            if source is not None:
                entry.was_there = True
                if self._is_watching:
                    source.waiters[entry] = None

    def watch(self) -> None:
        """From now on partitions that move are noted in `changed`, and wake who is parked."""
        if not self._is_watching:
            self._is_watching = True
            for entry in self.entries.values():
                if entry.source is not None:
                    entry.source.waiters[entry] = None

    def moved(self, entry: Entry) -> None:
        """Something happened to the entry's partition."""
        self.changed[entry] = None
        for fetch in tuple(self.parked):
            fetch.wake()

    def close(self) -> None:
        """Nobody reads any more; who is parked gets what there is."""
        if self._is_watching:
            self._is_watching = False
            for entry in self.entries.values():
                if entry.source is not None:
                    entry.source.waiters.pop(entry, None)
        for fetch in tuple(self.parked):
            fetch.end()


class Session(Reader):
    """A reader over many requests; `epoch` is the next request's."""

    def __init__(self, session_id: int, by_id: bool, now_ms: int) -> None:
        super().__init__()
        self.id = session_id
        self.epoch = 1
        self.by_id = by_id
        self.isolation_level = 0
        self.created_ms = self.used_ms = now_ms

    def __repr__(self) -> str:
        return f"<Session {self.id} epoch {self.epoch}, {len(self.entries)} partitions>"


class FetchSessions:
    """The sessions of this broker; they end with it."""

    def __init__(self, rng: Random, *, slots: int = MAX_SESSIONS, max_entries: int = MAX_ENTRIES) -> None:
        self._rng = rng
        self._slots = slots
        self._max_entries = max_entries
        self._entries = 0
        self._sessions: dict[int, Session] = {}  # Least recently used first.

    def __repr__(self) -> str:
        return f"<FetchSessions {len(self._sessions)} sessions, {self._entries} partitions>"

    def full(self, session_id: int, epoch: int, by_id: bool, asked: Asked, now_ms: int) -> Reader:
        """A request that names all its partitions: it ends the session that it names, and with epoch 0 begins one."""
        self.close(session_id)
        asked = list(asked)
        session = self._create(len(asked), by_id, now_ms) if epoch == 0 else None
        reader = Reader() if session is None else session
        reader.update(asked)
        return reader

    def incremental(
        self,
        session_id: int,
        epoch: int,
        by_id: bool,
        asked: Asked,
        forgotten: Iterable[tuple[TopicKey, int]],
        now_ms: int,
    ) -> Reader:
        """The next request of a session. Raises `SessionError`.

        A session without partitions ends, and as in Apache Kafka the request is served as one without a session.
        """
        session = self._sessions.get(session_id)
        if session is None:
            raise SessionError(ErrorCode.FETCH_SESSION_ID_NOT_FOUND)
        if session.epoch != epoch:
            raise SessionError(ErrorCode.INVALID_FETCH_SESSION_EPOCH)
        if session.by_id != by_id:
            raise SessionError(ErrorCode.FETCH_SESSION_TOPIC_ID_ERROR)
        before = len(session.entries)
        asked = list(asked)
        session.update(asked)
        session.forget(forgotten)
        self._entries += len(session.entries) - before
        if not session.entries:
            self.close(session_id)
            reader = Reader()
            reader.update(asked)
            return reader
        if self._entries > self._max_entries:
            self.close(session_id)
            raise SessionError(ErrorCode.FETCH_SESSION_ID_NOT_FOUND)
        session.epoch = 1 if epoch == _LAST_EPOCH else epoch + 1
        session.used_ms = now_ms
        self._sessions[session_id] = self._sessions.pop(session_id)
        return session

    def close(self, session_id: int) -> None:
        """End a session, if there is one of this id."""
        session = self._sessions.pop(session_id, None)
        if session is not None:
            self._entries -= len(session.entries)
            session.close()

    def _create(self, size: int, by_id: bool, now_ms: int) -> Session | None:
        if self._entries + size > self._max_entries:
            return None
        if len(self._sessions) >= self._slots:
            loser = self._loser(size, now_ms)
            if loser is None:
                return None
            self.close(loser.id)
        session_id = 0
        while session_id == 0 or session_id in self._sessions:
            session_id = self._rng.randrange(1, 1 << 31)
        session = self._sessions[session_id] = Session(session_id, by_id, now_ms)
        self._entries += size
        return session

    def _loser(self, size: int, now_ms: int) -> Session | None:
        """Who makes room: the one unused for longest, or an old one that saves less than a new one of `size` would."""
        oldest = next(iter(self._sessions.values()), None)
        if oldest is None or now_ms - oldest.used_ms > KEPT_MS:
            return oldest
        old = [session for session in self._sessions.values() if now_ms - session.created_ms > KEPT_MS]
        smallest = min(old, key=lambda session: len(session.entries), default=None)
        return smallest if smallest is not None and len(smallest.entries) < size else None

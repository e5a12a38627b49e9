"""Fetch: read record batches, waiting for them where there are none."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from semel.broker.apis.hotpath import FetchedPartition, fetch_response
from semel.broker.config import LEADER_EPOCH
from semel.broker.exchange import Answer, Api, Later, Parts, Request
from semel.broker.fetch_sessions import Entry, Reader, Session, SessionError, TopicKey
from semel.broker.security.acls import Operation, Resource
from semel.broker.topics import Partition
from semel.errors import ErrorCode
from semel.log.log import LogError, Slice
from semel.wire.messages import to_ms

if TYPE_CHECKING:
    from semel.broker.node import Node, Timer

__all__ = ["APIS", "leader_epoch_error"]

_NOT_READ = {
    ErrorCode.UNKNOWN_TOPIC_ID: 1,
    ErrorCode.TOPIC_AUTHORIZATION_FAILED: 2,
    ErrorCode.UNKNOWN_TOPIC_OR_PARTITION: 2,
}
"""What keeps a partition from being read, and its place in Apache Kafka's answer, behind all that was."""
_MAX_WAIT_MS = 300_000
"""A parked fetch holds a connection; no client asks for more than half a minute."""


def leader_epoch_error(epoch: int) -> ErrorCode:
    """The error for a client's idea of the current leader epoch; -1 is no idea."""
    if epoch == -1 or epoch == LEADER_EPOCH:
        return ErrorCode.NONE
    return ErrorCode.UNKNOWN_LEADER_EPOCH if epoch > LEADER_EPOCH else ErrorCode.FENCED_LEADER_EPOCH


class _Fetch:
    """One Fetch request, tried at once and again whenever one of its partitions moves."""

    def __init__(self, node: Node, request: Request, reader: Reader, *, is_full: bool) -> None:
        body = request.body
        self._node = node
        self._version = request.version
        self._correlation_id = request.header.correlation_id
        self._committed_only = body.isolation_level == 1
        self._min_bytes = body.min_bytes
        self._max_bytes = body.max_bytes
        self._reader = reader
        self._session_id = reader.id if isinstance(reader, Session) else 0
        self._is_full = is_full
        self._request = request
        self._is_forbidden = cache(self._is_denied) if node.authorizer is not None else None
        self._wait_ms = min(to_ms(body.max_wait), _MAX_WAIT_MS)
        self._later: Later | None = None
        self._timer: Timer | None = None

    def start(self, request: Request) -> Parts | Later:
        """Answer, or park until there is enough to answer with."""
        parts = self._attempt(force=self._wait_ms <= 0)
        if self._session_id or parts is None:
            self._reader.watch()
        if parts is not None:
            return parts
        self._later = Later(self._node.outbox, request)
        self._later.abandon = self._abandon
        self._reader.parked[self] = None
        self._timer = self._node.call_later(self._wait_ms / 1000, self.end)
        return self._later

    def wake(self) -> None:
        """A partition moved or went away."""
        parts = self._attempt(force=False)
        if parts is not None:
            self._finish(parts)

    def end(self) -> None:
        """The time is up, or the session is gone: answer with what there is."""
        parts = self._attempt(force=True)
        assert parts is not None
        self._finish(parts)

    def _finish(self, parts: Parts) -> None:
        self._unpark()
        assert self._later is not None
        self._later.answer(parts)

    def _abandon(self) -> None:
        self._unpark()
        if self._is_full:
            self._node.fetch_sessions.close(self._session_id)  # Nobody was told its id.

    def _unpark(self) -> None:
        self._reader.parked.pop(self, None)
        if not self._session_id:
            self._reader.close()
        if self._timer is not None:
            self._timer.cancel()

    def _is_denied(self, key: TopicKey) -> bool:
        topic = None if isinstance(key, str) else self._node.topics.by_id(key)
        name = key if isinstance(key, str) else None if topic is None else topic.info.name
        return name is not None and self._node.denies(self._request, Operation.READ, Resource.TOPIC, name)

    def _find(self, key: TopicKey, index: int) -> Partition | None:
        topic = self._node.topics.get(key) if isinstance(key, str) else self._node.topics.by_id(key)
        return None if topic is None else topic.partition(index)

    def _attempt(self, *, force: bool) -> Parts | None:
        """The response, or None while there is too little to send and no error to report."""
        reader = self._reader
        room = self._max_bytes
        total = 0
        failed = False
        news: list[tuple[Entry, FetchedPartition, bool]] = []
        for entry in list(reader.entries.values() if self._is_full else reader.changed):
            result, stays = self._read(entry, room, first=total == 0)
            size = sum(part.length for part in result.slices) if result.slices else 0
            total += size
            room -= size
            failed = failed or result.error != 0
            if self._is_full or size or entry.is_news(result.error, result.high_watermark, result.log_start_offset):
                news.append((entry, result, stays))
            elif not stays:
                del reader.changed[entry]
        if not (force or failed or total >= self._min_bytes or not reader.entries):
            return None
        # In Apache Kafka's order, in which a topic may come up again.
        if failed:
            news.sort(key=lambda item: _NOT_READ.get(ErrorCode(item[1].error), 0))
        topics: list[tuple[TopicKey, list[FetchedPartition]]] = []
        for entry, result, stays in news:
            if not topics or topics[-1][0] != entry.topic:
                topics.append((entry.topic, []))
            topics[-1][1].append(result)
            if self._session_id:
                entry.told(result.error, result.high_watermark, result.log_start_offset)
                if not stays or result.slices:
                    reader.changed.pop(entry, None)
                if stays and result.slices:
                    reader.changed[entry] = None  # The others first, next time.
        return fetch_response(self._version, self._correlation_id, topics, session_id=self._session_id)

    def _read(self, entry: Entry, room: int, *, first: bool) -> tuple[FetchedPartition, bool]:
        """One partition's part of the response, and whether there may be more to tell without anything moving."""
        if self._is_forbidden is not None and self._is_forbidden(entry.topic):
            return _failed(entry, ErrorCode.TOPIC_AUTHORIZATION_FAILED)
        partition = self._find(entry.topic, entry.index)
        self._reader.attach(entry, partition)
        if partition is None:
            if isinstance(entry.topic, str) or entry.was_there or self._node.topics.by_id(entry.topic) is not None:
                return _failed(entry, ErrorCode.UNKNOWN_TOPIC_OR_PARTITION)
            return _failed(entry, ErrorCode.UNKNOWN_TOPIC_ID)
        code = leader_epoch_error(entry.leader_epoch)
        if code is not ErrorCode.NONE:
            return _failed(entry, code)
        source = partition.log
        upper = source.last_stable_offset if self._committed_only else source.high_watermark
        slices: tuple[Slice, ...] = ()
        aborted: list[tuple[int, int]] | None = [] if self._committed_only else None
        try:
            if room > 0 or first:
                limit = min(entry.max_bytes, max(room, 0))
                slices = tuple(source.read(entry.offset, limit, upper, min_one=first))
                if slices and self._committed_only:
                    # Those of the batches that are sent, not of all that could be: a slow reader would get each one
                    # with every answer.
                    end = source.end_of(entry.offset, slices)
                    aborted = source.aborted_transactions(entry.offset, end)
                elif limit and entry.offset < upper:
                    aborted = None  # The next batch is larger than the limit: Apache Kafka has no list then.
            elif not source.log_start_offset <= entry.offset <= source.log_end_offset:
                return _failed(entry, ErrorCode.OFFSET_OUT_OF_RANGE)
        except LogError as error:
            return _failed(entry, error.code)
        result = FetchedPartition(
            entry.index,
            ErrorCode.NONE,
            source.high_watermark,
            source.last_stable_offset,
            source.log_start_offset,
            aborted,
            slices,
        )
        return result, entry.offset < upper


def _failed(entry: Entry, code: ErrorCode) -> tuple[FetchedPartition, bool]:
    # As in Apache Kafka: a read that failed has no list of aborted transactions, what was not read has an empty one.
    aborted: list[tuple[int, int]] | None = [] if code in _NOT_READ else None
    return FetchedPartition(entry.index, code, aborted=aborted), True


def fetch(node: Node, request: Request) -> Answer | Later:
    """Fetch.

    Behaviour: waits up to MaxWaitMs for MinBytes; an error answers at once. The first partition with data gives at
    least one batch, whatever the limits. read_committed ends at the last stable offset and lists aborted transactions
    sorted by first offset; read_uncommitted has null in their place. Sessions as in kafka_facts 2.10: SessionEpoch 0
    begins one, -1 is without; a later request names what changed, and so does its response. Wrong epoch, also of a
    repeated request: 71; unknown session: 70; names in a session of ids, or the other way round: 106.
    Version notes: v7 sessions; v9 CurrentLeaderEpoch; v12 flexible; v13 topics by id (unknown: 100 instead of 3).
    """
    body = request.body
    session_id = getattr(body, "session_id", 0)
    epoch = getattr(body, "session_epoch", -1)
    by_id = request.version >= 13
    asked = ((_key(topic), item) for topic in body.topics for item in topic.partitions)
    is_full = epoch in (0, -1)
    try:
        if is_full:
            reader = node.fetch_sessions.full(session_id, epoch, by_id, asked, request.now_ms)
        else:
            forgotten = [(_key(topic), index) for topic in body.forgotten_topics_data for index in topic.partitions]
            reader = node.fetch_sessions.incremental(session_id, epoch, by_id, asked, forgotten, request.now_ms)
    except SessionError as error:
        return fetch_response(request.version, request.header.correlation_id, [], error=error.code)
    if isinstance(reader, Session) and reader.isolation_level != body.isolation_level:
        reader.isolation_level = body.isolation_level
        reader.changed.update(dict.fromkeys(reader.entries.values()))
    return _Fetch(node, request, reader, is_full=is_full).start(request)


def _key(topic: Any) -> TopicKey:
    key: TopicKey = topic.topic if hasattr(topic, "topic") else topic.topic_id
    return key


APIS = (Api(1, 4, 18, fetch),)

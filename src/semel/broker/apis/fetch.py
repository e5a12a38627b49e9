"""Fetch: read record batches, waiting for them where there are none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID

from semel.broker.apis.hotpath import FetchedPartition, fetch_response
from semel.broker.config import LEADER_EPOCH
from semel.broker.exchange import Answer, Api, Later, Parts, Request
from semel.broker.security.acls import Operation, Resource
from semel.broker.topics import Partition
from semel.errors import ErrorCode
from semel.log.log import LogError, Slice
from semel.wire.messages import to_ms

if TYPE_CHECKING:
    from semel.broker.node import Node, Timer

__all__ = ["APIS", "leader_epoch_error"]

_MAX_WAIT_MS = 300_000
"""A parked fetch holds a connection; no client asks for more than half a minute."""


def leader_epoch_error(epoch: int) -> ErrorCode:
    """The error for a client's idea of the current leader epoch; -1 is no idea."""
    if epoch == -1 or epoch == LEADER_EPOCH:
        return ErrorCode.NONE
    return ErrorCode.UNKNOWN_LEADER_EPOCH if epoch > LEADER_EPOCH else ErrorCode.FENCED_LEADER_EPOCH


class _Fetch:
    """One Fetch request, tried at once and again whenever one of its partitions moves."""

    def __init__(self, node: Node, request: Request) -> None:
        body = request.body
        self._node = node
        self._version = request.version
        self._correlation_id = request.header.correlation_id
        self._committed_only = body.isolation_level == 1
        self._min_bytes = body.min_bytes
        self._max_bytes = body.max_bytes
        self._topics = [(self._key(topic), topic.partitions) for topic in body.topics]
        self._forbidden = {key for key, _ in self._topics if self._is_forbidden(request, key)}
        self._wait_ms = min(to_ms(body.max_wait), _MAX_WAIT_MS)
        self._later: Later | None = None
        self._timer: Timer | None = None
        self._watched: list[Partition] = []

    @staticmethod
    def _key(topic: Any) -> str | UUID | None:
        key: str | UUID | None = topic.topic if hasattr(topic, "topic") else topic.topic_id
        return key

    def _is_forbidden(self, request: Request, key: str | UUID | None) -> bool:
        topic = None if isinstance(key, str) else self._node.topics.by_id(key)
        name = key if isinstance(key, str) else None if topic is None else topic.info.name
        return name is not None and self._node.denies(request, Operation.READ, Resource.TOPIC, name)

    def start(self, request: Request) -> Parts | Later:
        """Answer, or park until there is enough to answer with."""
        parts = self._attempt(force=self._wait_ms <= 0)
        if parts is not None:
            return parts
        self._later = Later(self._node.outbox, request)
        self._later.abandon = self._unpark
        for key, partitions in self._topics:
            for item in partitions:
                partition = self._find(key, item.partition)
                if partition is not None:
                    partition.waiters.add(self)
                    self._watched.append(partition)
        self._timer = self._node.call_later(self._wait_ms / 1000, self._time_out)
        return self._later

    def wake(self) -> None:
        """A partition moved or went away."""
        parts = self._attempt(force=False)
        if parts is not None:
            self._finish(parts)

    def _time_out(self) -> None:
        parts = self._attempt(force=True)
        assert parts is not None
        self._finish(parts)

    def _finish(self, parts: Parts) -> None:
        self._unpark()
        assert self._later is not None
        self._later.answer(parts)

    def _unpark(self) -> None:
        for partition in self._watched:
            partition.waiters.discard(self)
        self._watched.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _find(self, key: str | UUID | None, index: int) -> Partition | None:
        topic = self._node.topics.get(key) if isinstance(key, str) else self._node.topics.by_id(key)
        return None if topic is None else topic.partition(index)

    def _attempt(self, *, force: bool) -> Parts | None:
        """The response, or None while there is too little to send and no error to report."""
        room = self._max_bytes
        total = 0
        failed = False
        topics = []
        for key, partitions in self._topics:
            fetched = []
            for item in partitions:
                result = self._read(key, item, room, first=total == 0)
                size = sum(part.length for part in result.slices)
                total += size
                room -= size
                failed = failed or result.error != 0
                fetched.append(result)
            topics.append((key, fetched))
        if not (force or failed or total >= self._min_bytes or not topics):
            return None
        return fetch_response(self._version, self._correlation_id, topics)

    def _read(self, key: str | UUID | None, item: Any, room: int, *, first: bool) -> FetchedPartition:
        if key in self._forbidden:
            return FetchedPartition(item.partition, ErrorCode.TOPIC_AUTHORIZATION_FAILED)
        partition = self._find(key, item.partition)
        if partition is None:
            by_id = not isinstance(key, str) and self._node.topics.by_id(key) is None
            code = ErrorCode.UNKNOWN_TOPIC_ID if by_id else ErrorCode.UNKNOWN_TOPIC_OR_PARTITION
            return FetchedPartition(item.partition, code)
        code = leader_epoch_error(getattr(item, "current_leader_epoch", -1))
        if code is not ErrorCode.NONE:
            return FetchedPartition(item.partition, code)
        source = partition.log
        upper = source.last_stable_offset if self._committed_only else source.high_watermark
        slices: tuple[Slice, ...] = ()
        aborted: list[tuple[int, int]] | None = [] if self._committed_only else None
        try:
            if room > 0 or first:
                limit = min(item.partition_max_bytes, max(room, 0))
                slices = tuple(source.read(item.fetch_offset, limit, upper, min_one=first))
                if slices and self._committed_only:
                    # Those of the batches that are sent, not of all that could be: a slow reader would get each one
                    # with every answer.
                    end = source.end_of(item.fetch_offset, slices)
                    aborted = source.aborted_transactions(item.fetch_offset, end)
            elif not source.log_start_offset <= item.fetch_offset <= source.log_end_offset:
                return FetchedPartition(item.partition, ErrorCode.OFFSET_OUT_OF_RANGE)
        except LogError as error:
            return FetchedPartition(item.partition, error.code)
        return FetchedPartition(
            item.partition,
            ErrorCode.NONE,
            source.high_watermark,
            source.last_stable_offset,
            source.log_start_offset,
            aborted,
            slices,
        )


def fetch(node: Node, request: Request) -> Answer | Later:
    """Fetch.

    Behaviour: there are no fetch sessions: the session id is always 0, and an incremental request is answered 70.
    Waits up to MaxWaitMs for MinBytes; an error answers at once. The first partition with data gives at least one
    batch, whatever the limits. read_committed ends at the last stable offset and lists aborted transactions sorted by
    first offset; read_uncommitted has null in their place.
    Version notes: v9 CurrentLeaderEpoch; v12 flexible; v13 topics by id (unknown: 100 instead of 3).
    """
    body = request.body
    if getattr(body, "session_id", 0) != 0 and body.session_epoch > 0:
        # A session of another broker, or of an earlier life of this one: the client starts over with a full request.
        return fetch_response(
            request.version, request.header.correlation_id, [], error=ErrorCode.FETCH_SESSION_ID_NOT_FOUND
        )
    return _Fetch(node, request).start(request)


APIS = (Api(1, 4, 18, fetch),)

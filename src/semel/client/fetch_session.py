"""Fetch sessions (KIP-227), the client's half [sans-IO]: a broker is told what changed since the last request.

One session for each broker. Its first request, epoch 0, names everything; the ones after it name what is new, what
moved, and what is to be forgotten, and the answers name what has something to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple
from uuid import UUID

from semel.types import TopicPartition

__all__ = ["Asked", "FetchSession"]

_LAST_EPOCH = (1 << 31) - 1
_NO_SESSION = 0


class Asked(NamedTuple):
    """What a broker is asked for in one partition. `version` changes whenever the position is set from outside."""

    version: int
    offset: int
    leader_epoch: int
    topic_id: UUID | None


class FetchSession:
    """One broker's session. `with_ids`: topics are named by their ids (Fetch v13 and above)."""

    def __init__(self, with_ids: bool) -> None:
        self.with_ids = with_ids
        self._id = _NO_SESSION
        self._epoch = 0
        self._known: dict[TopicPartition, Asked] = {}
        self._names: dict[UUID | None, str] = {}

    def __repr__(self) -> str:
        return f"<FetchSession {self._id} epoch {self._epoch}, {len(self._known)} partitions>"

    def ask(self, wanted: Mapping[TopicPartition, Asked], partition_max_bytes: int) -> dict[str, Any]:
        """The fields of the next request, which asks for exactly `wanted`.

        A partition whose position was set from outside begins the session anew: a broker is silent about a partition
        in which nothing moved, but whoever set the position wants to hear where its end is.
        """
        if any(known.version != wanted[at].version for at, known in self._known.items() if at in wanted):
            self._epoch = 0
        if self._epoch == 0:
            self._known = {}
        changed = {at: asked for at, asked in wanted.items() if self._known.get(at) != asked}
        forgotten = {at: asked for at, asked in self._known.items() if at not in wanted}
        self._known = dict(wanted)
        self._names |= {asked.topic_id: at.topic for at, asked in changed.items()}
        return {
            "session_id": self._id,
            "session_epoch": self._epoch,
            "topics": [
                self._head(topic, items[0][1])
                | {
                    "partitions": [
                        {
                            "partition": at.partition,
                            "current_leader_epoch": asked.leader_epoch,
                            "fetch_offset": asked.offset,
                            "partition_max_bytes": partition_max_bytes,
                        }
                        for at, asked in items
                    ]
                }
                for topic, items in _by_topic(changed).items()
            ],
            "forgotten_topics_data": [
                self._head(topic, items[0][1]) | {"partitions": [at.partition for at, _ in items]}
                for topic, items in _by_topic(forgotten).items()
            ],
        }

    def answered(self, session_id: int) -> None:
        """The request was answered without an error for the whole session; 0: the broker keeps none for us."""
        if session_id == _NO_SESSION:
            self.reset()
            return
        self._id = session_id
        self._epoch = 1 if self._epoch == _LAST_EPOCH else self._epoch + 1

    def reset(self) -> None:
        """Begin anew: the broker forgot the session, or what happened to a request is not known."""
        self._id, self._epoch = _NO_SESSION, 0
        self._known = {}

    def name_of(self, topic: Any) -> str | None:
        """The name of a topic in an answer; None when nobody asked for it."""
        return self._names.get(topic.topic_id) if self.with_ids else topic.topic

    def _head(self, topic: str, asked: Asked) -> dict[str, Any]:
        return {"topic_id": asked.topic_id} if self.with_ids else {"topic": topic}


def _by_topic(
    partitions: Mapping[TopicPartition, Asked],
) -> dict[str, list[tuple[TopicPartition, Asked]]]:
    found: dict[str, list[tuple[TopicPartition, Asked]]] = {}
    for at, asked in partitions.items():  # A broker fills its answer in this order.
        found.setdefault(at.topic, []).append((at, asked))
    return found

"""The search sink: documents with their versions in bulk, then the position by compare-and-set.

There is no transaction over several documents, so a batch is not one step. What makes repeating it harmless is the
version of each document: whatever comes late or twice is not newer, and changes nothing. So a crash between documents
and position, a former owner that wakes up, a request that arrives when nobody waits for it any more leave every
document at its newest version. The position alone decides what is done, and one owner at a time can move it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from semel.databases.spec import SearchSpec
from semel.env import Env
from semel.errors import ConfigurationError
from semel.failpoints import failpoint
from semel.processing.parklog import Command, Outcome, ParkPolicy
from semel.sinks.contract import (
    Applied,
    Claim,
    PartitionsLost,
    PartitionsStopped,
    Slice,
    Stop,
    Unavailable,
)
from semel.sinks.noted.place import Change, ParkedRecord, Place
from semel.sinks.noted.sink import Doubt, Item, NotingSink, Owned
from semel.sinks.search import stops
from semel.sinks.search.effects import DocumentRefused, Note, SearchEffects, newest
from semel.sinks.search.indexes import prepare, uuids
from semel.sinks.search.store import CAS_TRIES, Held, Position, Refusal, SearchStore
from semel.sinks.spec import SinkSpec
from semel.sinks.sql.judgement import Poison
from semel.sinks.sql.parking import Parked
from semel.types import TopicPartition

__all__ = ["SearchSink"]

log = logging.getLogger("semel.sinks")

LOOK_SECONDS = 10.0
"""How often it is looked whether the indexes are still the ones that were written to: one that was deleted, and made
again by the next write, would lack what was in it, and nobody would know."""
_DATA = frozenset(
    {
        "mapper_parsing_exception",
        "strict_dynamic_mapping_exception",
        "document_parsing_exception",
        "parsing_exception",
        "x_content_parse_exception",
        "request_too_large",
    }
)
"""What OpenSearch says of a document that does not fit its index."""
_AWAY_400 = frozenset({"index_closed_exception", "invalid_index_name_exception"})


class SearchError(Exception):
    """An error of OpenSearch for one document that does not say whose fault it is."""


@dataclass(slots=True)
class _Owned(Owned):
    """A partition that is ours, with its position as it stands there."""

    held: Held | None = None
    grown: tuple[int, int] | None = None
    """How many partitions the topic had and has, where that is not the same."""

    @property
    def position(self) -> Position:
        assert self.held is not None
        return self.held.position


class SearchSink(NotingSink):
    """`semel.sinks.contract.Sink` for OpenSearch. `create_indexes` makes what is missing; else `open` says how to."""

    def __init__(
        self,
        spec: SinkSpec,
        identity: str,
        cluster_id: str,
        *,
        env: Env,
        create_indexes: bool,
        owner: str = "",
        policy: ParkPolicy | None = None,
    ) -> None:
        super().__init__(spec, identity, cluster_id, env=env, owner=owner, policy=policy)
        self._store = SearchStore(spec.database.url)
        assert isinstance(spec.database, SearchSpec)
        self._declared = spec.database.indexes
        self._create = create_indexes
        self._uuids: dict[str, str] = {}
        self._look_due = 0.0

    def __repr__(self) -> str:
        return f"<SearchSink {self._identity} {len(self._owned)} partitions, {self._store!r}>"

    def open(self) -> None:
        """Connect, and make or check the indexes."""
        self._check_history("OpenSearch")
        prepare(self._store, self._declared, create=self._create)
        self._uuids = uuids(self._store, self._declared)

    def close(self) -> None:
        """Close the connection."""
        self._store.close()

    # The indexes.

    def _look(self) -> None:
        """Which indexes the names stand for now. Raises `Unavailable` where one is gone, or none can be told."""
        try:
            found = uuids(self._store, self._declared)
            missing = sorted(self._declared.keys() - found.keys())
            if missing and self._create:
                prepare(self._store, self._declared, create=True)
                found, missing = uuids(self._store, self._declared), []
        except ConfigurationError as error:  # It was fit for use when we opened it, and may be so again.
            raise Unavailable(str(error)) from error
        if missing:
            raise Unavailable(
                f"{self._store.url} has no index {', '.join(self._store.prefix + name for name in missing)}. It was "
                "deleted, or an alias points elsewhere. Put it back, or make it anew (semel migrate APP): then it is "
                "built from the start of the log."
            )
        self._uuids = found
        self._look_due = self._env.monotonic() + LOOK_SECONDS

    def apply(self, slices: Sequence[Slice]) -> Applied:
        """As every sink; from time to time it is looked first whether the indexes are still the same.

        Without slices it is asked whether the server does its work.
        """
        if not slices or self._env.monotonic() >= self._look_due:
            self._look()
            changed = {
                at: f"{self._identity}: {at} was written to other indexes than those that are there now: "
                "it is taken over again."
                for at, owned in self._owned.items()
                if isinstance(owned, _Owned) and owned.position.indexes != self._uuids
            }
            if changed:
                self.release(changed)
                raise PartitionsLost(changed)
        if not slices:
            self._store.check_ready(self._declared)
        return super().apply(slices)

    # Taking over.

    def take_over(self, claims: Sequence[Claim]) -> dict[TopicPartition, int | Stop]:
        """Raise the epochs, a step for each partition."""
        self.release(claim.partition for claim in claims)
        self._look()
        return super().take_over(claims)

    def _take_over(self, claim: Claim) -> int | Stop:
        place = Place(self._identity, self._cluster_id, *claim.partition)
        for _ in range(CAS_TRIES):
            before = self._store.read(place)
            found = self._first(place, claim) if before is None else self._next(place, claim, before.position)
            if isinstance(found, Stop):
                return found
            failpoint("sink.before_fence_commit")
            held = self._store.create(place, found) if before is None else self._store.replace(place, before, found)
            if held is not None:
                self._known.add(place)
                owned = _Owned(place, found.next_offset, found.owner_epoch, _parked(found), held=held)
                owned.grown = self._grown(place, claim)
                self._owned[claim.partition] = owned
                return found.next_offset
        raise Unavailable(f"{CAS_TRIES} times in a row somebody else was in the way of taking over {claim.partition}.")

    def _first(self, place: Place, claim: Claim) -> Position | Stop:
        """A position where there is none."""
        start = claim.log_start_offset
        if place in self._known or (start and not self._store.is_start_accepted(self._identity)):
            return stops.data_gone(self._store, place, start, place in self._known)
        return Position(
            sink=place.sink, cluster_id=place.cluster_id, topic=place.topic, part=place.part,
            topic_id=str(claim.topic_id), next_offset=start, owner_epoch=1, owner=self._owner, indexes=self._uuids,
        )  # fmt: skip

    def _next(self, place: Place, claim: Claim, before: Position) -> Position | Stop:
        """The position of before, in our name; at the log's start where its documents are not there any more."""
        if before.topic_id != str(claim.topic_id):
            return stops.recreated(place, claim, before)
        mine = msgspec.structs.replace(
            before, owner_epoch=before.owner_epoch + 1, owner=self._owner, indexes=self._uuids
        )
        renewed = sorted(name for name, uuid in before.indexes.items() if self._uuids.get(name, uuid) != uuid)
        if not renewed:
            return mine
        start = claim.log_start_offset
        if start and not self._store.is_start_accepted(self._identity):
            return stops.index_gone(self._store, place, renewed, start, before)
        log.warning("%s: %s is not the index that was written to up to offset %d of %s: its documents are built anew "
                    "from offset %d on.", self._identity, ", ".join(renewed), before.next_offset, claim.partition,
                    start)  # fmt: skip
        # What is parked and still in the log comes again with it.
        waiting = {offset: key for offset, key in before.parked.items() if offset < start}
        return msgspec.structs.replace(mine, next_offset=start, parked=waiting)

    def _grown(self, place: Place, claim: Claim) -> tuple[int, int] | None:
        before = self._store.partitions(place, str(claim.topic_id), claim.partitions) if claim.partitions else 0
        return None if before == claim.partitions else (before, claim.partitions)

    # Applying.

    def _notes(self, items: Sequence[Item]) -> SearchEffects:
        return SearchEffects([item.view for item in items], self._declared)

    def _write(self, owned: Owned, partition: TopicPartition, change: Change, applied: Applied) -> None:
        """The documents, and when they are durable the position. Until its answer is here, nobody knows if it moved."""
        assert isinstance(owned, _Owned)
        assert owned.held is not None
        failpoint("sink.before_db_commit")
        # The effects of a parked record were written when it was found out whether they can be (`_try_effects`).
        effects = newest(change.effects) if change.command is None else []
        refused = self._send(owned, partition, effects)
        for refusal in refused.values():
            raise Poison(_error(refusal))
        self._send(owned, partition, self._store.beside(owned.place, change), is_ours=True)
        failpoint("sink.before_position")
        owned.doubt = Doubt(change.end, applied)
        held = self._store.advance(owned.place, owned.held, change)
        failpoint("sink.after_db_commit")
        owned.doubt = None
        if held is None:
            self._refused(owned, partition, *self._why(owned))
            return
        owned.held, owned.next_offset = held, change.end
        self._count(applied)
        if change.released:
            self._store.forget(owned.place, [offset for offset, _ in change.released])

    def _send(
        self, owned: _Owned, partition: TopicPartition, notes: Sequence[Note], *, is_ours: bool = False
    ) -> dict[int, Refusal]:
        """What the server refuses for the documents' own sake. Raises `Unavailable` for anything else."""
        if owned.grown and any(note.by_position for note in notes):
            raise PartitionsStopped({partition: stops.grown(partition, *owned.grown)})
        refused = self._store.bulk(notes) if notes else {}
        for refusal in refused.values():
            is_about_it = refusal.status == 413 or (refusal.status == 400 and refusal.type not in _AWAY_400)
            if is_ours or not (is_about_it or (refusal.status == 500 and refusal.type)):
                self._look_due = 0.0  # Whether an index is gone is looked at before anything else is done.
                raise Unavailable(f"{self._store.url} did not write a document: {refusal}")
        return refused

    def _one_by_one(self, owned: Owned, partition: TopicPartition, items: Sequence[Item], end: int) -> None:
        """The handler record by record, so that it is known whose each document is; then all of them together."""
        assert isinstance(owned, _Owned)
        tried: list[Item] = []
        notes: list[Note] = []
        whose: list[int] = []
        held_up = set(owned.parked.keys)
        stuck: tuple[Item, Exception] | None = None
        for number, item in enumerate(items, 1):
            key = item.record.key
            if item.error is None and (key is None or key not in held_up):
                try:
                    effects = self._handle([item])
                    notes += effects
                    whose += [len(tried)] * len(effects)
                    self._judgement.succeeded()
                except Poison as poison:
                    if not self._judgement.is_the_records(item.record, poison.error):
                        self._look_at_others(items[number:], item)
                        stuck = item, poison.error
                        break
                    item = self._at_fault(item, poison.error)
            if item.error is not None and key is not None:
                held_up.add(key)
            tried.append(item)
        failures = {whose[at]: _error(refusal) for at, refusal in self._send(owned, partition, notes).items()}
        for at, error in sorted(failures.items()):
            item = tried[at]
            if not self._judgement.is_the_records(item.record, error):
                # A document of it may be there all the same: it will be written again, with its version.
                tried, stuck = tried[:at], (item, error)
                break
            tried[at] = self._at_fault(item, error)
        if failures and len(failures) < len(set(whose)):
            self._judgement.succeeded()
        if tried or stuck is None:
            to = end if stuck is None else stuck[0].record.offset
            _, parking = self._sorted_out(owned, partition, tried)
            self._finish(owned, partition, tried, to, [], parking)
        if stuck is not None:
            raise self._undecided(*stuck) from stuck[1]

    def _why(self, owned: Owned) -> tuple[str, list[str]]:
        """Why our position could not be moved."""
        now = self._store.read(owned.place)
        if now is None:
            return "gone", []
        return "fenced", [str(now.position.next_offset), str(now.position.owner_epoch), now.position.owner]

    def _refused(self, owned: Owned, partition: TopicPartition, word: str, rest: Sequence[str]) -> None:
        if word == "gone":
            raise PartitionsStopped({partition: stops.data_gone(self._store, owned.place, 0, is_known=True)})
        raise self._fenced(owned, partition, "OpenSearch", rest)

    def _renew(self, owned: Owned) -> list[str]:
        assert isinstance(owned, _Owned)
        for _ in range(CAS_TRIES):
            now = self._store.read(owned.place)
            if now is None or now.position.owner != self._owner:
                word, rest = self._why(owned)
                return [word, *rest]
            mine = msgspec.structs.replace(now.position, owner_epoch=now.position.owner_epoch + 1)
            held = self._store.replace(owned.place, now, mine)
            if held is not None:
                owned.held = held
                return ["ok", str(mine.next_offset), str(mine.owner_epoch)]
        raise Unavailable(f"the position of {owned.place.name} changed {CAS_TRIES} times in a row.")

    # Parked records.

    def _load_parked(self, owned: Owned) -> Parked:
        assert isinstance(owned, _Owned)
        return _parked(owned.position)

    def _waiting(self, owned: Owned, partition: TopicPartition) -> tuple[list[Command], dict[int, ParkedRecord]]:
        assert isinstance(owned, _Owned)
        now = self._store.read(owned.place)
        if now is None or (now.position.owner_epoch, now.position.owner) != (owned.epoch, self._owner):
            self._refused(owned, partition, *self._why(owned))
            return [], {}
        owned.held = now
        if not now.position.commands and self._policy.retry != "build":
            return [], {}
        return list(now.position.commands), self._store.records(owned.place, sorted(now.position.parked))

    def _outcome(self, owned: Owned, command: str) -> Outcome | None:
        return self._store.outcome(owned.place, command)

    def _try_effects(self, owned: Owned, partition: TopicPartition, effects: Sequence[Any]) -> None:
        """OpenSearch cannot be asked without writing: they are written, and count when the position says so."""
        assert isinstance(owned, _Owned)
        for refusal in self._send(owned, partition, effects).values():
            raise Poison(_error(refusal))


def _parked(position: Position) -> Parked:
    return Parked({key for key in position.parked.values() if key is not None}, len(position.parked))


def _error(refusal: Refusal) -> Exception:
    if refusal.type in _DATA or refusal.status == 413:
        return DocumentRefused(str(refusal))
    return SearchError(str(refusal))

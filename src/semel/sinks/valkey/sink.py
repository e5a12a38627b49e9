"""The Valkey sink: the effects of a batch, its parked records and the position behind it in one Lua script.

A partition is one script, and partitions are independent of each other. A script without an answer is settled before
anything else: our epoch is raised, which fences a script that may still be on its way, and the position tells the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from semel.databases.valkey.effects import CacheEffects, EffectRefused
from semel.env import Env
from semel.failpoints import failpoint
from semel.processing.parklog import Command, Outcome, ParkPolicy
from semel.sinks.contract import Applied, Claim, PartitionsStopped, Stop, StopReason
from semel.sinks.noted.place import Change, ParkedRecord, Place
from semel.sinks.noted.sink import Doubt, Item, NotingSink, Owned
from semel.sinks.spec import SinkSpec
from semel.sinks.sql.judgement import Poison
from semel.sinks.sql.parking import Parked
from semel.sinks.valkey.store import ValkeyStore
from semel.types import TopicPartition

__all__ = ["ValkeySink"]

log = logging.getLogger("semel.sinks")


class ValkeySink(NotingSink):
    """`semel.sinks.contract.Sink` for Valkey and Redis."""

    def __init__(
        self,
        spec: SinkSpec,
        identity: str,
        cluster_id: str,
        *,
        env: Env,
        owner: str = "",
        store: ValkeyStore | None = None,
        policy: ParkPolicy | None = None,
    ) -> None:
        super().__init__(spec, identity, cluster_id, env=env, owner=owner, policy=policy)
        self._store = store or ValkeyStore(spec.database.url)

    def __repr__(self) -> str:
        return f"<ValkeySink {self._identity} {len(self._owned)} partitions, {self._store!r}>"

    def open(self) -> None:
        """Connect, and check that the server keeps what it is given."""
        self._check_history("Valkey")
        self._store.check()

    def close(self) -> None:
        """Close the connection."""
        self._store.close()

    def _take_over(self, claim: Claim) -> int | Stop:
        place = Place(self._identity, self._cluster_id, *claim.partition)
        start: int | None = claim.log_start_offset
        if place in self._known or (start and not self._store.is_start_accepted(self._identity)):
            start = None
        failpoint("sink.before_fence_commit")
        word, *rest = self._store.take_over(place, str(claim.topic_id), start, self._owner)
        if word == "gone":
            return _data_gone(place, claim.log_start_offset, place in self._known)
        if word == "torn":
            return _torn(place, rest[0])
        if word == "recreated":
            return _recreated(place, claim, *rest)
        self._known.add(place)
        owned = Owned(place, int(rest[0]), int(rest[1]), Parked())
        owned.parked = self._load_parked(owned)
        self._owned[claim.partition] = owned
        return owned.next_offset

    def _notes(self, items: Sequence[Item]) -> CacheEffects:  # noqa: ARG002 - a command needs no record
        return CacheEffects()

    def _write(self, owned: Owned, partition: TopicPartition, change: Change, applied: Applied) -> None:
        """Carry the script out. Until its answer is here, nobody knows what it did."""
        failpoint("sink.before_db_commit")
        owned.doubt = Doubt(change.end, applied)
        word, *rest = self._store.apply(owned.place, change)
        failpoint("sink.after_db_commit")
        owned.doubt = None
        if word == "ok":
            owned.next_offset = change.end
            self._count(applied)
        else:
            self._refused(owned, partition, word, rest)

    def _refused(self, owned: Owned, partition: TopicPartition, word: str, rest: Sequence[str]) -> None:
        if word == "bad":
            raise Poison(EffectRefused(f"command {rest[0]} of the effects: {rest[1]}"))
        if word == "gone":
            raise PartitionsStopped({partition: _data_gone(owned.place, 0, is_known=True)})
        if word == "torn":
            raise PartitionsStopped({partition: _torn(owned.place, rest[0])})
        raise self._fenced(owned, partition, "Valkey", rest)

    def _renew(self, owned: Owned) -> list[str]:
        return self._store.renew(owned.place, self._owner)

    # Parked records.

    def _load_parked(self, owned: Owned) -> Parked:
        return Parked(*self._store.parked_keys(owned.place))

    def _waiting(self, owned: Owned, partition: TopicPartition) -> tuple[list[Command], dict[int, ParkedRecord]]:  # noqa: ARG002
        commands = self._store.commands(owned.place)
        if not commands and self._policy.retry != "build":
            return [], {}
        return commands, self._store.parked(owned.place)

    def _outcome(self, owned: Owned, command: str) -> Outcome | None:
        return self._store.outcome(owned.place, command)

    def _try_effects(self, owned: Owned, partition: TopicPartition, effects: Sequence[Any]) -> None:
        """The script looks at them and writes nothing."""
        look = Change(owned.epoch, owned.next_offset, owned.next_offset, effects=effects)
        word, *rest = self._store.look(owned.place, look)
        if word != "ok":
            self._refused(owned, partition, word, rest)


def _data_gone(place: Place, log_start: int, is_known: bool) -> Stop:
    key = place.key("position").decode()
    if is_known:
        why = (
            f"the sink's position ({key}) is gone, so Valkey lost data (FLUSHALL, a fail-over to an empty replica, "
            "eviction) and nobody knows what else. To build everything anew: delete what is left of the sink's keys, "
            "and start the workers again; they read the topic from its beginning."
        )
    else:
        why = (
            f"there is no position ({key}), and the log begins at offset {log_start}. Either the sink is new, or "
            "Valkey lost its data, and then what was made of the records before cannot be made again."
        )
    if log_start or not is_known:
        why += f" To begin at the start of the log: valkey-cli SET semel:accept_start:{place.sink} yes EX 600"
    return Stop(StopReason.DATA_GAP, why)


def _torn(place: Place, text: str) -> Stop:
    return Stop(
        StopReason.EFFECTS_TORN,
        f"a command failed in the middle of a script, and Valkey undoes nothing: {text}. Mend the cause (a right that "
        "is missing, above all), put right by hand or build anew what those commands changed, and then: "
        f"valkey-cli HDEL {place.key('position').decode()} torn",
    )


def _recreated(place: Place, claim: Claim, old_id: str, next_offset: str) -> Stop:
    return Stop(
        StopReason.TOPIC_RECREATED,
        f"the sink was at offset {next_offset} of topic id {old_id}, but topic {place.topic} now has id "
        f"{claim.topic_id}: it was deleted and made again. If the new topic is to be read from its start, delete "
        f"{place.key('position').decode()}; if the old records are in it once more, they would be applied twice.",
    )

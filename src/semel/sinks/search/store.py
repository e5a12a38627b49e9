"""OpenSearch as a sink sees it: documents in bulk, and what is kept of each partition in documents of its own.

A position is one document with everything that decides: next offset, owner epoch, which records are parked, what is
asked for about them. It changes by compare-and-set on its sequence number (if_seq_no, if_primary_term), never
otherwise. The bytes of parked records, and outcomes, are documents beside it, whose version is the owner's epoch: a
former owner cannot write over them, and what the position does not name does not count.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple
from urllib.parse import quote

import msgspec

from semel.processing.parklog import Command, Outcome
from semel.sinks.contract import Unavailable
from semel.sinks.noted.place import Change, ParkedRecord, Place
from semel.sinks.search.effects import Note
from semel.sinks.search.http import SearchConnection
from semel.sinks.search.indexes import KEPT

__all__ = ["BULK_BYTES", "BULK_ITEMS", "Held", "Position", "Refusal", "SearchStore"]

log = logging.getLogger("semel.sinks")

BULK_ITEMS: Final = 1_000
"""Documents of one bulk request; halved while the server says that it has too much to do."""
BULK_BYTES: Final = 5 * 1024 * 1024
"""Bytes of one bulk request; a larger document goes alone."""
CAS_TRIES: Final = 10
"""A position that somebody else changes so often in a row, which only commands of operators do, is tried later."""
PLACES_MAX: Final = 10_000
"""Partitions of sinks in one listing, which is what OpenSearch returns at once."""
READ_AT_ONCE: Final = 500
"""Parked records that one request reads."""
_ITEM = "took,errors,items.*.status,items.*.error.type,items.*.error.reason,items.*.error.caused_by.reason"


class Position(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a partition of a sink."""

    kind: str = "position"
    sink: str
    cluster_id: str
    topic: str
    part: int
    topic_id: str
    next_offset: int
    owner_epoch: int
    owner: str
    indexes: dict[str, str]
    """By name, which index the documents were written to (its UUID)."""
    parked: dict[int, bytes | None] = {}
    """Offsets of parked records, and their keys, in order."""
    commands: list[Command] = []


class Held(NamedTuple):
    """A position as it was read or written, and what a compare-and-set compares."""

    position: Position
    seq_no: int
    primary_term: int


class Refusal(NamedTuple):
    """A document that was not written, and what the server says of it."""

    status: int
    type: str
    reason: str

    def __str__(self) -> str:
        return f"{self.status} {self.type}: {self.reason}"


class SearchStore(SearchConnection):
    """What a sink asks of an OpenSearch; used by one thread at a time. Every method may raise `Unavailable`."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._kept = quote(self.prefix + KEPT)
        self.bulk_items = BULK_ITEMS
        """How many documents go at once now."""

    def __repr__(self) -> str:
        return f"<SearchStore {self.url}>"

    def check_ready(self, names: Iterable[str]) -> None:
        """Raise `Unavailable` while a shard of these indexes, or of Semel's own, can be neither read nor written."""
        which = ",".join(quote(self.prefix + name) for name in (KEPT, *names))
        answer = self.call("GET", f"/_cluster/health/{which}?wait_for_status=yellow&timeout=1s")
        if answer.status != 200:
            raise Unavailable(f"{self.url}: not every shard of {which} is there yet ({answer.status}).")

    # Documents.

    def bulk(self, notes: Sequence[Note]) -> dict[int, Refusal]:
        """Write documents where their versions are not lower than what is there; by number those that were refused.

        A lower version (409) is no refusal: something newer is there, which is right. Raises `Unavailable` when some of
        them could not be written now; others of them may be.
        """
        refused: dict[int, Refusal] = {}
        at = 0
        while at < len(notes):
            lines, size, end = [], 0, at
            while end < len(notes) and end - at < self.bulk_items:
                head = _head(self.prefix, notes[end])
                size += len(head) + len(notes[end].body) + 2
                if size > BULK_BYTES and end > at:
                    break
                lines += [head, b"\n", notes[end].body, b"\n"]
                end += 1
            found = self._send_bulk(b"".join(lines), end - at)
            if found is None:
                continue  # Too large for the server: once more with fewer.
            refused |= {at + number: refusal for number, refusal in found.items()}
            at = end
        self.bulk_items = min(BULK_ITEMS, self.bulk_items * 2)
        return refused

    def _send_bulk(self, body: bytes, count: int) -> dict[int, Refusal] | None:
        """What was refused, by number; None for a request that has to be smaller."""
        answer = self.call("POST", f"/_bulk?timeout=10s&filter_path={_ITEM}", body, lines=True)
        if answer.status == 413:
            if count == 1:
                return {0: Refusal(413, "request_too_large", "the server takes no request of this size")}
            self.bulk_items = max(1, count // 2)
            return None
        if answer.status == 429:
            self.bulk_items = max(1, count // 2)
        if answer.status != 200:
            raise Unavailable(f"{self.url} took no bulk request: {answer.reason}")
        if not answer.body.get("errors"):
            return {}
        refused = {}
        for number, item in enumerate(answer.body["items"]):
            found = item["index"]
            if found["status"] < 300 or found["status"] == 409:
                continue
            error = found.get("error") or {}
            words = [error.get("reason"), (error.get("caused_by") or {}).get("reason")]
            refused[number] = Refusal(found["status"], error.get("type", ""), ": ".join(filter(None, words)))
        if any(refusal.status == 429 for refusal in refused.values()):
            self.bulk_items = max(1, count // 2)
        return refused

    # Positions.

    def read(self, place: Place) -> Held | None:
        """A position as it is now; None where there is none."""
        found = self._get(place.key("position"))
        if found is None:
            return None
        return Held(
            msgspec.convert(found["_source"], Position, str_keys=True), found["_seq_no"], found["_primary_term"]
        )

    def create(self, place: Place, position: Position) -> Held | None:
        """Make a position; None when somebody else did."""
        return self._put_position(place, position, "op_type=create")

    def replace(self, place: Place, held: Held, position: Position) -> Held | None:
        """Change a position; None when it is not what it was any more."""
        return self._put_position(place, position, f"if_seq_no={held.seq_no}&if_primary_term={held.primary_term}")

    def advance(self, place: Place, held: Held, change: Change) -> Held | None:
        """Move a position as a change says; None when it is somebody else's, or was set back, or is gone.

        A command that was left meanwhile is kept. An answer that is lost leaves it open what happened.
        """
        mine = held.position
        for _ in range(CAS_TRIES):
            moved = self.replace(place, held, _moved(held.position, change))
            if moved is not None:
                return moved
            now = self.read(place)
            if now is None or (now.position.owner_epoch, now.position.owner) != (mine.owner_epoch, mine.owner):
                return None
            if now.position.next_offset != change.start:
                # Our own request, sent a second time on a new connection, met the first one.
                return now if now.position.next_offset == change.end else None
            held = now
        raise Unavailable(f"{self.url}: the position of {place.name} changed {CAS_TRIES} times in a row.")

    def partitions(self, place: Place, topic_id: str, count: int) -> int:
        """How many partitions a topic had when the sink first met it; `count` where that is now."""
        document = {"kind": "topic", "partitions": count}
        key = place._replace(part=0).key(f"topic@{topic_id}")
        answer = self.call("PUT", f"/{self._kept}/_doc/{_quoted(key)}?op_type=create", msgspec.json.encode(document))
        if answer.status not in (200, 201, 409):
            raise self._cannot("write", key, answer.reason)
        found = self._get(key) if answer.status == 409 else None
        return count if found is None else int(found["_source"]["partitions"])

    def is_start_accepted(self, sink: str) -> bool:
        """Whether an operator said that a sink may begin where the log begins."""
        return self._get(f"semel:accept_start:{sink}".encode()) is not None

    # Parked records and what is asked for about them.

    def beside(self, place: Place, change: Change) -> list[Note]:
        """What is written beside a position before it moves: parked records, and what came of a command."""
        kept = [(f"parked@{offset}", msgspec.json.encode(item)) for offset, item in (*change.parked, *change.failed)]
        if change.command is not None:
            name, _, outcome = change.command
            kept.append((f"outcome@{name}", msgspec.json.encode(outcome)))
        return [Note(KEPT, place.key(what).decode(), change.epoch, body) for what, body in kept]

    def forget(self, place: Place, offsets: Iterable[int]) -> None:
        """Take the bytes of records away that wait no longer: nobody reads them any more."""
        for offset in offsets:
            self.call("DELETE", f"/{self._kept}/_doc/{_quoted(place.key(f'parked@{offset}'))}")

    def parked(self, place: Place) -> dict[int, ParkedRecord]:
        """Everything that is parked, in order."""
        held = self.read(place)
        return {} if held is None else self.records(place, sorted(held.position.parked))

    def records(self, place: Place, offsets: Sequence[int]) -> dict[int, ParkedRecord]:
        """Parked records by their offsets."""
        found: dict[int, ParkedRecord] = {}
        for at in range(0, len(offsets), READ_AT_ONCE):
            part = offsets[at : at + READ_AT_ONCE]
            ids = [place.key(f"parked@{offset}").decode() for offset in part]
            answer = self.call("POST", f"/{self._kept}/_mget", msgspec.json.encode({"ids": ids}))
            if answer.status != 200:
                raise self._cannot("read", place.key("parked@"), answer.reason)
            for offset, item in zip(part, answer.body["docs"], strict=True):
                if item.get("found"):
                    found[offset] = msgspec.convert(item["_source"], ParkedRecord)
                else:
                    log.error("%s: the bytes of the parked record %s@%d are gone.", self.url, place.name, offset)
        return found

    def ask(self, place: Place, command: Command) -> None:
        """Leave a command with the position."""
        for _ in range(CAS_TRIES):
            held = self.read(place)
            if held is None:
                return
            others = [item for item in held.position.commands if item.id != command.id]
            asked = msgspec.structs.replace(held.position, commands=[*others, command])
            if self.replace(place, held, asked) is not None:
                return
        raise Unavailable(f"{self.url}: the position of {place.name} changed {CAS_TRIES} times in a row. Try again.")

    def outcome(self, place: Place, command: str) -> Outcome | None:
        """What was done for a command so far; None for nothing."""
        found = self._get(place.key(f"outcome@{command}"))
        return None if found is None else msgspec.convert(found["_source"], Outcome)

    def places(self) -> list[Place]:
        """Every partition of every sink that was ever at work here."""
        self.call("POST", f"/{self._kept}/_refresh")
        query = {
            "size": PLACES_MAX,
            "query": {"term": {"kind": "position"}},
            "_source": ["sink", "cluster_id", "topic", "part"],
        }
        answer = self.call("POST", f"/{self._kept}/_search", msgspec.json.encode(query))
        if answer.status == 404:
            return []
        if answer.status != 200:
            raise self._cannot("read", b"positions", answer.reason)
        found = [hit["_source"] for hit in answer.body["hits"]["hits"]]
        return sorted(Place(item["sink"], item["cluster_id"], item["topic"], item["part"]) for item in found)

    # Requests.

    def _get(self, key: bytes) -> dict[str, Any] | None:
        answer = self.call("GET", f"/{self._kept}/_doc/{_quoted(key)}")
        if answer.status == 404 and not answer.type:
            return None
        if answer.status != 200:
            raise self._cannot("read", key, answer.reason)
        return dict(answer.body)

    def _put_position(self, place: Place, position: Position, condition: str) -> Held | None:
        key = place.key("position")
        path = f"/{self._kept}/_doc/{_quoted(key)}?timeout=10s&{condition}"
        answer = self.call("PUT", path, msgspec.json.encode(position))
        if answer.status == 409:
            return None
        if answer.status not in (200, 201):
            raise self._cannot("write", key, answer.reason)
        return Held(position, answer.body["_seq_no"], answer.body["_primary_term"])

    def _cannot(self, what: str, key: bytes, reason: str) -> Unavailable:
        return Unavailable(f"{self.url} does not {what} {key.decode()} in {self.prefix}{KEPT}: {reason}")


def _quoted(key: bytes) -> str:
    return quote(key, safe="")


def _head(prefix: str, note: Note) -> bytes:
    action = {
        "_index": prefix + note.into,
        "_id": note.id,
        "version": note.version,
        "version_type": "external_gte",
    }
    return msgspec.json.encode({"index": action})


def _moved(position: Position, change: Change) -> Position:
    """The position after a change. Doing it to a position that it was done to already gives the same."""
    parked = dict(position.parked)
    for offset, item in change.parked:
        parked[offset] = item.key
    for offset, _ in change.released:
        parked.pop(offset, None)
    commands = position.commands
    if change.command is not None:
        name, left, _ = change.command
        commands = [item for item in commands if item.id != name] + ([] if left is None else [left])
    return msgspec.structs.replace(position, next_offset=change.end, parked=parked, commands=commands)

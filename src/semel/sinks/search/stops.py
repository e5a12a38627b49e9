"""Why a search sink's partition stands still, with the numbers and what to do."""

from __future__ import annotations

from collections.abc import Sequence

from semel.sinks.contract import Claim, Stop, StopReason
from semel.sinks.noted.place import Place
from semel.sinks.search.indexes import KEPT
from semel.sinks.search.store import Position, SearchStore
from semel.types import TopicPartition

__all__ = ["data_gone", "grown", "index_gone", "recreated"]


def data_gone(store: SearchStore, place: Place, log_start: int, is_known: bool) -> Stop:
    """There is no position where one was, or where one has to be."""
    what = f"{place.key('position').decode()} in {store.prefix}{KEPT}"
    if is_known:
        why = (
            f"the sink's position ({what}) is gone, so OpenSearch lost data or somebody deleted it. To build "
            "everything anew: start the workers again; they read the topic from its beginning."
        )
    else:
        why = (
            f"there is no position ({what}), and the log begins at offset {log_start}. Either the sink is new, or "
            "OpenSearch lost its data, and then documents of records before are missing."
        )
    return Stop(StopReason.DATA_GAP, why + (_accept(store, place) if log_start or not is_known else ""))


def index_gone(store: SearchStore, place: Place, names: Sequence[str], start: int, before: Position) -> Stop:
    """An index is not the one that was written to, and the log does not begin at 0 any more."""
    return Stop(
        StopReason.DATA_GAP,
        f"the sink was at offset {before.next_offset}, but {', '.join(names)} is another index than the one that it "
        f"wrote to, and the log of {place.topic}-{place.part} begins at offset {start}: documents of records before "
        f"cannot be made again.{_accept(store, place)}",
    )


def recreated(place: Place, claim: Claim, before: Position) -> Stop:
    """The topic is another one than the position is about."""
    return Stop(
        StopReason.TOPIC_RECREATED,
        f"the sink was at offset {before.next_offset} of topic id {before.topic_id}, but topic {place.topic} now has "
        f"id {claim.topic_id}: it was deleted and made again. Its offsets begin at 0, and would count as old where "
        "they are versions. To read the new topic from its start: delete the index, and the document "
        f"{place.key('position').decode()}; or give the sink another name.",
    )


def grown(partition: TopicPartition, before: int, now: int) -> Stop:
    """Offsets are versions, and keys have moved to other partitions."""
    return Stop(
        StopReason.PARTITIONS_ADDED,
        f"topic {partition.topic} had {before} partitions when this sink began, and has {now} now. Keys moved to "
        "others, whose offsets start at 0 and would count as older than what is in the index. Give put and delete a "
        "version= that grows with every change, wherever its record stands.",
    )


def _accept(store: SearchStore, place: Place) -> str:
    path = f"/{store.prefix}{KEPT}/_doc/semel:accept_start:{place.sink}"
    return f" To begin at the start of the log: PUT {path} with {{}} as its body, and DELETE it afterwards."

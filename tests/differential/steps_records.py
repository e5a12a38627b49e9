"""Steps that write records and read them back."""

from __future__ import annotations

import time
from random import Random
from typing import Any

from semel.wire.records import BatchBuilder
from tests.differential.program import kind, often
from tests.differential.world import CLOSED, World

__all__: list[str] = []

OLD_MS = 1_700_000_000_000
TIMES = {"old": OLD_MS, "now": 0, "none": -1, "zero": 0, "future": 4_000_000_000_000}
PARTITIONS = (0, 0, 0, 1)
IDENTITY_VARIANTS = ("before", "next", "stale", "other", "unknown", "first", "far", "last")
DEFECTS = (
    "crc", "cut", "cut-header", "two", "trailing", "magic", "base-offset", "none-counted", "miscounted", "delta",
    "control", "codec", "no-sequence", "empty", "append-time", "large", "leader-epoch", "unfit-body",
)  # fmt: skip
"""No null among them: Apache Kafka gives a request with null records no answer at all, unless it is a plain one."""


def draw_topic_index(rng: Random) -> int:
    return int(often(rng, rng.choice((0, 0, 0, 1)), 2, 9, share=0.93))


def _draw_batch(rng: Random) -> dict[str, Any]:
    return {
        "count": often(rng, 1, 2, 3, share=0.6),
        "sequence": often(rng, "next", "again", "gap", "overlap", "zero", "old", "subset", "wrap", share=0.72),
        "codec": often(rng, 0, 1, 2, 3, 4, share=0.7),
        "time": often(rng, "old", "now", "none", "zero", "future", share=0.7),
        "keys": often(rng, "both", "none", "some", share=0.85),
        "defect": often(rng, "", *DEFECTS, share=0.9),
    }


def _draw_produce(rng: Random) -> dict[str, Any]:
    slot = rng.choice(("x0", "x0", "x0", "x1", "i0", "i0", ""))
    transactional = slot.startswith("x")
    parts = {(draw_topic_index(rng), rng.choice(PARTITIONS)) for _ in range(often(rng, 1, 2, share=0.85))}
    return {
        "version": often(rng, rng.randrange(3, 14), 9, 12),
        "slot": slot,
        "variant": often(rng, "now", *IDENTITY_VARIANTS, share=0.9),
        "transactional": often(rng, transactional, not transactional, share=0.95),
        "request_id": often(rng, slot if transactional else None, "x1", None, "x9", share=0.95),
        "acks": often(rng, -1, 1, 0, 2, share=0.9),
        "parts": [[topic, partition, _draw_batch(rng)] for topic, partition in sorted(parts)],
    }


def _patched(data: bytes, at: int, value: int, size: int) -> bytes:
    """The batch with a header field changed, and its checksum made right again."""
    from crc32c import crc32c

    changed = bytearray(data)
    changed[at : at + size] = value.to_bytes(size, "big", signed=True)
    changed[17:21] = crc32c(memoryview(changed)[21:]).to_bytes(4, "big")
    return bytes(changed)


def _spoil(data: bytes, defect: str, count: int) -> bytes:
    attributes = int.from_bytes(data[21:23], "big")
    match defect:
        case "crc":
            return data[:-1] + bytes([data[-1] ^ 1])
        case "cut":
            return data[:-1]
        case "cut-header":
            return data[:40]
        case "two":
            return data + data
        case "trailing":
            return data + b"\0\0\0"
        case "magic":
            return data[:16] + b"\x01" + data[17:]
        case "base-offset":
            return (3).to_bytes(8, "big") + data[8:]
        case "none-counted":
            return _patched(data, 57, 0, 4)
        case "miscounted":
            return _patched(data, 57, count + 1, 4)
        case "delta":
            return _patched(data, 23, count + 2, 4)
        case "control":
            return _patched(data, 21, attributes | 0x20, 2)
        case "codec":
            return _patched(data, 21, attributes & ~7 | 5, 2)
        case "no-sequence":
            return _patched(data, 53, -1, 4)
        case "append-time":
            return _patched(data, 21, attributes | 8, 2)
        case "leader-epoch":
            return data[:12] + (7).to_bytes(4, "big") + data[16:]
        case "unfit-body":
            return _patched(data, len(data) - 1, 0x2A, 1)
        case "empty":
            return b""
    return data


def _batch(world: World, where: tuple[str, int], identity: tuple[int, int], transactional: bool, spec: Any) -> Any:
    """The bytes, and the sequence and count that they carry."""
    sent = world.sequences.get((*identity, *where), [])
    end = sent[-1][0] + sent[-1][1] if sent else 0
    count, first = spec["count"], end
    match spec["sequence"]:
        case "again" if sent:
            first, count = sent[-1]
        case "old" if sent:
            first, count = sent[max(-6, -len(sent))]
        case "subset" if sent and sent[-1][1] > 1:
            first, count = sent[-1][0], 1
        case "gap":
            first = end + 3
        case "overlap":
            first = max(end - 1, 0)
        case "zero":
            first = 0
        case "wrap":
            first = 2**31 - 2
    first %= 2**31
    builder = BatchBuilder(spec["codec"])
    timestamp = int(time.time() * 1000) if spec["time"] == "now" else TIMES[spec["time"]]
    for index in range(count):
        keyless = spec["keys"] == "none" or (spec["keys"] == "some" and index == count - 1)
        value = b"x" * 3000 if spec["defect"] == "large" else b"value %d" % (first + index)
        headers = (("h", b"1"), ("n", None)) if index == 1 else ()
        builder.append(None if keyless else b"key", value, timestamp if timestamp < 0 else timestamp + index, headers)
    if identity == (-1, -1):
        first = -1
    data = builder.build(
        producer_id=identity[0], producer_epoch=identity[1], base_sequence=first, transactional=transactional
    )
    return _spoil(data, spec["defect"], count), first, count


@kind(_draw_produce, transactions=22, idempotence=40, batches=40, reading=14, offsets=6, mixed=2)
def produce(
    world: World,
    version: int,
    slot: str,
    variant: str,
    transactional: bool,
    request_id: str | None,
    acks: int,
    parts: list[Any],
) -> Any:
    identity = world.identity(slot, variant) if slot else (-1, -1)
    topics: dict[int, list[dict[str, Any]]] = {}
    sent = {}
    for topic, partition, spec in parts:
        data, first, count = _batch(world, (world.topic(topic), partition), identity, transactional, spec)
        topics.setdefault(topic, []).append({"index": partition, "records": data})
        sent[(topic, partition)] = first, count
    fields = {
        "transactional_id": world.transactional_id(request_id),
        "acks": acks,
        "timeout": 10_000,
        "topic_data": [
            world.topic_key(topic, version >= 13) | {"partition_data": items} for topic, items in topics.items()
        ],
    }
    if acks == 0:
        return world.tell(0, version, **fields)
    answer = world.ask(0, version, **fields)
    if answer != CLOSED:
        _learn(world, identity, sent, answer, version)
    return answer


def _learn(world: World, identity: tuple[int, int], sent: dict[Any, Any], answer: Any, version: int) -> None:
    """Remember what was accepted, for the sequences of what follows."""
    for response in answer["responses"]:
        for item in response["partition_responses"]:
            for (topic, partition), batch in sent.items():
                same = (
                    response["topic_id"] == world.topic_id(topic)
                    if version >= 13
                    else response["name"] == world.topic(topic)
                )
                if same and partition == item["index"] and not item["error_code"] and batch[0] >= 0:
                    known = world.sequences.setdefault((*identity, world.topic(topic), partition), [])
                    if batch not in known:
                        known.append(batch)


# --- Reading ---


def _draw_fetch(rng: Random) -> dict[str, Any]:
    return {
        "version": rng.randrange(4, 19),
        "committed": rng.random() < 0.6,
        "max_bytes": often(rng, 1 << 20, 1, 100, share=0.85),
        "session": often(rng, "", "new", "next", "wrong", "unknown", "close", share=0.6),
        "leader_epoch": often(rng, -1, 0, 1, share=0.9),
        "parts": [
            [draw_topic_index(rng), partition, rng.choice((0, 0, 0, 1, 2, 3, 5, 8, 100, -1)), rng.choice((1 << 20, 80))]
            for partition in rng.choice(((0,), (0,), (0, 1), (5,)))
        ],
        "forget": [[0, 0]] if rng.random() < 0.2 else [],
    }


@kind(_draw_fetch, transactions=8, idempotence=8, batches=15, reading=30, mixed=2)
def fetch(
    world: World,
    version: int,
    committed: bool,
    max_bytes: int,
    session: str,
    leader_epoch: int,
    parts: list[Any],
    forget: list[Any],
) -> Any:
    by_id = version >= 13
    topics: dict[int, list[dict[str, Any]]] = {}
    for topic, partition, offset, partition_max_bytes in parts:
        item = {
            "partition": partition,
            "current_leader_epoch": leader_epoch,
            "fetch_offset": offset,
            "partition_max_bytes": partition_max_bytes,
        }
        topics.setdefault(topic, []).append(item)
    session_id, session_epoch = {
        "": (0, -1),
        "new": (0, 0),
        "next": world.session,
        "wrong": (world.session[0], world.session[1] + 5),
        "unknown": (987_654_321, 1),
        "close": (world.session[0], -1),
    }[session]
    forgotten: dict[int, list[int]] = {}
    for topic, partition in forget if session == "next" else []:
        forgotten.setdefault(topic, []).append(partition)
    answer = world.ask(
        1,
        version,
        replica_id=-1,
        max_wait=0,
        min_bytes=0,
        max_bytes=max_bytes,
        isolation_level=int(committed),
        session_id=session_id,
        session_epoch=session_epoch,
        topics=[world.topic_key(topic, by_id, "topic") | {"partitions": items} for topic, items in topics.items()],
        forgotten_topics_data=[
            world.topic_key(topic, by_id, "topic") | {"partitions": items} for topic, items in forgotten.items()
        ],
    )
    if answer != CLOSED and version >= 7 and not answer["error_code"]:
        world.names.give("session", answer["session_id"], f"session {len(world.sessions)}")
        if answer["session_id"] and answer["session_id"] not in world.sessions:
            world.sessions.append(answer["session_id"])
        if session == "new":
            world.session = (answer["session_id"], 1 if answer["session_id"] else 0)
        elif session == "next" and world.session[0]:
            world.session = (world.session[0], world.session[1] + 1)
        elif session == "close":
            world.session = (0, 0)
    return answer


def _draw_list_offsets(rng: Random) -> dict[str, Any]:
    moments = (-1, -1, -2, -3, -4, -5, -6, -7, 0, OLD_MS, OLD_MS + 1, OLD_MS + 2, 1_750_000_000_000, 5_000_000_000_000)
    return {
        "version": rng.randrange(1, 12),
        "committed": rng.random() < 0.5,
        "leader_epoch": often(rng, -1, 0, 1, share=0.9),
        "parts": [[draw_topic_index(rng), rng.choice(PARTITIONS), rng.choice(moments)]],
    }


@kind(_draw_list_offsets, transactions=5, idempotence=3, batches=8, reading=18, mixed=2)
def list_offsets(world: World, version: int, committed: bool, leader_epoch: int, parts: list[Any]) -> Any:
    return world.ask(
        2,
        version,
        replica_id=-1,
        isolation_level=int(committed),
        timeout=10_000,
        topics=[
            {
                "name": world.topic(topic),
                "partitions": [
                    {"partition_index": partition, "current_leader_epoch": leader_epoch, "timestamp": timestamp}
                ],
            }
            for topic, partition, timestamp in parts
        ],
    )


@kind(
    lambda rng: {
        "version": rng.randrange(2, 5),
        "topic": draw_topic_index(rng),
        "current": often(rng, -1, 0, 3),
        "asked": rng.choice((0, 0, 1, 7, -1)),
    },
    reading=6,
    mixed=1,
)
def offset_for_leader_epoch(world: World, version: int, topic: int, current: int, asked: int) -> Any:
    item = {"partition": 0, "current_leader_epoch": current, "leader_epoch": asked}
    topics = [{"topic": world.topic(topic), "partitions": [item]}]
    return world.ask(23, version, replica_id=-1, topics=topics)


@kind(
    lambda rng: {
        "version": rng.randrange(0, 3),
        "topic": draw_topic_index(rng),
        "partition": rng.choice(PARTITIONS),
        "offset": rng.choice((-1, 0, 1, 2, 3, 5, 50, -2)),
    },
    reading=6,
    batches=3,
    transactions=2,
    mixed=1,
)
def delete_records(world: World, version: int, topic: int, partition: int, offset: int) -> Any:
    partitions = [{"partition_index": partition, "offset": offset}]
    topics = [{"name": world.topic(topic), "partitions": partitions}]
    return world.ask(21, version, topics=topics, timeout=10_000)


@kind(
    lambda rng: {"topic": draw_topic_index(rng), "partitions": rng.choice(([0], [0, 1], [5]))},
    transactions=6,
    idempotence=10,
    batches=3,
    mixed=1,
)
def describe_producers(world: World, topic: int, partitions: list[int]) -> Any:
    return world.ask(61, 0, topics=[{"name": world.topic(topic), "partition_indexes": partitions}])

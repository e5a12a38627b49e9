"""Reading logs as they are: every batch of every partition with its header, markers and aborted records included.

Over our own client's Fetch with read_uncommitted; the same on the embedded broker and on Apache Kafka. The batches go
to files as they came, so that a run can be checked again, and so that no log has to fit into memory.
"""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from semel.client.admin import Admin
from semel.client.cluster import KafkaClient
from semel.client.two_phase import NO_TIMEOUT_MS
from semel.errors import ErrorCode, OutcomeUnknown, Retriable, kafka_error
from semel.prove.check.evidence import InDoubt, Log, Position, file_chunks
from semel.settings import Settings
from semel.types import TopicPartition
from semel.wire.records import iter_batches

__all__ = ["Consumer", "open_scan", "read_in_doubt", "read_positions", "scan_logs", "settled_ends"]

FETCH, DESCRIBE_CONFIGS = 1, 32
_FETCH_VERSION = 12
"""The last version that names topics; 13 wants their ids and gives nothing more."""
FETCH_BYTES = 8 << 20
PARTITION_BYTES = 2 << 20
SETTLE_SECONDS = 60.0
"""A transaction's time-out (10 s), Apache Kafka's sweep for those that are over (10 s), and a busy machine."""
_TOPIC_RESOURCE = 2
_UNFINISHED = ("Ongoing", "PrepareCommit", "PrepareAbort")
_INDEX = "logs.json"
_READ_UNCOMMITTED = 0


class _Entry(NamedTuple):
    """One log in the scan's index."""

    topic: str
    partition: int
    start: int
    stable: int
    end: int
    is_compacted: bool
    begin: int


class Consumer(NamedTuple):
    """A component that reads topics as a group. `begin`: where it was before the run, if not at the logs' start."""

    component: str
    group: str
    topics: Sequence[str]
    begin: Mapping[TopicPartition, int] = {}


async def settled_ends(
    client: KafkaClient, partitions: Sequence[TopicPartition], *, timeout: float = SETTLE_SECONDS
) -> tuple[dict[TopicPartition, int], dict[TopicPartition, int]]:
    """Last stable offsets and ends, once the two are the same: Apache Kafka writes markers after it answered EndTxn.

    After `timeout` seconds as they are then: a transaction that nobody ends is a finding, not an error.
    """
    admin = Admin(client)
    deadline = client.env.monotonic() + timeout
    while True:
        stable = await admin.list_offsets(partitions, at="stable")
        ends = await admin.list_offsets(partitions, at="high_watermark")
        if stable == ends or client.env.monotonic() > deadline:
            return stable, ends
        await asyncio.sleep(0.05)


async def scan_logs(
    bootstrap: str,
    topics: Iterable[str],
    folder: Path,
    *,
    begin: Mapping[TopicPartition, int] | None = None,
    settle: float = SETTLE_SECONDS,
    settings: Mapping[str, object] | None = None,
) -> list[Log]:
    """Read these topics whole into files of `folder`; the logs to be checked.

    `begin` are offsets below which the run did not write. Raises `Retriable` when Kafka stays away, `Fatal` for a topic
    that does not exist, and what writing the files raises.
    """
    chosen = Settings.from_environment().kafka_client if settings is None else settings
    async with KafkaClient(bootstrap, client_id="semel-scan", settings=chosen) as client:
        admin = Admin(client)
        names = sorted(set(topics))
        partitions = [
            TopicPartition(name, number) for name in names for number in range((await client.topic(name)).partitions)
        ]
        stable, ends = await settled_ends(client, partitions, timeout=settle)
        starts = await admin.list_offsets(partitions, at="earliest")
        compacted = await _compacted(client, names)
        _prepare(folder, partitions)
        reached = await _fetch_all(client, starts, ends, folder)
    entries = [
        _Entry(*at, min(starts[at], ends[at]), stable[at], ends[at], at.topic in compacted, (begin or {}).get(at, 0))
        for at in partitions
    ]
    entries = [entry._replace(start=max(entry.start, reached[entry[:2]])) for entry in entries]
    (folder / _INDEX).write_bytes(msgspec.json.encode(entries))
    return open_scan(folder)


def open_scan(folder: Path) -> list[Log]:
    """The logs of an earlier scan, to be checked again. Raises `OSError` and `msgspec.DecodeError`."""
    entries = msgspec.json.decode((folder / _INDEX).read_bytes(), type=list[_Entry])
    return [
        Log(
            entry.topic,
            entry.partition,
            entry.start,
            entry.stable,
            entry.end,
            partial(file_chunks, _file(folder, entry[:2])),
            entry.is_compacted,
            entry.begin,
        )
        for entry in entries
    ]


# --- Fetch ---


async def _fetch_all(
    client: KafkaClient, starts: Mapping[TopicPartition, int], ends: Mapping[TopicPartition, int], folder: Path
) -> dict[tuple[str, int], int]:
    """Write every partition's batches; where each file begins (a log's start may move while it is read)."""
    reached: dict[tuple[str, int], int] = {tuple(at): start for at, start in starts.items()}  # type: ignore[misc]
    positions = {at: start for at, start in starts.items() if start < ends[at]}

    async def one_round() -> None:
        by_leader: dict[int, list[TopicPartition]] = defaultdict(list)
        for at in positions:
            by_leader[await client.leader(*at)].append(at)
        for node, partitions in by_leader.items():
            await _fetch(client, node, partitions, positions, ends, reached, folder)

    while positions:
        await client.retry(one_round, f"reading {len(positions)} partitions")
    return reached


async def _fetch(
    client: KafkaClient,
    node: int,
    partitions: list[TopicPartition],
    positions: dict[TopicPartition, int],
    ends: Mapping[TopicPartition, int],
    reached: dict[tuple[str, int], int],
    folder: Path,
) -> None:
    """One Fetch to one broker; moves the positions of what came, and drops partitions that are done."""
    topics: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for at in partitions:
        topics[at.topic].append(
            {
                "partition": at.partition,
                "current_leader_epoch": -1,
                "fetch_offset": positions[at],
                "last_fetched_epoch": -1,
                "log_start_offset": -1,
                "partition_max_bytes": PARTITION_BYTES,
            }
        )
    connection = await client.connection(node)
    version = connection.version_of(FETCH, _FETCH_VERSION)
    try:
        answer = await connection.send(
            FETCH,
            version,
            replica_id=-1,
            max_wait=100,
            min_bytes=1,
            max_bytes=FETCH_BYTES,
            isolation_level=_READ_UNCOMMITTED,
            session_id=0,
            session_epoch=-1,
            topics=[{"topic": name, "partitions": items} for name, items in topics.items()],
            forgotten_topics_data=[],
            rack_id="",
        )
    except (Retriable, OutcomeUnknown):
        for name in topics:
            client.invalidate(topic=name)
        raise
    for topic in answer.responses:
        for item in topic.partitions:
            at = TopicPartition(topic.topic, item.partition_index)
            if item.error_code == ErrorCode.OFFSET_OUT_OF_RANGE and item.log_start_offset > positions[at]:
                if positions[at] == reached[at]:
                    reached[at] = item.log_start_offset
                positions[at] = item.log_start_offset  # Retention went on while we read: a hole that the checker sees.
            elif item.error_code != ErrorCode.NONE:
                client.invalidate(topic=at.topic)
                raise kafka_error(item.error_code, f"reading {at} at offset {positions[at]}")
            else:
                _keep(at, item.records or b"", positions, folder)
            if positions[at] >= ends[at]:
                del positions[at]


def _prepare(folder: Path, partitions: Iterable[TopicPartition]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for at in partitions:
        _file(folder, at).write_bytes(b"")


def _file(folder: Path, at: tuple[str, int]) -> Path:
    return folder / f"{at[0]}-{at[1]}.batches"


def _keep(at: TopicPartition, records: bytes, positions: dict[TopicPartition, int], folder: Path) -> None:
    """Append whole batches from the position on; a fetch begins with the batch that holds it and may end inside one."""
    data = bytes(records)
    begin, end, following = None, 0, positions[at]
    for place, header in iter_batches(data):
        if header.next_offset <= positions[at]:
            continue
        begin = place if begin is None else begin
        end, following = place + header.size, header.next_offset
    if begin is not None:
        with _file(folder, at).open("ab") as file:
            file.write(data[begin:end])
    positions[at] = following


# --- Settings, positions, transactions ---


async def _compacted(client: KafkaClient, topics: Sequence[str]) -> set[str]:
    """Which topics are compacted, so that offsets may be missing there."""

    async def once() -> set[str]:
        answer = await client.call(
            DESCRIBE_CONFIGS,
            None,
            resources=[
                {"resource_type": _TOPIC_RESOURCE, "resource_name": name, "configuration_keys": ("cleanup.policy",)}
                for name in topics
            ],
            include_synonyms=False,
            include_documentation=False,
        )
        found = set()
        for item in answer.results:
            if item.error_code != ErrorCode.NONE:
                raise kafka_error(item.error_code, f"the settings of topic {item.resource_name!r}")
            if any("compact" in (config.value or "") for config in item.configs):
                found.add(item.resource_name)
        return found

    return await client.retry(once, f"asking for the settings of {len(topics)} topics") if topics else set()


async def read_positions(
    bootstrap: str, consumers: Iterable[Consumer], *, settings: Mapping[str, object] | None = None
) -> list[Position]:
    """The committed offset of every partition of every consumer's inputs, once no transaction holds it."""
    chosen = Settings.from_environment().kafka_client if settings is None else settings
    found = []
    async with KafkaClient(bootstrap, client_id="semel-scan", settings=chosen) as client:
        admin = Admin(client)
        for component, group, topics, begin in consumers:
            partitions = [
                TopicPartition(name, number)
                for name in topics
                for number in range((await client.topic(name)).partitions)
            ]
            offsets = await admin.committed_offsets(group, partitions)
            starts = await admin.list_offsets([at for at in partitions if at not in offsets], at="earliest")
            found += [
                Position(component, *at, offsets.get(at, max(starts.get(at, 0), begin.get(at, 0))), begin.get(at, 0))
                for at in partitions
            ]
    return found


async def read_in_doubt(
    bootstrap: str, pattern: str = "", *, settings: Mapping[str, object] | None = None
) -> list[InDoubt]:
    """Transactions that are not over, of transactional ids that match the pattern at their start."""
    chosen = Settings.from_environment().kafka_client if settings is None else settings
    async with KafkaClient(bootstrap, client_id="semel-scan", settings=chosen) as client:
        admin = Admin(client)
        listed = await admin.list_transactions(states=list(_UNFINISHED))
        is_ours: Callable[[str], Any] = re.compile(pattern).match
        names = [item.transactional_id for item in listed if is_ours(item.transactional_id)]
        described = await admin.describe_transactions(names)
    return [
        InDoubt("Kafka", item.transactional_id, item.state, item.timeout_ms == NO_TIMEOUT_MS)
        for item in described
        if item.state in _UNFINISHED
    ]

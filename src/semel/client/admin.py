"""Questions to the cluster and changes of topics: each call is repeated until it is answered or the time is over."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from semel.client.cluster import GROUP, TRANSACTION, KafkaClient, TopicInfo
from semel.client.describe import DescribedTransaction, decode_described
from semel.client.two_phase import PROBE, TwoPhaseMode, mode_of
from semel.errors import ConfigurationError, ErrorCode, OutcomeUnknown, Retriable, kafka_error
from semel.types import GroupMetadata, TopicPartition

__all__ = ["Admin", "DescribedTransaction", "GroupListing", "TopicSpec", "TransactionListing"]

LIST_OFFSETS, METADATA, OFFSET_COMMIT, OFFSET_FETCH, LIST_GROUPS = 2, 3, 8, 9, 16
CREATE_TOPICS, DELETE_TOPICS, DELETE_RECORDS, DESCRIBE_TRANSACTIONS, LIST_TRANSACTIONS = 19, 20, 21, 65, 66
INIT_PRODUCER_ID, TWO_PHASE_VERSION, DESCRIBE_CONFIGS = 22, 6, 32
_TOPIC_RESOURCE = 2
TWO_PHASE_PROBE_ID = "semel.two-phase-probe"
"""The transactional id under which an operator asks; nothing is ever written under it."""
_OFFSET_FETCH_STABLE = 7
_LATEST, _EARLIEST = -1, -2
_READ_UNCOMMITTED, _READ_COMMITTED = 0, 1
Position = Literal["earliest", "latest", "stable", "high_watermark"]


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """What a topic must look like; `configs` are Kafka's topic settings."""

    partitions: int
    configs: Mapping[str, str] = field(default_factory=dict)
    replication_factor: int = -1
    """-1 takes the cluster's default."""


class TransactionListing(NamedTuple):
    """One row of ListTransactions."""

    transactional_id: str
    producer_id: int
    state: str


class GroupListing(NamedTuple):
    """One consumer group; `state` is empty where the broker does not tell."""

    group_id: str
    protocol_type: str
    state: str


class Admin:
    """Administrative calls over one client."""

    def __init__(self, client: KafkaClient) -> None:
        self._client = client

    def __repr__(self) -> str:
        return f"<Admin {self._client!r}>"

    # --- Topics ---

    async def create_topics(self, topics: Mapping[str, TopicSpec], *, timeout: float | None = None) -> None:
        """Make sure that these topics exist as described; returns when every partition has a leader.

        Raises `ConfigurationError` when one exists with another number of partitions.
        """
        if not topics:
            return

        async def once() -> None:
            missing = await self._missing(topics)
            if missing:
                await self._create(missing)
                raise Retriable("the new topics are not in the metadata yet")
            for name, spec in topics.items():
                for partition in range(spec.partitions):
                    await self._client.leader(name, partition)

        await self._client.retry(once, f"creating topics {', '.join(sorted(topics))}", timeout)

    async def _missing(self, topics: Mapping[str, TopicSpec]) -> dict[str, TopicSpec]:
        for name in topics:
            self._client.invalidate(topic=name)
        await self._client.refresh_metadata(*topics)
        missing = {}
        for name, spec in topics.items():
            known = self._client.known_topic(name)
            if known is None:
                missing[name] = spec
            elif known.partitions != spec.partitions:
                raise ConfigurationError(
                    f"topic {name!r} exists with {known.partitions} partitions and the app declares {spec.partitions}. "
                    "Records of a key would move to another partition: declare the number that is there, or use "
                    "another topic."
                )
        return missing

    async def _create(self, topics: Mapping[str, TopicSpec]) -> None:
        answer = await self._client.call(
            CREATE_TOPICS,
            None,
            topics=[
                {
                    "name": name,
                    "num_partitions": spec.partitions,
                    "replication_factor": spec.replication_factor,
                    "assignments": (),
                    "configs": [{"name": key, "value": value} for key, value in spec.configs.items()],
                }
                for name, spec in topics.items()
            ],
            timeout=self._client.settings.request_timeout_ms,
            validate_only=False,
        )
        for item in answer.topics:
            if item.error_code not in (ErrorCode.NONE, ErrorCode.TOPIC_ALREADY_EXISTS):
                raise kafka_error(item.error_code, f"creating topic {item.name!r}", item.error_message or "")

    async def delete_topics(self, names: Iterable[str]) -> None:
        """Delete topics and return once the cluster no longer lists them; one that does not exist is no error."""
        wanted = list(names)

        async def once() -> None:
            answer = await self._client.call(
                DELETE_TOPICS,
                None,
                topics=[{"name": name, "topic_id": None} for name in wanted],
                topic_names=wanted,
                timeout=self._client.settings.request_timeout_ms,
            )
            for item in answer.responses:
                if item.error_code not in (ErrorCode.NONE, ErrorCode.UNKNOWN_TOPIC_OR_PARTITION):
                    raise kafka_error(item.error_code, f"deleting topic {item.name!r}")
            for name in wanted:
                self._client.invalidate(topic=name)
            await self._client.refresh_metadata(*wanted)
            left = [name for name in wanted if self._client.known_topic(name) is not None]
            if left:
                raise Retriable(f"{', '.join(left)} are still listed")

        await self._client.retry(once, f"deleting topics {', '.join(wanted)}")

    async def list_topics(self, *, internal: bool = False) -> dict[str, TopicInfo]:
        """Every topic by name; Kafka's own (`__...`) only when asked for."""

        async def once() -> dict[str, TopicInfo]:
            answer = await self._client.call(
                METADATA,
                None,
                topics=None,
                allow_auto_topic_creation=False,
                include_topic_authorized_operations=False,
                include_cluster_authorized_operations=False,
            )
            return {
                topic.name: TopicInfo(topic.name, topic.topic_id, len(topic.partitions))
                for topic in answer.topics
                if topic.error_code == ErrorCode.NONE and (internal or not topic.is_internal)
            }

        return await self._client.retry(once, "listing topics")

    # --- Offsets ---

    async def committed_offsets(
        self,
        group: str,
        partitions: Sequence[TopicPartition],
        require_stable: bool = True,
        *,
        timeout: float | None = None,
    ) -> dict[TopicPartition, int]:
        """The group's committed offsets; partitions without one are left out.

        With `require_stable` it waits while an open transaction holds offsets of a partition (KIP-447), so that what
        it gives can change no more by a predecessor's hand. Raises `Retriable` when that takes too long.
        """
        if not partitions:
            return {}
        topics: dict[str, list[int]] = defaultdict(list)
        for partition in partitions:
            topics[partition.topic].append(partition.partition)
        wanted = [{"name": name, "partition_indexes": numbers} for name, numbers in topics.items()]

        async def ask(node_id: int) -> dict[TopicPartition, int]:
            connection = await self._client.connection(node_id)
            version = connection.version_of(OFFSET_FETCH)
            version = min(version, 8)  # v9 asks for a member, v10 for topic ids; neither says more about offsets.
            if require_stable and version < _OFFSET_FETCH_STABLE:
                raise ConfigurationError(
                    "this Kafka cannot say whether a committed offset is stable (OffsetFetch v7, Apache Kafka 2.5). "
                    "Exactly-once needs that."
                )
            fields: dict[str, Any] = (
                {"groups": [{"group_id": group, "topics": wanted}]}
                if version >= 8
                else {"group_id": group, "topics": wanted}
            )
            answer: Any = await connection.send(OFFSET_FETCH, version, require_stable=require_stable, **fields)
            found = answer.groups[0] if version >= 8 else answer
            if found.error_code != ErrorCode.NONE:
                raise kafka_error(found.error_code, f"committed offsets of group {group!r}")
            return _offsets(found, group)

        what = f"reading the {'stable ' if require_stable else ''}committed offsets of group {group!r}"
        return await self._client.on_coordinator(group, GROUP, ask, what, timeout)

    async def commit_offsets(self, group: GroupMetadata, offsets: Mapping[TopicPartition, int]) -> None:
        """Write the offsets to read next, as this member of the group, outside of any transaction.

        Raises `AbortTransaction` when it is no member (any more), which changed nothing, and `Retriable` when nobody
        answered in time, which says nothing about what happened.
        """
        topics: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for at, offset in offsets.items():
            topics[at.topic].append(
                {"partition_index": at.partition, "committed_offset": offset, "committed_metadata": ""}
            )
        name = group.group_id

        async def tell(node_id: int) -> None:
            connection = await self._client.connection(node_id)
            version = min(connection.version_of(OFFSET_COMMIT), 9)  # v10 names topics by id, and says nothing more.
            answer: Any = await connection.send(
                OFFSET_COMMIT,
                version,
                group_id=name,
                generation_id_or_member_epoch=group.generation_id,
                member_id=group.member_id,
                group_instance_id=group.group_instance_id,
                topics=[{"name": topic, "partitions": items} for topic, items in topics.items()],
            )
            for topic in answer.topics:
                for item in topic.partitions:
                    if item.error_code != ErrorCode.NONE:
                        what = f"committing the offset of {topic.name}-{item.partition_index} for group {name!r}"
                        raise kafka_error(item.error_code, what)

        await self._client.on_coordinator(name, GROUP, tell, f"committing offsets of group {name!r}")

    async def list_offsets(self, partitions: Iterable[TopicPartition], at: Position) -> dict[TopicPartition, int]:
        """A position in each partition's log.

        `earliest` is the log start, `high_watermark` (or `latest`) the end of what is durable, `stable` the last
        stable offset: below it no transaction is open.
        """
        timestamp = _EARLIEST if at == "earliest" else _LATEST
        wanted = {partition: {"timestamp": timestamp} for partition in partitions}
        return await self._ask_leaders(
            LIST_OFFSETS,
            wanted,
            "offset",
            f"asking for the {at} offsets of {len(wanted)} partitions",
            f"the {at} offset",
            replica_id=-1,
            isolation_level=_READ_COMMITTED if at == "stable" else _READ_UNCOMMITTED,
        )

    async def topic_config(self, topic: str, name: str) -> str | None:
        """One setting of a topic as it holds now; None when the topic is unknown or we may not see its settings."""

        async def once() -> str | None:
            wanted = [{"resource_type": _TOPIC_RESOURCE, "resource_name": topic, "configuration_keys": (name,)}]
            answer = await self._client.call(
                DESCRIBE_CONFIGS,
                None,
                resources=wanted,
                include_synonyms=False,
                include_documentation=False,
            )
            return next((item.value for result in answer.results for item in result.configs if item.name == name), None)

        return await self._client.retry(once, f"asking for {name} of topic {topic!r}")

    async def delete_records(self, offsets: Mapping[TopicPartition, int]) -> dict[TopicPartition, int]:
        """Delete the records below these offsets; where each partition's log begins now.

        Raises `Fatal` for an offset above the high watermark.
        """
        if not offsets:
            return {}
        return await self._ask_leaders(
            DELETE_RECORDS,
            {partition: {"offset": offset} for partition, offset in offsets.items()},
            "low_watermark",
            f"deleting old records of {len(offsets)} partitions",
            "deleting records",
        )

    async def _ask_leaders(
        self,
        api: int,
        wanted: Mapping[TopicPartition, Mapping[str, int]],
        answered: str,
        doing: str,
        what: str,
        **fields: Any,
    ) -> dict[TopicPartition, int]:
        """Ask the leader of each partition for what is `wanted` of it: the field `answered` of every answer.

        Messages say what we were `doing`, and `what` of a partition was refused.
        """

        async def ask(node_id: int, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
            topics: dict[str, list[dict[str, int]]] = defaultdict(list)
            for partition in partitions:
                topics[partition.topic].append({"partition_index": partition.partition, **wanted[partition]})
            try:
                answer = await self._client.call(
                    api,
                    node_id,
                    timeout=self._client.settings.request_timeout_ms,
                    topics=[{"name": name, "partitions": items} for name, items in topics.items()],
                    **fields,
                )
            except (Retriable, OutcomeUnknown):
                for name in topics:
                    self._client.invalidate(topic=name)
                raise
            found = {}
            for topic in answer.topics:
                for item in topic.partitions:
                    if item.error_code != ErrorCode.NONE:
                        self._client.invalidate(topic=topic.name)
                        raise kafka_error(item.error_code, f"{what} of {topic.name}-{item.partition_index}")
                    found[TopicPartition(topic.name, item.partition_index)] = getattr(item, answered)
            return found

        async def once() -> dict[TopicPartition, int]:
            by_leader: dict[int, list[TopicPartition]] = defaultdict(list)
            for partition in wanted:
                by_leader[await self._client.leader(*partition)].append(partition)
            answers = await asyncio.gather(*(ask(*item) for item in by_leader.items()))
            return {partition: found for answer in answers for partition, found in answer.items()}

        return await self._client.retry(once, doing)

    # --- Transactions ---

    async def list_transactions(
        self, states: Sequence[str] = (), *, longer_than_ms: int = -1, producer_ids: Collection[int] = ()
    ) -> list[TransactionListing]:
        """Every transactional id that the cluster's coordinators know, sorted; by state, age, producer where asked."""

        async def once() -> list[TransactionListing]:
            await self._client.refresh_metadata()
            found = []
            for node_id in self._client.brokers():
                answer = await self._client.call(
                    LIST_TRANSACTIONS,
                    node_id,
                    state_filters=states,
                    producer_id_filters=tuple(producer_ids),
                    duration_filter=longer_than_ms,
                )
                if answer.error_code != ErrorCode.NONE:
                    raise kafka_error(answer.error_code, "listing transactions")
                if answer.unknown_state_filters:
                    raise ConfigurationError(
                        f"no transaction can be {', '.join(answer.unknown_state_filters)}. States: Empty, Ongoing, "
                        "PrepareCommit, PrepareAbort, CompleteCommit, CompleteAbort."
                    )
                found += [
                    TransactionListing(item.transactional_id, item.producer_id, item.transaction_state)
                    for item in answer.transaction_states
                ]
            return sorted(found)

        return await self._client.retry(once, "listing transactions")

    async def two_phase_mode(self, transactional_id: str = TWO_PHASE_PROBE_ID) -> TwoPhaseMode:
        """What this Kafka offers of two-phase commit (KIP-939) under this id; asking changes nothing.

        Raises `Retriable` when no coordinator answers.
        """
        await self._client.refresh_metadata()
        if self._client.transaction_version < 2:
            return TwoPhaseMode.TRANSACTIONS_V1

        async def ask(node_id: int) -> TwoPhaseMode:
            connection = await self._client.connection(node_id)
            if not connection.offers(INIT_PRODUCER_ID, TWO_PHASE_VERSION):
                return TwoPhaseMode.UNSUPPORTED
            answer = await connection.send(
                INIT_PRODUCER_ID, TWO_PHASE_VERSION, transactional_id=transactional_id, **PROBE
            )
            mode = mode_of(answer.error_code)
            if mode is None:
                raise kafka_error(answer.error_code, f"asking about two-phase commit under id {transactional_id!r}")
            return mode

        what = f"asking about two-phase commit under id {transactional_id!r}"
        return await self._client.on_coordinator(transactional_id, TRANSACTION, ask, what)

    async def describe_transactions(self, transactional_ids: Iterable[str]) -> list[DescribedTransaction]:
        """What the coordinator knows of each id; one that it does not know is left out."""
        found = []
        for transactional_id in transactional_ids:

            async def ask(node_id: int, name: str = transactional_id) -> list[DescribedTransaction]:
                frame = await self._client.call(
                    DESCRIBE_TRANSACTIONS, node_id, 0, transactional_ids=(name,), decode=decode_described
                )
                described: list[DescribedTransaction] = frame
                for item in described:
                    if item.error not in (ErrorCode.NONE, ErrorCode.TRANSACTIONAL_ID_NOT_FOUND):
                        raise kafka_error(item.error, f"describing transactional id {name!r}")
                return [item for item in described if item.error is ErrorCode.NONE]

            what = f"describing transactional id {transactional_id!r}"
            found += await self._client.on_coordinator(transactional_id, TRANSACTION, ask, what)
        return found

    # --- Groups ---

    async def list_groups(self) -> list[GroupListing]:
        """Every consumer group, sorted."""

        async def once() -> list[GroupListing]:
            await self._client.refresh_metadata()
            found = []
            for node_id in self._client.brokers():
                answer = await self._client.call(LIST_GROUPS, node_id, states_filter=(), types_filter=())
                if answer.error_code != ErrorCode.NONE:
                    raise kafka_error(answer.error_code, "listing groups")
                found += [
                    GroupListing(item.group_id, item.protocol_type, getattr(item, "group_state", ""))
                    for item in answer.groups
                ]
            return sorted(found)

        return await self._client.retry(once, "listing groups")

    async def group_lag(self, group: str, topics: Collection[str]) -> dict[TopicPartition, int]:
        """Offsets between what the group committed and the last stable offset, markers included."""
        partitions = [
            TopicPartition(name, number)
            for name in topics
            for number in range((await self._client.topic(name)).partitions)
        ]
        committed = await self.committed_offsets(group, partitions, require_stable=False)
        starts = await self.list_offsets([item for item in partitions if item not in committed], at="earliest")
        ends = await self.list_offsets(partitions, at="stable")
        return {item: max(0, ends[item] - committed.get(item, starts.get(item, 0))) for item in partitions}


def _offsets(group: Any, name: str) -> dict[TopicPartition, int]:
    found = {}
    for topic in group.topics:
        for item in topic.partitions:
            if item.error_code != ErrorCode.NONE:
                raise kafka_error(
                    item.error_code,
                    f"committed offset of {topic.name}-{item.partition_index} for group {name!r}",
                    "An open transaction holds it; it ends by itself at its time-out at the latest, or hangs: "
                    "`semel doctor txn list` tells.",
                )
            if item.committed_offset >= 0:
                found[TopicPartition(topic.name, item.partition_index)] = item.committed_offset
    return found

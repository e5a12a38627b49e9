"""Writes the markers that a transaction coordinator gave up: of transactions that are decided, and still open in a log.

A coordinator answers EndTxn when the decision is durable, and writes the markers afterwards. Apache Kafka (as of 4.3.1)
gives up the markers of a partition that has no leader in that moment, and calls the transaction complete all the same
(KAFKA-20734). A broker that is killed and comes back does that to the partitions of which it has the only replica.
Readers of committed records then stand still there, and nothing ends it but the next transaction of the same producer:
if that one aborts, the records that were answered as committed are aborted with it.

Under transactions V2 an epoch belongs to one transaction, and ending it raises the epoch by one. So whoever finds
(producer, epoch) open in a log, and its coordinator at the epoch that follows and complete, knows how it was decided,
and may write the marker that is missing. After one more transaction, or an InitProducerId, nobody knows any more:
hence a producer looks before its first InitProducerId, and whenever it lost a connection since its last transaction.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

from semel.client.admin import DESCRIBE_TRANSACTIONS, Admin
from semel.client.cluster import KafkaClient
from semel.client.describe import DescribedTransaction
from semel.client.transaction_admin import DESCRIBE_PRODUCERS, OpenInLog, TransactionAdmin
from semel.client.two_phase import PreparedState
from semel.errors import ConfigurationError, ErrorCode, Retriable, SemelError
from semel.types import TopicPartition

__all__ = ["OFFSETS_TOPIC", "Unmarked", "behind", "finish", "finish_last", "unmarked"]

log = logging.getLogger("semel.client")

_COMPLETE = {"CompleteCommit": True, "CompleteAbort": False}
"""The coordinator's states behind which every marker should be written; whether it decided to commit."""
_DECIDED = ("PrepareCommit", "PrepareAbort")
OFFSETS_TOPIC = "__consumer_offsets"


class Unmarked(NamedTuple):
    """One partition of a transaction that is decided, in which its marker is missing."""

    at: OpenInLog
    transactional_id: str
    commit: bool


async def behind(admin: Admin, belongs: Callable[[str], bool] = lambda _: True) -> dict[TopicPartition, int]:
    """The partitions whose last stable offset is below the end, with that offset: something is open there."""
    topics = [item for name, item in (await admin.list_topics(internal=True)).items() if belongs(name)]
    partitions = [TopicPartition(item.name, number) for item in topics for number in range(item.partitions)]
    if not partitions:
        return {}
    stable = await admin.list_offsets(partitions, at="stable")
    end = await admin.list_offsets(partitions, at="high_watermark")
    return {at: stable[at] for at in partitions if stable[at] < end[at]}


async def unmarked(client: KafkaClient, in_logs: Collection[OpenInLog]) -> list[Unmarked]:
    """Those of these open transactions that their coordinator calls complete, and that are still open after that."""
    if not in_logs or client.transaction_version < 2:
        return []
    admin = Admin(client)
    listed = await admin.list_transactions(states=tuple(_COMPLETE), producer_ids={item.producer_id for item in in_logs})
    described = await admin.describe_transactions([item.transactional_id for item in listed])
    ended = {PreparedState(item.producer_id, item.producer_epoch - 1): item for item in described}
    suspects = {item for item in in_logs if item.name in ended and ended[item.name].state in _COMPLETE}
    again = await TransactionAdmin(client).open_in_logs({item.partition: None for item in suspects})
    still = {(item.partition, item.name) for item in again}
    return [
        Unmarked(item, ended[item.name].transactional_id, _COMPLETE[ended[item.name].state])
        for item in sorted(suspects)
        if (item.partition, item.name) in still
    ]


async def finish(
    client: KafkaClient, partitions: Iterable[TopicPartition], belongs: Callable[[str], bool]
) -> list[Unmarked]:
    """Write the markers that are missing in these partitions, for the transactional ids that belong to the caller.

    Raises `ConfigurationError` where that is not allowed: it needs ClusterAction or Alter on the cluster.
    """
    in_logs = await TransactionAdmin(client).open_in_logs(partitions)
    found = [item for item in await unmarked(client, in_logs) if belongs(item.transactional_id)]
    await _write_missing(client, found)
    return found


async def finish_last(
    client: KafkaClient, transactional_id: str, ended: tuple[PreparedState, bool] | None = None, *, timeout: float
) -> None:
    """Write what is missing of the last transaction of an id that the caller owns, or is about to take over.

    `ended` is its name and whether it is committed, where the caller knows; else the coordinator is asked. Where the
    markers are still being written, it waits for that, `timeout` seconds. Nothing is done on transactions V1, which do
    not tell, nor where the broker has no DescribeTransactions: that is not Apache Kafka. Raises `Retriable`, or as
    `finish` does.
    """
    if client.transaction_version < 2 or not await client.retry(lambda: _tells(client), "connecting to Kafka", timeout):
        return
    described = await client.retry(
        lambda: _settled(client, transactional_id),
        f"waiting for the markers of transactional id {transactional_id!r}",
        timeout,
    )
    if ended is None:
        if described is None or described.state not in _COMPLETE:
            return
        ended = (PreparedState(described.producer_id, described.producer_epoch - 1), _COMPLETE[described.state])
    name, commit = ended
    try:
        in_logs = await TransactionAdmin(client).open_in_logs(await behind(Admin(client)))
    except SemelError as error:
        if error.code != ErrorCode.TOPIC_AUTHORIZATION_FAILED:
            raise
        log.warning(
            "whether transaction %s of %s has all its markers is not known: %s. Looking needs the right to read.",
            name,
            transactional_id,
            error,
        )
        return
    await _write_missing(client, [Unmarked(item, transactional_id, commit) for item in in_logs if item.name == name])


async def _tells(client: KafkaClient) -> bool:
    connection = await client.connection(None)
    return connection.offers(DESCRIBE_TRANSACTIONS, 0) and connection.offers(DESCRIBE_PRODUCERS, 0)


async def _settled(client: KafkaClient, transactional_id: str) -> DescribedTransaction | None:
    for found in await Admin(client).describe_transactions([transactional_id]):
        if found.state in _DECIDED:
            raise Retriable(f"transaction {found.producer_id}:{found.producer_epoch} is in state {found.state}")
        return found
    return None


async def _write_missing(client: KafkaClient, found: Iterable[Unmarked]) -> None:
    """Write each marker as it was decided.

    Raises `ConfigurationError` where that is not allowed: it needs ClusterAction or Alter on the cluster.
    """
    for item in found:
        try:
            await TransactionAdmin(client).end_hanging(item.at, commit=item.commit)
        except SemelError as error:
            if error.code != ErrorCode.CLUSTER_AUTHORIZATION_FAILED:
                raise
            verb = "commit" if item.commit else "abort"
            raise ConfigurationError(
                f"transaction {item.at.name} of {item.transactional_id!r} is decided ({verb}), and Kafka never wrote "
                f"its marker into {item.at.partition} (KAFKA-20734). This client may not write it: let somebody who "
                f"may (ClusterAction or Alter on the cluster) run `semel doctor txn {verb} "
                f"{item.at.partition}@{item.at.name} --yes`. Nothing is written under this id before."
            ) from error
        log.warning(
            "transaction %s of %s was %s, and Kafka never wrote its marker into %s (KAFKA-20734): it is there now",
            item.at.name,
            item.transactional_id,
            "committed" if item.commit else "aborted",
            item.at.partition,
        )

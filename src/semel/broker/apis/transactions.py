"""APIs of transactional producers, and those that look at transactions (KIP-98, KIP-447, KIP-664, KIP-890)."""

from __future__ import annotations

import logging
import re
from datetime import UTC, datetime
from itertools import groupby
from typing import TYPE_CHECKING, Any

from semel.broker.exchange import Answer, Api, Fields, Request
from semel.broker.security.acls import Operation, Resource
from semel.coordinator.transaction import TransactionMetadata
from semel.errors import ErrorCode
from semel.log.log import LogError
from semel.types import TopicPartition
from semel.wire.messages import to_ms

if TYPE_CHECKING:
    from semel.broker.node import Node

__all__ = ["APIS"]

log = logging.getLogger("semel.broker")

_NEVER = datetime(1969, 12, 31, 23, 59, 59, 999_000, tzinfo=UTC)
"""-1 ms: kio writes no negative number where a time may not be null, but it writes this."""
_NOT_WRITTEN: Fields = {"error_code": ErrorCode.COORDINATOR_NOT_AVAILABLE, "producer_id": -1, "producer_epoch": -1}
"""The transaction log refused: nothing happened, and the client may try again."""
OFFSETS_PARTITION = TopicPartition("__consumer_offsets", 0)
"""Every group's offsets are in the only partition of this topic."""


def init_producer_id(node: Node, request: Request) -> Answer:
    """InitProducerId.

    Behaviour: without a transactional id a fresh producer id, epoch 0. With one, an open transaction is aborted and
    every earlier identity fenced within this call.
    Version notes: v3 an expected identity; v4 answers 90 where earlier ones answer 47; v6 (KIP-939, in 4.3.1 an
    unstable version) no time-out with Enable2Pc (53 where it is switched off), and KeepPreparedTxn, which leaves the
    open transaction open and names it in the answer.
    """
    body = request.body
    try:
        answer = node.transactions.init_producer_id(
            body.transactional_id,
            to_ms(body.transaction_timeout),
            getattr(body, "producer_id", -1),
            getattr(body, "producer_epoch", -1),
            request.now_ms,
            request.version,
            enable_two_phase=getattr(body, "enable2_pc", False),
            keep_prepared=getattr(body, "keep_prepared_txn", False),
        )
    except LogError as error:
        log.error("no identity for %s: %s", body.transactional_id, error)
        return _NOT_WRITTEN
    return {
        "error_code": answer.error,
        "producer_id": answer.producer_id,
        "producer_epoch": answer.producer_epoch,
        "ongoing_txn_producer_id": answer.ongoing[0],
        "ongoing_txn_producer_epoch": answer.ongoing[1],
    }


# --- AddPartitionsToTxn ---


def _addable(node: Node, request: Request, partitions: list[TopicPartition]) -> dict[TopicPartition, ErrorCode]:
    """The error of each partition if any cannot be added: then the others are not attempted. Empty when all can be."""
    refused = {}
    for item in partitions:
        partition = node.topics.partition(*item)
        if node.denies(request, Operation.WRITE, Resource.TOPIC, item.topic):
            refused[item] = ErrorCode.TOPIC_AUTHORIZATION_FAILED
        elif partition is None:
            refused[item] = ErrorCode.UNKNOWN_TOPIC_OR_PARTITION
        elif item.topic.startswith("__"):
            refused[item] = ErrorCode.TOPIC_AUTHORIZATION_FAILED
    if not refused:
        return {}
    return {item: refused.get(item, ErrorCode.OPERATION_NOT_ATTEMPTED) for item in partitions}


def _add(node: Node, request: Request, item: Any) -> dict[TopicPartition, ErrorCode]:
    partitions = [TopicPartition(topic.name, index) for topic in item.topics for index in topic.partitions]
    refused = _addable(node, request, partitions)
    if refused:
        return refused
    code = node.transactions.add_partitions(
        item.transactional_id,
        item.producer_id,
        item.producer_epoch,
        partitions,
        request.now_ms,
        api_version=request.version,
    )
    return dict.fromkeys(partitions, code)


def _verify(node: Node, request: Request, item: Any) -> dict[TopicPartition, ErrorCode]:
    """Is each partition in the open transaction? (KIP-890; the form that brokers use among themselves.)"""
    result = _addable(
        node, request, [TopicPartition(topic.name, index) for topic in item.topics for index in topic.partitions]
    )
    if result:
        return result
    for topic in item.topics:
        for index in topic.partitions:
            partition = TopicPartition(topic.name, index)
            code = node.transactions.coordinator.check_produce(
                item.transactional_id, item.producer_id, item.producer_epoch, partition, 11
            )
            fenced = code is ErrorCode.INVALID_PRODUCER_EPOCH  # The word for it on Produce alone.
            result[partition] = ErrorCode.PRODUCER_FENCED if fenced else code
    return result


def _topic_results(result: dict[TopicPartition, ErrorCode]) -> list[Fields]:
    return [
        {
            "name": name,
            "results_by_partition": [
                {"partition_index": item.partition, "partition_error_code": result[item]} for item in items
            ],
        }
        for name, items in groupby(result, key=lambda item: item.topic)
    ]


def add_partitions_to_txn(node: Node, request: Request) -> Answer:
    """AddPartitionsToTxn.

    Behaviour: an unknown or internal topic is refused by itself, and all others with 55; nothing is added then.
    Version notes: v0-1 47 instead of 90; v4+ several transactions and VerifyOnly (not in the transaction: 120).
    """
    body = request.body
    if request.version < 4:
        return {"results_by_topic_v3_and_below": _topic_results_v3(node, request)}
    results = [
        {
            "transactional_id": item.transactional_id,
            "topic_results": _topic_results(
                _verify(node, request, item) if item.verify_only else _add(node, request, item)
            ),
        }
        for item in body.transactions
    ]
    return {"error_code": ErrorCode.NONE, "results_by_transaction": results}


def _topic_results_v3(node: Node, request: Request) -> list[Fields]:
    return _topic_results(_add(node, request, _SingleTransaction(request.body)))


class _SingleTransaction:
    """A v0-3 request in the shape of one transaction of v4."""

    def __init__(self, body: Any) -> None:
        self.transactional_id = body.v3_and_below_transactional_id
        self.producer_id = body.v3_and_below_producer_id
        self.producer_epoch = body.v3_and_below_producer_epoch
        self.topics = body.v3_and_below_topics


def add_offsets_to_txn(node: Node, request: Request) -> Answer:
    """AddOffsetsToTxn.

    Behaviour: adds the offsets partition to the transaction; the group need not exist, and may have any name.
    Version notes: v0-1 47 instead of 90.
    """
    body = request.body
    code = node.transactions.add_partitions(
        body.transactional_id,
        body.producer_id,
        body.producer_epoch,
        [OFFSETS_PARTITION],
        request.now_ms,
        api_version=request.version,
    )
    return {"error_code": code}


def end_txn(node: Node, request: Request) -> Answer:
    """EndTxn.

    Behaviour: the decision is durable, its markers are written and its offsets applied before the answer.
    Version notes: v0-1 47 instead of 90; v5 ends with an epoch bump and answers the next transaction's identity.
    """
    body = request.body
    try:
        answer = node.transactions.end_transaction(
            body.transactional_id,
            body.producer_id,
            body.producer_epoch,
            body.committed,
            request.now_ms,
            request.version,
        )
    except LogError as error:
        log.error("the decision about the transaction of %s cannot be written: %s", body.transactional_id, error)
        return _NOT_WRITTEN
    return {"error_code": answer.error, "producer_id": answer.producer_id, "producer_epoch": answer.producer_epoch}


# --- Looking at transactions ---


def _described(transactional_id: str, code: ErrorCode, found: TransactionMetadata | None) -> Fields:
    if found is None:
        return {
            "error_code": code,
            "transactional_id": transactional_id,
            "transaction_state": "",
            "transaction_timeout": 0,
            "transaction_start_time": 0,
            "producer_id": 0,
            "producer_epoch": 0,
            "topics": [],
        }
    return {
        "error_code": code,
        "transactional_id": transactional_id,
        "transaction_state": str(found.state),
        "transaction_timeout": found.timeout_ms,
        "transaction_start_time": found.start_ms if found.start_ms >= 0 else _NEVER,
        "producer_id": found.producer_id,
        "producer_epoch": found.producer_epoch,
        "topics": [
            {"topic": topic, "partitions": [item.partition for item in items]}
            for topic, items in groupby(sorted(found.partitions), key=lambda item: item.topic)
        ],
    }


def describe_transactions(node: Node, request: Request) -> Answer:
    """DescribeTransactions (KIP-664).

    Behaviour: an unknown id is 105, an empty one 42.
    """
    return {
        "transaction_states": [
            _described(transactional_id, *node.transactions.coordinator.describe(transactional_id))
            for transactional_id in request.body.transactional_ids
        ]
    }


def list_transactions(node: Node, request: Request) -> Answer:
    """ListTransactions (KIP-664).

    Behaviour: filters are combined; unknown state names are given back.
    Version notes: v1 DurationFilter in ms; v2 a regular expression over the ids (unreadable: 117).
    """
    body = request.body
    pattern = getattr(body, "transactional_id_pattern", None)
    try:
        matches = re.compile(pattern) if pattern else None
    except re.error:
        return {"error_code": ErrorCode.INVALID_REGULAR_EXPRESSION, "transaction_states": []}
    found, unknown = node.transactions.coordinator.list_transactions(
        request.now_ms,
        states=body.state_filters,
        producer_ids=body.producer_id_filters,
        duration_ms=getattr(body, "duration_filter", -1),
    )
    return {
        "error_code": ErrorCode.NONE,
        "unknown_state_filters": unknown,
        "transaction_states": [
            {
                "transactional_id": item.transactional_id,
                "producer_id": item.producer_id,
                "transaction_state": str(item.state),
            }
            for item in found
            if matches is None or matches.fullmatch(item.transactional_id)
        ],
    }


APIS = (
    Api(22, 0, 6, init_producer_id),
    Api(24, 0, 5, add_partitions_to_txn),
    Api(25, 0, 4, add_offsets_to_txn),
    Api(26, 0, 5, end_txn),
    Api(65, 0, 0, describe_transactions),
    Api(66, 0, 2, list_transactions),
)

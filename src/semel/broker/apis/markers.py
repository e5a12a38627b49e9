"""WriteTxnMarkers: how an operator ends a hanging transaction, one that no coordinator will ever end (KIP-664)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from semel.broker.exchange import Answer, Api, Fields, Request
from semel.broker.security.acls import CLUSTER_NAME, Operation, Resource
from semel.broker.transactions import Marker
from semel.errors import ErrorCode

if TYPE_CHECKING:
    from semel.broker.node import Node

__all__ = ["APIS"]


def _may_write(node: Node, request: Request) -> bool:
    return any(
        not node.denies(request, operation, Resource.CLUSTER, CLUSTER_NAME)
        for operation in (Operation.CLUSTER_ACTION, Operation.ALTER)
    )


def _write(node: Node, request: Request, item: Any, name: str, index: int) -> Fields:
    code = ErrorCode.UNKNOWN_TOPIC_OR_PARTITION
    partition = node.topics.partition(name, index)
    if not _may_write(node, request):
        code = ErrorCode.CLUSTER_AUTHORIZATION_FAILED
    elif partition is not None:
        marker = Marker(
            item.producer_id,
            item.producer_epoch,
            item.transaction_result,
            item.coordinator_epoch,
            getattr(item, "transaction_version", 0),
        )
        code = node.transactions.write_marker(partition, marker, request.now_ms)
    return {"partition_index": index, "error_code": code}


def write_txn_markers(node: Node, request: Request) -> Answer:
    """WriteTxnMarkers.

    Behaviour: a stale epoch is 47, a stale coordinator 52; a marker that is there already is not written again. A
    transaction that the coordinator knows is not hanging: 48, InitProducerId ends it in all its partitions. Kafka would
    end it in this one and commit the others. A coordinator epoch above ours is 52 too: it would lock us out.
    Version notes: v2 TransactionVersion; from 2 on the epoch must be above that of the open transaction.
    """
    return {
        "markers": [
            {
                "producer_id": item.producer_id,
                "topics": [
                    {
                        "name": topic.name,
                        "partitions": [
                            _write(node, request, item, topic.name, index) for index in topic.partition_indexes
                        ],
                    }
                    for topic in item.topics
                ],
            }
            for item in request.body.markers
        ]
    }


APIS = (Api(27, 1, 2, write_txn_markers),)

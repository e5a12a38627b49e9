"""What a producer does about each error: the table, read the other way round."""

from __future__ import annotations

import pytest

from semel.client.reactions import Reaction, reaction_to
from semel.errors import ErrorCode as E

COORDINATOR = ["InitProducerId", "AddPartitionsToTxn", "AddOffsetsToTxn", "TxnOffsetCommit", "EndTxn"]


@pytest.mark.parametrize("kind", COORDINATOR)
@pytest.mark.parametrize(
    ("code", "reaction"),
    [
        (E.NONE, Reaction.DONE),
        (E.CONCURRENT_TRANSACTIONS, Reaction.RETRY),
        (E.COORDINATOR_LOAD_IN_PROGRESS, Reaction.RETRY),
        (E.NOT_COORDINATOR, Reaction.REFRESH),
        (E.COORDINATOR_NOT_AVAILABLE, Reaction.REFRESH),
        (E.INVALID_PRODUCER_EPOCH, Reaction.FENCED),
        (E.PRODUCER_FENCED, Reaction.FENCED),
        (E.INVALID_PRODUCER_ID_MAPPING, Reaction.FENCED),
        (E.TRANSACTIONAL_ID_AUTHORIZATION_FAILED, Reaction.FATAL),
        (E.UNSUPPORTED_VERSION, Reaction.FATAL),
        (999, Reaction.FATAL),
    ],
)
def test_coordinators(kind: str, code: int, reaction: Reaction) -> None:
    assert reaction_to(kind, code) is reaction


@pytest.mark.parametrize(
    ("kind", "code", "reaction"),
    [
        ("Produce", E.DUPLICATE_SEQUENCE_NUMBER, Reaction.DONE),
        ("Produce", E.OUT_OF_ORDER_SEQUENCE_NUMBER, Reaction.OUT_OF_ORDER),
        ("Produce", E.NOT_LEADER_OR_FOLLOWER, Reaction.REFRESH),
        ("Produce", E.UNKNOWN_TOPIC_OR_PARTITION, Reaction.REFRESH),
        ("Produce", E.NOT_ENOUGH_REPLICAS, Reaction.RETRY),
        ("Produce", E.CONCURRENT_TRANSACTIONS, Reaction.RETRY),
        ("Produce", E.INVALID_PRODUCER_EPOCH, Reaction.FENCED),
        ("Produce", E.MESSAGE_TOO_LARGE, Reaction.ABORT),
        ("Produce", E.INVALID_RECORD, Reaction.ABORT),
        ("Produce", E.TRANSACTION_ABORTABLE, Reaction.ABORT),
        ("Produce", E.INVALID_TXN_STATE, Reaction.ABORT),
        ("TxnOffsetCommit", E.ILLEGAL_GENERATION, Reaction.ABORT),
        ("TxnOffsetCommit", E.UNKNOWN_MEMBER_ID, Reaction.ABORT),
        ("TxnOffsetCommit", E.FENCED_INSTANCE_ID, Reaction.ABORT),
        ("TxnOffsetCommit", E.REBALANCE_IN_PROGRESS, Reaction.ABORT),
        ("EndTxn", E.INVALID_TXN_STATE, Reaction.NOT_OPEN),
        ("EndTxn", E.TRANSACTION_ABORTABLE, Reaction.ABORT),
        ("InitProducerId", E.INVALID_TRANSACTION_TIMEOUT, Reaction.FATAL),
    ],
)
def test_where_the_request_decides(kind: str, code: int, reaction: Reaction) -> None:
    assert reaction_to(kind, code) is reaction

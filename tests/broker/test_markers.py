"""WriteTxnMarkers: hanging transactions are ended, others are left to who owns them."""

from __future__ import annotations

import pytest

from semel.errors import ErrorCode
from tests.broker.core import Core, leave_open
from tests.broker.test_transactions import Writer, committed_values, offset_of

E = ErrorCode


def mark(core: Core, topic: str, producer_id: int, epoch: int, *, version: int = 2, commit: bool = False) -> int:
    marker = {
        "producer_id": producer_id,
        "producer_epoch": epoch,
        "transaction_result": commit,
        "topics": [{"name": topic, "partition_indexes": [0]}],
        "coordinator_epoch": 0,
    }
    answer = core.ask(27, version, markers=[marker])
    return int(answer.markers[0].topics[0].partitions[0].error_code)


def hang(core: Core, topic: str = "orders") -> None:
    leave_open(core.node, topic, 0, (77, 3), b"lost", core.now_ms)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("commit", [True, False])
def test_a_hanging_transaction_is_ended_once_and_readers_go_on(core: Core, commit: bool, version: int) -> None:
    core.create("orders")
    hang(core)
    waiting = core.fetch("orders", 0, committed=True, wait_ms=10_000)
    for _ in range(2):
        assert mark(core, "orders", 77, 3, version=version, commit=commit) == 0
    assert waiting.answered, "a reader that waits is woken"
    assert core.fetch("orders", 0).high_watermark == 2, "the same marker is there once"
    assert committed_values(core, "orders") == ([b"lost"] if commit else [])
    core.restart()
    assert committed_values(core, "orders") == ([b"lost"] if commit else [])


@pytest.mark.parametrize("version", [1, 2])
def test_a_transaction_that_the_coordinator_knows_cannot_be_torn(core: Core, version: int) -> None:
    core.create("orders")
    core.create("invoices")
    writer = Writer(core, "w", version)
    assert writer.write("orders", b"a") == 0
    assert writer.write("invoices", b"a") == 0
    assert writer.commit_offset("g", "orders", 5) == 0
    for topic in ("orders", "__consumer_offsets"):
        for epoch in (writer.epoch, writer.epoch + 1):
            assert mark(core, topic, writer.producer_id, epoch) == E.INVALID_TXN_STATE
    assert writer.end(True) == 0
    assert committed_values(core, "orders") == committed_values(core, "invoices") == [b"a"]
    assert offset_of(core, "g", "orders") == (0, 5)


def test_a_marker_for_offsets_of_nobody_changes_none(core: Core) -> None:
    core.create("orders")
    writer = Writer(core, "w")
    assert writer.commit_offset("g", "orders", 5) == 0
    assert mark(core, "__consumer_offsets", 10**6, 0) == 0
    assert writer.end(True) == 0
    assert offset_of(core, "g", "orders") == (0, 5)


def test_the_log_of_transactions_takes_no_markers(core: Core) -> None:
    Writer(core, "w")
    assert mark(core, "__transaction_state", 77, 0) == E.INVALID_TOPIC_EXCEPTION
    assert mark(core, "nowhere", 77, 0) == E.UNKNOWN_TOPIC_OR_PARTITION

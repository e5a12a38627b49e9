"""Produce, Fetch and ListOffsets: codes, waiting, and what survives a restart."""

from __future__ import annotations

import pytest
from crc32c import crc32c

from semel.errors import ErrorCode, ProtocolError
from semel.wire.records import iter_batches
from tests.broker.core import Core, Pending, batch


@pytest.mark.parametrize("version", range(3, 14))
def test_what_is_produced_is_fetched_in_every_version(core: Core, version: int) -> None:
    core.create("orders")
    assert core.produce("orders", batch(b"a", b"b"), version=version).base_offset == 0
    assert core.produce("orders", batch(b"c"), version=version).base_offset == 2
    answer = core.fetch("orders", 1, version=min(18, version + 1))
    offsets = [header.base_offset for _, header in iter_batches(answer.records)]
    assert offsets == [0, 2], "a fetch inside a batch begins with that batch"
    assert answer.high_watermark == 3


def test_acknowledged_records_survive_a_kill(core: Core) -> None:
    core.create("orders", 2)
    for number in range(50):
        assert core.produce("orders", batch(b"%d" % number), partition=number % 2).error_code == 0
    core.restart()
    assert core.fetch("orders", 0).high_watermark == 25
    assert core.produce("orders", batch(b"more")).base_offset == 25


@pytest.mark.parametrize(
    ("records", "code"),
    [
        (None, ErrorCode.INVALID_RECORD),
        (b"", ErrorCode.INVALID_RECORD),
        (batch(b"a")[:-1], ErrorCode.INVALID_RECORD),
        (batch(b"a") + batch(b"b"), ErrorCode.INVALID_RECORD),
        (batch(b"a")[:-1] + b"x", ErrorCode.CORRUPT_MESSAGE),
        (batch(b"a" * 1_100_000), ErrorCode.MESSAGE_TOO_LARGE),
        (batch(b"a", base_offset=5), ErrorCode.INVALID_RECORD),
        (batch(b"a", timestamp_ms=1_800_000_000_000), ErrorCode.INVALID_TIMESTAMP),
        (batch(b"a", producer_id=1, producer_epoch=0), ErrorCode.INVALID_RECORD),
    ],
)
def test_bad_batches_are_refused_with_kafkas_code_and_leave_nothing(
    core: Core, records: bytes | None, code: ErrorCode
) -> None:
    core.create("orders")
    assert core.produce("orders", records).error_code == code
    assert core.fetch("orders", 0).high_watermark == 0


def test_topics_that_are_not_there(core: Core) -> None:
    core.create("orders")
    assert core.produce("nowhere", batch(b"a")).error_code == ErrorCode.UNKNOWN_TOPIC_OR_PARTITION
    assert core.produce("orders", batch(b"a"), partition=1).error_code == ErrorCode.UNKNOWN_TOPIC_OR_PARTITION
    assert core.produce("nowhere", batch(b"a"), version=13).error_code == ErrorCode.UNKNOWN_TOPIC_ID
    assert core.produce("__transaction_state", batch(b"a")).error_code == ErrorCode.INVALID_TOPIC_EXCEPTION
    assert core.fetch("nowhere", 0).error_code == ErrorCode.UNKNOWN_TOPIC_OR_PARTITION
    assert core.fetch("nowhere", 0, version=13).error_code == ErrorCode.UNKNOWN_TOPIC_ID
    out_of_range = core.fetch("orders", 1)
    assert (out_of_range.error_code, out_of_range.high_watermark) == (ErrorCode.OFFSET_OUT_OF_RANGE, -1)


def test_acks_zero_has_no_answer_and_an_error_closes_the_connection(core: Core) -> None:
    core.create("orders")
    topic = {"name": "orders", "partition_data": [{"index": 0, "records": batch(b"a")}]}
    fields = {"transactional_id": None, "timeout": 1000}
    assert core.send(0, 9, acks=0, topic_data=[topic], **fields) is None
    assert core.fetch("orders", 0).high_watermark == 1
    topic["partition_data"] = [{"index": 5, "records": batch(b"a")}]
    with pytest.raises(ProtocolError):
        core.send(0, 9, acks=0, topic_data=[topic], **fields)
    for partition, code in ((0, ErrorCode.INVALID_REQUIRED_ACKS), (5, ErrorCode.UNKNOWN_TOPIC_OR_PARTITION)):
        topic["partition_data"] = [{"index": partition, "records": batch(b"a")}]
        answer = core.ask(0, 9, acks=2, topic_data=[topic], **fields)
        assert answer.responses[0].partition_responses[0].error_code == code


def test_a_resend_is_not_written_twice(core: Core) -> None:
    core.create("orders")
    producer_id = core.init(None).producer_id
    ids = {"producer_id": producer_id, "producer_epoch": 0}
    assert core.produce("orders", batch(b"a", b"b", base_sequence=0, **ids)).base_offset == 0
    assert core.produce("orders", batch(b"c", base_sequence=2, **ids)).base_offset == 2
    assert core.produce("orders", batch(b"a", b"b", base_sequence=0, **ids)).base_offset == 0
    gap = core.produce("orders", batch(b"d", base_sequence=9, **ids))
    assert gap.error_code == ErrorCode.OUT_OF_ORDER_SEQUENCE_NUMBER
    core.restart()
    assert core.produce("orders", batch(b"c", base_sequence=2, **ids)).base_offset == 2
    assert core.fetch("orders", 0).high_watermark == 3


def test_a_fetch_waits_for_data_and_ends_by_its_deadline(core: Core) -> None:
    core.create("orders")
    parked = core.fetch("orders", 0, wait_ms=500)
    assert isinstance(parked, Pending)
    core.pass_time(499)
    assert not parked.answered
    core.pass_time(1)
    assert parked.response.responses[0].partitions[0].records == b""

    parked = core.fetch("orders", 0, wait_ms=500)
    assert isinstance(parked, Pending)
    core.produce("orders", batch(b"a"))
    assert parked.answered
    assert len(list(iter_batches(parked.response.responses[0].partitions[0].records))) == 1


def test_a_fetch_of_a_deleted_topic_is_answered_at_once(core: Core) -> None:
    core.create("orders")
    parked = core.fetch("orders", 0, wait_ms=100_000)
    assert isinstance(parked, Pending)
    core.ask(20, 6, topics=[{"name": "orders", "topic_id": None}], timeout=1000)
    answer = parked.response.responses[0].partitions[0]
    assert answer.error_code == ErrorCode.UNKNOWN_TOPIC_OR_PARTITION


def test_a_fetch_whose_client_went_away_waits_no_more(core: Core) -> None:
    core.create("orders")
    parked = core.fetch("orders", 0, wait_ms=100_000)
    assert isinstance(parked, Pending)
    partition = core.node.topics.partition("orders", 0)
    assert partition is not None
    assert partition.waiters
    parked.later.close()
    assert not partition.waiters
    core.pass_time(200_000)


def _list_offset(core: Core, timestamp: int, version: int = 11, isolation: int = 0) -> tuple[int, int, int]:
    item = {"partition_index": 0, "timestamp": timestamp}
    topics = [{"name": "orders", "partitions": [item]}]
    answer = core.ask(2, version, replica_id=-1, isolation_level=isolation, topics=topics, timeout=1000)
    found = answer.topics[0].partitions[0]
    return found.error_code, found.offset, found.timestamp


def test_list_offsets_special_timestamps(core: Core) -> None:
    core.create("orders")
    assert _list_offset(core, -3) == (0, -1, -1), "an empty log has no largest timestamp"
    for second in (1, 5, 3):
        core.produce("orders", batch(b"a", timestamp_ms=1000 * second))
    assert _list_offset(core, -1) == (0, 3, -1)
    assert _list_offset(core, -2) == (0, 0, -1)
    assert _list_offset(core, -3) == (0, 1, 5000)
    assert _list_offset(core, -4) == (0, 0, -1)
    assert _list_offset(core, -5) == (0, -1, -1)
    assert _list_offset(core, 2000) == (0, 1, 5000)
    assert _list_offset(core, 9000) == (0, -1, -1)
    assert _list_offset(core, -3, version=6)[0] == ErrorCode.UNSUPPORTED_VERSION
    assert _list_offset(core, -7)[0] == ErrorCode.UNSUPPORTED_VERSION


def test_delete_records_moves_the_start(core: Core) -> None:
    core.create("orders")
    for number in range(5):
        core.produce("orders", batch(b"%d" % number))
    topics = [{"name": "orders", "partitions": [{"partition_index": 0, "offset": 3}]}]
    assert core.ask(21, 2, topics=topics, timeout=1000).topics[0].partitions[0].low_watermark == 3
    assert core.fetch("orders", 2).error_code == ErrorCode.OFFSET_OUT_OF_RANGE
    core.restart()
    assert _list_offset(core, -2) == (0, 3, -1)


def test_leader_epochs(core: Core) -> None:
    core.create("orders")
    core.produce("orders", batch(b"a"))
    item = {"partition": 0, "current_leader_epoch": 0, "leader_epoch": 0}
    answer = core.ask(23, 4, topics=[{"topic": "orders", "partitions": [item]}]).topics[0].partitions[0]
    assert (answer.leader_epoch, answer.end_offset) == (0, 1)
    item = {"partition": 0, "current_leader_epoch": 5, "leader_epoch": 0}
    answer = core.ask(23, 4, topics=[{"topic": "orders", "partitions": [item]}]).topics[0].partitions[0]
    assert answer.error_code == ErrorCode.UNKNOWN_LEADER_EPOCH


def test_a_batch_without_readable_records_can_be_found_by_its_time(core: Core) -> None:
    """It is stored as it came; a search that fails at it would fail for every later record too."""
    core.create("orders")
    data = bytearray(batch(b"value"))
    data[-1] = 0x2A  # A number of headers that cannot be.
    data[17:21] = crc32c(memoryview(data)[21:]).to_bytes(4, "big")
    assert core.produce("orders", bytes(data)).error_code == 0
    assert core.produce("orders", batch(b"later", timestamp_ms=1_700_000_000_500)).base_offset == 1
    for timestamp, offset in ((1_700_000_000_000, 0), (1_700_000_000_001, 1), (-3, 1)):
        topic = {"name": "orders", "partitions": [{"partition_index": 0, "timestamp": timestamp}]}
        answer = core.ask(2, 7, replica_id=-1, isolation_level=0, topics=[topic]).topics[0].partitions[0]
        assert (answer.error_code, answer.offset) == (0, offset)

"""Transactions through the whole broker: who may write, what readers see, and what a crash leaves."""

from __future__ import annotations

from typing import Any

import pytest

import semel.failpoints
from semel.client.describe import decode_described
from semel.errors import ErrorCode
from semel.failpoints import FailpointRaised, arm_failpoints
from semel.types import TopicPartition
from semel.wire.records import decode_records, iter_batches
from tests.broker.core import Core, Pending, batch


@pytest.fixture(autouse=True)
def disarm() -> Any:
    yield
    semel.failpoints.arm_failpoints("")


class Writer:
    """A transactional producer, TV2 or TV1, one record a batch."""

    def __init__(self, core: Core, transactional_id: str, version: int = 2) -> None:
        self.core = core
        self.name = transactional_id
        self.version = version
        answer = core.init(transactional_id)
        assert answer.error_code == 0, answer
        self.producer_id, self.epoch = answer.producer_id, answer.producer_epoch
        self.sequence: dict[tuple[str, int], int] = {}

    @property
    def ids(self) -> dict[str, Any]:
        return {"transactional_id": self.name, "producer_id": self.producer_id, "producer_epoch": self.epoch}

    def add(self, topic: str, partition: int = 0) -> int:
        answer = self.core.ask(
            24,
            3,
            v3_and_below_transactional_id=self.name,
            v3_and_below_producer_id=self.producer_id,
            v3_and_below_producer_epoch=self.epoch,
            v3_and_below_topics=[{"name": topic, "partitions": [partition]}],
        )
        return int(answer.results_by_topic_v3_and_below[0].results_by_partition[0].partition_error_code)

    def write(self, topic: str, value: bytes, partition: int = 0, *, add: bool = True) -> int:
        if self.version == 1 and add:
            assert self.add(topic, partition) == 0
        sequence = self.sequence.get((topic, partition), 0)
        data = batch(
            value,
            producer_id=self.producer_id,
            producer_epoch=self.epoch,
            base_sequence=sequence,
            transactional=True,
        )
        version = 12 if self.version == 2 else 9
        answer = self.core.produce(topic, data, version=version, partition=partition, transactional_id=self.name)
        if answer.error_code == 0:
            self.sequence[topic, partition] = sequence + 1
        return int(answer.error_code)

    def end(self, commit: bool) -> int:
        answer = self.core.end(self.name, self.producer_id, self.epoch, commit, 5 if self.version == 2 else 3)
        if answer.error_code == 0 and self.version == 2:
            self.producer_id, self.epoch = answer.producer_id, answer.producer_epoch
            self.sequence.clear()
        return int(answer.error_code)

    def commit_offset(self, group: str, topic: str, offset: int) -> int:
        if self.version == 1:
            answer = self.core.ask(25, 3, group_id=group, **self.ids)
            assert answer.error_code == 0
        item = {"partition_index": 0, "committed_offset": offset, "committed_metadata": "m"}
        topics = [{"name": topic, "partitions": [item]}]
        answer = self.core.ask(28, 5 if self.version == 2 else 3, group_id=group, topics=topics, **self.ids)
        return int(answer.topics[0].partitions[0].error_code)


def committed_values(core: Core, topic: str) -> list[bytes]:
    """What a read_committed consumer delivers, by Kafka's own algorithm."""
    answer = core.fetch(topic, 0, committed=True)
    aborted = sorted(answer.aborted_transactions, key=lambda item: item.first_offset)
    open_aborts: set[int] = set()
    values: list[bytes] = []
    for at, header in iter_batches(answer.records):
        while aborted and aborted[0].first_offset <= header.base_offset:
            open_aborts.add(aborted.pop(0).producer_id)
        if header.is_control:
            open_aborts.discard(header.producer_id)
        elif header.producer_id not in open_aborts:
            values += [record.value or b"" for record in decode_records(answer.records, at, header, topic, 0)]
    return values


def offset_of(core: Core, group: str, topic: str, *, stable: bool = True) -> tuple[int, int]:
    topics = [{"name": topic, "partition_indexes": [0]}]
    answer = core.ask(9, 8, groups=[{"group_id": group, "topics": topics}], require_stable=stable)
    item = answer.groups[0].topics[0].partitions[0]
    return int(item.error_code), int(item.committed_offset)


@pytest.mark.parametrize("version", [1, 2])
def test_commit_and_abort(core: Core, version: int) -> None:
    core.create("orders")
    writer = Writer(core, "w", version)
    for number in range(6):
        assert writer.write("orders", b"%d" % number) == 0
        assert writer.end(number % 3 != 1) == 0
    assert committed_values(core, "orders") == [b"0", b"2", b"3", b"5"]
    core.restart()
    assert committed_values(core, "orders") == [b"0", b"2", b"3", b"5"]


@pytest.mark.parametrize("version", [1, 2])
def test_an_open_transaction_is_not_read_and_its_end_wakes_the_reader(core: Core, version: int) -> None:
    core.create("orders")
    writer = Writer(core, "w", version)
    assert writer.write("orders", b"a") == 0
    parked = core.fetch("orders", 0, committed=True, wait_ms=10_000)
    assert isinstance(parked, Pending)
    assert core.produce("orders", batch(b"plain")).error_code == 0
    assert not parked.answered, "the last stable offset did not move"
    assert writer.end(True) == 0
    assert parked.answered
    assert committed_values(core, "orders") == [b"a", b"plain"]


def test_a_new_owner_aborts_and_fences_the_old_one(core: Core) -> None:
    core.create("orders")
    old = Writer(core, "w")
    assert old.write("orders", b"old") == 0
    new = Writer(core, "w")
    assert (new.producer_id, new.epoch > old.epoch) == (old.producer_id, True)
    assert old.write("orders", b"late") == ErrorCode.INVALID_PRODUCER_EPOCH
    assert old.end(True) == ErrorCode.PRODUCER_FENCED
    assert core.init("w", old.producer_id, old.epoch).error_code == ErrorCode.PRODUCER_FENCED
    assert new.write("orders", b"new") == 0
    assert new.end(True) == 0
    assert committed_values(core, "orders") == [b"new"]


@pytest.mark.parametrize("commit", [True, False])
def test_a_late_end_of_the_last_transaction_does_not_touch_the_next(core: Core, commit: bool) -> None:
    """The torn transaction that V2 cures: the copy of EndTxn N arrives when N+1 is open."""
    core.create("orders")
    writer = Writer(core, "w")
    assert writer.write("orders", b"one") == 0
    stale = (writer.producer_id, writer.epoch)
    assert writer.end(commit) == 0
    assert writer.write("orders", b"two") == 0
    core.end("w", *stale, commit)
    core.end("w", *stale, not commit)
    assert core.node.transactions.coordinator.describe("w")[1].state == "Ongoing"  # type: ignore[union-attr]
    assert writer.end(True) == 0
    assert committed_values(core, "orders") == [b"one", b"two"][0 if commit else 1 :]


@pytest.mark.parametrize("version", [1, 2])
def test_a_late_produce_is_refused_once_the_end_is_decided(core: Core, version: int) -> None:
    core.create("orders")
    writer = Writer(core, "w", version)
    assert writer.write("orders", b"a") == 0
    ids = {"producer_id": writer.producer_id, "producer_epoch": writer.epoch}
    assert writer.end(True) == 0
    late = batch(b"late", base_sequence=1, transactional=True, **ids)
    answer = core.produce("orders", late, version=12 if version == 2 else 9, transactional_id="w")
    assert answer.error_code in (ErrorCode.INVALID_PRODUCER_EPOCH, ErrorCode.INVALID_TXN_STATE)
    assert committed_values(core, "orders") == [b"a"]


def test_produce_outside_of_a_transaction(core: Core) -> None:
    core.create("orders", 2)
    writer = Writer(core, "w", 1)
    assert writer.write("orders", b"a", add=False) == ErrorCode.INVALID_TXN_STATE
    ids = {"producer_id": writer.producer_id, "producer_epoch": writer.epoch}
    data = batch(b"a", base_sequence=0, transactional=True, **ids)
    code = core.produce("orders", data, version=11, transactional_id="w").error_code
    assert code == ErrorCode.TRANSACTION_ABORTABLE
    code = core.produce("orders", data, version=12).error_code
    assert code == ErrorCode.TRANSACTIONAL_ID_AUTHORIZATION_FAILED
    code = core.produce("orders", data, version=12, transactional_id="unknown").error_code
    assert code == ErrorCode.INVALID_PRODUCER_ID_MAPPING


def test_two_producers_in_one_request_write_nothing(core: Core) -> None:
    core.create("orders", 2)
    writers = [Writer(core, "a"), Writer(core, "b")]
    records = [
        batch(b"x", producer_id=w.producer_id, producer_epoch=w.epoch, base_sequence=0, transactional=True)
        for w in writers
    ]
    data = [{"index": index, "records": record} for index, record in enumerate(records)]
    topic = {"name": "orders", "partition_data": data}
    answer = core.ask(0, 12, transactional_id="a", acks=-1, timeout=1, topic_data=[topic])
    codes = [item.error_code for item in answer.responses[0].partition_responses]
    assert codes == [ErrorCode.INVALID_PRODUCER_ID_MAPPING] * 2
    assert core.fetch("orders", 0).high_watermark == 0


def test_add_partitions_of_an_unknown_topic_adds_nothing(core: Core) -> None:
    core.create("orders")
    writer = Writer(core, "w", 1)
    topics = [{"name": "orders", "partitions": [0]}, {"name": "nowhere", "partitions": [0]}]
    answer = core.ask(
        24,
        3,
        v3_and_below_transactional_id="w",
        v3_and_below_producer_id=writer.producer_id,
        v3_and_below_producer_epoch=writer.epoch,
        v3_and_below_topics=topics,
    )
    codes = [topic.results_by_partition[0].partition_error_code for topic in answer.results_by_topic_v3_and_below]
    assert codes == [ErrorCode.OPERATION_NOT_ATTEMPTED, ErrorCode.UNKNOWN_TOPIC_OR_PARTITION]
    found = core.node.transactions.coordinator.get("w")
    assert found is not None
    assert found.state == "Empty"


@pytest.mark.parametrize("version", [1, 2])
def test_offsets_in_a_transaction(core: Core, version: int) -> None:
    core.create("in")
    writer = Writer(core, "w", version)
    assert writer.commit_offset("g", "in", 10) == 0
    assert offset_of(core, "g", "in") == (ErrorCode.UNSTABLE_OFFSET_COMMIT, -1)
    assert offset_of(core, "g", "in", stable=False) == (0, -1)
    core.restart()
    assert offset_of(core, "g", "in") == (ErrorCode.UNSTABLE_OFFSET_COMMIT, -1), "staged offsets survive a kill"
    assert writer.end(True) == 0
    assert offset_of(core, "g", "in") == (0, 10)
    assert writer.commit_offset("g", "in", 20) == 0
    assert writer.end(False) == 0
    assert offset_of(core, "g", "in") == (0, 10)
    core.restart()
    assert offset_of(core, "g", "in") == (0, 10)


def test_txn_offset_commit_errors(core: Core) -> None:
    core.create("in")
    writer = Writer(core, "w", 2)
    item = {"partition_index": 0, "committed_offset": 1, "committed_metadata": None}
    topics = [{"name": "in", "partitions": [item]}]

    def code(version: int, **changed: Any) -> int:
        fields = writer.ids | {"group_id": "g", "topics": topics} | changed
        return int(core.ask(28, version, **fields).topics[0].partitions[0].error_code)

    assert code(3) == ErrorCode.INVALID_TXN_STATE
    assert code(4) == ErrorCode.TRANSACTION_ABORTABLE
    assert code(5, producer_epoch=writer.epoch + 1) == ErrorCode.INVALID_PRODUCER_EPOCH
    assert code(5, generation_id=3) == ErrorCode.ILLEGAL_GENERATION
    long = [{"name": "in", "partitions": [item | {"committed_metadata": "x" * 5000}]}]
    assert code(5, topics=long) == ErrorCode.OFFSET_METADATA_TOO_LARGE
    unknown = [{"name": "nowhere", "partitions": [item]}]
    assert code(5, topics=unknown) == ErrorCode.UNKNOWN_TOPIC_OR_PARTITION
    assert code(5) == 0


def test_a_transaction_times_out_and_its_writer_learns_it(core: Core) -> None:
    core.create("orders")
    writer = Writer(core, "w")
    assert writer.write("orders", b"a") == 0
    core.pass_time(9_000)
    core.node.sweep()
    assert core.fetch("orders", 0, committed=True).last_stable_offset == 0
    core.pass_time(2_000)
    core.node.sweep()
    assert core.fetch("orders", 0, committed=True).last_stable_offset == 2
    assert writer.write("orders", b"b") == ErrorCode.INVALID_PRODUCER_EPOCH
    assert writer.end(True) == ErrorCode.PRODUCER_FENCED
    assert committed_values(core, "orders") == []


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "point", ["broker.before_prepare", "broker.after_prepare", "broker.between_markers", "broker.after_markers"]
)
@pytest.mark.parametrize("commit", [True, False])
@pytest.mark.parametrize("killed", [True, False])
def test_a_crash_inside_end_txn(core: Core, version: int, point: str, commit: bool, killed: bool) -> None:
    """Whatever is interrupted, the transaction has one outcome in all its partitions, and a retry gets that outcome."""
    core.create("orders", 1)
    core.create("invoices", 1)
    writer = Writer(core, "w", version)
    assert writer.write("orders", b"a") == 0
    assert writer.write("invoices", b"a") == 0
    assert writer.commit_offset("g", "orders", 7) == 0
    arm_failpoints(f"{point}:raise:1")
    with pytest.raises(FailpointRaised):
        writer.end(commit)
    if killed:
        core.restart()
    else:
        core.node.sweep()
    assert writer.end(commit) == 0
    wanted = [b"a"] if commit else []
    assert committed_values(core, "orders") == wanted
    assert committed_values(core, "invoices") == wanted
    assert offset_of(core, "g", "orders") == (0, 7 if commit else -1)
    assert writer.write("orders", b"b") == 0, "the producer goes on"
    assert writer.end(True) == 0
    assert committed_values(core, "orders") == [*wanted, b"b"]


def test_a_crash_around_an_append(core: Core) -> None:
    core.create("orders")
    for point, present in (("broker.before_append", 0), ("broker.after_append", 1)):
        arm_failpoints(f"{point}:raise:1")
        with pytest.raises(FailpointRaised):
            core.produce("orders", batch(b"a"))
        core.restart()
        assert core.fetch("orders", 0).high_watermark == present


def test_a_transaction_of_nobody_is_aborted_at_start(core: Core) -> None:
    """Data of a transaction whose record the coordinator's log has lost must not hold up readers for ever."""
    core.create("orders")
    partition = core.node.topics.partition("orders", 0)
    assert partition is not None
    data = bytearray(batch(b"a", producer_id=77, producer_epoch=3, base_sequence=0, transactional=True))
    partition.log.append(data, core.now_ms)
    core.restart()
    answer = core.fetch("orders", 0, committed=True)
    assert answer.last_stable_offset == answer.high_watermark == 2
    assert committed_values(core, "orders") == []


def test_a_topic_deleted_inside_a_transaction_does_not_stop_its_commit(core: Core) -> None:
    core.create("orders")
    core.create("gone")
    writer = Writer(core, "w")
    assert writer.write("orders", b"a") == 0
    assert writer.write("gone", b"a") == 0
    core.ask(20, 6, topics=[{"name": "gone", "topic_id": None}], timeout=1000)
    assert writer.end(True) == 0
    assert committed_values(core, "orders") == [b"a"]


def test_the_transaction_log_is_checkpointed(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("semel.broker.internal.CHECKPOINT_BYTES", 4_000)
    core.create("orders")
    writers = [Writer(core, f"w{number}") for number in range(3)]
    for number in range(40):
        writer = writers[number % 3]
        assert writer.write("orders", b"%d" % number) == 0
        assert writer.commit_offset("g", "orders", number) == 0
        assert writer.end(True) == 0
        core.node.sweep()
    open_one = writers[0]
    assert open_one.write("orders", b"open") == 0
    source = core.node.topics.partition("__transaction_state", 0)
    assert source is not None
    assert source.log.log_start_offset > 0, "nothing was ever dropped"
    core.restart()
    assert offset_of(core, "g", "orders") == (0, 39)
    assert open_one.end(True) == 0
    assert writers[1].write("orders", b"next") == 0
    assert len(committed_values(core, "orders")) == 41


def test_describe_and_list(core: Core) -> None:
    core.create("orders")
    writer = Writer(core, "w")
    assert writer.write("orders", b"a") == 0
    idle = Writer(core, "idle")
    frame = core.send(65, 0, transactional_ids=["idle"])
    assert isinstance(frame, bytes)
    [described] = decode_described(frame)
    assert (described.state, described.start_ms, described.producer_id) == ("Empty", -1, idle.producer_id)
    found, unknown, empty = core.ask(65, 0, transactional_ids=["w", "nobody", ""]).transaction_states
    assert (found.transaction_state, found.producer_id) == ("Ongoing", writer.producer_id)
    assert [(topic.topic, topic.partitions) for topic in found.topics] == [("orders", (0,))]
    assert unknown.error_code == ErrorCode.TRANSACTIONAL_ID_NOT_FOUND
    assert empty.error_code == ErrorCode.INVALID_REQUEST

    def listed(**filters: Any) -> list[str]:
        fields = {"state_filters": [], "producer_id_filters": []} | filters
        return [item.transactional_id for item in core.ask(66, 2, **fields).transaction_states]

    assert listed() == ["w", "idle"]
    assert listed(state_filters=["Empty"]) == ["idle"]
    assert listed(transactional_id_pattern="w.*") == ["w"]
    assert listed(transactional_id_pattern="x.*") == []
    answer = core.ask(61, 0, topics=[{"name": "orders", "partition_indexes": [0]}])
    [producer] = answer.topics[0].partitions[0].active_producers
    assert (producer.producer_id, producer.current_txn_start_offset) == (writer.producer_id, 0)


def test_verify_only(core: Core) -> None:
    core.create("orders", 2)
    writer = Writer(core, "w")
    assert writer.write("orders", b"a") == 0
    item = writer.ids | {"verify_only": True, "topics": [{"name": "orders", "partitions": [0, 1]}]}
    answer = core.ask(24, 5, transactions=[item]).results_by_transaction[0].topic_results[0]
    codes = [result.partition_error_code for result in answer.results_by_partition]
    assert codes == [0, ErrorCode.TRANSACTION_ABORTABLE]
    found = core.node.transactions.coordinator.get("w")
    assert found is not None
    assert found.partitions == {TopicPartition("orders", 0)}

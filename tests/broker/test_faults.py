"""Mistakes, full disks and kills at the wrong moment: nothing acknowledged may go, and the broker must open again."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest

import semel.broker.internal
from semel.coordinator.group import GroupCoordinator
from semel.disk import disk
from semel.errors import ConfigurationError, ErrorCode
from semel.log.errors import LogError
from semel.log.log import PartitionLog
from tests.broker.core import Core, batch
from tests.broker.test_transactions import Writer, committed_values, offset_of


@pytest.mark.parametrize("name", ["__transaction_state", "__consumer_offsets"])
def test_a_transaction_cannot_reach_into_the_brokers_own_topics(core: Core, name: str) -> None:
    writer = Writer(core, "w")
    assert writer.write(name, b"x") == ErrorCode.INVALID_TOPIC_EXCEPTION
    core.create("orders")
    assert writer.write("orders", b"1") == 0
    assert writer.end(True) == 0
    core.restart()
    assert committed_values(core, "orders") == [b"1"]


def test_a_kill_inside_a_checkpoint_keeps_the_offsets_of_an_open_transaction(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replaying a part of a checkpoint would put the older offset behind the one that is in the transaction."""
    core.create("orders")
    groups = [f"g{number:04}" for number in range(1200)]
    writer = Writer(core, "w")
    for group in groups:
        assert writer.commit_offset(group, "orders", 1) == 0
    assert writer.end(True) == 0
    assert writer.commit_offset(groups[0], "orders", 2) == 0
    monkeypatch.setattr(semel.broker.internal, "CHECKPOINT_BYTES", 0)
    monkeypatch.setattr(semel.broker.internal, "CHECKPOINT_RATIO", 0)
    real = PartitionLog.append_internal
    written = []

    def killed(log: PartitionLog, records: Any, now_ms: int) -> int:
        if written:
            raise LogError(ErrorCode.KAFKA_STORAGE_ERROR, "the process is killed here")
        written.append(len(records))
        return real(log, records, now_ms)

    with monkeypatch.context() as patch:
        patch.setattr(PartitionLog, "append_internal", killed)
        patch.setattr(PartitionLog, "delete_before", lambda *_: killed(*_, 0))
        core.node.groups._log.checkpoint_if_due(core.now_ms)
    assert written
    core.restart()
    assert writer.end(True) == 0
    assert offset_of(core, groups[0], "orders") == (0, 2)
    assert offset_of(core, groups[-1], "orders") == (0, 1)


def test_a_disk_that_is_full_at_the_start_loses_no_topic(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    core.create("orders")
    assert core.produce("orders", batch(b"1")).error_code == 0
    real = disk.pwrite

    def short(file: int, data: bytes, position: int) -> int:
        return real(file, data[: len(data) // 2], position)

    with monkeypatch.context() as patch:
        patch.setattr(disk, "pwrite", short)
        with pytest.raises(ConfigurationError):
            core.restart()
    core.restart()
    assert core.fetch("orders", 0).records


def test_data_without_its_metadata_is_not_deleted(core: Core) -> None:
    core.create("orders")
    assert core.produce("orders", batch(b"1")).error_code == 0
    path = core.data / "metadata.log"
    aside = path.rename(core.data / "aside")
    with pytest.raises(ConfigurationError, match="metadata"):
        core.restart()
    path.unlink(missing_ok=True)
    aside.rename(path)
    core.restart()
    assert core.fetch("orders", 0).records


@pytest.mark.parametrize(("where", "name"), [(PartitionLog, "delete"), (GroupCoordinator, "drop_topic")])
def test_a_kill_while_a_topic_is_deleted_takes_its_offsets_along(
    core: Core, monkeypatch: pytest.MonkeyPatch, where: type, name: str
) -> None:
    core.create("orders")
    writer = Writer(core, "w")
    assert writer.commit_offset("g", "orders", 5) == 0
    assert writer.end(True) == 0

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(where, name, killed)
        with pytest.raises(KeyboardInterrupt):
            core.ask(20, 5, topic_names=["orders"], timeout=1000)
    core.restart()
    core.create("orders")
    assert offset_of(core, "g", "orders") == (0, -1), "the new topic would be read from the offset of the old one"


def test_a_commit_after_a_deletion_that_could_not_be_written_stays(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    core.create("orders")

    def commit(offset: int) -> int:
        item = {"partition_index": 0, "committed_offset": offset, "committed_metadata": ""}
        answer = core.ask(
            8,
            8,
            group_id="g",
            generation_id_or_member_epoch=-1,
            member_id="",
            topics=[{"name": "orders", "partitions": [item]}],
        )
        return int(answer.topics[0].partitions[0].error_code)

    assert commit(5) == 0

    def full(*_: Any, **__: Any) -> int:
        raise LogError(ErrorCode.KAFKA_STORAGE_ERROR, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(PartitionLog, "append_internal", full)
        core.ask(42, 2, groups_names=["g"])
    assert commit(7) == 0
    core.node.sweep()
    core.restart()
    assert offset_of(core, "g", "orders") == (0, 7)


def test_readers_get_only_the_aborted_transactions_of_what_they_read(core: Core) -> None:
    core.create("orders")
    writer = Writer(core, "w")
    for number in range(60):
        assert writer.write("orders", b"x" * 1000) == 0
        assert writer.end(number % 2 == 1) == 0
    item = {"partition": 0, "fetch_offset": 0, "partition_max_bytes": 5000}
    fields = {"replica_id": -1, "max_wait": 0, "min_bytes": 1, "max_bytes": 5000, "isolation_level": 1}
    answer = core.ask(1, 12, **fields, topics=[{"topic": "orders", "partitions": [item]}], forgotten_topics_data=[])
    found = answer.responses[0].partitions[0]
    assert found.last_stable_offset == 120
    # 1000 bytes and more a record: at most four transactions of two offsets each fit.
    assert [item.first_offset for item in found.aborted_transactions] == [0, 4]


def test_a_reader_whose_index_is_broken_does_not_stop_the_writers(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    core.create("orders")
    waiting = core.fetch("orders", 0, committed=True, wait_ms=1000)

    def broken(*_: Any) -> None:
        raise LogError(ErrorCode.KAFKA_STORAGE_ERROR, "the index cannot be read")

    monkeypatch.setattr(PartitionLog, "aborted_transactions", broken)
    assert core.produce("orders", batch(b"1")).error_code == 0
    assert waiting.response.responses[0].partitions[0].error_code == ErrorCode.KAFKA_STORAGE_ERROR


def test_a_transaction_log_that_refuses_does_not_hold_up_the_groups(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    core.create("orders")
    writer = Writer(core, "w")
    assert writer.write("orders", b"1") == 0
    swept = []
    monkeypatch.setattr(core.node.groups, "sweep", lambda: swept.append("groups"))
    core.now_ms += 60_000

    def full(*_: Any, **__: Any) -> int:
        raise LogError(ErrorCode.KAFKA_STORAGE_ERROR, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(PartitionLog, "append_internal", full)
        core.node.sweep()
    assert swept
    core.node.sweep()
    assert committed_values(core, "orders") == []
    assert core.fetch("orders", 0, committed=True).last_stable_offset == 2, "the overdue transaction is aborted late"


def test_a_log_that_cannot_be_synced_at_the_end_does_not_keep_the_others_open(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    core.create("orders", 2)
    closed = []

    def failing(log: PartitionLog) -> None:
        if log.topic == "orders" and log.partition == 0:
            raise LogError(ErrorCode.KAFKA_STORAGE_ERROR, os.strerror(errno.EIO))
        closed.append((log.topic, log.partition))

    monkeypatch.setattr(PartitionLog, "close", failing)
    core.node.close()
    assert ("orders", 1) in closed

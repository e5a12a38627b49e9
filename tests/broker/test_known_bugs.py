"""Bugs that other brokers and clients had with transactions, each with the test that it is not here.

Most of them are held by tests that stand elsewhere; docs/broker.md has the whole list. Here are the rest, by name.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from semel.broker.config import BrokerConfig
from semel.broker.embedded import EmbeddedBroker
from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.client.producer import TransactionalProducer
from semel.errors import ErrorCode
from semel.types import TopicPartition
from semel.wire.records import BatchBuilder, decode_records, iter_batches
from tests.broker.core import Core, batch
from tests.broker.test_transactions import Writer, committed_values, offset_of

E = ErrorCode
TESTS = Path(__file__).resolve().parents[1]
CODECS = range(5)
"""none, gzip, snappy, lz4, zstd"""


def read_committed_from(core: Core, topic: str, offset: int) -> list[tuple[int, bytes]]:
    """What a read_committed consumer delivers from this offset on, by Kafka's own algorithm."""
    answer = core.fetch(topic, offset, committed=True)
    aborted = sorted(answer.aborted_transactions, key=lambda item: item.first_offset)
    dropped: set[int] = set()
    found = []
    for at, header in iter_batches(answer.records):
        while aborted and aborted[0].first_offset <= header.last_offset:
            dropped.add(aborted.pop(0).producer_id)
        if header.is_control:
            dropped.discard(header.producer_id)
        elif header.producer_id not in dropped:
            found += [(item.offset, item.value or b"") for item in decode_records(answer.records, at, header, topic, 0)]
    return [item for item in found if item[0] >= offset]


@pytest.mark.parametrize("version", [1, 2])
def test_c8_aborted_records_are_delivered_from_no_offset_and_with_no_codec(core: Core, version: int) -> None:
    """librdkafka #3020, #3369, aiokafka #781: compressed batches, a marker alone, a fetch that begins at a marker."""
    core.create("orders")
    core.create("elsewhere")
    writers = [Writer(core, "a", version), Writer(core, "b", version)]
    expected: list[tuple[int, bytes]] = []
    for number, codec in enumerate([*CODECS, *CODECS]):
        offset = core.fetch("orders", 0).high_watermark
        for position, writer in enumerate(writers):
            if version == 1:
                assert writer.add("orders") == 0
            commits = (number + position) % 3 != 0
            builder = BatchBuilder(codec)
            values = [b"%d.%d.%d" % (number, position, part) for part in range(3)]
            for value in values:
                builder.append(None, value, 1_700_000_000_000)
            data = builder.build(
                producer_id=writer.producer_id,
                producer_epoch=writer.epoch,
                base_sequence=writer.sequence.get(("orders", 0), 0),
                transactional=True,
            )
            answer = core.produce("orders", data, version=9 if version == 1 else 12, transactional_id=writer.name)
            assert answer.error_code == 0
            writer.sequence["orders", 0] = writer.sequence.get(("orders", 0), 0) + 3
            if commits:
                expected += [(offset + position * 3 + part, value) for part, value in enumerate(values)]
        for position, writer in enumerate(writers):
            assert writer.end((number + position) % 3 != 0) == 0
        # A marker alone: the partition is in the transaction, its records went elsewhere.
        if version == 1:
            assert writers[0].add("orders") == 0
            assert writers[0].write("elsewhere", b"x") == 0
            assert writers[0].end(False) == 0
    end = core.fetch("orders", 0).high_watermark
    for offset in range(end):
        assert read_committed_from(core, "orders", offset) == [item for item in expected if item[0] >= offset]


def test_c11_of_two_starts_of_one_id_the_one_that_was_answered_first_is_fenced(core: Core) -> None:
    """spring-kafka #1408: the answer to the older start is delayed; it must not win the id by coming last."""
    core.create("orders")
    older = Writer(core, "w")
    newer = Writer(core, "w")
    assert newer.write("orders", b"new") == 0
    assert older.write("orders", b"old") == E.INVALID_PRODUCER_EPOCH
    assert older.end(True) == E.PRODUCER_FENCED
    assert core.init("w", older.producer_id, older.epoch).error_code == E.PRODUCER_FENCED
    assert newer.end(True) == 0
    assert committed_values(core, "orders") == [b"new"]


def test_pitfall_3_who_reads_uncommitted_gets_null_and_no_list_of_aborted_transactions(core: Core) -> None:
    """Redpanda #18852: a client that is given the list drops records that it asked to see."""
    core.create("orders")
    writer = Writer(core, "w")
    assert writer.write("orders", b"a") == 0
    assert writer.end(False) == 0
    for version in (4, 11, 12, 17):
        assert core.fetch("orders", 0, version=version).aborted_transactions is None
        assert core.fetch("orders", 0, version=version, committed=True).aborted_transactions


def test_pitfall_4_a_fetch_inside_a_batch_gives_the_whole_batch(core: Core) -> None:
    """tansu 87db6ea: found by base offset only, a consumer hangs at the last batch."""
    core.create("orders")
    core.produce("orders", batch(b"0", b"1", b"2"))
    for offset in range(3):
        data = core.fetch("orders", offset).records
        assert [header.base_offset for _, header in iter_batches(data)] == [0]


def test_pitfall_12_markers_do_not_reach_into_a_topic_that_was_made_again(core: Core) -> None:
    """kfake d222eb3f, 3825bbc1: a marker through a stale partition corrupts the new topic; old producer state stays."""
    core.create("orders")
    core.create("other")
    writer = Writer(core, "w")
    assert writer.write("orders", b"old") == 0
    assert writer.write("other", b"kept") == 0
    core.ask(20, 6, topics=[{"name": "orders", "topic_id": None}], timeout=1000)
    core.create("orders")
    assert core.produce("orders", batch(b"plain")).error_code == 0
    assert writer.end(True) == 0
    assert committed_values(core, "orders") == [b"plain"]
    assert committed_values(core, "other") == [b"kept"]
    assert writer.write("orders", b"next") == 0, "sequences of the old topic count for nothing"
    assert writer.end(True) == 0
    core.restart()
    assert committed_values(core, "orders") == [b"plain", b"next"]


@pytest.mark.parametrize("version", [1, 2])
def test_pitfall_16_a_transaction_of_offsets_alone_ends_and_leaks_into_none(core: Core, version: int) -> None:
    """nisshi #716: never ended, its offsets came with the next transaction; a retry failed instead of overwriting."""
    core.create("in")
    writer = Writer(core, "w", version)
    for commit, offset, visible in ((True, 5, 5), (False, 9, 5), (True, 11, 11)):
        for retried in (offset - 1, offset):
            assert writer.commit_offset("g", "in", retried) == 0
        assert writer.end(commit) == 0
        assert offset_of(core, "g", "in") == (0, visible)
    state = core.node.transactions.coordinator.get("w")
    assert state is not None
    assert (state.state, state.partitions) == ("CompleteCommit", frozenset())


def test_pitfall_16_nothing_is_staged_by_who_may_not(core: Core) -> None:
    """Epoch, state and partition are checked first."""
    core.create("in")
    old, new = Writer(core, "w"), Writer(core, "w")
    assert old.commit_offset("g", "in", 5) == E.INVALID_PRODUCER_EPOCH
    assert offset_of(core, "g", "in") == (0, -1), "the group has nothing pending"
    assert new.commit_offset("g", "nowhere", 5) == E.UNKNOWN_TOPIC_OR_PARTITION
    assert new.end(False) == 0
    assert offset_of(core, "g", "nowhere")[1] == -1


def test_pitfall_17_timed_out_transactions_have_a_timer_of_their_own(tmp_path: Path) -> None:
    """tansu cf82d41: in a slow loop of maintenance, readers waited minutes for the last stable offset."""
    assert BrokerConfig().transaction_sweep_seconds <= 10, "Kafka's period"

    async def main(address: str) -> None:
        async with KafkaClient(address) as client:
            admin = Admin(client)
            await admin.create_topics({"orders": TopicSpec(1)})
            producer = TransactionalProducer(client, "w", transaction_timeout_ms=50)
            await producer.init_transactions()
            producer.begin()
            builder = BatchBuilder()
            builder.append(None, b"a", 1_700_000_000_000)
            await producer.produce("orders", 0, builder)
            await producer.flush()
            where = [TopicPartition("orders", 0)]
            async with asyncio.timeout(20):
                while (await admin.list_offsets(where, at="stable"))[where[0]] != 2:
                    await asyncio.sleep(0.02)
            await producer.close()

    with EmbeddedBroker(tmp_path, config=BrokerConfig(transaction_sweep_seconds=0.05)) as broker:
        asyncio.run(main(broker.address))


@pytest.mark.parametrize("commit", [True, False])
def test_kafka_18660_the_answer_at_the_last_epoch_has_the_new_producer_id(core: Core, commit: bool) -> None:
    """The answer named the old producer id with epoch 0, and the client's next transaction was refused."""
    core.create("orders")
    writer = Writer(core, "w")
    at_the_end(core, writer)
    first = writer.producer_id
    assert writer.write("orders", b"last") == 0
    identity = writer.producer_id, writer.epoch
    assert writer.end(commit) == 0
    assert (writer.epoch, writer.producer_id != first) == (0, True)
    again = core.end("w", *identity, commit)
    assert (again.producer_id, again.producer_epoch) == (writer.producer_id, 0), "the retry"
    assert writer.write("orders", b"first") == 0
    assert writer.end(True) == 0
    assert committed_values(core, "orders") == ([b"last"] if commit else []) + [b"first"]


def test_kafka_19367_a_fence_at_the_last_epoch_raises_it_once(core: Core) -> None:
    """Raised twice it passed 32767, and nobody could take the id over any more."""
    core.create("orders")
    old = Writer(core, "w")
    at_the_end(core, old)
    assert old.write("orders", b"old") == 0
    new = Writer(core, "w")
    assert new.producer_id != old.producer_id
    assert 0 <= new.epoch <= 1
    assert new.write("orders", b"new") == 0
    assert new.end(True) == 0
    assert committed_values(core, "orders") == [b"new"]


def test_kafka_20357_a_retry_of_the_rotation_is_known_after_a_restart(core: Core) -> None:
    """lastProducerEpoch was in memory only: the client that asked again after a restart was fenced by itself."""
    writer = Writer(core, "w")
    at_the_end(core, writer)
    first = core.init("w", writer.producer_id, writer.epoch)
    core.restart()
    again = core.init("w", writer.producer_id, writer.epoch)
    assert (again.error_code, again.producer_id, again.producer_epoch) == (0, first.producer_id, 0)


def test_kafka_20785_a_commit_after_the_coordinators_abort_is_fenced_not_fatal(core: Core) -> None:
    """INVALID_TXN_STATE kills a Kafka Streams thread; PRODUCER_FENCED lets it start again."""
    core.create("orders")
    writer = Writer(core, "w")
    assert writer.write("orders", b"a") == 0
    core.pass_time(11_000)
    core.node.sweep()
    assert core.end("w", writer.producer_id, writer.epoch, True).error_code == E.PRODUCER_FENCED


def test_kafka_19690_a_fenced_producer_is_told_so_before_that_it_has_no_transaction(core: Core) -> None:
    """INVALID_TXN_STATE is fatal to clients; the stale epoch has to be compared first."""
    core.create("orders", 2)
    old = Writer(core, "w", 1)
    Writer(core, "w", 1)
    for version in (9, 11, 12):
        data = batch(b"a", producer_id=old.producer_id, producer_epoch=old.epoch, base_sequence=0, transactional=True)
        answer = core.produce("orders", data, version=version, partition=1, transactional_id="w")
        assert answer.error_code == E.INVALID_PRODUCER_EPOCH


def test_kafka_18464_a_client_faster_than_the_markers_is_not_fenced_by_its_own_commit(core: Core) -> None:
    """Epochs come back whole however fast the next transaction follows; a hundred of them, without a wait."""
    core.create("orders")
    writer = Writer(core, "w")
    for number in range(100):
        assert writer.write("orders", b"%d" % number) == 0
        assert writer.end(True) == 0
    assert len(committed_values(core, "orders")) == 100


def at_the_end(core: Core, writer: Writer) -> None:
    """Move the writer to the last epoch of its producer id."""
    coordinator = core.node.transactions.coordinator
    current = coordinator.get(writer.name)
    assert current is not None
    core.node.transactions._persist(coordinator._propose(replace(current, producer_epoch=32_766)), core.now_ms)
    writer.epoch = 32_766


# -- The list ---------------------------------------------------------------------------------------------------


def listed() -> dict[str, list[str]]:
    """The tests of each bug in docs/broker.md."""
    text = (TESTS.parent / "docs" / "broker.md").read_text().partition("## Bugs of others")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    return {cells[0].strip(): re.findall(r"`([\w/]+\.py)::(\w+)`", cells[2]) for cells in rows[1:]}  # type: ignore[misc]


def test_every_bug_on_the_list_has_a_test_that_exists() -> None:
    found: dict[str, Any] = listed()
    names = {name for key in found for name in key.split(", ")}
    assert names >= {f"C{number}" for number in range(1, 17)}
    assert names >= {f"pitfall {number}" for number in range(1, 31) if number != 24}
    assert names >= {f"KAFKA-{number}" for number in (18660, 20357, 18464, 20785, 19367, 19690, 18019, 17754)}
    for key, tests in found.items():
        assert tests, f"{key} has no test"
        for path, test in tests:
            assert f"def {test}(" in (TESTS / path).read_text(), f"{key}: {path}::{test}"

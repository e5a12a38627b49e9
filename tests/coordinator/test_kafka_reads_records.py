"""Apache Kafka's own tool reads our two internal logs: the oracle of the record layouts."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from semel.coordinator.group_log import LogRecord
from semel.wire.records import BatchBuilder
from tests.conftest import unavailable
from tests.services.kafka import kafka_jars, missing_tools

from .consumers import Consumers
from .drivers import ID, P0, P1, Groups, Transactions


def dumped(log: list[LogRecord], topic: str, decoder: str, folder: Path) -> list[tuple[object, object]]:
    """Key and value of each record as DumpLogSegments prints them: parsed JSON, or its words."""
    if missing_tools():
        unavailable("Apache Kafka", f"{' and '.join(missing_tools())} not found")
    segment = folder / f"{topic}-0" / "00000000000000000000.log"
    segment.parent.mkdir()
    data = b""
    for offset, (key, value) in enumerate(log):
        batch = BatchBuilder()
        batch.append(key, value, 1_700_000_000_000)
        data += batch.build(base_offset=offset)
    segment.write_bytes(data)
    command = ["java", "-cp", f"{kafka_jars()}/*", "org.apache.kafka.tools.DumpLogSegments"]
    command += [decoder, "--print-data-log", "--files", str(segment)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    found = re.findall(r"^\| offset: .*? key: (.*?)(?: payload: (.*))?$", output, re.MULTILINE)
    assert len(found) == len(log), output
    return [(_parsed(key), _parsed(value)) for key, value in found]


def _parsed(text: str) -> object:
    return json.loads(text) if text.startswith("{") else text


@pytest.mark.kafka
def test_the_transaction_log(tmp_path: Path):
    txn = Transactions()
    txn.init()
    txn.add(1000, 0, P0, P1)
    txn.decide(1000, 0, True)
    txn.finish()
    txn.log_it(txn.coordinator.forget(ID, txn.now))
    records = dumped(txn.log, "__transaction_state", "--transaction-log-decoder", tmp_path)
    assert [key for key, _ in records] == [{"type": "0", "data": {"transactionalId": ID}}] * 5
    values = [value["data"] for _, value in records[:-1] if isinstance(value, dict)]
    assert [value["transactionStatus"] for value in values] == [0, 1, 2, 4]
    assert [value["producerEpoch"] for value in values] == [0, 0, 1, 1]
    assert [value["transactionPartitions"] for value in values] == [
        None,
        [{"topic": "orders", "partitionIds": [0, 1]}],
        [{"topic": "orders", "partitionIds": [0, 1]}],
        None,
    ]
    assert values[2]["clientTransactionVersion"] == 2
    assert records[-1][1] == "<DELETE>"


@pytest.mark.kafka
def test_a_kept_transaction_in_the_transaction_log(tmp_path: Path):
    """KIP-939's tags: Kafka 4.3.1 has them in its schema, and its value reads back what ours wrote."""
    txn = Transactions()
    txn.init(two_phase=True)
    txn.add(1000, 0)
    txn.init(two_phase=True, keep=True)
    txn.decide(1000, 1, True)
    records = dumped(txn.log, "__transaction_state", "--transaction-log-decoder", tmp_path)
    values = [value["data"] for _, value in records if isinstance(value, dict)]
    names = ("producerId", "producerEpoch", "nextProducerId", "nextProducerEpoch", "transactionTimeoutMs")
    found = [tuple(value.get(name, -1) for name in names) for value in values]
    endless = 2**31 - 1
    assert found == [
        (1000, 0, -1, -1, endless),
        (1000, 0, -1, -1, endless),
        (1000, 0, 1000, 1, endless),
        (1000, 1, 1000, 2, endless),
    ]


@pytest.mark.kafka
def test_the_offsets_log(tmp_path: Path):
    groups = Groups()
    (member,) = groups.stable()
    groups.commit(5, member=member, generation=1)
    groups.commit_in(9, 6, member=member, generation=1)
    groups.end_transaction(9, True)
    groups.leave(member)
    groups.coordinator.delete_group("g")
    groups.settle()
    records = dumped(groups.log, "__consumer_offsets", "--offsets-decoder", tmp_path)
    group_key = {"type": "2", "data": {"group": "g"}}
    offset_key = {"type": "1", "data": {"group": "g", "topic": "orders", "partition": 0}}
    keys = [key if isinstance(key, dict) else "skipped" for key, _ in records]
    assert keys == [group_key, offset_key, "skipped", offset_key, "skipped", group_key, offset_key, group_key]
    values = [value["data"] if isinstance(value, dict) else value for _, value in records]
    assert isinstance(values[0], dict)
    assert (values[0]["generation"], values[0]["members"][0]["memberId"]) == (1, member)
    assert [values[number]["offset"] for number in (1, 3)] == [5, 6]  # type: ignore[index]
    assert values[6:] == ["<DELETE>", "<DELETE>"]


@pytest.mark.kafka
def test_the_records_of_consumer_groups(tmp_path: Path):
    groups = Consumers(t=2)
    groups.join("m1", pattern="t")
    groups.join("m2", instance="i", assignor="range")
    groups.heartbeat("m1", 2)
    groups.heartbeat("m2", -1, instance="i")
    records = dumped(groups.log, "__consumer_offsets", "--offsets-decoder", tmp_path)
    found: dict[str, list[object]] = {}
    for key, value in records:
        assert isinstance(key, dict), f"Apache Kafka cannot read {key}"
        found.setdefault(key["type"], []).append(value["data"] if isinstance(value, dict) else value)
    assert [item["epoch"] for item in found["3"]] == [1, 2, 3, 4]  # type: ignore[index]
    member = found["5"][0]
    assert isinstance(member, dict)
    assert (member["clientId"], member["subscribedTopicNames"], member["subscribedTopicRegex"]) == ("c", ["t"], "t")
    assert [item["assignmentEpoch"] for item in found["6"]] == [2, 3]  # type: ignore[index]
    assert [item["topicPartitions"][0]["partitions"] for item in found["7"][:3]] == [[0, 1], [1], [0]]  # type: ignore[index]
    last = found["8"][-2]
    assert isinstance(last, dict)
    assert (last["memberEpoch"], last["previousMemberEpoch"], last["state"]) == (2, 0, 1)
    assert [last[name][0]["partitions"] for name in ("assignedPartitions", "partitionsPendingRevocation")] == [[1], [0]]
    assert last["assignedPartitions"][0]["assignmentEpochs"] == [2]
    assert found["16"][0]["topics"] == ["t"]  # type: ignore[index]
    assert found["5"][-1] == found["7"][-1] == found["8"][-1] == "<DELETE>"

"""Apache Kafka's own `kafka-transactions` against the embedded broker: list, describe, find and end transactions."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from semel.broker.embedded import EmbeddedBroker
from semel.broker.node import Node
from tests.broker.core import batch
from tests.broker.test_against_kafka import Probe
from tests.conftest import unavailable
from tests.services.kafka import kafka_jars, missing_tools

HOUR_MS = 3_600_000
ONE_AFTER_THE_OTHER = """
public class Commands {
    public static void main(String[] arguments) throws Exception {
        org.apache.kafka.common.utils.Exit.setExitProcedure((code, message) -> {
            throw new IllegalStateException("exit " + code);
        });
        var input = new java.io.BufferedReader(new java.io.InputStreamReader(System.in));
        for (String line; (line = input.readLine()) != null; ) {
            System.out.println("> " + line);
            try {
                org.apache.kafka.tools.TransactionsCommand.main(line.split(" "));
            } catch (IllegalStateException end) {
                System.err.println(end.getMessage());
            }
        }
    }
}
"""
"""The tool's own main, several times in one JVM: starting one takes longer than all of them together."""


def kafka_transactions(folder: Path, bootstrap: str, *commands: str) -> tuple[list[list[dict[str, str]]], str]:
    """The table that each command printed, row by row, and what went to stderr."""
    source = folder / "Commands.java"
    source.write_text(ONE_AFTER_THE_OTHER)
    lines = "".join(f"--bootstrap-server {bootstrap} {command}\n" for command in commands)
    java = ["java", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Dorg.slf4j.simpleLogger.defaultLogLevel=error"]
    java += ["-cp", f"{kafka_jars()}/*", str(source)]
    done = subprocess.run(java, input=lines, capture_output=True, text=True, timeout=90, check=False)
    tables = []
    for output in done.stdout.split("> --bootstrap-server")[1:]:
        rows = [line.split("\t") for line in output.splitlines()[1:] if "\t" in line]
        titles = [title.strip() for title in rows[0]] if rows else []
        tables.append([dict(zip(titles, (cell.strip() for cell in row), strict=False)) for row in rows[1:]])
    return tables, done.stderr


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[EmbeddedBroker]:
    if missing_tools():
        unavailable("Java tools", f"{' and '.join(missing_tools())} not found")
    with EmbeddedBroker(tmp_path / "data") as broker:
        yield broker


def hang(node: Node, topic: str) -> None:
    """Data of a transaction that no coordinator knows, written an hour ago. No client of ours can bring it about."""
    partition = node.topics.partition(topic, 0)
    assert partition is not None
    then = node.env.wall_ms() - HOUR_MS
    data = batch(b"x", producer_id=77, producer_epoch=3, base_sequence=0, transactional=True, timestamp_ms=then)
    partition.log.append(bytearray(data), then)


def test_the_tool_lists_describes_finds_and_ends_transactions(broker: EmbeddedBroker, tmp_path: Path) -> None:
    probe = Probe(broker.address)
    probe.create("a")
    topic, txn = probe.topic("a"), probe.topic("txn")

    def init(**flags: Any) -> Any:
        nobody = {"producer_id": -1, "producer_epoch": -1}
        return probe.ask(22, 6, transactional_id=txn, transaction_timeout=0, enable2_pc=True, **nobody, **flags)

    answer = init()
    probe.identity = (answer.producer_id, answer.producer_epoch)
    assert probe.produce("a", probe.data(transactional=True), 12, txn) == (0, 0)
    kept = init(keep_prepared_txn=True)
    assert kept.producer_epoch == answer.producer_epoch + 1
    time.sleep(0.02)  # A duration that is longer than the filter below, by the broker's clock.
    broker.call(lambda node: hang(node, topic))
    tables, errors = kafka_transactions(
        tmp_path,
        broker.address,
        "list",
        "list --duration-filter 10",
        "list --duration-filter 3600000",
        f"list --transactional-id-pattern {txn[:3]}.*",
        f"describe --transactional-id {txn}",
        f"describe-producers --topic {topic} --partition 0",
        "find-hanging --broker-id 1",
        f"abort --topic {topic} --partition 0 --start-offset 1",
        "find-hanging --broker-id 1",
        f"forceTerminateTransaction --transactionalId {txn}",
        f"describe --transactional-id {txn}",
        f"describe-producers --topic {topic} --partition 0",
        f"abort --topic {topic} --partition 0 --start-offset 0",
    )
    assert len(tables) == 13, errors
    listed, older, oldest, matching, open_one, producers, hanging, _, hanging_after = tables[:9]
    ended, producers_after = tables[10:12]
    row = {"TransactionalId": txn, "Coordinator": "1", "ProducerId": str(answer.producer_id)}
    assert [item | row for item in listed] == listed
    assert [item["TransactionState"] for item in listed] == ["Ongoing"]
    assert (older, oldest, matching) == (listed, [], listed)
    [found] = open_one
    assert (found["ProducerEpoch"], found["TransactionState"]) == ("0", "Ongoing"), "the identity of the data"
    assert found["TransactionTimeoutMs"] == str(2**31 - 1)
    assert found["TopicPartitions"] == f"{topic}-0"
    by_id = {item["ProducerId"]: item for item in producers}
    assert by_id["77"]["CurrentTransactionStartOffset"] == "1"
    assert by_id[str(answer.producer_id)]["CurrentTransactionStartOffset"] == "0"
    assert by_id[str(answer.producer_id)]["LatestCoordinatorEpoch"] == "-1"
    assert [(item["Topic"], item["ProducerId"], item["StartOffset"]) for item in hanging] == [(topic, "77", "1")]
    assert hanging_after == []
    [after] = ended
    assert (after["TransactionState"], after["ProducerEpoch"]) == ("Empty", str(kept.producer_epoch + 2))
    assert {item["CurrentTransactionStartOffset"] for item in producers_after} == {"None"}
    assert "Could not find any open transactions" in errors
    assert probe.offsets("a", -1, isolation=1) == probe.offsets("a", -1) == [(0, 4)], "readers go on"
    probe.close()


def test_abort_of_a_transaction_that_is_not_hanging_is_refused(broker: EmbeddedBroker, tmp_path: Path) -> None:
    """Apache Kafka aborts it in this one partition, and its producer then commits the others."""
    probe = Probe(broker.address)
    probe.create("a")
    probe.create("b")
    txn = probe.topic("txn")
    assert probe.init(txn, transaction_timeout=600_000) == 0  # A JVM may take its time to start.
    for name in ("a", "b"):
        assert probe.produce(name, probe.data(transactional=True), 12, txn) == (0, 0)
    tables, errors = kafka_transactions(
        tmp_path, broker.address, f"abort --topic {probe.topic('a')} --partition 0 --start-offset 0"
    )
    assert "INVALID_TXN_STATE" in errors or "InvalidTxnState" in errors, (tables, errors)
    assert probe.end(txn, True, 5) == 0
    assert [probe.offsets(name, -1, isolation=1) for name in ("a", "b")] == [[(0, 2)], [(0, 2)]]
    probe.close()

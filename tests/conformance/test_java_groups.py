"""Java consumers of both protocols and Apache Kafka's group tools against the embedded broker."""

from __future__ import annotations

import json
import subprocess
import time
import uuid
from pathlib import Path

import pytest
from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient, NewTopic

from tests.conformance.test_java_clients import TOOLS, java, needs_java
from tests.conftest import Address
from tests.services.kafka import kafka_jars

__all__ = ["needs_java"]

pytestmark = pytest.mark.peers  # A dozen Java processes.

WAIT = 30


@pytest.fixture
def topic(embedded: Address) -> str:
    """A topic of four partitions with 400 records."""
    name = f"java-{uuid.uuid4().hex[:8]}"
    admin = AdminClient({"bootstrap.servers": embedded.bootstrap})
    admin.create_topics([NewTopic(name, 4, 1)])[name].result(WAIT)
    producer = Producer({"bootstrap.servers": embedded.bootstrap})
    for number in range(400):
        producer.produce(name, b"%d" % number, partition=number % 4)
    assert producer.flush(WAIT) == 0
    return name


def _events(output: str, name: str) -> list[dict[str, object]]:
    return [
        event for line in output.splitlines() if line.startswith("{") and (event := json.loads(line))["name"] == name
    ]


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_verifiable_consumers_share_a_topic(embedded: Address, topic: str, protocol: str, tmp_path: Path) -> None:
    command = ["java", "-Xmx128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", f"{kafka_jars()}/*"]
    command += [f"{TOOLS}.VerifiableConsumer", "--bootstrap-server", embedded.bootstrap, "--topic", topic]
    command += ["--group-id", f"{protocol}-{topic}", "--group-protocol", protocol, "--reset-policy", "earliest"]
    command += ["--session-timeout", "10000"] if protocol == "classic" else []
    outputs = [tmp_path / str(number) for number in range(2)]
    processes = []
    try:
        for output in outputs:
            with output.open("wb") as file:
                processes.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT))
        admin = AdminClient({"bootstrap.servers": embedded.bootstrap})
        producer = Producer({"bootstrap.servers": embedded.bootstrap})
        deadline = time.monotonic() + 60
        while True:
            found = admin.describe_consumer_groups([f"{protocol}-{topic}"])[f"{protocol}-{topic}"]
            try:
                shares = sorted(len(item.assignment.topic_partitions) for item in found.result(WAIT).members)
            except Exception:
                shares = []
            if shares == [2, 2]:
                break
            assert time.monotonic() < deadline, shares
            time.sleep(0.2)
        for number in range(400, 800):
            producer.produce(topic, b"%d" % number, partition=number % 4)
        assert producer.flush(WAIT) == 0

        def consumed() -> list[tuple[object, object, object]]:
            return [
                (item["partition"], item["minOffset"], item["maxOffset"])
                for output in outputs
                for event in _events(output.read_text(), "records_consumed")
                for item in event["partitions"]  # type: ignore[attr-defined]
            ]

        while sum(last - first + 1 for _, first, last in consumed()) < 800:  # type: ignore[operator]
            assert time.monotonic() < deadline, consumed()
            time.sleep(0.2)
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(WAIT)
        ranges = sorted(consumed())  # type: ignore[type-var]
        assert len({(part, first) for part, first, _ in ranges}) == len(ranges), "no record was read twice"
        assert all(_events(output.read_text(), "shutdown_complete") for output in outputs)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_group_tools(embedded: Address, topic: str) -> None:
    server, group = ("--bootstrap-server", embedded.bootstrap), f"group-{topic}"

    def tool(*arguments: str, name: str = f"{TOOLS}.consumer.group.ConsumerGroupCommand") -> str:
        done = java(name, *server, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    consumer = Consumer(
        {
            "bootstrap.servers": embedded.bootstrap,
            "group.id": group,
            "group.protocol": "consumer",
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
        }
    )
    consumer.subscribe([topic])
    read = 0
    while read < 400:
        read += len([message for message in consumer.consume(100, 1) if message.error() is None])
    consumer.commit(asynchronous=False)

    state = tool("--describe", "--group", group, "--state")
    assert "Stable" in state
    assert "uniform" in state
    members = tool("--describe", "--group", group, "--members", "--verbose")
    assert "rdkafka" in members
    assert f"{topic}(0,1,2,3)" in members.replace(" ", "") or f"{topic}:0,1,2,3" in members
    offsets = tool("--describe", "--group", group, "--offsets")
    lags = [line.split()[5] for line in offsets.splitlines() if topic in line and line.startswith(group)]
    assert lags == ["0"] * 4, offsets
    listed = tool("--list", "--state", "--type")
    assert [line.split()[1:] for line in listed.splitlines() if line.startswith(group)] == [["Consumer", "Stable"]]
    listed = tool("--list", name=f"{TOOLS}.GroupsCommand")
    assert [line.split()[1:] for line in listed.splitlines() if line.startswith(group)] == [["Consumer", "consumer"]]
    consumer.close()

    reset = ("--reset-offsets", "--group", group, "--topic", topic)
    tool(*reset, "--to-offset", "7", "--execute")
    offsets = tool("--describe", "--group", group, "--offsets")
    assert [line.split()[3] for line in offsets.splitlines() if line.startswith(group)] == ["7"] * 4
    tool("--delete-offsets", "--group", group, "--topic", topic)
    assert group not in tool("--describe", "--group", group, "--offsets").replace(f"'{group}'", "")
    assert "successful" in tool("--delete", "--group", group)
    assert group not in tool("--list")

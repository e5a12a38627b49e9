"""Apache Kafka's own command line clients against the embedded broker: what any Java program will send us."""

from __future__ import annotations

import json
import subprocess
import uuid

import pytest

from tests.conftest import Address, unavailable
from tests.services.kafka import kafka_jars, missing_tools

TOOLS = "org.apache.kafka.tools"


def java(main_class: str, *arguments: str, stdin: str = "", timeout: float = 60) -> subprocess.CompletedProcess[str]:
    command = [
        "java",
        "-Xmx256m",
        "-XX:+UseSerialGC",
        "-XX:TieredStopAtLevel=1",
        "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
    ]
    command += ["-cp", f"{kafka_jars()}/*", main_class, *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(autouse=True)
def needs_java() -> None:
    if missing_tools():
        unavailable("Java tools", f"{' and '.join(missing_tools())} not found")


def topic_name() -> str:
    return f"java-{uuid.uuid4().hex[:8]}"


def test_console_producer_and_consumer(embedded: Address) -> None:
    topic = topic_name()
    lines = [f"key-{number}:value-{number}" for number in range(200)]
    produced = java(
        "org.apache.kafka.tools.ConsoleProducer",
        "--bootstrap-server", embedded.bootstrap, "--topic", topic,
        "--reader-property", "parse.key=true", "--reader-property", "key.separator=:",
        stdin="\n".join(lines) + "\n",
    )  # fmt: skip
    assert produced.returncode == 0, produced.stderr
    consumed = java(
        f"{TOOLS}.consumer.ConsoleConsumer",
        "--bootstrap-server", embedded.bootstrap, "--topic", topic, "--from-beginning", "--max-messages", "200",
        "--timeout-ms", "20000", "--isolation-level", "read_committed",
        "--formatter-property", "print.key=true", "--formatter-property", "key.separator=:",
    )  # fmt: skip
    assert sorted(consumed.stdout.split()) == sorted(lines), consumed.stderr


def test_verifiable_producer_is_acknowledged_for_every_record(embedded: Address) -> None:
    topic = topic_name()
    done = java(
        f"{TOOLS}.VerifiableProducer",
        "--bootstrap-server", embedded.bootstrap, "--topic", topic, "--max-messages", "2000",
    )  # fmt: skip
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    summary = next(event for event in events if event["name"] == "tool_data")
    assert (summary["sent"], summary["acked"]) == (2000, 2000), done.stderr
    positions = {(event["partition"], event["offset"]) for event in events if event["name"] == "producer_send_success"}
    assert len(positions) == 2000


def test_transactional_copier_with_aborts_copies_each_record_once(embedded: Address) -> None:
    source, target, group = topic_name(), topic_name(), f"group-{uuid.uuid4().hex[:6]}"
    for topic in (source, target):
        made = java(
            f"{TOOLS}.TopicCommand",
            "--bootstrap-server",
            embedded.bootstrap,
            "--create",
            "--topic",
            topic,
            "--partitions",
            "1",
        )
        assert made.returncode == 0, made.stdout + made.stderr
    produced = java(
        f"{TOOLS}.VerifiableProducer",
        "--bootstrap-server", embedded.bootstrap, "--topic", source, "--max-messages", "500",
    )  # fmt: skip
    assert '"acked":500' in produced.stdout, produced.stderr
    copied = java(
        f"{TOOLS}.TransactionalMessageCopier",
        "--broker-list", embedded.bootstrap, "--transactional-id", f"copier-{group}", "--input-topic", source,
        "--input-partition", "0", "--output-topic", target, "--consumer-group", group, "--transaction-size", "50",
        "--max-messages", "500", "--enable-random-aborts", "--use-group-metadata",
    )  # fmt: skip
    assert copied.returncode == 0, copied.stderr
    read = java(
        f"{TOOLS}.consumer.ConsoleConsumer",
        "--bootstrap-server", embedded.bootstrap, "--topic", target, "--from-beginning", "--timeout-ms", "4000",
        "--isolation-level", "read_committed",
    )  # fmt: skip
    assert sorted(map(int, read.stdout.split())) == list(range(500)), read.stderr[-500:]


@pytest.mark.peers
def test_kafka_configs_and_kafka_topics(embedded: Address) -> None:
    topic, server = topic_name(), ("--bootstrap-server", embedded.bootstrap)

    def tool(name: str, *arguments: str) -> str:
        done = java(name, *server, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    topics, configs = f"{TOOLS}.TopicCommand", "kafka.admin.ConfigCommand"
    tool(topics, "--create", "--topic", topic, "--partitions", "2", "--config", "retention.ms=5000")
    tool(topics, "--alter", "--topic", topic, "--partitions", "3")
    found = tool(topics, "--describe", "--topic", topic)
    assert "PartitionCount: 3" in found.replace("\t", " ")
    assert "retention.ms=5000" in found
    entity = ("--entity-type", "topics", "--entity-name", topic)
    tool(configs, *entity, "--alter", "--add-config", "cleanup.policy=[compact,delete],max.message.bytes=2000")
    tool(configs, *entity, "--alter", "--delete-config", "retention.ms")
    found = tool(configs, *entity, "--describe")
    assert "cleanup.policy=compact,delete" in found
    assert "DYNAMIC_TOPIC_CONFIG:max.message.bytes=2000" in found
    assert "retention.ms" not in found
    broker = ("--entity-type", "brokers", "--entity-name", "1")
    tool(configs, *broker, "--alter", "--add-config", "log.cleaner.min.compaction.lag.ms=3")
    found = tool(configs, *broker, "--describe")
    assert "log.cleaner.min.compaction.lag.ms=3 sensitive=false" in found
    tool(configs, *broker, "--alter", "--delete-config", "log.cleaner.min.compaction.lag.ms")
    group = ("--entity-type", "groups", "--entity-name", topic)
    tool(configs, *group, "--alter", "--add-config", "consumer.session.timeout.ms=46000")
    assert "consumer.session.timeout.ms=46000" in tool(configs, *group, "--describe")
    tool(topics, "--delete", "--topic", topic)
    assert topic not in tool(topics, "--list")

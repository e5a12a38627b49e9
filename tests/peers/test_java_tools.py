"""Apache Kafka's own command line tools at work on the embedded broker and, to check the check, on Apache Kafka."""

from __future__ import annotations

import json
import re
import subprocess
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from semel.broker.config import BrokerConfig
from tests.conftest import unavailable
from tests.peers.outcomes import Verdict, settle
from tests.peers.serve import ConfiguredBroker
from tests.services.kafka import KafkaNode, kafka_jars, missing_tools

pytestmark = [pytest.mark.peers, pytest.mark.timeout(900)]

AT_ONCE = 3
SOURCE = "Apache Kafka 4.3.1, `kafka-tools` and `kafka_2.13` from Maven Central"
_TOOLS = "org.apache.kafka.tools"


class Tools:
    """The tools against one broker, with names of their own."""

    def __init__(self, bootstrap: str) -> None:
        self.bootstrap = bootstrap

    def name(self) -> str:
        return f"tools-{uuid.uuid4().hex[:8]}"

    def java(self, main_class: str, *arguments: str, stdin: str = "", timeout: float = 300, code: int = 0) -> str:
        """Standard output of a tool that must exit with this code; what it complains of, too, when that is not 0."""
        main = main_class if main_class.startswith("kafka.") else f"{_TOOLS}.{main_class}"
        command = ["nice", "-n", "10", "java", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
        command += ["-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", "-cp", f"{kafka_jars()}/*", main, *arguments]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout, check=False)
        assert done.returncode == code, (
            f"{main} ended with {done.returncode}: {done.stdout[-800:]} {done.stderr[-800:]}"
        )
        return done.stdout + done.stderr if code else done.stdout

    def tool(self, main_class: str, *arguments: str, **more: object) -> str:
        return self.java(main_class, "--bootstrap-server", self.bootstrap, *arguments, **more)  # type: ignore[arg-type]

    def topic(self, partitions: int = 1, *settings: str) -> str:
        name = self.name()
        options = [word for setting in settings for word in ("--config", setting)]
        self.tool("TopicCommand", "--create", "--topic", name, "--partitions", str(partitions), *options)
        return name

    def filled(self, count: int = 200, partitions: int = 1) -> str:
        topic = self.topic(partitions)
        self.tool("VerifiableProducer", "--topic", topic, "--max-messages", str(count))
        return topic

    def consumed(self, topic: str, count: int, group: str, *options: str) -> list[str]:
        options = (
            "--from-beginning",
            "--group",
            group,
            "--max-messages",
            str(count),
            "--timeout-ms",
            "30000",
            *options,
        )
        text = self.tool("consumer.ConsoleConsumer", "--topic", topic, *options)
        return [line for line in text.splitlines() if line and not line.startswith("Processed")]


def kafka_topics(t: Tools) -> None:
    topic = t.topic(3, "retention.ms=1000000")
    shown = t.tool("TopicCommand", "--describe", "--topic", topic)
    assert "PartitionCount: 3" in shown
    assert "ReplicationFactor: 1" in shown
    assert "retention.ms=1000000" in shown
    assert shown.count("Leader: 1") == 3
    assert topic in t.tool("TopicCommand", "--list").split()
    t.tool("TopicCommand", "--alter", "--topic", topic, "--partitions", "5")
    assert "PartitionCount: 5" in t.tool("TopicCommand", "--describe", "--topic", topic)
    assert "already exists" in t.tool("TopicCommand", "--create", "--topic", topic, code=1)
    t.tool("TopicCommand", "--create", "--if-not-exists", "--topic", topic)
    assert "InvalidPartitionsException" in t.tool(
        "TopicCommand", "--alter", "--topic", topic, "--partitions", "2", code=1
    )
    assert not t.tool("TopicCommand", "--describe", "--under-replicated-partitions").strip()
    t.tool("TopicCommand", "--delete", "--topic", topic)
    assert topic not in t.tool("TopicCommand", "--list").split()
    assert "does not exist" in t.tool("TopicCommand", "--describe", "--topic", topic, code=1)


def kafka_topics_beyond_one_node(t: Tools) -> None:
    refused = t.tool("TopicCommand", "--create", "--topic", t.name(), "--replication-factor", "3", code=1)
    assert "InvalidReplicationFactorException" in refused


def kafka_configs_of_a_topic(t: Tools) -> None:
    topic = t.topic()
    entity = ("--entity-type", "topics", "--entity-name", topic)
    change = "cleanup.policy=[compact,delete],max.message.bytes=5000"
    t.tool("kafka.admin.ConfigCommand", "--alter", *entity, "--add-config", change)
    shown = t.tool("kafka.admin.ConfigCommand", "--describe", *entity)
    assert "cleanup.policy=compact,delete" in shown
    assert "max.message.bytes=5000" in shown
    t.tool("kafka.admin.ConfigCommand", "--alter", *entity, "--delete-config", "max.message.bytes")
    assert "max.message.bytes" not in t.tool("kafka.admin.ConfigCommand", "--describe", *entity)
    everything = t.tool("kafka.admin.ConfigCommand", "--describe", "--all", *entity)
    assert "max.message.bytes=1048588" in everything
    wrong = t.tool("kafka.admin.ConfigCommand", "--alter", *entity, "--add-config", "retention.ms=soon", code=1)
    assert "InvalidConfigurationException" in wrong or "Invalid value" in wrong


def kafka_configs_of_the_broker(t: Tools) -> None:
    entity = ("--entity-type", "brokers", "--entity-name", "1")
    t.tool("kafka.admin.ConfigCommand", "--alter", *entity, "--add-config", "log.retention.ms=7000000")
    assert "log.retention.ms=7000000" in t.tool("kafka.admin.ConfigCommand", "--describe", *entity)
    t.tool("kafka.admin.ConfigCommand", "--alter", *entity, "--delete-config", "log.retention.ms")
    assert "log.retention.ms=" not in t.tool("kafka.admin.ConfigCommand", "--describe", *entity)


def kafka_configs_of_a_group(t: Tools) -> None:
    entity = ("--entity-type", "groups", "--entity-name", t.name())
    t.tool("kafka.admin.ConfigCommand", "--alter", *entity, "--add-config", "consumer.session.timeout.ms=50000")
    assert "consumer.session.timeout.ms=50000" in t.tool("kafka.admin.ConfigCommand", "--describe", *entity)


def console_producer_and_consumer(t: Tools) -> None:
    topic = t.topic(2)
    lines = [f"k{number}:v{number}" for number in range(100)]
    properties = ("--reader-property", "parse.key=true", "--reader-property", "key.separator=:")
    for codec in ("none", "gzip", "snappy", "lz4", "zstd"):
        sent = "\n".join(lines) + "\n"
        t.tool("ConsoleProducer", "--topic", topic, "--compression-codec", codec, *properties, stdin=sent)
    shown = ("--formatter-property", "print.key=true", "--formatter-property", "key.separator=:")
    assert sorted(t.consumed(topic, 500, t.name(), *shown)) == sorted(lines * 5)


def verifiable_producer(t: Tools) -> None:
    topic = t.topic(4)
    text = t.tool("VerifiableProducer", "--topic", topic, "--max-messages", "5000", "--acks", "-1")
    events = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    summary = next(event for event in events if event["name"] == "tool_data")
    assert (summary["sent"], summary["acked"]) == (5000, 5000)
    places = {(event["partition"], event["offset"]) for event in events if event["name"] == "producer_send_success"}
    assert len(places) == 5000


def _verifiable_consumer(t: Tools, *options: str) -> None:
    topic = t.filled(1000, partitions=3)
    options = (
        "--topic",
        topic,
        "--group-id",
        t.name(),
        "--max-messages",
        "1000",
        "--reset-policy",
        "earliest",
        *options,
    )
    text = t.tool("VerifiableConsumer", *options)
    events = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    read = sum(event["count"] for event in events if event["name"] == "records_consumed")
    committed = [event for event in events if event["name"] == "offsets_committed"]
    assert read == 1000
    assert committed
    assert all(event["success"] for event in committed)


def verifiable_consumer_classic(t: Tools) -> None:
    _verifiable_consumer(t, "--group-protocol", "classic")


def verifiable_consumer_static(t: Tools) -> None:
    _verifiable_consumer(t, "--group-protocol", "classic", "--group-instance-id", "one")


def verifiable_consumer_kip_848(t: Tools) -> None:
    _verifiable_consumer(t, "--group-protocol", "consumer")


def kafka_consumer_groups(t: Tools) -> None:
    topic, group = t.filled(100), t.name()
    command = "consumer.group.ConsumerGroupCommand"
    assert len(t.consumed(topic, 60, group)) == 60
    assert group in t.tool(command, "--list").split()
    row = next(line for line in t.tool(command, "--describe", "--group", group).splitlines() if topic in line)
    assert row.split()[2:6] == ["0", "60", "100", "40"], row
    assert "Empty" in t.tool(command, "--describe", "--group", group, "--state")
    assert (
        len(t.tool(command, "--describe", "--group", group, "--members").strip().splitlines()) == 1
    )  # The head alone.
    reset = ("--reset-offsets", "--group", group, "--topic", topic)
    assert "25" in t.tool(command, *reset, "--to-offset", "25", "--dry-run")
    t.tool(command, *reset, "--shift-by", "-10", "--execute")
    assert re.search(rf"{topic}\s+0\s+50\s+100\s+50", t.tool(command, "--describe", "--group", group))
    for how, offset in (("--to-earliest", 0), ("--to-latest", 100)):
        t.tool(command, *reset, how, "--execute")
        assert re.search(rf"{topic}\s+0\s+{offset}\s+100", t.tool(command, "--describe", "--group", group))
    t.tool(command, *reset, "--to-datetime", "2020-01-01T00:00:00.000", "--execute")
    assert re.search(rf"{topic}\s+0\s+0\s+100", t.tool(command, "--describe", "--group", group))
    assert "Successful" in t.tool(command, "--delete-offsets", "--group", group, "--topic", topic)
    t.tool(command, "--delete", "--group", group)
    assert group not in t.tool(command, "--list").split()


def kafka_consumer_groups_with_members(t: Tools) -> None:
    topic, group = t.filled(10, partitions=2), t.name()
    command = "consumer.group.ConsumerGroupCommand"
    arguments = ("--topic", topic, "--group-id", group, "--reset-policy", "earliest")
    java = ["java", "-Xmx256m", "-XX:TieredStopAtLevel=1", "-cp", f"{kafka_jars()}/*", f"{_TOOLS}.VerifiableConsumer"]
    member = subprocess.Popen(
        [*java, "--bootstrap-server", t.bootstrap, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert member.stdout is not None
        for line in member.stdout:
            if "offsets_committed" in line:
                break
        assert "Stable" in t.tool(command, "--describe", "--group", group, "--state")
        members = t.tool(command, "--describe", "--group", group, "--members", "--verbose")
        assert f"{topic}(0,1)" in members or f"{topic}:0,1" in members or re.search(rf"{topic}\S*0,1", members), members
        assert "is not empty" in t.tool(command, "--delete", "--group", group)
    finally:
        member.terminate()
        member.wait(20)


def kafka_groups(t: Tools) -> None:
    topic, group = t.filled(5), t.name()
    t.consumed(topic, 5, group)
    assert re.search(rf"{group}\s+Classic\s+consumer", t.tool("GroupsCommand", "--list"))


def kafka_transactions(t: Tools) -> None:
    topic, transactional_id = t.topic(), t.name()
    performance = ("--topic", topic, "--num-records", "200", "--record-size", "50", "--throughput", "100")
    t.tool(
        "ProducerPerformance", *performance, "--transactional-id", transactional_id, "--transaction-duration-ms", "300"
    )
    listed = t.tool("TransactionsCommand", "list")
    assert re.search(rf"{transactional_id}\s+\d+\s+\d+\s+CompleteCommit", listed), listed
    shown = t.tool("TransactionsCommand", "describe", "--transactional-id", transactional_id)
    assert "CompleteCommit" in shown
    producers = t.tool("TransactionsCommand", "describe-producers", "--topic", topic, "--partition", "0")
    assert re.search(r"^\d+\s+\d+\s+\d+\s+-?\d+\s+\d+\s+None", producers, re.MULTILINE), producers
    hanging = t.tool("TransactionsCommand", "find-hanging", "--topic", topic, "--partition", "0")
    assert topic not in hanging


def kafka_transactions_abort(t: Tools) -> None:
    """A producer that is killed in a transaction, and an operator who ends it."""
    topic, transactional_id = t.topic(), t.name()
    java = ["java", "-Xmx256m", "-XX:TieredStopAtLevel=1", "-cp", f"{kafka_jars()}/*", f"{_TOOLS}.ProducerPerformance"]
    performance = ("--topic", topic, "--num-records", "100000", "--record-size", "50", "--throughput", "200")
    identity = ("--transactional-id", transactional_id, "--transaction-duration-ms", "600000")
    producer = subprocess.Popen(
        [*java, "--bootstrap-server", t.bootstrap, *performance, *identity], stdout=subprocess.DEVNULL
    )
    try:
        for _ in range(30):
            listed = t.tool("TransactionsCommand", "list")
            if re.search(rf"{transactional_id}\s+\d+\s+\d+\s+Ongoing", listed):
                break
        else:
            raise AssertionError(listed)
    finally:
        producer.kill()
        producer.wait(20)
    t.tool("TransactionsCommand", "forceTerminateTransaction", "--transactionalId", transactional_id)
    shown = t.tool("TransactionsCommand", "describe", "--transactional-id", transactional_id)
    assert "Ongoing" not in shown, shown


def kafka_get_offsets(t: Tools) -> None:
    topic = t.filled(70)
    assert f"{topic}:0:70" in t.tool("GetOffsetShell", "--topic", topic)
    assert f"{topic}:0:0" in t.tool("GetOffsetShell", "--topic", topic, "--time", "earliest")
    assert re.search(rf"{topic}:0:\d+", t.tool("GetOffsetShell", "--topic", topic, "--time", "max-timestamp"))


def kafka_delete_records(t: Tools, folder: Path) -> None:
    topic = t.filled(50)
    plan = folder / f"{topic}.json"
    plan.write_text(json.dumps({"version": 1, "partitions": [{"topic": topic, "partition": 0, "offset": 30}]}))
    assert "low_watermark: 30" in t.tool("DeleteRecordsCommand", "--offset-json-file", str(plan))
    assert f"{topic}:0:30" in t.tool("GetOffsetShell", "--topic", topic, "--time", "earliest")


def kafka_log_dirs(t: Tools) -> None:
    topic = t.filled(10)
    text = t.tool("LogDirsCommand", "--describe", "--topic-list", topic)
    found = json.loads(next(line for line in text.splitlines() if line.startswith("{")))
    (partition,) = found["brokers"][0]["logDirs"][0]["partitions"]
    assert partition["partition"] == f"{topic}-0"
    assert partition["size"] > 0


def kafka_leader_election(t: Tools) -> None:
    topic = t.topic()
    chosen = ("--election-type", "preferred", "--topic", topic, "--partition", "0")
    assert f"already elected for partitions {topic}-0" in t.tool("LeaderElectionCommand", *chosen)
    t.tool("LeaderElectionCommand", "--election-type", "preferred", "--all-topic-partitions")


def kafka_reassign_partitions(t: Tools, folder: Path) -> None:
    topic = t.topic(2)
    plan = folder / f"{topic}.json"
    partitions = [{"topic": topic, "partition": index, "replicas": [1]} for index in (0, 1)]
    plan.write_text(json.dumps({"version": 1, "partitions": partitions}))
    t.tool("reassign.ReassignPartitionsCommand", "--execute", "--reassignment-json-file", str(plan))
    verified = t.tool("reassign.ReassignPartitionsCommand", "--verify", "--reassignment-json-file", str(plan))
    assert verified.count("is completed") == 2, verified
    listed = t.tool("reassign.ReassignPartitionsCommand", "--list")
    assert "No partition reassignments found" in listed


def kafka_metadata_quorum(t: Tools) -> None:
    status = t.tool("MetadataQuorumCommand", "describe", "--status")
    assert re.search(r"LeaderId:\s+1", status), status
    assert "Leader" in t.tool("MetadataQuorumCommand", "describe", "--replication")


def kafka_broker_api_versions(t: Tools) -> None:
    shown = t.tool("BrokerApiVersionsCommand")
    assert "(id: 1 rack: null" in shown
    assert "Produce(0): 0 to 13 [usable: 13]" in shown


def kafka_cluster(t: Tools) -> None:
    assert re.search(r"Cluster ID: \S{8}", t.java("ClusterTool", "cluster-id", "--bootstrap-server", t.bootstrap))


def kafka_features(t: Tools) -> None:
    assert re.search(
        r"transaction\.version\s+SupportedMinVersion: 0\s+SupportedMaxVersion: 2\s+FinalizedVersionLevel: 2",
        t.tool("FeatureCommand", "describe"),
    )


def kafka_producer_perf(t: Tools) -> None:
    topic = t.topic(3)
    options = ("--topic", topic, "--num-records", "20000", "--record-size", "500", "--throughput", "-1")
    for properties in ((), ("--command-property", "acks=1"), ("--command-property", "compression.type=zstd")):
        assert "20000 records sent" in t.tool("ProducerPerformance", *options, *properties)


def kafka_consumer_perf(t: Tools) -> None:
    topic = t.filled(5000)
    shown = t.tool("ConsumerPerformance", "--topic", topic, "--num-records", "5000", "--hide-header")
    assert shown.count(",") >= 9


def kafka_e2e_latency(t: Tools) -> None:
    topic = t.topic()
    options = ("--topic", topic, "--num-records", "200", "--producer-acks", "all", "--record-size", "20")
    assert "Avg latency" in t.tool("EndToEndLatency", *options)


def client_compatibility_test(t: Tools) -> None:
    yes = (
        "offsets-for-times-supported", "cluster-id-supported", "create-topics-supported", "describe-acls-supported",
        "describe-configs-supported", "idempotent-producer-supported",
    )  # fmt: skip
    options = [word for name in yes for word in (f"--{name}", "true")]
    options += ["--expect-record-too-large-exception", "false", "--num-cluster-nodes", "1"]
    assert "SUCCESS" in t.tool("ClientCompatibilityTest", "--topic", t.topic(), *options)


def transactional_message_copier(t: Tools) -> None:
    source, target, group = t.filled(500), t.topic(), t.name()
    t.java(
        "TransactionalMessageCopier",
        "--broker-list", t.bootstrap, "--transactional-id", group, "--input-topic", source, "--input-partition", "0",
        "--output-topic", target, "--consumer-group", group, "--transaction-size", "50", "--max-messages", "500",
        "--enable-random-aborts", "--use-group-metadata",
    )  # fmt: skip
    read = t.consumed(target, 500, t.name(), "--isolation-level", "read_committed")
    assert sorted(map(int, read)) == list(range(500))


CHECKS: tuple[Callable[..., None], ...] = (
    kafka_topics,
    kafka_topics_beyond_one_node,
    kafka_configs_of_a_topic,
    kafka_configs_of_the_broker,
    kafka_configs_of_a_group,
    console_producer_and_consumer,
    verifiable_producer,
    verifiable_consumer_classic,
    verifiable_consumer_static,
    verifiable_consumer_kip_848,
    kafka_consumer_groups,
    kafka_consumer_groups_with_members,
    kafka_groups,
    kafka_transactions,
    kafka_transactions_abort,
    kafka_get_offsets,
    kafka_delete_records,
    kafka_log_dirs,
    kafka_leader_election,
    kafka_reassign_partitions,
    kafka_metadata_quorum,
    kafka_broker_api_versions,
    kafka_cluster,
    kafka_features,
    kafka_producer_perf,
    kafka_consumer_perf,
    kafka_e2e_latency,
    client_compatibility_test,
    transactional_message_copier,
)


def verdict(check: Callable[..., None], bootstrap: str, folder: Path) -> Verdict:
    tools = Tools(bootstrap)
    try:
        if "folder" in check.__annotations__:
            check(tools, folder)
        else:
            check(tools)
    except (AssertionError, subprocess.TimeoutExpired, StopIteration, KeyError, ValueError) as problem:
        return Verdict("failed", f"{type(problem).__name__}: {problem}"[:900])
    return Verdict("passed")


def verdicts(bootstrap: str, folder: Path) -> dict[str, Verdict]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = pool.map(lambda check: verdict(check, bootstrap, folder), CHECKS)
        return dict(zip([check.__name__ for check in CHECKS], found, strict=True))


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[str]:
    if missing_tools():
        unavailable("Java tools", f"{' and '.join(missing_tools())} not found")
    process = ConfiguredBroker(tmp_path / "data", BrokerConfig())
    process.start()
    yield process.bootstrap
    process.stop()


def test_on_our_broker(broker: str, tmp_path: Path) -> None:
    settle("java-tools", SOURCE, verdicts(broker, tmp_path))


def test_on_apache_kafka(kafka: KafkaNode, tmp_path: Path) -> None:
    """What these checks ask is what Apache Kafka does."""
    failed = {
        name: found.detail for name, found in verdicts(kafka.bootstrap, tmp_path).items() if found.state != "passed"
    }
    assert not failed, "\n".join(f"{name}: {detail}" for name, detail in failed.items())

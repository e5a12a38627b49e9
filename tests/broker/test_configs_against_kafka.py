"""The same changes of settings to Apache Kafka 4.3.1 and to the embedded broker: the same codes, texts and values."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.broker.test_against_kafka import Probe
from tests.conftest import Address
from tests.services.kafka import KafkaNode

TOPIC, BROKER, GROUP = 2, 4, 32
SET, DELETE, APPEND, SUBTRACT = range(4)

VALUES = {
    "cleanup.policy": ("x", "", "compact,delete", "delete"),
    "compression.gzip.level": ("0", "10", "-1", "5"),
    "compression.lz4.level": ("0", "18", "9"),
    "compression.type": ("none", "zstd"),
    "compression.zstd.level": ("23", "-131073", "3"),
    "delete.retention.ms": ("-1", "0"),
    "file.delete.delay.ms": ("-1", "5"),
    "flush.messages": ("0", "1"),
    "flush.ms": ("-1", "0"),
    "index.interval.bytes": ("-1", "0"),
    "max.compaction.lag.ms": ("0", "9223372036854775807", "9223372036854775808"),
    "max.message.bytes": ("-1", "2147483648", "1000"),
    "message.timestamp.after.max.ms": ("-1", "5"),
    "message.timestamp.before.max.ms": ("-1", "5"),
    "message.timestamp.type": ("x", "LogAppendTime"),
    "min.cleanable.dirty.ratio": ("-0.1", "1.1", "x", "0.2"),
    "min.insync.replicas": ("0", "1"),
    "preallocate": ("maybe", "TRUE"),
    "retention.bytes": ("x", "-2", "-1"),
    "retention.ms": ("-2", "soon", "", " 77 ", "-1"),
    "segment.bytes": ("1048575", "2147483648", "1048576"),
    "segment.index.bytes": ("3", "4"),
    "segment.jitter.ms": ("-1", "0"),
    "segment.ms": ("0", "1"),
    "unclean.leader.election.enable": ("yes", "false"),
    "no.such.setting": ("1",),
}


class Settings(Probe):
    """A probe of one topic `t` and one group `g`."""

    def __init__(self, bootstrap: str) -> None:
        super().__init__(bootstrap)
        assert self.create("t", 2) == 0
        self.names = {TOPIC: self.topic("t"), GROUP: f"g-{self.mark}", BROKER: "1"}

    def alter(self, step: str, kind: int, *changes: tuple[str, int, str | None], name: str | None = None) -> None:
        configs = [{"name": key, "config_operation": operation, "value": value} for key, operation, value in changes]
        name = self.names[kind] if name is None else name
        resource = {"resource_type": kind, "resource_name": name, "configs": configs}
        [answer] = self.ask(44, 1, resources=[resource], validate_only=False).responses
        self.note(step, (int(answer.error_code), (answer.error_message or "").replace(self.mark, "")))

    def replace(self, step: str, **values: str | None) -> None:
        configs = [{"name": key.replace("_", "."), "value": value} for key, value in values.items()]
        resource = {"resource_type": TOPIC, "resource_name": self.names[TOPIC], "configs": configs}
        [answer] = self.ask(33, 2, resources=[resource], validate_only=False).responses
        self.note(step, (int(answer.error_code), answer.error_message))

    def describe(self, step: str, kind: int, *only: str, settled: dict[str, str] | None = None) -> None:
        """What was set for the resource itself, once Apache Kafka shows what it accepted before."""
        wanted = {"resource_type": kind, "resource_name": self.names[kind], "configuration_keys": only or None}
        deadline = time.monotonic() + 20
        while True:
            [result] = self.ask(32, 4, resources=[wanted], include_synonyms=True, include_documentation=False).results
            values = {item.name: item.value for item in result.configs}
            if all(values[key] == value for key, value in (settled or {}).items()):
                break
            assert time.monotonic() < deadline, values
            time.sleep(0.05)
        found: dict[str, Any] = {}
        for item in result.configs:
            if only or item.config_source in (1, 8):
                # Apache Kafka itself sets min.insync.replicas for the cluster, with the feature of KIP-966.
                told = [entry for entry in item.synonyms if entry.source != 5 and entry.name != "min.insync.replicas"]
                chain = [(entry.name, entry.value, entry.source) for entry in told]
                found[item.name] = (item.value, item.config_source, item.config_type, item.read_only, chain)
        self.note(step, (int(result.error_code), found))


def changes(probe: Settings) -> None:
    for name, values in VALUES.items():
        for value in values:
            probe.alter(f"{name}={value}", TOPIC, (name, SET, value))
    probe.describe("what holds", TOPIC, settled={"unclean.leader.election.enable": "false", "segment.ms": "1"})
    probe.replace("replace", segment_ms="70000")
    probe.describe("replaced", TOPIC, settled={"segment.ms": "70000", "retention.ms": "604800000"})
    probe.replace("replace by nothing", segment_ms=None)
    probe.alter("append", TOPIC, ("cleanup.policy", APPEND, "compact"))
    probe.describe("appended", TOPIC, settled={"cleanup.policy": "delete,compact"})
    probe.alter("subtract", TOPIC, ("cleanup.policy", SUBTRACT, "delete"))
    probe.describe("subtracted", TOPIC, settled={"cleanup.policy": "compact"})
    probe.alter("append to a number", TOPIC, ("retention.ms", APPEND, "1"))
    probe.alter("null", TOPIC, ("retention.ms", SET, None))
    probe.alter("twice", TOPIC, ("retention.ms", SET, "1"), ("retention.ms", SET, "2"))
    probe.alter("delete what is not set", TOPIC, ("flush.ms", DELETE, None))
    probe.alter("one good, one bad", TOPIC, ("retention.ms", SET, "99"), ("segment.ms", SET, "x"))
    probe.describe("nothing of it", TOPIC)
    probe.alter("unknown topic", TOPIC, ("retention.ms", SET, "1"), name="nowhere")
    probe.alter("no name", TOPIC, ("retention.ms", SET, "1"), name="")
    probe.alter("unknown kind", 99, ("retention.ms", SET, "1"), name="x")


def broker_and_groups(probe: Settings) -> None:
    probe.alter("read-only", BROKER, ("num.partitions", SET, "9"))
    probe.alter("bad value", BROKER, ("log.cleaner.min.compaction.lag.ms", SET, "x"))
    probe.alter("another broker", BROKER, ("log.retention.ms", SET, "9"), name="7")
    probe.alter("no number", BROKER, ("log.retention.ms", SET, "9"), name="abc")
    name, topics_name = "log.cleaner.min.compaction.lag.ms", "min.compaction.lag.ms"
    try:
        probe.alter("for all", BROKER, (name, SET, "8"), name="")
        probe.alter("for one", BROKER, (name, SET, "9"))
        probe.describe("broker", BROKER, name, settled={name: "9"})
        probe.describe("topic behind it", TOPIC, topics_name, settled={topics_name: "9"})
        probe.alter("not for one", BROKER, (name, DELETE, None))
        probe.describe("topic behind all", TOPIC, topics_name, settled={topics_name: "8"})
    finally:
        probe.alter("undone", BROKER, (name, DELETE, None), name="")
    probe.alter("group", GROUP, ("consumer.session.timeout.ms", SET, "46000"))
    probe.describe("of the group", GROUP, settled={"consumer.session.timeout.ms": "46000"})
    probe.alter("too long", GROUP, ("consumer.session.timeout.ms", SET, "60001"))
    probe.alter("too short", GROUP, ("consumer.session.timeout.ms", SET, "99"))
    probe.alter("unknown of a group", GROUP, ("x", SET, "1"))
    probe.alter("group without name", GROUP, ("consumer.session.timeout.ms", SET, "46000"), name="")


@pytest.mark.kafka
def test_the_same_answers(kafka: KafkaNode, embedded: Address) -> None:
    answers = []
    for bootstrap in (kafka.bootstrap, embedded.bootstrap):
        probe = Settings(bootstrap)
        try:
            changes(probe)
            broker_and_groups(probe)
        finally:
            probe.close()
        answers.append(probe.answers)
    theirs, ours = answers
    assert len(theirs) > 90
    assert {step: (answer, ours[step]) for step, answer in theirs.items() if answer != ours[step]} == {}

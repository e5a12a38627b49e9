"""Settings: what is described, what may be changed, and that a change holds at once and after a restart."""

from __future__ import annotations

from typing import Any

import pytest

from semel.broker.config import BrokerConfig
from semel.broker.config_keys import BROKER_KEYS, GROUP_KEYS, INERT_KEYS, READ_ONLY_KEYS, TOPIC_KEYS
from semel.errors import ErrorCode
from tests.broker.core import Core, batch

E = ErrorCode
TOPIC, BROKER, GROUP = 2, 4, 32
SET, DELETE, APPEND, SUBTRACT = range(4)
DAY_MS = 86_400_000


def alter(core: Core, kind: int, name: str, *changes: tuple[str, int, str | None], dry: bool = False) -> int:
    configs = [{"name": key, "config_operation": operation, "value": value} for key, operation, value in changes]
    resource = {"resource_type": kind, "resource_name": name, "configs": configs}
    return int(core.ask(44, 1, resources=[resource], validate_only=dry).responses[0].error_code)


def replace(core: Core, kind: int, name: str, **values: str | None) -> int:
    configs = [{"name": key.replace("_", "."), "value": value} for key, value in values.items()]
    resource = {"resource_type": kind, "resource_name": name, "configs": configs}
    return int(core.ask(33, 2, resources=[resource], validate_only=False).responses[0].error_code)


def described(core: Core, kind: int, name: str) -> dict[str, Any]:
    resource = {"resource_type": kind, "resource_name": name, "configuration_keys": None}
    [result] = core.ask(32, 4, resources=[resource], include_synonyms=True, include_documentation=True).results
    assert result.error_code == 0, result
    return {item.name: item for item in result.configs}


def own(core: Core, name: str = "t") -> dict[str, str]:
    return {key: item.value for key, item in described(core, TOPIC, name).items() if item.config_source == 1}


def test_a_change_of_a_topic_holds_at_once_and_after_a_kill(core: Core) -> None:
    core.create("t")
    assert core.produce("t", batch(b"a" * 300)).error_code == 0
    assert alter(core, TOPIC, "t", ("max.message.bytes", SET, "200"), ("cleanup.policy", SET, "compact")) == 0
    for _ in range(2):
        assert own(core) == {"max.message.bytes": "200", "cleanup.policy": "compact"}
        assert core.produce("t", batch(b"a" * 300, key=b"k")).error_code == E.MESSAGE_TOO_LARGE
        assert core.produce("t", batch(b"a")).error_code == E.INVALID_RECORD
        core.restart()
    changes = ("max.message.bytes", DELETE, None), ("message.timestamp.type", SET, "LogAppendTime")
    assert alter(core, TOPIC, "t", *changes) == 0
    assert core.produce("t", batch(b"a" * 300, key=b"k")).log_append_time is not None


def test_segments_and_retention_follow_the_settings_of_the_moment(tmp_path: Any) -> None:
    core = Core(tmp_path, BrokerConfig(segment_bytes=400))
    core.create("t")
    topic = core.node.topics.get("t")
    assert topic is not None
    log = topic.partitions[0].log
    for _ in range(5):
        core.produce("t", batch(b"a" * 200))
    before = log.size_bytes
    core.node.expire()
    assert log.size_bytes == before
    assert alter(core, TOPIC, "t", ("retention.bytes", SET, "500")) == 0
    core.node.expire()
    assert log.log_start_offset > 0
    assert alter(core, BROKER, "1", ("log.retention.ms", SET, "1000")) == 0
    core.pass_time(10_000)
    core.node.expire()
    start = log.log_start_offset
    assert start >= 4, "closed segments are older than a second"
    assert alter(core, TOPIC, "t", ("retention.ms", SET, "-1"), ("retention.bytes", DELETE, None)) == 0
    assert alter(core, BROKER, "", ("log.segment.bytes", SET, "2000000")) == 0
    for _ in range(5):
        core.produce("t", batch(b"a" * 200, timestamp_ms=core.now_ms))
    core.pass_time(DAY_MS)
    core.node.expire()
    assert log.log_start_offset == start, "the topic's own setting wins over the broker's"
    assert log.log_end_offset == 10


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("retention.ms", "soon"),
        ("retention.ms", "-2"),
        ("retention.ms", ""),
        ("segment.bytes", "1048575"),
        ("segment.bytes", "2147483648"),
        ("cleanup.policy", "compact,shred"),
        ("min.cleanable.dirty.ratio", "1.5"),
        ("preallocate", "maybe"),
        ("message.timestamp.type", "x"),
        ("compression.type", "none"),
        ("compression.gzip.level", "0"),
        ("min.insync.replicas", "0"),
        ("remote.storage.enable", "true"),
        ("bogus", "1"),
    ],
)
def test_a_bad_value_changes_nothing(core: Core, name: str, value: str) -> None:
    core.create("t", retention_ms="5000")
    assert alter(core, TOPIC, "t", ("segment.ms", SET, "60000"), (name, SET, value)) == E.INVALID_CONFIG
    assert own(core) == {"retention.ms": "5000"}


def test_lists_are_appended_to_and_subtracted_from(core: Core) -> None:
    core.create("t")
    assert alter(core, TOPIC, "t", ("cleanup.policy", APPEND, "compact")) == 0
    assert own(core) == {"cleanup.policy": "delete,compact"}
    assert alter(core, TOPIC, "t", ("cleanup.policy", SUBTRACT, "delete")) == 0
    assert own(core) == {"cleanup.policy": "compact"}
    assert alter(core, TOPIC, "t", ("retention.ms", APPEND, "1")) == E.INVALID_CONFIG


def test_requests_that_make_no_sense(core: Core) -> None:
    core.create("t")
    change = ("retention.ms", SET, "1")
    assert alter(core, TOPIC, "nowhere", change) == E.UNKNOWN_TOPIC_OR_PARTITION
    assert alter(core, TOPIC, "a b", change) == E.INVALID_TOPIC_EXCEPTION
    assert alter(core, TOPIC, "", change) == E.INVALID_REQUEST
    assert alter(core, TOPIC, "t", change, change) == E.INVALID_REQUEST
    assert alter(core, TOPIC, "t", ("retention.ms", SET, None)) == E.INVALID_REQUEST
    assert alter(core, TOPIC, "t", ("retention.ms", 9, "1")) == E.INVALID_REQUEST
    assert alter(core, TOPIC, "__consumer_offsets", ("cleanup.policy", SET, "delete")) == E.POLICY_VIOLATION
    assert alter(core, 99, "t", change) == E.INVALID_REQUEST
    resource = {
        "resource_type": TOPIC,
        "resource_name": "t",
        "configs": [{"name": "retention.ms", "config_operation": SET, "value": "1"}],
    }
    answer = core.ask(44, 1, resources=[resource, resource], validate_only=False)
    assert [item.error_code for item in answer.responses] == [E.INVALID_REQUEST, E.INVALID_REQUEST]
    assert alter(core, TOPIC, "t", change, dry=True) == 0
    assert own(core) == {}


def test_alter_configs_replaces_everything(core: Core) -> None:
    core.create("t", retention_ms="5000", segment_ms="60000")
    assert replace(core, TOPIC, "t", segment_ms="70000") == 0
    assert own(core) == {"segment.ms": "70000"}
    assert replace(core, TOPIC, "t", segment_ms=None) == E.INVALID_REQUEST
    assert own(core) == {"segment.ms": "70000"}
    assert replace(core, TOPIC, "t") == 0
    assert own(core) == {}


def test_the_brokers_settings_stand_behind_the_topics(core: Core) -> None:
    core.create("t")
    core.create("set", max_message_bytes="5000")
    assert alter(core, BROKER, "", ("message.max.bytes", SET, "300")) == 0
    assert alter(core, BROKER, "1", ("message.max.bytes", SET, "200")) == 0
    for _ in range(2):
        found = described(core, TOPIC, "t")["max.message.bytes"]
        assert (found.value, found.config_source) == ("200", 2)
        assert [(item.name, item.value, item.source) for item in found.synonyms] == [
            ("message.max.bytes", "200", 2),
            ("message.max.bytes", "300", 3),
            ("message.max.bytes", "1048588", 5),
        ]
        assert core.produce("t", batch(b"a" * 300)).error_code == E.MESSAGE_TOO_LARGE
        assert core.produce("set", batch(b"a" * 300)).error_code == 0
        core.restart()
    assert described(core, BROKER, "")["message.max.bytes"].value == "300"
    assert alter(core, BROKER, "1", ("message.max.bytes", DELETE, None)) == 0
    assert described(core, TOPIC, "t")["max.message.bytes"].value == "300"
    assert alter(core, BROKER, "", ("message.max.bytes", DELETE, None)) == 0
    assert core.produce("t", batch(b"a" * 300)).error_code == 0


def test_what_the_process_was_started_with_is_shown_and_stays(tmp_path: Any) -> None:
    core = Core(tmp_path, BrokerConfig(num_partitions=7, max_message_bytes=900))
    core.create("t")
    broker = described(core, BROKER, "1")
    assert (broker["num.partitions"].value, broker["num.partitions"].config_source) == ("7", 4)
    assert broker["num.partitions"].read_only
    assert described(core, TOPIC, "t")["max.message.bytes"].config_source == 4
    assert alter(core, BROKER, "1", ("num.partitions", SET, "9")) == E.INVALID_REQUEST
    assert alter(core, BROKER, "1", ("no.such.setting", SET, "9")) == E.INVALID_REQUEST
    assert alter(core, BROKER, "2", ("log.retention.ms", SET, "9")) == E.INVALID_REQUEST
    assert alter(core, BROKER, "one", ("log.retention.ms", SET, "9")) == E.INVALID_REQUEST
    assert alter(core, BROKER, "1", ("log.retention.ms", SET, "x")) == E.INVALID_REQUEST
    assert alter(core, BROKER, "1", ("num.io.threads", SET, "3")) == 0, "what tools set on every broker is kept"
    assert described(core, BROKER, "1")["num.io.threads"].value == "3"


def test_secrets_have_no_value(core: Core) -> None:
    secrets = [item for item in described(core, BROKER, "1").values() if item.is_sensitive]
    assert {item.name for item in secrets} >= {"ssl.key.password", "sasl.jaas.config"}
    assert all(item.value is None and not item.synonyms and item.read_only for item in secrets)


def test_settings_of_groups(core: Core) -> None:
    assert alter(core, GROUP, "g", ("consumer.session.timeout.ms", SET, "46000")) == 0
    core.restart()
    found = described(core, GROUP, "g")
    assert found["consumer.session.timeout.ms"].config_source == 8
    assert found["consumer.heartbeat.interval.ms"].value == "5000"
    assert described(core, GROUP, "other")["consumer.session.timeout.ms"].value == "45000"
    for name, value in (("consumer.session.timeout.ms", "999"), ("consumer.session.timeout.ms", "60001"), ("x", "1")):
        assert alter(core, GROUP, "g", (name, SET, value)) == E.INVALID_CONFIG
    both = ("consumer.session.timeout.ms", SET, "6000"), ("consumer.heartbeat.interval.ms", SET, "7000")
    assert alter(core, GROUP, "g", *both) == E.INVALID_CONFIG
    assert alter(core, GROUP, "", both[0]) == E.INVALID_REQUEST
    assert alter(core, GROUP, "g", ("consumer.session.timeout.ms", DELETE, None)) == 0
    assert core.ask(74, 1, resource_types=[GROUP]).config_resources == ()


def test_resources_are_listed(core: Core) -> None:
    core.create("t")
    alter(core, GROUP, "g", ("consumer.session.timeout.ms", SET, "46000"))
    answer = core.ask(74, 1, resource_types=[])
    assert [(item.resource_type, item.resource_name) for item in answer.config_resources] == [
        (GROUP, "g"),
        (BROKER, "1"),
        (TOPIC, "__consumer_offsets"),
        (TOPIC, "__transaction_state"),
        (TOPIC, "t"),
    ]
    assert [item.resource_name for item in core.ask(74, 1, resource_types=[TOPIC]).config_resources][-1] == "t"
    assert core.ask(74, 1, resource_types=[99]).error_code == E.UNSUPPORTED_VERSION
    assert core.ask(74, 0).config_resources == ()


def test_every_setting_has_a_good_default_and_says_what_it_does() -> None:
    for table in (TOPIC_KEYS, BROKER_KEYS, INERT_KEYS, READ_ONLY_KEYS, GROUP_KEYS):
        for name, key in table.items():
            assert key.name == name
            assert key.doc.endswith(".")
            assert key.problem(key.default) is None, name


def test_where_partitions_are(core: Core) -> None:
    core.create("t", 2)
    core.produce("t", batch(b"a"))
    answer = core.ask(35, 4, topics=[{"topic": "t", "partitions": [0, 1, 7]}, {"topic": "nowhere", "partitions": [0]}])
    [directory] = answer.results
    assert directory.total_bytes >= directory.usable_bytes > 0
    [topic] = directory.topics
    assert [(item.partition_index, item.partition_size > 0) for item in topic.partitions] == [(0, True), (1, False)]
    assert {item.name for item in core.ask(35, 4, topics=None).results[0].topics} == {
        "t",
        "__consumer_offsets",
        "__transaction_state",
    }
    election = core.ask(43, 2, election_type=0, timeout=1, topic_partitions=[{"topic": "t", "partitions": [0, 9]}])
    codes = [item.error_code for item in election.replica_election_results[0].partition_result]
    assert codes == [E.ELECTION_NOT_NEEDED, E.UNKNOWN_TOPIC_OR_PARTITION]
    moves = [
        {"partition_index": index, "replicas": replicas}
        for index, replicas in ((0, [1]), (1, None), (9, [1]), (0, [5]))
    ]
    moved = core.ask(45, 0, timeout=1, topics=[{"name": "t", "partitions": moves}]).responses[0].partitions
    assert [item.error_code for item in moved] == [
        0,
        E.NO_REASSIGNMENT_IN_PROGRESS,
        E.UNKNOWN_TOPIC_OR_PARTITION,
        E.INVALID_REPLICA_ASSIGNMENT,
    ]
    assert core.ask(46, 0, timeout=1, topics=None).topics == ()

"""ApiVersions, Metadata, and the APIs about topics."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest

from semel.broker.apis import APIS
from semel.broker.exchange import Peer
from semel.errors import ErrorCode, ProtocolError
from semel.wire.messages import decode_response, encode_request
from tests.broker.core import Core, batch

_NO_OPERATIONS = {"include_cluster_authorized_operations": False, "include_topic_authorized_operations": False}


@pytest.mark.parametrize("version", range(5))
def test_api_versions(core: Core, version: int) -> None:
    answer = core.ask(18, version, client_software_name="t", client_software_version="1")
    ranges = {item.api_key: (item.min_version, item.max_version) for item in answer.api_keys}
    assert ranges[0] == (0, 13), "librdkafka turns compression off when Produce v0 is not advertised"
    assert ranges[26] == (0, 5)
    assert set(ranges) == set(APIS)
    if version >= 3:
        assert [(item.name, item.max_version_level) for item in answer.finalized_features] == [
            ("group.version", 1),
            ("transaction.version", 2),
        ]


def test_transactions_v1_is_finalized_where_it_was_chosen(core_v1: Core) -> None:
    answer = core_v1.ask(18, 4, client_software_name="t", client_software_version="1")
    levels = {item.name: item.max_version_level for item in answer.finalized_features}
    assert levels == {"group.version": 1, "transaction.version": 1}


def test_an_unknown_version_of_api_versions_is_answered(core: Core) -> None:
    frame = bytearray(encode_request(18, 4, 7, "t", client_software_name="t", client_software_version="1"))
    frame[6:8] = (99).to_bytes(2, "big")
    parts = core.node.handle(memoryview(frame)[4:], Peer("h", "h", 1))
    assert isinstance(parts, list)
    [data] = parts
    assert isinstance(data, bytes)
    answer = decode_response(18, 0, data[4:])
    assert answer.error_code == ErrorCode.UNSUPPORTED_VERSION
    assert [item.api_key for item in answer.api_keys] == [18]


@pytest.mark.parametrize(("key", "version"), [(0, 2), (0, 99), (4, 7), (999, 0), (26, 6)])
def test_what_is_not_supported_closes_the_connection(core: Core, key: int, version: int) -> None:
    head = key.to_bytes(2, "big") + version.to_bytes(2, "big") + bytes(4) + b"\xff\xff" + bytes(40)
    with pytest.raises(ProtocolError):
        core.node.handle(memoryview(bytearray(head)), Peer("h", "h", 1))


@pytest.mark.parametrize("version", range(14))
def test_metadata(core: Core, version: int) -> None:
    core.create("orders", 3)
    name: dict[str, Any] = {"name": "orders", "topic_id": None}
    answer = core.ask(3, version, topics=[name], allow_auto_topic_creation=False, **_NO_OPERATIONS)
    [topic] = answer.topics
    assert (topic.error_code, topic.name, len(topic.partitions)) == (0, "orders", 3)
    [broker] = answer.brokers
    assert (broker.host, broker.port) == ("127.0.0.1", 9092)
    if version >= 2:
        assert answer.cluster_id == core.node.metadata.cluster_id
    if version >= 10:
        assert topic.topic_id == core.node.topics.get("orders").info.topic_id  # type: ignore[union-attr]


def test_metadata_of_all_none_and_unknown_topics(core: Core) -> None:
    core.create("orders")
    everything = core.ask(3, 13, topics=None, allow_auto_topic_creation=True, **_NO_OPERATIONS)
    internal = {topic.name for topic in everything.topics if topic.is_internal}
    assert {topic.name for topic in everything.topics} == {"orders"} | internal
    assert internal == {"__consumer_offsets", "__transaction_state"}
    assert core.ask(3, 13, topics=[], allow_auto_topic_creation=True, **_NO_OPERATIONS).topics == ()

    def code(topic: dict[str, Any], *, create: bool) -> int:
        return int(
            core.ask(3, 13, topics=[topic], allow_auto_topic_creation=create, **_NO_OPERATIONS).topics[0].error_code
        )

    assert code({"name": None, "topic_id": uuid4()}, create=True) == ErrorCode.UNKNOWN_TOPIC_ID
    assert code({"name": "new", "topic_id": None}, create=False) == ErrorCode.UNKNOWN_TOPIC_OR_PARTITION
    assert code({"name": "a b", "topic_id": None}, create=True) == ErrorCode.INVALID_TOPIC_EXCEPTION
    assert code({"name": "new", "topic_id": None}, create=True) == 0
    core.restart()
    assert len(core.node.topics.get("new").partitions) == 4  # type: ignore[union-attr]


@pytest.mark.parametrize("version", range(7))
def test_find_coordinator(core: Core, version: int) -> None:
    answer = core.ask(10, version, key="g", key_type=0, coordinator_keys=["g"])
    found = answer.coordinators[0] if version >= 4 else answer
    assert (found.error_code, found.node_id, found.port) == (0, 1, 9092)


def test_describe_cluster(core: Core) -> None:
    answer = core.ask(60, 2, include_cluster_authorized_operations=False, endpoint_type=1, include_fenced_brokers=False)
    assert (answer.cluster_id, len(answer.brokers)) == (core.node.metadata.cluster_id, 1)
    for kind, code in ((2, ErrorCode.MISMATCHED_ENDPOINT_TYPE), (7, ErrorCode.UNSUPPORTED_ENDPOINT_TYPE)):
        fields = {"include_cluster_authorized_operations": False, "include_fenced_brokers": False}
        answer = core.ask(60, 2, endpoint_type=kind, **fields)
        assert (answer.error_code, answer.endpoint_type, answer.controller_id) == (code, 1, -1)


def _create(core: Core, *names: str, version: int = 7, validate_only: bool = False, **changed: Any) -> list[int]:
    topic = {"num_partitions": 2, "replication_factor": 1, "assignments": [], "configs": []} | changed
    topics = [topic | {"name": name} for name in names]
    answer = core.ask(19, version, topics=topics, timeout=1000, validate_only=validate_only)
    return [int(item.error_code) for item in answer.topics]


def test_create_topics(core: Core) -> None:
    for version in range(2, 8):
        assert _create(core, f"t{version}", version=version) == [0]
    assert _create(core, "t2") == [ErrorCode.TOPIC_ALREADY_EXISTS]
    assert _create(core, "dry", validate_only=True) == [0]
    assert core.node.topics.get("dry") is None
    assert _create(core, "x", replication_factor=3) == [ErrorCode.INVALID_REPLICATION_FACTOR]
    assert _create(core, "x", num_partitions=0) == [ErrorCode.INVALID_PARTITIONS]
    assert _create(core, "x", num_partitions=1_000_000) == [ErrorCode.INVALID_PARTITIONS]
    assert _create(core, "x" * 250) == [ErrorCode.INVALID_TOPIC_EXCEPTION]
    assert _create(core, "..") == [ErrorCode.INVALID_TOPIC_EXCEPTION]
    assert _create(core, "../../etc") == [ErrorCode.INVALID_TOPIC_EXCEPTION]
    assert _create(core, "x", configs=[{"name": "nonsense", "value": "1"}]) == [ErrorCode.INVALID_CONFIG]
    assert _create(core, "x", configs=[{"name": "retention.ms", "value": "soon"}]) == [ErrorCode.INVALID_CONFIG]
    assert _create(core, "x", "x") == [ErrorCode.INVALID_REQUEST]
    replicas = [{"partition_index": 0, "broker_ids": [1]}, {"partition_index": 1, "broker_ids": [1]}]
    assert _create(core, "x", num_partitions=-1, replication_factor=-1, assignments=replicas) == [0]
    assert _create(core, "defaults", num_partitions=-1, replication_factor=-1) == [0]
    assert len(core.node.topics.get("defaults").partitions) == 4  # type: ignore[union-attr]


def test_a_recreated_topic_is_empty_and_knows_no_old_producer(core: Core) -> None:
    core.create("orders")
    producer_id = core.init(None).producer_id
    ids = {"producer_id": producer_id, "producer_epoch": 0}
    core.produce("orders", batch(b"a", base_sequence=0, **ids))
    old = core.node.topics.get("orders").info.topic_id  # type: ignore[union-attr]
    answer = core.ask(20, 6, topics=[{"name": None, "topic_id": old}], timeout=1000)
    assert [(item.name, item.error_code) for item in answer.responses] == [("orders", 0)]
    core.restart()
    assert core.node.topics.get("orders") is None
    core.create("orders")
    assert core.fetch("orders", 0).high_watermark == 0
    assert core.produce("orders", batch(b"b", base_sequence=7, **ids)).error_code == 0


def test_delete_topics_errors(core: Core) -> None:
    names = ["nowhere", "__transaction_state"]
    codes = [item.error_code for item in core.ask(20, 5, topic_names=names, timeout=1).responses]
    assert codes == [ErrorCode.UNKNOWN_TOPIC_OR_PARTITION, ErrorCode.INVALID_TOPIC_EXCEPTION]
    unknown = [{"name": None, "topic_id": uuid4()}]
    assert core.ask(20, 6, topics=unknown, timeout=1).responses[0].error_code == ErrorCode.UNKNOWN_TOPIC_ID


def test_create_partitions(core: Core) -> None:
    core.create("orders", 2)

    def extend(count: int, *, assigned: list[int] | None = None, validate_only: bool = False) -> int:
        assignments = None if assigned is None else [{"broker_ids": [broker]} for broker in assigned]
        topics = [{"name": "orders", "count": count, "assignments": assignments}]
        return int(core.ask(37, 3, topics=topics, timeout=1, validate_only=validate_only).results[0].error_code)

    twice = [{"name": "orders", "count": count, "assignments": None} for count in (3, 4)]
    answer = core.ask(37, 3, topics=twice, timeout=1, validate_only=False)
    assert [item.error_code for item in answer.results] == [ErrorCode.INVALID_REQUEST]
    assert extend(4, assigned=[1]) == ErrorCode.INVALID_REPLICA_ASSIGNMENT
    assert extend(3, assigned=[2]) == ErrorCode.INVALID_REPLICA_ASSIGNMENT
    assert extend(3, assigned=[1], validate_only=True) == 0

    assert extend(2) == ErrorCode.INVALID_PARTITIONS
    assert extend(3, validate_only=True) == 0
    assert extend(5) == 0
    assert core.produce("orders", batch(b"a"), partition=4).base_offset == 0
    core.restart()
    assert core.produce("orders", batch(b"a"), partition=4).base_offset == 1


def test_topic_settings_are_described_with_defaults_and_hold(core: Core) -> None:
    core.create("small", max_message_bytes="200", cleanup_policy="compact")
    resource = {"resource_type": 2, "resource_name": "small", "configuration_keys": None}
    [result] = core.ask(32, 4, resources=[resource], include_synonyms=True, include_documentation=False).results
    found = {item.name: (item.value, item.config_source) for item in result.configs}
    assert found["max.message.bytes"] == ("200", 1)
    assert found["retention.ms"] == ("604800000", 5)
    assert core.produce("small", batch(b"a" * 300, key=b"k")).error_code == ErrorCode.MESSAGE_TOO_LARGE
    assert core.produce("small", batch(b"a")).error_code == ErrorCode.INVALID_RECORD
    assert core.produce("small", batch(b"a", key=b"k")).error_code == 0


def test_describe_topic_partitions_in_pages(core: Core) -> None:
    core.create("a", 3)
    core.create("b", 3)
    seen: list[tuple[str, int]] = []
    cursor: dict[str, Any] | None = None
    for _ in range(10):
        topics = [{"name": "a"}, {"name": "b"}]
        answer = core.ask(75, 0, topics=topics, response_partition_limit=2, cursor=cursor)
        for topic in answer.topics:
            seen += [(topic.name, item.partition_index) for item in topic.partitions]
        if answer.next_cursor is None:
            break
        found = answer.next_cursor
        cursor = {"topic_name": found.topic_name, "partition_index": found.partition_index}
    assert seen == [(name, index) for name in "ab" for index in range(3)]

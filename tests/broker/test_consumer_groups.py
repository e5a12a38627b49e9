"""ConsumerGroupHeartbeat and ConsumerGroupDescribe, and the APIs that know both kinds of groups."""

from __future__ import annotations

from typing import Any

import pytest

from semel.errors import ErrorCode
from semel.log.log import LogError, PartitionLog
from tests.broker.core import Core

E = ErrorCode


def heartbeat(core: Core, member: str, epoch: int, version: int = 1, **fields: Any) -> Any:
    """The answer; `owned` gives partitions of topic `t`."""
    owned = fields.pop("owned", None)
    topic = core.node.topics.get("t")
    assert topic is not None
    parts = None if owned is None else [{"topic_id": topic.info.topic_id, "partitions": owned}] if owned else []
    values = {
        "group_id": "g",
        "member_id": member,
        "member_epoch": epoch,
        "instance_id": None,
        "rack_id": None,
        "rebalance_timeout": -1,
        "subscribed_topic_names": None,
        "subscribed_topic_regex": None,
        "server_assignor": None,
        "topic_partitions": parts,
    }
    return core.ask(68, version, **(values | fields))


def join(core: Core, member: str, **fields: Any) -> Any:
    wanted = {"rebalance_timeout": 60_000, "subscribed_topic_names": ["t"], "owned": []} | fields
    return heartbeat(core, member, 0, **wanted)


def assigned(answer: Any) -> list[int]:
    assert answer.error_code == 0, answer
    return [index for item in answer.assignment.topic_partitions for index in item.partitions]


def described(core: Core, version: int = 1) -> Any:
    [group] = core.ask(69, version, group_ids=["g"], include_authorized_operations=False).groups
    return group


@pytest.mark.parametrize("version", [0, 1])
def test_join_describe_and_leave(core: Core, version: int) -> None:
    core.create("t", 3)
    joined = join(core, "m1" if version else "", version=version)
    assert (assigned(joined), joined.member_epoch) == ([0, 1, 2], 2)
    member_id = joined.member_id
    group = described(core, version)
    assert (group.group_state, group.group_epoch, group.assignment_epoch) == ("Stable", 2, 2)
    [member] = group.members
    assert (member.member_id, member.client_id, member.client_host) == (member_id, "test", "/127.0.0.1")
    assert [(item.topic_name, item.partitions) for item in member.assignment.topic_partitions] == [("t", (0, 1, 2))]
    assert heartbeat(core, member_id, -1, version=version).error_code == 0
    assert described(core).group_state == "Empty"


def test_a_kill_in_the_middle_of_a_rebalance(core: Core) -> None:
    core.create("t", 4)
    join(core, "m1")
    join(core, "m2")
    assert assigned(heartbeat(core, "m1", 2)) == [0, 1]
    core.restart()
    group = described(core)
    assert (group.group_state, {item.member_id: item.member_epoch for item in group.members}) == (
        "Reconciling",
        {"m1": 2, "m2": 3},
    )
    assert heartbeat(core, "m2", 3).assignment is None, "m1 has not let go yet"
    assert heartbeat(core, "m1", 2, owned=[0, 1]).member_epoch == 3
    assert assigned(heartbeat(core, "m2", 3)) == [2, 3]
    core.restart()
    assert heartbeat(core, "m1", 3).error_code == 0
    assert heartbeat(core, "m1", 2).error_code == E.FENCED_MEMBER_EPOCH


def test_a_regular_expression_finds_internal_topics_too(core: Core) -> None:
    """As in Apache Kafka: whoever means none of them says so."""
    core.create("t", 1)
    join(core, "m1", subscribed_topic_regex="t|__consumer_offsets")
    member = described(core).members[0]
    assert {item.topic_name for item in member.assignment.topic_partitions} == {"t", "__consumer_offsets"}


def test_topics_come_grow_and_go(core: Core) -> None:
    core.create("t", 1)
    assert assigned(join(core, "m1", subscribed_topic_regex="t|u[0-9]")) == [0]
    core.create("u1", 2)
    grown = heartbeat(core, "m1", 2)
    assert (len(assigned(grown)), grown.member_epoch) == (3, 3)
    topics = [{"name": "u1", "count": 3, "assignments": None}]
    core.ask(37, 3, topics=topics, timeout=1, validate_only=False)
    assert len(assigned(heartbeat(core, "m1", 3))) == 4
    core.ask(20, 5, topic_names=["u1"], timeout=1)
    assert assigned(heartbeat(core, "m1", 4)) == [0]
    assert heartbeat(core, "m1", 4, owned=[0]).member_epoch == 5


def test_times_are_settings_of_the_group(core: Core) -> None:
    core.create("t")
    configs = [
        {"name": f"consumer.{name}.ms", "config_operation": 0, "value": value}
        for name, value in (("session.timeout", "3000"), ("heartbeat.interval", "700"))
    ]
    resource = {"resource_type": 32, "resource_name": "g", "configs": configs}
    assert core.ask(44, 1, resources=[resource], validate_only=False).responses[0].error_code == 0
    assert join(core, "m1").heartbeat_interval.total_seconds() == 0.7
    core.pass_time(2_999)
    assert described(core).group_state == "Stable"
    core.pass_time(1)
    assert described(core).group_state == "Empty"
    assert heartbeat(core, "m1", 2).error_code == E.UNKNOWN_MEMBER_ID


def test_offsets_of_a_member(core: Core) -> None:
    core.create("t", 2)
    join(core, "m1")
    item = {"partition_index": 0, "committed_offset": 5, "committed_leader_epoch": -1, "committed_metadata": ""}

    def commit(epoch: int, version: int = 9) -> int:
        answer = core.ask(
            8,
            version,
            group_id="g",
            generation_id_or_member_epoch=epoch,
            member_id="m1",
            group_instance_id=None,
            topics=[{"name": "t", "partitions": [item]}],
        )
        return int(answer.topics[0].partitions[0].error_code)

    assert [commit(2), commit(1), commit(3), commit(2, version=8)] == [
        0,
        E.STALE_MEMBER_EPOCH,
        E.STALE_MEMBER_EPOCH,
        E.UNSUPPORTED_VERSION,
    ]

    def fetch(member: str | None, epoch: int) -> tuple[int, int]:
        topics = [{"name": "t", "partition_indexes": [0]}]
        group = {"group_id": "g", "member_id": member, "member_epoch": epoch, "topics": topics}
        [found] = core.ask(9, 9, groups=[group], require_stable=True).groups
        return int(found.error_code), found.topics[0].partitions[0].committed_offset if found.topics else -1

    assert fetch("m1", 2) == fetch(None, -1) == (0, 5)
    assert fetch("m1", 1) == (E.STALE_MEMBER_EPOCH, -1)
    assert fetch("m2", 2) == (E.UNKNOWN_MEMBER_ID, -1)


def test_apis_that_know_both_kinds(core: Core) -> None:
    core.create("t")
    join(core, "m1")
    [listed] = core.ask(16, 5, states_filter=[], types_filter=["consumer"]).groups
    assert (listed.group_id, listed.group_state, listed.group_type) == ("g", "Stable", "consumer")
    assert core.ask(16, 5, states_filter=[], types_filter=["classic"]).groups == ()
    [classic] = core.ask(15, 6, groups=["g"], include_authorized_operations=False).groups
    assert (classic.error_code, classic.error_message) == (E.GROUP_ID_NOT_FOUND, "Group g is not a classic group.")
    [missing] = core.ask(69, 1, group_ids=["other"], include_authorized_operations=False).groups
    assert (missing.error_code, missing.error_message) == (E.GROUP_ID_NOT_FOUND, "Group other not found.")
    members = [{"member_id": "m1", "group_instance_id": None, "reason": None}]
    [left] = core.ask(13, 5, group_id="g", members=members).members
    assert left.error_code == 0
    assert core.ask(42, 2, groups_names=["g"]).results[0].error_code == 0
    core.restart()
    assert core.ask(16, 5, states_filter=[], types_filter=[]).groups == ()


def test_nobody_hears_of_what_is_not_in_the_log(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    core.create("t", 2)
    with monkeypatch.context() as patch:

        def full(*_: Any) -> None:
            raise LogError(E.KAFKA_STORAGE_ERROR, "the disk is full")

        patch.setattr(PartitionLog, "append_internal", full)
        assert join(core, "m1").error_code == E.COORDINATOR_NOT_AVAILABLE
    again = join(core, "m1")
    assert (again.member_epoch, assigned(again)) == (2, [0, 1])
    core.restart()
    assert described(core).group_epoch == 2

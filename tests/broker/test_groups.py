"""Consumer groups through the whole broker."""

from __future__ import annotations

from typing import Any

from semel.errors import ErrorCode
from tests.broker.core import Core, Pending


def _join(core: Core, member_id: str = "", version: int = 9, **changed: Any) -> Pending:
    fields = {
        "group_id": "g",
        "session_timeout": 6_000,
        "rebalance_timeout": 20_000,
        "member_id": member_id,
        "group_instance_id": None,
        "protocol_type": "consumer",
        "protocols": [{"name": "range", "metadata": b"subscription"}],
        "reason": None,
    } | changed
    pending = core.send(11, version, **fields)
    assert isinstance(pending, Pending)
    return pending


def _member(core: Core) -> str:
    """A member id, by the two steps of KIP-394."""
    answer = _join(core).response
    assert answer.error_code == ErrorCode.MEMBER_ID_REQUIRED
    return str(answer.member_id)


def _sync(core: Core, member_id: str, generation: int, assignments: dict[str, bytes]) -> Pending:
    pending = core.send(
        14,
        5,
        group_id="g",
        generation_id=generation,
        member_id=member_id,
        protocol_type="consumer",
        protocol_name="range",
        assignments=[{"member_id": name, "assignment": data} for name, data in assignments.items()],
    )
    assert isinstance(pending, Pending)
    return pending


def _heartbeat(core: Core, member_id: str, generation: int) -> int:
    answer = core.ask(12, 4, group_id="g", generation_id=generation, member_id=member_id, group_instance_id=None)
    return int(answer.error_code)


def _commit(core: Core, member_id: str, generation: int, offset: int, version: int = 9) -> int:
    item = {"partition_index": 0, "committed_offset": offset, "committed_leader_epoch": 3, "committed_metadata": "note"}
    answer = core.ask(
        8,
        version,
        group_id="g",
        generation_id_or_member_epoch=generation,
        member_id=member_id,
        topics=[core.topic_key("in", version, 10) | {"partitions": [item]}],
    )
    return int(answer.topics[0].partitions[0].error_code)


def test_two_members_share_and_a_dead_one_is_dropped(core: Core) -> None:
    first = _member(core)
    alone = _join(core, first).response
    assert (alone.generation_id, alone.leader) == (1, first)
    assert _sync(core, first, 1, {first: b"all"}).response.assignment == b"all"

    second = _member(core)
    joining = _join(core, second)
    assert not joining.answered, "the first member has to join again"
    assert _heartbeat(core, first, 1) == ErrorCode.REBALANCE_IN_PROGRESS
    leader = _join(core, first).response
    assert {member.member_id for member in leader.members} == {first, second}
    assert joining.response.generation_id == leader.generation_id == 2
    waiting = _sync(core, second, 2, {})
    assert not waiting.answered
    assert _sync(core, first, 2, {first: b"one", second: b"two"}).response.assignment == b"one"
    assert waiting.response.assignment == b"two"
    assert _heartbeat(core, first, 1) == ErrorCode.ILLEGAL_GENERATION

    for _ in range(4):
        core.pass_time(2_000)
        code = _heartbeat(core, first, 2)
    assert code == ErrorCode.REBALANCE_IN_PROGRESS, "the second member's session ended"
    alone = _join(core, first).response
    assert [member.member_id for member in alone.members] == [first]


def test_a_clock_that_is_set_ends_no_session_and_holds_up_no_rebalance(core: Core) -> None:
    """Seed 1097 of the chain's simulation: the clock went back, and the group waited for as long."""
    first = _member(core)
    assert _join(core, first).response.generation_id == 1
    assert _sync(core, first, 1, {first: b"all"}).response.assignment == b"all"
    core.clock_is_off_by_ms = 3_600_000
    core.pass_time(1_000)
    assert _heartbeat(core, first, 1) == 0, "an hour has passed by the wall clock alone"

    second = _member(core)
    joining = _join(core, second)
    core.clock_is_off_by_ms = -3_600_000
    assert _join(core, first).response.generation_id == 2
    assert joining.response.generation_id == 2
    assert _sync(core, first, 2, {first: b"one", second: b"two"}).response.assignment == b"one"
    for _ in range(4):
        core.pass_time(2_000)
        code = _heartbeat(core, first, 2)
    assert code == ErrorCode.REBALANCE_IN_PROGRESS, "the second member's session ended in its time"


def test_generation_and_offsets_survive_a_kill(core: Core) -> None:
    core.create("in")
    member = _member(core)
    assert _join(core, member).response.generation_id == 1
    assert _sync(core, member, 1, {member: b"all"}).response.error_code == 0
    assert _commit(core, member, 1, 42) == 0
    core.restart()
    assert _heartbeat(core, member, 1) == 0
    assert _commit(core, member, 2, 43) == ErrorCode.ILLEGAL_GENERATION
    topics = [{"name": "in", "partition_indexes": [0]}]
    answer = core.ask(9, 7, group_id="g", topics=topics, require_stable=True)
    item = answer.topics[0].partitions[0]
    assert (item.committed_offset, item.committed_leader_epoch, item.metadata) == (42, 3, "note")


def test_an_app_that_was_off_for_a_month_goes_on_where_it_was(core: Core) -> None:
    """With Kafka's default of a week it would begin again and do everything it still finds a second time."""
    core.create("in")
    member = _member(core)
    assert _join(core, member).response.generation_id == 1
    assert _sync(core, member, 1, {member: b"all"}).response.error_code == 0
    assert _commit(core, member, 1, 42) == 0
    core.restart()
    core.pass_time(10_000)
    core.now_ms += 30 * 86_400_000
    core.node.groups.sweep()
    core.restart()
    topics = [{"name": "in", "partition_indexes": [0]}]
    answer = core.ask(9, 7, group_id="g", topics=topics, require_stable=True)
    assert answer.topics[0].partitions[0].committed_offset == 42


def test_leave_and_static_members(core: Core) -> None:
    joined = _join(core, group_instance_id="a").response
    assert joined.error_code == 0
    _sync(core, joined.member_id, joined.generation_id, {joined.member_id: b"x"})
    again = _join(core, group_instance_id="a").response
    assert again.generation_id == joined.generation_id, "a static member that comes back causes no rebalance"
    assert again.member_id != joined.member_id
    answer = core.ask(12, 4, group_id="g", generation_id=1, member_id=joined.member_id, group_instance_id="a")
    assert answer.error_code == ErrorCode.FENCED_INSTANCE_ID
    members = [{"member_id": "", "group_instance_id": "a", "reason": None}]
    left = core.ask(13, 5, group_id="g", members=members)
    assert [item.error_code for item in left.members] == [0]
    [group] = core.ask(15, 6, groups=["g"], include_authorized_operations=False).groups
    assert group.group_state == "Empty"


def test_old_join_and_leave_versions(core: Core) -> None:
    """aiokafka and old librdkafka: no member id step, one member a LeaveGroup."""
    joined = _join(core, version=1).response
    assert (joined.error_code, joined.generation_id) == (0, 1)
    assert core.ask(13, 1, group_id="g", member_id=joined.member_id).error_code == 0
    assert core.ask(13, 1, group_id="g", member_id="nobody").error_code == ErrorCode.UNKNOWN_MEMBER_ID


def test_a_member_whose_connection_is_gone_does_not_hold_up_the_others(core: Core) -> None:
    first = _member(core)
    _join(core, first)
    _sync(core, first, 1, {first: b"all"})
    dead = _join(core, _member(core))
    dead.later.close()
    second = _join(core, first)
    core.pass_time(7_000)
    assert second.answered
    assert [member.member_id for member in second.response.members] == [first]


def test_offsets_by_name_and_by_id(core: Core) -> None:
    core.create("in")
    for version in range(2, 11):
        assert _commit(core, "", -1, version, version) == 0
    for version in range(1, 11):
        key = core.topic_key("in", version, 10)
        topics = [key | {"partition_indexes": [0, 1]}]
        if version < 8:
            found = core.ask(9, version, group_id="g", topics=topics, require_stable=False).topics
        else:
            found = (
                core.ask(9, version, groups=[{"group_id": "g", "topics": topics}], require_stable=False)
                .groups[0]
                .topics
            )
        assert [item.committed_offset for item in found[0].partitions] == [10, -1]
    everything = core.ask(9, 8, groups=[{"group_id": "g", "topics": None}], require_stable=False).groups[0]
    assert [(topic.name, topic.partitions[0].committed_offset) for topic in everything.topics] == [("in", 10)]


def test_offsets_of_a_deleted_topic_are_gone(core: Core) -> None:
    core.create("in")
    assert _commit(core, "", -1, 5) == 0
    core.ask(20, 6, topics=[{"name": "in", "topic_id": None}], timeout=1000)
    core.create("in")
    for _ in range(2):
        topics = [{"name": "in", "partition_indexes": [0]}]
        answer = core.ask(9, 7, group_id="g", topics=topics, require_stable=True)
        assert answer.topics[0].partitions[0].committed_offset == -1
        core.restart()


def test_list_describe_delete(core: Core) -> None:
    core.create("in")
    member = _member(core)
    _join(core, member)
    _sync(core, member, 1, {member: b"all"})
    [listed] = core.ask(16, 5, states_filter=["Stable"], types_filter=[]).groups
    assert (listed.group_id, listed.group_type) == ("g", "classic")
    known, unknown = core.ask(15, 6, groups=["g", "none"], include_authorized_operations=False).groups
    assert [(item.client_id, item.member_assignment) for item in known.members] == [("test", b"all")]
    assert unknown.error_code == ErrorCode.GROUP_ID_NOT_FOUND
    assert core.ask(15, 5, groups=["none"], include_authorized_operations=False).groups[0].group_state == "Dead"
    assert core.ask(42, 2, groups_names=["g"]).results[0].error_code == ErrorCode.NON_EMPTY_GROUP
    core.ask(13, 1, group_id="g", member_id=member)
    assert core.ask(42, 2, groups_names=["g"]).results[0].error_code == 0
    core.restart()
    assert core.ask(16, 5, states_filter=[], types_filter=[]).groups == ()

"""Members' requests and time, as librdkafka, aiokafka, kafka-python and the Java client send them."""

from __future__ import annotations

import pytest

from semel.coordinator.group import GroupConfig
from semel.errors import ErrorCode
from semel.types import GroupMetadata

from .drivers import Groups

E = ErrorCode
COOPERATIVE = (("cooperative-sticky", b"owns nothing"),)


def test_the_first_member_alone():
    groups = Groups()
    first = groups.joined(groups.join(client="consumer"))
    assert (first.error, first.member_id) == (E.MEMBER_ID_REQUIRED, "consumer-1")
    answer = groups.joined(groups.join("consumer-1"))
    assert (answer.error, answer.generation_id, answer.leader) == (E.NONE, 1, "consumer-1")
    assert (answer.protocol_type, answer.protocol_name) == ("consumer", "range")
    assert [(item.member_id, item.subscription) for item in answer.members] == [("consumer-1", b"range-subscription")]
    assert groups.state == "CompletingRebalance"
    assert groups.heartbeat("consumer-1", 1) is E.NONE
    assert groups.synced(groups.sync("consumer-1", 1, {"consumer-1": b"all"})).assignment == b"all"
    assert groups.state == "Stable"
    assert groups.heartbeat("consumer-1", 1) is E.NONE


def test_old_clients_join_in_one_step():
    groups = Groups()
    answer = groups.joined(groups.join(version=3))
    assert (answer.error, answer.generation_id, answer.member_id) == (E.NONE, 1, "c-1")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"group": ""}, E.INVALID_GROUP_ID),
        ({"session": 999}, E.INVALID_SESSION_TIMEOUT),
        ({"session": 1_000}, E.MEMBER_ID_REQUIRED),
        ({"session": 1_800_001}, E.INVALID_SESSION_TIMEOUT),
        ({"protocols": ()}, E.INCONSISTENT_GROUP_PROTOCOL),
        ({"protocol_type": ""}, E.INCONSISTENT_GROUP_PROTOCOL),
        ({"protocols": (("range", bytes(262_145)),)}, E.INVALID_REQUEST),
        ({"member_id": "never-given"}, E.UNKNOWN_MEMBER_ID),
    ],
)
def test_joins_that_are_refused_at_once(options, error):
    groups = Groups()
    assert groups.joined(groups.join(**options)).error is error


def test_members_that_do_not_fit_are_refused_and_the_group_goes_on():
    groups = Groups()
    (member,) = groups.stable()
    for options in ({"protocols": (("sticky", b""),)}, {"protocol_type": "connect"}):
        assert groups.joined(groups.join(**options)).error is E.INCONSISTENT_GROUP_PROTOCOL
    assert groups.heartbeat(member, 1) is E.NONE


def test_a_second_member_makes_the_first_one_join_again():
    groups = Groups()
    (first,) = groups.stable()
    second, waiting = groups.enter()
    assert groups.is_waiting(waiting)
    assert groups.heartbeat(first, 1) is E.REBALANCE_IN_PROGRESS
    assert groups.synced(groups.sync(first, 1)).error is E.REBALANCE_IN_PROGRESS
    again = groups.join(first)
    assert groups.joined(again).generation_id == groups.joined(waiting).generation_id == 2
    assert {item.member_id for item in groups.joined(again).members} == {first, second}
    assert groups.joined(waiting).members == (), "only the leader assigns"
    assert groups.heartbeat(first, 1) is E.ILLEGAL_GENERATION
    follower = groups.sync(second, 2)
    assert groups.is_waiting(follower)
    groups.sync(first, 2, {first: b"0", second: b"1"})
    assert groups.synced(follower).assignment == b"1"


def test_a_join_storm_ends_in_one_stable_group_with_everybody_in_it():
    groups = Groups()
    members = groups.stable(20)
    assert groups.state == "Stable"
    assert all(groups.heartbeat(member, groups.generation) is E.NONE for member in members)
    assert len(groups.coordinator.describe("g").members) == 20


def test_a_storm_within_the_initial_delay_is_one_rebalance():
    groups = Groups(GroupConfig(initial_rebalance_delay_ms=300))
    entered = []
    for _ in range(5):
        entered.append(groups.enter())
        groups.sleep(200)
    assert all(groups.is_waiting(token) for _, token in entered), "each newcomer moves the end of the delay"
    groups.sleep(100)
    assert {groups.joined(token).generation_id for _, token in entered} == {1}


def test_the_initial_delay_never_outlasts_the_rebalance_timeout():
    groups = Groups(GroupConfig(initial_rebalance_delay_ms=300))
    tokens = []
    for _ in range(4):
        tokens.append(groups.enter(rebalance=500)[1])
        groups.sleep(200)
    assert groups.joined(tokens[0]).generation_id == 1


def test_a_given_id_that_is_not_used_lapses_and_holds_up_nobody_for_longer():
    groups = Groups()
    groups.stable()
    forgotten = groups.joined(groups.join(session=5_000)).member_id
    _, waiting = groups.enter()
    groups.join("c-1")
    assert groups.is_waiting(waiting), "the one with the given id may still come"
    groups.sleep(5_000)
    assert groups.joined(waiting).generation_id == 2
    assert groups.joined(groups.join(forgotten)).error is E.UNKNOWN_MEMBER_ID


def test_a_lost_member_is_dropped_after_its_session_and_the_rest_take_over():
    groups = Groups()
    first, second = groups.stable(2)
    for _ in range(5):
        groups.sleep(1_000)
        assert groups.heartbeat(first, 2) is E.NONE
    groups.sleep(1_000)
    assert groups.heartbeat(first, 2) is E.REBALANCE_IN_PROGRESS
    assert groups.heartbeat(second, 2) is E.UNKNOWN_MEMBER_ID
    assert groups.joined(groups.join(first)).generation_id == 3


def test_a_member_that_only_heartbeats_is_dropped_when_the_time_to_join_is_over():
    groups = Groups()
    first, second = groups.stable(2, rebalance=10_000)
    _, waiting = groups.enter(rebalance=10_000)
    groups.join(first)
    for _ in range(9):
        groups.sleep(1_000)
        assert groups.heartbeat(second, 2) is E.REBALANCE_IN_PROGRESS
    assert groups.is_waiting(waiting)
    groups.sleep(1_000)
    assert groups.joined(waiting).generation_id == 3
    assert groups.heartbeat(second, 2) is E.UNKNOWN_MEMBER_ID


def test_waiting_members_do_not_expire():
    groups = Groups()
    first, second = groups.stable(2)
    token = groups.join(first, protocols=(("range", b"changed"),))
    for _ in range(10):
        groups.sleep(5_000)
        assert groups.heartbeat(second, 2) is E.REBALANCE_IN_PROGRESS
    assert groups.is_waiting(token), "joined 50 seconds ago with a session of 6: it waits for us"
    groups.join(second)
    assert groups.joined(token).error is E.NONE


def test_a_member_whose_connection_is_gone_has_a_session_to_come_back():
    groups = Groups()
    first, second = groups.stable(2)
    lost = groups.join(first, protocols=(("range", b"changed"),))
    groups.sleep(5_000)
    groups.heartbeat(second, 2)
    groups.coordinator.abandon(lost, groups.now)
    groups.sleep(5_000)
    groups.heartbeat(second, 2)
    token = groups.join(second)
    assert groups.is_waiting(token)
    groups.sleep(1_000)
    assert groups.joined(token).generation_id == 3
    assert [item.member_id for item in groups.joined(token).members] == [second]


def test_a_member_that_never_syncs_is_dropped_after_the_rebalance_timeout():
    groups = Groups()
    first, second = groups.stable(2, rebalance=10_000)
    token_1 = groups.join(first, protocols=(("range", b"changed"),), rebalance=10_000)
    token_2 = groups.join(second, rebalance=10_000)
    assert groups.joined(token_1).generation_id == groups.joined(token_2).generation_id == 3
    groups.sync(first, 3, {first: b"x", second: b"y"})
    for _ in range(9):
        groups.sleep(1_000)
        assert groups.heartbeat(first, 3) is E.NONE
        assert groups.heartbeat(second, 3) is E.NONE
    groups.sleep(1_000)
    assert groups.heartbeat(second, 3) is E.UNKNOWN_MEMBER_ID
    assert groups.heartbeat(first, 3) is E.REBALANCE_IN_PROGRESS


def test_a_leader_that_never_syncs_does_not_keep_the_others_waiting():
    groups = Groups()
    first, second = groups.stable(2, rebalance=10_000)
    groups.join(first, protocols=(("range", b"changed"),), rebalance=10_000)
    groups.join(second, rebalance=10_000)
    waiting = groups.sync(second, 3)
    for _ in range(10):
        groups.sleep(1_000)
        groups.heartbeat(first, 3)
    assert groups.synced(waiting).error is E.REBALANCE_IN_PROGRESS
    answer = groups.joined(groups.join(second))
    assert (answer.generation_id, answer.leader) == (4, second)


def test_the_leader_leaves_during_sync():
    groups = Groups()
    first, second = groups.stable(2)
    groups.join(first, protocols=(("range", b"changed"),))
    groups.join(second)
    waiting = groups.sync(second, 3)
    assert groups.leave(first) is E.NONE
    assert groups.synced(waiting).error is E.REBALANCE_IN_PROGRESS
    answer = groups.joined(groups.join(second))
    assert (answer.generation_id, answer.leader, len(answer.members)) == (4, second, 1)


def test_the_last_member_leaves_an_empty_group_whose_generation_goes_on():
    groups = Groups()
    (member,) = groups.stable()
    assert groups.leave(member) is E.NONE
    assert (groups.state, groups.generation) == ("Empty", 2)
    groups.stable()
    assert groups.generation == 3


def test_leaving_answers_who_was_waiting_and_unknown_ones():
    groups = Groups()
    first, second = groups.stable(2)
    waiting = groups.join(second, protocols=(("range", b"changed"),))
    assert groups.leave(second) is E.NONE
    assert groups.joined(waiting).error is E.UNKNOWN_MEMBER_ID
    assert groups.leave(second) is E.UNKNOWN_MEMBER_ID
    given = groups.joined(groups.join()).member_id
    assert groups.leave(given) is E.NONE
    assert groups.joined(groups.join(given)).error is E.UNKNOWN_MEMBER_ID
    assert groups.heartbeat(first, 2) is E.REBALANCE_IN_PROGRESS
    assert groups.coordinator.leave("nobody", [], groups.now) == []


def test_the_generation_rises_only_by_a_rebalance():
    groups = Groups()
    first, second = groups.stable(2)
    for _ in range(3):
        # A follower that asks again, and a lost answer, change nothing.
        answer = groups.joined(groups.join(second))
        assert (answer.generation_id, answer.members) == (2, ())
        assert groups.synced(groups.sync(second, 2)).assignment == second.encode()
    token = groups.join(first)
    assert groups.is_waiting(token), "the leader joins again because it wants to assign again"
    groups.join(second)
    assert groups.joined(token).generation_id == 3


def test_a_lost_join_answer_is_given_again_while_the_group_completes():
    groups = Groups()
    member, token = groups.enter()
    again = groups.join(member)
    assert groups.joined(again) == groups.joined(token)
    assert groups.generation == 1


@pytest.mark.parametrize(
    ("member", "generation", "error"),
    [("c-1", 0, E.ILLEGAL_GENERATION), ("c-1", 2, E.ILLEGAL_GENERATION), ("nobody", 1, E.UNKNOWN_MEMBER_ID)],
)
def test_who_may_not_heartbeat_or_sync(member, generation, error):
    groups = Groups()
    groups.stable()
    assert groups.heartbeat(member, generation) is error
    assert groups.synced(groups.sync(member, generation)).error is error


def test_requests_to_a_group_that_does_not_exist():
    groups = Groups()
    assert groups.heartbeat("m", 1) is E.UNKNOWN_MEMBER_ID
    assert groups.synced(groups.sync("m", 1)).error is E.UNKNOWN_MEMBER_ID
    assert groups.leave("m") is E.UNKNOWN_MEMBER_ID
    assert groups.coordinator.heartbeat(GroupMetadata("", 1, "m"), 0) is E.INVALID_GROUP_ID


@pytest.mark.parametrize(
    ("protocol_type", "protocol_name", "error"),
    [
        ("consumer", "range", E.NONE),
        ("connect", "range", E.INCONSISTENT_GROUP_PROTOCOL),
        ("consumer", "sticky", E.INCONSISTENT_GROUP_PROTOCOL),
    ],
)
def test_sync_compares_the_protocol_where_the_version_names_it(protocol_type, protocol_name, error):
    groups = Groups()
    (member,) = groups.stable()
    answer = groups.synced(groups.sync(member, 1, protocol_type=protocol_type, protocol_name=protocol_name))
    assert answer.error is error


def test_a_follower_cannot_assign():
    groups = Groups()
    first, second = groups.stable(2)
    groups.join(first, protocols=(("range", b"changed"),))
    groups.join(second)
    waiting = groups.sync(second, 3, {first: b"stolen", second: b"stolen"})
    assert groups.is_waiting(waiting)
    groups.sync(first, 3, {first: b"x", second: b"y"})
    assert groups.synced(waiting).assignment == b"y"


def test_a_cooperative_rebalance_in_two_steps():
    """KIP-429: the new member gets nothing at first; who gave up partitions joins again; then it gets them."""
    groups = Groups()
    (first,) = groups.stable(protocols=COOPERATIVE)
    second, waiting = groups.enter(protocols=COOPERATIVE)
    token = groups.join(first, protocols=(("cooperative-sticky", b"owns 0,1"),))
    assert groups.joined(token).protocol_name == "cooperative-sticky"
    subscriptions = {item.member_id: item.subscription for item in groups.joined(token).members}
    assert subscriptions == {first: b"owns 0,1", second: b"owns nothing"}
    idle = groups.sync(second, 2)
    kept = groups.sync(first, 2, {first: b"0"})
    assert (groups.synced(kept).assignment, groups.synced(idle).assignment) == (b"0", b"")
    # First gave up partition 1 and says so; second hears of the rebalance by its heartbeat.
    again = groups.join(first, protocols=(("cooperative-sticky", b"owns 0"),))
    assert groups.heartbeat(second, 2) is E.REBALANCE_IN_PROGRESS
    follower = groups.join(second, protocols=COOPERATIVE)
    assert groups.joined(again).generation_id == groups.joined(follower).generation_id == 3
    waiting = groups.sync(second, 3)
    groups.sync(first, 3, {first: b"0", second: b"1"})
    assert groups.synced(waiting).assignment == b"1"


def test_a_follower_whose_subscription_changed_starts_a_rebalance():
    groups = Groups()
    first, second = groups.stable(2)
    token = groups.join(second, protocols=(("range", b"other topics"),))
    assert groups.is_waiting(token)
    assert groups.heartbeat(first, 2) is E.REBALANCE_IN_PROGRESS


def test_the_size_of_a_group_and_the_number_of_groups_are_bounded():
    groups = Groups(GroupConfig(max_members=1, max_groups=1))
    groups.stable()
    assert groups.joined(groups.join()).error is E.GROUP_MAX_SIZE_REACHED
    assert groups.joined(groups.join(instance="i")).error is E.GROUP_MAX_SIZE_REACHED
    assert groups.joined(groups.join(group="h")).error is E.POLICY_VIOLATION


# -- Static members (KIP-345) -----------------------------------------------------------------------------------


def static_pair() -> tuple[Groups, str, str]:
    """A stable group of two static members, `one` leading."""
    groups = Groups()
    token_1 = groups.join(instance="one", client="c")
    first = groups.joined(token_1).member_id
    token_2 = groups.join(instance="two")
    token_1 = groups.join(first, instance="one")
    second = groups.joined(token_2).member_id
    waiting = groups.sync(second, 2, instance="two")
    groups.sync(first, 2, {first: b"0", second: b"1"}, instance="one")
    assert groups.synced(waiting).assignment == b"1"
    return groups, first, second


def test_a_static_member_restarts_without_a_rebalance_and_its_old_self_is_fenced():
    groups, first, second = static_pair()
    answer = groups.joined(groups.join(instance="two"))
    assert (answer.error, answer.generation_id, answer.leader) == (E.NONE, 2, first)
    assert answer.member_id != second
    assert groups.synced(groups.sync(answer.member_id, 2, instance="two")).assignment == b"1"
    assert groups.heartbeat(second, 2, "two") is E.FENCED_INSTANCE_ID
    assert groups.synced(groups.sync(second, 2, instance="two")).error is E.FENCED_INSTANCE_ID
    assert groups.joined(groups.join(second, instance="two")).error is E.FENCED_INSTANCE_ID
    assert groups.commit(1, generation=2, member=second, instance="two") is E.FENCED_INSTANCE_ID
    assert groups.commit_in(9, 1, generation=2, member=second, instance="two") is E.FENCED_INSTANCE_ID
    assert groups.leave(second, "two") is E.FENCED_INSTANCE_ID
    assert groups.heartbeat(first, 2, "one") is E.NONE, "the other one noticed nothing"


@pytest.mark.parametrize("version", [5, 9])
def test_a_static_leader_that_restarts_does_not_assign_again(version):
    groups, first, _ = static_pair()
    answer = groups.joined(groups.join(instance="one", version=version))
    assert (answer.error, answer.generation_id) == (E.NONE, 2)
    if version >= 9:
        assert (answer.leader, answer.skip_assignment, len(answer.members)) == (answer.member_id, True, 2)
    else:
        assert (answer.leader, answer.skip_assignment, answer.members) == (first, False, ())
    assert groups.synced(groups.sync(answer.member_id, 2, instance="one")).assignment == b"0"
    groups.restart()
    assert groups.heartbeat(answer.member_id, 2, "one") is E.NONE, "the new member id is in the log"


def test_a_static_member_that_comes_back_with_other_protocols_starts_a_rebalance():
    groups = Groups()
    both = (("range", b""), ("sticky", b""))
    member = groups.joined(groups.join(instance="one", protocols=both)).member_id
    groups.sync(member, 1, {member: b"0"}, instance="one")
    answer = groups.joined(groups.join(instance="one", protocols=(("sticky", b""), ("range", b""))))
    assert (answer.generation_id, answer.protocol_name) == (2, "sticky")


def test_a_static_member_that_restarts_while_the_group_completes_starts_a_new_rebalance():
    groups, first, second = static_pair()
    groups.join(first, instance="one", protocols=(("range", b"changed"),))
    groups.join(second, instance="two")
    old_sync = groups.sync(second, 3, instance="two")
    token = groups.join(instance="two")
    assert groups.synced(old_sync).error is E.FENCED_INSTANCE_ID
    assert groups.is_waiting(token)
    assert groups.heartbeat(first, 3, "one") is E.REBALANCE_IN_PROGRESS
    groups.join(first, instance="one")
    assert groups.joined(token).generation_id == 4


def test_of_two_processes_with_one_instance_id_the_older_is_answered_fenced_while_it_waits():
    groups, first, second = static_pair()
    old = groups.join(second, instance="two", protocols=(("range", b"changed"),))
    assert groups.is_waiting(old)
    new = groups.join(instance="two")
    assert groups.joined(old).error is E.FENCED_INSTANCE_ID
    groups.join(first, instance="one")
    assert groups.joined(new).error is E.NONE


def test_an_absent_static_member_keeps_its_place_until_its_session_ends():
    groups = Groups()
    options = {"rebalance": 1_000, "session": 30_000}
    first = groups.joined(groups.join(instance="one", **options)).member_id
    groups.sync(first, 1, {first: b"0"}, instance="one")
    token = groups.join(instance="two", **options)
    groups.sleep(1_000)
    answer = groups.joined(token)
    assert (answer.generation_id, len(answer.members)) == (2, 2), "still counted: it may be restarting"


def test_the_lead_goes_to_a_member_that_is_there():
    groups = Groups()
    absent = groups.joined(groups.join(instance="one", rebalance=1_000, session=30_000)).member_id
    groups.sync(absent, 1, {absent: b"0"}, instance="one")
    present, token = groups.enter(rebalance=1_000, session=30_000)
    groups.sleep(1_000)
    answer = groups.joined(token)
    assert (answer.leader, len(answer.members)) == (present, 2)
    assert groups.synced(groups.sync(present, 2, {present: b"0"})).assignment == b"0"


def test_when_all_static_members_are_away_their_sessions_decide():
    groups = Groups()
    options = {"rebalance": 1_000, "session": 30_000}
    one = groups.joined(groups.join(instance="one", **options)).member_id
    groups.sync(one, 1, {one: b"0"}, instance="one")
    visitor, token = groups.enter(**options)
    assert groups.leave(visitor) is E.NONE
    assert groups.joined(token).error is E.UNKNOWN_MEMBER_ID
    groups.sleep(29_999)
    assert (groups.state, groups.generation) == ("PreparingRebalance", 1)
    assert groups.heartbeat(one, 1, "one") is E.REBALANCE_IN_PROGRESS, "its place is still there"
    groups.sleep(30_000)
    assert (groups.state, groups.generation) == ("Empty", 2)


def test_a_lost_connection_while_syncing():
    groups = Groups()
    first, second = groups.stable(2)
    groups.join(first, protocols=(("range", b"changed"),))
    groups.join(second)
    lost = groups.sync(second, 3)
    groups.coordinator.abandon(lost, groups.now)
    groups.coordinator.abandon(999, groups.now)
    groups.sync(first, 3, {first: b"0", second: b"1"})
    assert groups.is_waiting(lost), "nobody is there to be answered"
    assert groups.synced(groups.sync(second, 3)).assignment == b"1"


def test_a_member_without_a_rebalance_timeout_has_its_session_to_join():
    groups = Groups()
    first, second = groups.stable(2, rebalance=-1, session=2_000)
    token = groups.join(first, protocols=(("range", b"changed"),), rebalance=-1, session=2_000)
    for _ in range(2):
        groups.heartbeat(second, 2)
        groups.sleep(1_000)
    assert groups.joined(token).generation_id == 3


def test_an_unknown_instance_id():
    groups, first, _ = static_pair()
    assert groups.heartbeat(first, 2, "three") is E.UNKNOWN_MEMBER_ID
    assert groups.leave("", "three") is E.UNKNOWN_MEMBER_ID


def test_an_admin_removes_a_static_member_by_its_instance_id_alone():
    groups, first, second = static_pair()
    assert groups.leave("", "two") is E.NONE
    assert groups.heartbeat(second, 2, "two") is E.UNKNOWN_MEMBER_ID
    assert groups.heartbeat(first, 2, "one") is E.REBALANCE_IN_PROGRESS


# -- Restart ----------------------------------------------------------------------------------------------------


def test_a_stable_group_survives_a_restart_with_generation_and_assignments():
    groups = Groups()
    first, second = groups.stable(2)
    groups.restart()
    assert (groups.state, groups.generation) == ("Stable", 2)
    for member in (first, second):
        assert groups.heartbeat(member, 2) is E.NONE
        assert groups.synced(groups.sync(member, 2)).assignment == member.encode()
    assert groups.heartbeat(first, 1) is E.ILLEGAL_GENERATION


def test_members_that_do_not_come_back_after_a_restart_expire():
    groups = Groups()
    first, second = groups.stable(2)
    groups.restart()
    groups.sleep(5_999)
    assert groups.heartbeat(first, 2) is E.NONE
    groups.sleep(1)
    assert groups.heartbeat(second, 2) is E.UNKNOWN_MEMBER_ID
    assert groups.joined(groups.join(first)).generation_id == 3


def test_a_restart_in_the_middle_of_a_rebalance_lets_the_members_join_again():
    groups = Groups()
    first, second = groups.stable(2)
    groups.join(first, protocols=(("range", b"changed"),))
    groups.join(second)
    assert groups.generation == 3
    groups.restart()
    assert groups.generation == 2, "generation 3 was never assigned"
    assert groups.heartbeat(first, 3) is E.ILLEGAL_GENERATION
    token = groups.join(first, protocols=(("range", b"changed"),))
    groups.join(second)
    assert groups.joined(token).generation_id == 3


def test_a_checkpoint_in_the_middle_of_a_rebalance_keeps_the_last_assignment():
    groups = Groups()
    first, second = groups.stable(2)
    groups.join(first, protocols=(("range", b"changed"),))
    groups.join(second)
    groups.log = groups.coordinator.snapshot()
    groups.restart()
    assert groups.synced(groups.sync(second, 2)).assignment == second.encode()


def test_nobody_hears_of_an_assignment_before_its_record_was_handed_out():
    groups = Groups()
    member, _ = groups.enter()
    groups.coordinator.sync(GroupMetadata("g", 1, member), {member: b"all"}, groups.now)
    (record,) = groups.coordinator.take_records()
    assert b"all" in (record[1] or b"")
    assert len(groups.coordinator.drain()) == 1


def test_without_members_there_is_no_deadline():
    groups = Groups()
    assert groups.coordinator.next_deadline() is None
    (member,) = groups.stable()
    assert groups.coordinator.next_deadline() == 6_000
    groups.leave(member)
    assert groups.coordinator.next_deadline() is None

"""Offsets of groups: who may commit, what is stable, what is removed; and what tools see."""

from __future__ import annotations

import pytest

from semel.coordinator.group import GroupConfig, LeavingMember, OffsetCommit
from semel.errors import CorruptBatch, ErrorCode
from semel.types import GroupMetadata, TopicPartition

from .drivers import P0, P1, Groups

E = ErrorCode
DAY = 86_400_000
GENERATION = 2


def stable_pair() -> tuple[Groups, str, str]:
    groups = Groups()
    first, second = groups.stable(2)
    assert groups.generation == GENERATION
    return groups, first, second


# -- Who may commit ---------------------------------------------------------------------------------------------

# Who commits with which generation, and the answers to OffsetCommit and TxnOffsetCommit (kafka_facts 2.11).
COMMITS = [
    ("c-1", GENERATION, None, E.NONE, E.NONE),
    ("", -1, None, E.UNKNOWN_MEMBER_ID, E.NONE),
    ("c-1", GENERATION - 1, None, E.ILLEGAL_GENERATION, E.ILLEGAL_GENERATION),
    ("c-1", GENERATION + 1, None, E.ILLEGAL_GENERATION, E.ILLEGAL_GENERATION),
    ("c-1", -1, None, E.ILLEGAL_GENERATION, E.ILLEGAL_GENERATION),
    ("nobody", GENERATION, None, E.UNKNOWN_MEMBER_ID, E.UNKNOWN_MEMBER_ID),
    ("nobody", -1, None, E.UNKNOWN_MEMBER_ID, E.UNKNOWN_MEMBER_ID),
    ("", GENERATION, None, E.UNKNOWN_MEMBER_ID, E.UNKNOWN_MEMBER_ID),
    ("c-1", GENERATION, "nobody", E.UNKNOWN_MEMBER_ID, E.UNKNOWN_MEMBER_ID),
]


@pytest.mark.parametrize(("member", "generation", "instance", "plain", "transactional"), COMMITS)
def test_who_may_commit_in_a_stable_group(member, generation, instance, plain, transactional):
    groups, _, _ = stable_pair()
    assert groups.commit(5, member=member, generation=generation, instance=instance) is plain
    assert groups.fetch() == (E.NONE, 5 if plain is E.NONE else -1)
    assert groups.commit_in(9, 6, member=member, generation=generation, instance=instance) is transactional
    groups.end_transaction(9, True)
    assert groups.fetch()[1] == (6 if transactional is E.NONE else 5 if plain is E.NONE else -1)


def test_commits_during_a_rebalance():
    groups, first, second = stable_pair()
    groups.join(first, protocols=(("range", b"changed"),))
    assert groups.state == "PreparingRebalance"
    assert groups.commit(5, member=second, generation=2) is E.NONE
    assert groups.commit_in(9, 5, member=second, generation=2) is E.NONE
    groups.join(second)
    assert groups.state == "CompletingRebalance"
    assert groups.commit(6, member=second, generation=3) is E.REBALANCE_IN_PROGRESS
    assert groups.commit_in(9, 6, member=second, generation=3) is E.NONE
    assert groups.commit_in(9, 7, member=second, generation=2) is E.ILLEGAL_GENERATION, "a zombie of KIP-447"


@pytest.mark.parametrize(
    ("generation", "version", "plain", "transactional"),
    [(-1, 8, E.NONE, E.NONE), (0, 8, E.ILLEGAL_GENERATION, E.ILLEGAL_GENERATION), (0, 9, E.GROUP_ID_NOT_FOUND, None)],
)
def test_commits_to_a_group_that_does_not_exist(generation, version, plain, transactional):
    assert Groups().commit(5, generation=generation, version=version) is plain
    if transactional is not None:
        groups = Groups()
        assert groups.commit_in(9, 5, generation=generation) is transactional
        assert bool(groups.coordinator.list_groups()) is (transactional is E.NONE)


def test_commits_to_an_empty_group():
    groups = Groups()
    (member,) = groups.stable()
    groups.leave(member)
    assert groups.commit(5) is E.NONE
    assert groups.commit(6, member=member, generation=-1) is E.NONE
    assert groups.commit(7, member=member, generation=1) is E.UNKNOWN_MEMBER_ID
    assert groups.commit_in(9, 7, member=member, generation=1) is E.UNKNOWN_MEMBER_ID
    assert groups.fetch() == (E.NONE, 6)


def test_the_generation_is_compared_after_a_restart_too():
    groups, first, _ = stable_pair()
    groups.restart()
    assert groups.commit_in(9, 5, member=first, generation=1) is E.ILLEGAL_GENERATION
    assert groups.commit_in(9, 5, member=first, generation=2) is E.NONE


def test_a_commit_renews_the_session():
    groups = Groups()
    (member,) = groups.stable()
    for offset in range(4):
        groups.sleep(5_000)
        assert groups.commit(offset, member=member, generation=1) is E.NONE


def test_metadata_is_kept_and_bounded_partition_by_partition():
    groups = Groups()
    write = groups.coordinator.commit_offsets(
        GroupMetadata("g"), {P0: OffsetCommit(5, 3, "é" * 2_048), P1: OffsetCommit(6, -1, "é" * 2_049)}, 0, 8
    )
    assert write.errors == {P0: E.NONE, P1: E.OFFSET_METADATA_TOO_LARGE}
    groups.write(write.records)
    found = groups.coordinator.fetch_offsets("g", [P0, P1], require_stable=True)
    assert found[P0] == (E.NONE, 5, 3, "é" * 2_048)
    assert found[P1] == (E.NONE, -1, -1, "")


def test_the_empty_group_id_and_the_number_of_groups():
    groups = Groups(GroupConfig(max_groups=1))
    coordinator = groups.coordinator
    refused = coordinator.commit_offsets(GroupMetadata(""), {P0: OffsetCommit(1)}, 0, 8)
    assert (refused.error, refused.errors, refused.records) == (E.INVALID_GROUP_ID, {P0: E.INVALID_GROUP_ID}, [])
    groups.commit(1)
    assert coordinator.commit_offsets(GroupMetadata("h"), {}, 0, 8).error is E.POLICY_VIOLATION


# -- Stable and pending -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize(("commit", "after"), [(True, 6), (False, 5)])
def test_offsets_of_a_transaction_count_when_it_is_committed(commit, after, restart):
    groups = Groups()
    groups.commit(5)
    groups.commit_in(9, 6)
    if restart:
        groups.restart()
    assert groups.fetch() == (E.UNSTABLE_OFFSET_COMMIT, -1)
    assert groups.fetch(stable=False) == (E.NONE, 5)
    assert groups.coordinator.pending_producers() == {9}
    other = groups.coordinator.fetch_offsets("g", [P1], require_stable=True)
    assert other == {P1: (E.NONE, -1, -1, "")}, "another partition does not wait"
    groups.end_transaction(9, commit)
    groups.end_transaction(9, commit)
    if restart:
        groups.restart()
    assert groups.fetch() == (E.NONE, after)
    assert groups.coordinator.pending_producers() == set()


def test_a_failed_write_of_the_end_can_be_repeated():
    groups = Groups()
    groups.commit_in(9, 6)
    assert groups.coordinator.end_transaction(9, True), "and the append of these fails"
    assert groups.fetch() == (E.UNSTABLE_OFFSET_COMMIT, -1)
    groups.end_transaction(9, True)
    assert groups.fetch() == (E.NONE, 6)


def test_fetching_everything_and_an_unknown_group():
    groups = Groups()
    groups.commit(5)
    assert groups.coordinator.fetch_offsets("g", None, require_stable=True) == {P0: (E.NONE, 5, -1, "")}
    assert groups.coordinator.fetch_offsets("h", None, require_stable=True) == {}
    assert groups.coordinator.fetch_offsets("h", [P0], require_stable=True) == {P0: (E.NONE, -1, -1, "")}
    groups.commit_in(9, 6)
    assert groups.coordinator.fetch_offsets("g", None, require_stable=True)[P0].error is E.UNSTABLE_OFFSET_COMMIT


# -- Deleting ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restart", [False, True])
def test_a_deleted_group_is_gone_with_its_pending_offsets(restart):
    groups = Groups()
    groups.commit(5)
    groups.commit_in(9, 6)
    assert groups.coordinator.delete_group("g") is E.NONE
    groups.settle()
    if restart:
        groups.restart()
    groups.end_transaction(9, True)
    assert groups.fetch() == (E.NONE, -1), "the commit brought the group's offset back"
    assert groups.coordinator.list_groups() == []


def test_which_groups_cannot_be_deleted():
    groups, first, second = stable_pair()
    assert groups.coordinator.delete_group("g") is E.NON_EMPTY_GROUP
    assert groups.coordinator.delete_group("h") is E.GROUP_ID_NOT_FOUND
    assert groups.coordinator.delete_group("") is E.INVALID_GROUP_ID
    groups.coordinator.leave("g", [LeavingMember(first), LeavingMember(second)], groups.now)
    assert groups.coordinator.delete_group("g") is E.NONE
    groups.settle()
    groups.restart()
    assert groups.coordinator.describe("g").error is E.GROUP_ID_NOT_FOUND


def test_offsets_of_a_deleted_topic_are_dropped_everywhere():
    groups = Groups()
    groups.commit(5)
    groups.commit_in(9, 6)
    other = groups.coordinator.commit_offsets(
        GroupMetadata("h"), {P1: OffsetCommit(1), TopicPartition("kept", 0): OffsetCommit(2)}, 0, 8
    )
    groups.write(other.records)
    groups.coordinator.drop_topic("orders")
    groups.settle()
    groups.restart()
    groups.end_transaction(9, True)
    assert groups.coordinator.fetch_offsets("g", None, require_stable=False) == {}
    assert list(groups.coordinator.fetch_offsets("h", None, require_stable=False)) == [TopicPartition("kept", 0)]


def test_deleting_single_offsets():
    groups = Groups()
    subscription = b"\x00\x01\x00\x00\x00\x01\x00\x06orders\xff\xff\xff\xff"
    (member,) = groups.stable(protocols=(("range", subscription),))
    kept = TopicPartition("kept", 0)
    for partition in (P0, kept):
        write = groups.coordinator.commit_offsets(GroupMetadata("g", 1, member), {partition: OffsetCommit(5)}, 0, 8)
        groups.write(write.records)
    error, errors = groups.coordinator.delete_offsets("g", [P0, kept, TopicPartition("never", 0)])
    assert error is E.NONE
    assert list(errors.values()) == [E.GROUP_SUBSCRIBED_TO_TOPIC, E.NONE, E.NONE]
    groups.settle()
    groups.restart()
    assert list(groups.coordinator.fetch_offsets("g", None, require_stable=True)) == [P0]
    assert groups.coordinator.delete_offsets("h", [P0]) == (E.GROUP_ID_NOT_FOUND, {})
    connect = Groups()
    connect.stable(protocol_type="connect")
    assert connect.coordinator.delete_offsets("g", [P0]) == (E.NON_EMPTY_GROUP, {})


def test_offsets_of_a_group_without_members_expire_and_then_the_group():
    groups = Groups()
    (member,) = groups.stable()
    groups.commit(5, member=member, generation=1)
    groups.now = 30 * DAY
    groups.coordinator.expire_offsets(groups.now)
    assert groups.fetch() == (E.NONE, 5), "it has a member"
    groups.leave(member)
    groups.now += 7 * DAY - 1
    groups.coordinator.expire_offsets(groups.now)
    assert groups.fetch() == (E.NONE, 5), "counted from when it became empty"
    groups.now += 1
    groups.coordinator.expire_offsets(groups.now)
    groups.settle()
    assert groups.fetch() == (E.NONE, -1)
    groups.restart()
    assert groups.coordinator.list_groups() == []


def test_offsets_of_a_simple_consumer_expire_by_their_own_age_and_never_while_one_is_pending():
    groups = Groups()
    groups.commit(5)
    groups.commit_in(9, 6)
    groups.now = 7 * DAY
    groups.coordinator.expire_offsets(groups.now)
    assert groups.fetch(stable=False) == (E.NONE, 5)
    groups.end_transaction(9, False)
    groups.coordinator.expire_offsets(groups.now)
    assert groups.fetch() == (E.NONE, -1)
    forever = Groups(GroupConfig(offsets_retention_ms=-1))
    forever.commit(5)
    forever.coordinator.expire_offsets(10**15)
    assert forever.fetch() == (E.NONE, 5)


# -- Tools, and the start ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("states", "types", "found"),
    [
        ((), (), ["g", "h"]),
        (("Stable",), (), ["g"]),
        (("stable", "EMPTY"), (), ["g", "h"]),
        (("Dead",), (), []),
        ((), ("Classic",), ["g", "h"]),
        ((), ("consumer",), []),
    ],
)
def test_list_groups(states, types, found):
    groups = Groups()
    groups.stable()
    groups.write(groups.coordinator.commit_offsets(GroupMetadata("h"), {P0: OffsetCommit(1)}, 0, 8).records)
    listed = groups.coordinator.list_groups(states, types)
    assert [item.group_id for item in listed] == found
    assert all(item.protocol_type == {"g": "consumer", "h": ""}[item.group_id] for item in listed)


def test_describe_group():
    groups, first, second = stable_pair()
    described = groups.coordinator.describe("g")
    assert (described.error, described.state, described.protocol, described.generation_id) == (
        E.NONE,
        "Stable",
        "range",
        2,
    )
    assert [(item.member_id, item.assignment) for item in described.members] == [
        (first, first.encode()),
        (second, second.encode()),
    ]
    unknown = groups.coordinator.describe("h")
    assert (unknown.error, unknown.state) == (E.GROUP_ID_NOT_FOUND, "Dead")


def test_a_checkpoint_rebuilds_groups_and_offsets():
    groups, first, _ = stable_pair()
    groups.commit(5, member=first, generation=2)
    groups.commit_in(9, 6, member=first, generation=2)
    groups.log = groups.coordinator.snapshot()
    groups.restart()
    assert groups.heartbeat(first, 2) is E.NONE
    assert groups.fetch(stable=False) == (E.NONE, 5)
    groups.end_transaction(9, True)
    assert groups.fetch() == (E.NONE, 6)


def test_a_strange_record_stops_the_start():
    with pytest.raises(CorruptBatch):
        Groups().coordinator.replay(b"\x00\x63", b"", 0)

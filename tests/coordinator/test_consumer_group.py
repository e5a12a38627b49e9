"""Consumer groups (KIP-848): epochs, the way of a partition from one member to another, fencing, static members."""

from __future__ import annotations

from pathlib import Path

import pytest

from semel.coordinator import consumer_group
from semel.coordinator.consumer_group import STABLE, UNRELEASED, UNREVOKED, Current, MemberState, reconciled
from semel.coordinator.group import JoinRequest, LeavingMember
from semel.coordinator.transitions import mermaid
from semel.errors import ErrorCode
from semel.types import GroupMetadata, TopicPartition

from .consumers import REVOKE_MS, SESSION_MS, Consumers

E = ErrorCode


@pytest.fixture
def four() -> Consumers:
    """A topic `t` of four partitions."""
    return Consumers(t=4)


def two_members(groups: Consumers) -> None:
    """m1 has 0 and 1, m2 has 2 and 3, both at epoch 3."""
    t = groups.catalog.parts
    assert groups.join("m1").assignment == t("t")
    assert groups.join("m2").assignment == frozenset()
    assert groups.heartbeat("m1", 2).assignment == t("t", 0, 1)
    assert groups.heartbeat("m1", 2, owned=t("t", 0, 1)).member_epoch == 3
    assert groups.heartbeat("m2", 3).assignment == t("t", 2, 3)
    assert groups.group.state == "Stable"


def test_the_first_member_gets_everything_at_once(four: Consumers):
    answer = four.join("m1")
    assert (answer.error, answer.member_id, answer.member_epoch) == (E.NONE, "m1", 2)
    assert (answer.assignment, answer.heartbeat_interval_ms) == (four.catalog.parts("t"), 5_000)
    again = four.heartbeat("m1", 2)
    assert (again.error, again.member_epoch, again.assignment) == (E.NONE, 2, None)


def test_a_partition_changes_hands_only_after_it_was_given_up(four: Consumers):
    t = four.catalog.parts
    four.join("m1")
    joined = four.join("m2")
    assert (joined.member_epoch, joined.assignment) == (3, frozenset())
    assert four.group.state == "Reconciling"
    asked = four.heartbeat("m1", 2)
    assert (asked.member_epoch, asked.assignment) == (2, t("t", 0, 1)), "its epoch stays until it has let go"
    for owned in (None, t("t"), t("t", 0, 1, 2)):
        assert four.heartbeat("m1", 2, owned=owned).member_epoch == 2
        assert four.heartbeat("m2", 3).assignment is None
    assert four.heartbeat("m1", 2, owned=t("t", 0, 1)).member_epoch == 3
    assert four.heartbeat("m2", 3).assignment == t("t", 2, 3)
    assert four.group.state == "Stable"


def test_a_lost_answer_is_given_again_but_no_zombie_is_let_in(four: Consumers):
    two_members(four)
    t = four.catalog.parts
    assert four.heartbeat("m1", 2, owned=t("t", 0, 1)).member_epoch == 3, "the answer with epoch 3 was lost"
    for epoch, owned in ((2, t("t")), (2, None), (1, t("t", 0)), (4, t("t", 0, 1))):
        assert four.heartbeat("m1", epoch, owned=owned).error is E.FENCED_MEMBER_EPOCH
    assert four.heartbeat("stranger", 3).error is E.UNKNOWN_MEMBER_ID
    again = four.join("m1")
    assert (again.member_epoch, again.assignment) == (3, t("t", 0, 1)), "who begins anew has what it had"


def test_members_that_leave_or_fall_silent_make_room(four: Consumers):
    two_members(four)
    t = four.catalog.parts
    left = four.heartbeat("m2", -1)
    assert (left.error, left.member_epoch) == (E.NONE, -1)
    assert four.group.state == "Assigning"
    assert four.heartbeat("m1", 3).assignment == t("t")
    four.sleep(SESSION_MS - 1)
    assert set(four.group.members) == {"m1"}
    four.sleep(1)
    assert four.group.state == "Empty"
    assert four.heartbeat("m1", 4).error is E.UNKNOWN_MEMBER_ID
    assert four.heartbeat("m1", -1, group="unknown").error is E.GROUP_ID_NOT_FOUND
    assert four.heartbeat("m1", 4, group="unknown").error is E.GROUP_ID_NOT_FOUND


def test_a_member_that_does_not_let_go_in_time_is_fenced(four: Consumers):
    four.join("m1")
    four.join("m2")
    four.heartbeat("m1", 2)
    for _ in range(REVOKE_MS // 5_000 - 1):
        four.sleep(5_000)
        assert four.heartbeat("m1", 2).error is E.NONE
        four.heartbeat("m2", 3)
    four.sleep(5_000)
    assert four.heartbeat("m1", 2).error is E.UNKNOWN_MEMBER_ID
    assert four.heartbeat("m2", 3).assignment == four.catalog.parts("t")


def test_new_partitions_and_topics_raise_the_epoch(four: Consumers):
    four.join("m1", pattern="t|u.*")
    assert four.heartbeat("m1", 2).assignment is None
    four.catalog.put("t", 6)
    grown = four.heartbeat("m1", 2)
    assert (grown.member_epoch, grown.assignment) == (3, four.catalog.parts("t"))
    four.catalog.put("unrelated", 1)
    assert four.heartbeat("m1", 3).member_epoch == 4
    four.catalog.put("xyz", 1)
    assert four.heartbeat("m1", 4).assignment is None, "a topic that nobody wants changes nothing"
    four.catalog.drop("unrelated")
    assert four.heartbeat("m1", 4).assignment == four.catalog.parts("t")
    assert four.heartbeat("m1", 4, owned=four.catalog.parts("t")).member_epoch == 5


def test_another_subscription_is_served(four: Consumers):
    four.catalog.put("u", 2)
    four.join("m1")
    both = four.heartbeat("m1", 2, topics=("t", "u"))
    assert (both.member_epoch, both.assignment) == (3, four.catalog.parts("t") | four.catalog.parts("u"))
    assert four.heartbeat("m1", 3, topics=("u", "t")).member_epoch == 3, "the same topics in another order"
    nothing = four.heartbeat("m1", 3, topics=(), owned=frozenset())
    assert (nothing.member_epoch, nothing.assignment) == (4, frozenset())


def test_the_assignor_that_most_want(four: Consumers):
    four.join("m1", assignor="range")
    assert four.group.assignor == "range"
    four.join("m2")
    four.join("m3", assignor="uniform")
    four.join("m4", assignor="uniform")
    assert four.group.assignor == "uniform"
    assert four.join("m5", assignor="sticky").error is E.UNSUPPORTED_ASSIGNOR


def test_a_static_member_that_comes_back_moves_nothing(four: Consumers):
    two_members(four)
    four.join("s1", instance="i")
    four.converge()
    epoch = four.group.epoch
    had = four.group.members["s1"].current.assigned.keys()
    assert had
    assert four.join("s2", instance="i").error is E.UNRELEASED_INSTANCE_ID
    assert four.heartbeat("s2", epoch, instance="i").error is E.FENCED_INSTANCE_ID
    assert four.heartbeat("s1", epoch, instance="other").error is E.UNKNOWN_MEMBER_ID
    assert four.heartbeat("s1", -2, instance="i").member_epoch == -2
    back = four.join("s2", instance="i")
    assert (back.member_epoch, back.assignment) == (epoch, had)
    assert four.group.epoch == epoch, "nothing was rebalanced"
    assert four.heartbeat("s1", epoch, instance="i").error is E.FENCED_INSTANCE_ID


def test_a_static_member_that_stays_away_loses_its_place(four: Consumers):
    four.join("s1", instance="i")
    four.heartbeat("s1", -2, instance="i")
    four.join("m1")
    assert four.heartbeat("m1", 3).assignment is None
    four.sleep(SESSION_MS - 1)
    four.heartbeat("m1", 3)
    four.sleep(1)
    assert four.heartbeat("m1", 3).assignment == four.catalog.parts("t")


@pytest.mark.parametrize(
    "wrong",
    [
        {"group": ""},
        {"instance": ""},
        {"rebalance": -1},
        {"owned": None},
        {"owned": frozenset({(b"x" * 16, 0)})},
        {"topics": None},
        {"topics": ("t" * 300_000,)},
    ],
)
def test_a_bad_join_makes_no_group(four: Consumers, wrong: dict[str, object]):
    assert four.join("m1", **wrong).error is E.INVALID_REQUEST
    assert not four.coordinator.consumers.groups
    assert not four.log


def test_requests_that_make_no_sense(four: Consumers):
    four.join("m1")
    assert four.heartbeat("", 2).error is E.INVALID_REQUEST
    assert four.heartbeat("m1", -3).error is E.INVALID_REQUEST
    assert four.heartbeat("m1", -2).error is E.INVALID_REQUEST
    assert four.join("", version=1).error is E.INVALID_REQUEST
    assert four.join("", version=0).member_id == "c-1", "version 0 gives the member its id"
    assert four.join("m3", topics=None, pattern="([").error is E.INVALID_REGULAR_EXPRESSION
    assert set(four.group.members) == {"m1", "c-1"}


def test_who_may_commit(four: Consumers):
    two_members(four)
    assert four.commit("m1", 3) is E.NONE
    assert four.commit("m1", 2, partition=0) is E.NONE, "it has had this one since epoch 2 (KIP-1251)"
    assert four.commit("m1", 2, partition=2) is E.STALE_MEMBER_EPOCH, "this one is another member's now"
    assert four.commit("m2", 2, partition=2) is E.STALE_MEMBER_EPOCH, "it got this one in epoch 3"
    assert four.commit("m1", 4) is E.STALE_MEMBER_EPOCH
    assert four.commit("m1", 3, version=8) is E.UNSUPPORTED_VERSION
    assert four.commit("stranger", 3) is E.UNKNOWN_MEMBER_ID
    assert four.commit("", -1) is E.UNKNOWN_MEMBER_ID
    for member in ("m1", "m2"):
        four.heartbeat(member, -1)
    assert four.commit("", -1) is E.NONE, "an administrator may when nobody is there"
    assert four.commit("m1", 3) is E.UNKNOWN_MEMBER_ID


def test_who_may_commit_in_a_transaction(four: Consumers):
    two_members(four)

    def code(member: str, epoch: int) -> ErrorCode:
        identity = GroupMetadata("g", epoch, member)
        return four.coordinator.commit_transactional_offsets(identity, 9, {}, four.now).error

    assert code("m1", 3) is E.NONE
    assert code("m1", 2) is E.ILLEGAL_GENERATION, "a transaction of an older epoch is fenced, whatever it had then"
    assert code("m1", 4) is E.ILLEGAL_GENERATION
    assert code("stranger", 3) is E.UNKNOWN_MEMBER_ID
    assert code("", -1) is E.NONE


def test_who_may_read_offsets(four: Consumers):
    four.join("m1")
    check = four.coordinator.consumers.check_fetch
    assert check("g", "m1", 2) is E.NONE
    assert check("g", "m1", 1) is E.STALE_MEMBER_EPOCH
    assert check("g", "m2", 2) is E.UNKNOWN_MEMBER_ID
    assert check("g", None, -1) is E.NONE
    assert check("unknown", "m1", 1) is E.NONE


def test_everything_survives_a_restart_and_a_checkpoint(four: Consumers):
    four.catalog.put("u", 3)
    two_members(four)
    four.join("s1", instance="i", pattern="u")
    four.commit("m2", 3, partition=2)
    before = four.group
    for _ in range(2):
        four.restart()
        assert four.group.epoch == before.epoch
        assert four.group.target == before.target
        assert four.group.patterns == before.patterns
        assert four.group.owners == before.owners
        assert {key: (item.about, item.current) for key, item in four.group.members.items()} == {
            key: (item.about, item.current) for key, item in before.members.items()
        }
        four.checkpoint()
    four.converge()
    four.sleep(SESSION_MS)
    assert not four.group.members, "sessions began anew at the restart"


def test_a_restart_in_the_middle_of_a_rebalance_gives_nothing_away(four: Consumers):
    t = four.catalog.parts
    four.join("m1")
    four.join("m2")
    four.heartbeat("m1", 2)
    four.restart()
    assert four.heartbeat("m2", 3).assignment is None
    assert four.heartbeat("m1", 2, owned=t("t", 0, 1)).member_epoch == 3
    assert four.heartbeat("m2", 3).assignment == t("t", 2, 3)


def test_the_time_to_let_go_begins_anew_after_a_restart(four: Consumers):
    four.join("m1")
    four.join("m2")
    four.heartbeat("m1", 2)
    four.restart()
    for _ in range(REVOKE_MS // 5_000):
        four.sleep(5_000)
        four.heartbeat("m1", 2)
    assert four.heartbeat("m1", 2).error is E.UNKNOWN_MEMBER_ID


def _classic(groups: Consumers, group: str = "g", protocol_type: str = "consumer") -> ErrorCode:
    request = JoinRequest(group, "", None, "c", "/h", protocol_type, (("range", b""),), 6_000, 6_000, 3)
    token = groups.coordinator.join(request, groups.now)
    groups.settle()
    answers = dict(groups.coordinator.drain())
    return answers[token].error


def test_an_empty_group_takes_the_protocol_of_whoever_joins_and_keeps_its_offsets(four: Consumers):
    four.join("m1")
    four.commit("m1", 2)
    assert _classic(four) is E.INCONSISTENT_GROUP_PROTOCOL
    four.heartbeat("m1", -1)
    assert _classic(four) is E.NONE
    assert four.join("m1").error is E.GROUP_ID_NOT_FOUND
    four.restart()
    assert not four.coordinator.consumers.groups
    offset = four.coordinator.fetch_offsets("g", None, require_stable=True)[TopicPartition("t", 0)]
    assert offset.offset == 5
    assert four.join("m1").error is E.NONE, "the classic member never synced: after the restart nobody is there"
    assert [item.group_type for item in four.coordinator.list_groups()] == ["consumer"]
    assert four.coordinator.fetch_offsets("g", None, require_stable=True)


def test_groups_are_listed_described_and_deleted(four: Consumers):
    four.join("m1")
    [listed] = four.coordinator.list_groups(types=["Consumer"], states=["stable"])
    assert (listed.group_id, listed.protocol_type, listed.state) == ("g", "consumer", "Stable")
    assert not four.coordinator.list_groups(types=["classic"])
    assert four.coordinator.describe("g").message == "Group g is not a classic group."
    assert four.coordinator.delete_group("g") is E.NON_EMPTY_GROUP
    four.commit("m1", 2)
    where = TopicPartition("t", 0)
    assert four.coordinator.delete_offsets("g", [where])[1] == {where: E.GROUP_SUBSCRIBED_TO_TOPIC}
    four.heartbeat("m1", -1)
    assert four.coordinator.delete_offsets("g", [where])[1] == {where: E.NONE}
    assert four.coordinator.delete_group("g") is E.NONE
    four.settle()
    four.restart()
    assert not four.coordinator.list_groups()
    assert not four.coordinator.snapshot()


def test_offsets_of_an_empty_group_expire(four: Consumers):
    four.join("m1")
    four.commit("m1", 2)
    week = 604_800_000
    four.coordinator.expire_offsets(four.now + week)
    assert four.coordinator.fetch_offsets("g", None, require_stable=True), "a member keeps them"
    four.heartbeat("m1", -1)
    four.coordinator.expire_offsets(four.now + week)
    assert not four.coordinator.list_groups()


def test_an_administrator_removes_a_member(four: Consumers):
    four.join("m1")
    four.join("s1", instance="i")
    leaving = [LeavingMember("m1"), LeavingMember("", "i"), LeavingMember("x"), LeavingMember("x", "j")]
    errors = four.coordinator.leave("g", leaving, four.now)
    assert errors == [E.NONE, E.NONE, E.UNKNOWN_MEMBER_ID, E.UNKNOWN_MEMBER_ID]
    assert four.group.state == "Empty"


def test_a_step_to_the_target():
    a, b, c = [(b"t" * 16, index) for index in range(3)]

    def step(current: Current, target: set[tuple[bytes, int]], owned: object = None, free: bool = True) -> Current:
        return reconciled(current, 5, target, lambda _: free, owned)  # type: ignore[arg-type]

    start = Current(4, 3, STABLE, {a: 4, b: 4})
    assert step(Current(5, 4, STABLE, {a: 4}), {b}) == Current(5, 4, STABLE, {a: 4}), "there already"
    giving = step(start, {a, c})
    assert giving == Current(4, 3, UNREVOKED, {a: 4}, {b: 4})
    assert step(giving, {a, c}, owned={a, b}) is giving
    assert step(giving, {a, c}, owned={a}) == Current(5, 4, STABLE, {a: 4, c: 5})
    waiting = step(giving, {a, c}, owned={a}, free=False)
    assert waiting == Current(5, 4, UNRELEASED, {a: 4})
    assert step(waiting, {a, c}, free=False) is waiting
    assert step(waiting, {a, c}) == Current(5, 4, STABLE, {a: 4, c: 5})
    assert step(start, {a}, owned=set()) == Current(5, 4, STABLE, {a: 4}), "who has nothing need not confirm"


def test_the_diagram_in_the_documentation_is_the_table():
    page = Path(__file__).resolve().parents[2] / "docs" / "broker.md"
    assert f"```mermaid\n{mermaid(consumer_group.TRANSITIONS, MemberState.STABLE)}```" in page.read_text()

"""Both protocols of group membership without a broker: what is asked when, and what the owner is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from math import inf
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest

from semel.client.heartbeating import CONSUMER_GROUP_HEARTBEAT, HeartbeatMember
from semel.client.member import GroupMember, MemberThread
from semel.client.membership import (
    HEARTBEAT,
    JOIN_GROUP,
    LEAVE_GROUP,
    SYNC_GROUP,
    GroupTimes,
    Membership,
    State,
    TopicFacts,
    _assignment,
)
from semel.errors import ErrorCode, Fatal, Fenced, Retriable
from semel.types import TopicPartition

TIMES = GroupTimes(session=6.0, heartbeat=1.5, poll=300.0)
P0, P1, P2 = (TopicPartition("t", number) for number in range(3))


class Classic:
    """A member and the answers of its coordinator; `now` is where the time stands."""

    def __init__(self, instance_id: str | None = "one") -> None:
        self.member = Membership("g", ["t"], instance_id, TIMES)
        self.now = 100.0
        self.member.polled(self.now)

    def ask(self) -> Any:
        return self.member.next_request(self.now)

    def asked(self, api_key: int) -> Any:
        request = self.ask()
        assert request is not None
        assert request.api_key == api_key
        return request

    def settle(self) -> None:
        self.member.acknowledged(self.member.view.serial)

    def join(self, *parts: TopicPartition, generation: int = 1) -> None:
        """Joined as a follower, and assigned these; the owner has not made it true."""
        self.member.answered(
            self.asked(JOIN_GROUP),
            SimpleNamespace(
                error_code=0, member_id="m1", generation_id=generation, leader="m2", members=(), skip_assignment=False
            ),
            self.now,
        )
        shares = _assignment(frozenset((at.topic.encode(), at.partition) for at in parts))
        self.member.answered(self.asked(SYNC_GROUP), SimpleNamespace(error_code=0, assignment=shares), self.now)

    def beat(self, code: ErrorCode = ErrorCode.NONE) -> None:
        self.now = max(self.now, self.member.wake_at() or self.now)
        self.member.answered(self.asked(HEARTBEAT), SimpleNamespace(error_code=code), self.now)


def test_nobody_joins_again_before_the_owner_gave_everything_back_and_the_session_is_kept_meanwhile() -> None:
    group = Classic()
    group.join(P0, P1)
    assert group.member.view.wanted == {P0, P1}
    group.settle()
    group.beat(ErrorCode.REBALANCE_IN_PROGRESS)
    assert group.member.view.wanted == frozenset()
    assert group.member.view.life == 0, "it can still commit"
    for _ in range(20):  # Longer than a session.
        group.beat(ErrorCode.REBALANCE_IN_PROGRESS)
    metadata = group.member.view.metadata
    assert metadata is not None
    assert metadata.generation_id == 1
    group.settle()
    request = group.asked(JOIN_GROUP)
    assert request.fields["member_id"] == "m1"


def test_an_assignment_that_the_owner_has_not_seen_yet_is_not_taken_for_one_that_he_gave_back() -> None:
    """He may be taking it over at this moment, by an older view."""
    group = Classic()
    group.join(P0)
    seen = group.member.view.serial
    group.beat(ErrorCode.REBALANCE_IN_PROGRESS)
    group.member.acknowledged(seen)
    group.now += 0.1
    assert group.ask() is None
    group.settle()
    group.asked(JOIN_GROUP)


@pytest.mark.parametrize(
    ("code", "known_as"), [(ErrorCode.UNKNOWN_MEMBER_ID, ""), (ErrorCode.ILLEGAL_GENERATION, "m1")]
)
def test_who_is_forgotten_has_lost_everything_and_comes_back_as_who_the_group_knows(
    code: ErrorCode, known_as: str
) -> None:
    group = Classic()
    group.join(P0)
    group.settle()
    group.beat(code)
    view = group.member.view
    assert (view.life, view.wanted, view.metadata) == (1, frozenset(), None)
    assert group.ask() is None
    group.settle()
    assert group.asked(JOIN_GROUP).fields["member_id"] == known_as


def test_who_was_stopped_for_longer_than_a_session_is_fenced_by_his_successor_and_not_the_other_way_round() -> None:
    group = Classic()
    group.join(P0)
    group.settle()
    group.now += TIMES.session + 1
    assert group.ask() is None
    assert group.member.view.life == 1
    group.settle()
    request = group.asked(JOIN_GROUP)
    assert (request.fields["member_id"], request.fields["group_instance_id"]) == ("m1", "one")
    with pytest.raises(Fenced, match="instance id 'one'"):
        group.member.answered(request, SimpleNamespace(error_code=ErrorCode.FENCED_INSTANCE_ID), group.now)
    assert group.ask() is None


def test_a_session_without_an_answer_is_over() -> None:
    group = Classic()
    group.join(P0)
    group.settle()
    group.now += TIMES.session - 0.1
    assert group.asked(HEARTBEAT)
    assert group.member.view.life == 0
    group.now += 0.2
    assert group.ask() is None
    assert group.member.view.life == 1


@pytest.mark.parametrize("code", [ErrorCode.NONE, ErrorCode.REBALANCE_IN_PROGRESS])
def test_an_answer_that_waited_for_longer_than_a_session_does_not_prolong_it(code: ErrorCode) -> None:
    """A process that was stopped finds it in its socket; the group has long given its partitions away."""
    group = Classic()
    group.join(P0)
    group.settle()
    group.now += 2
    request = group.asked(HEARTBEAT)
    group.now += TIMES.session + 1
    group.member.answered(request, SimpleNamespace(error_code=code), group.now)
    assert group.member.view.life == 1


def test_an_assignment_that_waited_for_longer_than_a_session_is_asked_for_again() -> None:
    """Who was stopped finds it in its socket, and taking over what is another one's by now would fence that one."""
    group = Classic()
    answer = SimpleNamespace(
        error_code=0, member_id="m1", generation_id=1, leader="m2", members=(), skip_assignment=False
    )
    group.member.answered(group.asked(JOIN_GROUP), answer, group.now)
    request = group.asked(SYNC_GROUP)
    group.now += TIMES.session + 1
    share = SimpleNamespace(error_code=0, assignment=_assignment(frozenset({(b"t", 0)})))
    group.member.answered(request, share, group.now)
    assert group.member.view.wanted == frozenset()
    group.member.answered(group.asked(SYNC_GROUP), share, group.now)  # The group is still that one.
    assert group.member.view.wanted == {P0}


def test_who_does_not_poll_gives_its_work_to_others_until_it_polls_again() -> None:
    group = Classic()
    group.join(P0)
    group.settle()
    group.member.polled(inf)  # It is being told of something, which may take long.
    for _ in range(300):
        group.beat()
    assert group.member.view.life == 0
    group.member.polled(group.now)
    while group.now < 100.0 + 300 * 1.5 + TIMES.poll - 2:
        group.beat()
    group.now += 2 * TIMES.heartbeat
    assert group.ask() is None
    assert group.member.view.life == 1
    group.settle()
    assert group.ask() is None, "nobody takes work who does not ask for it"
    group.member.polled(group.now)
    group.asked(JOIN_GROUP)


def test_another_process_with_our_instance_id_is_the_end() -> None:
    group = Classic()
    group.join(P0)
    group.settle()
    with pytest.raises(Fenced, match="instance id 'one'"):
        group.beat(ErrorCode.FENCED_INSTANCE_ID)
    assert group.member.state is State.FENCED
    group.now += 100
    assert group.ask() is None


@pytest.mark.parametrize(
    ("code", "cls"),
    [
        (ErrorCode.NOT_COORDINATOR, Retriable),
        (ErrorCode.COORDINATOR_NOT_AVAILABLE, Retriable),
        (ErrorCode.UNKNOWN_SERVER_ERROR, Retriable),
        (ErrorCode.GROUP_AUTHORIZATION_FAILED, Fatal),
        (ErrorCode.INCONSISTENT_GROUP_PROTOCOL, Fatal),
    ],
)
def test_a_refused_join_is_repeated_or_told(code: ErrorCode, cls: type[Exception]) -> None:
    group = Classic()
    with pytest.raises(cls):
        group.member.answered(group.asked(JOIN_GROUP), SimpleNamespace(error_code=code), group.now)
    group.asked(JOIN_GROUP)


def test_a_stranger_is_given_its_member_id_first_and_says_goodbye() -> None:
    group = Classic(instance_id=None)
    assert group.member.leave() is None
    answer = SimpleNamespace(error_code=ErrorCode.MEMBER_ID_REQUIRED, member_id="m9")
    group.member.answered(group.asked(JOIN_GROUP), answer, group.now)
    assert group.asked(JOIN_GROUP).fields["member_id"] == "m9"
    request = group.member.leave()
    assert request is not None
    assert request.api_key == LEAVE_GROUP
    static = Classic()
    static.join(P0)
    assert static.member.leave() is None, "its place is kept for its next life"


def lead(group: Classic, *others: tuple[str, str]) -> None:
    """Joined as the leader of itself and others, given as (member id, instance id)."""
    request = group.asked(JOIN_GROUP)
    metadata = request.fields["protocols"][0]["metadata"]
    members = [
        SimpleNamespace(member_id=member_id, group_instance_id=instance_id, metadata=metadata)
        for member_id, instance_id in (("m1", "one"), *others)
    ]
    answer = SimpleNamespace(
        error_code=0, member_id="m1", generation_id=1, leader="m1", members=members, skip_assignment=False
    )
    group.member.answered(request, answer, group.now)


def test_the_leader_shares_out_by_instance_id_what_there_is() -> None:
    group = Classic()
    lead(group, ("a0", "two"))
    assert group.ask() is None, "not before it knows how many partitions there are"
    assert group.member.topics_to_look_up(group.now) == ["t"]
    group.member.looked_up({"t": TopicFacts(None, 3)}, group.now)
    shares = {item["member_id"]: item["assignment"] for item in group.asked(SYNC_GROUP).fields["assignments"]}
    assert shares == {
        "m1": _assignment(frozenset({(b"t", 0), (b"t", 1)})),
        "a0": _assignment(frozenset({(b"t", 2)})),
    }


def test_a_topic_that_grows_is_shared_out_anew() -> None:
    group = Classic()
    lead(group)
    group.member.looked_up({"t": TopicFacts(None, 1)}, group.now)
    answer = SimpleNamespace(error_code=0, assignment=_assignment(frozenset({(b"t", 0)})))
    group.member.answered(group.asked(SYNC_GROUP), answer, group.now)
    group.settle()
    assert group.member.topics_to_look_up(group.now) == []
    while not group.member.topics_to_look_up(group.now):
        group.beat()
    group.member.looked_up({"t": TopicFacts(None, 1)}, group.now)
    assert group.member.view.wanted == {P0}
    group.now += 60
    group.member._heard_at = group.now
    group.member.looked_up({"t": TopicFacts(None, 2)}, group.now)
    assert group.member.view.wanted == frozenset()
    group.settle()
    group.asked(JOIN_GROUP)


# --- KIP-848 ---

TOPIC_ID = UUID(int=5)


class Modern:
    """A member of the new protocol and the answers of its coordinator."""

    def __init__(self, instance_id: str | None = "one") -> None:
        self.member = HeartbeatMember("g", ["t"], instance_id, TIMES, "me")
        self.now = 100.0
        self.member.polled(self.now)

    def asked(self) -> Any:
        request = self.member.next_request(self.now)
        assert request is not None
        assert request.api_key == CONSUMER_GROUP_HEARTBEAT
        return request

    def beat(self, epoch: int, *parts: int, silent: bool = False, code: ErrorCode = ErrorCode.NONE) -> Any:
        """One heartbeat; returns what it said. `silent`: the answer names no assignment."""
        if self.member.next_request(self.now) is None:
            self.now += 3.0
        request = self.asked()
        assignment = SimpleNamespace(topic_partitions=[SimpleNamespace(topic_id=TOPIC_ID, partitions=parts)])
        answer = SimpleNamespace(
            error_code=code,
            member_id="me",
            member_epoch=epoch,
            heartbeat_interval=timedelta(seconds=3),
            assignment=None if silent else assignment,
        )
        self.member.answered(request, answer, self.now)
        if self.member.topics_to_look_up(self.now):
            self.member.looked_up({"t": TopicFacts(TOPIC_ID, 3)}, self.now)
        return request.fields

    def settle(self) -> None:
        self.member.acknowledged(self.member.view.serial)


def owned(fields: Any) -> list[int] | None:
    said = fields["topic_partitions"]
    return None if said is None else [number for item in said for number in item["partitions"]]


def test_a_heartbeat_says_what_is_owned_when_it_is_and_nothing_when_nothing_changed() -> None:
    group = Modern()
    first = group.beat(1, 0, 1)
    assert (first["member_epoch"], owned(first), first["subscribed_topic_names"]) == (0, [], ["t"])
    assert group.member.view.wanted == {P0, P1}
    assert owned(group.beat(1, silent=True)) is None, "the owner has not taken them over yet"
    group.settle()
    assert owned(group.beat(1, silent=True)) == [0, 1]
    assert owned(group.beat(1, silent=True)) is None


def test_what_is_to_be_given_back_stays_ours_until_the_owner_has_done_so() -> None:
    group = Modern()
    group.beat(1, 0, 1)
    group.settle()
    group.beat(1, silent=True)
    group.beat(1, 0)
    view = group.member.view
    assert view.wanted == {P0}
    assert view.metadata is not None
    assert view.metadata.generation_id == 1, "the work in hand can still be committed"
    group.member.unanswered()
    assert owned(group.beat(1, silent=True)) == [0, 1], "all is said again, as it is"
    group.settle()
    assert owned(group.beat(2, silent=True)) == [0]
    assert group.member.view.metadata is not None
    assert group.member.view.metadata.generation_id == 2


@pytest.mark.parametrize("code", [ErrorCode.FENCED_MEMBER_EPOCH, ErrorCode.UNKNOWN_MEMBER_ID])
def test_a_fenced_epoch_is_a_new_life(code: ErrorCode) -> None:
    group = Modern()
    group.beat(3, 0)
    group.settle()
    group.beat(-1, silent=True, code=code)
    view = group.member.view
    assert (view.life, view.wanted, view.metadata) == (1, frozenset(), None)
    assert group.member.next_request(group.now + 100) is None, "not before the owner knows"
    group.settle()
    again = group.beat(4, 0)
    assert (again["member_epoch"], owned(again), again["subscribed_topic_names"]) == (0, [], ["t"])


def test_the_place_of_a_predecessor_is_waited_for() -> None:
    group = Modern()
    with pytest.raises(Retriable, match="former process"):
        group.beat(-1, silent=True, code=ErrorCode.UNRELEASED_INSTANCE_ID)
    assert owned(group.beat(1, 0)) == []


@pytest.mark.parametrize(("instance_id", "epoch"), [("one", -2), (None, -1)])
def test_goodbye_keeps_the_place_of_a_static_member_only(instance_id: str | None, epoch: int) -> None:
    group = Modern(instance_id)
    assert group.member.leave() is None
    group.beat(1, 0)
    request = group.member.leave()
    assert request is not None
    assert request.fields["member_epoch"] == epoch


def test_a_member_that_could_not_be_made_is_told_to_who_polls() -> None:
    """It would be made in its own thread, where nobody sees what goes wrong."""

    def make(_: Callable[[], None]) -> GroupMember:
        raise OSError("no descriptor left")

    async def main() -> None:
        told = asyncio.Event()
        thread = MemberThread(make, told.set)
        thread.start()
        async with asyncio.timeout(30):
            await told.wait()
        assert isinstance(thread.failure, Fatal)
        assert "no descriptor left" in str(thread.failure)
        await thread.close()

    asyncio.run(main())

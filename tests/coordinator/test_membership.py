from __future__ import annotations

import pytest

from semel.coordinator.membership import Group, GroupState, Member


def member(name: str, *protocols: str, instance: str | None = None) -> Member:
    return Member(name, instance, "c", "h", 6_000, 60_000, tuple((item, b"") for item in protocols or ("range",)))


def group(*members: Member) -> Group:
    found = Group("g", protocol_type="consumer")
    for item in members:
        found.add(item)
    return found


@pytest.mark.parametrize(
    ("preferences", "chosen"),
    [
        ([("range",)], "range"),
        ([("range", "sticky"), ("sticky", "range")], "range"),
        ([("range", "sticky"), ("sticky", "range"), ("sticky", "range")], "sticky"),
        # A favourite that one member does not know is no candidate: its friends' next choice counts.
        ([("coop", "range"), ("coop", "range"), ("range",)], "range"),
        ([("coop", "sticky", "range"), ("range", "sticky"), ("sticky", "range")], "sticky"),
    ],
)
def test_the_vote(preferences, chosen):
    members = [member(f"m{number}", *names) for number, names in enumerate(preferences)]
    assert group(*members).vote() == chosen


@pytest.mark.parametrize(
    ("protocol_type", "names", "fits"),
    [
        ("consumer", ("range",), True),
        ("consumer", ("coop", "range"), True),
        ("consumer", ("coop",), False),
        ("connect", ("range",), False),
    ],
)
def test_who_fits_into_a_group(protocol_type, names, fits):
    found = group(member("a", "range", "sticky"), member("b", "range"))
    assert found.supports(protocol_type, tuple((name, b"") for name in names)) is fits
    assert Group("empty").supports(protocol_type, ()) is True


def test_the_lead_goes_to_the_longest_member_that_has_joined():
    a, b, c = member("a"), member("b"), member("c")
    found = group(a, b, c)
    assert found.leader == "a"
    c.join_token = 1
    found.remove(a)
    assert found.leader == "c"
    found.remove(c)
    assert found.leader == "b"
    found.remove(b)
    assert found.leader is None


def test_a_static_member_that_comes_back_keeps_place_lead_and_assignment():
    a, b = member("a-1", instance="a"), member("b")
    found = group(a, b)
    a.assignment = b"mine"
    successor = member("a-2", instance="a")
    found.replace_static(a, successor)
    assert list(found.members) == ["a-2", "b"]
    assert (found.leader, found.static_members, successor.assignment) == ("a-2", {"a": "a-2"}, b"mine")


def test_a_stored_group_comes_back_stable_or_empty():
    a = member("a", instance="i")
    a.assignment = b"mine"
    found = group(a, member("b"))
    found.generation_id, found.protocol = 4, "range"
    back = Group.from_stored(found.stored(), now_ms=1_000)
    assert (back.state, back.generation_id, back.leader) == (GroupState.STABLE, 4, "a")
    assert back.members["a"].assignment == b"mine"
    assert back.static_members == {"i": "a"}
    assert {item.expires_ms for item in back.members.values()} == {7_000}
    found.members.clear()
    assert Group.from_stored(found.stored(), now_ms=1_000).state is GroupState.EMPTY


def test_a_state_change_that_is_not_in_the_table_is_a_bug():
    with pytest.raises(AssertionError):
        Group("g").move(GroupState.STABLE)

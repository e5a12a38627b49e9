"""Assignments are complete, fair and steady."""

from __future__ import annotations

from collections.abc import Mapping

import hypothesis.strategies as st
import pytest
from hypothesis import given

from semel.coordinator.assignors import ASSIGNORS, Subscriber, Target, range_assignment, uniform_assignment

A, B, C = b"a" * 16, b"b" * 16, b"c" * 16
TOPICS = st.dictionaries(st.sampled_from([A, B, C]), st.integers(1, 7), min_size=1)
MEMBERS = st.dictionaries(
    st.sampled_from([f"m{number}" for number in range(6)]), st.frozensets(st.sampled_from([A, B, C])), min_size=1
)


def _subscribers(topics: Mapping[str, frozenset[bytes]], previous: Target | None = None) -> dict[str, Subscriber]:
    return {key: Subscriber(wanted, (previous or {}).get(key, frozenset())) for key, wanted in topics.items()}


def _owner_by_part(target: Target) -> dict[tuple[bytes, int], str]:
    owners: dict[tuple[bytes, int], str] = {}
    for member_id, parts in target.items():
        for part in parts:
            assert part not in owners, "two members are to have one partition"
            owners[part] = member_id
    return owners


@pytest.mark.parametrize("name", list(ASSIGNORS))
@given(members=MEMBERS, topics=TOPICS)
def test_every_wanted_partition_has_one_owner_that_wants_it(
    name: str, members: dict[str, frozenset[bytes]], topics: dict[bytes, int]
) -> None:
    target = ASSIGNORS[name](_subscribers(members), topics)
    owners = _owner_by_part(target)
    wanted = frozenset().union(*members.values())
    assert set(owners) == {
        (topic, index) for topic, count in topics.items() if topic in wanted for index in range(count)
    }
    assert all(part[0] in members[member_id] for part, member_id in owners.items())
    assert set(target) == set(members)


@given(members=MEMBERS, topics=TOPICS, leaving=st.integers(0, 5))
def test_uniform_is_fair_and_steady(
    members: dict[str, frozenset[bytes]], topics: dict[bytes, int], leaving: int
) -> None:
    first = uniform_assignment(_subscribers(members), topics)
    assert uniform_assignment(_subscribers(members, first), topics) == first, "what is balanced does not move"
    _is_fair(members, first)
    remaining = {key: wanted for key, wanted in members.items() if key != f"m{leaving}"}
    if not remaining:
        return
    second = uniform_assignment(_subscribers(remaining, first), topics)
    _is_fair(remaining, second)
    if len(set(members.values())) == 1:
        moved = [part for key in remaining for part in first[key] - second[key]]
        assert not moved, "when one leaves, only its partitions go elsewhere"


def _is_fair(members: Mapping[str, frozenset[bytes]], target: Target) -> None:
    """Nobody has two more than another one who wants one of them."""
    for giver, parts in target.items():
        for topic, _ in parts:
            for taker, wanted in members.items():
                assert topic not in wanted or len(parts) - len(target[taker]) <= 1, (giver, taker)


@given(count=st.integers(1, 8), partitions=st.integers(1, 20))
def test_one_more_member_takes_only_what_it_keeps(count: int, partitions: int) -> None:
    wanted = {f"m{number}": frozenset({A}) for number in range(count)}
    first = uniform_assignment(_subscribers(wanted), {A: partitions})
    wanted["new"] = frozenset({A})
    second = uniform_assignment(_subscribers(wanted, first), {A: partitions})
    moved = {part for key in first for part in first[key] - second[key]}
    assert moved == second["new"]


def test_range_keeps_equal_topics_together_and_restarted_static_members_in_place() -> None:
    members = {"z": Subscriber(frozenset({A, B}), instance_id="1"), "a": Subscriber(frozenset({A, B}), instance_id="2")}
    target = range_assignment(members, {A: 3, B: 3})
    assert target["z"] == {(A, 0), (A, 1), (B, 0), (B, 1)}
    assert target["a"] == {(A, 2), (B, 2)}


def test_a_thousand_members_and_ten_thousand_partitions_take_no_time() -> None:
    members = {f"m{number}": Subscriber(frozenset({A})) for number in range(1_000)}
    target = uniform_assignment(members, {A: 10_000})
    assert {len(parts) for parts in target.values()} == {10}

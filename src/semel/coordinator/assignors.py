"""Who shall have which partition: Kafka's server-side assignors `uniform` and `range` (KIP-848). Racks are ignored.

An assignor is a pure function: the same members, topics and previous target give the same answer, whatever their order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from heapq import heapify, heappop, heappush
from typing import NamedTuple

__all__ = ["ASSIGNORS", "DEFAULT_ASSIGNOR", "Part", "Subscriber", "Target", "range_assignment", "uniform_assignment"]

Part = tuple[bytes, int]
"""A partition by the sixteen bytes of its topic's id, and its index."""
Target = dict[str, frozenset[Part]]
"""By member id."""


class Subscriber(NamedTuple):
    """A member as the assignors see it: what it wants, and what it was to have until now."""

    topics: frozenset[bytes]
    previous: frozenset[Part] = frozenset()
    instance_id: str | None = None


_Assignor = Callable[[Mapping[str, Subscriber], Mapping[bytes, int]], Target]


def range_assignment(members: Mapping[str, Subscriber], topics: Mapping[bytes, int]) -> Target:
    """Each topic's partitions in runs along the members' order, so that equal topics are shared out equally.

    Static members are in the order of their instance ids, so that a restart moves nothing.
    """
    order = sorted(members, key=lambda member_id: (members[member_id].instance_id or member_id, member_id))
    target: dict[str, set[Part]] = {member_id: set() for member_id in members}
    for topic, partitions in topics.items():
        wanting = [member_id for member_id in order if topic in members[member_id].topics]
        if not wanting:
            continue
        share, extra = divmod(partitions, len(wanting))
        begin = 0
        for number, member_id in enumerate(wanting):
            end = begin + share + (number < extra)
            target[member_id].update((topic, index) for index in range(begin, end))
            begin = end
    return {member_id: frozenset(parts) for member_id, parts in target.items()}


def uniform_assignment(members: Mapping[str, Subscriber], topics: Mapping[bytes, int]) -> Target:
    """As equal as the subscriptions allow, with as few movements as that allows."""
    target: dict[str, set[Part]] = {member_id: set() for member_id in sorted(members)}
    wanted = frozenset[bytes]().union(*(member.topics for member in members.values()))
    free = {(topic, index) for topic in wanted for index in range(topics.get(topic, 0))}
    for member_id, kept in target.items():
        member = members[member_id]
        kept.update(part for part in member.previous if part in free and part[0] in member.topics)
        free -= kept
    if len({member.topics for member in members.values()}) <= 1:
        _level(target, free)
    else:
        _fill(members, target, free)
        _balance(members, target)
    return {member_id: frozenset(parts) for member_id, parts in target.items()}


def _level(target: dict[str, set[Part]], free: set[Part]) -> None:
    """Everybody may have everything: all get the same number, some one more, those with most keep the one more."""
    if not target:
        return
    total = len(free) + sum(map(len, target.values()))
    share, extra = divmod(total, len(target))
    by_size = sorted(target, key=lambda member_id: (-len(target[member_id]), member_id))
    quotas = {member_id: share + (number < extra) for number, member_id in enumerate(by_size)}
    for member_id, parts in target.items():
        surplus = sorted(parts)[quotas[member_id] :]
        parts.difference_update(surplus)
        free.update(surplus)
    waiting = sorted(free, reverse=True)
    for member_id, parts in target.items():
        while len(parts) < quotas[member_id] and waiting:
            parts.add(waiting.pop())


def _fill(members: Mapping[str, Subscriber], target: dict[str, set[Part]], free: set[Part]) -> None:
    """Give each free partition to the one with the fewest among those that want it."""
    for topic in sorted({topic for topic, _ in free}):
        heap = [(len(target[member_id]), member_id) for member_id in target if topic in members[member_id].topics]
        heapify(heap)
        if not heap:
            continue
        for part in sorted(part for part in free if part[0] == topic):
            size, member_id = heappop(heap)
            target[member_id].add(part)
            heappush(heap, (size + 1, member_id))


def _balance(members: Mapping[str, Subscriber], target: dict[str, set[Part]]) -> None:
    """Move a partition from the one with more to one with at least two fewer that wants it, until there is none.

    Every move lowers the sum of squares, so this ends.
    """
    topics = sorted({part[0] for parts in target.values() for part in parts})
    moved = True
    while moved:
        moved = False
        for topic in topics:
            wanting = [member_id for member_id in target if topic in members[member_id].topics]
            while True:
                taker = min(wanting, key=lambda member_id: (len(target[member_id]), member_id))
                having = [member_id for member_id in wanting if any(part[0] == topic for part in target[member_id])]
                giver = max(having, key=lambda member_id: (len(target[member_id]), member_id))
                if len(target[giver]) - len(target[taker]) < 2:
                    break
                part = max(part for part in target[giver] if part[0] == topic)
                target[giver].remove(part)
                target[taker].add(part)
                moved = True


ASSIGNORS: Mapping[str, _Assignor] = {"uniform": uniform_assignment, "range": range_assignment}
"""By their names in Kafka, the default one first."""
DEFAULT_ASSIGNOR = "uniform"

"""Circles of transactions that read each other's writes: strongly connected components, and the shortest circle."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Mapping, Sequence

from semel.prove.check.findings import Findings
from semel.prove.check.logs import LogFacts
from semel.prove.check.model import Attempts

__all__ = ["components", "judge_flow", "shortest_circle"]


def components(starts: Sequence[int], edges: Sequence[int]) -> list[list[int]]:
    """Components of two nodes or more, and nodes with an edge to themselves, by Tarjan's algorithm without recursion.

    Node `n` has the edges `edges[starts[n]:starts[n + 1]]`. Linear in nodes and edges.
    """
    size = len(starts) - 1
    index = array("l", bytes(8 * size))
    low = array("l", bytes(8 * size))
    is_on_stack = bytearray(size)
    at = array("l", starts)
    stack: list[int] = []
    found: list[list[int]] = []
    count = 0
    for root in range(size):
        if index[root] or starts[root] == starts[root + 1]:
            continue
        count += 1
        index[root] = low[root] = count
        stack.append(root)
        is_on_stack[root] = 1
        path = [root]
        while path:
            node = path[-1]
            if at[node] < starts[node + 1]:
                target = edges[at[node]]
                at[node] += 1
                if not index[target]:
                    count += 1
                    index[target] = low[target] = count
                    stack.append(target)
                    is_on_stack[target] = 1
                    path.append(target)
                elif is_on_stack[target] and index[target] < low[node]:
                    low[node] = index[target]
                continue
            path.pop()
            if path and low[node] < low[path[-1]]:
                low[path[-1]] = low[node]
            if low[node] == index[node]:
                members = []
                while True:
                    member = stack.pop()
                    is_on_stack[member] = 0
                    members.append(member)
                    if member == node:
                        break
                if len(members) > 1 or node in edges[starts[node] : starts[node + 1]]:
                    found.append(members)
    return found


def shortest_circle(starts: Sequence[int], edges: Sequence[int], members: Sequence[int]) -> list[int]:
    """A shortest circle through the first member, by breadth; every member of a component lies on one."""
    inside = set(members)
    first = members[0]
    came_from: dict[int, int] = {}
    queue = deque([first])
    while queue:
        node = queue.popleft()
        for target in edges[starts[node] : starts[node + 1]]:
            if target == first:
                circle = [node]
                while circle[-1] != first:
                    circle.append(came_from[circle[-1]])
                return circle[::-1]
            if target in inside and target not in came_from:
                came_from[target] = node
                queue.append(target)
    return list(members)


def judge_flow(units: Attempts, facts: Mapping[tuple[str, int], LogFacts], findings: Findings) -> None:
    """L12: a circle of write-to-read edges alone; a unit that reads its own output is one too. [Adya: G1c; Elle]

    An edge goes from a unit to each unit whose visible output is one of its inputs.
    """
    starts = array("l", [0, 0])
    edges = array("l")
    for number in range(1, len(units.names)):
        if units.visible[number]:
            sources: set[int] = set()
            for run in units.runs(number):
                log = facts.get(units.lanes[run.lane].place)
                if log is not None:
                    at = max(0, run.low - log.start)
                    sources.update(log.writer[at : max(0, run.low - log.start + run.size)])
            sources.discard(0)
            edges.extend(sources)
        starts.append(len(edges))
    for members in components(starts, edges):
        names = tuple(units.names[number] for number in shortest_circle(starts, edges, members))
        others = f", one of several circles among {len(members)}" if len(members) > len(names) else ""
        findings.add("L12", tuple(sorted(names)), f"each read what the next one wrote{others}", names)

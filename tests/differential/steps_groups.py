"""Steps of consumer groups: membership and offsets."""

from __future__ import annotations

from random import Random
from typing import Any

from tests.differential.connection import Closed
from tests.differential.program import kind, often
from tests.differential.steps_records import draw_topic_index
from tests.differential.world import CLOSED, World

__all__ = ["draw_membership", "membership"]

MEMBERS = ("a", "b", "c")


def _subscription(*topics: str) -> bytes:
    """ConsumerProtocolSubscription, version 0."""
    names = b"".join(len(name).to_bytes(2, "big") + name.encode() for name in topics)
    return b"\0\0" + len(topics).to_bytes(4, "big") + names + b"\xff\xff\xff\xff"


def draw_membership(rng: Random) -> list[Any]:
    """[generation, member, instance], as seen from a slot."""
    member = rng.choice(MEMBERS)
    return rng.choice(
        (
            ["none", "", None], ["none", "", None], ["now", member, None], ["now", member, None], ["old", member, None],
            ["none", member, None], ["now", "", None], ["now", "nobody", None], ["now", member, "nobody"],
        )
    )  # fmt: skip


def membership(world: World, group: int, member: list[Any]) -> tuple[int, str, str | None]:
    generation, slot, instance = member
    current = world.generations.get(f"g{group}", 1)
    number = {"none": -1, "now": current, "old": current - 1, "next": current + 1}[generation]
    return number, _member_id(world, group, slot), instance if instance is None else f"{world.mark}-{instance}"


def _member_id(world: World, group: int, slot: str) -> str:
    if slot in ("", "nobody"):
        return slot
    return world.members.get(f"g{group}{slot}", "")


def _learn(world: World, found: dict[str, Any]) -> dict[str, Any]:
    """What answers to JoinGroup teach: member ids and generations."""
    for slot, answer in found.items():
        if answer == CLOSED or "generation_id" not in answer:
            continue
        if answer["member_id"]:
            count = sum(1 for name in world.members if name.startswith(slot))
            world.names.give("member", answer["member_id"], f"{slot}{count}")
            world.members[slot] = answer["member_id"]
            world.members[f"{slot} {count}"] = answer["member_id"]
            if answer["error_code"]:
                world.given.add(answer["member_id"])
            else:
                world.given.discard(answer["member_id"])
        if not answer["error_code"]:
            world.generations[slot[:2]] = answer["generation_id"]
    return found


def _ask_as_member(world: World, group: int, slot: str, key: int, version: int, **fields: Any) -> Any:
    name = f"g{group}{slot}"
    connection = world.member_connection(name)
    if connection.waits:
        return {"busy": name, "answers": _learn(world, world.harvest())}
    try:
        connection.send(key, version, **fields)
    except Closed:
        world.drop_member_connection(name)
        return CLOSED
    return {"answers": _learn(world, world.harvest())}


def _draw_join(rng: Random) -> dict[str, Any]:
    return {
        "version": often(rng, rng.randrange(0, 10), 5, share=0.8),
        "group": often(rng, 0, 1, share=0.9),
        "slot": rng.choice(MEMBERS),
        "member": often(rng, "mine", "", "nobody", share=0.85),
        "instance": often(rng, None, "one", "two", share=0.8),
        "session": often(rng, 30_000, 10, 3_000_000, share=0.97),
        "protocol_type": often(rng, "consumer", "connect", "", share=0.98),
        "protocols": often(rng, ["range"], ["range", "roundrobin"], ["roundrobin"], share=0.7),
    }


@kind(_draw_join, groups=30, offsets=8, mixed=1)
def join(
    world: World,
    version: int,
    group: int,
    slot: str,
    member: str,
    instance: str | None,
    session: int,
    protocol_type: str,
    protocols: list[str],
) -> Any:
    metadata = _subscription(world.topic(0))
    return _ask_as_member(
        world,
        group,
        slot,
        11,
        version,
        group_id=world.group(group),
        session_timeout=session,
        rebalance_timeout=60_000,
        member_id=_member_id(world, group, slot if member == "mine" else member),
        group_instance_id=None if instance is None else f"{world.mark}-{instance}",
        protocol_type=protocol_type,
        protocols=[{"name": name, "metadata": metadata} for name in protocols],
        reason="why not",
    )


@kind(
    lambda rng: {
        "version": rng.randrange(0, 6),
        "group": often(rng, 0, 1, share=0.9),
        "member": [often(rng, "now", "old", "next", "none", share=0.9), rng.choice(MEMBERS), None],
        "assign": rng.random() < 0.8,
        "protocol": often(rng, ["consumer", "range"], [None, None], ["connect", "range"], share=0.8),
    },
    groups=25,
    offsets=4,
)
def sync(world: World, version: int, group: int, member: list[Any], assign: bool, protocol: list[Any]) -> Any:
    generation, member_id, instance = membership(world, group, member)
    ids = {
        member_id
        for name, member_id in world.members.items()
        if name.startswith(f"g{group}") and len(name) == 3  # The latest id of each slot.
    }
    return _ask_as_member(
        world,
        group,
        member[1],
        14,
        version,
        group_id=world.group(group),
        generation_id=generation,
        member_id=member_id,
        group_instance_id=instance,
        protocol_type=protocol[0],
        protocol_name=protocol[1],
        assignments=[{"member_id": item, "assignment": b"for a member"} for item in sorted(ids) if item]
        if assign
        else [],
    )


@kind(
    lambda rng: {
        "version": rng.randrange(0, 5),
        "group": often(rng, 0, 1, share=0.9),
        "member": draw_membership(rng),
    },
    groups=10,
    mixed=1,
)
def heartbeat(world: World, version: int, group: int, member: list[Any]) -> Any:
    generation, member_id, instance = membership(world, group, member)
    return world.ask(
        12,
        version,
        group_id=world.group(group),
        generation_id=generation,
        member_id=member_id,
        group_instance_id=instance,
    )


@kind(
    lambda rng: {
        "version": rng.randrange(0, 6),
        "group": often(rng, 0, 1, share=0.9),
        "leaving": rng.choice((["a"], ["b"], ["a", "c"], ["nobody"], [""])),
        "instance": often(rng, None, "one", "two", share=0.8),
    },
    groups=7,
    offsets=2,
)
def leave(world: World, version: int, group: int, leaving: list[str], instance: str | None) -> Any:
    instance_id = None if instance is None else f"{world.mark}-{instance}"
    never_joined = any(_member_id(world, group, slot) in world.given for slot in leaving)
    answer = world.ask(
        13,
        version,
        group_id=world.group(group),
        member_id=_member_id(world, group, leaving[0]),
        members=[
            {"member_id": _member_id(world, group, slot), "group_instance_id": instance_id, "reason": "enough"}
            for slot in leaving
        ],
    )
    return {"never joined": never_joined, "answer": answer, "answers": _learn(world, world.harvest())}


# --- Looking at groups ---


@kind(
    lambda rng: {"version": rng.randrange(0, 7), "groups": rng.choice(([0], [0, 1], [7]))},
    groups=12,
    offsets=3,
    mixed=1,
)
def describe_groups(world: World, version: int, groups: list[int]) -> Any:
    names = [world.group(group) for group in groups]
    return world.ask(15, version, groups=names, include_authorized_operations=False)


@kind(
    lambda rng: {
        "version": rng.randrange(0, 6),
        "states": often(rng, [], ["Stable"], ["Empty", "PreparingRebalance"], ["nonsense"], share=0.5),
        "types": often(rng, [], ["classic"], ["consumer"], ["nonsense"], share=0.6),
    },
    groups=5,
    mixed=1,
)
def list_groups(world: World, version: int, states: list[str], types: list[str]) -> Any:
    answer = world.ask(16, version, states_filter=states, types_filter=types)
    if answer != CLOSED:
        answer["groups"] = [item for item in answer["groups"] if item["group_id"].startswith(world.mark)]
    return answer


@kind(
    lambda rng: {"version": rng.randrange(0, 3), "groups": rng.choice(([0], [1], [0, 7]))},
    groups=2,
    offsets=2,
    mixed=1,
)
def delete_groups(world: World, version: int, groups: list[int]) -> Any:
    return world.ask(42, version, groups_names=[world.group(group) for group in groups])


# --- Offsets ---


@kind(
    lambda rng: {
        "version": rng.randrange(2, 11),
        "group": often(rng, 0, 1, share=0.9),
        "member": draw_membership(rng),
        "parts": [[draw_topic_index(rng), index, rng.randrange(0, 9)] for index in rng.choice(((0,), (0, 1), (5,)))],
        "metadata": often(rng, "kept", "", None, "m" * 5000),
    },
    groups=8,
    offsets=20,
    mixed=1,
)
def commit(world: World, version: int, group: int, member: list[Any], parts: list[Any], metadata: str | None) -> Any:
    topics: dict[int, list[dict[str, Any]]] = {}
    for topic, partition, offset in parts:
        item = {
            "partition_index": partition,
            "committed_offset": offset,
            "committed_leader_epoch": 0,
            "committed_metadata": metadata,
        }
        topics.setdefault(topic, []).append(item)
    generation, member_id, instance = membership(world, group, member)
    return world.ask(
        8,
        version,
        group_id=world.group(group),
        generation_id_or_member_epoch=generation,
        member_id=member_id,
        group_instance_id=instance,
        retention_time=-1,
        topics=[world.topic_key(topic, version >= 10) | {"partitions": items} for topic, items in topics.items()],
    )


@kind(
    lambda rng: {
        "version": rng.randrange(1, 11),
        "groups": often(rng, [0], [1], [0, 1], [7], share=0.8),
        "stable": rng.random() < 0.6,
        "topics": often(rng, [0], [0, 1], None, [9], [], share=0.6),
        "member": often(rng, ["none", "", None], ["now", "a", None], ["old", "a", None], share=0.9),
    },
    transactions=3,
    groups=3,
    offsets=25,
    mixed=1,
)
def offset_fetch(
    world: World, version: int, groups: list[int], stable: bool, topics: list[int] | None, member: list[Any]
) -> Any:
    if topics is None and version < 2:
        topics = [0]
    wanted = (
        None
        if topics is None
        else [world.topic_key(topic, version >= 10) | {"partition_indexes": [0, 1]} for topic in topics]
    )
    if version < 8:
        return world.ask(9, version, group_id=world.group(groups[0]), topics=wanted, require_stable=stable)
    asked = []
    for group in groups:
        generation, member_id, _ = membership(world, group, member)
        one = {"group_id": world.group(group), "topics": wanted}
        asked.append(one | {"member_id": member_id or None, "member_epoch": generation} if version >= 9 else one)
    return world.ask(9, version, groups=asked, require_stable=stable)

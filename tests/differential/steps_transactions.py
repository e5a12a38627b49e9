"""Steps of transactional and idempotent producers."""

from __future__ import annotations

from random import Random
from typing import Any

from tests.differential.program import kind, often
from tests.differential.steps_groups import draw_membership, membership
from tests.differential.steps_records import IDENTITY_VARIANTS, draw_topic_index
from tests.differential.world import CLOSED, World

__all__: list[str] = []

LONG_MS, SHORT_MS = 60_000, 60


def _slot(rng: Random) -> str:
    return str(often(rng, "x0", "x1", "x9", share=0.8))


def _draw_init(rng: Random) -> dict[str, Any]:
    return {
        "version": rng.randrange(0, 6),
        "slot": rng.choice(("x0", "x0", "x0", "x1", "i0")),
        "variant": often(rng, "none", "now", "now", "before", "stale", "other", "unknown", "next", "half", share=0.6),
        "timeout": often(rng, LONG_MS, 0, -1, 900_000, 900_001, share=0.95),
        "empty_id": rng.random() < 0.02,
    }


@kind(_draw_init, transactions=10, idempotence=8, offsets=2, reading=4, batches=2, mixed=1)
def init(world: World, version: int, slot: str, variant: str, timeout: int, empty_id: bool = False) -> Any:
    """InitProducerId: the first one, a fence, a retry, a recovery of a lost epoch."""
    producer_id, epoch = world.identity(slot, variant)
    transactional_id = "" if empty_id else world.transactional_id(slot) if slot.startswith("x") else None
    before = world.transaction(slot) if slot.startswith("x") and not empty_id else None
    answer = world.ask(
        22,
        version,
        transactional_id=transactional_id,
        transaction_timeout=timeout,
        producer_id=producer_id,
        producer_epoch=epoch,
    )
    world.learn_identity(slot, answer)
    world.settle()
    return {"before": before, "asked": {"producer_id": producer_id, "epoch": epoch}, "answer": answer}


def _draw_add(rng: Random) -> dict[str, Any]:
    return {
        "version": rng.randrange(0, 6),
        "slot": _slot(rng),
        "variant": often(rng, "now", *IDENTITY_VARIANTS, share=0.9),
        "parts": [[draw_topic_index(rng), index] for index in rng.choice(((0,), (0,), (0, 1), (5,)))],
        "verify_only": rng.random() < 0.2,
    }


@kind(_draw_add, transactions=10, offsets=2, reading=4, mixed=1)
def add_partitions(
    world: World, version: int, slot: str, variant: str, parts: list[list[int]], verify_only: bool
) -> Any:
    producer_id, epoch = world.identity(slot, variant)
    topics: dict[int, list[int]] = {}
    for topic, partition in parts:
        topics.setdefault(topic, []).append(partition)
    items = [{"name": world.topic(topic), "partitions": found} for topic, found in topics.items()]
    if version < 4:
        return world.ask(
            24,
            version,
            v3_and_below_transactional_id=world.transactional_id(slot),
            v3_and_below_producer_id=producer_id,
            v3_and_below_producer_epoch=epoch,
            v3_and_below_topics=items,
        )
    one = {
        "transactional_id": world.transactional_id(slot),
        "producer_id": producer_id,
        "producer_epoch": epoch,
        "verify_only": verify_only,
        "topics": items,
    }
    return world.ask(24, version, transactions=[one])


@kind(
    lambda rng: {
        "version": rng.randrange(0, 5),
        "slot": _slot(rng),
        "variant": often(rng, "now", *IDENTITY_VARIANTS, share=0.9),
        "group": often(rng, 0, 1, -1, share=0.9),
    },
    transactions=4,
    offsets=8,
    mixed=1,
)
def add_offsets(world: World, version: int, slot: str, variant: str, group: int) -> Any:
    producer_id, epoch = world.identity(slot, variant)
    return world.ask(
        25,
        version,
        transactional_id=world.transactional_id(slot),
        producer_id=producer_id,
        producer_epoch=epoch,
        group_id="" if group < 0 else world.group(group),
    )


@kind(
    lambda rng: {
        "version": often(rng, 5, 5, 3, 4, 0, 1, 2, share=0.5),
        "slot": _slot(rng),
        "variant": often(rng, "now", *IDENTITY_VARIANTS, "before", "before", share=0.8),
        "commit": rng.random() < 0.6,
    },
    transactions=20,
    offsets=10,
    reading=10,
    batches=2,
    mixed=1,
)
def end(world: World, version: int, slot: str, variant: str, commit: bool) -> Any:
    """EndTxn: a commit, an abort, a retry of the last one, its opposite."""
    producer_id, epoch = world.identity(slot, variant)
    answer = world.ask(
        26,
        version,
        transactional_id=world.transactional_id(slot),
        producer_id=producer_id,
        producer_epoch=epoch,
        committed=commit,
    )
    if version >= 5:
        world.learn_identity(slot, answer)
    return answer if world.settle() or answer == CLOSED else answer | {"hangs": True}


def _draw_timed(rng: Random) -> dict[str, Any]:
    """A transaction that times out, what its producer asks then, and a new beginning."""
    from tests.differential.program import KINDS

    slot = "x0"
    begin = rng.choice(("produce", "add_partitions", "add_offsets", "commit_in_transaction"))
    first = KINDS[begin].draw(rng) | {"slot": slot, "variant": "now"}
    if begin == "produce":
        first |= {"version": rng.choice((12, 13)), "transactional": True, "request_id": slot, "acks": -1}
    steps = [
        ("init", {"version": 5, "slot": slot, "variant": "none", "timeout": SHORT_MS}),
        (begin, first),
        ("time_out", {"slot": slot}),
    ]
    for name in rng.choices(("end", "end", "produce", "add_partitions", "commit_in_transaction", "fetch"), k=3):
        step = KINDS[name].draw(rng)
        steps.append((name, step | {"slot": slot, "variant": "now"} if "slot" in step else step))
        if name != "fetch":
            steps.append(("time_out", {"slot": slot}))
    variant = rng.choice(("none", "now", "before"))
    steps.append(("init", {"version": rng.randrange(3, 6), "slot": slot, "variant": variant, "timeout": LONG_MS}))
    # Whatever became of it, the slot's time-out is long again.
    steps.append(("init", {"version": 5, "slot": slot, "variant": "none", "timeout": LONG_MS}))
    return {"steps": steps}


@kind(_draw_timed, transactions=2, offsets=1)
def timed(world: World, steps: list[Any]) -> Any:
    raise AssertionError("it stands for its steps")


@kind(lambda rng: {"slot": "x0"})
def time_out(world: World, slot: str) -> Any:
    """Wait until the slot's transaction, if there is one, is over."""
    world.timed_out(slot)
    return None


def _draw_commit(rng: Random) -> dict[str, Any]:
    return {
        "version": rng.randrange(0, 6),
        "slot": _slot(rng),
        "variant": often(rng, "now", *IDENTITY_VARIANTS, share=0.9),
        "group": often(rng, 0, 1, share=0.9),
        "member": draw_membership(rng),
        "parts": [[draw_topic_index(rng), index, rng.randrange(0, 9)] for index in rng.choice(((0,), (0, 1), (5,)))],
        "long_metadata": rng.random() < 0.03,
    }


@kind(_draw_commit, transactions=7, offsets=16, mixed=1)
def commit_in_transaction(
    world: World,
    version: int,
    slot: str,
    variant: str,
    group: int,
    member: list[Any],
    parts: list[Any],
    long_metadata: bool,
) -> Any:
    producer_id, epoch = world.identity(slot, variant)
    topics: dict[int, list[dict[str, Any]]] = {}
    for topic, partition, offset in parts:
        item = {
            "partition_index": partition,
            "committed_offset": offset,
            "committed_leader_epoch": -1,
            "committed_metadata": "m" * 5000 if long_metadata else "m",
        }
        topics.setdefault(topic, []).append(item)
    generation, member_id, instance = membership(world, group, member)
    return world.ask(
        28,
        version,
        transactional_id=world.transactional_id(slot),
        group_id=world.group(group),
        producer_id=producer_id,
        producer_epoch=epoch,
        generation_id=generation,
        member_id=member_id,
        group_instance_id=instance,
        topics=[{"name": world.topic(topic), "partitions": items} for topic, items in topics.items()],
    )


@kind(lambda rng: {"slots": ["x0", "x1", "x9"]}, transactions=8, offsets=2, mixed=1)
def describe_transactions(world: World, slots: list[str]) -> Any:
    return world.ask(65, 0, transactional_ids=[world.transactional_id(slot) for slot in slots])


@kind(
    lambda rng: {
        "version": rng.randrange(0, 3),
        "states": often(rng, [], ["Ongoing"], ["Empty", "CompleteCommit"], ["nonsense", "CompleteAbort"], share=0.5),
        "duration": often(rng, -1, 0, 600_000, share=0.8),
        "pattern": often(rng, None, "mine", "", "(", share=0.6),
        "producer": often(rng, "", "x0", share=0.8),
    },
    transactions=4,
    mixed=1,
)
def list_transactions(
    world: World, version: int, states: list[str], duration: int, pattern: str | None, producer: str
) -> Any:
    answer = world.ask(
        66,
        version,
        state_filters=states,
        producer_id_filters=[world.identity(producer, "now")[0]] if producer else [],
        duration_filter=duration,
        transactional_id_pattern=f"{world.mark}.*" if pattern == "mine" else pattern,
    )
    if answer != CLOSED:
        states_of_mine = [
            item for item in answer["transaction_states"] if item["transactional_id"].startswith(world.mark)
        ]
        answer["transaction_states"] = states_of_mine
    return answer

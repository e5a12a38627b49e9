"""Steps about topics and the cluster."""

from __future__ import annotations

from random import Random
from typing import Any

from tests.differential.program import kind, often
from tests.differential.steps_records import draw_topic_index
from tests.differential.world import CLOSED, World

__all__: list[str] = []

GOOD_CONFIGS = (
    {"cleanup.policy": "compact"},
    {"message.timestamp.type": "LogAppendTime"},
    {"max.message.bytes": "2000"},
    {"cleanup.policy": "compact,delete"},
    {"retention.ms": "-1"},
)
BAD_CONFIGS = ({"nonsense": "1"}, {"retention.ms": "soon"}, {"cleanup.policy": "burn"}, {"segment.bytes": "1"})


def _config(rng: Random) -> dict[str, str]:
    return dict(rng.choice(GOOD_CONFIGS)) if rng.random() < 0.3 else {}


def _create(world: World, version: int, topics: list[dict[str, Any]], validate_only: bool = False) -> Any:
    return world.ask(19, version, topics=topics, timeout=20_000, validate_only=validate_only)


def _new_topic(name: str, partitions: int, configs: dict[str, str], **changed: Any) -> dict[str, Any]:
    items = [{"name": key, "value": value} for key, value in configs.items()]
    return {
        "name": name,
        "num_partitions": partitions,
        "replication_factor": 1,
        "assignments": [],
        "configs": items,
    } | changed


@kind(lambda rng: {"configs": [_config(rng), _config(rng)]})
def topic(world: World, configs: list[dict[str, str]]) -> Any:
    """The topics that every program begins with."""
    answer = _create(world, 5, [_new_topic(world.topic(0), 2, configs[0]), _new_topic(world.topic(1), 1, configs[1])])
    for index in (0, 1):
        world.topic_ready(index)
    return [item["error_code"] for item in answer["topics"]]


@kind(
    lambda rng: {
        "version": rng.randrange(2, 8),
        "topic": often(rng, 2, 0, share=0.7),
        "partitions": often(rng, 1, 3, -1, 0, share=0.7),
        "configs": often(rng, _config(rng), *BAD_CONFIGS, share=0.8),
        "replication": often(rng, 1, -1, 3, share=0.8),
        "validate_only": rng.random() < 0.15,
        "odd": often(rng, "", "bad name", "twice", "assigned", "collides", "dots", "long", share=0.8),
    },
    admin=16,
    reading=1,
    offsets=1,
)
def create(
    world: World,
    version: int,
    topic: int,
    partitions: int,
    configs: dict[str, str],
    replication: int,
    validate_only: bool,
    odd: str,
) -> Any:
    name = world.topic(topic)
    one = _new_topic(name, partitions, configs, replication_factor=replication)
    topics = [one]
    if odd == "bad name":
        topics = [one | {"name": f"{world.mark}-a b"}]
    elif odd == "dots":
        topics = [one | {"name": ".."}]
    elif odd == "long":
        topics = [one | {"name": world.mark + "n" * 250}]
    elif odd == "twice":
        topics = [one, one]
    elif odd == "assigned":
        where = [{"partition_index": 0, "broker_ids": [1]}]
        topics = [one | {"num_partitions": -1, "replication_factor": -1, "assignments": where}]
    answer = _create(world, version, topics, validate_only)
    if answer != CLOSED and not validate_only:
        for item in answer["topics"]:
            if item["name"] == name and not item["error_code"]:
                world.topic_ready(topic)
                if version >= 7:
                    world.names.give("topic", item["topic_id"], f"t{topic}")
    return answer


@kind(
    lambda rng: {
        "version": rng.randrange(1, 7),
        "topic": often(rng, 2, 0, 9, share=0.8),
        "by_id": rng.random() < 0.5,
    },
    admin=4,
    offsets=1,
)
def delete(world: World, version: int, topic: int, by_id: bool) -> Any:
    name = world.topic(topic)
    if version < 6:
        fields: dict[str, Any] = {"topic_names": [name]}
    else:
        one = {"name": None, "topic_id": world.topic_id(topic)} if by_id else {"name": name, "topic_id": None}
        fields = {"topics": [one]}
    answer = world.ask(20, version, timeout=20_000, **fields)
    if answer != CLOSED and any(not item["error_code"] for item in answer["responses"]):
        world.topic_gone(topic)
        world.sequences = {key: value for key, value in world.sequences.items() if key[2] != name}
    return answer


@kind(
    lambda rng: {
        "version": rng.randrange(0, 4),
        "topic": draw_topic_index(rng),
        "count": rng.choice((3, 4, 1, 0, -1, 2)),
        "assigned": rng.random() < 0.1,
        "validate_only": rng.random() < 0.2,
    },
    admin=8,
)
def create_partitions(world: World, version: int, topic: int, count: int, assigned: bool, validate_only: bool) -> Any:
    one = {"name": world.topic(topic), "count": count, "assignments": [{"broker_ids": [1]}] if assigned else None}
    answer = world.ask(37, version, topics=[one], timeout=20_000, validate_only=validate_only)
    if answer != CLOSED and not validate_only and not answer["results"][0]["error_code"]:
        world.until("new partitions", lambda: len(world.described(topic)["partitions"]) == count)
        world.topic_ready(topic)
    return answer


@kind(
    lambda rng: {
        "version": rng.randrange(0, 14),
        "topics": often(rng, [0], [0, 1], [0, 9], [9], [], share=0.5),
        "by_id": rng.random() < 0.4,
    },
    admin=14,
    mixed=1,
)
def metadata(world: World, version: int, topics: list[int], by_id: bool) -> Any:
    by_id = by_id and version >= 12
    if version < 4:
        topics = [1]  # These versions create what they ask for; topic 1 is always there.
    wanted: list[dict[str, Any]] = []
    for index in topics:
        wanted.append({"topic_id": world.topic_id(index), "name": None} if by_id else {"name": world.topic(index)})
        if version >= 10 and not by_id:
            wanted[-1]["topic_id"] = None
    return world.ask(
        3,
        version,
        topics=wanted,
        allow_auto_topic_creation=False,
        include_cluster_authorized_operations=False,
        include_topic_authorized_operations=False,
    )


@kind(
    lambda rng: {
        "version": rng.randrange(1, 5),
        "topic": often(rng, 0, 1, 9, share=0.8),
        "keys": often(rng, None, ["cleanup.policy", "nonsense"], [], ["max.message.bytes", "retention.ms"], share=0.5),
        "synonyms": rng.random() < 0.3,
    },
    admin=10,
    mixed=1,
)
def describe_configs(world: World, version: int, topic: int, keys: list[str] | None, synonyms: bool) -> Any:
    resource = {"resource_type": 2, "resource_name": world.topic(topic), "configuration_keys": keys}
    return world.ask(32, version, resources=[resource], include_synonyms=synonyms, include_documentation=False)


@kind(
    lambda rng: {
        "topics": often(rng, [0], [0, 1], [9], share=0.6),
        "limit": often(rng, 2000, 1, share=0.8),
        "cursor": often(rng, None, [0, 1], [1, 0], [9, 0], share=0.8),
    },
    admin=6,
)
def describe_topic_partitions(world: World, topics: list[int], limit: int, cursor: list[int] | None) -> Any:
    at = None if cursor is None else {"topic_name": world.topic(cursor[0]), "partition_index": cursor[1]}
    names = [{"name": world.topic(index)} for index in topics]
    return world.ask(75, 0, topics=names, response_partition_limit=limit, cursor=at)


@kind(
    lambda rng: {"version": rng.randrange(0, 7), "key_type": often(rng, 0, 1, 7), "keys": rng.choice((1, 1, 2))},
    admin=4,
    mixed=1,
)
def find_coordinator(world: World, version: int, key_type: int, keys: int) -> Any:
    names = [f"{world.mark}-c{index}" for index in range(keys)]
    if version >= 4:
        return world.ask(10, version, key_type=key_type, coordinator_keys=names)
    return world.ask(10, version, key=names[0], key_type=key_type)


@kind(lambda rng: {"version": rng.randrange(0, 3), "endpoint_type": often(rng, 1, 2, 7)}, admin=3)
def describe_cluster(world: World, version: int, endpoint_type: int) -> Any:
    return world.ask(
        60,
        version,
        include_cluster_authorized_operations=False,
        endpoint_type=endpoint_type,
        include_fenced_brokers=False,
    )


@kind(lambda rng: {"version": rng.randrange(0, 5)}, admin=3)
def api_versions(world: World, version: int) -> Any:
    return world.ask(18, version, client_software_name="program", client_software_version="1")

"""APIs that show and change settings of topics, the broker and groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from semel.broker.config import NODE_ID
from semel.broker.config_keys import BROKER_KEYS, GROUP_KEYS, INERT_KEYS, NO_SYNONYM_KEYS, TOPIC_KEYS, ConfigKey
from semel.broker.dynamic_config import BROKER, GROUP, TOPIC, Change, ConfigError, Entry, Operation, Source, changed
from semel.broker.exchange import Answer, Api, Fields, Request
from semel.broker.topics import Topic, TopicError, check_name
from semel.errors import ErrorCode
from semel.log.log import LogError

if TYPE_CHECKING:
    from semel.broker.node import Node

__all__ = ["APIS"]

_CLIENT_METRICS, _BROKER_LOGGER = 16, 8
"""Resource types that Kafka has and of which there is nothing here."""


# --- Describing ---


def _named_topic(node: Node, name: str) -> Topic:
    check_name(name)
    topic = node.topics.get(name)
    if topic is None:
        raise ConfigError(ErrorCode.UNKNOWN_TOPIC_OR_PARTITION, f"The topic '{name}' does not exist.")
    return topic


def _check_broker_name(name: str) -> None:
    if not name.isdigit() and name:
        raise ConfigError(ErrorCode.INVALID_REQUEST, f"Node id must be an integer, but it is: {name}")
    if name not in ("", str(NODE_ID)):
        raise ConfigError(ErrorCode.INVALID_REQUEST, f"Unexpected broker id, expected {NODE_ID}, but received {name}")


def _check_group_name(name: str) -> None:
    if not name:
        raise ConfigError(ErrorCode.INVALID_REQUEST, "Group name must not be empty")


def _entries(node: Node, kind: int, name: str) -> list[Entry]:
    """The settings of a resource. Raises `ConfigError` or `TopicError`."""
    if kind == TOPIC:
        return node.settings.topic(_named_topic(node, name).info.configs)
    if kind == BROKER:
        _check_broker_name(name)
        return node.settings.broker() if name else node.settings.broker_defaults()
    if kind == GROUP:
        _check_group_name(name)
        return node.settings.group(name)
    raise ConfigError(ErrorCode.INVALID_REQUEST, f"Resources of type {kind} have no settings here.")


def _described(entry: Entry, *, synonyms: bool, documentation: bool) -> Fields:
    shown = [] if entry.key.is_sensitive or not synonyms else entry.synonyms
    return {
        "name": entry.key.name,
        "value": entry.value,
        "read_only": entry.read_only,
        "config_source": entry.source,
        "is_sensitive": entry.key.is_sensitive,
        "synonyms": [
            {"name": item.name, "value": item.value, "source": item.source}
            for item in shown
            if not (item.source is Source.DEFAULT and item.name in NO_SYNONYM_KEYS)
        ],
        "config_type": entry.key.type,
        "documentation": entry.key.doc if documentation else None,
    }


def describe_configs(node: Node, request: Request) -> Answer:
    """DescribeConfigs.

    Behaviour: every setting of a topic, broker or group with its value, where that comes from and what stands behind
    it. The empty broker name means what was set for all brokers. Secrets have no value. Each resource fails by itself.
    Version notes: v1 synonyms; v3 types and documentation.
    """
    body = request.body
    synonyms = getattr(body, "include_synonyms", False)
    documentation = getattr(body, "include_documentation", False)
    results: list[Fields] = []
    for item in body.resources:
        result: Fields = {"resource_type": item.resource_type, "resource_name": item.resource_name, "configs": []}
        wanted = item.configuration_keys
        try:
            entries = _entries(node, item.resource_type, item.resource_name)
        except (ConfigError, TopicError) as error:
            results.append(result | {"error_code": error.code, "error_message": str(error)})
            continue
        result["configs"] = [
            _described(entry, synonyms=synonyms, documentation=documentation)
            for entry in entries
            if not wanted or entry.key.name in wanted
        ]
        results.append(result | {"error_code": ErrorCode.NONE, "error_message": ""})
    return {"results": results}


# --- Changing ---

_Changes = Callable[[Mapping[str, str]], dict[str, str]]
"""From the settings of a resource as they are to those that are wanted."""


def _alter_topic(node: Node, name: str, wanted: _Changes, *, validate_only: bool) -> None:
    if not name:
        raise ConfigError(ErrorCode.INVALID_REQUEST, "Default topic resources are not allowed.")
    topic = _named_topic(node, name)
    if topic.info.internal:
        raise ConfigError(
            ErrorCode.POLICY_VIOLATION, f"{name} is the broker's own topic: its settings are not changed by requests."
        )
    values = wanted(topic.info.configs)
    node.settings.check_topic(values)
    if not validate_only:
        node.topics.set_configs(topic, values)


def _alter_other(node: Node, kind: int, name: str, wanted: _Changes, *, validate_only: bool) -> None:
    if kind == BROKER:
        _check_broker_name(name)
    elif kind != GROUP:
        raise ConfigError(ErrorCode.INVALID_REQUEST, f"Unknown resource type {kind}")
    elif not name:
        raise ConfigError(ErrorCode.INVALID_REQUEST, "Default group resources are not allowed.")
    values = wanted(node.settings.own(kind, name))
    node.settings.check(kind, name, values)
    if not validate_only:
        node.settings.set(kind, name, values)


def _altered(node: Node, request: Request, wanted: Callable[[Any], _Changes]) -> Answer:
    body = request.body
    names = [(item.resource_type, item.resource_name) for item in body.resources]
    results: list[Fields] = []
    for item in body.resources:
        kind, name = item.resource_type, item.resource_name
        result: Fields = {"resource_type": kind, "resource_name": name, "error_code": 0, "error_message": None}
        try:
            if names.count((kind, name)) > 1:
                raise ConfigError(ErrorCode.INVALID_REQUEST, "Each resource must appear at most once.")
            if kind == TOPIC:
                _alter_topic(node, name, wanted(item), validate_only=body.validate_only)
            else:
                _alter_other(node, kind, name, wanted(item), validate_only=body.validate_only)
        except (ConfigError, TopicError) as error:
            result |= {"error_code": error.code, "error_message": str(error)}
        except LogError as error:
            text = f"The change cannot be written and was not made: {error}"
            result |= {"error_code": ErrorCode.KAFKA_STORAGE_ERROR, "error_message": text}
        results.append(result)
    return {"responses": results}


def _keys(kind: int) -> tuple[Mapping[str, ConfigKey], str]:
    """What can be set for a resource of this type, and what such a resource is called."""
    known = {TOPIC: (TOPIC_KEYS, "topic"), GROUP: (GROUP_KEYS, "group")}
    return known.get(kind, ({**BROKER_KEYS, **INERT_KEYS}, "broker"))


def incremental_alter_configs(node: Node, request: Request) -> Answer:
    """IncrementalAlterConfigs (KIP-339).

    Behaviour: sets, deletes, and for lists appends and subtracts; what was changed is durable and holds when it is
    answered. Each resource changes as a whole or not at all. The broker's own topics stay as they are (44).
    """

    def wanted(item: Any) -> _Changes:
        changes = [Change(entry.name, entry.config_operation, entry.value) for entry in item.configs]
        return lambda current: changed(current, changes, *_keys(item.resource_type))

    return _altered(node, request, wanted)


def alter_configs(node: Node, request: Request) -> Answer:
    """AlterConfigs.

    Behaviour: replaces all settings of a resource; those that are not given go back to what stands behind them.
    """

    def wanted(item: Any) -> _Changes:
        changes = [Change(entry.name, Operation.SET, entry.value) for entry in item.configs]
        return lambda _: changed({}, changes, *_keys(item.resource_type))

    return _altered(node, request, wanted)


def list_config_resources(node: Node, request: Request) -> Answer:
    """ListConfigResources (KIP-1142).

    Behaviour: groups of which something was set, the broker, every topic. There are no client metrics resources.
    Version notes: v0 lists client metrics only; v1 types (none: all; an unknown one: 35).
    """
    known = (GROUP, BROKER, TOPIC, _CLIENT_METRICS, _BROKER_LOGGER)
    wanted = list(getattr(request.body, "resource_types", (_CLIENT_METRICS,))) or known
    if not set(wanted) <= set(known):
        return {"error_code": ErrorCode.UNSUPPORTED_VERSION, "config_resources": []}
    names = {
        GROUP: node.settings.resources(GROUP),
        BROKER: [str(NODE_ID)],
        TOPIC: sorted(topic.info.name for topic in node.topics),
    }
    return {
        "error_code": ErrorCode.NONE,
        "config_resources": [
            {"resource_name": name, "resource_type": kind}
            for kind in known
            if kind in wanted
            for name in names.get(kind, ())
        ],
    }


APIS = (
    Api(32, 1, 4, describe_configs),
    Api(33, 0, 2, alter_configs),
    Api(44, 0, 1, incremental_alter_configs),
    Api(74, 0, 1, list_config_resources),
)

"""Which right each API asks for, and what a client without it is told: Apache Kafka's rules as one table.

The guard stands before the handlers. It refuses a request whole, or takes the items out that the client has no right
to, lets the handler answer the rest, and puts the refusals back; from listings it takes what the client may not see.
Handlers that write their own bytes (Produce, Fetch), or whose answer depends on the right in other ways (Metadata,
DescribeTopicPartitions, FindCoordinator, AddPartitionsToTxn, OffsetFetch), ask `Node.denies` themselves.

An API that has no rule here is for those only who may alter the cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from semel.broker.exchange import Answer, Fields, Later, Request
from semel.broker.security.acls import CLUSTER_NAME, OPERATIONS_OF, Operation, Resource
from semel.errors import ErrorCode
from semel.wire.refusal import refusal

if TYPE_CHECKING:
    from semel.broker.node import Node

__all__ = ["authorized_operations", "guarded", "is_guarded"]

_NONE = ErrorCode.NONE
_CODES = {
    Resource.TOPIC: ErrorCode.TOPIC_AUTHORIZATION_FAILED,
    Resource.GROUP: ErrorCode.GROUP_AUTHORIZATION_FAILED,
    Resource.CLUSTER: ErrorCode.CLUSTER_AUTHORIZATION_FAILED,
    Resource.TRANSACTIONAL_ID: ErrorCode.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
}
_TOPIC_CONFIG, _GROUP_CONFIG = 2, 32
"""org.apache.kafka.common.config.ConfigResource.Type; every other type is the cluster's."""


class _Client:
    """Who asks, and what for."""

    def __init__(self, node: Node, request: Request) -> None:
        self.node = node
        self.request = request
        self.version = request.version
        self.body = request.body

    def may(self, operation: Operation, resource: Resource, name: str = CLUSTER_NAME) -> bool:
        return not self.node.denies(self.request, operation, resource, name)

    def need(self, operation: Operation, resource: Resource, name: str = CLUSTER_NAME) -> ErrorCode:
        """The error of a client without this right."""
        return _NONE if self.may(operation, resource, name) else _CODES[resource]

    def topic(self, item: Any) -> str | None:
        """The name of the topic that an item is about; None for an unknown id, which the handler answers."""
        name: str | None = (
            item if isinstance(item, str) else getattr(item, "name", None) or getattr(item, "topic", None)
        )
        if name is None:
            found = self.node.topics.by_id(getattr(item, "topic_id", None))
            name = None if found is None else found.info.name
        return name


Whole = Callable[[_Client], ErrorCode]
Item = Callable[[_Client, Any], ErrorCode]
After = Callable[[_Client, Fields], None]
_O, _R = Operation, Resource


# --- Rules about a request as a whole ---


def _cluster(operation: Operation) -> Whole:
    return lambda client: client.need(operation, _R.CLUSTER)


def _group(operation: Operation) -> Whole:
    return lambda client: client.need(operation, _R.GROUP, client.body.group_id)


def _transaction(client: _Client) -> ErrorCode:
    return client.need(_O.WRITE, _R.TRANSACTIONAL_ID, client.body.transactional_id)


def _transaction_and_group(client: _Client) -> ErrorCode:
    return _transaction(client) or _group(_O.READ)(client)


def _init_producer_id(client: _Client) -> ErrorCode:
    body = client.body
    if body.transactional_id is None:
        peer, authorizer = client.request.peer, client.node.authorizer
        assert authorizer is not None, "without one there is no guard"
        if client.may(_O.IDEMPOTENT_WRITE, _R.CLUSTER):
            return _NONE
        any_topic = authorizer.allows_any(peer.principal, peer.client_host, _O.WRITE, _R.TOPIC)
        return _NONE if any_topic else ErrorCode.CLUSTER_AUTHORIZATION_FAILED
    code = _transaction(client)
    if code is _NONE and getattr(body, "enable2_pc", False):
        code = client.need(_O.TWO_PHASE_COMMIT, _R.TRANSACTIONAL_ID, body.transactional_id)
    return code


def _add_partitions(client: _Client) -> ErrorCode:
    if client.version >= 4:  # The form that brokers use among themselves.
        return client.need(_O.CLUSTER_ACTION, _R.CLUSTER)
    return client.need(_O.WRITE, _R.TRANSACTIONAL_ID, client.body.v3_and_below_transactional_id)


def _write_markers(client: _Client) -> ErrorCode:
    return _NONE if client.may(_O.ALTER, _R.CLUSTER) else client.need(_O.CLUSTER_ACTION, _R.CLUSTER)


def _consumer_group(client: _Client) -> ErrorCode:
    code = _group(_O.READ)(client)
    names = getattr(client.body, "subscribed_topic_names", None) or ()
    hidden = any(not client.may(_O.DESCRIBE, _R.TOPIC, name) for name in names)
    return code or (ErrorCode.TOPIC_AUTHORIZATION_FAILED if hidden else _NONE)


_WHOLE: Mapping[int, Whole] = {
    8: _group(_O.READ),
    11: _group(_O.READ),
    12: _group(_O.READ),
    13: _group(_O.READ),
    14: _group(_O.READ),
    22: _init_producer_id,
    24: _add_partitions,
    25: _transaction_and_group,
    26: _transaction,
    27: _write_markers,
    28: _transaction_and_group,
    34: _cluster(_O.ALTER),
    35: _cluster(_O.DESCRIBE),
    43: _cluster(_O.ALTER),
    45: _cluster(_O.ALTER),
    46: _cluster(_O.DESCRIBE),
    47: _group(_O.DELETE),
    55: _cluster(_O.DESCRIBE),
    68: _consumer_group,
    74: _cluster(_O.DESCRIBE_CONFIGS),
}


# --- Rules about each item of a list ---


def _topics(operation: Operation) -> Item:
    def check(client: _Client, item: Any) -> ErrorCode:
        name = client.topic(item)
        return _NONE if name is None else client.need(operation, _R.TOPIC, name)

    return check


def _create_topic(client: _Client, item: Any) -> ErrorCode:
    return _NONE if client.may(_O.CREATE, _R.CLUSTER) else client.need(_O.CREATE, _R.TOPIC, item.name)


def _delete_topic(client: _Client, item: Any) -> ErrorCode:
    return _NONE if client.may(_O.DELETE, _R.CLUSTER) else _topics(_O.DELETE)(client, item)


def _epochs(client: _Client, item: Any) -> ErrorCode:
    return _NONE if client.may(_O.CLUSTER_ACTION, _R.CLUSTER) else _topics(_O.DESCRIBE)(client, item)


def _groups(operation: Operation) -> Item:
    return lambda client, group_id: client.need(operation, _R.GROUP, group_id)


def _configs(operation: Operation) -> Item:
    def check(client: _Client, item: Any) -> ErrorCode:
        if item.resource_type == _TOPIC_CONFIG:
            return client.need(operation, _R.TOPIC, item.resource_name)
        if item.resource_type == _GROUP_CONFIG:
            return client.need(operation, _R.GROUP, item.resource_name)
        return client.need(operation, _R.CLUSTER)

    return check


def _described_transaction(client: _Client, transactional_id: str) -> ErrorCode:
    return client.need(_O.DESCRIBE, _R.TRANSACTIONAL_ID, transactional_id)


_ITEMS: Mapping[int, tuple[tuple[str, Item], ...]] = {
    2: (("topics", _topics(_O.DESCRIBE)),),
    8: (("topics", _topics(_O.READ)),),
    15: (("groups", _groups(_O.DESCRIBE)),),
    19: (("topics", _create_topic),),
    20: (("topics", _delete_topic), ("topic_names", _delete_topic)),
    21: (("topics", _topics(_O.DELETE)),),
    23: (("topics", _epochs),),
    28: (("topics", _topics(_O.READ)),),
    32: (("resources", _configs(_O.DESCRIBE_CONFIGS)),),
    33: (("resources", _configs(_O.ALTER_CONFIGS)),),
    37: (("topics", _topics(_O.ALTER)),),
    42: (("groups_names", _groups(_O.DELETE)),),
    44: (("resources", _configs(_O.ALTER_CONFIGS)),),
    47: (("topics", _topics(_O.READ)),),
    61: (("topics", _topics(_O.READ)),),
    65: (("transactional_ids", _described_transaction),),
    69: (("group_ids", _groups(_O.DESCRIBE)),),
    75: (("topics", _topics(_O.DESCRIBE)),),
}


# --- What a listing may show ---


def _keep(answer: Fields, name: str, visible: Callable[[Fields], bool]) -> None:
    answer[name] = [item for item in answer.get(name) or () if visible(item)]


def _listed_groups(client: _Client, answer: Fields) -> None:
    if not client.may(_O.DESCRIBE, _R.CLUSTER):
        _keep(answer, "groups", lambda item: client.may(_O.DESCRIBE, _R.GROUP, item["group_id"]))


def _listed_transactions(client: _Client, answer: Fields) -> None:
    def visible(item: Fields) -> bool:
        return client.may(_O.DESCRIBE, _R.TRANSACTIONAL_ID, item["transactional_id"])

    _keep(answer, "transaction_states", visible)


def _transactions_topics(client: _Client, answer: Fields) -> None:
    for item in answer["transaction_states"]:
        _keep(item, "topics", lambda topic: client.may(_O.DESCRIBE, _R.TOPIC, topic["topic"]))


def _created_configs(client: _Client, answer: Fields) -> None:
    for item in answer["topics"]:
        if item["error_code"] == _NONE and not client.may(_O.DESCRIBE_CONFIGS, _R.TOPIC, item["name"]):
            code = ErrorCode.TOPIC_AUTHORIZATION_FAILED
            item |= {"topic_config_error_code": code, "configs": None, "num_partitions": -1, "replication_factor": -1}


def _members_topics(client: _Client, answer: Fields) -> None:
    """A group whose members have topics that the client may not see is not shown at all."""
    for group in answer["groups"]:
        names = {
            topic["topic_name"]
            for member in group.get("members") or ()
            for part in ("assignment", "target_assignment")
            for topic in member[part]["topic_partitions"]
        }
        if not all(client.may(_O.DESCRIBE, _R.TOPIC, name) for name in names):
            message = "The group has described topic(s) that the client is not authorized to describe."
            group |= {"error_code": ErrorCode.TOPIC_AUTHORIZATION_FAILED, "error_message": message, "members": []}


_AFTER: Mapping[int, After] = {
    16: _listed_groups,
    19: _created_configs,
    65: _transactions_topics,
    66: _listed_transactions,
    69: _members_topics,
}
_ASKING_THEMSELVES = frozenset({0, 1, 3, 9, 10, 29, 30, 31, 50, 51})
_OPEN = frozenset({17, 18, 36, 60})
"""Which versions there are and who the brokers are may be known to everybody who is let in."""


def authorized_operations(node: Node, request: Request, resource: Resource, name: str) -> int:
    """What the client may do to this resource, as the bits of an authorized-operations field (KIP-430)."""
    bits = 0
    for operation in OPERATIONS_OF[resource]:
        if not node.denies(request, operation, resource, name):
            bits |= 1 << operation
    return bits


def is_guarded(api_key: int) -> bool:
    """Whether there is a rule about this API."""
    return any(api_key in known for known in (_WHOLE, _ITEMS, _AFTER, _ASKING_THEMSELVES, _OPEN))


def guarded(node: Node, request: Request, handle: Callable[[Request], Answer | Later]) -> Answer | Later:
    """Let the request have what its client has a right to."""
    key = request.header.api_key
    if key in _ASKING_THEMSELVES or key in _OPEN:
        return handle(request)
    client = _Client(node, request)
    whole = _WHOLE.get(key) if is_guarded(key) else _cluster(_O.ALTER)
    code = _NONE if whole is None else whole(client)
    if code is not _NONE:
        return _refuse_whole(client, code)
    refused = _take_out(client)
    if refused is not None and not _has_items(client):
        return refused
    answer = handle(request)
    if isinstance(answer, Later):
        answer.finish = lambda late: _finish(client, late, refused)
        return answer
    return _finish(client, answer, refused)


def _refuse_whole(client: _Client, code: ErrorCode) -> Fields:
    answer = refusal(client.request.header.api_key, client.version, client.body, code)
    if "error_code" in answer:  # Said once, for everything.
        return {name: [] if isinstance(value, list) else value for name, value in answer.items()}
    if "markers" in answer:
        for asked, item in zip(client.body.markers, answer["markers"], strict=True):
            item["producer_id"] = asked.producer_id
    return answer


def _take_out(client: _Client) -> Fields | None:
    """Take out of the request what its client has no right to. Returns the answer about that, None for nothing."""
    result: Fields | None = None
    key = client.request.header.api_key
    for name, check in _ITEMS.get(key, ()):
        items = getattr(client.body, name, None)
        if not items:
            continue
        codes = [check(client, item) for item in items]
        sorted_out: dict[ErrorCode, list[Any]] = {}
        for item, code in zip(items, codes, strict=True):
            sorted_out.setdefault(code, []).append(item)
        for code in sorted(sorted_out.keys() - {_NONE}):
            part = replace(client.body, **{name: tuple(sorted_out[code])})
            refused = refusal(key, client.version, part, code)
            result = refused if result is None else _merged(result, refused)
        if any(codes):
            client.body = client.request.body = replace(client.body, **{name: tuple(sorted_out.get(_NONE, ()))})
    if result is not None and "error_code" in result:
        result["error_code"] = _NONE  # Each item has its own.
    return result


def _has_items(client: _Client) -> bool:
    return any(getattr(client.body, name, None) for name, _ in _ITEMS[client.request.header.api_key])


def _merged(answer: Fields, refused: Fields) -> Fields:
    """The answer with the refused items behind its own."""
    lists = {name: [*(answer.get(name) or ()), *items] for name, items in refused.items() if isinstance(items, list)}
    return answer | lists


def _finish(client: _Client, answer: Answer, refused: Fields | None) -> Answer:
    if not isinstance(answer, dict):
        return answer
    after = _AFTER.get(client.request.header.api_key)
    if after is not None:
        after(client, answer)
    return answer if refused is None else _merged(answer, refused)

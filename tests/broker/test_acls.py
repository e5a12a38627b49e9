"""Access rules: what matches, what wins, and that no API is forgotten."""

from __future__ import annotations

from pathlib import Path

import pytest

from semel.broker.apis import APIS
from semel.broker.config import BrokerConfig
from semel.broker.security.acls import Acl, AclFilter, Authorizer, Operation, Pattern, Permission, Resource
from semel.broker.security.guard import is_guarded
from semel.broker.security.settings import Security
from semel.client.describe import decode_described
from tests.broker.core import Core, batch

Op, R = Operation, Resource
ALICE = "User:alice"


def rule(
    operation: Operation,
    name: str,
    *,
    resource: Resource = R.TOPIC,
    prefix: bool = False,
    who: str = ALICE,
    host: str = "*",
    deny: bool = False,
) -> Acl:
    pattern = Pattern.PREFIXED if prefix else Pattern.LITERAL
    return Acl(resource, name, pattern, who, host, operation, Permission.DENY if deny else Permission.ALLOW)


def authorizer(*rules: Acl, **options: bool) -> Authorizer:
    return Authorizer(lambda: rules, ["User:root"], **options)


@pytest.mark.parametrize(
    ("rules", "operation", "allowed"),
    [
        ([], Op.READ, False),
        ([rule(Op.READ, "t")], Op.READ, True),
        ([rule(Op.READ, "t")], Op.DESCRIBE, True),
        ([rule(Op.WRITE, "t")], Op.DESCRIBE, True),
        ([rule(Op.DELETE, "t")], Op.DESCRIBE, True),
        ([rule(Op.ALTER, "t")], Op.DESCRIBE, True),
        ([rule(Op.CREATE, "t")], Op.DESCRIBE, False),
        ([rule(Op.ALTER_CONFIGS, "t")], Op.DESCRIBE_CONFIGS, True),
        ([rule(Op.ALTER_CONFIGS, "t")], Op.DESCRIBE, False),
        ([rule(Op.DESCRIBE, "t")], Op.READ, False),
        ([rule(Op.ALL, "t")], Op.WRITE, True),
        ([rule(Op.ALL, "*")], Op.WRITE, True),
        ([rule(Op.READ, "x")], Op.READ, False),
        ([rule(Op.READ, "", prefix=True)], Op.READ, True),
        ([rule(Op.READ, "t", prefix=True)], Op.READ, True),
        ([rule(Op.READ, "to", prefix=True)], Op.READ, False),
        ([rule(Op.READ, "t", who="User:bob")], Op.READ, False),
        ([rule(Op.READ, "t", who="User:*")], Op.READ, True),
        ([rule(Op.READ, "t", host="10.0.0.1")], Op.READ, False),
        ([rule(Op.READ, "t", host="127.0.0.1")], Op.READ, True),
        ([rule(Op.READ, "t", resource=R.GROUP)], Op.READ, False),
        # A denial wins, wherever it stands, but denies no more than it says.
        ([rule(Op.ALL, "*"), rule(Op.READ, "t", deny=True)], Op.READ, False),
        ([rule(Op.ALL, "*"), rule(Op.ALL, "t", deny=True, prefix=True)], Op.READ, False),
        ([rule(Op.ALL, "*"), rule(Op.READ, "t", deny=True)], Op.DESCRIBE, True),
        ([rule(Op.ALL, "*"), rule(Op.READ, "t", deny=True, who="User:bob")], Op.READ, True),
        ([rule(Op.TWO_PHASE_COMMIT, "t")], Op.WRITE, False),
    ],
)
def test_rules(rules: list[Acl], operation: Operation, allowed: bool) -> None:
    assert authorizer(*rules).allows(ALICE, "127.0.0.1", operation, R.TOPIC, "t") is allowed


def test_super_users_need_no_rule_and_no_denial_stops_them() -> None:
    found = authorizer(rule(Op.ALL, "*", who="User:*", deny=True))
    assert found.allows("User:root", "h", Op.WRITE, R.TOPIC, "t")
    assert not found.allows(ALICE, "h", Op.WRITE, R.TOPIC, "t")


def test_without_any_rule_about_a_resource_the_setting_decides() -> None:
    about_bob = rule(Op.READ, "t", who="User:bob")
    found = authorizer(about_bob, allow_if_no_acl=True)
    assert found.allows(ALICE, "h", Op.READ, R.TOPIC, "other")
    assert not found.allows(ALICE, "h", Op.READ, R.TOPIC, "t"), "somebody's rule makes a resource a guarded one"


def test_a_change_is_in_force_at_once() -> None:
    rules: list[Acl] = []
    found = Authorizer(lambda: rules, [])
    assert not found.allows(ALICE, "h", Op.READ, R.TOPIC, "t")
    rules.append(rule(Op.READ, "t"))
    found.changed()
    assert found.allows(ALICE, "h", Op.READ, R.TOPIC, "t")


@pytest.mark.parametrize(
    ("rules", "allowed"),
    [
        ([], False),
        ([rule(Op.WRITE, "t")], True),
        ([rule(Op.READ, "t")], False),
        ([rule(Op.WRITE, "t"), rule(Op.WRITE, "t", deny=True)], False),
        ([rule(Op.WRITE, "t"), rule(Op.WRITE, "*", deny=True)], False),
        ([rule(Op.WRITE, "t"), rule(Op.WRITE, "", prefix=True, deny=True)], True),
        ([rule(Op.WRITE, "topic"), rule(Op.WRITE, "to", prefix=True, deny=True)], False),
        ([rule(Op.WRITE, "to", prefix=True), rule(Op.WRITE, "top", prefix=True, deny=True)], True),
        ([rule(Op.WRITE, "*"), rule(Op.WRITE, "t", deny=True)], True),
        ([rule(Op.WRITE, "t", who="User:bob")], False),
    ],
)
def test_any_resource_of_a_type(rules: list[Acl], allowed: bool) -> None:
    assert authorizer(*rules).allows_any(ALICE, "h", Op.WRITE, R.TOPIC) is allowed


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ((R.ANY, None, Pattern.ANY, None, None, Op.ANY, Permission.ANY), {"orders", "ord", "*", "g"}),
        ((R.TOPIC, "orders", Pattern.LITERAL, None, None, Op.ANY, Permission.ANY), {"orders"}),
        ((R.TOPIC, "orders", Pattern.MATCH, None, None, Op.ANY, Permission.ANY), {"orders", "ord", "*"}),
        ((R.TOPIC, "ord", Pattern.PREFIXED, None, None, Op.ANY, Permission.ANY), {"ord"}),
        ((R.TOPIC, "ord", Pattern.ANY, None, None, Op.ANY, Permission.ANY), {"ord"}),
        ((R.TOPIC, None, Pattern.LITERAL, None, None, Op.ANY, Permission.ANY), {"orders", "*"}),
        ((R.ANY, None, Pattern.ANY, "User:bob", None, Op.ANY, Permission.ANY), {"g"}),
        ((R.ANY, None, Pattern.ANY, None, None, Op.ALL, Permission.ANY), {"*"}),
        ((R.ANY, None, Pattern.ANY, None, None, Op.ANY, Permission.DENY), set()),
    ],
)
def test_filters(wanted: tuple[int, str | None, int, str | None, str | None, int, int], found: set[str]) -> None:
    rules = [
        rule(Op.READ, "orders"),
        rule(Op.READ, "ord", prefix=True),
        rule(Op.ALL, "*"),
        rule(Op.READ, "g", resource=R.GROUP, who="User:bob"),
    ]
    assert {acl.name for acl in rules if AclFilter(*wanted).matches(acl)} == found


def test_every_api_has_a_rule() -> None:
    assert [key for key in APIS if not is_guarded(key)] == [], "say in broker/security/guard.py who may ask this"


# --- Through the node ---


@pytest.fixture
def core(tmp_path: Path) -> Core:
    return Core(tmp_path, BrokerConfig(security=Security(authorize=True, super_users=("User:root",))))


def acl_fields(acl: Acl) -> dict[str, object]:
    return {
        "resource_type": acl.resource,
        "resource_name": acl.name,
        "resource_pattern_type": acl.pattern,
        "principal": acl.principal,
        "host": acl.host,
        "operation": acl.operation,
        "permission_type": acl.permission,
    }


def grant(core: Core, *acls: Acl) -> list[int]:
    core.principal = "User:root"
    answer = core.ask(30, 3, creations=[acl_fields(acl) for acl in acls])
    core.principal = ALICE
    return [int(item.error_code) for item in answer.results]


def test_rules_survive_a_restart_and_can_be_taken_back(core: Core) -> None:
    assert grant(core, rule(Op.READ, "t"), rule(Op.WRITE, "t"), rule(Op.READ, "t")) == [0, 0, 0]
    core.restart()
    core.principal = "User:root"
    everything = {"resource_type_filter": 1, "pattern_type_filter": 1, "operation": 1, "permission_type": 1}
    everything |= {"resource_name_filter": None, "principal_filter": None, "host_filter": None}
    (resource,) = core.ask(29, 3, **everything).resources
    assert (resource.resource_name, len(resource.acls)) == ("t", 2)
    (result,) = core.ask(31, 3, filters=[everything | {"operation": Op.READ}]).filter_results
    assert [acl.operation for acl in result.matching_acls] == [Op.READ]
    core.restart()
    (resource,) = core.ask(29, 3, **everything).resources
    assert [acl.operation for acl in resource.acls] == [Op.WRITE]


@pytest.mark.parametrize(
    "wrong",
    [
        {"resource_type": 0},
        {"resource_type": 1},
        {"resource_type": 99},
        {"resource_type": 4},
        {"resource_name": ""},
        {"resource_pattern_type": 2},
        {"operation": 1},
        {"operation": 77},
        {"permission_type": 1},
        {"principal": "alice"},
        {"principal": ":alice"},
    ],
)
def test_what_is_no_rule_is_refused_by_itself(core: Core, wrong: dict[str, object]) -> None:
    core.principal = "User:root"
    good = acl_fields(rule(Op.READ, "t"))
    answer = core.ask(30, 3, creations=[good | wrong, good])
    assert [int(item.error_code) for item in answer.results] == [42, 0]
    assert len(core.node.metadata.acls) == 1


def test_without_an_authorizer_there_are_no_rules(tmp_path: Path) -> None:
    core = Core(tmp_path)
    assert core.ask(30, 3, creations=[acl_fields(rule(Op.READ, "t"))]).results[0].error_code == 54
    everything = {"resource_type_filter": 1, "pattern_type_filter": 1, "operation": 1, "permission_type": 1}
    everything |= {"resource_name_filter": None, "principal_filter": None, "host_filter": None}
    assert core.ask(29, 3, **everything).error_code == 54
    assert core.ask(31, 3, filters=[everything]).filter_results[0].error_code == 54


def test_stranger_is_told_nothing_and_changes_nothing(core: Core) -> None:
    core.principal = "User:root"
    core.create("secret")
    core.produce("secret", batch(b"x"))
    core.principal = ALICE
    assert core.produce("secret", batch(b"y")).error_code == 29
    assert core.produce("unknown", batch(b"y")).error_code == 29, "29 and 3 would tell which topics there are"
    assert core.fetch("secret", 0).error_code == 29
    assert core.fetch("secret", 0, version=13).error_code == 29
    topics = core.ask(3, 12, topics=None, allow_auto_topic_creation=False, include_topic_authorized_operations=True)
    assert topics.topics == ()
    named = core.ask(
        3,
        12,
        topics=[{"topic_id": None, "name": "secret"}, {"topic_id": None, "name": "new"}],
        allow_auto_topic_creation=True,
        include_topic_authorized_operations=False,
    )
    assert [int(item.error_code) for item in named.topics] == [29, 29]
    assert core.node.topics.get("new") is None
    core.principal = "User:root"
    assert core.fetch("secret", 0).high_watermark == 1


def test_one_topic_of_two_is_refused_the_other_served(core: Core) -> None:
    core.principal = "User:root"
    core.create("mine")
    core.create("theirs")
    grant(core, rule(Op.READ, "mine"))
    topics = [
        {"name": name, "partitions": [{"partition_index": 0, "current_leader_epoch": -1, "timestamp": -1}]}
        for name in ("theirs", "mine")
    ]
    answer = core.ask(2, 7, replica_id=-1, isolation_level=0, topics=topics)
    codes = {item.name: int(item.partitions[0].error_code) for item in answer.topics}
    assert codes == {"mine": 0, "theirs": 29}
    configs = core.ask(
        32,
        4,
        resources=[{"resource_type": 2, "resource_name": name, "configuration_keys": None} for name in ("mine", "x")]
        + [{"resource_type": 4, "resource_name": "1", "configuration_keys": None}],
        include_synonyms=False,
        include_documentation=False,
    )
    assert [int(item.error_code) for item in configs.results] == [29, 29, 31]


def test_transactions_need_their_id_their_topics_and_their_group(core: Core) -> None:
    core.principal = "User:root"
    core.create("t")
    core.create("u")
    core.principal = ALICE
    assert core.init("tx").error_code == 53
    assert core.init(None).error_code == 31
    grant(core, rule(Op.WRITE, "tx", resource=R.TRANSACTIONAL_ID))
    assert core.init(None).error_code == 31
    identity = core.init("tx")
    assert identity.error_code == 0
    body = {"v3_and_below_transactional_id": "tx", "v3_and_below_producer_id": identity.producer_id}
    body |= {"v3_and_below_producer_epoch": identity.producer_epoch}
    topics = [{"name": "t", "partitions": [0]}, {"name": "u", "partitions": [0]}]
    grant(core, rule(Op.WRITE, "u"))
    answer = core.ask(24, 3, **body, v3_and_below_topics=topics)
    codes = {
        item.name: int(item.results_by_partition[0].partition_error_code)
        for item in answer.results_by_topic_v3_and_below
    }
    assert codes == {"t": 29, "u": 55}
    assert core.init(None).error_code == 0, "who may write to a topic may do it idempotently"
    offsets = {"transactional_id": "tx", "producer_id": identity.producer_id, "producer_epoch": identity.producer_epoch}
    assert core.ask(25, 3, **offsets, group_id="g").error_code == 30
    grant(core, rule(Op.READ, "g", resource=R.GROUP))
    assert core.ask(25, 3, **offsets, group_id="g").error_code == 0
    core.principal = "User:mallory"
    assert core.ask(26, 4, **offsets, committed=True).error_code == 53
    assert core.init("tx").error_code == 53, "a stranger must not fence"


def test_two_phase_commit_is_a_right_of_its_own(tmp_path: Path) -> None:
    security = Security(authorize=True, super_users=("User:root",))
    core = Core(tmp_path, BrokerConfig(security=security, two_phase_commit=True))
    grant(core, rule(Op.WRITE, "tx", resource=R.TRANSACTIONAL_ID))
    fields = {"transactional_id": "tx", "transaction_timeout": 10_000, "producer_id": -1, "producer_epoch": -1}
    fields |= {"enable2_pc": True, "keep_prepared_txn": False}
    assert core.ask(22, 6, **fields).error_code == 53
    assert core.init("tx").error_code == 0
    grant(core, rule(Op.TWO_PHASE_COMMIT, "tx", resource=R.TRANSACTIONAL_ID))
    assert core.ask(22, 6, **fields).error_code == 0


def test_listings_show_what_may_be_seen(core: Core) -> None:
    core.principal = "User:root"
    for transactional_id in ("tx-a", "tx-b"):
        core.init(transactional_id)
    grant(core, rule(Op.DESCRIBE, "tx-a", resource=R.TRANSACTIONAL_ID))
    found = core.ask(66, 1, state_filters=[], producer_id_filters=[], duration_filter=-1)
    assert [item.transactional_id for item in found.transaction_states] == ["tx-a"]
    described = core.send(65, 0, transactional_ids=["tx-b", "tx-a"])
    assert isinstance(described, bytes)
    assert {item.transactional_id: int(item.error) for item in decode_described(described)} == {"tx-a": 0, "tx-b": 53}


def test_authorized_operations_are_the_clients_own(core: Core) -> None:
    core.principal = "User:root"
    core.create("t")
    grant(core, rule(Op.READ, "t"))
    asked = {"topics": [{"topic_id": None, "name": "t"}], "allow_auto_topic_creation": False}
    asked |= {"include_topic_authorized_operations": True, "include_cluster_authorized_operations": True}
    answer = core.ask(3, 10, **asked)
    assert answer.topics[0].topic_authorized_operations == 1 << Op.READ | 1 << Op.DESCRIBE
    assert answer.cluster_authorized_operations == 0
    core.principal = "User:root"
    answer = core.ask(3, 10, **asked)
    every = sum(1 << code for code in (3, 4, 5, 6, 7, 8, 10, 11))
    assert answer.topics[0].topic_authorized_operations == every

"""Logins, certificates and access rules: the same suite on the embedded broker and on Apache Kafka."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Coroutine, Mapping
from typing import Any

import pytest
from confluent_kafka import KafkaException, Producer
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialDeletion,
    UserScramCredentialUpsertion,
)

from semel.broker.security.acls import Operation, Resource
from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.client.consumer import Consumer, Reader
from semel.client.producer import TransactionalProducer
from semel.errors import AbortTransaction, ErrorCode, Fatal, SemelError
from semel.types import GroupMetadata, TopicPartition
from semel.wire.records import BatchBuilder
from tests.conformance.secured import (
    PASSWORD,
    USER,
    USER_PASSWORD,
    SecuredBroker,
    authority,
    fresh,
    new_topic,
    secured,
    secured_embedded,
    secured_kafka,
)

__all__ = ["authority", "secured", "secured_embedded", "secured_kafka"]

MECHANISMS = ("SCRAM-SHA-256", "SCRAM-SHA-512", "PLAIN")
LIMITED = (USER, USER_PASSWORD)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


def batch(*values: bytes) -> BatchBuilder:
    builder = BatchBuilder()
    for value in values:
        builder.append(None, value, time.time_ns() // 1_000_000, ())
    return builder


def admin_of(broker: SecuredBroker) -> AdminClient:
    return AdminClient(broker.confluent())


@pytest.fixture
def limited(secured: SecuredBroker) -> str:
    """A user without rights, by the name in `LIMITED`; its password is set anew and its rules are gone."""
    admin = admin_of(secured)
    info = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_256, 4096)
    change = UserScramCredentialUpsertion(USER, info, USER_PASSWORD.encode())
    admin.alter_user_scram_credentials([change])[USER].result(20)
    mine = AclBindingFilter(
        ResourceType.ANY, None, ResourcePatternType.ANY, f"User:{USER}", None, AclOperation.ANY, AclPermissionType.ANY
    )
    admin.delete_acls([mine])[mine].result(20)
    return USER


def grant(
    broker: SecuredBroker,
    resource: ResourceType,
    name: str,
    operation: AclOperation,
    *,
    deny: bool = False,
    prefix: bool = False,
) -> None:
    pattern = ResourcePatternType.PREFIXED if prefix else ResourcePatternType.LITERAL
    permission = AclPermissionType.DENY if deny else AclPermissionType.ALLOW
    rule = AclBinding(resource, name, pattern, f"User:{USER}", "*", operation, permission)
    admin = admin_of(broker)
    admin.create_acls([rule])[rule].result(20)
    if broker.kind == "kafka":  # The authorizer follows the metadata log.
        deadline = time.monotonic() + 10
        wanted = AclBindingFilter(resource, name, pattern, f"User:{USER}", "*", operation, permission)
        while not admin.describe_acls(wanted).result(20):
            assert time.monotonic() < deadline


# --- Logins ---


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("tls", [False, True], ids=["plaintext", "tls"])
def test_our_client_logs_in_writes_and_reads(secured: SecuredBroker, mechanism: str, tls: bool) -> None:
    topic = fresh("login")

    async def main() -> list[bytes]:
        async with secured.client("admin", PASSWORD, mechanism, tls=tls) as client:
            await Admin(client).create_topics({topic: TopicSpec(1)})
            producer = TransactionalProducer(client, fresh("tx"))
            await producer.init_transactions()
            producer.begin()
            await producer.produce(topic, 0, batch(b"x" * 100_000, b"last"))
            await producer.end_transaction(commit=True)
            await producer.close()
        reader = Reader(secured.address(tls=tls), settings=secured.settings("admin", PASSWORD, mechanism, tls=tls))
        await reader.start({TopicPartition(topic, 0): 0})
        values: list[bytes] = []
        deadline = time.monotonic() + 20
        while len(values) < 2 and time.monotonic() < deadline:
            values += [record.value for record in (await reader.poll(10, 1.0)).records]
        await reader.close()
        return values

    assert run(main()) == [b"x" * 100_000, b"last"]


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("user", ["admin", "nobody"])
def test_wrong_password_is_told_once_and_not_tried_again(secured: SecuredBroker, mechanism: str, user: str) -> None:
    async def main() -> SemelError:
        client = secured.client(user, "wrong-password", mechanism)
        try:
            await client.start()
        except SemelError as error:
            return error
        finally:
            await client.close()
        raise AssertionError("a wrong password was accepted")

    began = time.monotonic()
    error = run(main())
    assert isinstance(error, Fatal)
    assert error.code is ErrorCode.SASL_AUTHENTICATION_FAILED
    assert user in str(error)
    assert "sasl.password" in str(error)
    assert "wrong-password" not in str(error)
    assert time.monotonic() - began < 5


class FromTheStart:
    """The owner of whatever the group gives."""

    async def on_assigned(self, partitions: list[TopicPartition]) -> Mapping[TopicPartition, int]:
        return dict.fromkeys(partitions, 0)

    async def on_revoked(self, partitions: list[TopicPartition]) -> None: ...

    async def on_lost(self, partitions: list[TopicPartition]) -> None: ...


async def first_value(group: str, topic: str, address: str, settings: dict[str, Any]) -> bytes | None:
    """What a member of the group reads first. Raises what ends it."""
    options = {"instance_id": "one", "session_timeout_ms": 6_000, "settings": settings}
    member = Consumer(address, group=group, topics=[topic], events=FromTheStart(), **options)
    await member.start()
    try:
        async with asyncio.timeout(60):
            while True:
                for record in (await member.poll(10, 0.5)).records:
                    return record.value
    finally:
        await member.close()


async def written(broker: SecuredBroker, *values: bytes) -> str:
    """A topic with these values."""
    topic = await new_topic(broker, fresh("read"))
    async with broker.client() as client:
        producer = TransactionalProducer(client, fresh("tx"))
        await producer.init_transactions()
        producer.begin()
        await producer.produce(topic, 0, batch(*values))
        await producer.end_transaction(commit=True)
        await producer.close()
    return topic


@pytest.mark.parametrize(("protocol", "tls"), [("classic", True), ("consumer", False)])
def test_a_member_of_a_group_logs_in_and_reads(secured: SecuredBroker, protocol: str, tls: bool) -> None:
    """It has connections of its own, in a thread of its own."""

    async def main() -> bytes | None:
        topic = await written(secured, b"read")
        settings = secured.settings(tls=tls) | {"group.protocol": protocol}
        return await first_value(fresh("group"), topic, secured.address(tls=tls), settings)

    assert run(main()) == b"read"


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_a_member_of_a_group_says_which_right_it_lacks(secured: SecuredBroker, limited: str, protocol: str) -> None:
    topic, group = run(written(secured, b"read")), fresh("group")
    settings = secured.settings(*LIMITED) | {"group.protocol": protocol}
    with pytest.raises(Fatal, match=f"{group}.*GROUP_AUTHORIZATION_FAILED"):
        run(first_value(group, topic, secured.plain, settings))
    grant(secured, ResourceType.GROUP, group, AclOperation.READ)
    with pytest.raises(Fatal, match="TOPIC_AUTHORIZATION_FAILED"):
        run(first_value(group, topic, secured.plain, settings))
    grant(secured, ResourceType.TOPIC, topic, AclOperation.READ)
    assert run(first_value(group, topic, secured.plain, settings)) == b"read"


def test_consumers_with_a_wrong_password_end_too(secured: SecuredBroker) -> None:
    wrong = secured.settings("admin", "wrong-password")

    async def read() -> None:
        reader = Reader(secured.plain, settings=wrong)
        await reader.start({TopicPartition("any", 0): 0})
        try:
            async with asyncio.timeout(60):
                while True:
                    await reader.poll(1, 0.1)
        finally:
            await reader.close()

    for work in (read(), first_value("any", "any", secured.plain, wrong)):
        with pytest.raises(Fatal, match=r"sasl\.password") as raised:
            run(work)
        assert "wrong-password" not in str(raised.value)


def test_certificate_of_somebody_else_is_not_trusted(secured: SecuredBroker, tmp_path: Any) -> None:
    from tests.services.certificates import Authority

    stranger = Authority(tmp_path, "stranger")
    for settings, word in (
        ({"ssl_ca_location": str(stranger.certificate)}, "ssl.ca.location"),
        ({"ssl_ca_location": None, "ssl_ca_pem": stranger.certificate.read_text()}, "ssl.ca.location"),
    ):

        async def main(settings: dict[str, Any] = settings) -> None:
            await secured.client(tls=True, **settings).start()

        with pytest.raises(Fatal, match=word):
            run(main())


def test_name_in_the_certificate_must_be_the_hosts(secured: SecuredBroker) -> None:
    port = secured.tls.rpartition(":")[2]

    async def main(**settings: object) -> None:
        named = {name.replace("_", "."): value for name, value in settings.items()}
        # 127.0.0.1 and localhost are in the certificate, this name of the same machine is not.
        client = KafkaClient(f"127.1:{port}", settings=secured.settings(tls=True) | named)
        try:
            await client.start()
        finally:
            await client.close()

    with pytest.raises(Fatal, match="cannot be trusted"):
        run(main())
    run(main(ssl_endpoint_identification_algorithm="none"))
    run(main(enable_ssl_certificate_verification="false", ssl_ca_location=None))


def test_plaintext_client_and_tls_listener_do_not_hang(secured: SecuredBroker) -> None:
    patience = {"delivery.timeout.ms": 1500, "socket.timeout.ms": 1000}

    async def tls_to_plaintext() -> None:
        await KafkaClient(secured.plain, settings=secured.settings(tls=True) | patience).start()

    async def plaintext_to_tls() -> None:
        await KafkaClient(secured.tls, settings=patience).start()

    began = time.monotonic()
    with pytest.raises(SemelError, match=r"security\.protocol"):
        run(tls_to_plaintext())
    with pytest.raises(SemelError, match=r"security\.protocol"):
        run(plaintext_to_tls())
    assert time.monotonic() - began < 20


def test_passwords_are_changed_and_taken_away_while_the_broker_runs(secured: SecuredBroker, limited: str) -> None:
    admin = admin_of(secured)

    async def logs_in(password: str, mechanism: str = "SCRAM-SHA-256") -> bool:
        client = secured.client(limited, password, mechanism)
        try:
            await client.start()
        except Fatal:
            return False
        finally:
            await client.close()
        return True

    def eventually(wanted: bool, *login: str) -> None:
        deadline = time.monotonic() + 10  # Apache Kafka's credentials follow the metadata log.
        while run(logs_in(*login)) is not wanted:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    eventually(True, USER_PASSWORD)
    info = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 8192)
    fresh_password = "another-secret-for-tests"
    change = UserScramCredentialUpsertion(limited, info, fresh_password.encode())
    admin.alter_user_scram_credentials([change])[limited].result(20)
    eventually(True, fresh_password, "SCRAM-SHA-512")
    described = admin.describe_user_scram_credentials([limited])[limited].result(20)
    found = {(info.mechanism, info.iterations) for info in described.scram_credential_infos}
    assert found == {(ScramMechanism.SCRAM_SHA_256, 4096), (ScramMechanism.SCRAM_SHA_512, 8192)}
    gone = [UserScramCredentialDeletion(limited, ScramMechanism.SCRAM_SHA_512)]
    admin.alter_user_scram_credentials(gone)[limited].result(20)
    eventually(False, fresh_password, "SCRAM-SHA-512")
    with pytest.raises(KafkaException, match=r"RESOURCE_NOT_FOUND|91"):
        admin.alter_user_scram_credentials(gone)[limited].result(20)
    few = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_256, 4095)
    weak = UserScramCredentialUpsertion(limited, few, b"p")
    with pytest.raises(KafkaException, match=r"UNACCEPTABLE_CREDENTIAL|93"):
        admin.alter_user_scram_credentials([weak])[limited].result(20)


# --- Access rules ---


def test_transaction_needs_each_of_its_rights(secured: SecuredBroker, limited: str) -> None:
    """Each right is missing in turn; the named error comes and nothing is written."""
    topic, group, transactional_id = fresh("acl"), fresh("group"), fresh("tid")
    run(new_topic(secured, topic))

    async def attempt() -> str:
        async with secured.client(*LIMITED, delivery_timeout_ms=8000) as client:
            producer = TransactionalProducer(client, transactional_id)
            try:
                await producer.init_transactions()
                producer.begin()
                await producer.produce(topic, 0, batch(b"x"))
                await producer.flush()
                await producer.send_offsets({TopicPartition(topic, 0): 1}, GroupMetadata(group, -1, "", None))
                await producer.end_transaction(commit=True)
            except SemelError as error:
                if isinstance(error, AbortTransaction):
                    await producer.abort()
                return f"{error} {error.code!r}"
            finally:
                await producer.close()
        return "committed"

    assert "TRANSACTIONAL_ID_AUTHORIZATION_FAILED" in run(attempt())
    grant(secured, ResourceType.TRANSACTIONAL_ID, transactional_id, AclOperation.WRITE)
    assert "TOPIC_AUTHORIZATION_FAILED" in run(attempt())
    grant(secured, ResourceType.TOPIC, topic, AclOperation.WRITE)
    assert "GROUP_AUTHORIZATION_FAILED" in run(attempt())
    grant(secured, ResourceType.GROUP, group, AclOperation.READ)
    assert "TOPIC_AUTHORIZATION_FAILED" in run(attempt()), "a position in a topic needs READ on it"
    grant(secured, ResourceType.TOPIC, topic, AclOperation.READ)
    assert run(attempt()) == "committed"
    grant(secured, ResourceType.TRANSACTIONAL_ID, transactional_id, AclOperation.WRITE, deny=True)
    assert "TRANSACTIONAL_ID_AUTHORIZATION_FAILED" in run(attempt()), "a denial wins"


def test_librdkafkas_transaction_needs_its_rights_too(secured: SecuredBroker, limited: str) -> None:
    topic, transactional_id = fresh("acl"), fresh("tid")
    run(new_topic(secured, topic))

    def attempt() -> str:
        conf = secured.confluent(*LIMITED, transactional_id=transactional_id, socket_timeout_ms=5000)
        producer = Producer(conf)
        try:
            producer.init_transactions(10)
            producer.begin_transaction()
            producer.produce(topic, b"x")
            producer.flush(10)
            producer.commit_transaction(10)
        except KafkaException as error:
            return str(error.args[0].name())
        return "committed"

    assert attempt() == "TRANSACTIONAL_ID_AUTHORIZATION_FAILED"
    grant(secured, ResourceType.TRANSACTIONAL_ID, transactional_id[:6], AclOperation.WRITE, prefix=True)
    assert attempt() != "committed"
    grant(secured, ResourceType.TOPIC, topic, AclOperation.WRITE)
    assert attempt() == "committed"


Fields = dict[str, Any]
NOBODY = {"topic_id": None}


def _named(name: str, **more: Any) -> Fields:
    return {"name": name, **more}


def questions(topic: str, other: str) -> list[tuple[str, int, int, Fields]]:
    """(name, API, version, fields) of what a user without rights asks: one request for each API and each shape."""
    group, tid = "some-group", "some-tid"
    member = {"group_id": group, "generation_id": 1, "member_id": "m", "group_instance_id": None}
    producer = {"producer_id": 1, "producer_epoch": 0}
    leaf = {"partition_index": 0, "committed_offset": 1, "committed_leader_epoch": -1, "committed_metadata": ""}
    join = {
        "group_id": group,
        "session_timeout": 10_000,
        "rebalance_timeout": 10_000,
        "member_id": "",
        "group_instance_id": None,
        "protocol_type": "consumer",
        "protocols": [{"name": "range", "metadata": b""}],
        "reason": None,
    }
    new_topic = {"name": fresh("new"), "num_partitions": 1, "replication_factor": 1, "assignments": [], "configs": []}
    cluster_filter = {
        "resource_type_filter": 1,
        "resource_name_filter": None,
        "pattern_type_filter": 1,
        "principal_filter": None,
        "host_filter": None,
        "operation": 1,
        "permission_type": 1,
    }
    creation = {
        "resource_type": 2,
        "resource_name": "t",
        "resource_pattern_type": 3,
        "principal": "User:x",
        "host": "*",
        "operation": 3,
        "permission_type": 3,
    }
    at_latest = {"partition_index": 0, "current_leader_epoch": -1, "timestamp": -1}
    resources = [
        {"resource_type": kind, "resource_name": name, "configuration_keys": None}
        for kind, name in ((2, topic), (4, "1"))
    ]
    altered = [
        {"resource_type": kind, "resource_name": name, "configs": [{"name": "x", "config_operation": 0, "value": "1"}]}
        for kind, name in ((2, topic), (4, "1"))
    ]
    return [
        ("FindCoordinator of a group", 10, 4, {"key_type": 0, "coordinator_keys": [group]}),
        ("FindCoordinator of an id", 10, 4, {"key_type": 1, "coordinator_keys": [tid]}),
        (
            "ListOffsets",
            2,
            7,
            {"replica_id": -1, "isolation_level": 0, "topics": [_named(topic, partitions=[at_latest])]},
        ),
        (
            "Metadata by name",
            3,
            12,
            {
                "topics": [NOBODY | _named(topic), NOBODY | _named(fresh("none"))],
                "allow_auto_topic_creation": True,
                "include_topic_authorized_operations": False,
            },
        ),
        (
            "Metadata of all",
            3,
            12,
            {"topics": None, "allow_auto_topic_creation": False, "include_topic_authorized_operations": True},
        ),
        (
            "OffsetCommit",
            8,
            8,
            {
                "group_id": group,
                "generation_id_or_member_epoch": -1,
                "member_id": "",
                "group_instance_id": None,
                "topics": [_named(topic, partitions=[leaf])],
            },
        ),
        ("OffsetFetch", 9, 7, {"group_id": group, "topics": None, "require_stable": False}),
        (
            "OffsetFetch of two groups",
            9,
            8,
            {
                "groups": [{"group_id": name, "topics": None} for name in (group, "other")],
                "require_stable": False,
            },
        ),
        ("JoinGroup", 11, 9, join),
        ("Heartbeat", 12, 4, member),
        (
            "LeaveGroup",
            13,
            5,
            {"group_id": group, "members": [{"member_id": "m", "group_instance_id": None, "reason": ""}]},
        ),
        ("SyncGroup", 14, 5, member | {"protocol_type": "c", "protocol_name": "r", "assignments": []}),
        ("DescribeGroups", 15, 5, {"groups": [group], "include_authorized_operations": True}),
        ("ListGroups", 16, 5, {"states_filter": [], "types_filter": []}),
        ("CreateTopics", 19, 7, {"topics": [new_topic], "timeout": 1000, "validate_only": False}),
        ("DeleteTopics", 20, 6, {"topics": [NOBODY | _named(topic)], "timeout": 1000}),
        (
            "DeleteRecords",
            21,
            2,
            {"topics": [_named(topic, partitions=[{"partition_index": 0, "offset": 0}])], "timeout": 1000},
        ),
        (
            "InitProducerId",
            22,
            4,
            {"transactional_id": tid, "transaction_timeout": 1000, "producer_id": -1, "producer_epoch": -1},
        ),
        (
            "InitProducerId without id",
            22,
            4,
            {"transactional_id": None, "transaction_timeout": 1000, "producer_id": -1, "producer_epoch": -1},
        ),
        (
            "InitProducerId with 2PC",
            22,
            6,
            {
                "transactional_id": tid,
                "transaction_timeout": 1000,
                "producer_id": -1,
                "producer_epoch": -1,
                "enable2_pc": True,
                "keep_prepared_txn": False,
            },
        ),
        (
            "OffsetForLeaderEpoch",
            23,
            4,
            {
                "replica_id": -1,
                "topics": [
                    {"topic": topic, "partitions": [{"partition": 0, "current_leader_epoch": -1, "leader_epoch": 0}]}
                ],
            },
        ),
        (
            "AddPartitionsToTxn",
            24,
            3,
            {
                "v3_and_below_transactional_id": tid,
                "v3_and_below_producer_id": 1,
                "v3_and_below_producer_epoch": 0,
                "v3_and_below_topics": [_named(topic, partitions=[0]), _named(other, partitions=[0])],
            },
        ),
        ("AddOffsetsToTxn", 25, 3, producer | {"transactional_id": tid, "group_id": group}),
        ("EndTxn", 26, 4, producer | {"transactional_id": tid, "committed": True}),
        (
            "TxnOffsetCommit",
            28,
            3,
            producer
            | {
                "transactional_id": tid,
                "group_id": group,
                "generation_id": -1,
                "member_id": "",
                "group_instance_id": None,
                "topics": [_named(topic, partitions=[leaf])],
            },
        ),
        ("DescribeAcls", 29, 3, cluster_filter),
        ("CreateAcls", 30, 3, {"creations": [creation]}),
        ("DeleteAcls", 31, 3, {"filters": [cluster_filter]}),
        ("DescribeConfigs", 32, 4, {"resources": resources, "include_synonyms": False, "include_documentation": False}),
        ("IncrementalAlterConfigs", 44, 1, {"resources": altered, "validate_only": True}),
        (
            "CreatePartitions",
            37,
            3,
            {"topics": [_named(topic, count=5, assignments=None)], "timeout": 1000, "validate_only": True},
        ),
        ("DeleteGroups", 42, 2, {"groups_names": [group]}),
        ("OffsetDelete", 47, 0, {"group_id": group, "topics": [_named(topic, partitions=[{"partition_index": 0}])]}),
        ("DescribeUserScramCredentials", 50, 0, {"users": []}),
        ("AlterUserScramCredentials", 51, 0, {"deletions": [{"name": "x", "mechanism": 1}], "upsertions": []}),
        ("DescribeCluster", 60, 1, {"include_cluster_authorized_operations": True, "endpoint_type": 1}),
        ("DescribeProducers", 61, 0, {"topics": [_named(topic, partition_indexes=[0])]}),
        ("ListTransactions", 66, 1, {"state_filters": [], "producer_id_filters": [], "duration_filter": -1}),
        (
            "DescribeTopicPartitions",
            75,
            0,
            {"topics": [_named(topic)], "response_partition_limit": 10, "cursor": None},
        ),
        ("DescribeTopicPartitions of all", 75, 0, {"topics": [], "response_partition_limit": 10, "cursor": None}),
    ]


def codes(value: Any, path: str = "") -> dict[str, int]:
    """Every error code of an answer and how long its lists are, by where they stand."""
    found: dict[str, int] = {}
    for name in getattr(type(value), "__dataclass_fields__", ()):
        item = getattr(value, name)
        if name.endswith(("error_code", "authorized_operations")):
            found[f"{path}{name}"] = int(item)
        elif isinstance(item, tuple) and name not in ("brokers", "configs"):
            found[f"{path}{name}.len"] = len(item)
            for number, part in enumerate(sorted(item, key=lambda part: str(getattr(part, "name", "")))):
                found |= codes(part, f"{path}{name}[{number}].")
    return found


_NOT_READY = re.compile(r"error_code': (14|15|16|51)\b")


@pytest.fixture
def both(secured_embedded: SecuredBroker, secured_kafka: SecuredBroker) -> tuple[SecuredBroker, SecuredBroker]:
    return secured_embedded, secured_kafka


@pytest.mark.parametrize("rights", ["none", "describe", "write"])
def test_both_brokers_tell_a_user_the_same(both: tuple[SecuredBroker, SecuredBroker], rights: str) -> None:
    """One program of requests for every API to both brokers, with no right, with looking only, with writing."""
    topic, other = fresh("seen"), fresh("hidden")
    told: list[dict[str, dict[str, int]]] = []
    for broker in both:
        admin = admin_of(broker)
        info = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_256, 4096)
        user = fresh("user")
        change = UserScramCredentialUpsertion(user, info, USER_PASSWORD.encode())
        admin.alter_user_scram_credentials([change])[user].result(20)
        run(new_topic(broker, topic))
        run(new_topic(broker, other))
        operation = {"describe": AclOperation.DESCRIBE, "write": AclOperation.WRITE}.get(rights)
        if operation is not None:
            names = [(ResourceType.TOPIC, topic), (ResourceType.TRANSACTIONAL_ID, "some-tid")]
            if operation is AclOperation.DESCRIBE:
                names.append((ResourceType.GROUP, "some-group"))
            rules = [
                AclBinding(
                    kind, name, ResourcePatternType.LITERAL, f"User:{user}", "*", operation, AclPermissionType.ALLOW
                )
                for kind, name in names
            ]
            for future in admin.create_acls(rules).values():
                future.result(20)

        async def ask(broker: SecuredBroker = broker, user: str = user) -> dict[str, dict[str, int]]:
            answers = {}
            async with broker.client(user, USER_PASSWORD, delivery_timeout_ms=10_000) as client:
                if rights != "none":
                    await client.topic(topic)
                (node,) = client.brokers()
                for name, key, version, fields in questions(topic, other):
                    answers[name] = codes(await client.call(key, node, version, **fields))
                    deadline = time.monotonic() + 20
                    while _NOT_READY.search(str(answers[name])):  # Apache Kafka makes its internal topics first.
                        assert time.monotonic() < deadline, (name, answers[name])
                        await asyncio.sleep(0.05)
                        answers[name] = codes(await client.call(key, node, version, **fields))
            return answers

        told.append(run(ask()))
    ours, theirs = told
    assert ours.keys() == theirs.keys()
    assert {name: ours[name] for name in ours if ours[name] != theirs[name]} == {
        name: theirs[name] for name in ours if ours[name] != theirs[name]
    }


def test_two_phase_commit_needs_its_own_right(secured_kafka: SecuredBroker, secured_embedded: SecuredBroker) -> None:
    """The numbers that the wire has for it are the same on both sides."""
    for broker in (secured_kafka, secured_embedded):
        user = f"User:{fresh('2pc')}"

        async def main(broker: SecuredBroker = broker, user: str = user) -> list[int]:
            async with broker.client() as client:
                (node,) = client.brokers()
                rule = {
                    "resource_type": Resource.TRANSACTIONAL_ID,
                    "resource_name": "dual",
                    "resource_pattern_type": 3,
                    "principal": user,
                    "host": "*",
                    "operation": Operation.TWO_PHASE_COMMIT,
                    "permission_type": 3,
                }
                answer = await client.call(30, node, 3, creations=[rule])
                return [int(item.error_code) for item in answer.results]

        assert run(main()) == [0]

"""What a client knows of its cluster, and its settings."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from semel.client.cluster import KafkaClient, parse_bootstrap
from semel.client.config import DEFAULTS, ClientSettings
from semel.errors import ConfigurationError, ErrorCode, Fatal, Retriable
from semel.types import TopicPartition
from tests.client.scripted_broker import FIND_COORDINATOR, METADATA, ScriptedBroker


def test_nobody_there_is_said_with_the_address() -> None:
    async def main() -> None:
        client = KafkaClient("127.0.0.1:1,127.0.0.1:2", settings={"delivery.timeout.ms": 200})
        started = time.monotonic()
        with pytest.raises(Retriable, match=r"127\.0\.0\.1:1.*127\.0\.0\.1:2"):
            await client.start()
        assert time.monotonic() - started < 5
        await client.close()

    asyncio.run(main())


def test_any_listed_broker_will_do() -> None:
    async def main() -> None:
        async with ScriptedBroker() as broker, KafkaClient(f"127.0.0.1:1,{broker.address}") as client:
            assert client.cluster_id == "scripted"
            assert client.transaction_version == 2
            assert (await client.topic("t")).partitions == 2

    asyncio.run(main())


def test_a_leader_is_looked_up_again_after_invalidate_and_a_coordinator_too() -> None:
    async def main() -> None:
        async with (
            ScriptedBroker() as broker,
            ScriptedBroker(node_id=2, cluster=broker),
            KafkaClient(broker.address) as client,
        ):
            where = TopicPartition("t", 0)
            assert await client.leader(*where) == 1
            broker.leaders[where] = 2
            assert await client.leader(*where) == 1, "the cache answers"
            client.invalidate(topic="t")
            assert await client.leader(*where) == 2
            broker.then(FIND_COORDINATOR, ErrorCode.COORDINATOR_LOAD_IN_PROGRESS)
            with pytest.raises(Retriable, match="'id'"):
                await client.coordinator("id", 1)
            assert await client.coordinator("id", 1) in (1, 2)
            before = len(broker.asked(FIND_COORDINATOR))
            await client.coordinator("id", 1)
            assert len(broker.asked(FIND_COORDINATOR)) == before

    asyncio.run(main())


def test_a_topic_that_is_not_there_is_named_and_one_that_comes_is_waited_for() -> None:
    async def main() -> None:
        async with ScriptedBroker() as broker, KafkaClient(broker.address) as client:
            with pytest.raises(Fatal, match=r"'nope'.*Create it"):
                await client.topic("nope", timeout=0.1)
            looking = asyncio.ensure_future(client.topic("later", timeout=5.0))
            while not any(body.topics and body.topics[0].name == "later" for body in broker.asked(METADATA)):
                await asyncio.sleep(0.01)
            broker.topics["later"] = 3
            assert (await looking).partitions == 3

    asyncio.run(main())


def test_a_lost_connection_is_made_anew() -> None:
    async def main() -> None:
        async with ScriptedBroker() as broker, KafkaClient(broker.address) as client:
            node = await client.leader("t", 0)
            first = await client.connection(node)
            broker.cut()
            await first.wait_closed()
            assert await client.connection(node) is not first

    asyncio.run(main())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"enable.idempotence": "false"}, "enable.idempotence"),
        ({"acks": "1"}, "acks"),
        ({"isolation.level": "read_uncommitted"}, "aborted"),
        ({"enable.auto.commit": "true"}, "enable.auto.commit"),
        ({"security.protocol": "SASL_SLS"}, "sasl_ssl"),
        ({"security.protocol": "SASL_SSL"}, "SCRAM-SHA-256"),
        ({"security.protocol": "SASL_SSL", "sasl.mechanism": "GSSAPI"}, "SCRAM-SHA-256"),
        ({"security.protocol": "SASL_SSL", "sasl.mechanism": "PLAIN", "sasl.username": "u"}, "sasl.password"),
        ({"sasl.password": "secret"}, "would not use it"),
        ({"security.protocol": "ssl", "ssl.keystore.location": "k.p12"}, "ssl.certificate.location"),
        ({"security.protocol": "ssl", "ssl.endpoint.identification.algorithm": "ldap"}, "https"),
        ({"security.protocol": "ssl", "enable.ssl.certificate.verification": "maybe"}, "true nor false"),
        ({"max.in.flight.requests.per.connection": 6}, "written twice"),
        ({"socket.timeout.ms": "soon"}, "whole number"),
        ({"retry.backoff.ms": 0}, "at least 1"),
        ({"fetch.min.bytes": "few"}, "fetch.min.bytes"),
        ({"group.protocol": "share"}, "classic or consumer"),
        ({"group.remote.assignor": "uniform"}, "group.protocol=consumer"),
        ({"auto.offset.reset": "latest"}, "position is gone stops"),
        ({"partition.assignment.strategy": "cooperative-sticky"}, "without an owner"),
        ({"session.timeout.ms": 6_000}, "SEMEL_SESSION_TIMEOUT_MS"),
        ({"client.rack": "a"}, "leaders of partitions"),
        ({"fetch.wait.max.mss": 5}, r"Did you mean fetch\.wait\.max\.ms\?"),
        ({"socket.nagle.disable": "true"}, r"docs/howto\.md"),
    ],
)
def test_a_setting_that_weakens_a_promise_or_that_nobody_follows_is_refused_by_name(
    settings: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigurationError, match=words) as raised:
        ClientSettings.read(settings)
    assert "secret" not in str(raised.value)


def test_a_name_that_is_not_known_is_told_without_its_value() -> None:
    """It may be a password under a name that is not quite right."""
    with pytest.raises(ConfigurationError, match=r"Did you mean sasl\.password\?") as raised:
        ClientSettings.read({"sasl.pasword": "canary-secret"})
    assert "canary" not in str(raised.value)


def test_settings_have_defaults_with_reasons_and_librdkafkas_other_names_pass() -> None:
    assert all(default.reason for default in DEFAULTS.values())
    login = {"security.protocol": "sasl_plaintext", "sasl.mechanism": "PLAIN", "sasl.username": "u"}
    login |= {"sasl.password": "secret"}
    same = {"acks": "all", "auto.offset.reset": "error", "partition.assignment.strategy": "range"}
    read = ClientSettings.read({"message.timeout.ms": "7000", "fetch.wait.max.ms": 5} | login | same)
    assert read.delivery_timeout == 7.0
    assert read.consumer.limits.wait_ms == 5
    assert "secret" not in repr(read)
    assert "secret" not in repr(KafkaClient("a:1", settings=login))


@pytest.mark.parametrize("name", ["ssl.ca.location", "ssl.certificate.location"])
def test_a_file_that_cannot_be_read_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("")
    for path in (tmp_path / "none.pem", tmp_path / "empty.pem"):
        with pytest.raises(ConfigurationError, match=name):
            KafkaClient("a:1", settings={"security.protocol": "ssl", name: str(path)})


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a:1", [("a", 1)]),
        ("a:1, b:2,", [("a", 1), ("b", 2)]),
        ("a", [("a", 9092)]),
        ("[::1]:9", [("::1", 9)]),
    ],
)
def test_bootstrap_addresses(text: str, found: list[tuple[str, int]]) -> None:
    assert parse_bootstrap(text) == found


@pytest.mark.parametrize("text", ["", ",", "a:", "a:x", ":1", "a:70000"])
def test_bootstrap_addresses_that_are_none(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"bootstrap\.servers|Kafka's address"):
        parse_bootstrap(text)

"""Other clients log in to the embedded broker, over TLS and without: librdkafka, aiokafka, kafka-python, Java."""

from __future__ import annotations

import asyncio
import ssl
import time
from pathlib import Path
from typing import Any

import aiokafka
import confluent_kafka
import kafka
import pytest

from tests.conformance.secured import ADMIN, PASSWORD, SecuredBroker, authority, fresh, secured_embedded
from tests.conformance.test_java_clients import TOOLS, java
from tests.conftest import unavailable
from tests.services.kafka import missing_tools

__all__ = ["authority", "secured_embedded"]

ACLS, CONFIGS = f"{TOOLS}.AclCommand", "kafka.admin.ConfigCommand"
VALUES = [b"%d" % number for number in range(50)]
ways = pytest.mark.parametrize(
    ("mechanism", "tls"), [("SCRAM-SHA-256", False), ("SCRAM-SHA-512", True), ("PLAIN", True)]
)


@ways
def test_librdkafka(secured_embedded: SecuredBroker, mechanism: str, tls: bool) -> None:
    topic = fresh("confluent")
    config = secured_embedded.confluent(ADMIN, PASSWORD, mechanism, tls=tls)
    producer = confluent_kafka.Producer(config)
    for value in VALUES:
        producer.produce(topic, value, partition=0)
    assert producer.flush(20) == 0
    consumer = confluent_kafka.Consumer(config | {"group.id": topic, "auto.offset.reset": "earliest"})
    consumer.subscribe([topic])
    found: list[Any] = []
    deadline = time.monotonic() + 30
    while len(found) < len(VALUES) and time.monotonic() < deadline:
        found += [message.value() for message in consumer.consume(100, 1.0) if message.error() is None]
    consumer.close()
    assert found == VALUES


def python_settings(broker: SecuredBroker, mechanism: str, tls: bool, password: str = PASSWORD) -> dict[str, Any]:
    context = ssl.create_default_context(cafile=str(broker.authority)) if tls else None
    return {
        "bootstrap_servers": broker.address(tls=tls),
        "security_protocol": "SASL_SSL" if tls else "SASL_PLAINTEXT",
        "sasl_mechanism": mechanism,
        "sasl_plain_username": ADMIN,
        "sasl_plain_password": password,
        "ssl_context": context,
    }


@ways
def test_aiokafka(secured_embedded: SecuredBroker, mechanism: str, tls: bool) -> None:
    topic = fresh("aiokafka")
    settings = python_settings(secured_embedded, mechanism, tls)

    async def main() -> list[bytes]:
        async with aiokafka.AIOKafkaProducer(**settings) as producer:
            for value in VALUES:
                await producer.send(topic, value, partition=0)
        found: list[bytes] = []
        options = settings | {"group_id": topic, "auto_offset_reset": "earliest"}
        async with aiokafka.AIOKafkaConsumer(topic, **options) as consumer:
            async with asyncio.timeout(30):
                while len(found) < len(VALUES):
                    found.append((await consumer.getone()).value)
        return found

    assert asyncio.run(main()) == VALUES


@ways
def test_kafka_python(secured_embedded: SecuredBroker, mechanism: str, tls: bool) -> None:
    topic = fresh("python")
    settings = python_settings(secured_embedded, mechanism, tls)
    producer = kafka.KafkaProducer(**settings)
    for value in VALUES:
        producer.send(topic, value, partition=0)
    producer.flush(20)
    producer.close()
    options = settings | {"auto_offset_reset": "earliest", "consumer_timeout_ms": 10_000, "group_id": None}
    consumer = kafka.KafkaConsumer(topic, **options)
    found = [next(consumer).value for _ in VALUES]
    consumer.close()
    assert found == VALUES


def test_aiokafka_is_told_that_the_password_is_wrong(secured_embedded: SecuredBroker) -> None:
    settings = python_settings(secured_embedded, "SCRAM-SHA-256", False, "wrong")

    async def main() -> None:
        producer = aiokafka.AIOKafkaProducer(**settings)
        try:
            await producer.start()
        finally:
            await producer.stop()

    with pytest.raises(aiokafka.errors.KafkaError):
        asyncio.run(main())


def java_file(broker: SecuredBroker, folder: Path, mechanism: str, tls: bool, password: str = PASSWORD) -> Path:
    module = "plain.Plain" if mechanism == "PLAIN" else "scram.Scram"
    jaas = f"org.apache.kafka.common.security.{module}LoginModule required"
    lines = [
        f"security.protocol={'SASL_SSL' if tls else 'SASL_PLAINTEXT'}",
        f"sasl.mechanism={mechanism}",
        f'sasl.jaas.config={jaas} username="{ADMIN}" password="{password}";',
    ]
    if tls:
        lines += ["ssl.truststore.type=PEM", f"ssl.truststore.location={broker.authority}"]
    file = folder / "client.properties"
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture
def needs_java() -> None:
    if missing_tools():
        unavailable("Java tools", f"{' and '.join(missing_tools())} not found")


@pytest.mark.peers
@pytest.mark.usefixtures("needs_java")
@pytest.mark.parametrize(("mechanism", "tls"), [("SCRAM-SHA-512", True), ("PLAIN", False)])
def test_java(secured_embedded: SecuredBroker, tmp_path: Path, mechanism: str, tls: bool) -> None:
    topic = fresh("java")
    address, file = (
        secured_embedded.address(tls=tls),
        str(java_file(secured_embedded, tmp_path, mechanism, tls)),
    )
    produced = java(
        f"{TOOLS}.ConsoleProducer", "--bootstrap-server", address, "--topic", topic, "--command-config", file,
        stdin="\n".join(value.decode() for value in VALUES) + "\n",
    )  # fmt: skip
    assert produced.returncode == 0, produced.stderr
    consumed = java(
        f"{TOOLS}.consumer.ConsoleConsumer", "--bootstrap-server", address, "--topic", topic, "--from-beginning",
        "--max-messages", str(len(VALUES)), "--timeout-ms", "20000", "--command-config", file,
    )  # fmt: skip
    assert sorted(consumed.stdout.split()) == sorted(value.decode() for value in VALUES), consumed.stderr


@pytest.mark.peers
@pytest.mark.usefixtures("needs_java")
def test_javas_tools_for_users_and_rules(secured_embedded: SecuredBroker, tmp_path: Path) -> None:
    """kafka-configs makes a user, kafka-acls gives it a right, both show what they did."""
    config = ["--bootstrap-server", secured_embedded.plain, "--command-config"]
    config.append(str(java_file(secured_embedded, tmp_path, "SCRAM-SHA-256", False)))
    user, topic = fresh("user"), fresh("topic")
    entity = ["--entity-type", "users", "--entity-name", user]
    made = java(
        CONFIGS, *config, "--alter", *entity, "--add-config", "SCRAM-SHA-512=[iterations=8192,password=some-password]"
    )
    assert made.returncode == 0, made.stdout + made.stderr
    rule = ["--allow-principal", f"User:{user}", "--operation", "Read", "--topic", topic]
    added = java(ACLS, *config, "--add", *rule)
    assert added.returncode == 0, added.stdout + added.stderr
    assert f"User:{user}" in added.stdout
    assert "operation=READ" in added.stdout

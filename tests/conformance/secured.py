"""A broker that asks who you are, of either kind, with the same users and certificates: fixtures of several suites."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from semel.broker.config import BrokerConfig
from semel.broker.embedded import EmbeddedBroker
from semel.broker.security.settings import Listener, Security, TlsFiles
from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from tests.conftest import unavailable
from tests.services.certificates import Authority
from tests.services.kafka import KafkaNode, Secured, missing_tools

ADMIN, PASSWORD = "admin", "admin-secret-for-tests"
USER, USER_PASSWORD = "limited", "limited-secret-for-tests"


@dataclass(frozen=True)
class SecuredBroker:
    """Its two addresses, and the certificate of whoever signed its own."""

    kind: str
    plain: str
    tls: str
    authority: Path

    def settings(
        self, user: str = ADMIN, password: str = PASSWORD, mechanism: str = "SCRAM-SHA-256", *, tls: bool = False
    ) -> dict[str, Any]:
        """Client settings under librdkafka's names."""
        found = {
            "security.protocol": "SASL_SSL" if tls else "SASL_PLAINTEXT",
            "sasl.mechanism": mechanism,
            "sasl.username": user,
            "sasl.password": password,
        }
        return found | ({"ssl.ca.location": str(self.authority)} if tls else {})

    def address(self, *, tls: bool = False) -> str:
        return self.tls if tls else self.plain

    def client(self, *login: str, tls: bool = False, **settings: object) -> KafkaClient:
        """Our client; `login` is user, password and mechanism, by default the administrator's."""
        named = {name.replace("_", "."): value for name, value in settings.items()}
        return KafkaClient(self.address(tls=tls), settings=self.settings(*login, tls=tls) | named)

    def confluent(self, *login: str, tls: bool = False, **settings: object) -> dict[str, Any]:
        """A configuration for confluent-kafka."""
        named = {name.replace("_", "."): value for name, value in settings.items()}
        base = {"bootstrap.servers": self.address(tls=tls), "log_level": 0}
        return base | self.settings(*login, tls=tls) | named


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def secured_embedded(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredBroker]:
    security = Security(
        mechanisms=("SCRAM-SHA-256", "SCRAM-SHA-512", "PLAIN"),
        users={ADMIN: PASSWORD},
        authorize=True,
        super_users=(f"User:{ADMIN}",),
        tls=TlsFiles(authority.sign("embedded", "/CN=embedded")),
    )
    listeners = (Listener("SASL_PLAINTEXT", "127.0.0.1", 0), Listener("SASL_SSL", "127.0.0.1", 0))
    config = BrokerConfig(listeners=listeners, security=security)
    with EmbeddedBroker(tmp_path_factory.mktemp("secured"), config=config) as broker:
        yield SecuredBroker("embedded", *broker.addresses, authority.certificate)


@pytest.fixture(scope="session")
def secured_kafka(authority: Authority) -> Iterator[SecuredBroker]:
    if missing_tools():
        unavailable("Apache Kafka", f"{' and '.join(missing_tools())} not found")
    secured = Secured(ADMIN, PASSWORD, authority.sign("kafka", "/CN=kafka"), authority.certificate)
    node = KafkaNode(secured=secured)
    try:
        node.start()
        yield SecuredBroker("kafka", node.bootstrap, f"127.0.0.1:{node.tls_port}", authority.certificate)
    finally:
        node.stop()


@pytest.fixture(params=["embedded", "kafka"])
def secured(request: pytest.FixtureRequest) -> SecuredBroker:
    """One suite, two brokers."""
    found: SecuredBroker = request.getfixturevalue(f"secured_{request.param}")
    return found


def fresh(prefix: str) -> str:
    """A name of the test's own."""
    return f"{prefix}-{uuid.uuid4().hex[:8]}"


async def new_topic(broker: SecuredBroker, name: str, partitions: int = 1) -> str:
    async with broker.client() as client:
        await Admin(client).create_topics({name: TopicSpec(partitions)})
    return name

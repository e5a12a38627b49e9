"""Our client's logins over time: renewed before they expire, many at once, and never shown."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest

from semel.broker.config import BrokerConfig
from semel.broker.embedded import EmbeddedBroker
from semel.broker.security.settings import Listener, Security
from semel.client.cluster import KafkaClient
from semel.errors import Fatal
from semel.processing.ports import free_ports
from tests.services.certificates import Authority

USER, PASSWORD = "app", "canary-secret"
METADATA = {
    "topics": [],
    "allow_auto_topic_creation": False,
    "include_topic_authorized_operations": False,
    "include_cluster_authorized_operations": False,
}


def login(mechanism: str = "SCRAM-SHA-256", **more: object) -> dict[str, object]:
    settings: dict[str, object] = {"security.protocol": "sasl_plaintext", "sasl.mechanism": mechanism}
    settings |= {"sasl.username": USER, "sasl.password": PASSWORD, "delivery.timeout.ms": 10_000}
    return settings | {name.replace("_", "."): value for name, value in more.items()}


def broker(folder: Path, **security: object) -> EmbeddedBroker:
    listeners = (Listener("SASL_PLAINTEXT", "127.0.0.1", 0),)
    mechanisms = ("SCRAM-SHA-256", "PLAIN")
    settings = Security(mechanisms, {USER: PASSWORD}, **security)  # type: ignore[arg-type]
    return EmbeddedBroker(folder, config=BrokerConfig(listeners=listeners, security=settings))


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-256", "PLAIN"])
def test_login_is_renewed_on_the_same_connection_while_requests_go_on(tmp_path: Path, mechanism: str) -> None:
    async def main(address: str) -> int:
        async with KafkaClient(address, settings=login(mechanism)) as client:
            (node,) = client.brokers()
            connection = await client.connection(node)
            end = time.monotonic() + 2.5
            answered = 0
            while time.monotonic() < end:  # Five in flight at any time, through several logins.
                sent = [connection.send(3, connection.version_of(3), **METADATA) for _ in range(5)]
                answered += len([answer for answer in await asyncio.gather(*sent) if answer.brokers])
            assert client.open_connection(node) is connection
            return answered

    with broker(tmp_path, reauth_seconds=0.5) as running:
        assert asyncio.run(main(running.address)) > 50


def test_login_that_cannot_be_renewed_ends_the_connection_and_says_why(tmp_path: Path) -> None:
    async def main(address: str, running: EmbeddedBroker) -> None:
        async with KafkaClient(address, settings=login()) as client:
            (node,) = client.brokers()
            connection = await client.connection(node)
            metadata = running._broker.node.metadata
            metadata.delete_credential(USER, "SCRAM-SHA-256")
            deadline = time.monotonic() + 10
            while connection.is_open:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.02)
            assert "logging in again failed" in repr(connection)
            with pytest.raises(Fatal, match=r"sasl\.password"):
                await client.connection(node)

    with broker(tmp_path, reauth_seconds=0.5) as running:
        asyncio.run(main(running.address, running))


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-256", "PLAIN"])
def test_reconnect_storm_locks_nobody_out(tmp_path: Path, mechanism: str) -> None:
    """Half of them have a wrong password; the others come in, all of them, at the first attempt."""

    async def one(address: str, number: int) -> bool:
        password = PASSWORD if number % 2 else "wrong"
        client = KafkaClient(address, settings=login(mechanism, sasl_password=password))
        try:
            await client.start()
        except Fatal:
            return False
        finally:
            await client.close()
        return True

    async def main(address: str) -> list[bool]:
        return await asyncio.gather(*(one(address, number) for number in range(100)))

    with broker(tmp_path) as running:
        assert asyncio.run(main(running.address)) == [bool(number % 2) for number in range(100)]


def test_passwords_are_in_no_log_and_no_repr(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    async def main(address: str) -> None:
        for password in (PASSWORD, "canary-wrong"):
            for mechanism in ("SCRAM-SHA-256", "PLAIN"):
                client = KafkaClient(address, settings=login(mechanism, sasl_password=password))
                if password == PASSWORD:
                    await client.start()
                else:
                    with pytest.raises(Fatal) as raised:
                        await client.start()
                    assert "canary" not in str(raised.value)
                assert "canary" not in repr(client) + repr(client.settings)
                await client.close()

    with broker(tmp_path) as running:
        assert "canary" not in repr(running._broker._config)
        asyncio.run(main(running.address))
    assert "canary" not in caplog.text


def test_command_line_from_broker_to_tool(tmp_path: Path) -> None:
    """`semel broker --config`, then `semel topics` with and without the login; the password is in no output."""
    authority = Authority(tmp_path)
    (port,) = free_ports(1)
    users, server, client = (tmp_path / name for name in ("users", "broker.properties", "client.properties"))
    users.write_text(f"{USER}:{PASSWORD}\n")
    server.write_text(
        f"listeners=SASL_SSL://127.0.0.1:{port}\nssl.keystore.location={authority.sign('b', '/CN=b')}\n"
        f"users.file={users}\nsuper.users=User:{USER}\n"
        "authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer\n"
    )
    client.write_text(
        f"security.protocol=SASL_SSL\nsasl.mechanism=SCRAM-SHA-512\nsasl.username={USER}\nsasl.password={PASSWORD}\n"
        f"ssl.ca.location={authority.certificate}\n"
    )
    semel = [sys.executable, "-m", "semel"]
    arguments = ["broker", "--data", str(tmp_path / "data"), "--config", str(server), "--seed-topics", "orders:1"]
    log = (tmp_path / "log").open("w+")
    running = subprocess.Popen([*semel, *arguments], stdout=log, stderr=log)
    try:

        def topics(**environment: str) -> subprocess.CompletedProcess[str]:
            asked = [*semel, "topics", "--kafka", f"127.0.0.1:{port}", "--format", "json"]
            return subprocess.run(
                asked,
                env={"PATH": "/usr/bin:/bin"} | environment,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )

        deadline = time.monotonic() + 30
        while (seen := topics(SEMEL_KAFKA_CONFIG=str(client))).returncode != 0:
            assert time.monotonic() < deadline, seen.stderr
        assert '"orders"' in seen.stdout
        refused = topics(SEMEL_KAFKA_CONFIG=str(client), SEMEL_KAFKA_SASL_PASSWORD="canary-wrong")
        assert refused.returncode == 1
        assert "sasl.password" in refused.stderr
        untrusted = topics(SEMEL_KAFKA_CONFIG=str(client), SEMEL_KAFKA_SSL_CA_LOCATION="")
        assert untrusted.returncode == 1
        assert "ssl.ca.location" in untrusted.stderr
    finally:
        running.terminate()
        running.wait(20)
        log.seek(0)
        told = log.read()
        log.close()
    for text in (told, seen.stderr, refused.stderr, untrusted.stderr):
        assert "canary" not in text

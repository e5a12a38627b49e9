"""kafka-python's own integration tests against the embedded broker, and those that fail also against Apache Kafka."""

from __future__ import annotations

import os
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from semel.broker.config import BrokerConfig
from semel.broker.security.settings import Listener, Security, TlsFiles
from semel.processing.ports import free_ports
from tests.conftest import unavailable
from tests.peers.acquire import KAFKA_PYTHON, Unavailable, kafka_home, kafka_python
from tests.peers.outcomes import State, Verdict, settle
from tests.peers.serve import ConfiguredBroker
from tests.services.certificates import Authority
from tests.services.kafka import KafkaNode

pytestmark = [pytest.mark.peers, pytest.mark.timeout(1_200)]

SUITE_SECONDS = 600
_KAFKA_ACLS = {
    "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
    "super.users": "User:ANONYMOUS",
}


PLAIN_FILES = ("test_admin_integration.py", "test_consumer_integration.py", "test_producer_integration.py")
SECURE_FILES = ("test_sasl_integration.py", "test_ssl_integration.py")


def run(out: Path, files: Sequence[str], *chosen: str, **where: str) -> dict[str, Verdict]:
    """These files of the suite, or some tests of them; a test's name is without its file."""
    folder, python = kafka_python()
    report = out / "report.xml"
    options = ["-q", "--timeout=60", "--timeout-method=signal", f"--junitxml={report}", "-p", "no:cacheprovider"]
    options += ["-p", "kafka_python_plugin"] if "SSL_URI" in where else []
    environment = (
        os.environ
        | where
        | {
            "PYTHONPATH": f"{folder}:{Path(__file__).parent}",
            "KAFKA_ROOT": str(kafka_home()),
            "KAFKA_VERSION": "4.3.1",
        }
    )
    if chosen:
        options += ["-k", " or ".join(name.partition("[")[0] for name in chosen)]
    subprocess.run(
        ["nice", "-n", "10", str(python), "-m", "pytest", *options, *(f"test/integration/{file}" for file in files)],
        cwd=folder,
        env=environment,
        capture_output=True,
        timeout=SUITE_SECONDS,
        check=False,
    )
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        verdict = Verdict("passed")
        for child in case:
            if child.tag in ("failure", "error"):
                verdict = Verdict("failed", child.get("message", ""))
            elif child.tag == "skipped":
                verdict = Verdict("skipped", child.get("message", ""))
        found[case.get("name", "")] = verdict
    return found


@pytest.fixture
def addresses(tmp_path: Path) -> Iterator[list[str]]:
    """Where the broker listens: PLAINTEXT, SASL_PLAINTEXT, SSL."""
    try:
        kafka_python()
        kafka_home()
    except Unavailable as why:
        unavailable("kafka-python's tests", str(why))
    authority = Authority(tmp_path)
    authority.certificate.rename(tmp_path / "ca-cert")
    authority.certificate = tmp_path / "ca-cert"
    listeners = [
        Listener(protocol, "127.0.0.1", port)
        for protocol, port in zip(("PLAINTEXT", "SASL_PLAINTEXT", "SSL"), free_ports(3), strict=True)
    ]
    # One of its tests sets access rules, which Apache Kafka refuses without an authorizer.
    security = Security(
        mechanisms=("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"),
        users={"alice": "alice-secret"},
        authorize=True,
        super_users=("User:ANONYMOUS", "User:alice"),
        tls=TlsFiles(authority.sign("broker", "/CN=localhost")),
    )
    process = ConfiguredBroker(tmp_path / "data", BrokerConfig(listeners=tuple(listeners), security=security))
    process.port = listeners[0].port
    process.start()
    yield [f"{item.host}:{item.port}" for item in listeners]
    process.stop()


def test_kafka_python(addresses: list[str], tmp_path: Path) -> None:
    plain, sasl, tls = addresses
    secure = {"SASL_PLAINTEXT_URI": sasl, "SSL_URI": tls, "SSL_DIR": str(tmp_path)}
    verdicts = run(tmp_path, PLAIN_FILES, KAFKA_URI=f"kafka://{plain}")
    failed = [test for test, verdict in verdicts.items() if verdict.state == "failed"]
    retried = {}
    if failed:
        for test, verdict in run(tmp_path, PLAIN_FILES, *failed, KAFKA_URI=f"kafka://{plain}").items():
            if test in failed and verdict.state == "passed":
                retried[test] = verdicts[test].detail
                verdicts[test] = verdict
    verdicts |= run(tmp_path, SECURE_FILES, **secure)
    real: list[KafkaNode] = []

    def on_kafka(test: str) -> State:
        if not real:
            real.append(KafkaNode(2, _KAFKA_ACLS).start())
        there = f"kafka://{real[0].bootstrap}"
        return run(tmp_path, PLAIN_FILES, test, KAFKA_URI=there)[test].state

    try:
        settle("kafka-python", KAFKA_PYTHON, verdicts, retried=retried, on_kafka=on_kafka)
    finally:
        for node in real:
            node.stop()

"""One Apache Kafka 4.3.1 node (KRaft, broker and controller in one JVM) as a direct child of the test process.

The jars come from Maven Central into `.cache/kafka-4.3.1` of the project, once. Needs Java 17 and Maven.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from semel.processing.ports import free_ports
from tests.services.server import Server

__all__ = ["KafkaCluster", "KafkaNode", "Secured", "kafka_jars", "missing_tools"]

ROOT = Path(__file__).resolve().parents[2]
JARS = ROOT / ".cache" / "kafka-4.3.1"
POM = Path(__file__).with_name("pom.xml")
CLUSTER_ID = "MkU3OEVBNTcwNTJENDM2Qk"


def missing_tools() -> list[str]:
    """The programs that are not on this machine and that Apache Kafka needs."""
    return [tool for tool in ("java", "mvn") if shutil.which(tool) is None]


def kafka_jars() -> Path:
    """The folder with the jars, filled on first use."""
    done = JARS / ".complete"
    if not done.exists():
        JARS.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["mvn", "-q", "-B", "-f", str(POM), "dependency:copy-dependencies", f"-DoutputDirectory={JARS}"], check=True
        )
        done.touch()
    return JARS


def free_port() -> int:
    """A port outside the ephemeral range: a killed node's clients must not take it while it is away."""
    return free_ports(1)[0]


class Secured(NamedTuple):
    """A node that asks who you are: SASL on its port, SASL over TLS on a second one, StandardAuthorizer.

    The user may do everything; both PEM files hold what their names say.
    """

    user: str
    password: str
    keystore: Path
    truststore: Path

    def settings(self, port: int, tls_port: int, controller_port: int) -> dict[str, str]:
        listeners = f"CLIENT://127.0.0.1:{port},TLS://127.0.0.1:{tls_port}"
        found = {
            "listeners": f"{listeners},CONTROLLER://127.0.0.1:{controller_port}",
            "advertised.listeners": listeners,
            "listener.security.protocol.map": "CLIENT:SASL_PLAINTEXT,TLS:SASL_SSL,CONTROLLER:PLAINTEXT",
            "sasl.enabled.mechanisms": "SCRAM-SHA-256,SCRAM-SHA-512,PLAIN",
            "sasl.mechanism.inter.broker.protocol": "SCRAM-SHA-256",
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            # The controller's listener is plaintext here; on the others nobody is anonymous.
            "super.users": f"User:{self.user};User:ANONYMOUS",
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(self.keystore),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(self.truststore),
            "transaction.two.phase.commit.enable": "true",
            "unstable.api.versions.enable": "true",
        }
        module = "org.apache.kafka.common.security"
        for listener in ("client", "tls"):
            for mechanism in ("scram-sha-256", "scram-sha-512"):
                found[f"listener.name.{listener}.{mechanism}.sasl.jaas.config"] = (
                    f'{module}.scram.ScramLoginModule required username="{self.user}" password="{self.password}";'
                )
            found[f"listener.name.{listener}.plain.sasl.jaas.config"] = (
                f'{module}.plain.PlainLoginModule required user_{self.user}="{self.password}";'
            )
        return found

    def format_arguments(self) -> list[str]:
        return [
            part
            for size in (256, 512)
            for part in ("--add-scram", f"SCRAM-SHA-{size}=[name={self.user},password={self.password}]")
        ]


class KafkaNode(Server):
    """A node on 127.0.0.1 with its own folder. `transaction_version` 2 is KIP-890 part 2; 1 is the older protocol.

    The options in `java` are for tests: little memory and a quick start. A benchmark gives its own.
    """

    title = "Apache Kafka"

    def __init__(
        self,
        transaction_version: int = 2,
        extra: dict[str, str] | None = None,
        java: Sequence[str] = ("-Xmx512m", "-Xms64m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"),
        secured: Secured | None = None,
        ports: Sequence[int] = (),
    ) -> None:
        super().__init__(Path(tempfile.mkdtemp(prefix="semel-kafka-")))
        self.transaction_version = transaction_version
        self.port, self.controller_port, self.tls_port = ports or free_ports(3)
        self._secured = secured
        self._extra = extra or {}
        self._java = [
            "java",
            *java,
            "-Djava.awt.headless=true",
            "-cp",
            f"{kafka_jars()}/*",
        ]
        self._format()

    @property
    def bootstrap(self) -> str:
        return f"127.0.0.1:{self.port}"

    def _settings(self) -> dict[str, str]:
        settings = {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@127.0.0.1:{self.controller_port}",
            "listeners": f"CLIENT://127.0.0.1:{self.port},CONTROLLER://127.0.0.1:{self.controller_port}",
            "advertised.listeners": f"CLIENT://127.0.0.1:{self.port}",
            "listener.security.protocol.map": "CLIENT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "inter.broker.listener.name": "CLIENT",
            "controller.listener.names": "CONTROLLER",
            "log.dirs": str(self.folder / "data"),
            "num.network.threads": "2",
            "num.io.threads": "2",
            "num.partitions": "4",
            "offsets.topic.num.partitions": "4",
            "offsets.topic.replication.factor": "1",
            "transaction.state.log.num.partitions": "4",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            "share.coordinator.state.topic.num.partitions": "1",
            "share.coordinator.state.topic.replication.factor": "1",
            "share.coordinator.state.topic.min.isr": "1",
            "group.initial.rebalance.delay.ms": "0",
            "group.min.session.timeout.ms": "1000",
            "log.cleaner.dedupe.buffer.size": "16777216",
            # A restart after kill -9 waits for the old registration to end: 9 s with Kafka's default.
            "broker.session.timeout.ms": "2000",
            "broker.heartbeat.interval.ms": "500",
        }
        if self._secured is not None:
            settings |= self._secured.settings(self.port, self.tls_port, self.controller_port)
        return settings | self._extra

    def _format(self) -> None:
        settings = self.folder / "server.properties"
        settings.write_text("".join(f"{key}={value}\n" for key, value in self._settings().items()))
        feature = f"transaction.version={self.transaction_version}"
        command = [*self._java, "kafka.tools.StorageTool", "format", "-t", CLUSTER_ID, "-c", str(settings)]
        command += ["--feature", feature, *(self._secured.format_arguments() if self._secured else ())]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"Apache Kafka could not be formatted:\n{done.stdout}\n{done.stderr}")

    def start(self) -> KafkaNode:
        """Start the node and return once its port answers."""
        command = [*self._java, "kafka.Kafka", str(self.folder / "server.properties")]
        self._launch(command, self._listens, seconds=180)  # On a machine that does much else it takes a minute.
        return self

    def _listens(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True

    def tool(self, main_class: str, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run one of Kafka's own command line tools."""
        command = [*self._java, main_class, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


class KafkaCluster:
    """Three nodes, each broker and controller: everything is on all of them, and an acknowledged record on two."""

    def __init__(self) -> None:
        ports = free_ports(9)
        own = [ports[3 * number : 3 * number + 3] for number in range(3)]
        voters = ",".join(f"{number}@127.0.0.1:{item[1]}" for number, item in enumerate(own, 1))
        replicated = {
            "controller.quorum.voters": voters,
            "default.replication.factor": "3",
            "min.insync.replicas": "2",
            "offsets.topic.replication.factor": "3",
            "transaction.state.log.replication.factor": "3",
            "transaction.state.log.min.isr": "2",
            "share.coordinator.state.topic.replication.factor": "3",
            "share.coordinator.state.topic.min.isr": "2",
        }
        self.nodes = {
            number: KafkaNode(extra={**replicated, "node.id": str(number)}, ports=item)
            for number, item in enumerate(own, 1)
        }

    @property
    def bootstrap(self) -> str:
        return ",".join(node.bootstrap for node in self.nodes.values())

    def start(self) -> KafkaCluster:
        """Start all; a node answers only when two of them have chosen a controller."""
        with ThreadPoolExecutor(3) as threads:
            list(threads.map(KafkaNode.start, self.nodes.values()))
        return self

    def stop(self) -> None:
        for node in self.nodes.values():
            node.stop()

"""A real OpenSearch 2.19.3 node for tests, as a direct child of the test process.

The jars come from Maven Central into `.cache/opensearch-2.19.3` of the project, once. Needs Java 17 (a JDK) and Maven.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from semel.processing.ports import free_ports
from tests.services.server import Server

__all__ = ["OpenSearchNode", "missing_opensearch_tools"]

ROOT = Path(__file__).resolve().parents[2]
JARS = ROOT / ".cache" / "opensearch-2.19.3"
SOURCE = Path(__file__).with_name("opensearch_node")
_JAVA = ("-Xmx256m", "-Xms64m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Dlog4j2.level=ERROR")


def missing_opensearch_tools() -> list[str]:
    """The programs that are not on this machine and that OpenSearch needs."""
    return [tool for tool in ("java", "javac", "mvn") if shutil.which(tool) is None]


def opensearch_jars() -> Path:
    """The folder with the jars and the compiled node, filled on first use and after a change of the node's source."""
    wanted = (SOURCE / "pom.xml").read_text() + (SOURCE / "SearchNode.java").read_text()
    done = JARS / ".complete"
    if done.exists() and done.read_text() == wanted:
        return JARS
    JARS.mkdir(parents=True, exist_ok=True)
    copy = ["mvn", "-q", "-B", "-f", str(SOURCE / "pom.xml"), "dependency:copy-dependencies"]
    subprocess.run([*copy, f"-DoutputDirectory={JARS}"], check=True)
    node = SOURCE / "SearchNode.java"
    compiling = ["javac", "-nowarn", "-cp", f"{JARS}/*", "-d", str(JARS / "classes"), str(node)]
    compiled = subprocess.run(compiling, capture_output=True, text=True, check=False)
    if compiled.returncode:
        raise RuntimeError(f"{node} could not be compiled:\n{compiled.stderr}")
    done.write_text(wanted)
    return JARS


class OpenSearchNode(Server):
    """A node with its own folder and port; both stay the same over `kill`, `shut_down` and `start`.

    What it acknowledged is synced (`index.translog.durability`, `request` by default).
    """

    title = "OpenSearch"

    def __init__(self, **settings: str) -> None:
        super().__init__(Path(tempfile.mkdtemp(prefix="semel-opensearch-")))
        self.port, self._transport_port = free_ports(2)
        (self.folder / "config").mkdir()
        self._settings = [f"{name}={value}" for name, value in settings.items()]
        self._databases = 0

    @property
    def url(self) -> str:
        return f"opensearch://127.0.0.1:{self.port}"

    def new_database(self) -> str:
        """A URL of its own: all names of indexes begin with a prefix that nobody else has."""
        self._databases += 1
        return f"{self.url}?prefix=t{os.getpid()}-{self._databases}-"

    def start(self) -> OpenSearchNode:
        """Start the node, and return once it does its work."""
        jars = opensearch_jars()
        command = ["java", *_JAVA, f"-Djava.io.tmpdir={self.folder}", "-cp", f"{jars / 'classes'}:{jars}/*"]
        command += ["SearchNode", str(self.folder), str(self.port), str(self._transport_port), *self._settings]
        self._launch(command, self._is_up, seconds=180)  # On a machine that does much else it takes a minute.
        return self

    def _is_up(self) -> bool:
        """Yellow: every primary shard is there."""
        try:
            return self.call("GET", "/_cluster/health?wait_for_status=yellow&timeout=5s")[0] == 200
        except OSError:
            return False

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and decoded body of one request. Raises `OSError` when nobody answers."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"null")

    def shut_down(self) -> None:
        """SIGTERM without a shutdown hook is as sudden as SIGKILL: what is durable is what was acknowledged."""
        self.signal(signal.SIGTERM)
        assert self._process is not None
        self._process.wait(60)

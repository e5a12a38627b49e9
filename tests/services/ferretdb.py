"""A real FerretDB 1.24 for tests: MongoDB's protocol on SQLite files, built with Go from the module proxy.

`go install module@version` is refused for it, and the file with its version is not in the module: so it is built from a
copy. That takes a minute of processor time, once for each clone (`.cache/`), which is why these tests are `peers`.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

from semel.processing.ports import free_ports
from tests.services.server import Server

__all__ = ["FerretServer", "missing_ferretdb"]

MODULE, VERSION = "github.com/FerretDB/FerretDB", "v1.24.0"
CACHE = Path(__file__).parents[2] / ".cache" / f"ferretdb-{VERSION}"
GO_MINOR = 22
"""FerretDB 1.24 asks for Go 1.22."""


def missing_ferretdb() -> str:
    """Why there is no FerretDB to be had here; empty when there is."""
    if (CACHE / "ferretdb").exists():
        return ""
    if shutil.which("go") is None:
        return f"Go 1.{GO_MINOR} or later is not installed"
    version = subprocess.run(["go", "env", "GOVERSION"], capture_output=True, text=True, check=True).stdout.strip()
    major, minor = version.removeprefix("go").split(".")[:2]
    return "" if (int(major), int(minor)) >= (1, GO_MINOR) else f"Go 1.{GO_MINOR} or later is needed, this is {version}"


def binary() -> Path:
    """The server, built if need be."""
    found = CACHE / "ferretdb"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not found.exists():
            with tempfile.TemporaryDirectory(prefix="semel-ferretdb-") as folder:
                _build(Path(folder), found)
    return found


def _build(folder: Path, found: Path) -> None:
    def go(*arguments: str) -> str:
        environment = {**os.environ, "GOFLAGS": "-mod=mod"}
        done = subprocess.run(["go", *arguments], cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"go {' '.join(arguments)}:\n{done.stderr[-4000:]}")
        return done.stdout

    (folder / "go.mod").write_text(f"module build\ngo 1.{GO_MINOR}\nrequire {MODULE} {VERSION}\n")
    (folder / "tools.go").write_text(f'//go:build tools\npackage build\nimport _ "{MODULE}/cmd/ferretdb"\n')
    source = Path(json.loads(go("mod", "download", "-json", f"{MODULE}@{VERSION}"))["Dir"])
    shutil.copytree(source, folder / "source", copy_function=shutil.copyfile)
    for path in (folder / "source").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (folder / "source/build/version/version.txt").write_text(f"{VERSION}\n")
    go("mod", "edit", "-replace", f"{MODULE}=./source")
    go("build", "-p", "1", "-o", "ferretdb", f"{MODULE}/cmd/ferretdb")
    shutil.move(folder / "ferretdb", found)


class FerretServer(Server):
    """A server with its own folder and port; both stay the same over `kill` and `start`."""

    title = "FerretDB"

    def __init__(self) -> None:
        super().__init__(Path(tempfile.mkdtemp(prefix="semel-ferretdb-", dir="/tmp")))
        self.port = free_ports(1)[0]
        self._databases = 0

    def new_database(self) -> str:
        """The URL of an empty database."""
        self._databases += 1
        return f"mongodb://127.0.0.1:{self.port}/d{self._databases}"

    def start(self) -> FerretServer:
        """Start the server, and return once it takes connections."""
        command = [str(binary()), "--handler=sqlite", f"--sqlite-url=file:{self.folder}/?_pragma=synchronous(full)"]
        command += [f"--listen-addr=127.0.0.1:{self.port}", f"--state-dir={self.folder}", "--telemetry=disable"]
        self._launch([*command, "--debug-addr=-", "--log-level=error"], self._listens)
        return self

    def _listens(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 2).close()
        except OSError:
            return False
        return True

"""`semel run` and the listings as a user meets them: processes, HTTP, files."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.services.kafka import free_port

__all__ = ["Answer", "Deployment", "run_semel", "until"]


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    """The surroundings of a user who has set nothing."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SEMEL_")} | dict(more)


def run_semel(
    *arguments: str, cwd: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """One command, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "semel", *arguments],
        cwd=cwd,
        env=_environment(environment or {}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def until(condition: Callable[[], bool], what: str = "", seconds: float = 40) -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what or condition}"
        time.sleep(0.05)


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: Any


class Deployment:
    """One `semel run`, started in a folder of its own."""

    def __init__(self, app: str, folder: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.port = free_port()
        self.log = folder / "run.log"
        self._environment = environment or {}
        command = [sys.executable, "-m", "semel", "run", app, "--listen", f"127.0.0.1:{self.port}", *arguments]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env=_environment(self._environment), stdout=log, stderr=subprocess.STDOUT
            )

    def __enter__(self) -> Deployment:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> int:
        """SIGTERM, and the exit code. Whatever does not end is killed."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(40)
        except subprocess.TimeoutExpired:
            for child in self.children().values():
                os.kill(child["pid"], signal.SIGKILL)
            self.process.kill()
            self.process.wait()
            raise

    def wait_ready(self) -> Deployment:
        until(self.is_ready, f"ready: {self.log}")
        return self

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-4000:]
        try:
            return self.ask("GET", "/readyz").status == 200
        except OSError:
            return False

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        """One request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): text for name, text in headers.items()})
            response = connection.getresponse()
            raw = response.read()
            names = {name.lower(): text for name, text in response.getheaders()}
            is_json = names.get("content-type", "").endswith("json")
            return Answer(response.status, names, json.loads(raw) if is_json else raw.decode())
        finally:
            connection.close()

    def post(self, path: str, key: str, value: object) -> Answer:
        body = json.dumps(value).encode()
        return self.ask("POST", path, body, Idempotency_Key=f'"{key}"', Content_Type="application/json")

    def metrics(self) -> dict[str, float]:
        """Every series of the page."""
        lines = self.ask("GET", "/metrics").body.splitlines()
        pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {series: float(value) for series, _, value in pairs}

    def semel(self, *arguments: str) -> str:
        """What a command prints on stdout, run in the folder; it has to succeed."""
        done = run_semel(*arguments, cwd=self.folder, environment=self._environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def rows(self, *arguments: str) -> list[dict[str, Any]]:
        """A listing as JSON."""
        found: list[dict[str, Any]] = json.loads(self.semel(*arguments, "--format", "json"))
        return found

    def children(self) -> dict[str, dict[str, Any]]:
        """The status file's rows by name; empty before it is there."""
        path = self.folder / ".semel" / "status.json"
        return {row["name"]: row for row in json.loads(path.read_text())["children"]} if path.exists() else {}

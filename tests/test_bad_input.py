"""Bad input and missing things, as a user meets them: one clear message that says what to do, and nothing half done."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.services.broker import BrokerProcess


def semel(
    *arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "semel", *arguments],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def message(done: subprocess.CompletedProcess[str], code: int = 2) -> str:
    """The one line that the user reads; never a traceback."""
    assert done.returncode == code, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("semel: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_an_app_module_that_is_not_there(tmp_path: Path) -> None:
    assert "no module 'nowhere'" in message(semel("run", "nowhere:app", cwd=tmp_path))


def test_an_app_module_that_does_not_import(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import semel\n\nprice = 1 / 0\n")
    text = message(semel("run", "broken:app", cwd=tmp_path))
    assert "ZeroDivisionError" in text
    assert "broken.py:3" in text


def test_an_attribute_that_is_no_app(tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text("app = 3\n")
    assert "not a semel.App" in message(semel("guarantees", "plain:app", cwd=tmp_path))
    assert "no attribute 'shop'" in message(semel("guarantees", "plain:shop", cwd=tmp_path))


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        text = message(semel("broker", "--data", str(tmp_path / "b"), "--listen", f"127.0.0.1:{port}"))
    assert str(port) in text
    assert "use" in text.lower()


def test_a_data_directory_that_cannot_be_written() -> None:
    # /proc refuses new entries to everybody, root included.
    text = message(semel("broker", "--data", "/proc/semel-data", "--listen", "127.0.0.1:0"))
    assert "/proc/semel-data" in text


def test_two_brokers_on_one_data_directory(tmp_path: Path) -> None:
    first = BrokerProcess(tmp_path / "data")
    first.start()
    try:
        text = message(semel("broker", "--data", str(tmp_path / "data"), "--listen", "127.0.0.1:0"))
        assert str(first.pid) in text
        assert str(tmp_path / "data") in text
    finally:
        first.stop()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SEMEL_PARTITIONS": "many"}, "SEMEL_PARTITIONS"),
        ({"SEMEL_PROFILE": "prod"}, "SEMEL_PROFILE"),
        ({"SEMEL_FAILPOINT": "no.such:kill"}, "no.such"),
        ({"SEMEL_FAILPOINT": "unit.after_produce:kill", "SEMEL_PROFILE": "production"}, "production"),
    ],
)
def test_settings_that_cannot_work(variables: dict[str, str], expected: str) -> None:
    assert expected in message(semel("guarantees", "semel.examples.shop:app", env=variables))


def test_a_listen_address_that_is_none() -> None:
    assert "HOST:PORT" in message(semel("broker", "--listen", "9092"))


def test_a_kafka_that_is_not_there() -> None:
    text = message(semel("topics", "--kafka", "127.0.0.1:1"), code=1)
    assert "127.0.0.1:1" in text


def test_no_kafka_named() -> None:
    assert "SEMEL_KAFKA" in message(semel("txn", "list", env={"SEMEL_KAFKA": ""}))

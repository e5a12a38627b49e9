"""What the simulation stands on: the broker's files go through `semel.disk`, and it has no threads of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from semel.disk import Disk, disk

SOURCE = Path(__file__).parent.parent / "src" / "semel"
FILE_OPERATIONS = re.compile(
    r"\bos\.(open|close|pread|preadv|pwrite|pwritev|write|read|fsync|fdatasync|f?truncate|f?stat|replace|rename|unlink|"
    r"listdir|scandir|makedirs|mkdir|sendfile)\(|\bshutil\.|\bfcntl\.|= open\(|with open\(|"
    r"\.(mkdir|glob|iterdir|read_text|write_bytes|write_text|rmdir|touch|is_dir|is_file)\("
)
THREADS = re.compile(r"\b(threading\.|to_thread)|\.submit\(")
BEFORE_THE_START = {"properties.py"}
"""Reads the file that configures a broker."""
OWN_THREAD = {"embedded.py"}
"""Runs a whole broker in a thread for tests and scripts: the simulation runs the broker itself."""


def modules() -> list[Path]:
    return sorted([*(SOURCE / "log").glob("*.py"), *(SOURCE / "broker").rglob("*.py")])


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_the_broker_reaches_the_outside_only_by_its_seams(path: Path) -> None:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        assert path.name in BEFORE_THE_START or not FILE_OPERATIONS.search(line), (
            f"{path}:{number} goes past semel.disk: the simulation cannot see it"
        )
        assert path.name in OWN_THREAD or not THREADS.search(line), (
            f"{path}:{number} starts a thread: use loop.run_in_executor(...), which the simulation drives"
        )


def test_a_replaced_disk_gets_every_operation_and_gives_way_again() -> None:
    class Nowhere(Disk):
        @staticmethod
        def exists(path: object) -> bool:
            return True

    with disk.replaced_by(Nowhere()):
        assert disk.exists(Path("/no/such/file"))
    assert not disk.exists(Path("/no/such/file"))

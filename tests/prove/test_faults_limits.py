"""Faults that the kernel or a fault page brings upon a running process: they are felt there, and they pass."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from semel.errors import ConfigurationError
from semel.faultpage import FaultPage, use_fault_page
from semel.prove.faults.clock import Clock
from semel.prove.faults.contract import Fault, Targets, inflict
from semel.prove.faults.limits import Descriptors, Memory
from semel.prove.faults.storage import Disk

CHILD = """
import errno, os, sys, time
from pathlib import Path
from semel.disk import disk
from semel.env import Env
from semel.faultpage import use_fault_page

use_fault_page(os.environ.get("SEMEL_FAULT_PAGE", ""))
file = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
kept = []
for line in sys.stdin:
    try:
        match line.strip():
            case "memory":
                bytearray(64 << 20)
            case "descriptors":
                kept.append(os.open("/dev/null", os.O_RDONLY))
            case "write":
                while os.write(file, bytes(65_536)) < 65_536:
                    pass
            case "sync":
                disk.sync(file)
            case "clock":
                print(round((Env().wall_ms() - time.time() * 1000) / 1000), flush=True)
                continue
        print("ok", flush=True)
    except MemoryError:
        print("MemoryError", flush=True)
    except OSError as error:
        print(errno.errorcode[error.errno], flush=True)
"""


class Child:
    """A process that does one thing when it is asked, and says how that went."""

    def __init__(self, folder: Path, name: str) -> None:
        (folder / "broker").mkdir()
        self.targets = Targets(names=[name], pid=lambda _: self.pid, folder=folder)
        self.targets.make_pages()
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(folder / "broker" / "file")],
            env=self.targets.environment(name),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.ask("nothing") == "ok"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process.poll() is None else None

    def ask(self, what: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(what, file=self._process.stdin, flush=True)
        return self._process.stdout.readline().strip()

    def wait(self) -> int:
        return self._process.wait(20)

    def during(self, kind: type[Fault], what: str, seed: int = 1) -> tuple[str, str]:
        """What the child answers while it is struck, and what was done to it."""
        answers: list[str] = []

        async def ask(_seconds: float) -> None:
            answers.append(self.ask(what))

        outcome = asyncio.run(inflict(kind(self.targets), self.name, Random(seed), sleep=ask))
        return answers[0], outcome.done


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Child]:
    made = Child(tmp_path, "broker-0")
    yield made
    made._process.kill()
    made._process.communicate()


def test_memory_runs_out_and_comes_back(child: Child) -> None:
    assert child.ask("memory") == "ok"
    for seed in range(5):
        answer, done = child.during(Memory, "memory", seed)
        assert answer == "MemoryError", done
        assert child.ask("memory") == "ok"


def test_descriptors_run_out_and_come_back(child: Child) -> None:
    answers = [child.ask("descriptors") for _ in range(5)]
    for seed in range(5):

        async def ask(_seconds: float) -> None:
            answers.extend(child.ask("descriptors") for _ in range(6))

        asyncio.run(inflict(Descriptors(child.targets), child.name, Random(seed), sleep=ask))
        assert answers[-1] == "EMFILE"
        assert child.ask("descriptors") == "ok"


def test_a_disk_fills_up_and_has_room_again(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Disk, "_fail_sync", _no_sync)
    for seed in range(5):
        assert child.ask("write") == "ok"
        answer, done = child.during(Disk, "write", seed)
        assert answer == "EFBIG", done
        assert child.ask("write") == "ok"


async def _no_sync(_self: Disk, _target: str) -> None:
    return None


def test_a_sync_fails_once_and_its_process_is_killed(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("semel.prove.faults.storage._PATIENCE_SECONDS", 30.0)
    answers = [child.ask("sync")]

    async def run() -> None:
        fault = Disk(child.targets)
        striking = asyncio.create_task(fault._fail_sync("broker-0"))
        while child.targets.pages["broker-0"].failing_syncs == 0:
            await asyncio.sleep(0)
        answers.append(child.ask("sync"))
        assert await striking is not None
        answers.append(child.ask("sync"))
        await fault.heal()

    asyncio.run(run())
    assert answers == ["ok", "EIO", "ok"]
    assert child.wait() == -9


def test_without_a_sync_the_disk_is_full_instead(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("semel.prove.faults.storage._PATIENCE_SECONDS", 0.0)
    answers = {child.during(Disk, "write", seed)[0] for seed in range(4)}
    assert answers == {"EFBIG"}
    assert child.ask("sync") == "ok"


def test_a_wall_clock_jumps_and_jumps_back(child: Child) -> None:
    assert abs(int(child.ask("clock"))) <= 1
    seen = {int(child.during(Clock, "clock", seed)[0]) for seed in range(40)}
    assert any(off > 1_000 for off in seen)
    assert any(off < -1_000 for off in seen)
    assert abs(int(child.ask("clock"))) <= 1


def test_a_page_is_for_campaigns_and_is_named_when_it_is_none(tmp_path: Path) -> None:
    use_fault_page("", profile="production")
    FaultPage.make(tmp_path / "page").close()
    with pytest.raises(ConfigurationError, match="SEMEL_PROFILE is production"):
        use_fault_page(str(tmp_path / "page"), profile="production")
    (tmp_path / "short").write_bytes(b"no page")
    for wrong in ("short", "missing"):
        with pytest.raises(ConfigurationError, match="is no fault page"):
            use_fault_page(str(tmp_path / wrong))


def test_a_process_that_is_gone_heals_in_peace(child: Child) -> None:
    async def killed(_seconds: float) -> None:
        child._process.kill()
        child._process.wait()

    asyncio.run(inflict(Memory(child.targets), child.name, Random(1), sleep=killed))

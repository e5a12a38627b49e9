"""Relays that are killed, stopped and cut short at every step: nothing is lost, nothing is there twice, keys keep their
order. Every failpoint of the relay has its cases here."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from semel.databases.database import Cause
from semel.failpoints import FAILPOINTS
from semel.outbox.rows import shard_of
from tests.conftest import Address
from tests.outbox.world import Outbox, asynchronous, insert, until

ROOT = Path(__file__).resolve().parents[2]
POINTS = sorted(name for name, point in FAILPOINTS.items() if point.role == "relay")
IN_STORE_TESTS = {"outbox.after_truncate"}
"""Passed with a table of dead rows only: tests/outbox/test_store.py."""
TOO_LARGE = 2_000
"""max.message.bytes of the topic for rows that the relay only finds out to be too large when Kafka refuses them."""


class Case(NamedTuple):
    """The point, the action, the pass that acts."""

    point: str
    action: str
    hit: int

    @property
    def spec(self) -> str:
        return f"{self.point}:{self.action}:{self.hit}"


def cases() -> Iterator[Case]:
    for name in POINTS:
        if name not in IN_STORE_TESTS:
            kinds = ["kill", "stop", "raise", "delay=0.3", *(["cancel"] if FAILPOINTS[name].in_task else [])]
            for action in kinds:
                yield Case(name, action, 1)
            if not name.startswith(("outbox.after_compare", "outbox.before_take_over")):
                yield Case(name, "kill", 2)


SAMPLE = [
    Case("outbox.after_commit", "kill", 2),
    Case("outbox.before_commit", "stop", 1),
    Case("outbox.after_abort", "raise", 1),
    Case("outbox.after_reconcile", "kill", 1),
]


class Relays:
    """Relays as processes, started again whenever one ended: what a supervisor does."""

    def __init__(self, outbox: Outbox, folder: Path, count: int) -> None:
        self._outbox = outbox
        self._folder = folder
        self.log = folder / "relays.log"
        self._out = self.log.open("ab")
        self._count = count
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.ended: list[int] = []

    def start(self, slot: int, failpoint: str = "") -> subprocess.Popen[bytes]:
        arguments = [self._outbox.bootstrap, self._outbox.url, str(self._folder), self._outbox.app, str(slot)]
        process = self.processes[slot] = subprocess.Popen(
            [sys.executable, "-m", "tests.outbox.relay_child", *arguments],
            cwd=ROOT,
            env=os.environ | {"SEMEL_FAILPOINT": failpoint, "SEMEL_INSTANCE": "here"},
            stdout=self._out,
            stderr=self._out,
        )
        return process

    def keep(self) -> None:
        """Start what does not run."""
        for slot in range(self._count):
            process = self.processes.get(slot)
            if process is None or process.poll() is not None:
                if process is not None:
                    self.ended.append(process.returncode)
                self.start(slot)

    def stop(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
                process.wait()
        self._out.close()


def is_stopped(process: subprocess.Popen[bytes]) -> bool:
    try:
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def write(outbox: Outbox, count: int, stopped: Iterable[subprocess.Popen[bytes]]) -> None:
    """Commit rows. A relay that stands still with SQLite's write lock holds up everybody: then all are woken."""
    try:
        outbox.write(count)
    except Exception as error:
        if outbox.database.cause(error) is not Cause.LOCKED:
            raise
        for process in stopped:
            process.send_signal(signal.SIGCONT)
        outbox.write(count)


async def run_case(outbox: Outbox, relays: Relays, case: Case) -> None:
    """One relay armed, with what leads it to the point; then another takes over and everything is published."""
    if "compare" in case.point or "reconcile" in case.point:
        outbox.database.execute("UPDATE semel_outbox_meta SET incarnation = ?", (str(uuid.uuid4()),))
    if "hold" in case.point:
        topic = f"{outbox.app}.missing{uuid.uuid4().hex[:6]}"
        key = uuid.uuid4().bytes
        insert(outbox.database, [(shard_of(key, ""), str(uuid.uuid4()), topic, key, b"v", "[]", 0)])
    if case.point == "outbox.after_abort":
        key, identity = uuid.uuid4().bytes, str(uuid.uuid4())
        # The batch is larger than the record by more than its own header.
        value = b"v" * (TOO_LARGE - 61 - len(key) - len(identity) - len("semel-id"))
        insert(outbox.database, [(shard_of(key, ""), identity, f"{outbox.app}.small", key, value, "[]", 0)])
    outbox.write(30)
    armed = relays.start(0, case.spec)
    wanted = {"kill": -signal.SIGKILL}.get(case.action)
    if case.action == "stop":
        await until(lambda: is_stopped(armed) or (sends(outbox) == 0 and armed.poll() is None))
    elif case.action.startswith("delay"):
        await until(lambda: sends(outbox) == 0)
    else:
        for _ in range(50):
            outbox.write(3)  # Until the pass that acts has come.
            await asyncio.sleep(0.1)
            if armed.poll() is not None:
                break
        await until(lambda: armed.poll() is not None or sends(outbox) == 0)
        if wanted is not None and armed.poll() is not None:
            assert armed.returncode == wanted, (case, relays.log.read_text()[-3000:])
    write(outbox, 10, [armed])
    successor = relays.start(1)
    await until(lambda: sends(outbox) == 0)
    if armed.poll() is None:
        armed.send_signal(signal.SIGCONT)  # A zombie: whatever it had in hand is somebody else's now.
        outbox.write(10)
        await until(lambda: sends(outbox) == 0)
    for process in (armed, successor):
        if process.poll() is None:
            process.terminate()
    for process in (armed, successor):
        await until(lambda process=process: process.poll() is not None)


def sends(outbox: Outbox) -> int:
    """Rows that are to be published."""
    [(count,)] = outbox.database.query("SELECT COUNT(*) FROM semel_outbox WHERE held IS NULL")
    return int(count)


async def enumerate_cases(outbox: Outbox, folder: Path, wanted: list[Case]) -> None:
    await outbox.make_topic()
    await outbox.make_topic(f"{outbox.app}.small", {"max.message.bytes": str(TOO_LARGE)})
    relays = Relays(outbox, folder, 2)
    try:
        for case in wanted:
            try:
                await run_case(outbox, relays, case)
            except AssertionError as error:
                raise AssertionError(f"{case.spec}: {error}\n{relays.log.read_text()[-4000:]}") from error
        await outbox.check()
        assert await outbox.records(f"{outbox.app}.small") == []
    finally:
        relays.stop()


@pytest.fixture
def outbox(tmp_path: Path, embedded: Address) -> Iterator[Outbox]:
    made = Outbox(f"sqlite:///{tmp_path}/outbox.db", embedded.bootstrap)
    yield made
    made.close()


def test_every_failpoint_of_the_relay_has_its_cases() -> None:
    assert {case.point for case in cases()} | IN_STORE_TESTS == set(POINTS)


@pytest.mark.timeout(300)
@asynchronous
async def test_a_sample_of_cases_loses_and_doubles_nothing(outbox: Outbox, tmp_path: Path) -> None:
    await enumerate_cases(outbox, tmp_path, SAMPLE)


@pytest.mark.soak
@pytest.mark.timeout(3_600)
@asynchronous
async def test_every_case_loses_and_doubles_nothing(outbox: Outbox, tmp_path: Path) -> None:
    await enumerate_cases(outbox, tmp_path, list(cases()))


async def strike(outbox: Outbox, relays: Relays, count: int, strikes: int, rng: random.Random) -> None:
    """Rows are written all the time; relays die and stand still at random."""
    stopped: dict[int, float] = {}
    loop = asyncio.get_running_loop()

    for _ in range(strikes):
        relays.keep()
        for _ in range(5):
            write(outbox, rng.randrange(1, 30), [relays.processes[slot] for slot in stopped])
            await asyncio.sleep(0.1 * rng.random())
        slot = rng.randrange(count)
        process = relays.processes[slot]
        if slot in stopped:
            if loop.time() > stopped[slot]:
                del stopped[slot]
                process.send_signal(signal.SIGCONT)
        elif rng.random() < 0.3:
            process.send_signal(signal.SIGSTOP)
            stopped[slot] = loop.time() + 4.0 * rng.random()
        else:
            process.kill()
            process.wait()
    for slot in stopped:
        relays.processes[slot].send_signal(signal.SIGCONT)
    relays.keep()


@pytest.mark.soak
@pytest.mark.timeout(1_200)
@pytest.mark.parametrize("broker", ["embedded", "kafka"])
@pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def test_ten_relays_killed_and_paused_at_random(
    request: pytest.FixtureRequest, tmp_path: Path, broker: str, kind: str
) -> None:
    bootstrap = request.getfixturevalue(broker).bootstrap
    url = f"sqlite:///{tmp_path}/o.db" if kind == "sqlite" else request.getfixturevalue("postgres").new_database()
    asyncio.run(at_random(Outbox(url, bootstrap), tmp_path, 10, 150))


@pytest.mark.timeout(300)
def test_two_relays_killed_and_paused_at_random(outbox: Outbox, tmp_path: Path) -> None:
    asyncio.run(at_random(outbox, tmp_path, 2, 8))


async def at_random(outbox: Outbox, folder: Path, count: int, strikes: int) -> None:
    await outbox.make_topic()
    relays = Relays(outbox, folder, count)
    try:
        await strike(outbox, relays, count, strikes, random.Random(7))
        await until(lambda: outbox.left() == 0, 120)
        await outbox.check()
    except AssertionError as error:
        raise AssertionError(f"{error}\n{relays.log.read_text()[-6000:]}") from error
    finally:
        relays.stop()

"""Real instances under uvicorn, duplicates at once, kill -9 between claim and COMMIT: one effect, one answer for all.

These are the cases of the failpoints `idempotency.*`, too.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from semel.databases import connect
from semel.failpoints import FAILPOINTS
from semel.processing.ports import free_ports
from tests.conftest import empty_database
from tests.ingress.bank import SCHEMA

ROOT = Path(__file__).resolve().parents[2]
POINTS = [name for name, point in FAILPOINTS.items() if point.role == "endpoint"]
PATIENCE_SECONDS = 120.0
"""For one answer: an instance takes seconds to start on a busy machine."""


class Got(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


async def send(port: int, account: str, cents: int) -> Got:
    """One request on a connection of its own. Raises OSError and EOFError when there is no whole answer."""
    body = b'{"cents": %d}' % cents
    head = (
        f"POST /accounts/{account}/transfers HTTP/1.1\r\nHost: bank\r\nConnection: close\r\n"
        f'Content-Type: application/json\r\nContent-Length: {len(body)}\r\nIdempotency-Key: "{account}"\r\n\r\n'
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head.encode() + body)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        return Got(int(lines[0].split()[1]), headers, await reader.readexactly(int(headers["content-length"])))
    finally:
        writer.close()


@dataclass
class Fleet:
    """Instances on fixed ports. One that ends is started again; every other life of it ends at a failpoint."""

    url: str
    kills: int
    seed: int = 1
    ports: list[int] = field(default_factory=list)
    killed: Counter[str] = field(default_factory=Counter)
    answers: Counter[int] = field(default_factory=Counter)
    processes: dict[int, asyncio.subprocess.Process] = field(default_factory=dict)
    lives: int = 0
    keys: int = 0

    @property
    def struck(self) -> int:
        return sum(self.killed[name] for name in POINTS)

    async def live(self, port: int) -> None:
        while True:
            arm = ""
            if self.lives < self.kills:
                arm = f"{POINTS[self.lives % len(POINTS)]}:kill:{1 + self.lives // 2 % 7}"
            self.lives += 1
            process = self.processes[port] = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.ingress.bank", self.url, str(port)),
                cwd=ROOT,
                env=os.environ | {"SEMEL_FAILPOINT": arm},
            )
            code = await process.wait()
            assert code == -signal.SIGKILL, f"an instance ended with {code}"
            self.killed[arm.partition(":")[0] or "from outside"] += 1

    async def ask(self, rng: random.Random, account: str, cents: int) -> Got:
        """Ask instance after instance until one has the answer."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                try:
                    got = await send(rng.choice(self.ports), account, cents)
                except (OSError, EOFError):
                    got = Got(0, {}, b"")
                self.answers[got.status] += 1
                if got.status not in (0, 409, 503):
                    return got
                await asyncio.sleep(rng.uniform(0.01, 0.1))

    async def key(self, number: int, copies: int) -> None:
        """All copies of one request at once; then another request with its key."""
        rng = random.Random(f"{self.seed} {number}")
        account = f"key-{number}"
        found = await asyncio.gather(*(self.ask(rng, account, number) for _ in range(copies)))
        assert {(got.status, got.body) for got in found} == {(201, found[0].body)}, account
        assert sum("idempotency-replayed" not in got.headers for got in found) <= 1, account
        assert len({got.headers["location"] for got in found}) == 1
        other = await self.ask(rng, account, number + 1)
        assert other.status == 422, account


@asynccontextmanager
async def fleet(url: str, instances: int, kills: int) -> AsyncIterator[Fleet]:
    found = Fleet(url, kills, ports=free_ports(instances))
    lives = [asyncio.create_task(found.live(port)) for port in found.ports]
    try:
        yield found
        assert not any(life.done() for life in lives), [life.exception() for life in lives if life.done()]
    finally:
        for life in lives:
            life.cancel()
        await asyncio.gather(*lives, return_exceptions=True)
        for process in found.processes.values():
            if process.returncode is None:
                process.kill()
                await process.wait()


def run(url: str, *, keys: int, copies: int, kills: int, instances: int, outside: int = 0) -> Fleet:
    """`kills` at failpoints and `outside` at any moment; every key has one effect in the end. There are more keys than
    `keys` where an instance is slow to come by its failpoint."""

    async def main() -> Fleet:
        async with fleet(url, instances, kills) as found:
            rng = random.Random(found.seed)
            while found.keys < keys or found.struck < kills:
                number = found.keys
                if outside and number % max(1, keys // outside) == 1:
                    victim = found.processes[rng.choice(found.ports)]
                    loop = asyncio.get_running_loop()
                    loop.call_later(rng.uniform(0, 0.2), _kill, victim)
                await found.key(number, copies)
                found.keys += 1
            return found

    database = connect(url)
    database.migrate(SCHEMA)
    done = asyncio.run(main())
    effects = Counter(dict(database.query("SELECT id, COUNT(*) FROM transfer GROUP BY id")))
    database.close()
    assert effects == {f"key-{number}": 1 for number in range(done.keys)}
    assert done.answers[201] == done.keys * copies
    assert done.answers[422] == done.keys
    print(url.partition(":")[0], done.keys, "keys", done.answers, done.killed)
    return done


def _kill(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return empty_database(request, tmp_path)


@pytest.mark.timeout(300)
def test_eight_copies_of_each_request_while_instances_are_killed(url: str) -> None:
    done = run(url, keys=8, copies=8, kills=2, instances=2)
    assert set(done.killed) == set(POINTS), "each point was struck"


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_sixty_four_copies_of_a_thousand_requests_while_instances_are_killed(url: str) -> None:
    done: Any = run(url, keys=1_000, copies=64, kills=60, instances=3, outside=60)
    assert done.killed["from outside"] > 0

"""Processes, a broker and a database that die in turn while work is done: kill -9 from outside, and at failpoints.

What they do, and what has to hold in the end, is in the tests: of the outbox, and of the dual write.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import msgspec

from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.errors import Conflict, SemelError
from semel.examples import payments
from semel.examples.payments import ACCOUNTS, OPENING_CENTS, Entry, Transfer
from semel.failpoints import arm_failpoints
from tests.outbox.world import msg_id, read_topic
from tests.services.broker import BrokerProcess
from tests.services.kafka import KafkaNode
from tests.services.server import Killable

PATIENCE_SECONDS = 240.0
"""For one step of progress, on a machine that is busy with other things."""


@dataclass
class World(ABC):
    """The processes, who of them is alive, and how to bring each back. What they are is a subclass's own."""

    url: str
    broker: BrokerProcess | KafkaNode
    server: Killable | None
    folder: Path
    transfers: int
    rng: random.Random
    children: dict[str, int] = field(default_factory=dict)
    struck: Counter[str] = field(default_factory=Counter)
    """How often each was killed, by us or at its failpoint."""
    _points: dict[str, str] = field(default_factory=dict)

    names: ClassVar[tuple[str, ...]]
    """Of the children; those of writers begin so, and they end when everything is done."""

    @abstractmethod
    def points(self, name: str) -> list[str]:
        """The failpoints at which a child may die by itself."""

    @abstractmethod
    def work(self, name: str) -> None:
        """What a child does."""

    def fork(self, name: str, *, armed: bool) -> None:
        """Start a child; armed ones kill themselves at a failpoint, sooner or later."""
        point = self._points[name] = self.rng.choice(self.points(name)) if armed else ""
        arm = f"{point}:kill:{self.rng.randrange(1, 8)}" if armed else ""
        pid = os.fork()
        if not pid:
            code = 1
            try:
                with (self.folder / f"{name}.log").open("ab") as log:
                    os.dup2(log.fileno(), 1)
                    os.dup2(log.fileno(), 2)
                arm_failpoints(arm)
                self.work(name)
                code = 0
            finally:
                os._exit(code)
        self.children[name] = pid

    def reap(self, *, armed: bool) -> None:
        """Bring back who died by itself."""
        for name, pid in list(self.children.items()):
            found, status = os.waitpid(pid, os.WNOHANG)
            if not found:
                continue
            code = os.waitstatus_to_exitcode(status)
            del self.children[name]
            if code == -signal.SIGKILL:
                self.struck[self._points[name] or name] += 1
                self.fork(name, armed=armed)
            else:
                assert (name[:6], code) == ("writer", 0), f"{name} ended with {code}: {self.log(name)}"

    def strike(self) -> None:
        """kill -9 of one of them, and its successor."""
        victims = [*self.children, "broker"] + (["database"] if self.server is not None else [])
        victim = self.rng.choice(victims)
        self.struck[victim] += 1
        if victim == "broker":
            self.broker.kill()
            self.broker.start()
        elif victim == "database":
            assert self.server is not None
            self.server.kill()
            self.server.start()
        else:
            pid = self.children.pop(victim)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            self.fork(victim, armed=self.rng.random() < 0.5)

    def end(self) -> None:
        for pid in self.children.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")[-3_000:]


def until(world: World, condition: Callable[[], bool], *, armed: bool = False) -> None:
    """Wait, and bring back who dies meanwhile."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "nothing moves: " + "".join(world.log(name) for name in world.children)
        world.reap(armed=armed)
        time.sleep(0.02)


def strike_until_written(
    world: World, kills: int, done: Callable[[], int], holds: Callable[[], None] = lambda: None
) -> None:
    """Start the children and kill until every writer has ended: one kill whenever some more transfers are `done`. What
    `holds` asserts is asserted between them."""
    for name in world.names:
        world.fork(name, armed=True)
    step = world.transfers // (kills + 1)
    for strike in range(1, kills + 1):
        until(world, lambda goal=strike * step: done() >= goal, armed=True)  # type: ignore[misc]
        holds()
        world.strike()
    until(world, lambda: not any(name.startswith("writer") for name in world.children))
    print(f"{world.transfers} transfers, killed: {dict(world.struck)}")


def do_shares(
    one: Callable[[int], None],
    numbers: int,
    *,
    of: int,
    shares: Iterable[int],
    passes: Callable[[Exception], bool] = lambda error: False,
) -> None:
    """Do `one` of all numbers in so many shares, of which a process may have some; a thread does one, in order.

    What fails with an error of Semel's, or one of which it is known that it `passes`, is done again. Any other ends the
    process, and the test sees it.
    """

    def some(first: int) -> None:
        rng = random.Random(first)
        for number in range(first, numbers, of):
            while True:
                try:
                    one(number)
                    break
                except Conflict:
                    time.sleep(0.005 * rng.random())
                except Exception as error:
                    if not isinstance(error, SemelError) and not passes(error):
                        traceback.print_exc()
                        os._exit(3)
                    time.sleep(0.05)

    running = [threading.Thread(target=some, args=(first,)) for first in shares]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


# --- Transfers between accounts ---


def transfer(number: int) -> Transfer:
    """The number decides everything, so that a writer that comes back does the same."""
    rng = random.Random(number)
    source, target = rng.sample(range(1, ACCOUNTS + 1), 2)
    return Transfer(f"t-{number}", f"a{source}", f"a{target}", rng.randrange(1, 3_000))


async def make_topic(bootstrap: str) -> None:
    async with KafkaClient(bootstrap) as client:
        await Admin(client).create_topics({payments.ledger.name: TopicSpec(3, {})})


def told_entries(world: World, done: set[int]) -> dict[str, list[Entry]]:
    """The ledger as Kafka has it, by account: every transfer is done, and told of once, on both sides."""
    assert done == set(range(world.transfers))
    noted = {int(line) for line in (world.folder / "acknowledged").read_text().split()}
    assert noted <= done
    records = asyncio.run(read_topic(world.broker.bootstrap, payments.ledger.name))
    entries = [msgspec.json.decode(record.value or b"", type=Entry) for record in records]
    assert len({msg_id(record) for record in records}) == len(records) == 2 * world.transfers
    sides = defaultdict(set)
    told = defaultdict(list)
    for entry in entries:
        sides[entry.transfer].add(entry.account)
        told[entry.account].append(entry)
    assert sides == {f"t-{number}": {transfer(number).source, transfer(number).target} for number in done}
    assert sum(entry.cents for entry in entries) == 0
    return told


def check_account(account: str, balance: int, count: int, told: dict[str, list[Entry]]) -> None:
    """An account is the fold of its entries, which are in order."""
    assert [entry.number for entry in told[account]] == list(range(1, count + 1)), account
    assert OPENING_CENTS + sum(entry.cents for entry in told[account]) == balance, account

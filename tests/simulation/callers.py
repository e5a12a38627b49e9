"""HTTP in the simulated world, without HTTP: the real `Gateway` and `KafkaLink`, and callers who send with a key.

A caller sends the same request again until he knows what became of it: to another gateway, at the same time, after its
answer. Some send another body under the same key. Every run of the handler has a number of its own, which is in its
effect and in its reply, so a key that was run twice shows in both.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple
from zlib import crc32

import msgspec

from semel.client.admin import Admin
from semel.client.cluster import KafkaClient
from semel.errors import OutcomeUnknown, SemelError
from semel.ingress import rules
from semel.ingress.gateway import Compose, Gateway, NotTaken
from semel.ingress.link import KafkaLink
from semel.ingress.owner import owner_component
from semel.ingress.purge import purge
from semel.ingress.requests import LookUp, Reply, Request
from semel.ingress.spec import EndpointSpec
from semel.processing.answers import Problem
from semel.processing.component import Component
from semel.processing.effects import Write
from tests.simulation.actors import Actor
from tests.simulation.loop import Crash, Process
from tests.simulation.plan import CHAIN_HORIZON
from tests.simulation.workers import APP, FED, KEYS, PARTITIONS

if TYPE_CHECKING:
    from tests.simulation.chain import ChainWorld
    from tests.simulation.world import World

__all__ = ["Asked", "Caller", "GatewayActor", "Purger", "Trouble", "check_asked", "owner"]

ROUTE = "POST /orders"
REFUSED = 409


class Trouble(Exception):
    """What the endpoint's handler fails with now and then; nothing of it is kept, and it runs again."""


def is_refused(body: str) -> bool:
    """Bodies that the handler answers with a problem of its own, which is an outcome like any other."""
    return crc32(body.encode()) % 7 == 0


def owner(world: ChainWorld, process: Process) -> Component:
    """The component that owns the requests, with the app's one endpoint."""
    rng = world.stream(f"endpoint of {process.name}")

    def order(body: bytes) -> Iterator[Write]:
        number = world.next_run()
        text = body.decode()
        if rng.random() < 0.5 * world.plan.knobs["handler trouble"]:
            raise Trouble(text)
        if is_refused(text):
            raise Problem(REFUSED, f"run {number}")
        key = KEYS[crc32(text.encode()) % len(KEYS)]
        yield Write(FED, key.encode(), f"{text}/{number}/{key}".encode())
        if rng.random() < 0.5 * world.plan.knobs["handler trouble"]:
            raise Trouble(text)
        return {"run": number}

    endpoint = EndpointSpec("/orders", bytes, order)
    return owner_component(APP, [endpoint], wall_ms=world.env(process).wall_ms)


class GatewayActor(Actor):
    """One HTTP instance; every life of it has a new id."""

    is_background = True
    world: ChainWorld

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self.open: dict[Process, Gateway] = {}

    async def run(self, process: Process, life: int) -> None:
        world = self.world
        env = world.env(process)
        timeout = world.plan.knobs["socket timeout ms"]
        link = KafkaLink(APP, world.bootstrap, PARTITIONS, env, world.client_settings(timeout))
        gateway = self.open[process] = Gateway(link, env)
        gateway.start()
        while not world.is_draining:
            if gateway.fatal is not None:
                raise gateway.fatal
            await asyncio.sleep(0.1)
        await gateway.close(1.0)
        self.done = True


class Purger(Actor):
    """Deletes requests that were answered, as `semel run` does once a minute."""

    is_background = True

    async def live(self, client: KafkaClient, life: int) -> None:
        while not self.world.is_over:
            await asyncio.sleep(0.5 * self.rng.random())
            await purge(Admin(client), APP, PARTITIONS)


class _Answer(NamedTuple):
    body: str
    status: int
    text: bytes
    is_replayed: bool


@dataclass
class Asked:
    """What was asked under one key, and what was answered."""

    key: str
    answers: list[_Answer] = field(default_factory=list)
    sent: int = 0
    refused: int = 0
    """How many of those that were sent are not in the log, for certain."""
    is_settled: bool = False
    """Whether the caller knows the outcome."""


class Caller(Actor):
    """Asks for one thing after the other, until each has its answer."""

    world: ChainWorld

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self.asked: list[Asked] = []

    async def think(self) -> None:
        await asyncio.sleep(2 * CHAIN_HORIZON / self.world.plan.operations * self.rng.random())

    async def run(self, process: Process, life: int) -> None:
        while self.left > 0:
            await self.think()
            asked = Asked(f"{self.name}-{life}-{self.left}")
            self.asked.append(asked)
            bodies = [f"{asked.key}:{name}" for name in ("a", "a", "a", "b")[: self.rng.choice((1, 3, 4))]]
            while not all(self._is_known(asked, body) for body in bodies):
                await asyncio.gather(*(self._ask(asked, body) for body in bodies))
            if self.rng.random() < 0.5:
                await self._ask(asked, bodies[0])
            asked.is_settled = True
            await self._look_up(asked)
            self.left -= 1
        self.done = True

    @staticmethod
    def _is_known(asked: Asked, body: str) -> bool:
        return any(answer.body == body and answer.status < 500 for answer in asked.answers)

    async def _ask(self, asked: Asked, body: str) -> None:
        """Send it once."""

        def compose(instance: bytes, number: int, partition: int) -> Request:
            return Request(instance, number, partition, ROUTE, "text/plain", body.encode())

        reply = await self._submit(asked, compose)
        if reply is not None:
            self.world.trace("caller", body, reply.status, reply.body.decode(), reply.is_replayed)
            asked.answers.append(_Answer(body, reply.status, reply.body, reply.is_replayed))

    async def _look_up(self, asked: Asked) -> None:
        """Ask for the operation until it is told; it must be what was answered."""

        def compose(instance: bytes, number: int, partition: int) -> LookUp:
            return LookUp(instance, number, partition, "operation")

        reply = None
        while reply is None:
            reply = await self._submit(asked, compose)
        outcome = next(answer for answer in asked.answers if answer.status not in (422, 500))
        found = msgspec.json.decode(reply.body).get("response", {}).get("status")
        if found != outcome.status:
            self.history.fail("outcome cannot be learned", f"of {asked.key}: {outcome}, but the operation says {reply}")

    async def _submit(self, asked: Asked, compose: Compose) -> Reply | None:
        """Through any gateway; None when there is no answer, for whatever reason."""
        await asyncio.sleep(0.02 * self.rng.random())
        process, gateway = self.rng.choice(self.world.gateways() or [(None, None)])
        if gateway is None or process is None:
            await asyncio.sleep(0.1)
            return None
        scope = rules.scope_of(APP, None, ROUTE, rules.key_digest(asked.key))
        wait = self.rng.choice((0.0, 0.3, 1.0))
        work: Callable[..., Any] = gateway.submit
        asked.sent += 1  # Before it goes out: the caller may not live to hear of it.
        task = self.world.loop.create_task(work(scope, compose, wait), context=process.context)
        await asyncio.wait((task,), timeout=wait + 3.0)  # A gateway that died or is stopped never answers.
        try:
            reply: Reply | None = task.result() if task.done() else None
        except NotTaken:
            asked.refused += 1
            await asyncio.sleep(0.1)
            return None
        except (OutcomeUnknown, Crash):
            reply = None
        except SemelError as error:
            self.history.fail("unexpected exception", f"a gateway answers {error!r}")
            return None
        return reply


def check_asked(world: ChainWorld, asked: list[Asked], fed: list[str]) -> None:
    """One effect per key, equal replies, 422 for another body."""
    fail = world.history.fail
    effects: dict[str, list[str]] = {}
    for value in fed:
        effects.setdefault(value.split(":")[0], []).append(value)
    for item in asked:
        done = effects.pop(item.key, [])
        if len(done) > 1:
            fail("request run twice", f"{item.key} has the effects {done}")
        if done and item.refused == item.sent:
            fail("refused request run", f"{item.key} was not taken, but has the effect {done}")
        outcomes = {(answer.body, answer.status, answer.text) for answer in item.answers if answer.status < 500}
        outcomes = {outcome for outcome in outcomes if outcome[1] != 422}
        if len(outcomes) > 1:
            fail("replies differ", f"{item.key} was answered {sorted(outcomes)}")
        for body, status, text in outcomes:
            due = [] if status == REFUSED else [f"{body}/{msgspec.json.decode(text)['run']}"]
            if [value.rpartition("/")[0] for value in done] != due:
                fail("reply and effect differ", f"{item.key} was answered {status} {text!r}, its effects are {done}")
            if any(answer.body == body and answer.status == 422 for answer in item.answers):
                fail("retry refused", f"{item.key}: {item.answers}")
        if item.is_settled and not outcomes:
            fail("outcome cannot be learned", f"{item.key}: {item.answers}")
    if effects:
        fail("effect of nothing", f"{effects}")

"""A small app through a real log: HTTP instances and owners in one process, and a child process to kill.

`python -m tests.ingress.chain NAME` is the child: an HTTP instance of the app at `SEMEL_KAFKA`; it prints its port.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from semel import App, Created, Problem
from semel.client.admin import Admin
from semel.env import Env
from semel.errors import Retriable
from semel.failpoints import arm_failpoints
from semel.ingress.asgi import Ingress, create
from semel.ingress.limits import Limits
from semel.ingress.link import ensure_topics, topic_specs
from semel.ingress.owner import owner_component
from semel.ingress.server import bind, serve
from semel.processing.engine import Engine
from semel.processing.metrics import Metrics
from semel.processing.topology import prepare_topics
from semel.settings import Settings
from semel.types import Record
from tests.processing.running import cluster, read_all, settings_for

PARTITIONS = 4


class Order(msgspec.Struct):
    id: int
    items: int = 2


def make_app(name: str, wait_seconds: float = 10.0) -> App:
    """Each order becomes one record an item; order 0 is refused, a negative one fails."""
    app = App(name, request_partitions=PARTITIONS)
    items = app.topic(f"{name}.items", key=str, value=list[int], partitions=3)

    def place(order: Order) -> Any:
        for position in range(order.items):
            yield items.record(f"{order.id}-{position}", [order.id, position])
        if order.id == 0:
            raise Problem(409, "no such order")
        if order.id < 0:
            raise ZeroDivisionError
        return Created({"order": order.id})

    def who(request: Any) -> str:
        return str(request.headers.get("x-user", "anonymous"))

    app.post("/orders", request=Order, timeout_seconds=wait_seconds)(place)
    app.post("/mine", request=Order, timeout_seconds=wait_seconds, principal=who)(place)
    return app


async def prepare(bootstrap: str, app: App) -> None:
    """The topics that a worker makes when it starts."""
    async with cluster(bootstrap) as (_, admin):
        assert isinstance(admin, Admin)
        await ensure_topics(admin, app.name, PARTITIONS)
        component = owner_component(app.name, app.endpoints.values())
        specs = topic_specs(app.name, PARTITIONS)
        await prepare_topics(admin, app.topics.values(), [component], PARTITIONS, more=specs)


@asynccontextmanager
async def http(bootstrap: str, app: App, **options: Any) -> AsyncIterator[Ingress]:
    """One HTTP instance, ready."""
    settings = Settings(kafka=bootstrap, partitions=PARTITIONS, drain_seconds=5)
    ingress = create(app, settings, limits=Limits(**{"start_seconds": 30, **options}))
    await ingress.start()
    try:
        yield ingress
    finally:
        await ingress.close()


@asynccontextmanager
async def owners(bootstrap: str, app: App, slots: Sequence[int] = (0,)) -> AsyncIterator[None]:
    """Workers that own the requests."""
    component = owner_component(app.name, app.endpoints.values())
    engines = [Engine(component, bootstrap, settings_for(bootstrap), Env(), Metrics(), slot=slot) for slot in slots]
    running = [asyncio.create_task(engine.run()) for engine in engines]
    try:
        yield
    finally:
        for engine in engines:
            await engine.drain()
        await asyncio.gather(*running)


async def items_written(bootstrap: str, app: App) -> list[tuple[int, int]]:
    """(order, position) of every committed effect, sorted."""
    while True:
        try:
            records: list[Record] = await read_all(bootstrap, f"{app.name}.items", 3)
            return sorted(tuple(msgspec.json.decode(record.value or b"", type=list[int])) for record in records)  # type: ignore[misc]
        except Retriable:
            await asyncio.sleep(0.1)


async def child(name: str) -> None:
    settings = Settings.from_environment(partitions=PARTITIONS)
    arm_failpoints(os.environ.get("SEMEL_FAILPOINT", ""))
    ingress = create(make_app(name), settings)
    sock = bind("127.0.0.1", 0)
    print(sock.getsockname()[1], flush=True)
    await serve(ingress, sock, drain_seconds=5)


if __name__ == "__main__":
    asyncio.run(child(sys.argv[1]))

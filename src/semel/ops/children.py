"""The processes of a deployment: what runs in a worker and in an HTTP instance."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, nullcontext

from semel import history
from semel.app import App
from semel.client.admin import Admin
from semel.client.cluster import KafkaClient
from semel.dualwrite.recovery import Recovery
from semel.env import Env
from semel.errors import ConfigurationError, OutcomeUnknown, Retriable
from semel.ingress.asgi import create
from semel.ingress.link import ensure_topics, topic_specs
from semel.ingress.owner import owner_component
from semel.ingress.purge import purge_for_ever
from semel.ingress.server import bind, serve
from semel.ops.alarm import watching
from semel.ops.exposition import join, publishing, read_others
from semel.ops.guarantees import check_required, edges_of, offered
from semel.ops.loading import load_app
from semel.outbox.relay import Relay
from semel.processing.component import Component
from semel.processing.disktables import DiskTables
from semel.processing.engine import Engine
from semel.processing.heartbeat import Heartbeat
from semel.processing.metrics import Metrics
from semel.processing.overdue import Overdue
from semel.processing.serdes.prepare import prepare_schemas
from semel.processing.topology import prepare_topics
from semel.processing.watermarks import Watermarks
from semel.processing.worker import Runnable, Worker
from semel.settings import Settings
from semel.sinks.engine import SinkEngine

__all__ = ["run_http", "run_relay", "run_worker"]

log = logging.getLogger("semel.worker")

_CONNECT_SECONDS = 2.0
"""How long one attempt to reach Kafka may take before it is told that there is none."""
_REPEAT_SECONDS = 10.0
_CONNECT_PAUSE_SECONDS = 0.2


async def run_worker(spec: str, settings: Settings, *, slot: int) -> None:
    """Every component of the app in this process, until SIGTERM. Waits for a Kafka that is not there yet."""
    history.start(settings.history, "worker", slot)
    app = load_app(spec)
    env, metrics = Env(), Metrics()
    heartbeat = Heartbeat.from_environment()
    heartbeat.start()
    await _prepare(app, settings, env)
    process = f"worker-{slot}"
    watermarks = Watermarks(settings.data, process)
    overdue = Overdue(settings.data, heartbeat.beat)
    runnables = _runnables(app, settings, env, metrics, watermarks, overdue, slot)
    worker = Worker(runnables, drain_seconds=settings.drain_seconds, heartbeat=heartbeat)
    async with (
        publishing(metrics, settings.data, process),
        watermarks.written(),
        _purging(app, settings, env),
        watching(app, settings, env, metrics) if slot == 0 else nullcontext(),
    ):
        await worker.run()


@asynccontextmanager
async def _purging(app: App, settings: Settings, env: Env) -> AsyncIterator[None]:
    """Delete answered requests now and then, beside what runs."""
    if not app.endpoints:
        yield
        return
    client = KafkaClient(settings.kafka, client_id=f"{app.name}.purge", env=env, settings=settings.kafka_client)
    partitions = app.request_partitions or settings.partitions
    task = asyncio.create_task(purge_for_ever(Admin(client), app.name, partitions, asyncio.sleep), name="purge")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await client.close()


def _runnables(
    app: App, settings: Settings, env: Env, metrics: Metrics, watermarks: Watermarks, overdue: Overdue, slot: int
) -> Mapping[str, Runnable]:
    runnables: dict[str, Runnable] = {
        component.name: Engine(
            component,
            settings.kafka,
            settings,
            env,
            metrics,
            slot=slot,
            watermarks=watermarks,
            tables=DiskTables(settings.data, app.name, env.new_id),
            overdue=overdue,
        )
        for component in _components(app, env, metrics)
    }
    for sink in app.sinks.values():
        runnables[sink.name] = SinkEngine(app.name, sink, settings.kafka, settings, env, metrics, slot=slot)
    return runnables | _relays(app, settings, env, metrics, slot) | _recoveries(app, settings, env, metrics)


def _recoveries(app: App, settings: Settings, env: Env, metrics: Metrics) -> dict[str, Runnable]:
    """One for each dual write of the app."""
    codecs = {topic.name: topic.codec for topic in app.topics.values()}
    return {
        recovery.name: recovery
        for recovery in (
            Recovery(app.name, spec, codecs, settings, env, metrics) for spec in app.transactional if spec.dual_write
        )
    }


def _relays(app: App, settings: Settings, env: Env, metrics: Metrics, slot: int, kind: str = "") -> dict[str, Runnable]:
    """One relay for each outbox of the app. `kind` tells processes of one host and slot apart."""
    return {
        relay.name: relay
        for relay in (
            Relay(app.name, spec, settings.kafka, settings, env, metrics, slot=slot, kind=kind)
            for spec in app.databases.values()
            if spec.outbox
        )
    }


async def run_relay(spec: str, settings: Settings, *, slot: int) -> None:
    """The relays of an app in a process of their own, until SIGTERM. Waits for a Kafka that is not there yet."""
    app = load_app(spec)
    env, metrics = Env(), Metrics()
    relays = _relays(app, settings, env, metrics, slot, "relay")
    if not relays:
        raise ConfigurationError(
            f"app {app.name} has no outbox to publish: declare one with app.database(url, outbox=True)."
        )
    heartbeat = Heartbeat.from_environment()
    heartbeat.start()
    worker = Worker(relays, drain_seconds=settings.drain_seconds, heartbeat=heartbeat)
    async with publishing(metrics, settings.data, f"relay-{slot}"):
        await worker.run()


def _components(app: App, env: Env, metrics: Metrics | None = None) -> list[Component]:
    components = app.components()
    if app.endpoints:
        endpoints = app.endpoints.values()
        owner = owner_component(app.name, endpoints, wall_ms=env.wall_ms, metrics=metrics, trace=app.trace)
        components.append(app.compressing(owner))
    return components


async def _prepare(app: App, settings: Settings, env: Env) -> None:
    """Make the app's topics, register its schemas, and check what it requires of the cluster.

    Repeated until Kafka and the schema registry answer.
    """
    told_at = -_REPEAT_SECONDS
    while True:
        try:
            patience = {**settings.kafka_client, "delivery.timeout.ms": int(_CONNECT_SECONDS * 1000)}
            setup = KafkaClient(settings.kafka, client_id=f"{app.name}.setup", env=env, settings=patience)
            async with setup as client:
                check_required(app, edges_of(app, client.transaction_version, await offered(app, client)))
                admin = Admin(client)
                partitions = app.request_partitions or settings.partitions
                if app.endpoints:
                    await ensure_topics(admin, app.name, partitions)
                own = topic_specs(app.name, partitions) if app.endpoints else {}
                await prepare_topics(admin, app.topics.values(), _components(app, env), settings.partitions, more=own)
                await prepare_schemas(app.topics.values(), settings)
                return
        except (Retriable, OutcomeUnknown, OSError) as error:
            if env.monotonic() - told_at >= _REPEAT_SECONDS:
                told_at = env.monotonic()
                log.warning("nothing can be done yet; trying on: %s", error)
            await asyncio.sleep(_CONNECT_PAUSE_SECONDS)


async def run_http(spec: str, settings: Settings, *, host: str, port: int, slot: int) -> None:
    """One HTTP instance, until SIGTERM. Instances share the port; each shows the metrics of all processes."""
    history.start(settings.history, "http", slot)
    app = load_app(spec)
    metrics, process = Metrics(), f"http-{slot}"

    def show_metrics() -> str:
        return join({process: metrics.render(), **read_others(settings.data, process)})

    ingress = create(app, settings, env=Env(), metrics=metrics, show_metrics=show_metrics)
    heartbeat = Heartbeat.from_environment()
    heartbeat.start()
    async with publishing(metrics, settings.data, process):
        await serve(ingress, bind(host, port, reuse_port=True), drain_seconds=settings.drain_seconds)

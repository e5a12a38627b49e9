"""`semel run`: a broker where no Kafka is named, HTTP instances and workers, all under one supervisor."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from semel.app import App
from semel.broker.lock import DirectoryLock
from semel.client.cluster import parse_bootstrap
from semel.client.config import ClientSettings
from semel.errors import ConfigurationError
from semel.ingress.server import bind
from semel.ops.guarantees import check_required, edges_of
from semel.ops.loading import load_app
from semel.processing.ports import free_ports
from semel.processing.supervisor import ChildSpec, Supervisor
from semel.settings import KAFKA_ADDRESS, Settings

__all__ = ["deploy"]


async def deploy(spec: str, settings: Settings, *, http: int, workers: int, host: str, port: int) -> None:
    """Run an app until SIGTERM. Exits with the supervisor's code when it is not 0.

    What can be known before a process is started is checked here: the app, its required guarantees, the port and
    the data folder. Raises `ConfigurationError`.
    """
    app = load_app(spec)
    ClientSettings.read(settings.kafka_client).security.context()
    if settings.kafka_client.get("security.protocol", "plaintext").lower() != "plaintext" and not settings.kafka:
        raise ConfigurationError(
            "security.protocol is set for Kafka's clients, and no Kafka is named: the broker that `semel run` starts "
            "is for this machine only, in plaintext. Set SEMEL_KAFKA=host:port, or leave security.protocol out."
        )
    check_required(app, edges_of(app, None))
    if http < 0 or workers < 0 or http + workers == 0:
        raise ConfigurationError("Give --http and --workers numbers from 0, and at least one of them above it.")
    if settings.kafka:
        parse_bootstrap(settings.kafka)
    if http and app.endpoints:
        bind(host, port).close()
    lock = DirectoryLock(settings.data, "semel run")  # A second one would fence our workers, and we its.
    try:
        code = await _supervise(app, spec, settings, http=http, workers=workers, host=host, port=port)
    finally:
        lock.release()
    if code:
        raise click.exceptions.Exit(code)


async def _supervise(app: App, spec: str, settings: Settings, *, http: int, workers: int, host: str, port: int) -> int:
    environment = {**os.environ, "SEMEL_DATA": str(settings.data)}
    children = []
    kafka = settings.kafka
    if not kafka:
        kafka = f"127.0.0.1:{free_ports(1)[0]}"
        argv = ["broker", "--data", str(settings.data / "broker"), "--listen", kafka]
        children.append(_child("broker", argv, environment, is_last=True))
    environment["SEMEL_KAFKA"] = kafka
    if app.endpoints:
        for slot in range(http):
            argv = ["child", "http", spec, "--listen", f"{host}:{port}", "--slot", str(slot)]
            # Requests that were taken are answered before the workers stop.
            children.append(_child(f"http-{slot}", argv, environment, slot, is_first=True))
    for slot in range(workers):
        argv = ["child", "worker", spec, "--slot", str(slot)]
        children.append(_child(f"worker-{slot}", argv, environment, slot))
    where = f", http://{host}:{port}" if http and app.endpoints else ""
    click.echo(f"semel: {app.name} on Kafka at {kafka}{where}; stop with Ctrl-C", err=True)
    supervisor = Supervisor(
        children,
        silence_seconds=settings.session_timeout_ms / 1000,
        drain_seconds=settings.drain_seconds,
        status=settings.data / "status.json",
    )
    address = settings.data / KAFKA_ADDRESS
    address.write_text(f"{kafka}\n")
    try:
        return await supervisor.run(handle_signals=True)
    finally:
        address.unlink(missing_ok=True)


def _child(
    name: str,
    argv: Sequence[str],
    environment: dict[str, str],
    slot: int = 0,
    *,
    is_first: bool = False,
    is_last: bool = False,
) -> ChildSpec:
    command = [sys.executable, "-m", "semel", *argv]
    # The dictionary is shared on purpose: the broker's address is put into it before any child starts.
    return ChildSpec(name, command, environment=environment, slot=slot, is_first=is_first, is_last=is_last)

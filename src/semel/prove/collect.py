"""Everything that a campaign left behind, read as the checker wants it: logs, positions, ledgers, history."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import chain
from pathlib import Path

from semel.app import App
from semel.client.admin import Admin
from semel.client.cluster import KafkaClient
from semel.history import read_history
from semel.ingress.requests import requests_topic, responses_topic
from semel.ingress.rules import key_digest, scope_of
from semel.processing.component import state_topic
from semel.prove.check.evidence import Evidence, Ingress, LedgerRow, Log, Position
from semel.prove.check.ledgers import read_ledger, read_parked, read_prepared, read_sink_positions
from semel.prove.check.scan import Consumer, read_in_doubt, read_positions, scan_logs
from semel.prove.drain import Consumes, consumers_of

__all__ = ["collect"]


async def collect(
    app: App, client: KafkaClient, bootstrap: str, settings: Mapping[str, str], history: Path, folder: Path
) -> Evidence:
    """Read it while Kafka and the databases still run, and no process of the app does; logs go to files in `folder`.

    Raises what reading raises: without evidence there is no verdict.
    """
    there = await Admin(client).list_topics()
    prefix = f"{app.name}.semel."
    topics = sorted(name for name in there if name in app.topics or name.startswith(prefix))
    logs = await scan_logs(bootstrap, topics, folder, settings=settings)
    consumers = consumers_of(app)
    groups = [Consumer(item.component, item.group, [item.topic]) for item in consumers if not item.database]
    positions = await read_positions(bootstrap, groups, settings=settings)
    urls = sorted({item.database for item in consumers if item.database})
    rows = {url: await asyncio.to_thread(read_sink_positions, url) for url in urls}
    sinks = [item for item in consumers if item.database]
    limits = {}
    ingress = None
    if app.endpoints:
        outcomes = state_topic(app.name, "idempotency")
        ingress = Ingress(requests_topic(app.name), responses_topic(app.name), outcomes, partial(_scope, app.name))
        named = [spec.route for spec in app.endpoints.values() if spec.principal is not None]
        if named:
            ingress = None
            limits["Idempotency-Keys"] = f"{', '.join(named)} asks for a principal: keys could not be followed."
    return Evidence(
        events=partial(read_history, history),
        logs=logs,
        positions=[*positions, *_sink_positions(sinks, rows, logs)],
        ledger=partial(_ledgers, urls),
        parked=[row for url in urls for row in await asyncio.to_thread(read_parked, url)],
        in_doubt=[
            *await read_in_doubt(bootstrap, re.escape(f"{app.name}."), settings=settings),
            *[item for url in urls for item in await asyncio.to_thread(read_prepared, url)],
        ],
        ingress=ingress,
        changelogs=frozenset(name for name in topics if name.startswith(f"{prefix}state.")),
        limits=limits,
    )


def _scope(app: str, route: str, key: str) -> bytes:
    return scope_of(app, None, route, key_digest(key))


def _ledgers(urls: Iterable[str]) -> Iterable[LedgerRow]:
    return chain.from_iterable(read_ledger(url) for url in urls)


def _sink_positions(
    sinks: Iterable[Consumes], rows: Mapping[str, list[Position]], logs: Iterable[Log]
) -> list[Position]:
    """One for each partition of each sink's topic; one that never committed stands where its log began."""
    found = []
    for sink in sinks:
        known = {(row.topic, row.partition): row for row in rows[sink.database] if row.component == sink.group}
        for log in logs:
            if log.topic == sink.topic:
                nothing = Position(sink.group, log.topic, log.partition, log.begin, log.begin, True)
                found.append(known.get((log.topic, log.partition), nothing))
    return found

"""Clients that are known to tear transactions must be found out by the checker, and ours must not be.

Under a late EndTxn (tests/peers/late_end_txn.py) librdkafka and aiokafka, which speak transactions V1, commit what they
were told is aborted, or abort a part of what they were told is committed. What they said goes into a history, the
logs are scanned as they are, and the checker judges.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from pathlib import Path
from typing import Any

import pytest

from semel import history
from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.history import Event, Unit, UnitInput
from semel.prove.check import Evidence, Findings, check
from semel.prove.check.scan import scan_logs
from semel.prove.faults.kafka_proxy import KafkaProxy
from semel.prove.faults.rules import Hold, Rule
from semel.types import TopicPartition
from semel.wire.messages import decode_request
from tests.peers.clients import CLIENTS, PeerClient

END_TXN = 26
RUNS = 2
REQUEST_MS = 400
"""The client gives its withheld request up after this. On a busy machine other requests may take as long: such a pair
of transactions is in the history like any other, and does not count."""
TRIES_MAX = 30
STEP_SECONDS = 20.0


class Trial:
    """Pairs of transactions of one client; an EndTxn of the first arrives in the middle of the second."""

    def __init__(self, bootstrap: str, client: str, *, late_commit: bool) -> None:
        self._proxy = KafkaProxy(bootstrap)
        self._bootstrap = bootstrap
        self._make = CLIENTS[client]
        self._late_commit = late_commit
        self._inputs = 0
        self.topic = f"known-{uuid.uuid4().hex[:8]}"

    async def run(self) -> None:
        async with KafkaClient(self._bootstrap) as client:
            await Admin(client).create_topics({self.topic: TopicSpec(2)})
        await self._proxy.start()
        try:
            whole = 0
            for _ in range(TRIES_MAX):
                whole += await self._pair()
                if whole == RUNS:
                    return
            raise AssertionError(f"only {whole} of {TRIES_MAX} pairs of transactions came to their end")
        finally:
            await self._proxy.close()

    async def _pair(self) -> bool:
        """Whether the client told an end of both transactions."""
        client = self._make(self._proxy.bootstrap, f"id-{self.topic}", REQUEST_MS)
        try:
            await asyncio.wait_for(client.start(), 60)
        except Exception:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(client.close(), STEP_SECONDS)
            return False
        late = self._proxy.add(
            Rule(
                Hold(),
                when=lambda header, frame: (
                    header.api_key == END_TXN and decode_request(header, frame).committed == self._late_commit
                ),
            )
        )
        try:
            await self._transaction(client, ["a1"], commit=self._late_commit)
            await self._transaction(client, ["b1", "b2"], commit=not self._late_commit, late=late)
        except Exception:
            return False  # It stands in the history as unknown.
        else:
            assert late.struck.is_set(), "the request that is to be late never came"
            return True
        finally:
            self._proxy.remove(late)
            with contextlib.suppress(Exception):
                await asyncio.wait_for(client.close(), STEP_SECONDS)

    async def _transaction(
        self, client: PeerClient, values: list[str], *, commit: bool, late: Rule | None = None
    ) -> None:
        attempt = history.attempt()
        self._inputs += 1
        place = ("input", 0, self._inputs)
        inputs = [UnitInput("input", 0, [self._inputs], [len(values)])]
        history.note(Unit(type="invoke", a=attempt, component="trial", inputs=inputs))
        outcome: history.Outcome = "info"
        try:
            async with asyncio.timeout(STEP_SECONDS):
                await client.begin()
                for j, value in enumerate(values):
                    if j and late is not None:
                        late.release()
                        await late.answered.wait()
                    proof = "|".join(map(str, (attempt, *place, j, len(values))))
                    await client.produce(TopicPartition(self.topic, j), value, proof)
                await (client.commit() if commit else client.abort())
            outcome = "ok" if commit else "fail"
        finally:
            history.note(Unit(type=outcome, a=attempt))


def judged(address: Any, client: str, folder: Path, *, late_commit: bool) -> tuple[Findings, list[Event]]:
    async def run() -> Evidence:
        trial = Trial(address.bootstrap, client, late_commit=late_commit)
        await trial.run()
        logs = await scan_logs(address.bootstrap, [trial.topic], folder, settings={})
        return Evidence(events=lambda: events, logs=logs)

    with history.captured() as events:
        evidence = asyncio.run(run())
    return check(evidence), events


@pytest.mark.parametrize("late_commit", [True, False], ids=["late commit", "late abort"])
@pytest.mark.parametrize("broker", ["embedded", "embedded_v1"])
def test_ours_is_clean(broker: str, late_commit: bool, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    findings, events = judged(request.getfixturevalue(broker), "semel", tmp_path, late_commit=late_commit)
    assert findings.clean, findings.summary()
    outcomes = [event.type for event in events]
    assert min(outcomes.count("ok"), outcomes.count("fail")) >= RUNS
    assert findings.checked["records"] > RUNS * 3


@pytest.mark.parametrize("late_commit", [True, False], ids=["late commit", "late abort"])
@pytest.mark.parametrize("client", ["confluent-kafka", "aiokafka"])
def test_others_are_found_out(client: str, late_commit: bool, embedded_v1: Any, tmp_path: Path) -> None:
    findings, _ = judged(embedded_v1, client, tmp_path, late_commit=late_commit)
    found = set(findings.counts)
    assert found >= {"L4" if late_commit else "L3", "L6", "L7", "E17"}, findings.summary()
    assert found <= {"L3", "L4", "L6", "L7", "E17", "E4", "E2", "L15"}, findings.summary()


@pytest.mark.peers
@pytest.mark.parametrize("late_commit", [True, False], ids=["late commit", "late abort"])
@pytest.mark.parametrize("client", ["confluent-kafka", "aiokafka"])
def test_others_are_found_out_on_apache_kafka(client: str, late_commit: bool, kafka: Any, tmp_path: Path) -> None:
    findings, _ = judged(kafka, client, tmp_path, late_commit=late_commit)
    assert set(findings.counts) >= {"L4" if late_commit else "L3", "E17"}, findings.summary()


@pytest.mark.peers
@pytest.mark.parametrize("late_commit", [True, False], ids=["late commit", "late abort"])
def test_ours_is_clean_on_apache_kafka(late_commit: bool, kafka: Any, tmp_path: Path) -> None:
    findings, _ = judged(kafka, "semel", tmp_path, late_commit=late_commit)
    assert findings.clean, findings.summary()

"""State = fold of inputs: the real engine on a real broker, as it is and with a fault in its state."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from semel import history
from semel.processing.scope import RecordScope
from semel.processing.stores import Store
from semel.prove.check import Evidence, Findings, check
from semel.prove.check.scan import Consumer, read_positions, scan_logs
from tests.conftest import Address
from tests.processing.running import counting_app, drained, engine_for, feed, prepare, while_running
from tests.processing.test_engine_kafka import items_of, new_name


def judged(bootstrap: str, folder: Path, rounds: int = 2) -> Findings:
    """Count records in some lives of a worker, and have everything checked that they left."""
    name = new_name()
    app = counting_app(name)

    async def run() -> Evidence:
        await prepare(bootstrap, app)
        with history.captured() as events:
            for number in range(rounds):
                # Each part is worked on before the next one comes: what one unit left is what a later one finds.
                async def body(number: int = number) -> None:
                    for part in range(3):
                        await feed(bootstrap, f"{name}.in", items_of(40, seed=10 * number + part, keys=5))
                        await drained(bootstrap, f"{name}.count", f"{name}.in")

                await while_running([engine_for(bootstrap, app)], body)
        changelog = f"{name}.semel.state.counts"
        logs = await scan_logs(bootstrap, [f"{name}.in", f"{name}.out", changelog], folder, settings={})
        positions = await read_positions(bootstrap, [Consumer("count", f"{name}.count", [f"{name}.in"])], settings={})
        return Evidence(events=lambda: events, logs=logs, positions=positions, changelogs=frozenset((changelog,)))

    return check(asyncio.run(run()))


def test_a_healthy_run_adds_up(embedded: Address, tmp_path: Path) -> None:
    findings = judged(embedded.bootstrap, tmp_path)
    assert findings.clean, [str(anomaly) for anomaly in findings.anomalies[:5]]
    assert findings.checked["state changes"] >= 10


def forgets(apply: Callable[..., None], store: Store, changed: Any, *rest: Any) -> None:
    """Local state that misses what was committed of one key."""
    apply(store, {key: entry for key, entry in changed.items() if key != b"k1"}, *rest)


def looks_past(begin: Callable[..., None], scope: RecordScope, *rest: Any) -> None:
    """A handler that does not see what its own unit did before."""
    begin(scope, *rest)
    scope._layers = ()


@pytest.mark.parametrize(("owner", "method", "fault"), [(Store, "apply", forgets), (RecordScope, "begin", looks_past)])
def test_a_lost_update_is_found_and_its_key_is_named(
    owner: Any, method: str, fault: Any, embedded: Address, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, method, spoilt(fault, getattr(owner, method)))
    findings = judged(embedded.bootstrap, tmp_path, rounds=1)
    assert set(findings.counts) == {"E8"}, [str(anomaly) for anomaly in findings.anomalies[:5]]
    assert {anomaly.ids[0] for anomaly in findings.anomalies} == {"count"}
    names = {anomaly.ids[1].partition("[")[2] for anomaly in findings.anomalies}
    assert names == {"k1]"} if owner is Store else names


def spoilt(fault: Callable[..., None], original: Callable[..., None]) -> Callable[..., None]:
    return lambda *args: fault(original, *args)

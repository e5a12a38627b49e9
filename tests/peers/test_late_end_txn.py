"""C1: a late copy of a request must not touch the next transaction. A few runs of the script, on every broker."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import pytest

from tests.peers.late_end_txn import CASES, run_case


def row(address: Any, client: str, case: str, runs: int) -> dict[str, Any]:
    args = argparse.Namespace(
        bootstrap=address.bootstrap, client=client, case=case, runs=runs, parallel=4, timeout_ms=150
    )
    return asyncio.run(run_case(args, address.bootstrap))


@pytest.mark.parametrize("case", CASES)
def test_semel_has_no_anomaly(any_broker: Any, case: str) -> None:
    found = row(any_broker, "semel", case, 12)
    assert found["anomalies"] == 0, found
    assert sum(found["late_answers"].values()) == 12, "every withheld copy must have arrived in transaction 2"
    first, second = {
        "commit-abort": ("committed", "aborted"),
        "abort-commit": ("aborted", "committed"),
    }.get(case, ("committed", "committed"))
    assert found["outcomes"] == {f"{first}, {second}": 12}


@pytest.mark.peers
@pytest.mark.parametrize("client", ["confluent-kafka", "aiokafka"])
@pytest.mark.parametrize("case", ["commit-abort", "abort-commit", "offsets"])
def test_the_script_finds_what_other_clients_do(kafka: Any, client: str, case: str) -> None:
    """The script can see an anomaly: these clients speak transactions V1 and do not raise the epoch."""
    assert row(kafka, client, case, 4)["anomalies"] > 0

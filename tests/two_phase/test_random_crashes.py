"""The dual write of KIP-939 under random crashes of writer and broker: never torn."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.services.postgres import PostgresServer
from tests.two_phase.crashes import random_crashes


def check(folder: Path, url: str, crashes: int, seed: int) -> None:
    began = time.monotonic()
    outcome, faults, reports = random_crashes(folder, url, crashes, seed)
    recoveries = [item for item in reports if "ongoing" in item]
    found_open = [item for item in recoveries if item["ongoing"]]
    errors = [item for item in reports if "error" in item]
    print(
        f"{faults.total()} crashes in {time.monotonic() - began:.0f} s ({dict(faults)}), "
        f"{len(outcome.ledger)} transactions committed, {len(recoveries)} recoveries, {len(found_open)} took one "
        f"over: {sum(item['committed'] for item in found_open)} committed, "
        f"{sum(not item['committed'] for item in found_open)} aborted; {len(outcome.torn)} torn"
    )
    assert not errors, errors[:3]
    assert outcome.torn == set()
    assert len(outcome.ledger) >= crashes // 20, "hardly anything was written: the test shows nothing"


def test_a_few_crashes_with_sqlite(tmp_path: Path) -> None:
    check(tmp_path, f"sqlite:///{tmp_path}/business.db", 20, seed=1)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(2, 12))
def test_a_thousand_crashes_with_sqlite(tmp_path: Path, seed: int) -> None:
    check(tmp_path, f"sqlite:///{tmp_path}/business.db", 100, seed)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(12, 22))
def test_a_thousand_crashes_with_postgres(tmp_path: Path, postgres: PostgresServer, seed: int) -> None:
    check(tmp_path, postgres.new_database(), 100, seed)

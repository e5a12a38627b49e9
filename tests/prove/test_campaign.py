"""Campaigns in small: a sound app is found clean, a broken one is not, and what cannot be done is said at once."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from semel.ops.cli import main
from tests.conftest import unavailable
from tests.services.kafka import KafkaNode, missing_tools
from tests.services.postgres import PostgresServer

ROOT = Path(__file__).resolve().parents[2]


def prove(folder: Path, *arguments: str, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    """`semel prove` as a user calls it, in a folder of its own."""
    return subprocess.run(
        [sys.executable, "-m", "semel", "prove", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def figures(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    print(done.stderr[-3_000:])
    print(done.stdout)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.timeout(300)
def test_the_shop_is_proved_clean(tmp_path: Path) -> None:
    done = prove(
        tmp_path,
        *("semel.examples.shop:app", "--minutes", "0.12", "--faults", "kill,net", "--every", "1", "--seed", "3"),
        *("--rate", "100", "--clients", "16", "--keep", "kept", "--format", "json"),
    )
    found = figures(done)
    assert done.returncode == 0
    assert found["verdict"] == "clean"
    assert found["anomalies"] == {}
    assert found["inputs"] == found["accepted"] > 10
    assert found["effects"] > found["inputs"]
    assert found["faults"]["kill"] >= 1
    assert found["checked"]["inputs"] > found["inputs"]
    assert found["reproduce"].startswith(
        "semel prove semel.examples.shop:app --seed 3 --minutes 0.12 --faults kill,net"
    )
    page = (tmp_path / found["report"]).read_text()
    assert "<h1>Nothing lost, nothing doubled" in page
    assert "inputs answered" in done.stderr
    orders = sqlite3.connect(tmp_path / "kept" / "database.db").execute("SELECT sum(orders) FROM customer_totals")
    assert orders.fetchone() == (found["accepted"],)


@pytest.mark.timeout(300)
def test_a_broken_app_is_refuted(tmp_path: Path) -> None:
    """Exit code 1, the class by name, and the command that does it again."""
    done = prove(
        tmp_path,
        *("tests.prove.apps.forgetful:app", "--minutes", "0.1", "--faults", "duplicate", "--every", "1"),
        *(
            "--rate",
            "100",
            "--clients",
            "16",
            "--http",
            "1",
            "--workers",
            "1",
            "--plan",
            "semel.examples.shop_proof:plan",
        ),
    )
    print(done.stderr[-3_000:])
    print(done.stdout)
    assert done.returncode == 1
    assert "NOT CLEAN" in done.stdout
    assert "E14 key not unique" in done.stdout
    assert "two requests with one key both have effects" in done.stdout
    assert "E9 broken invariant" in done.stdout, "the totals of the proof plan do not add up either"
    assert "again: semel prove tests.prove.apps.forgetful:app --seed 1 --minutes 0.1 --faults duplicate" in done.stdout
    assert "<h1>Nothing lost" not in (tmp_path / "semel-proof.html").read_text()


@pytest.mark.soak
def test_an_app_without_endpoints_and_plan(tmp_path: Path) -> None:
    done = prove(
        tmp_path,
        *("tests.prove.apps.till:app", "--minutes", "0.5", "--every", "1", "--rate", "200", "--format", "json"),
    )
    found = figures(done)
    assert "inputs: made up for topic payments (Payment)" in done.stderr
    assert (done.returncode, found["verdict"]) == (0, "clean")
    assert found["inputs"] == found["accepted"] > 200
    assert "There is no proof plan" in (tmp_path / "semel-proof.html").read_text()


@pytest.mark.soak
def test_the_shop_on_apache_kafka_and_postgres(tmp_path: Path, postgres: PostgresServer) -> None:
    if missing_tools():
        unavailable("Apache Kafka", f"{' and '.join(missing_tools())} not found")
    node = KafkaNode()
    try:
        node.start()
        done = prove(
            tmp_path,
            *("semel.examples.shop:app", "--minutes", "2", "--kafka", node.bootstrap, "--rate", "200"),
            *("--database", postgres.new_database(), "--keep", "kept", "--format", "json"),
            timeout=900,
        )
    finally:
        node.stop()
    found = figures(done)
    assert (done.returncode, found["verdict"]) == (0, "clean")
    assert found["faults"]["database"] >= 2
    assert found["faults"]["net"] >= 2
    assert list(found["faults_not_done"]) == ["disk"]
    assert found["inputs"] == found["accepted"] > 1_000


# --- What cannot be done is said before anything is started ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shpo:app"], "There is no module 'shpo' here"),
        (["tests.prove.apps.till:app", "--faults", "kil"], "there is no fault 'kil'"),
        (["tests.prove.apps.till:app", "--plan", "semel.examples.shop:sku"], "is a function; a proof plan is"),
        (["tests.prove.apps.till:app", "--plan", "shop_prof:plan"], "There is no module 'shop_prof' here"),
        (["tests.prove.apps.till:app", "--database", "orders=sqlite:///x.db"], "app till has no such database"),
        (["tests.prove.apps.till:app", "--minutes", "0"], "--minutes and --every must be above 0"),
        (["tests.prove.apps.till:app", "--report", "/proc/none/report.html"], "cannot be written"),
        (["tests.prove.apps.till:app", "--database", "sqlite:///mine.db"], "is not empty: there are rows in"),
        (["tests.prove.apps.till:app", "--keep", "kept"], "holds an earlier campaign"),
        (["tests.prove.apps.till:app", "--kafka", "127.0.0.1:1"], "127.0.0.1:1"),
    ],
)
def test_what_cannot_be_done_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("kept/history").mkdir(parents=True)
    with sqlite3.connect("mine.db") as connection:
        connection.execute("CREATE TABLE taken (till BIGINT)")
        connection.execute("INSERT INTO taken VALUES (1)")
    done = CliRunner().invoke(main, ["prove", *arguments])
    assert done.exit_code in (1, 2)
    assert message in done.stderr
    assert done.stdout == ""
    assert not isinstance(done.exception, Exception)
    assert sqlite3.connect("mine.db").execute("SELECT * FROM taken").fetchall() == [(1,)]

"""Bad input and missing things, as a user meets them: one clear message that says what to do, and nothing half done.

Where each item of the acceptance list is tested (paths below tests/; "here" is this file):

unknown topic           client/test_cluster.py::test_a_topic_that_is_not_there_is_named_and_one_that_comes_is_waited_for
                        client/test_producer.py::test_a_topic_that_is_not_there_is_named_when_the_transaction_fails
                        processing/test_engine.py::test_an_output_topic_that_is_missing_is_waited_for
                        broker/test_produce_fetch.py (its codes), test_app.py (a topic of no app)
message too large       here; ingress/test_asgi.py::test_what_is_refused_before_the_log
                        ingress/test_owner.py::test_an_effect_that_cannot_be_written_is_the_handlers_failure
                        processing/test_engine.py::test_a_record_whose_output_the_broker_refuses_is_found_and_parked
key missing, too long   here; ingress/test_asgi.py::test_what_is_refused_before_the_log, ingress/test_rules.py
key with another body   ops/test_run.py::test_an_order_is_answered_once_and_again_and_becomes_rows
                        ingress/test_owner.py::test_another_body_under_the_key_is_refused_and_changes_nothing
bad JSON, wrong type    here; ingress/test_asgi.py::test_refusals_tell_where_the_fault_is
database down at start  here; sinks/test_engine.py::test_a_database_that_is_not_there_yet_is_waited_for
database down mid-run   here; sinks/test_engine.py::test_an_outage_pauses_polls_on_and_loses_nothing
                        sinks/test_commit_outcome.py, sinks/test_database.py
Kafka down at start     here; ingress/test_chain.py::test_the_broker_goes_away_and_comes_back
Kafka down in mid-run   here; processing/test_engine_kafka.py::test_a_broker_that_is_killed_and_restarted_is_waited_for
                        client/test_outage.py, client/test_kills.py
folder not writable     here
port taken              here; ingress/test_server.py::test_a_taken_port_is_one_clear_message
two in one folder       here; ops/test_run.py::test_a_second_run_on_the_same_folder_is_refused
app does not import     here
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.deployment import Deployment, until
from tests.services.broker import BrokerProcess
from tests.services.postgres import PostgresServer


def semel(
    *arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "semel", *arguments],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def message(done: subprocess.CompletedProcess[str], code: int = 2) -> str:
    """The one line that the user reads; never a traceback."""
    assert done.returncode == code, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("semel: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_an_app_module_that_is_not_there(tmp_path: Path) -> None:
    assert "no module 'nowhere'" in message(semel("run", "nowhere:app", cwd=tmp_path))
    text = message(semel("run", "semel.examples.shp:app", cwd=tmp_path))
    assert "no module 'semel.examples.shp'" in text
    assert "loading.py" not in text


def test_an_app_module_that_does_not_import(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import semel\n\nprice = 1 / 0\n")
    text = message(semel("run", "broken:app", cwd=tmp_path))
    assert "ZeroDivisionError" in text
    assert "broken.py:3" in text
    (tmp_path / "unclosed.py").write_text("def (\n")
    text = message(semel("run", "unclosed:app", cwd=tmp_path))
    assert "unclosed.py, line 1" in text
    assert "loading.py" not in text


def test_an_attribute_that_is_no_app(tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text("app = 3\n")
    assert "not a semel.App" in message(semel("guarantees", "plain:app", cwd=tmp_path))
    text = message(semel("guarantees", "plain:shop", cwd=tmp_path))
    assert "no attribute 'shop'" in text
    assert "No semel.App" in text
    assert "semel.examples.shop:app" in message(semel("guarantees", "semel.examples.shop:ap", cwd=tmp_path))


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        text = message(semel("broker", "--data", str(tmp_path / "b"), "--listen", f"127.0.0.1:{port}"))
    assert str(port) in text
    assert "use" in text.lower()


def test_a_port_that_is_taken_is_told_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        assert listen in message(semel("run", "semel.examples.shop:app", "--listen", listen, cwd=tmp_path))
    assert not (tmp_path / ".semel").exists()


@pytest.mark.parametrize("command", [("broker",), ("run", "semel.examples.shop:app")])
def test_a_data_directory_that_cannot_be_written(command: tuple[str, ...]) -> None:
    # /proc refuses new entries to everybody, root included.
    text = message(semel(*command, "--data", "/proc/semel-data", "--listen", "127.0.0.1:0"))
    assert "/proc/semel-data" in text
    assert "--data" in text


def test_two_brokers_on_one_data_directory(tmp_path: Path) -> None:
    first = BrokerProcess(tmp_path / "data")
    first.start()
    try:
        text = message(semel("broker", "--data", str(tmp_path / "data"), "--listen", "127.0.0.1:0"))
        assert str(first.pid) in text
        assert str(tmp_path / "data") in text
    finally:
        first.stop()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SEMEL_PARTITIONS": "many"}, "SEMEL_PARTITIONS"),
        ({"SEMEL_PROFILE": "prod"}, "SEMEL_PROFILE"),
        ({"SEMEL_FAILPOINT": "no.such:kill"}, "no.such"),
        ({"SEMEL_FAILPOINT": "unit.after_produce:kill", "SEMEL_PROFILE": "production"}, "production"),
    ],
)
def test_settings_that_cannot_work(variables: dict[str, str], expected: str) -> None:
    assert expected in message(semel("guarantees", "semel.examples.shop:app", env=variables))


def test_a_listen_address_that_is_none() -> None:
    assert "HOST:PORT" in message(semel("broker", "--listen", "9092"))


def test_a_kafka_that_is_not_there() -> None:
    text = message(semel("topics", "--kafka", "127.0.0.1:1"), code=1)
    assert "127.0.0.1:1" in text


def test_no_kafka_named() -> None:
    assert "SEMEL_KAFKA" in message(semel("txn", "list", env={"SEMEL_KAFKA": ""}))


# --- Things that go away, with everything at work ---

ORDER = {"id": 1, "customer_id": "00001", "cds": 2, "cents": 500}


def rows(url: str, sql: str) -> list[tuple[object, ...]]:
    """What a database says; nothing while the tables are not there."""
    import psycopg

    try:
        with psycopg.connect(url) as connection:
            return connection.execute(sql).fetchall()
    except psycopg.errors.UndefinedTable:
        return []


def test_kafka_down_at_the_start_and_in_mid_run(tmp_path: Path, postgres: PostgresServer) -> None:
    """503 while it is away, with nothing stored; afterwards each order has one effect. Bad requests are refused too."""
    database = postgres.new_database()
    broker = BrokerProcess(tmp_path / "broker")
    surroundings = {"SEMEL_KAFKA": broker.bootstrap, "SHOP_DATABASE": database}
    with Deployment("semel.examples.shop:app", tmp_path, environment=surroundings) as running:
        until(lambda: "nothing can be done yet" in running.log.read_text(), "the worker says so")
        assert broker.bootstrap in running.log.read_text()
        early = running.post("/orders", "early", ORDER)
        assert (early.status, early.body["type"]) == (503, "/errors/unavailable")
        assert "Nothing was stored" in early.body["detail"]
        try:
            broker.start()
            running.wait_ready()
            assert running.post("/orders", "early", ORDER).status == 201
            refuse_bad_requests(running)
            until(lambda: rows(database, "SELECT orders, cds FROM customer_totals") == [(1, 2)], "the first order")
            broker.kill()
            until(lambda: running.post("/orders", "late", ORDER | {"id": 2}).status == 503, "503 while Kafka is away")
            assert running.ask("GET", "/livez").status == 200
            broker.start()
            until(lambda: running.post("/orders", "late", ORDER | {"id": 2}).status == 201, "201 when it is back")
            until(lambda: rows(database, "SELECT orders, cds FROM customer_totals") == [(2, 4)], "the second order")
            until(lambda: rows(database, "SELECT sum(taken) FROM stock") == [(4,)], "both orders' items")
            assert running.stop() == 0
        finally:
            broker.stop()
    log = running.log.read_text()
    assert "Traceback" not in log
    assert len(log.splitlines()) < 120, "an outage must not flood the log"


def refuse_bad_requests(running: Deployment) -> None:
    """What cannot be a request is told where its fault is, and is no request of its key."""
    good = b'{"id": 9, "customer_id": "1", "cds": 1, "cents": 1}'
    json_type = {"Content_Type": "application/json"}
    cases = [
        (good, json_type, 400, "idempotency-key-missing"),
        (good, json_type | {"Idempotency_Key": "x" * 300}, 400, "idempotency-key-invalid"),
        (good[:-5], json_type | {"Idempotency_Key": '"bad"'}, 400, "malformed-json"),
        (good.replace(b"9", b'"nine"'), json_type | {"Idempotency_Key": '"bad"'}, 422, "validation"),
        (good + b" " * 600_000, json_type | {"Idempotency_Key": '"bad"'}, 413, "body-too-large"),
    ]
    for body, headers, status, name in cases:
        got = running.ask("POST", "/orders", body, **headers)
        assert (got.status, got.body["type"]) == (status, f"/errors/{name}")
        assert got.body["detail"] or got.body["title"]


def test_the_database_down_at_the_start_and_in_mid_run(tmp_path: Path, postgres: PostgresServer) -> None:
    """Orders are taken meanwhile; the sinks wait, say what for, and then catch up. Nothing is parked."""
    database = postgres.new_database()
    postgres.kill()
    try:
        with Deployment("semel.examples.shop:app", tmp_path, environment={"SHOP_DATABASE": database}) as running:
            running.wait_ready()
            assert running.post("/orders", "first", ORDER).status == 201
            until(lambda: "waits, nothing is lost" in running.log.read_text(), "the sinks say what they wait for")
            postgres.start()
            until(lambda: rows(database, "SELECT orders, cds FROM customer_totals") == [(1, 2)], "the first order")
            postgres.kill()
            assert running.post("/orders", "second", ORDER | {"id": 2}).status == 201
            until(lambda: running.log.read_text().count("waits, nothing is lost") >= 2)
            postgres.start()
            until(lambda: rows(database, "SELECT orders, cds FROM customer_totals") == [(2, 4)], "the second order")
            until(lambda: rows(database, "SELECT sum(taken) FROM stock") == [(4,)], "its items")
            assert running.rows("park", "list", "semel.examples.shop:app") == []
            assert running.stop() == 0
    finally:
        if not is_up(postgres):
            postgres.start()
    log = running.log.read_text()
    assert "Traceback" not in log
    assert re.search(r"waits, nothing is lost: .*127\.0\.0\.1", log), "it names the database"


def is_up(server: PostgresServer) -> bool:
    try:
        socket.create_connection(("127.0.0.1", server.port), 1).close()
    except OSError:
        return False
    return True


def test_listings_with_a_database_that_is_not_there(tmp_path: Path) -> None:
    database = "postgresql://user:secret@127.0.0.1:1/shop"
    variables = {"SHOP_DATABASE": database}
    text = message(semel("park", "list", "semel.examples.shop:app", cwd=tmp_path, env=variables), code=1)
    assert "127.0.0.1" in text
    assert "secret" not in text
    text = message(semel("migrate", database, cwd=tmp_path), code=1)
    assert "127.0.0.1" in text
    assert "secret" not in text

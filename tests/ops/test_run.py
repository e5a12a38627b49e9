"""`semel run`: an order by hand, what the listings show of it, keys that cannot be processed, and an orderly end."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ops.deployment import Answer, Deployment, run_semel, until
from tests.services.postgres import PostgresServer, missing_postgres

SHOP = "semel.examples.shop:app"
ORDER = {"id": 1, "customer_id": "00001", "cds": 3, "cents": 2976}

POISON = """
import os
import msgspec
from semel import App, Created

class Job(msgspec.Struct, frozen=True):
    name: str
    size: int

app = App("jobs")
jobs = app.topic("jobs", key=str, value=Job)
done = app.topic("done", key=str, value=Job)
SCHEMA = "CREATE TABLE IF NOT EXISTS done (name TEXT NOT NULL, size INTEGER NOT NULL CHECK (size >= 0));"

@app.post("/jobs", request=Job)
def take(job: Job):
    yield jobs.record(job.name, job)
    return Created({})

@app.processor(jobs)
def work(record):
    if record.value.name == "indigestible":
        raise RuntimeError("this job cannot be done")
    yield done.record(record.key, record.value)

def note(records, db):
    db.executemany("INSERT INTO done (name, size) VALUES (?, ?)", [(r.value.name, r.value.size) for r in records])

for number, url in enumerate(os.environ["JOBS_DATABASES"].split()):
    app.sink(done, app.database(url, schema=SCHEMA, name=f"database{number}"), name=f"note{number}")(note)
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Two HTTP instances on one port and two workers; the first order is through."""
    folder = tmp_path_factory.mktemp("shop")
    with Deployment(SHOP, folder, "--http", "2", "--workers", "2") as running:
        running.wait_ready()
        # The groups may still be meeting: until then the answer is 202.
        until(lambda: running.post("/orders", "warm", ORDER | {"customer_id": "warm"}).status == 201)
        yield running


def query(path: Path, sql: str) -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(path, timeout=10)
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


def taken(folder: Path) -> int:
    try:
        return int(query(folder / "shop.db", "SELECT COALESCE(SUM(taken), 0) FROM stock")[0][0])
    except sqlite3.OperationalError:
        return 0  # The tables are made by the sinks.


def test_an_order_is_answered_once_and_again_and_becomes_rows(shop: Deployment) -> None:
    first = shop.post("/orders", "first", ORDER)
    assert (first.status, first.body) == (201, {"order": 1})
    assert "idempotency-replayed" not in first.headers
    again = shop.post("/orders", "first", ORDER)
    assert (again.status, again.body) == (201, {"order": 1})
    assert again.headers["idempotency-replayed"] == "true"
    assert shop.post("/orders", "first", {**ORDER, "cds": 4}).status == 422
    until(lambda: taken(shop.folder) == 6, "three CDs taken from stock, and those of the first order of all")
    mine = "SELECT * FROM customer_totals WHERE customer_id = '00001'"
    # Another sink than the one of the stock, so its rows may come later.
    until(lambda: query(shop.folder / "shop.db", mine) == [("00001", 1, 3, 2976)], "the order in the totals")


def test_the_status_file_tells_what_runs(shop: Deployment) -> None:
    children = shop.children()
    assert sorted(children) == ["broker", "http-0", "http-1", "worker-0", "worker-1"]
    assert {child["state"] for child in children.values()} == {"running"}
    for child in children.values():
        os.kill(child["pid"], 0)


def test_the_listings_find_the_embedded_broker_by_themselves(shop: Deployment) -> None:
    shop.post("/orders", "listed", {**ORDER, "id": 3})
    topics = shop.rows("topics")
    orders = [row for row in topics if row["topic"] == "orders"]
    assert [row["partition"] for row in orders] == [0, 1, 2, 3]
    assert sum(row["end"] for row in orders) >= 2
    assert all(row["start"] <= row["stable"] <= row["end"] for row in topics)
    assert "LAST" not in shop.semel("topics").splitlines()[0]
    assert shop.semel("topics").splitlines()[0].split() == ["TOPIC", "PARTITION", "START", "STABLE", "END"]
    transactions = shop.rows("txn", "list")
    ids = {row["transactional_id"].rpartition(".")[0].rpartition(".")[0] for row in transactions}
    assert {"shop.requests", "shop.reserve"} <= ids
    assert shop.rows("txn", "list", "--state", "Dead") == []
    assert shop.rows("park", "list", SHOP) == []


def test_the_guarantee_report_names_every_edge(shop: Deployment) -> None:
    edges = shop.rows("guarantees", SHOP)
    assert [edge["edge"] for edge in edges] == [
        "POST /orders -> shop.requests",
        "orders -> reserve",
        "orders -> customer_totals (SQLite)",
        "inventory -> stock (SQLite)",
    ]
    assert all(edge["exactly_once"] and edge["atomic_unit"] and edge["fence"] and edge["dedup"] for edge in edges)
    assert [reason.split(" ")[:3] for reason in edges[0]["weakened"]] == [
        ["a", "group", "without"],
        ["responses", "are", "shared"],
    ]
    text = shop.semel("guarantees", SHOP)
    assert "one database transaction: effects, position, owner epoch" in text
    assert "weakened  POST /orders" in text
    assert "was not asked" not in text, "the running broker was asked for its transaction version"


def test_a_second_run_on_the_same_folder_is_refused(shop: Deployment) -> None:
    """It would have the same transactional ids: both would fence each other for ever."""
    done = run_semel("run", SHOP, "--listen", "127.0.0.1:0", cwd=shop.folder)
    assert done.returncode == 2
    assert "in use by another semel run" in done.stderr
    assert str(shop.process.pid) in done.stderr
    assert shop.is_ready()
    assert shop.rows("topics"), "the first one's files are as they were"


def test_one_page_shows_the_metrics_of_every_process(shop: Deployment) -> None:
    key = "metrics"
    assert shop.post("/orders", key, {**ORDER, "id": 2}).status == 201

    def committed() -> float:
        series = 'semel_transactions_total{{process="worker-{}",component="requests",outcome="committed"}}'
        page = shop.metrics()
        return sum(page.get(series.format(slot), 0.0) for slot in (0, 1))

    until(lambda: committed() >= 1, "a committed transaction of a worker")
    page = shop.ask("GET", "/metrics").body
    assert page.count("# TYPE semel_transactions_total counter") == 1
    until(lambda: labels(shop, "process") == {"http-0", "http-1", "worker-0", "worker-1"}, "four processes on the page")
    wanted = {"semel_open_transaction_age_seconds", "semel_parked_keys", "semel_lag_records"}
    until(lambda: wanted <= {series.partition("{")[0] for series in shop.metrics()}, "lag is measured")


def labels(running: Deployment, name: str) -> set[str]:
    return {series.split(f'{name}="')[1].split('"')[0] for series in running.metrics()}


def test_when_one_instance_dies_the_other_answers_on_the_same_port(shop: Deployment) -> None:
    victim = shop.children()["http-0"]["pid"]
    os.kill(victim, signal.SIGKILL)
    refused = 0
    for number in range(20):
        try:
            assert shop.post("/orders", f"after-{number}", {**ORDER, "id": 100 + number}).status == 201
        except OSError:
            refused += 1  # Given to the dying one by the kernel; nothing of it was answered.
            assert shop.post("/orders", f"after-{number}", {**ORDER, "id": 100 + number}).status == 201
    assert refused <= 2
    until(lambda: shop.children()["http-0"]["pid"] not in (None, victim), "http-0 starts again")


def test_sigterm_drains_and_a_new_start_remembers(shop: Deployment) -> None:
    """Every order that was answered is there after the next start, once; its key is still known."""
    answers: dict[int, Answer] = {}
    stopping = threading.Event()

    def order(start: int) -> None:
        for number in range(start, start + 100_000):
            if stopping.is_set():
                return
            try:
                answers[number] = shop.post("/orders", f"n{number}", drained(number))
            except OSError:
                return  # It does not listen any more.

    threads = [threading.Thread(target=order, args=(start,)) for start in (100_000, 200_000)]
    for thread in threads:
        thread.start()
    until(lambda: sum(answer.status == 201 for answer in list(answers.values())) >= 20)
    began = time.monotonic()
    assert shop.stop() == 0
    assert time.monotonic() - began < 15
    stopping.set()
    for thread in threads:
        thread.join()
    assert {child["state"] for child in shop.children().values()} == {"stopped"}
    assert not (shop.folder / ".semel" / "kafka.address").exists()
    assert "Traceback" not in shop.log.read_text()
    accepted = {number for number, answer in answers.items() if answer.status == 201}
    assert {answer.status for answer in answers.values()} <= {201, 503}, "who was let in got an answer"
    with Deployment(SHOP, shop.folder, "--workers", "2") as running:
        running.wait_ready()
        number = min(accepted)
        until(lambda: running.post("/orders", f"n{number}", drained(number)).status == 201)
        again = running.post("/orders", f"n{number}", drained(number))
        assert again.headers["idempotency-replayed"] == "true"
        sql = "SELECT COALESCE(SUM(orders), 0) FROM customer_totals WHERE customer_id = 'drained'"
        until(lambda: query(shop.folder / "shop.db", sql)[0][0] >= len(accepted), "every answered order is there")
        assert query(shop.folder / "shop.db", sql)[0][0] <= len(answers)
        assert running.stop() == 0


def drained(number: int) -> dict[str, object]:
    return {"id": number, "customer_id": "drained", "cds": 1, "cents": 100}


def test_a_key_that_cannot_be_processed_waits_visibly_and_the_others_flow(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """In a processor, which parks it in a topic, and in sinks, which park it in their databases."""
    urls = [f"sqlite:///{tmp_path / 'jobs.db'}"]
    if not missing_postgres():
        server: PostgresServer = request.getfixturevalue("postgres")
        urls.append(server.new_database())
    (tmp_path / "jobs.py").write_text(POISON)
    with Deployment("jobs:app", tmp_path, environment={"JOBS_DATABASES": " ".join(urls)}) as running:
        running.wait_ready()
        until(lambda: running.post("/jobs", "warm", {"name": "good", "size": 0}).status == 201)
        sent = [("indigestible", 1), ("good", 1), ("negative", -1), ("negative", 2), ("indigestible", 2), ("good", 2)]
        for number, (name, size) in enumerate(sent):
            assert running.post("/jobs", f"job-{number}", {"name": name, "size": size}).status == 201
        parked = 2 + 2 * len(urls)
        until(lambda: len(running.rows("park", "list", "jobs:app")) == parked, f"{parked} parked records")
        rows = running.rows("park", "list", "jobs:app")
        head, behind = (row for row in rows if row["key"] == "indigestible")
        assert "RuntimeError" in head["error"]
        assert head["message"] == "this job cannot be done"
        assert "waits behind" in behind["error"]
        assert head["offset"] < behind["offset"]
        for number in range(len(urls)):
            sink = f"jobs.note{number}"
            head, behind = (row for row in rows if (row["key"], row["component"]) == ("negative", sink))
            assert "size" in head["message"] or "CHECK" in head["message"]
            assert "waits behind" in behind["error"]
        assert "this job cannot be done" in running.semel("park", "list", "jobs:app")
        assert running.post("/jobs", "job-later", {"name": "good", "size": 3}).status == 201
        all_good = [("good", 0), ("good", 1), ("good", 2), ("good", 3)]
        until(lambda: all(noted(url) == all_good for url in urls), "other keys flow")
        until(lambda: parked_keys(running) == 1 + len(urls), "all are seen from outside")
        assert running.stop() == 0


def parked_keys(running: Deployment) -> float:
    return sum(value for series, value in running.metrics().items() if "parked_keys{" in series)


def noted(url: str) -> list[tuple[str, int]]:
    sql = "SELECT name, size FROM done ORDER BY name, size"
    if url.startswith("sqlite"):
        return query(Path(url.removeprefix("sqlite:///")), sql)
    import psycopg

    with psycopg.connect(url) as connection:
        return connection.execute(sql).fetchall()


def test_what_requires_exactly_once_and_cannot_have_it_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "loose.py").write_text(
        "import msgspec\n"
        "from semel import App\n"
        "class Order(msgspec.Struct):\n"
        "    id: int\n"
        'app = App("loose", require="exactly-once")\n'
        'orders = app.topic("orders", value=Order)\n'
        '@app.post("/orders", request=Order, require_key=False)\n'
        "def place(order):\n"
        '    yield orders.record("k", order)\n'
    )
    done = run_semel("run", "loose:app", cwd=tmp_path)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("semel: ")]
    assert len(lines) == 1
    assert "POST /orders" in lines[0]
    assert "require_key=False" in lines[0]
    assert not (tmp_path / ".semel").exists(), "nothing was begun"
    [edge] = json.loads(run_semel("guarantees", "loose:app", "--format", "json", cwd=tmp_path).stdout)
    assert edge["exactly_once"] is False

"""How the tables of an outbox and an inbox grow beside a transaction that is open all the time: `python -m
bench.outbox_growth --messages 1000000`.

Messages go from a table on PostgreSQL through Kafka into a sink with an inbox in the same database. The old transaction
keeps every row that is deleted from being removed. Prints the size of each table in bytes, now and then.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import psycopg
from tests.services.broker import BrokerProcess
from tests.services.postgres import PostgresServer

from semel.databases import Database, connect
from semel.env import wall_ms
from semel.outbox.records import NewRow, inserts, new_message_id
from semel.outbox.rows import shard_of

APP = """
import os
from semel import App, Inbox
app = App("growth")
told = app.topic("told", key=bytes, value=bytes, partitions=4)
db = app.database(os.environ["GROWTH_DATABASE"], outbox=True, schema=\"\"\"
    CREATE TABLE IF NOT EXISTS seen (id SMALLINT PRIMARY KEY, n BIGINT NOT NULL);
    INSERT INTO seen VALUES (1, 0) ON CONFLICT DO NOTHING;\"\"\")
@app.sink(told, db, dedup=Inbox())
def take(records, db):
    db.execute("UPDATE seen SET n = n + ? WHERE id = 1", (len(records),))
"""
BEHIND_MAX = 20_000
"""Messages that are written and not applied: a service that is busy, and not one that falls behind."""
START_SECONDS = 120.0


def sizes(database: Database) -> dict[str, int]:
    found = database.query(
        "SELECT relname, pg_total_relation_size(oid) FROM pg_class WHERE relname LIKE 'semel%' AND relkind = 'r'"
    )
    inbox = sum(size for name, size in found if name.startswith("semel_inbox"))
    return {name: size for name, size in found if not name.startswith("semel_inbox")} | {"inbox, all days": inbox}


def applied(database: Database) -> int:
    return int(database.query("SELECT n FROM seen WHERE id = 1")[0][0])


def write(database: Database, first: int, count: int) -> None:
    rows = []
    for number in range(first, first + count):
        key, msg_id = b"k%d" % (number % 10_000), str(new_message_id(wall_ms()))
        rows.append(NewRow(shard_of(key, msg_id), msg_id, "told", key, b"x" * 150, "[]", wall_ms()))
    database.begin()
    for statement in inserts(rows):
        database.execute(*statement)
    database.commit()


def until_ready(database: Database, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            database.query("SELECT 1 FROM semel_outbox, seen LIMIT 1")
            return
        except psycopg.errors.UndefinedTable:
            if time.monotonic() > deadline:
                raise RuntimeError(log.read_text()[-3_000:]) from None
            time.sleep(0.2)


def run(url: str, messages: int, log: Path) -> None:
    database = connect(url)
    until_ready(database, log)
    with psycopg.connect(url, autocommit=True) as old:
        old.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        old.execute("SELECT 1 FROM pg_class LIMIT 1")
        step = max(1_000, messages // 20 // 1_000 * 1_000)
        for first in range(0, messages, 1_000):
            while first - applied(database) > BEHIND_MAX:
                time.sleep(0.1)
            write(database, first, 1_000)
            if first % step == 0:
                print(first, json.dumps(sizes(database)), flush=True)
        while applied(database) < messages:
            time.sleep(0.5)
        assert applied(database) == messages
        old.execute("SELECT 1")  # It is still there.
        old.execute("ROLLBACK")
    print("everything is applied, once", json.dumps(sizes(database)), flush=True)
    database.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=1_000_000)
    options = parser.parse_args()
    postgres = PostgresServer()
    postgres.start()
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "growth_app.py").write_text(APP)
        broker = BrokerProcess(folder / "broker")
        broker.start()
        url = postgres.new_database()
        environment = os.environ | {"GROWTH_DATABASE": url, "SEMEL_KAFKA": broker.bootstrap}
        environment |= {
            "SEMEL_DATA": str(folder / "data"),
            "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}",
        }
        argv = [sys.executable, "-m", "semel", "run", "growth_app:app", "--workers", "1", "--http", "1"]
        with (folder / "log").open("wb") as log:
            service = subprocess.Popen([*argv, "--listen", "127.0.0.1:0"], env=environment, stdout=log, stderr=log)
        try:
            run(url, options.messages, folder / "log")
        finally:
            service.terminate()
            service.wait()
            broker.stop()
            postgres.stop()


if __name__ == "__main__":
    main()

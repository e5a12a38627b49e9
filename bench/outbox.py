"""The relay beside the poller that one writes by hand, in one run: `python -m bench.outbox`.

The poller is at-least-once: SELECT ... FOR UPDATE SKIP LOCKED, produce (confluent-kafka), flush, DELETE, COMMIT. Both
drain the same backlog, and then the same trickle of single rows, for the latency from COMMIT to a read_committed
reader. Rates of one run may be compared with each other, and with nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import time
import uuid
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.services.broker import BrokerProcess
from tests.services.postgres import PostgresServer

from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.client.consumer import Reader
from semel.databases import Database, connect
from semel.outbox.rows import shard_of
from semel.outbox.tables import schema_sql
from semel.outbox.waking import CHANNEL
from semel.types import TopicPartition

PARTITIONS = 4
POLLER = """
import os, sys, time
import psycopg
from confluent_kafka import Producer
dsn, bootstrap, topic = sys.argv[1:4]
db = psycopg.connect(dsn); cur = db.cursor(binary=True); errors = []
producer = Producer({"bootstrap.servers": bootstrap, "enable.idempotence": True, "linger.ms": 5})
def answered(error, _):
    if error: errors.append(error)
while True:
    rows = cur.execute("SELECT seq, record_key, record_value FROM poller_outbox ORDER BY seq LIMIT 1000 "
                       "FOR UPDATE SKIP LOCKED").fetchall()
    if rows:
        for _, key, value in rows: producer.produce(topic, value, key, on_delivery=answered)
        assert producer.flush(30) == 0 and not errors, errors
        cur.execute("DELETE FROM poller_outbox WHERE seq = ANY(%s)", ([row[0] for row in rows],))
    db.commit()
    if not rows: time.sleep(0.01)
"""
POLLER_TABLE = "CREATE TABLE poller_outbox (seq BIGSERIAL PRIMARY KEY, record_key BYTEA, record_value BYTEA)"


def fill(database: Database, who: str, topic: str, first: int, count: int) -> None:
    values = [b'{"id": %d, "pad": "%s"}' % (number, b"x" * 140) for number in range(first, first + count)]
    keys = [b"k%d" % (number % 10_000) for number in range(first, first + count)]
    database.begin()
    if who == "poller":
        sql = "INSERT INTO poller_outbox (record_key, record_value) VALUES (?, ?)"
        database.executemany(sql, zip(keys, values, strict=True))
    else:
        sql = (
            "INSERT INTO semel_outbox (shard, msg_id, topic, record_key, record_value, headers, created_at) "
            "VALUES (?, ?, ?, ?, ?, '[]', ?)"
        )
        now = time.time_ns() // 1_000_000
        ids = [str(uuid.uuid4()) for _ in values]
        rows = zip(ids, keys, values, strict=True)
        database.executemany(sql, [(shard_of(key, item), item, topic, key, value, now) for item, key, value in rows])
    database.commit()


async def observe(bootstrap: str, topic: str, count: int) -> dict[int, int]:
    """When each record was seen, in nanoseconds, by its number."""
    reader, seen, deadline = Reader(bootstrap), {}, time.monotonic() + 180
    await reader.start({TopicPartition(topic, number): 0 for number in range(PARTITIONS)})
    while len(seen) < count and time.monotonic() < deadline:
        batch = await reader.poll(5_000, 0.5)
        now = time.time_ns()
        for record in batch.records:
            seen.setdefault(json.loads(record.value or b"")["id"], now)
    await reader.close()
    return seen


def start(who: str, url: str, bootstrap: str, topic: str, app: str, folder: Path) -> subprocess.Popen[bytes]:
    argv = ["-c", POLLER, url, bootstrap, topic]
    if who == "semel":
        argv = ["-m", "tests.outbox.relay_child", bootstrap, url, str(folder), app, "0"]
    return subprocess.Popen([sys.executable, *argv], stderr=(folder / f"{who}.log").open("wb"))


async def measure(who: str, url: str, bootstrap: str, folder: Path, backlog: int, trickle: int) -> dict[str, object]:
    topic, app = f"bench-{uuid.uuid4().hex[:8]}", f"bench{uuid.uuid4().hex[:6]}"
    async with KafkaClient(bootstrap) as client:
        await Admin(client).create_topics({topic: TopicSpec(PARTITIONS)})
    database, caller = connect(url), connect(url)
    database.migrate(schema_sql("PostgreSQL") if who == "semel" else POLLER_TABLE)
    fill(database, who, topic, 0, backlog)
    database.execute("ANALYZE")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = start(who, url, bootstrap, topic, app, folder)
    seen = await observe(bootstrap, topic, backlog)
    times = sorted(seen.values())
    found: dict[str, object] = {"who": who, "seen": len(seen)}
    found["rows_s"] = round((len(times) - 1) / max(1e-9, (times[-1] - times[0]) / 1e9))
    watching = asyncio.create_task(observe(bootstrap, topic, backlog + trickle))
    await asyncio.sleep(2)  # It has read what was there.
    written: dict[int, int] = {}
    for number in range(backlog, backlog + trickle):
        await asyncio.to_thread(fill, database, who, topic, number, 1)
        written[number] = time.time_ns()
        await asyncio.to_thread(caller.execute, f'NOTIFY "{CHANNEL}"')
        await asyncio.sleep(0.02)
    seen = await watching
    late = sorted((seen[number] - at) / 1e6 for number, at in written.items() if number in seen)
    found |= {"p50_ms": round(late[len(late) // 2], 1), "p99_ms": round(late[int(len(late) * 0.99)], 1)}
    process.terminate()
    process.wait()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found["cpu_us_row"] = round(
        (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / (backlog + trickle) * 1e6, 1
    )
    database.close()
    caller.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--trickle", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kafka", default="", help="default: an embedded broker of its own")
    options = parser.parse_args()
    os.environ.setdefault("SEMEL_INSTANCE", "bench")
    postgres = PostgresServer()
    postgres.start()
    with TemporaryDirectory() as folder:
        broker = None if options.kafka else BrokerProcess(Path(folder) / "broker")
        if broker is not None:
            broker.start()
        bootstrap = options.kafka or (broker.bootstrap if broker else "")
        try:
            for _ in range(options.rounds):
                for who in ("poller", "semel"):
                    url = postgres.new_database()
                    work = measure(who, url, bootstrap, Path(folder), options.rows, options.trickle)
                    print(json.dumps(asyncio.run(work)), flush=True)
        finally:
            if broker is not None:
                broker.stop()
            postgres.stop()


if __name__ == "__main__":
    main()

"""The relay beside the poller that one writes by hand, in one run: `python -m bench.outbox`.

The poller is at-least-once: SELECT ... FOR UPDATE SKIP LOCKED, produce (confluent-kafka), flush, DELETE, COMMIT. With
`--faststream PYTHON` (an interpreter that has faststream[confluent], faststream-outbox, sqlalchemy, asyncpg) that
library's relay is measured too. Each has published one row and is stopped; then the backlog is written, and it goes on.
After that comes a trickle of single rows, for the latency from COMMIT to a read_committed reader. Rates of one run may
be compared with each other, and with nothing else; processor time, of all processes that take part, also on a machine
that does other things.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
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


FASTSTREAM = """
import asyncio, sys
from sqlalchemy import MetaData
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from faststream import FastStream
from faststream.confluent import KafkaBroker
from faststream_outbox import OutboxBroker, make_outbox_table
url, bootstrap, topic, first, count = *sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5])
metadata = MetaData(); table = make_outbox_table(metadata, table_name="faststream_outbox")
engine = create_async_engine(url.replace("postgresql://", "postgresql+asyncpg://"), pool_size=20)
outbox = OutboxBroker(engine, outbox_table=table, logger=None)
kafka = KafkaBroker(bootstrap, logger=None, acks="all")
@kafka.publisher(topic)
@outbox.subscriber("rows", max_workers=8, fetch_batch_size=100, terminal_flush_batch_size=100)
async def relay(body: dict) -> dict:
    return body
async def make():
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
async def fill():
    await make()
    async with async_sessionmaker(engine)() as session, session.begin():
        for number in range(first, first + count):
            await outbox.publish({"id": number, "pad": "x" * 140}, queue="rows", session=session)
    await engine.dispose()
async def start():
    await make(); await kafka.connect(); await kafka.start()
asyncio.run(fill() if count else FastStream(outbox, logger=None, on_startup=[start]).run())
"""
TABLES = {"semel": schema_sql("PostgreSQL"), "poller": POLLER_TABLE, "faststream": ""}


@dataclass
class Bench:
    """One candidate on a database and a topic of its own."""

    who: str
    url: str
    bootstrap: str
    folder: Path
    python: str = sys.executable
    topic: str = field(default_factory=lambda: f"bench-{uuid.uuid4().hex[:8]}")

    def start(self) -> subprocess.Popen[bytes]:
        argv = ["-c", POLLER, self.url, self.bootstrap, self.topic]
        if self.who == "semel":
            app = f"bench{uuid.uuid4().hex[:6]}"
            argv = ["-m", "tests.outbox.relay_child", self.bootstrap, self.url, str(self.folder), app, "0"]
        elif self.who == "faststream":
            argv = ["-c", FASTSTREAM, self.url, self.bootstrap, self.topic, "0", "0"]
        return subprocess.Popen([self.python, *argv], stderr=(self.folder / f"{self.who}.log").open("wb"))

    def fill(self, database: Database, first: int, count: int) -> None:
        if self.who == "faststream":
            argv = [self.python, "-c", FASTSTREAM, self.url, self.bootstrap, self.topic, str(first), str(count)]
            subprocess.run(argv, check=True)
            return
        values = [b'{"id": %d, "pad": "%s"}' % (number, b"x" * 140) for number in range(first, first + count)]
        keys = [b"k%d" % (number % 10_000) for number in range(first, first + count)]
        database.begin()
        if self.who == "poller":
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
            database.executemany(
                sql, [(shard_of(key, item), item, self.topic, key, value, now) for item, key, value in rows]
            )
        database.commit()


def cpu_seconds(*pids: int) -> float:
    """Processor time of these processes and of the children that they have now."""
    total = 0.0
    for pid in pids:
        found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
        for each in (pid, *map(int, found.stdout.split())):
            with suppress(FileNotFoundError):
                fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
                total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


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


async def measure(bench: Bench, servers: list[int], backlog: int, trickle: int) -> dict[str, object]:
    async with KafkaClient(bench.bootstrap) as client:
        await Admin(client).create_topics({bench.topic: TopicSpec(PARTITIONS)})
    database, caller = connect(bench.url), connect(bench.url)
    if TABLES[bench.who]:
        database.migrate(TABLES[bench.who])
    bench.fill(database, 0, 1)
    process = bench.start()
    await observe(bench.bootstrap, bench.topic, 1)
    process.send_signal(signal.SIGSTOP)
    bench.fill(database, 1, backlog)
    database.execute("ANALYZE")
    before, began = cpu_seconds(process.pid, *servers), time.time_ns()
    process.send_signal(signal.SIGCONT)
    caller.execute(f'NOTIFY "{CHANNEL}"')
    watching = asyncio.create_task(observe(bench.bootstrap, bench.topic, backlog + 1))
    seen = await watching
    spent = cpu_seconds(process.pid, *servers) - before
    found: dict[str, object] = {"who": bench.who, "seen": len(seen) - 1}
    found["rows_s"] = round(backlog / ((max(seen.values()) - began) / 1e9))
    found["cpu_us_row"] = round(spent / backlog * 1e6, 1)
    if trickle:
        found |= await latency(bench, database, caller, backlog + 1, trickle)
    process.terminate()
    process.wait()
    database.close()
    caller.close()
    return found


async def latency(bench: Bench, database: Database, caller: Database, first: int, count: int) -> dict[str, object]:
    watching = asyncio.create_task(observe(bench.bootstrap, bench.topic, first + count))
    await asyncio.sleep(2)  # It has read what was there.
    written: dict[int, int] = {}
    for number in range(first, first + count):
        await asyncio.to_thread(bench.fill, database, number, 1)
        written[number] = time.time_ns()
        await asyncio.to_thread(caller.execute, f'NOTIFY "{CHANNEL}"')
        await asyncio.sleep(0.02)
    seen = await watching
    late = sorted((seen[number] - at) / 1e6 for number, at in written.items() if number in seen)
    return {"p50_ms": round(late[len(late) // 2], 1), "p99_ms": round(late[int(len(late) * 0.99)], 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--trickle", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kafka", default="", help="default: an embedded broker of its own")
    parser.add_argument("--faststream", default="", metavar="PYTHON", help="measure faststream-outbox, a tenth of it")
    options = parser.parse_args()
    os.environ.setdefault("SEMEL_INSTANCE", "bench")
    postgres = PostgresServer()
    postgres.start()
    with TemporaryDirectory() as folder:
        broker = None if options.kafka else BrokerProcess(Path(folder) / "broker")
        if broker is not None:
            broker.start()
        bootstrap = options.kafka or (broker.bootstrap if broker else "")
        servers = [postgres.pid, *([broker.pid] if broker is not None else [])]
        try:
            for _ in range(options.rounds):
                for who in ("poller", "semel", *(["faststream"] if options.faststream else [])):
                    python = options.faststream if who == "faststream" else sys.executable
                    bench = Bench(who, postgres.new_database(), bootstrap, Path(folder), python)
                    # Its single rows would be written by a process each.
                    trickle = 0 if who == "faststream" else options.trickle
                    backlog = options.rows // 10 if who == "faststream" else options.rows
                    print(json.dumps(asyncio.run(measure(bench, servers, backlog, trickle))), flush=True)
        finally:
            if broker is not None:
                broker.stop()
            postgres.stop()


if __name__ == "__main__":
    main()

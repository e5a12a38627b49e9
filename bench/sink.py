"""The SQL sink beside the loop that one writes by hand, in one run: `python -m bench.sink`.

Both add up amounts by account in PostgreSQL, a thousand rows a transaction, with one `unnest` statement and the
position in the same transaction. The loop reads with confluent-kafka and msgspec. Rows a second are taken from the
database, from the first commit that is seen to the last; processor time is that of the whole process, its start left
out. Figures of one run may be compared with each other, and with nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.services.broker import BrokerProcess
from tests.services.postgres import PostgresServer

from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.client.producer import TransactionalProducer
from semel.databases import connect
from semel.wire.records import BatchBuilder

PARTITIONS = 4
ACCOUNTS = 10_000
ROWS = 1_000
UPSERT = (
    "INSERT INTO balances AS b SELECT acct, sum(amt) FROM unnest({}::text[], {}::bigint[]) AS s (acct, amt) "
    "GROUP BY acct ORDER BY acct ON CONFLICT (acct) DO UPDATE SET bal = b.bal + excluded.bal"
)
TABLES = """
CREATE TABLE balances (acct TEXT PRIMARY KEY, bal NUMERIC NOT NULL);
CREATE TABLE offs (part INT PRIMARY KEY, off BIGINT NOT NULL);
"""


def by_hand(bootstrap: str, url: str, topic: str) -> None:
    """The loop of `../shared/bench`, with msgspec: exactly once, as long as nobody else runs it."""
    import msgspec
    import psycopg
    from confluent_kafka import Consumer, TopicPartition

    db = psycopg.connect(url)
    cursor = db.cursor()
    decode = msgspec.json.Decoder(Paid).decode
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": "by-hand",
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
            "fetch.queue.backoff.ms": 5,
        }
    )
    consumer.assign([TopicPartition(topic, part, 0) for part in range(PARTITIONS)])
    while True:
        messages = consumer.consume(ROWS, 1.0)
        if not messages:
            continue
        offsets = {message.partition(): message.offset() + 1 for message in messages}
        paid = [decode(message.value()) for message in messages]
        cursor.execute(UPSERT.format("%s", "%s"), ([each.acct for each in paid], [each.amt for each in paid]))
        cursor.executemany(
            "INSERT INTO offs VALUES (%s, %s) ON CONFLICT (part) DO UPDATE SET off = excluded.off",
            list(offsets.items()),
        )
        db.commit()


def ours(bootstrap: str, url: str, topic: str) -> None:
    """A user's sink, and the engine that runs it in every worker."""
    from semel.app import App
    from semel.env import Env
    from semel.processing.metrics import Metrics
    from semel.processing.worker import Worker
    from semel.settings import Settings
    from semel.sinks.engine import SinkEngine

    app = App("sinkbench")
    paid = app.topic(topic, key=str, value=Paid)
    database = app.database(url)

    @app.sink(paid, database, name="balances")
    def balances(records: Any, db: Any) -> None:
        values = [record.value for record in records]
        db.execute(UPSERT.format("?", "?"), ([each.acct for each in values], [each.amt for each in values]))

    settings = Settings(data=Path(os.environ["SEMEL_DATA"]))
    engine = SinkEngine("sinkbench", app.sinks["balances"], bootstrap, settings, Env(), Metrics(), slot=0)
    asyncio.run(Worker({"balances": engine}).run())


async def fill(bootstrap: str, topic: str, count: int) -> None:
    async with KafkaClient(bootstrap) as client:
        await Admin(client).create_topics({topic: TopicSpec(PARTITIONS)})
        producer = TransactionalProducer(client, f"{topic}.filler")
        await producer.init_transactions()
        now_ms = int(time.time() * 1000)
        for first in range(0, count, 20_000):
            builders = [BatchBuilder() for _ in range(PARTITIONS)]
            for number in range(first, min(count, first + 20_000)):
                account = b"a%d" % (number * 2_654_435_761 % ACCOUNTS)
                value = b'{"acct":"%s","amt":%d,"note":"%s"}' % (account, number % 100, b"x" * 140)
                builders[number % PARTITIONS].append(account, value, now_ms, ())
            producer.begin()
            for part, builder in enumerate(builders):
                await producer.produce(topic, part, builder)
            await producer.end_transaction(True)
        await producer.close()


def measure(who: str, url: str, bootstrap: str, topic: str, count: int, folder: str) -> dict[str, float | str]:
    database = connect(url)
    database.migrate(TABLES)
    wanted = sum(number % 100 for number in range(count))
    argv = [sys.executable, "-m", "bench.sink", who, bootstrap, url, topic]
    environment = os.environ | {"SEMEL_DATA": f"{folder}/{uuid.uuid4().hex}", "SEMEL_INSTANCE": "bench"}
    process = subprocess.Popen(argv, env=environment)
    first: tuple[float, float, float] | None = None
    deadline = time.monotonic() + 300
    try:
        while True:
            [(done,)] = database.query("SELECT COALESCE(sum(bal), 0) FROM balances")
            now, used = time.monotonic(), cpu_seconds(process.pid)
            if done and first is None:
                first = now, used, float(done)
            if done == wanted:
                break
            assert now < deadline, f"{who}: {done} of {wanted}"
            time.sleep(0.02)
    finally:
        process.terminate()
        process.wait()
        database.close()
    assert first is not None
    rows = count * (1 - first[2] / wanted)
    return {
        "who": who,
        "rows_s": round(rows / (now - first[0])),
        "cpu_us_row": round((used - first[1]) / rows * 1e6, 2),
    }


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kafka", default="", help="default: an embedded broker of its own")
    options = parser.parse_args()
    postgres = PostgresServer()
    postgres.start()
    with TemporaryDirectory() as folder:
        broker = None if options.kafka else BrokerProcess(Path(folder) / "broker")
        if broker is not None:
            broker.start()
        bootstrap = options.kafka or (broker.bootstrap if broker else "")
        topic = f"paid-{uuid.uuid4().hex[:8]}"
        try:
            asyncio.run(fill(bootstrap, topic, options.rows))
            for _ in range(options.rounds):
                for who in ("by_hand", "ours"):
                    found = measure(who, postgres.new_database(), bootstrap, topic, options.rows, folder)
                    print(json.dumps(found), flush=True)
        finally:
            if broker is not None:
                broker.stop()
            postgres.stop()


if __name__ == "__main__":
    import msgspec

    class Paid(msgspec.Struct):
        """One record's value; the note is there for its size."""

        acct: str
        amt: int
        note: str

    if len(sys.argv) > 1 and sys.argv[1] in ("by_hand", "ours"):
        {"by_hand": by_hand, "ours": ours}[sys.argv[1]](*sys.argv[2:])
    else:
        main()

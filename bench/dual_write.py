"""Four ways to tell of a payment that is in a database, in one run: `python -m bench.dual_write`.

    database   the rows alone, nobody is told: what the others are measured by
    outbox     the record is a row, which a relay brings into Kafka
    dual       the record is in Kafka, prepared, before COMMIT (KIP-939)
    2pc        PREPARE TRANSACTION in two PostgreSQL databases, a decision in a log, COMMIT PREPARED in both

64 requests at a time, each on one of 10,000 accounts: throughput, p50 and p99 of a request, for how long the account's
row is locked, and the CPU of the app's process (the relay, the broker and the server have their own). Then who
coordinates is killed in the middle: for how long another request waits for the same account, and readers of the topic
for what comes behind. Figures of one run may be compared with each other, and with nothing else. The 2pc way is
measured without a second system behind it: its records stay in the second database.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.services.broker import BrokerProcess
from tests.services.postgres import PostgresServer

from semel import App
from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.databases import Database, connect
from semel.dualwrite.tables import schema_sql as dual_schema
from semel.failpoints import arm_failpoints
from semel.outbox.tables import schema_sql as outbox_schema
from semel.types import TopicPartition

ACCOUNTS, PARTITIONS, THREADS = 10_000, 4, 64
PATIENCE_SECONDS, WARM_SECONDS = 5.0, 6.0
WAYS = ("database", "outbox", "dual", "2pc")
TOPIC = "paid"
_SCHEMA = f"""
CREATE TABLE account (id BIGINT PRIMARY KEY, balance BIGINT NOT NULL);
CREATE TABLE payment (id TEXT PRIMARY KEY, account BIGINT NOT NULL);
CREATE TABLE decision (gid TEXT PRIMARY KEY);
INSERT INTO account SELECT n, 0 FROM generate_series(0, {ACCOUNTS - 1}) AS n;
"""
Pay = Callable[[int, str], float]
"""Pay into an account under an id; for how many seconds the account's row was locked."""
Step = Callable[[str], None]


def change(run: Callable[..., Any], account: int, payment: str) -> float:
    """The business of a request; when the row was locked."""
    run("UPDATE account SET balance = balance + 1 WHERE id = ?", (account,))
    locked = time.perf_counter()
    run("INSERT INTO payment (id, account) VALUES (?, ?)", (payment, account))
    return locked


def by_app(url: str, **options: Any) -> tuple[App, Pay]:
    app = App("bench")
    paid = app.topic(TOPIC, key=str, value=str)
    bank = app.database(url, connections=THREADS, **options)

    def pay(account: int, payment: str) -> float:
        with app.transaction(bank) as tx:
            locked = change(tx.execute, account, payment)
            tx.send(paid.record(str(account), payment))
        return time.perf_counter() - locked

    return app, pay


def by_database(url: str) -> Pay:
    own = threading.local()

    def pay(account: int, payment: str) -> float:
        if not hasattr(own, "database"):
            own.database = connect(url)
        own.database.begin()
        locked = change(own.database.execute, account, payment)
        own.database.commit()
        return time.perf_counter() - locked

    return pay


def by_two_phases(url: str, other: str, step: Step = lambda _: None) -> Pay:
    own = threading.local()

    def pay(account: int, payment: str) -> float:
        if not hasattr(own, "here"):
            own.here, own.there, own.log = connect(url), connect(other), connect(url)
        own.here.begin()
        locked = change(own.here.execute, account, payment)
        own.there.begin()
        own.there.execute("INSERT INTO payment (id, account) VALUES (?, ?)", (payment, account))
        for name, database in (("here", own.here), ("there", own.there)):
            database.execute(f"PREPARE TRANSACTION '{payment} {name}'")
        step("prepared")
        own.log.execute("INSERT INTO decision (gid) VALUES (?)", (payment,))
        for name, database in (("here", own.here), ("there", own.there)):
            database.execute(f"COMMIT PREPARED '{payment} {name}'")
        return time.perf_counter() - locked

    return pay


class Stage:
    """The servers, and a fresh pair of databases for each way."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.postgres = PostgresServer()
        with (self.postgres.data / "postgresql.conf").open("a") as settings:
            settings.write("max_connections = 300\nmax_prepared_transactions = 300\n")
        self.postgres.start()
        self.broker: BrokerProcess

    def way(self, name: str) -> tuple[str, Pay, Callable[[], None]]:
        """The database's URL, how to pay, and how to end; each time on a broker and databases of its own."""
        folder = self.folder / f"{name}-{time.monotonic_ns()}"
        folder.mkdir()
        self.broker = BrokerProcess(folder / "broker")
        self.broker.start()
        asyncio.run(self._make_topic())
        url, other = self.new_database(), self.new_database()
        os.environ["SEMEL_KAFKA"] = self.broker.bootstrap
        if name == "database":
            return url, by_database(url), self.broker.stop
        if name == "2pc":
            return url, by_two_phases(url, other), self.broker.stop
        app, pay = by_app(url, outbox=name == "outbox", dual_write=name == "dual")
        relay: subprocess.Popen[bytes] | None = None
        if name == "outbox":
            argv = ["-m", "tests.outbox.relay_child", self.broker.bootstrap, url, str(folder), "bench", "0"]
            relay = subprocess.Popen([sys.executable, *argv], stderr=(folder / "relay.log").open("wb"))

        def end() -> None:
            app.close()
            if relay is not None:
                relay.terminate()
                relay.wait()
            self.broker.stop()

        return url, pay, end

    def new_database(self) -> str:
        url = self.postgres.new_database()
        database = connect(url)
        database.migrate(_SCHEMA + outbox_schema("PostgreSQL") + dual_schema("PostgreSQL"))
        database.close()
        return url

    async def _make_topic(self) -> None:
        async with KafkaClient(self.broker.bootstrap) as client:
            await Admin(client).create_topics({TOPIC: TopicSpec(PARTITIONS)})

    async def readers_wait(self) -> bool:
        """Whether something open holds up those who read only what is committed."""
        at = [TopicPartition(TOPIC, number) for number in range(PARTITIONS)]
        async with KafkaClient(self.broker.bootstrap) as client:
            admin = Admin(client)
            return await admin.list_offsets(at, "stable") != await admin.list_offsets(at, "high_watermark")


# --- Without faults ---


def throughput(stage: Stage, name: str, seconds: float, threads: int) -> dict[str, object]:
    _, pay, end = stage.way(name)
    took: list[tuple[float, float]] = []
    done = [0] * threads
    stop = time.perf_counter() + seconds + WARM_SECONDS  # Connections are made, slots are claimed.

    def work(number: int) -> None:
        rng, count = random.Random(number), 0
        while (began := time.perf_counter()) < stop:
            locked = pay(rng.randrange(ACCOUNTS), f"p-{number}-{count}")
            done[number] = count = count + 1
            if began > stop - seconds:
                took.append((time.perf_counter() - began, locked))

    cpu = time.process_time()
    running = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    cpu = time.process_time() - cpu
    end()
    requests, locks = sorted(item[0] for item in took), sorted(item[1] for item in took)
    return {
        "way": name,
        "requests_s": round(len(took) / seconds),
        "p50_ms": round(1e3 * requests[len(took) // 2], 1),
        "p99_ms": round(1e3 * requests[int(len(took) * 0.99)], 1),
        "lock_p50_ms": round(1e3 * locks[len(took) // 2], 1),
        "lock_p99_ms": round(1e3 * locks[int(len(took) * 0.99)], 1),
        "app_cpu_ms": round(1e3 * cpu / sum(done), 2),
    }


# --- Who coordinates dies ---

DEATHS = {
    "database": ("before COMMIT", "kill"),
    "outbox": ("before COMMIT", "transaction.before_commit:kill:1"),
    "dual": ("prepared in Kafka, before COMMIT", "dual.before_commit:kill:1"),
    "dual, decided": ("after COMMIT, Kafka not told", "dual.after_commit:kill:1"),
    "2pc": ("prepared in both, nothing decided", "kill"),
}


def die(name: str, pay: Pay, url: str, failpoint: str) -> None:
    """A child that pays into account 0 and is killed on its way."""
    if os.fork() == 0:
        arm_failpoints("" if failpoint == "kill" else failpoint)
        if name == "database":
            database = connect(url)
            database.begin()
            change(database.execute, 0, "dead")
            os.kill(os.getpid(), signal.SIGKILL)
        pay(0, "dead")
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGKILL


def death(stage: Stage, title: str) -> dict[str, object]:
    name = title.split(",")[0]
    url, pay, end = stage.way(name)
    where, failpoint = DEATHS[title]
    if name == "2pc":
        pay = by_two_phases(url, stage.new_database(), lambda _: os.kill(os.getpid(), signal.SIGKILL))
    die(name, pay, url, failpoint)
    found: dict[str, object] = {"way": title, "dies": where}
    look = connect(url)
    found["same_account_waits_s"] = waited(look)
    if name == "2pc":
        stage.postgres.restart()
        look = connect(url)
        found["after_a_restart_of_the_database_s"] = waited(look)
        for (gid,) in look.query("SELECT gid FROM pg_prepared_xacts WHERE database = current_database()"):
            look.execute(f"ROLLBACK PREPARED '{gid}'")
    if name == "dual":
        began = time.perf_counter()
        pay(1, "next")  # Another process of the app, which finds the slot of the dead one.
        while asyncio.run(stage.readers_wait()):
            assert time.perf_counter() - began < 60
            time.sleep(0.01)
        found["readers_wait_after_another_is_there_s"] = round(time.perf_counter() - began, 2)
    look.close()
    end()
    return found


def waited(look: Database) -> object:
    """How long another request waits for the account."""
    began = time.perf_counter()
    look.execute(f"SET lock_timeout = '{PATIENCE_SECONDS:g}s'")
    try:
        look.execute("UPDATE account SET balance = balance + 1 WHERE id = 0")
    except Exception as error:
        if "lock timeout" not in str(error):
            raise
        return f"not within {PATIENCE_SECONDS:g}"
    return round(time.perf_counter() - began, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--ways", default=",".join(WAYS))
    options = parser.parse_args()
    os.environ["SEMEL_INSTANCE"] = "bench"
    print(json.dumps({"load": os.getloadavg(), "cores": os.cpu_count()}), flush=True)
    with TemporaryDirectory() as folder:
        stage = Stage(Path(folder))
        try:
            ways = options.ways.split(",")
            for _ in range(options.rounds):
                for name in ways:
                    print(json.dumps(throughput(stage, name, options.seconds, options.threads)), flush=True)
            for title in DEATHS:
                if title.split(",")[0] in ways:
                    print(json.dumps(death(stage, title)), flush=True)
        finally:
            stage.postgres.stop()


if __name__ == "__main__":
    main()

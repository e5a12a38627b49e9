"""The processes of a chain, forked from one that has everything imported: starting Python takes longer than a case.

Started as `python -m tests.failpoints.children` it reads one command a line and answers with a number: `fork` a role
(the pid), `wait` for one (its exit code). A role writes how often it passed each failpoint when it ends by itself.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

import semel.broker.broker
import semel.broker.internal
import semel.databases.sqlite
import semel.ingress.purge
import semel.log.log
import semel.processing.engine
import semel.processing.stores
import semel.processing.watermarks
import semel.sinks.engine
from semel import App, Created, Inbox, Problem
from semel.broker.broker import serve
from semel.broker.config import BrokerConfig
from semel.databases.sqlite import SqliteDatabase
from semel.env import Env
from semel.errors import Fenced, OutcomeUnknown
from semel.failpoints import arm_failpoints, failpoint_hits
from semel.ingress.asgi import create
from semel.ingress.server import bind
from semel.ingress.server import serve as serve_http
from semel.ops.children import _prepare, _purging, _runnables
from semel.processing import EXIT_FENCED
from semel.processing.heartbeat import Heartbeat
from semel.processing.metrics import Metrics
from semel.processing.overdue import Overdue
from semel.processing.watermarks import Watermarks
from semel.processing.worker import Worker
from semel.settings import Settings
from tests.two_phase.writer import Plan
from tests.two_phase.writer import run as run_writer

PARTITIONS = 2
PATIENT_MS = 15_000
"""Session, transaction and delivery time-outs: on a busy machine nothing times out that was not struck."""
SHORT_MS = 3_000
"""The same where a case waits for a time-out."""
SEGMENT_BYTES = 1_500
DRAIN_SECONDS = 2.0
ITEMS = 2
"""Effects of an order."""


class Order(msgspec.Struct):
    id: int
    customer: str


class Item(msgspec.Struct):
    id: int
    position: int
    customer: str
    number: int
    """Which order of its customer this is, counted in the processor's state."""


def make_app(database: Path) -> App:
    """Orders come in by HTTP, are counted by customer, and each ends as two rows.

    The customer decides what goes wrong: `p...` fails in the processor, `q...` in the sink, `r...` is refused. `t...`
    fails in the processor and `u...` in the sink, as long as the file `closed` stands beside the database.
    """
    closed = database.with_name("closed")
    app = App("fp", request_partitions=PARTITIONS)
    orders: Any = app.topic("orders", value=Order, partitions=PARTITIONS)
    items: Any = app.topic("items", value=Item, partitions=PARTITIONS)
    trail: Any = app.topic("trail", value=Order, partitions=1)
    latest: Any = app.topic("latest", value=Order, partitions=1)
    seen = app.state("seen", key=str, value=int)
    schema = "CREATE TABLE IF NOT EXISTS ledger (id BIGINT, position BIGINT);"  # Without a key: a double is a row.
    schema += "CREATE TABLE IF NOT EXISTS totals (customer TEXT PRIMARY KEY, items BIGINT NOT NULL)"
    store = app.database(f"sqlite:///{database}", schema=schema)

    @app.post("/orders", request=Order, timeout_seconds=3.0)
    def place(order: Order) -> Any:
        if order.customer.startswith("r"):
            raise Problem(422, "not this customer")
        yield orders.record(order.customer, order)
        return Created({"order": order.id})

    @app.processor(orders, state=seen)
    def count(record: Any, seen: Any) -> Any:
        order = record.value
        if order.customer.startswith("p") or (order.customer.startswith("t") and closed.exists()):
            raise ValueError("a customer that the processor cannot count")
        number = seen.get(order.customer, 0) + 1
        yield seen.put(order.customer, number)
        yield trail.record(order.customer, order)
        yield latest.record(order.customer[:2], order)
        for position in range(ITEMS):
            yield items.record(order.customer, Item(order.id, position, order.customer, number))

    known = Inbox(id=lambda record: f"{record.value.id}-{record.value.position}", at=lambda record: record.timestamp_ms)

    @app.sink(items, store, dedup=known)
    def ledger(records: Any, db: Any) -> None:
        bad = "qu" if closed.exists() else "q"
        if any(record.value.customer[0] in bad for record in records):
            raise ValueError("a customer that the sink does not take")
        rows = [(record.value.id, record.value.position) for record in records]
        db.executemany("INSERT INTO ledger (id, position) VALUES (?, ?)", rows)
        db.executemany(
            "INSERT INTO totals VALUES (?, 1) ON CONFLICT (customer) DO UPDATE SET items = totals.items + 1",
            [(record.value.customer,) for record in records],
        )

    return app


def settings_for(order: dict[str, Any]) -> Settings:
    limit_ms = SHORT_MS if order.get("short") else PATIENT_MS
    return Settings(
        kafka=order["kafka"],
        data=Path(order["folder"]) / "data",
        instance="chain",
        partitions=PARTITIONS,
        session_timeout_ms=limit_ms,
        transaction_timeout_ms=limit_ms,
        commit_interval_ms=20,
        drain_seconds=DRAIN_SECONDS,
        kafka_client={
            "delivery.timeout.ms": str(limit_ms),
            "reconnect.backoff.ms": "10",
            "reconnect.backoff.max.ms": "100",
        },
    )


def _shorten_times() -> None:
    """What happens once in minutes in production happens in every case here."""
    semel.broker.broker.EXPIRE_SECONDS = 0.5
    semel.broker.internal.CHECKPOINT_BYTES = 4_000
    semel.log.log.SNAPSHOT_BATCHES = 64
    semel.ingress.purge.PURGE_SECONDS = 0.5
    semel.processing.engine.PARK_LOOK_SECONDS = 0.1
    semel.sinks.engine.PARK_LOOK_SECONDS = 0.1
    semel.processing.watermarks.WRITE_SECONDS = 0.3
    vars(semel.processing.stores)["STATE_FRESH_SECONDS"] = 0.05
    vars(semel.databases.sqlite)["LOCK_WAIT_SECONDS"] = 0.5


def _doubt() -> None:
    """Let the answer of every fourth COMMIT get lost: the rows are there, and nobody was told."""
    commit, count = SqliteDatabase.commit, [0]

    def lose(database: SqliteDatabase) -> None:
        commit(database)
        count[0] += 1
        if count[0] % 4 == 0:
            database.close()
            raise OutcomeUnknown("the answer of COMMIT was lost on its way")

    vars_of: Any = SqliteDatabase
    vars_of.commit = lose


async def _broker(order: dict[str, Any]) -> None:
    config = BrokerConfig(
        fsync="always", segment_bytes=SEGMENT_BYTES, transaction_sweep_seconds=0.5, cleaner_backoff_seconds=0.3
    )
    task = asyncio.ensure_future(serve(Path(order["folder"]) / "broker", order["kafka"], config))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with suppress(asyncio.CancelledError):
        await task


async def _http(order: dict[str, Any]) -> None:
    ingress = create(make_app(Path(order["folder"]) / "rows.db"), settings_for(order))
    await serve_http(ingress, bind("127.0.0.1", order["port"]), drain_seconds=DRAIN_SECONDS)


async def _worker(order: dict[str, Any]) -> None:
    app, settings, env = make_app(Path(order["folder"]) / "rows.db"), settings_for(order), Env()
    settings.data.mkdir(exist_ok=True)
    await _prepare(app, settings, env)
    watermarks = Watermarks(settings.data, f"worker-{order['slot']}")
    runnables = _runnables(app, settings, env, Metrics(), watermarks, Overdue(settings.data), order["slot"])
    worker = Worker(runnables, drain_seconds=DRAIN_SECONDS, heartbeat=Heartbeat(None))
    async with watermarks.written(), _purging(app, settings, env):
        await worker.run()


def _run(order: dict[str, Any]) -> int:
    if order["role"] == "writer":
        return run_writer(Plan(**order["plan"]))
    roles: dict[str, Any] = {"broker": _broker, "http": _http, "worker": _worker}
    work: Coroutine[Any, Any, None] = roles[order["role"]](order)
    try:
        asyncio.run(work)
    except Fenced as error:
        logging.error("FENCED %s", error)
        return EXIT_FENCED
    return 0


def _live(order: dict[str, Any]) -> int:
    os.setsid()  # As under the supervisor: a session of its own, which is also what Linux shares processor time among.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, log), (2, log)):
        os.dup2(source, target)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    _shorten_times()
    if order.get("doubt"):
        _doubt()
    arm_failpoints(order["arm"])
    try:
        return _run(order)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        Path(order["hits"]).write_text(json.dumps(failpoint_hits()))


def main() -> None:
    """Answer commands until the pipe ends; then every child is killed."""
    living: set[int] = set()
    for line in sys.stdin:
        order = json.loads(line)
        answer = 0
        if order["do"] == "fork":
            sys.stdout.flush()
            answer = os.fork()
            if not answer:
                code = 1
                try:
                    code = _live(order)
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            living.add(answer)
        else:
            answer = os.waitstatus_to_exitcode(os.waitpid(order["pid"], 0)[1])
            living.discard(order["pid"])
        print(json.dumps(answer), flush=True)
    for pid in living:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()

"""The dual write of KIP-939 as a process that can die anywhere: a Kafka and a database transaction, both or neither.

Started as `python -m tests.two_phase.writer` it forks writers and brokers on demand, processes of their own: starting
Python takes longer than what they do before they are killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psycopg

from semel.broker.broker import serve
from semel.client.cluster import KafkaClient
from semel.client.connection import Connection
from semel.client.producer import TransactionalProducer
from semel.errors import Fenced, OutcomeUnknown, Retriable, SemelError
from semel.failpoints import arm_failpoints
from semel.wire.records import BatchBuilder
from tests.moment import NOW_MS

TRANSACTIONAL_ID = "dual-write"
TOPIC = "dual"
END_TXN = 26
FENCED, AWAY = 75, 3
"""Exit codes: another owner took over; Kafka or the database did not answer, so the next process finds out."""
SETTINGS = {"socket.timeout.ms": 3_000, "delivery.timeout.ms": 15_000, "reconnect.backoff.ms": 10}


@dataclass(frozen=True)
class Plan:
    """What a writer does: recover, then so many transactions (-1: until it dies), and what happens to it where."""

    bootstrap: str
    database: str
    report: str
    transactions: int = -1
    crash_at: str = ""
    crash_nth: int = 1
    crash_by: int = int(signal.SIGKILL)
    """SIGSTOP makes a zombie of it instead."""
    freeze: int = 0
    """A process to stop between the database's COMMIT and EndTxn: the broker, so that the request never arrives."""


class Database:
    """The state row and the business rows, in SQLite (`sqlite:///file`) or PostgreSQL."""

    def __init__(self, url: str) -> None:
        self._is_sqlite = url.startswith("sqlite:///")
        self._db: Any
        if self._is_sqlite:
            self._db = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None, timeout=30)
        else:
            self._db = psycopg.connect(url, autocommit=True)

    def run(self, sql: str, *arguments: object) -> list[tuple[Any, ...]]:
        cursor = self._db.execute(sql if self._is_sqlite else sql.replace("?", "%s"), arguments)
        return list(cursor.fetchall()) if cursor.description else []

    def begin(self) -> None:
        self.run("BEGIN IMMEDIATE" if self._is_sqlite else "BEGIN")

    def create(self) -> None:
        if self._is_sqlite:
            self.run("PRAGMA journal_mode = WAL")
        self.run("CREATE TABLE kafka_txn (id TEXT PRIMARY KEY, prepared TEXT NOT NULL, owner_epoch BIGINT NOT NULL)")
        self.run("CREATE TABLE ledger (token TEXT PRIMARY KEY, prepared TEXT NOT NULL)")
        self.run("INSERT INTO kafka_txn VALUES (?, '', 0)", TRANSACTIONAL_ID)

    def raise_fence(self) -> tuple[int, str]:
        """Step 2: after this, no predecessor's database transaction can commit, and what did is seen."""
        self.begin()
        [(owner_epoch, prepared)] = self.run(
            "UPDATE kafka_txn SET owner_epoch = owner_epoch + 1 WHERE id = ? RETURNING owner_epoch, prepared",
            TRANSACTIONAL_ID,
        )
        self.run("COMMIT")
        return owner_epoch, prepared

    def decide(self, owner_epoch: int, prepared: str, token: str, crash: Crash) -> bool:
        """Steps 5 and 6: business rows and the name of the Kafka transaction, if we are still the owner."""
        self.begin()
        mine = self.run(
            "UPDATE kafka_txn SET prepared = ? WHERE id = ? AND owner_epoch = ? RETURNING 1",
            prepared,
            TRANSACTIONAL_ID,
            owner_epoch,
        )
        if not mine:
            self.run("ROLLBACK")
            return False
        self.run("INSERT INTO ledger VALUES (?, ?)", token, prepared)
        crash.point("deciding")
        crash.soon("committing")
        self.run("COMMIT")
        return True

    def state(self) -> tuple[str, dict[str, str]]:
        """What is remembered as decided, and the business rows."""
        [(prepared,)] = self.run("SELECT prepared FROM kafka_txn")
        return prepared, {str(token): str(name) for token, name in self.run("SELECT token, prepared FROM ledger")}

    def close(self) -> None:
        self._db.close()


class Crash:
    """kill -9 (or a stop) of ourselves at a named point, the nth time that it is passed."""

    def __init__(self, plan: Plan) -> None:
        self._by = plan.crash_by
        self._at, self._left = plan.crash_at, plan.crash_nth

    def _due(self, name: str) -> bool:
        if name != self._at:
            return False
        self._left -= 1
        return self._left == 0

    def point(self, name: str) -> None:
        if self._due(name):
            os.kill(os.getpid(), self._by)

    def soon(self, name: str) -> None:
        """Die while the next statement is on its way: whether it happened is the database's to say."""
        if self._due(name):
            wait = int.from_bytes(os.urandom(2), "big") / 65_536 * 0.002

            def kill() -> None:
                time.sleep(wait)
                os.kill(os.getpid(), signal.SIGKILL)

            threading.Thread(target=kill).start()

    def after_send(self) -> None:
        """Let EndTxn reach the socket, and die before its answer can be read."""
        plain = Connection.send

        def send(connection: Connection, api_key: int, version: int, /, **fields: Any) -> Any:
            future = plain(connection, api_key, version, **fields)
            if api_key == END_TXN and self._due("sent"):
                time.sleep(0.05)
                os.kill(os.getpid(), signal.SIGKILL)
            return future

        Connection.send = send  # type: ignore[method-assign]


def report(plan: Plan, **what: object) -> None:
    with open(plan.report, "a") as file:
        file.write(json.dumps({"pid": os.getpid(), **what}) + "\n")


def part(token: str) -> BatchBuilder:
    builder = BatchBuilder()
    builder.append(None, token.encode(), NOW_MS)
    return builder


async def write(plan: Plan) -> int:
    """The recipe (Kafka facts 3.4, semantics 3.10). Every step may be the last one."""
    crash = Crash(plan)
    crash.after_send()
    database = Database(plan.database)
    async with KafkaClient(plan.bootstrap, settings=SETTINGS) as client:
        producer = TransactionalProducer(client, TRANSACTIONAL_ID, two_phase_commit=True)
        await producer.init_transactions(keep_prepared=True)
        crash.point("initialised")
        owner_epoch, decided = database.raise_fence()
        ongoing = str(producer.prepared_state)
        committed = await producer.complete(decided)
        report(plan, ongoing=ongoing, decided=decided, committed=committed)
        crash.point("recovered")
        left = plan.transactions
        while left:
            left -= 1
            token = uuid.uuid4().hex
            producer.begin()
            await producer.produce(TOPIC, 0, part(token))
            await producer.flush()
            crash.point("begun")
            await producer.produce(TOPIC, 1, part(token))
            prepared = await producer.prepare()
            crash.point("prepared")
            if not database.decide(owner_epoch, str(prepared), token, crash):
                raise Fenced(f"owner epoch {owner_epoch} is over")
            crash.point("decided")
            if plan.freeze:
                os.kill(plan.freeze, signal.SIGSTOP)
            await producer.complete(prepared)
            crash.point("completed")
        await producer.close()
    database.close()
    return 0


def run(plan: Plan) -> int:
    """Write, and turn how it ended into an exit code."""
    try:
        return asyncio.run(write(plan))
    except Fenced as error:
        report(plan, fenced=str(error))
        return FENCED
    except (Retriable, OutcomeUnknown) as error:
        report(plan, away=str(error))
        return AWAY
    except SemelError as error:
        report(plan, error=f"{type(error).__name__}: {error}")
        return 1


def run_broker(data: str, listen: str, failpoints: str) -> int:
    """The embedded broker, as `semel broker` runs it."""
    arm_failpoints(failpoints)
    asyncio.run(serve(Path(data), listen))
    return 0


# --- The process that forks ---


def _fork(work: Callable[[], int]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)  # The pipes of the commands are the parent's.
        os.dup2(nothing, 1)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """One command a line: start a writer or broker, signal one, wait for one (or look: null while it runs)."""
    for line in sys.stdin:
        command = json.loads(line)
        answer: int | None = None
        match command["do"]:
            case "start":
                answer = _fork(partial(run, Plan(**command["plan"])))
            case "broker":
                answer = _fork(partial(run_broker, command["data"], command["listen"], command["failpoints"]))
            case "signal":
                os.kill(command["pid"], command["signal"])
            case "wait":
                pid, status = os.waitpid(command["pid"], 0 if command["block"] else os.WNOHANG)
                answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), flush=True)


__all__ = ["AWAY", "FENCED", "TOPIC", "TRANSACTIONAL_ID", "Database", "Plan", "asdict"]

if __name__ == "__main__":
    main()

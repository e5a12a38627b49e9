"""The model of PostgreSQL against a real one: the same random programs give the same results, errors and waiting.

Two sessions, one statement at a time. A third would make races of it: who of two waiters comes first is PostgreSQL's
to choose. The model runs a program first, so that each step of the real one has something definite to wait for.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import Any, NamedTuple

import psycopg
import pytest

from tests.services.postgres import PostgresServer
from tests.simulation.model_postgres import ModelServer, Result

pytestmark = pytest.mark.postgres

PROGRAMS = 200
SOAK_PROGRAMS = 10_000
STEPS = 16
PATIENCE_SECONDS = 60.0
SCHEMA = """
CREATE TABLE IF NOT EXISTS t (k TEXT PRIMARY KEY, v BIGINT NOT NULL);
CREATE TABLE IF NOT EXISTS log (e TEXT);
"""
STATEMENTS: tuple[tuple[str, str], ...] = (
    *(("BEGIN", ""),) * 3,
    *(("COMMIT", ""),) * 2,
    ("ROLLBACK", ""),
    ("SAVEPOINT s", ""),
    ("ROLLBACK TO SAVEPOINT s", ""),
    ("RELEASE SAVEPOINT s", ""),
    *(("UPDATE t SET v = v + %s WHERE k = %s", "vk"),) * 8,
    *(("UPDATE t SET v = %s WHERE k = %s AND v = %s", "vkv"),) * 2,
    ("UPDATE t SET v = %s", "v"),
    *(("INSERT INTO t (k, v) VALUES (%s, %s)", "kv"),) * 3,
    ("INSERT INTO t (k, v) VALUES (%s, NULL)", "k"),
    *(("INSERT INTO t (k, v) VALUES (%s, %s) ON CONFLICT (k) DO NOTHING", "kv"),) * 2,
    *(("INSERT INTO t (k, v) VALUES (%s, %s) ON CONFLICT (k) DO UPDATE SET v = t.v + excluded.v RETURNING v", "kv"),)
    * 4,
    ("SELECT k, v FROM t ORDER BY k", ""),
    ("SELECT COUNT(*), SUM(v) FROM t WHERE v > %s", "v"),
    *(("SELECT v FROM t WHERE k = %s FOR UPDATE", "k"),) * 3,
    *(("DELETE FROM t WHERE k = %s", "k"),) * 2,
    ("INSERT INTO log (e) VALUES (%s)", "k"),
    ("SELECT COUNT(*) FROM log", ""),
    ("SELECT 1 FROM missing", ""),
)


class Outcome(NamedTuple):
    """Of one statement; `code` is an SQLSTATE, empty when it worked."""

    code: str
    status: str = ""
    rows: tuple[tuple[Any, ...], ...] | None = None


class Step(NamedTuple):
    """What is to be done, and which outcomes come before the next step: of this session's, or of both."""

    session: int
    sql: str
    parameters: Sequence[Any]
    outcomes: dict[int, Outcome]


def written(seed: int) -> tuple[list[Step], list[tuple[Any, ...]]]:
    """A program with all that the model says of it, and the rows that it leaves."""
    rng = random.Random(f"program {seed}")
    server = ModelServer()
    sessions = [server.connect(), server.connect()]
    sessions[0].execute(SCHEMA, (), lambda result, error: None)
    steps: list[Step] = []
    due: dict[int, Outcome] = {}

    def run(number: int, sql: str, parameters: Sequence[Any]) -> None:
        def done(result: Result | None, error: psycopg.Error | None) -> None:
            rows = None if result is None or result.rows is None else tuple(result.rows)
            due[number] = Outcome("" if error is None else error.sqlstate or "?", result.status if result else "", rows)

        due.clear()
        if sql == "terminate":
            sessions[number].terminate()
            sessions[number] = server.connect()
        else:
            sessions[number].execute(sql, parameters, done)
        steps.append(Step(number, sql, parameters, dict(due)))

    run(0, "INSERT INTO t (k, v) VALUES ('a', 1)", ())
    if rng.random() < 0.8:  # Else most programs would never get two transactions to meet.
        run(0, "BEGIN", ())
        run(1, "BEGIN", ())
    for _ in range(STEPS):
        number = rng.choice([at for at, session in enumerate(sessions) if not session.is_waiting])
        sql, kinds = rng.choice(STATEMENTS) if rng.random() < 0.98 else ("terminate", "")
        run(number, sql, [rng.choice("abc") if kind == "k" else rng.randint(0, 2) for kind in kinds])
    for number in sorted(range(2), key=lambda at: sessions[at].is_waiting):
        run(number, "ROLLBACK", ())
    return steps, sorted((row["k"], row["v"]) for row in server.committed("t"))


class Sessions:
    """Two sessions of a real server, each with a thread."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._admin = psycopg.connect(url, autocommit=True)
        self._threads = [ThreadPoolExecutor(1) for _ in range(2)]
        self._admin.execute("SET client_min_messages = error")
        self._admin.execute(SCHEMA)
        self._connections = [self._connect(), self._connect()]

    def _connect(self) -> psycopg.Connection[tuple[Any, ...]]:
        connection = psycopg.connect(self._url, autocommit=True)
        # The deadlock of a step is looked for before the next one begins, so the victim is known.
        connection.execute("SET deadlock_timeout = '1ms'")
        return connection

    def close(self) -> None:
        for thread in self._threads:
            thread.shutdown()
        for connection in [self._admin, *self._connections]:
            connection.close()

    def clear(self) -> None:
        self._admin.execute("TRUNCATE t, log")

    def rows(self) -> list[tuple[Any, ...]]:
        return self._admin.execute("SELECT k, v FROM t ORDER BY k").fetchall()

    def begin(self, number: int, sql: str, parameters: Sequence[Any]) -> Future[Outcome]:
        connection = self._connections[number]

        def run() -> Outcome:
            try:
                cursor = connection.execute(sql, list(parameters) or None)
            except psycopg.Error as error:
                return Outcome(error.sqlstate or "?")
            rows = None if cursor.description is None else tuple(cursor.fetchall())
            return Outcome("", cursor.statusmessage or "", rows)

        return self._threads[number].submit(run)

    def terminate(self, number: int) -> None:
        connection = self._connections[number]
        pid = connection.info.backend_pid
        connection.close()
        self._until("SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = %s", pid, None)
        self._connections[number] = self._connect()

    def until_waiting(self, number: int, running: Future[Outcome]) -> bool:
        """Whether it waits for a lock, for longer than a deadlock is looked for; False when it ended instead."""
        pid = self._connections[number].info.backend_pid
        return self._until(
            "SELECT EXISTS (SELECT 1 FROM pg_locks WHERE pid = %s AND NOT granted "
            "AND clock_timestamp() - waitstart > interval '20 ms')",
            pid,
            running,
        )

    def _until(self, question: str, pid: int, running: Future[Outcome] | None) -> bool:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            if running is not None and running.done():
                return False
            row = self._admin.execute(question, (pid,)).fetchone()
            if row is not None and row[0]:
                return True
            time.sleep(0.002)
        raise AssertionError(f"not within {PATIENCE_SECONDS:g} s: {question}")


def check(sessions: Sessions, seed: int) -> int:
    """Run one program on the server; how often somebody waited."""
    steps, rows = written(seed)
    sessions.clear()
    running: dict[int, Future[Outcome]] = {}
    waits = 0
    for at, step in enumerate(steps):
        told = "\n".join(f"{item.session}: {item.sql} {list(item.parameters)} -> {item.outcomes}" for item in steps)
        where = f"program {seed}, step {at} ({step.session}: {step.sql} {list(step.parameters)})\n{told}\n"
        if step.sql == "terminate":
            sessions.terminate(step.session)
        else:
            running[step.session] = sessions.begin(step.session, step.sql, step.parameters)
        for number, outcome in sorted(step.outcomes.items()):
            done, _ = wait_for([running[number]], PATIENCE_SECONDS)
            assert done, f"{where}the model has {outcome} for session {number}, PostgreSQL waits"
            assert running.pop(number).result() == outcome, where
        for number, future in running.items():
            assert sessions.until_waiting(number, future), f"{where}session {number} has {future.result()}, must wait"
            waits += 1
    assert not running
    assert sessions.rows() == rows, f"program {seed}"
    return waits


def compare(postgres: PostgresServer, start: int, programs: int) -> None:
    sessions = Sessions(postgres.new_database())
    try:
        waits = sum(check(sessions, seed) for seed in range(start, start + programs))
    finally:
        sessions.close()
    assert waits > programs // 4, "programs in which nobody ever waits show little"


def test_random_programs_run_on_the_model_as_on_postgresql(postgres: PostgresServer) -> None:
    compare(postgres, random.SystemRandom().randrange(1 << 40), PROGRAMS)


@pytest.mark.soak
def test_many_random_programs_run_on_the_model_as_on_postgresql(postgres: PostgresServer) -> None:
    compare(postgres, random.SystemRandom().randrange(1 << 40), SOAK_PROGRAMS)


def test_programs_come_to_what_a_sink_can_meet() -> None:
    """Unique and not-null violations, deadlocks, waiting, an error inside a transaction: else they prove little."""
    codes: set[str] = set()
    for seed in range(600):
        steps, _ = written(seed)
        codes |= {outcome.code for step in steps for outcome in step.outcomes.values()}
    assert {"", "23505", "23502", "40P01", "25P02", "42P01"} <= codes

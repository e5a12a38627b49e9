"""A COMMIT without an answer has three possible outcomes; which one it was is read, never guessed."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from semel.errors import OutcomeUnknown
from semel.sinks.contract import Applied, PartitionsLost, Unavailable
from semel.sinks.sql import SqlSink
from tests.services.mariadb import MariadbServer
from tests.services.postgres import PostgresServer
from tests.sinks import ledger
from tests.sinks.cutting_proxy import CuttingProxy, When
from tests.sinks.ledger import a_slice, claim, partition, record


@pytest.fixture(
    params=[pytest.param("postgres", marks=pytest.mark.postgres), pytest.param("mariadb", marks=pytest.mark.mariadb)]
)
def server(request: pytest.FixtureRequest) -> PostgresServer | MariadbServer:
    found: PostgresServer | MariadbServer = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def proxy(server: PostgresServer | MariadbServer) -> Iterator[CuttingProxy]:
    made = CuttingProxy(server.port)
    yield made
    made.close()


@pytest.fixture
def url(server: PostgresServer | MariadbServer) -> str:
    return server.new_database()


def behind(proxy: CuttingProxy, url: str) -> SqlSink:
    sink = ledger.sink(url.replace(f":{url.rpartition(':')[2].partition('/')[0]}/", f":{proxy.port}/"))
    sink.take_over([claim(0), claim(1)])
    return sink


BATCH = [a_slice(record(0, "ann", 5), record(1, "bob", -1)), a_slice(record(0, "eve", 2, 1), part=1)]


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_unanswered_commit_is_settled(url: str, proxy: CuttingProxy, when: When) -> None:
    sink = behind(proxy, url)
    proxy.when = when
    with pytest.raises(Unavailable, match="Whether it was committed will be read"):
        sink.apply(BATCH)
    assert proxy.cuts == 1
    assert len(ledger.seen(url)) == (2 if when == "after" else 0)
    assert sink.apply(BATCH) == Applied(3, 1, 1)  # Done again, or counted from what was found.
    assert ledger.seen(url) == [(0, 0), (1, 0)]
    assert [row[1:3] for row in ledger.parked(url)] == [(1, b"bob")]
    assert sink.position(partition(0)) == 2
    # The parked key is known in both cases.
    sink.apply([a_slice(record(2, "bob", 1))])
    assert [row[1] for row in ledger.parked(url)] == [1, 2]
    sink.close()


def test_a_database_that_stays_away_is_asked_when_it_is_back(url: str, proxy: CuttingProxy) -> None:
    sink = behind(proxy, url)
    proxy.when, proxy.refuse = "after", True
    for _ in range(3):
        with pytest.raises(Unavailable):
            sink.apply(BATCH)
    proxy.refuse = False
    assert sink.apply([]) == Applied(3, 1, 1)
    assert sink.apply(BATCH) == Applied()
    assert ledger.seen(url) == [(0, 0), (1, 0)]
    sink.close()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_zombie_in_doubt_is_fenced_and_keeps_the_rest(url: str, proxy: CuttingProxy, when: When) -> None:
    sink = behind(proxy, url)
    proxy.when = when
    with pytest.raises(Unavailable):
        sink.apply(BATCH)
    heir = ledger.sink(url)
    heir.take_over([claim(0)])
    heir.apply(BATCH)
    with pytest.raises(PartitionsLost) as lost:
        sink.apply(BATCH)
    assert set(lost.value.reasons) == {partition(0)}
    sink.apply(BATCH)
    assert ledger.seen(url) == [(0, 0), (1, 0)]
    assert sink.position(partition(0)) is None
    assert sink.position(partition(1)) == 1
    sink.close()
    heir.close()


@contextmanager
def commits_held(server: PostgresServer | MariadbServer) -> Iterator[None]:
    """Every COMMIT hangs in the server: in synchronous replication, or before a backup."""
    if isinstance(server, PostgresServer):
        set_standby(server, "nobody")
        try:
            yield
        finally:
            set_standby(server, "")
        return
    import pymysql

    with pymysql.connect(host="127.0.0.1", port=server.port, user="root") as admin, admin.cursor() as cursor:
        for stage in ("START", "FLUSH", "BLOCK_DDL", "BLOCK_COMMIT"):
            cursor.execute(f"BACKUP STAGE {stage}")
        yield
        cursor.execute("BACKUP STAGE END")


def set_standby(postgres: PostgresServer, name: str) -> None:
    with psycopg.connect(postgres.url(), autocommit=True) as admin:
        admin.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{name}'")
        admin.execute("SELECT pg_reload_conf()")
        while admin.execute("SHOW synchronous_standby_names").fetchone() != (name,):
            time.sleep(0.01)


def test_a_session_that_is_still_committing_is_waited_for(
    url: str, proxy: CuttingProxy, server: PostgresServer | MariadbServer
) -> None:
    """COMMIT hangs, the connection breaks: the row must not be read as it was before."""
    sink = behind(proxy, url)
    answers: list[Any] = []
    with commits_held(server):
        proxy.when = "at"
        with pytest.raises(Unavailable):
            sink.apply(BATCH)
        settling = threading.Thread(target=lambda: answers.append(sink.apply([])))
        settling.start()
        settling.join(0.5)
        assert settling.is_alive(), "it did not wait for the session that still commits"
    settling.join(20)
    assert answers == [Applied(3, 1, 1)]
    assert ledger.seen(url) == [(0, 0), (1, 0)]
    sink.close()


def test_a_server_that_is_killed_loses_and_doubles_nothing(server: PostgresServer | MariadbServer, url: str) -> None:
    ledger.write_while_it_is_killed(url, server, 0.15)


def test_sqlite_reads_the_file_again_after_a_failed_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = ledger.sink(f"sqlite:///{tmp_path}/sink.db")
    sink.take_over([claim()])
    database = sink._database
    commit = database.commit

    def broken(answered: bool) -> None:
        if answered:
            commit()
        database.close()
        error = sqlite3.OperationalError("disk I/O error")
        raise OutcomeUnknown(f"COMMIT failed: {error}") from error

    for offset, is_written in enumerate([True, False]):
        monkeypatch.setattr(database, "commit", lambda is_written=is_written: broken(is_written))
        with pytest.raises(Unavailable):
            sink.apply([a_slice(record(offset, "ann", 1))])
        monkeypatch.setattr(database, "commit", commit)
        assert sink.apply([a_slice(record(offset, "ann", 1))]).records == 1
    assert ledger.seen(f"sqlite:///{tmp_path}/sink.db") == [(0, 0), (0, 1)]
    sink.close()

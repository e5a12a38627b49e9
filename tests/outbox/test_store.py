"""What operators do to an outbox, and what the relay does to its tables."""

from __future__ import annotations

from typing import Any

import pytest

from semel.databases import Database, connect
from semel.errors import ConfigurationError
from semel.failpoints import FailpointRaised, arm_failpoints
from semel.outbox import store as store_module
from semel.outbox.manifest import RowId
from semel.outbox.rows import MSG_ID_HEADER, SHARDS, OutboxRow, decode_headers, shard_of
from semel.outbox.store import Reading, Settlement, Store
from semel.outbox.tables import read_meta, schema_sql
from semel.outbox.verbs import Operator, Selection, declare_restored, hold, release, republish, status
from semel.types import Record
from tests.outbox.world import insert
from tests.services.mariadb import MariadbServer
from tests.services.postgres import PostgresServer

ME = Operator("me", "because", 1_000)
ALL = list(range(SHARDS))


def write(database: Database, *rows: tuple[str, bytes | None]) -> None:
    insert(database, [(shard_of(key, i), i, "t", key, b"v", "[]", 5) for i, key in rows])


def read(database: Database, without: Any = (), limit: int = 100) -> Reading:
    store = Store(database)
    store.meta = read_meta(database)
    return store.read(ALL, without, limit)


def ids(reading: Reading) -> list[str]:
    return [row.msg_id for row in sorted(reading.rows, key=lambda row: row.seq)]


def test_rows_are_read_within_limits_and_without_those_in_hand(database: Database) -> None:
    write(database, *((f"m{number}", b"k%d" % (number % 7)) for number in range(50)))
    everything = read(database)
    assert ids(everything) == [f"m{number}" for number in range(50)]
    assert not everything.is_full
    assert [row.shard for row in everything.rows] == sorted(row.shard for row in everything.rows)
    part = read(database, limit=10)
    assert part.rows == everything.rows[:10]
    assert part.is_full
    assert part.last == part.rows[-1].shard
    in_hand = {row.seq for row in part.rows}
    assert read(database, without=in_hand).rows == everything.rows[10:]
    late = everything.rows[20]
    beyond = read(database, without={late.seq, *in_hand})
    assert beyond.rows == [row for row in everything.rows[10:] if row != late]


def test_large_rows_are_read_in_their_order_and_not_too_many_at_once(database: Database) -> None:
    """Small ones come first; a large one begins a reading of its own, which ends where it has enough bytes."""
    sizes = [10, 20, 5_000, 30, 3 << 20, 3 << 20, 3 << 20, 10, 5_000, 40]
    for number, size in enumerate(sizes):
        insert(database, [(3, f"m{number}", "t", b"k", b"x" * size, "[]", 5)])
    found: list[OutboxRow] = []
    readings: list[list[int]] = []
    while (reading := read(database, without={row.seq for row in found})).rows:
        found += reading.rows
        readings.append([int(row.msg_id[1:]) for row in reading.rows])
        assert reading.is_full == (len(found) < len(sizes))
    assert readings == [[0, 1], [2, 3, 4, 5, 6], [7], [8, 9]]
    assert [len(bytes(row.value or b"")) for row in found] == sizes
    assert [row.headers for row in found] == ["[]"] * len(sizes)


def test_only_exact_rows_are_deleted(database: Database) -> None:
    """Also when the database went back and gave a number to another message."""
    write(database, ("m1", b"a"), ("m2", b"b"), ("m3", b"c"))
    rows = {row.msg_id: row for row in read(database).rows}
    store = Store(database)
    wrong = [RowId(rows["m1"].shard, rows["m1"].seq, "another"), RowId(rows["m2"].shard, rows["m2"].seq, "m2")]
    assert store.settle([Settlement(3, 0, 7, wrong, None)]) == []
    assert ids(read(database)) == ["m1", "m3"]
    assert database.query("SELECT batch FROM semel_outbox_lane WHERE lane = 3") == [(7,)]


def test_rows_that_moved_since_they_were_read_are_deleted_and_no_others(database: Database) -> None:
    """PostgreSQL deletes where a row was; a row may be elsewhere by then, and another one there."""
    write(database, *((f"m{number}", b"k%d" % number) for number in range(8)))
    store, found = Store(database), {row.msg_id: row for row in read(database).rows}
    database.execute("UPDATE semel_outbox SET held = NULL WHERE msg_id = 'm1'")
    addresses = [found[name].address for name in ("m5", "m1", "m2")]  # m5 is where m0 is said to be.
    rows = [RowId(found[name].shard, found[name].seq, name) for name in ("m0", "m1", "m2")]
    assert store.settle([Settlement(3, 0, 1, rows, None, addresses if all(addresses) else ())]) == []
    assert ids(read(database)) == ["m3", "m4", "m5", "m6", "m7"]


def test_a_former_owner_notes_nothing(database: Database) -> None:
    store = Store(database)
    assert store.acquire([3, 4], "one")[3].owner_epoch == 1
    store.acquire([3], "two")
    assert store.settle([Settlement(3, 1, 5, [], None), Settlement(4, 1, 6, [], "{}")]) == [3]
    found = database.query("SELECT lane, owner, batch, positions FROM semel_outbox_lane WHERE lane IN (3, 4)")
    assert sorted(found) == [(3, "two", 0, None), (4, "one", 6, "{}")]


def test_a_hold_is_about_later_rows_too_and_a_release_keeps_their_order(database: Database) -> None:
    write(database, ("m1", b"a"), ("m2", b"b"), ("m3", b"a"))
    assert hold(database, Selection(key=b"a"), Operator("me", "why", 0, dry_run=True)) == 2
    assert ids(read(database)) == ["m1", "m2", "m3"], "a dry run changes nothing"
    assert hold(database, Selection(msg_id="m1"), ME) == 2
    write(database, ("m4", b"a"), ("m5", None))
    reading = read(database)
    assert ids(reading) == ["m2", "m5"]
    assert [row.msg_id for row in reading.ruled] == ["m4"]
    Store(database).mark(reading.ruled)
    assert read(database).ruled == []
    assert [line["reason"] for line in status(database) if line["what"] == "hold"] == ["because"]
    assert sum(line["held"] for line in status(database) if line["what"] != "hold") == 3
    assert release(database, Selection(topic="t", key=b"a"), ME) == 3
    assert ids(read(database)) == ["m1", "m2", "m3", "m4", "m5"]
    verbs = [verb for (verb,) in database.query("SELECT verb FROM semel_outbox_audit")]
    assert sorted(verbs) == ["hold", "release"]


def test_a_row_read_before_a_release_is_not_marked_after_it(database: Database) -> None:
    write(database, ("m1", b"a"))
    hold(database, Selection(key=b"a"), ME)
    write(database, ("m2", b"a"))
    ruled = read(database).ruled
    release(database, Selection(key=b"a"), ME)
    Store(database).mark(ruled)
    assert ids(read(database)) == ["m1", "m2"]


def test_a_release_leaves_what_another_hold_is_about(database: Database) -> None:
    write(database, ("m1", b"a"), ("m2", b"b"))
    hold(database, Selection(key=b"a"), ME)
    hold(database, Selection(topic="t"), ME)
    assert release(database, Selection(key=b"a"), ME) == 0
    assert ids(read(database)) == []
    assert release(database, Selection(topic="t"), ME) == 2
    assert ids(read(database)) == ["m1", "m2"]


def test_a_row_without_a_key_is_held_alone(database: Database) -> None:
    write(database, ("m1", None), ("m2", None))
    assert hold(database, Selection(msg_id="m1"), ME) == 1
    assert ids(read(database)) == ["m2"]
    assert release(database, Selection(msg_id="m1"), ME) == 1
    assert ids(read(database)) == ["m1", "m2"]


@pytest.mark.parametrize(
    ("chosen", "says"), [(Selection(), "Which rows"), (Selection(msg_id="nobody"), "no row of message nobody")]
)
def test_a_hold_of_nothing_is_refused(database: Database, chosen: Selection, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        hold(database, chosen, ME)
    assert database.query("SELECT * FROM semel_outbox_audit") == []


def test_what_is_published_again_names_what_it_stands_for(database: Database) -> None:
    headers = ((MSG_ID_HEADER, b"old"), ("own", b"x"))
    assert republish(database, [Record("t", 1, 7, 0, b"a", b"v", headers), Record("t", 1, 8, 0, None, None)], ME) == 2
    first, second = sorted(read(database).rows, key=lambda row: row.seq)
    assert decode_headers(first.headers) == (("own", b"x"), ("semel-supersedes", b"old"))
    assert first.msg_id != "old"
    assert (first.key, first.value, second.key, second.value) == (b"a", b"v", None, None)
    assert decode_headers(second.headers) == (("semel-supersedes", b"t/1/8"),)


def test_declaring_a_restore_takes_the_lanes_from_their_relays(database: Database) -> None:
    store = Store(database)
    before = store.acquire([3], "one")[3]
    old = store.meta.incarnation
    assert declare_restored(database, ME) != old
    assert store.settle([Settlement(3, before.owner_epoch, 1, [], None)]) == [3]


@pytest.mark.postgres
def test_a_table_of_dead_rows_is_made_small_beside_an_old_transaction(
    postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = postgres.new_database()
    database, old, writer = connect(url), connect(url), connect(url)
    database.migrate(schema_sql("PostgreSQL"))
    monkeypatch.setattr(store_module, "TIDY_BYTES", 100_000)
    old.begin()
    old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    old.query("SELECT 1 FROM pg_class LIMIT 1")  # Its snapshot keeps every row that is deleted from now on.
    write(database, *((f"m{number}", b"k%d" % number) for number in range(3_000)))
    database.execute("DELETE FROM semel_outbox WHERE msg_id <> 'm1500'")
    [kept] = read(database).rows
    size = "SELECT pg_relation_size('semel_outbox')"
    store = Store(database)
    try:
        arm_failpoints("outbox.after_truncate:raise")
        with pytest.raises(FailpointRaised):
            store.tidy()
    finally:
        arm_failpoints("")
    assert read(database).rows == [kept]
    writer.begin()
    writer.execute("INSERT INTO semel_outbox (shard, msg_id, topic, headers, created_at) VALUES (1, 'x', 't', '[]', 0)")
    store.tidy()
    assert database.query(size)[0][0] > 100_000, "somebody has an uncommitted row in it"
    writer.commit()
    for limit in ("TIDY_ROWS", "TIDY_KEPT_BYTES"):
        with monkeypatch.context() as lower:
            lower.setattr(store_module, limit, 1)
            store.tidy()
        assert database.query(size)[0][0] > 100_000, "it is a backlog"
    store.tidy()
    assert database.query(size)[0][0] <= 16_384
    assert {row.seq: row.msg_id for row in read(database).rows} == {kept.seq: "m1500", 3_001: "x"}
    write(database, ("m3", b"b"))
    assert max(row.seq for row in read(database).rows) > 3_001, "numbers go on"
    for connection in (database, old, writer):
        connection.close()


def test_counting_has_an_end(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    write(database, *((f"m{number}", b"k") for number in range(9)))
    database.execute("UPDATE semel_outbox SET held = 'x' WHERE msg_id IN ('m1', 'm2')")
    assert Store(database).depth() == (9, 2, 5)
    monkeypatch.setattr(store_module, "COUNT_ROWS", 4)
    assert Store(database).depth().rows == 4


@pytest.mark.mariadb
def test_what_the_relay_has_read_survives_a_crash_of_mariadb(mariadb: MariadbServer) -> None:
    """InnoDB shows a commit before it is on the disk. The time between is stretched here: without a write of the
    relay the row would be gone, and Kafka is told of it next."""
    database = connect(mariadb.new_database())
    database.migrate(schema_sql("MariaDB"))
    database.execute("SET GLOBAL innodb_flush_log_at_timeout = 2700")
    database.execute("SET GLOBAL innodb_flush_log_at_trx_commit = 0")
    write(database, ("seen", b"k"))
    database.execute("SET GLOBAL innodb_flush_log_at_trx_commit = 1")
    assert ids(read(database)) == ["seen"]
    mariadb.kill()
    mariadb.start()
    database.connect()
    assert ids(read(database)) == ["seen"]
    database.close()

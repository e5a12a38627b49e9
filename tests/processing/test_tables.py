"""Tables of state, in memory and on disk: one suite. Then what only a file can suffer."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from semel.processing import disktables
from semel.processing.disktables import DiskTable, DiskTables
from semel.processing.tables import Changelog, Entry, Mark, MemoryTables, Table, Tables, TableTrouble, behind

MARK = Mark("cluster/topic/1", 7, "boot", 3.5)


@pytest.fixture(params=["memory", "disk"])
def tables(request: pytest.FixtureRequest, tmp_path: Path) -> Tables:
    return MemoryTables() if request.param == "memory" else DiskTables(tmp_path, "shop", uuid4)


@pytest.fixture
def table(tables: Tables) -> Iterator[Table]:
    found = tables.open("counts", 3)
    yield found
    found.close()


def entry(text: str, written_ms: int = 5) -> Entry:
    return Entry(text.encode(), written_ms)


def ages(table: Table) -> list[bytes]:
    return [key for _, key, _ in table.oldest(-1, 100)]


def test_what_was_written_is_read_and_a_deleted_key_is_gone(table: Table) -> None:
    assert table.mark is None
    table.write({b"a": entry("1", 10), b"b": entry("2", 20)}, MARK)
    table.write({b"a": None, b"c": entry("", 30), b"never": None}, MARK._replace(position=9))
    assert table.get(b"a") is None
    assert table.get(b"b") == Entry(b"2", 20)
    assert table.get(b"c") == Entry(b"", 30)
    assert table.mark == MARK._replace(position=9)


def test_age_is_the_order_of_the_last_writes(table: Table) -> None:
    table.write({b"z": entry("1"), b"a": entry("1"), b"m": entry("1")}, MARK)
    assert ages(table) == [b"z", b"a", b"m"]
    table.write({b"m": entry("2"), b"z": entry("2")}, MARK)
    assert ages(table) == [b"a", b"m", b"z"]
    first = table.oldest(-1, 1)
    assert [key for _, key, _ in table.oldest(first[0][0], 100)] == [b"m", b"z"]


def test_keys_are_found_from_one_on_in_the_order_of_their_bytes(table: Table) -> None:
    keys = [b"b", b"a\xff", b"a", b"", b"a\x00", b"\xff"]
    table.write({key: Entry(key, 1) for key in keys}, MARK)
    assert table.span(b"", 10) == [(key, Entry(key, 1)) for key in sorted(keys)]
    assert [key for key, _ in table.span(b"a\x00", 2)] == [b"a\x00", b"a\xff"]
    table.write({b"a\x00": None, b"aa": entry("")}, MARK)
    assert [key for key, _ in table.span(b"a", 10)] == [b"a", b"aa", b"a\xff", b"b", b"\xff"]


def test_a_table_that_is_opened_again_is_as_it_was_left(tables: Tables) -> None:
    table = tables.open("counts", 3)
    table.write({b"b": entry("2"), b"a": entry("1")}, MARK)
    table.close()
    other = tables.open("counts", 4)
    assert other.mark is None
    again = tables.open("counts", 3)
    assert again.mark == MARK
    again.write({b"b": entry("3")}, MARK)
    assert ages(again) == [b"a", b"b"], "a write after the start is younger than all before it"
    assert again.size() == 4
    again.clear()
    assert again.mark is None
    assert again.size() == 0
    for item in (again, other):
        item.close()


def test_a_discarded_table_is_not_found_again(tables: Tables) -> None:
    table = tables.open("counts", 3)
    table.write({b"a": entry("1")}, MARK)
    table.discard()
    again = tables.open("counts", 3)
    assert (again.mark, again.get(b"a")) == (None, None)
    again.close()


def test_both_behave_as_a_dictionary_does(table: Table) -> None:
    rng, model = random.Random(7), dict[bytes, Entry]()
    for step in range(120):
        changed: dict[bytes, Entry | None] = {}
        for _ in range(rng.randint(0, 12)):
            key = b"%d" % rng.randint(0, 40)
            changed.pop(key, None)
            changed[key] = None if rng.random() < 0.3 else Entry(b"%d" % step, step)
        for key, new in changed.items():
            model.pop(key, None)
            if new is not None:
                model[key] = new
        table.write(changed, MARK._replace(position=step))
    assert [(key, item) for _, key, item in table.oldest(-1, 100)] == list(model.items())
    assert table.span(b"1", 100) == sorted(item for item in model.items() if item[0] >= b"1")


# --- Whether a table is still good ---

LOG = Changelog(MARK.topic, 2, 7, 100.0)


@pytest.mark.parametrize(
    ("mark", "log", "now", "why"),
    [
        (MARK, LOG, 4.0, ""),
        (MARK, LOG._replace(end=900), 53.4, ""),
        (MARK, LOG._replace(end=900), 53.6, "deleted keys could come back"),
        (MARK, LOG._replace(end=900), 3.4, "deleted keys could come back"),
        (MARK, LOG._replace(end=900, tombstone_seconds=0.0), 3.6, "deleted keys could come back"),
        (MARK, LOG._replace(end=8), 1e9, ""),
        (MARK, LOG._replace(topic="cluster/topic/2"), 4.0, "the topic was made anew"),
        (MARK, LOG._replace(end=6), 4.0, "records of it were lost"),
        (MARK, LOG._replace(start=8, end=9), 4.0, "changes were deleted"),
        (MARK._replace(boot="before"), LOG, 4.0, "this machine's last start"),
    ],
)
def test_a_table_is_used_only_when_reading_on_from_its_mark_gives_all(
    mark: Mark, log: Changelog, now: float, why: str
) -> None:
    found = behind(mark, log, "boot", now)
    assert why in found
    assert bool(why) == bool(found)


def test_without_an_identity_of_the_machines_start_no_table_is_used_again() -> None:
    assert behind(MARK._replace(boot=""), LOG, "", 4.0)


# --- Files ---


def only_file(tmp_path: Path) -> Path:
    [path] = tmp_path.glob("state/shop/counts/3/*.db")
    return path


def written(tmp_path: Path, keys: int = 400) -> DiskTables:
    tables = DiskTables(tmp_path, "shop", uuid4)
    table = tables.open("counts", 3)
    table.write({b"key-%05d" % number: entry("x" * 100) for number in range(keys)}, MARK)
    table.close()
    return tables


def spoil_value(path: Path) -> None:
    data = bytearray(path.read_bytes())
    at = data.find(b"x" * 50)
    data[at] ^= 1
    path.write_bytes(data)


def spoil_page(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8 * 4096 : 9 * 4096] = os.urandom(4096)
    path.write_bytes(data)


def spoil_head(path: Path) -> None:
    path.write_bytes(b"not a database " + path.read_bytes()[15:])


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:9_000])


def other_layout(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version=99")
    connection.close()


@pytest.mark.parametrize("spoil", [spoil_value, spoil_page, spoil_head, cut_short, other_layout])
def test_a_damaged_file_says_so_and_is_not_used(
    tmp_path: Path, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    tables = written(tmp_path)
    path = only_file(tmp_path)
    spoil(path)
    table = tables.open("counts", 3)
    if table.path == path:  # Not seen at the start, so it must be seen by whoever reads it all.
        with pytest.raises(TableTrouble) as caught:
            table.oldest(-1, 1_000)
        assert caught.value.is_damaged
        table.discard()
        table = tables.open("counts", 3)
    else:
        assert str(path) in caplog.text
    assert (table.mark, table.get(b"key-00001")) == (None, None)
    assert not path.exists()
    table.close()


HOLD = """
import sys, uuid
from pathlib import Path
from semel.processing.disktables import DiskTables
from semel.processing.tables import Entry, Mark
tables = DiskTables(Path(sys.argv[1]), "shop", uuid.uuid4)
table = tables.open("counts", 3)
for number in range(1_000_000):
    table.write({b"%d" % (number % 50): Entry(b"%d" % number, number)}, Mark("t", number, "boot", 1.0))
    if number == 200:
        print("ready", flush=True)
"""


def test_a_file_of_a_living_process_is_left_alone_and_after_kill_9_it_is_whole(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGSTOP)
        tables = DiskTables(tmp_path, "shop", uuid4)
        mine = tables.open("counts", 3)
        assert mine.mark is None
        mine.write({b"mine": entry("1")}, Mark("t", 5, "boot", 1.0))
        process.kill()
    mine.close()
    table = tables.open("counts", 3)
    assert table.mark is not None
    last = table.mark.position
    assert last >= 200, "of two files the one that is complete up to where no other is"
    rows = {key: int(item.value) for _, key, item in table.oldest(-1, 100)}
    assert rows == {b"%d" % (number % 50): number for number in range(last - 49, last + 1)}
    table.close()
    assert only_file(tmp_path) == table.path


def test_what_a_killed_deletion_left_is_swept_away(tmp_path: Path) -> None:
    tables = written(tmp_path)
    folder = only_file(tmp_path).parent
    (folder / "gone.db-wal").write_bytes(b"left")
    tables.open("counts", 3).close()
    assert [path.name for path in folder.iterdir()] == [only_file(tmp_path).name]


def test_a_file_that_cannot_be_opened_for_the_moment_is_not_thrown_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = written(tmp_path)
    path = only_file(tmp_path)
    error = sqlite3.OperationalError("unable to open database file")
    error.sqlite_errorcode, error.sqlite_errorname = sqlite3.SQLITE_CANTOPEN, "SQLITE_CANTOPEN"

    def connect(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(disktables.sqlite3, "connect", connect)
        with pytest.raises(TableTrouble):
            tables.open("counts", 3)
    assert path.exists()
    table: DiskTable = tables.open("counts", 3)
    assert table.mark == MARK
    table.close()

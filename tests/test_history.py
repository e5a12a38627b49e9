"""The history: what was written is read again, in order, whatever happened to the process or its disk."""

import os
import resource
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import msgspec
import pytest

from semel import history
from semel.errors import ConfigurationError
from semel.history import Batch, BatchPart, Gap, Http, Read, Send, Strike, Torn, Unit, UnitInput, UnitParked


@pytest.fixture(autouse=True)
def _off_afterwards():
    yield
    history.stop()


def read(folder: Path) -> list[history.Event]:
    return list(history.read_history(folder, []))


EVENTS = [
    Unit(
        type="invoke",
        a="a-1",
        component="totals",
        transactional_id="shop.totals.x.0",
        inputs=[UnitInput("orders", 0, [4, 5, 7], [1, 0, 2])],
        parked=[UnitParked("orders", 0, 6)],
    ),
    Unit(type="ok", a="a-1"),
    Batch(type="invoke", a="a-2", component="shop.apply", parts=[BatchPart("orders", 1, 3, 10, 14, [10, 12], [13])]),
    Batch(type="info", a="a-2"),
    Http(type="ok", a="a-3", key="k", route="POST /orders", body="00", status=201, reply="ff", replayed=True),
    Send(type="ok", a="a-4", id="i", topic="orders", partition=1, offset=0),
    Read(type="ok", a="reader", topic="orders", partition=0, offsets=[1, 2], digests=["aa", "bb"]),
    Strike(type="ok", a="a-5", kind="kill", target="worker-0", detail="at once", outcome="restarted"),
    Gap(type="info", lost=3),
]


def test_every_event_is_read_as_it_was_written(tmp_path):
    history.start(tmp_path, "worker", 2)
    for event in EVENTS:
        history.note(event)
    assert read(tmp_path) == EVENTS
    assert [path.name for path in tmp_path.iterdir()] == [f"worker-2-{os.getpid()}.jsonl"]


def test_a_line_is_short_and_says_what_it_is(tmp_path):
    history.start(tmp_path, "worker", 0, clock=lambda: 7)
    history.note(Unit(type="ok", a="x"))
    [line] = next(tmp_path.iterdir()).read_bytes().splitlines()
    assert msgspec.json.decode(line) == {"op": "unit", "t": 7, "type": "ok", "a": "x"}


def test_without_a_folder_nothing_is_written_and_no_attempt_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    history.start("", "worker", 0)
    history.note(Unit(type="ok", a="x"))
    assert not history.on()
    assert history.attempt() == ""
    assert list(tmp_path.iterdir()) == []


def test_attempts_are_never_the_same_even_when_a_process_id_comes_again(tmp_path):
    names = []
    for _ in range(3):
        history.start(tmp_path, "worker", 0)
        names += [history.attempt(), history.attempt()]
        history.note(Unit(type="invoke", a=names[-1]))
    assert len(set(names)) == 6
    assert [event.a for event in read(tmp_path)] == names[1::2]


def test_a_fork_writes_nothing_into_its_parents_history(tmp_path):
    history.start(tmp_path, "worker", 0)
    child = os.fork()
    if child == 0:
        history.note(Unit(type="invoke", a=history.attempt()))
        os._exit(1 if history.on() else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert read(tmp_path) == []


def test_files_are_merged_by_time(tmp_path):
    times = {"a": [1, 4, 9], "b": [2, 3, 10], "c": [5], "d": []}
    for role, moments in times.items():
        moment = iter(moments)
        history.start(tmp_path, role, 0, clock=lambda moment=moment: next(moment))
        for at in moments:
            history.note(Send(type="ok", a=f"{role}{at}"))
    assert [event.a for event in read(tmp_path)] == ["a1", "b2", "b3", "a4", "c5", "a9", "b10"]


def test_threads_do_not_disturb_the_order_of_a_file(tmp_path):
    history.start(tmp_path, "worker", 0)

    def work() -> None:
        for _ in range(500):
            history.note(Send(type="ok", a=history.attempt()))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times = [msgspec.json.decode(line)["t"] for line in next(tmp_path.iterdir()).read_bytes().splitlines()]
    assert len(times) == 2000
    assert times == sorted(times)
    assert len({event.a for event in read(tmp_path)}) == 2000


def test_thousands_of_dead_processes_need_few_descriptors(tmp_path):
    for number in range(1000):
        line = msgspec.json.encode(Send(t=number, type="ok", a=str(number))) + b"\n"
        (tmp_path / f"worker-0-{number}.jsonl").write_bytes(line)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(number) for number in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 50, before[1]))
    try:
        assert [event.a for event in read(tmp_path)] == [str(number) for number in range(1000)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_torn_last_line_is_reported_and_the_rest_is_there(tmp_path):
    history.start(tmp_path, "worker", 0)
    history.note(Send(type="invoke", a="1"))
    history.note(Send(type="invoke", a="2"))
    path = next(tmp_path.iterdir())
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first + 1, len(whole) - 1):
        path.write_bytes(whole[:cut])
        torn: list[Torn] = []
        assert [event.a for event in history.read_history(tmp_path, torn)] == ["1"]
        assert torn == [Torn(path.name, 2, cut - first, is_last=True)]


def test_a_file_of_one_torn_line_is_reported_too(tmp_path, caplog):
    (tmp_path / "worker-0-1.jsonl").write_bytes(b'{"op":"unit","t":1')
    (tmp_path / "worker-0-2.jsonl").write_bytes(b"")
    assert list(history.read_history(tmp_path)) == []
    assert "worker-0-1.jsonl, line 1 is not whole (18 bytes)" in caplog.text


def test_a_full_disk_changes_nothing_and_stands_in_the_file_as_a_gap(tmp_path, monkeypatch, caplog):
    """A write that is short, then some that fail; then there is room again."""
    real, room = os.write, [10]

    def write(file: int, data: bytes) -> int:
        if not room:
            return real(file, data)
        if room[-1] == 0:
            raise OSError(28, "No space left on device")
        return real(file, data[: room.pop()])

    history.start(tmp_path, "worker", 0)
    history.note(Send(type="invoke", a="before"))
    monkeypatch.setattr(os, "write", write)
    room[:] = [0, 10]
    for number in range(3):
        history.note(Send(type="invoke", a=f"lost{number}"))
    room.clear()
    history.note(Send(type="invoke", a="after"))
    torn: list[Torn] = []
    events = list(history.read_history(tmp_path, torn))
    assert [event.a for event in events] == ["before", "", "after"]
    assert isinstance(events[1], Gap)
    assert events[1].lost == 3
    assert [(line.line, line.is_last) for line in torn] == [(2, False)]
    assert caplog.text.count("has a gap from here on") == 1


def test_a_folder_that_cannot_be_written_is_told_at_the_start(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"SEMEL_HISTORY=.*file/history.*Name a folder"):
        history.start(tmp_path / "file" / "history", "worker", 0)
    assert not history.on()


def test_without_descriptors_the_file_is_opened_later(tmp_path, monkeypatch):
    real = os.open

    def refused(*_args, **_options):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "open", refused)
    history.start(tmp_path, "worker", 0)
    history.note(Send(type="invoke", a="lost"))
    monkeypatch.setattr(os, "open", real)
    history.note(Send(type="invoke", a="there"))
    events = read(tmp_path)
    assert [type(event) for event in events] == [Gap, Send]
    assert events[0].lost == 1


def test_kill_9_loses_nothing_that_was_written(tmp_path):
    """The child says what it has written; whatever it said before it was killed is in the file."""
    code = """
        import sys
        from semel import history
        from semel.history import Unit, UnitInput
        history.start(sys.argv[1], "worker", 0)
        while True:
            a = history.attempt()
            history.note(Unit(type="invoke", a=a, inputs=[UnitInput("t", 0, list(range(3000)), [1] * 3000)]))
            print(a, flush=True)
    """
    for round_number in range(5):
        folder = tmp_path / str(round_number)
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), str(folder)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        said = [child.stdout.readline().strip() for _ in range(20)]
        child.kill()
        said += child.stdout.read().split("\n")[:-1]
        child.wait()
        torn: list[Torn] = []
        found = [event.a for event in history.read_history(folder, torn)]
        assert found[: len(said)] == said
        assert all(line.is_last for line in torn)


def test_values_have_short_names_and_none_is_its_own():
    assert history.digest(b"") != history.digest(None) == ""
    assert len(history.digest(b"x")) == 16
    assert history.digest(b"x") == history.digest(b"x") != history.digest(b"y")

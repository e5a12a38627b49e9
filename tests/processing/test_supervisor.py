"""The supervisor: children are restarted, killed when silent, drained, and never outlive it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from semel.errors import ConfigurationError
from semel.processing import EXIT_CONFIGURATION, EXIT_FENCED
from semel.processing.heartbeat import HEARTBEAT_VARIABLE, Heartbeat
from semel.processing.supervisor import ChildSpec, Supervisor

BEATING = """
    import asyncio, os, signal, sys, time
    from semel.processing.heartbeat import Heartbeat
    async def main(body):
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        beat = Heartbeat.from_environment()
        beat.start()  # From here on it counts as running, and may be told to drain.
        print("up", os.getpid(), flush=True)
        await body(stop)
"""


def child(
    name: str,
    body: str,
    folder: Path,
    *,
    beating: bool = True,
    slot: int = 0,
    is_last: bool = False,
    is_first: bool = False,
) -> ChildSpec:
    code = textwrap.dedent(BEATING if beating else "import os, sys, time\n") + textwrap.dedent(body)
    return ChildSpec(name, [sys.executable, "-c", code], None, slot, folder / f"{name}.log", is_last, is_first)


WAITING = """
    async def body(stop):
        await stop.wait()
        print("drained", time.time(), flush=True)
    asyncio.run(main(body))
"""


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that is dead and not reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def until(condition: Callable[[], object], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def supervise(supervisor: Supervisor, body: Callable[[], Awaitable[None]]) -> int:
    async def main() -> int:
        running = asyncio.create_task(supervisor.run())
        try:
            await body()
        finally:
            await supervisor.drain()
        return await running

    return asyncio.run(main())


def test_a_killed_child_is_started_again(tmp_path: Path) -> None:
    exits: list[int] = []
    status = tmp_path / "status.json"
    supervisor = Supervisor(
        [child("a", WAITING, tmp_path, slot=3)], status=status, on_exit=lambda _, code: exits.append(code)
    )

    async def body() -> None:
        await until(lambda: "running" in repr(supervisor))
        first = supervisor.pid("a")
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await until(lambda: supervisor.pid("a") not in (None, first) and "running" in repr(supervisor))
        seen = json.loads(status.read_text())
        assert seen["pid"] == os.getpid()
        assert seen["children"] == [
            {"name": "a", "slot": 3, "pid": supervisor.pid("a"), "state": "running", "restarts": 1}
        ]

    assert supervise(supervisor, body) == 0
    assert exits == [-9, 0]
    assert json.loads(status.read_text())["children"][0]["state"] == "stopped"


def test_a_stopped_child_is_killed_after_the_silence_and_started_again(tmp_path: Path) -> None:
    exits: list[int] = []
    supervisor = Supervisor(
        [child("a", WAITING, tmp_path)], silence_seconds=1.0, on_exit=lambda _, code: exits.append(code)
    )

    async def body() -> None:
        await until(lambda: "running" in repr(supervisor))
        first = supervisor.pid("a")
        assert first is not None
        began = time.monotonic()
        os.kill(first, signal.SIGSTOP)
        await until(lambda: exits)
        assert 0.5 < time.monotonic() - began < 5
        await until(lambda: supervisor.pid("a") not in (None, first))

    supervise(supervisor, body)
    assert exits[0] == -9


def test_a_child_whose_event_loop_hangs_is_killed_and_a_busy_one_is_not(tmp_path: Path) -> None:
    hanging = """
    async def body(stop):
        await asyncio.sleep(0.3)
        time.sleep(60)
    asyncio.run(main(body))
    """
    exits: list[str] = []
    supervisor = Supervisor(
        [child("hangs", hanging, tmp_path), child("works", WAITING, tmp_path)],
        silence_seconds=1.0,
        on_exit=lambda name, _: exits.append(name),
    )

    async def body() -> None:
        await until(lambda: exits.count("hangs") >= 2)
        assert "works" not in exits

    supervise(supervisor, body)


def test_a_child_that_ends_again_and_again_is_started_less_and_less_often(tmp_path: Path) -> None:
    times: list[float] = []
    supervisor = Supervisor(
        [child("a", "sys.exit(1)", tmp_path, beating=False)], on_exit=lambda *_: times.append(time.monotonic())
    )

    async def body() -> None:
        await until(lambda: len(times) >= 4)

    supervise(supervisor, body)
    assert times[3] - times[2] > 2 * (times[1] - times[0]) * 0.6
    assert times[3] - times[2] > 0.3


def test_a_drain_stops_the_first_ones_first_lets_children_finish_and_stops_the_last_ones_last(tmp_path: Path) -> None:
    finishing = """
    async def body(stop):
        await stop.wait()
        await asyncio.sleep(0.5)
        print("drained", time.time(), flush=True)
    asyncio.run(main(body))
    """
    children = [
        child("broker", WAITING, tmp_path, is_last=True),
        child("worker", finishing, tmp_path),
        child("http", finishing, tmp_path, is_first=True),
    ]
    supervisor = Supervisor(children, drain_seconds=20)

    async def body() -> None:
        await until(lambda: repr(supervisor).count("running") == 3)

    assert supervise(supervisor, body) == 0
    worker = float((tmp_path / "worker.log").read_text().split("drained ")[1])
    broker = float((tmp_path / "broker.log").read_text().split("drained ")[1])
    http = float((tmp_path / "http.log").read_text().split("drained ")[1])
    assert broker > worker > http + 0.4, "each waits until the ones before it are gone"


def test_a_child_that_does_not_drain_is_killed_in_time(tmp_path: Path) -> None:
    deaf = """
    async def body(stop):
        await asyncio.sleep(600)
    asyncio.run(main(body))
    """
    exits: list[int] = []
    supervisor = Supervisor([child("a", deaf, tmp_path)], drain_seconds=1.0, on_exit=lambda _, code: exits.append(code))

    async def body() -> None:
        await until(lambda: "running" in repr(supervisor))

    began = time.monotonic()
    supervise(supervisor, body)
    assert exits == [-9]
    assert time.monotonic() - began < 15


def test_a_slot_fenced_twice_within_a_minute_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    exits: list[tuple[str, int]] = []
    supervisor = Supervisor(
        [
            child("twin", f"sys.exit({EXIT_FENCED})", tmp_path, beating=False, slot=1),
            child("other", WAITING, tmp_path),
            child("broker", WAITING, tmp_path, is_last=True),
        ],
        on_exit=lambda *exit_: exits.append(exit_),
    )

    async def body() -> None:
        await until(lambda: "twin=fenced" in repr(supervisor))
        await asyncio.sleep(0.5)
        assert supervisor.pid("other") is not None, "the other children go on"

    supervise(supervisor, body)
    assert exits.count(("twin", EXIT_FENCED)) == 2
    assert "twin (slot 1) was fenced twice" in caplog.text
    assert "SEMEL_INSTANCE" in caplog.text


@pytest.mark.parametrize("code", [EXIT_FENCED, EXIT_CONFIGURATION])
def test_when_nothing_is_left_to_keep_running_the_supervisor_ends_with_the_childs_code(
    tmp_path: Path, code: int
) -> None:
    supervisor = Supervisor(
        [
            child("a", f"sys.exit({code})", tmp_path, beating=False),
            child("broker", WAITING, tmp_path, is_last=True),
        ]
    )

    async def main() -> int:
        async with asyncio.timeout(30):
            return await supervisor.run()

    assert asyncio.run(main()) == code


SUPERVISING = """
    import asyncio, sys
    from pathlib import Path
    from semel.processing.supervisor import ChildSpec, Supervisor
    specs = [ChildSpec("a", [sys.executable, "-c", Path(sys.argv[1]).read_text()], None, 0, Path(sys.argv[2]))]
    sys.exit(asyncio.run(Supervisor(specs, drain_seconds=30).run(handle_signals=True)))
"""


def start_supervisor(tmp_path: Path, body: str) -> tuple[subprocess.Popen[bytes], int]:
    """A supervisor in a process of its own; its pid, and its child's."""
    code, log = tmp_path / "child.py", tmp_path / "a.log"
    code.write_text(textwrap.dedent(BEATING) + textwrap.dedent(body))
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(SUPERVISING), str(code), str(log)])
    deadline = time.monotonic() + 20
    while "up" not in (log.read_text() if log.exists() else ""):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process, int(log.read_text().split()[1])


def wait_dead(pid: int, seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while is_alive(pid):
        assert time.monotonic() < deadline, "the child lives on"
        time.sleep(0.02)


def test_children_die_with_a_killed_supervisor(tmp_path: Path) -> None:
    process, pid = start_supervisor(tmp_path, WAITING)
    process.kill()
    process.wait()
    wait_dead(pid)


def test_sigterm_drains_and_a_second_one_kills(tmp_path: Path) -> None:
    process, pid = start_supervisor(tmp_path, WAITING)
    process.terminate()
    assert process.wait(20) == 0
    assert "drained" in (tmp_path / "a.log").read_text()
    wait_dead(pid)

    (tmp_path / "a.log").unlink()
    deaf = "async def body(stop):\n    await asyncio.sleep(600)\nasyncio.run(main(body))\n"
    process, pid = start_supervisor(tmp_path, deaf)
    process.terminate()
    time.sleep(0.3)
    assert is_alive(pid)
    began = time.monotonic()
    process.terminate()
    process.wait(20)
    assert time.monotonic() - began < 5
    wait_dead(pid)


def test_a_heartbeat_without_a_supervisor_does_nothing_and_a_wrong_one_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(HEARTBEAT_VARIABLE, raising=False)
    Heartbeat.from_environment().start()
    monkeypatch.setenv(HEARTBEAT_VARIABLE, "9999")
    with pytest.raises(ConfigurationError, match="only the supervisor sets it"):
        Heartbeat.from_environment()
    assert HEARTBEAT_VARIABLE not in os.environ


def test_a_heartbeat_that_nobody_reads_is_told() -> None:
    read_end, write_end = os.pipe()
    orphaned: list[bool] = []

    async def main() -> None:
        beat = Heartbeat(write_end, on_orphaned=lambda: orphaned.append(True))
        beat.start()
        assert os.read(read_end, 10) == b"."
        os.close(read_end)
        await until(lambda: orphaned, 5)
        await beat.stop()

    asyncio.run(main())
    os.close(write_end)

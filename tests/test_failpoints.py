"""The failpoints themselves: what can be armed, what each action does, and that no line is named in vain."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import semel
from semel.errors import ConfigurationError
from semel.failpoints import FAILPOINTS, FailpointRaised, arm_failpoints, failpoint, failpoint_hits
from tests.failpoints.page import PAGE, text

SOURCE = Path(semel.__file__).parent
CALL = re.compile(r'failpoint\(\s*"([^"]+)"')


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    arm_failpoints("")


def in_a_process(work: Callable[[], None]) -> int:
    """Run `work` in a forked process; how it ended, as `os.waitstatus_to_exitcode` says."""
    pid = os.fork()
    if not pid:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_every_failpoint_of_the_source_is_listed_and_every_listed_one_is_there() -> None:
    called = {name for path in SOURCE.rglob("*.py") for name in CALL.findall(path.read_text())}
    assert called == set(FAILPOINTS)


def test_every_failpoint_says_what_has_happened_in_one_sentence() -> None:
    for name, point in FAILPOINTS.items():
        assert 20 < len(point.what) < 110, name
        assert not point.what.endswith("."), name
    assert len({point.what for point in FAILPOINTS.values()}) == len(FAILPOINTS)


def test_nothing_is_armed_and_counted_by_itself() -> None:
    arm_failpoints("")
    failpoint("log.before_write")
    assert failpoint_hits() == {}


def test_only_the_nth_hit_acts_and_it_acts_once() -> None:
    arm_failpoints("log.before_write:raise:2,log.after_write:raise")
    failpoint("log.before_write")
    with pytest.raises(FailpointRaised, match=r"log.before_write \(hit 2\)"):
        failpoint("log.before_write")
    failpoint("log.before_write")
    with pytest.raises(FailpointRaised):
        failpoint("log.after_write")
    assert failpoint_hits() == {"log.before_write": 3, "log.after_write": 1}


def test_what_a_point_does_is_told_in_the_log_before_it_is_done(caplog: pytest.LogCaptureFixture) -> None:
    arm_failpoints("log.before_write:raise:2")
    failpoint("log.before_write")
    assert caplog.messages == []
    with pytest.raises(FailpointRaised):
        failpoint("log.before_write")
    assert caplog.messages == ["failpoint log.before_write acts: raise at hit 2"]


def test_counting_does_nothing_else() -> None:
    arm_failpoints("*:count")
    for _ in range(3):
        failpoint("log.before_write")
    assert failpoint_hits() == {"log.before_write": 3}


def test_kill_ends_the_process() -> None:
    def work() -> None:
        arm_failpoints("log.before_write:kill")
        failpoint("log.before_write")

    assert in_a_process(work) == -signal.SIGKILL


def test_stop_stops_until_it_is_continued() -> None:
    pid = os.fork()
    if not pid:
        arm_failpoints("log.before_write:stop")
        failpoint("log.before_write")
        os._exit(7)
    _, status = os.waitpid(pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    os.kill(pid, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_delay_blocks_the_thread() -> None:
    arm_failpoints("log.before_write:delay=0.05")
    began = time.monotonic()
    failpoint("log.before_write")
    assert time.monotonic() - began >= 0.05


@pytest.mark.parametrize(("size", "left"), [(0, 0), (3, 3), (9, 9), (10, 0), (13, 3), (1_000_009, 9)])
def test_a_torn_write_leaves_the_beginning_whatever_the_number(tmp_path: Path, size: int, left: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def work() -> None:
        arm_failpoints(f"log.before_write:torn={size}")
        file = os.open(path, os.O_RDWR)
        failpoint("log.before_write", file, b"0123456789", 6)

    assert in_a_process(work) == -signal.SIGKILL
    assert path.read_bytes() == b"before" + b"0123456789"[:left]


def test_cancel_ends_the_task_at_its_next_wait() -> None:
    passed = []

    async def work() -> None:
        failpoint("ingress.before_append")
        passed.append("the line itself")
        await asyncio.sleep(60)
        passed.append("a wait behind it")

    arm_failpoints("ingress.before_append:cancel")
    with pytest.raises(asyncio.CancelledError, match=r"failpoint ingress\.before_append"):
        asyncio.run(work())
    assert passed == ["the line itself"]


def test_cancel_outside_of_a_task_is_an_error_that_names_it() -> None:
    arm_failpoints("ingress.before_append:cancel")
    with pytest.raises(ConfigurationError, match=r"ingress.before_append was passed outside of an asyncio task"):
        failpoint("ingress.before_append")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("nowhere:kill", "names 'nowhere', which does not exist. Known: broker.after_append, "),
        ("log.before_write:explode", "'explode' is not one of kill, stop, raise, delay=SECONDS, cancel, torn=BYTES"),
        ("log.before_write:kill=1", "'kill=1' is not one of"),
        ("log.before_write:delay=soon", "'delay=soon' is not one of"),
        ("log.before_write:delay=inf", "'delay=inf' is not one of"),
        ("log.before_write:delay=-1", "'delay=-1' is not one of"),
        ("log.before_write:torn=-1", "'torn=-1' is not one of"),
        ("log.before_write:torn=", "'torn=' is not one of"),
        ("log.before_write:kill:0", "hit number '0' is not a whole number from 1"),
        ("log.before_write:kill:x", "hit number 'x' is not a whole number from 1"),
        ("log.before_write:cancel", "not possible at log.before_write: no asyncio task runs there. Possible: kill, "),
        ("log.after_write:torn=3", "not possible at log.after_write: nothing is written there. Possible: kill, stop, "),
        ("log.after_write:kill,nowhere:kill", "which does not exist"),
    ],
)
def test_what_cannot_be_armed_is_refused_with_what_can_and_arms_nothing(spec: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        arm_failpoints(spec)
    failpoint("log.after_write")
    assert failpoint_hits() == {}


@pytest.mark.parametrize("spec", ["log.before_write:kill", "*:count"])
def test_production_refuses_every_failpoint(spec: str) -> None:
    with pytest.raises(ConfigurationError, match="SEMEL_PROFILE is production"):
        arm_failpoints(spec, profile="production")


def test_the_page_of_failpoints_is_that_of_the_source() -> None:
    assert PAGE.read_text() == text(), "write it anew: python -m tests.failpoints.page"

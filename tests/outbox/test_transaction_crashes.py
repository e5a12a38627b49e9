"""A program is killed, fails or stands still at every step of a transaction's end: rows and records are both there, or
neither is. These are the cases of the failpoints `transaction.*`."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from itertools import cycle

import pytest

from semel.databases import Database
from semel.errors import OutcomeUnknown
from semel.failpoints import FAILPOINTS, arm_failpoints
from tests.outbox.bank import Bank

NAMES = [name for name, point in FAILPOINTS.items() if point.role == "program"]
TRANSACTIONS = 4
HITS = {"first": 1, "last": TRANSACTIONS}


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    arm_failpoints("")


def unanswered(database: Database, *, committed: bool) -> Callable[[], None]:
    """A COMMIT whose answer is lost, after or before the database did it; the one that looks for it is answered."""
    commit = database.commit
    answered = cycle([False, True])

    def lost() -> None:
        taken = database.query("SELECT 1 FROM semel_commit WHERE number > 0 LIMIT 1")  # Not the one that takes a row.
        if taken and not next(answered):
            if committed:
                commit()
            database.close()
            raise OutcomeUnknown("the answer is lost")
        commit()

    return lost


def work(bank: Bank, point: str) -> None:
    """Four accounts, one transaction each, as the child does it; a failpoint's exceptions are its to bear."""
    if point.endswith("_settle"):
        pool = bank.app.writer("database").pool
        session = pool.borrow()
        session.database.commit = unanswered(session.database, committed=True)  # type: ignore[method-assign]
        pool.give_back(session)
    for number in range(TRANSACTIONS):
        try:
            bank.open_account(f"account-{number}", number)
        except Exception as error:
            if "failpoint" not in str(error):
                raise


def in_a_child(url: str, database: Database, spec: str) -> int:
    """Run `work` in a forked process that is armed; its process id."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            arm_failpoints(spec)
            work(Bank(url, database), spec.partition(":")[0])
            code = 0
        finally:
            os._exit(code)
    return pid


@pytest.mark.parametrize("which", HITS)
@pytest.mark.parametrize("action", ["kill", "raise"])
@pytest.mark.parametrize("point", NAMES)
def test_rows_and_records_are_both_there_or_neither(bank: Bank, url: str, point: str, action: str, which: str) -> None:
    hit = HITS[which]
    pid = in_a_child(url, bank._look, f"{point}:{action}:{hit}")
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == (-signal.SIGKILL if action == "kill" else 0)
    assert bank.balances() == bank.told()
    # What is there is what was begun before the point, and after it where the program lived.
    committed = point in ("transaction.after_commit", "transaction.before_settle", "transaction.after_settle")
    done = {f"account-{number}" for number in range(TRANSACTIONS) if number < hit or action == "raise"}
    assert set(bank.balances()) == done - (set() if committed else {f"account-{hit - 1}"})
    bank.open_account("afterwards", 1)  # Nothing is left locked.
    assert bank.balances() == bank.told()


@pytest.mark.parametrize("action", ["stop", "delay=0.2"])
@pytest.mark.parametrize("point", NAMES)
def test_a_program_that_stands_still_goes_on(bank: Bank, url: str, point: str, action: str) -> None:
    pid = in_a_child(url, bank._look, f"{point}:{action}:2")
    if action == "stop":
        assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
        assert bank.balances() == bank.told()
        os.kill(pid, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert bank.balances() == bank.told()
    assert len(bank.balances()) == TRANSACTIONS


def test_every_action_of_these_points_has_a_case() -> None:
    for name in NAMES:
        assert {action.partition("=")[0] for action in FAILPOINTS[name].actions} == {"kill", "raise", "stop", "delay"}

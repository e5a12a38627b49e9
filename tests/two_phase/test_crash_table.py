"""Every row of the crash table of the dual write (Kafka facts 3.4), on a real broker process, by kill -9.

Each row leaves the writer, the broker or both dead at one point, starts a process that recovers, and checks three
things: what it found open, how it ended it, and that Kafka and the database hold the same.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.services.postgres import PostgresServer
from tests.two_phase.crashes import FENCED, Processes, Report, Stage


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """One stage for all rows: each begins where the one before has left broker and database."""
    folder = tmp_path_factory.mktemp("dual-write")
    with Processes(folder / "processes.log") as processes:
        yield Stage.begin(folder, f"sqlite:///{folder}/business.db", processes)


class Row:
    """How many transactions are committed on both sides more than before, once somebody has recovered."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._before = stage.ledger()

    def recovered(self, transactions: int) -> Report:
        found = self._stage.recover()
        self.holds(transactions)
        return found

    def holds(self, transactions: int) -> None:
        outcome = self._stage.outcome()
        assert outcome.torn == set()
        assert len(outcome.ledger - self._before) == transactions


def test_after_1_there_is_nothing_to_end(stage: Stage) -> None:
    row = Row(stage)
    stage.crash("initialised")
    assert row.recovered(0)["ongoing"] == ""


@pytest.mark.parametrize("point", ["begun", "prepared", "deciding"])
def test_after_3_and_4_and_during_5_the_transaction_is_aborted(stage: Stage, point: str) -> None:
    row = Row(stage)
    stage.crash(point)
    found = row.recovered(0)
    assert found["ongoing"]
    assert found["ongoing"] != found["decided"]
    assert found["committed"] is False


def _commit_in_doubt(stage: Stage) -> None:
    """The kill comes while COMMIT is on its way; a quick writer may be past it by then, and is killed once more."""
    in_doubt = 0
    for _ in range(30):
        before = stage.ledger()
        stage.crash("committing")
        found = stage.recover()
        outcome = stage.outcome()
        assert outcome.torn == set()
        assert found["committed"] is (found["ongoing"] != "" and found["ongoing"] == found["decided"])
        made = len(outcome.ledger - before)
        assert made or not found["committed"]
        in_doubt += bool(found["ongoing"]) and (made == 0 or found["committed"])
        if in_doubt == 3:
            return
    assert in_doubt, "no kill came before the transaction's end"


def test_during_6_the_database_says_what_became_of_it(stage: Stage) -> None:
    _commit_in_doubt(stage)


def test_during_6_postgres_says_what_became_of_it(
    stage: Stage, postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("dual-write-postgres")
    mine = Stage.begin(folder, postgres.new_database(), stage.writers)
    _commit_in_doubt(mine)
    mine.broker.kill()


def test_after_6_the_transaction_is_committed(stage: Stage) -> None:
    row = Row(stage)
    stage.crash("decided")
    found = row.recovered(1)
    assert found["ongoing"] == found["decided"]
    assert found["committed"] is True


def test_at_7_a_request_that_was_lost_is_made_again_by_the_next_process(stage: Stage) -> None:
    row = Row(stage)
    stage.crash("sent", freeze=stage.broker.pid)
    stage.restart_broker()
    found = row.recovered(1)
    assert found["ongoing"] == found["decided"]
    assert found["committed"] is True


def test_at_7_an_answer_that_was_lost_leaves_nothing_to_do(stage: Stage) -> None:
    row = Row(stage)
    stage.crash("sent")
    found = row.recovered(1)
    assert (found["ongoing"], found["committed"]) == ("", False)
    assert found["decided"], "the database remembers what is committed on both sides"


def _both_die(stage: Stage, failpoint: str, **changes: Any) -> None:
    """The broker at a failpoint of the end of the transaction, then the writer; the broker comes back."""
    stage.restart_broker(f"broker.{failpoint}:kill:1")
    pid = stage.start(**changes)
    deadline = time.monotonic() + 20
    while not stage.broker.has_ended():
        assert time.monotonic() < deadline, stage.reports()[-3:]
        time.sleep(0.002)
    stage.writers.kill(pid)
    stage.restart_broker()


@pytest.mark.parametrize("failpoint", ["after_prepare", "between_markers", "after_markers"])
def test_a_broker_that_dies_after_its_decision_finishes_it_when_it_is_back(stage: Stage, failpoint: str) -> None:
    row = Row(stage)
    _both_die(stage, failpoint)
    assert row.recovered(1)["ongoing"] == ""


def test_a_broker_that_dies_before_its_decision_still_has_the_transaction(stage: Stage) -> None:
    row = Row(stage)
    _both_die(stage, "before_prepare")
    found = row.recovered(1)
    assert found["ongoing"] == found["decided"]


def test_during_1_the_answer_is_lost_and_the_same_transaction_is_named_again(stage: Stage) -> None:
    row = Row(stage)
    stage.crash("decided")
    stage.restart_broker("broker.after_init:kill:1")
    pid = stage.start(transactions=0)
    deadline = time.monotonic() + 20
    while not stage.broker.has_ended():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    stage.restart_broker()
    assert stage.writers.wait(pid) == 0, stage.reports()[-1]
    found = stage.reports()[-1]
    assert found["ongoing"] == found["decided"]
    assert found["committed"] is True
    row.holds(1)


def test_during_2_the_recovery_is_repeated_whether_its_end_arrived_or_not(stage: Stage) -> None:
    row = Row(stage)
    stage.crash("decided")
    stage.crash("sent", freeze=0)
    assert row.recovered(1)["ongoing"] == "", "it had arrived"
    row = Row(stage)
    stage.crash("decided")
    _both_die(stage, "before_prepare", transactions=0)
    found = row.recovered(1)
    assert found["ongoing"] == found["decided"], "it had not"
    assert found["committed"] is True


def test_the_next_transaction_is_not_taken_for_the_one_that_the_database_remembers(stage: Stage) -> None:
    row = Row(stage)
    stage.crash("begun", crash_nth=2)
    found = row.recovered(1)
    producer_id, epoch = map(int, found["decided"].split(":"))
    assert found["ongoing"] == f"{producer_id}:{epoch + 1}", "every transaction has an epoch of its own"
    assert found["committed"] is False


# -- Zombies: not a row of the table, but its condition on the database ------------------------------------------


@pytest.mark.parametrize(
    ("point", "of_the_zombie"), [("initialised", 0), ("begun", 0), ("prepared", 0), ("decided", 1), ("completed", 1)]
)
def test_a_writer_that_was_stopped_there_is_fenced_on_both_sides(stage: Stage, point: str, of_the_zombie: int) -> None:
    row = Row(stage)
    zombie = stage.start(crash_at=point, crash_by=int(signal.SIGSTOP))
    stage.writers.until_stopped(zombie)
    assert stage.writers.wait(stage.start(transactions=2)) == 0
    stage.writers.signal(zombie, signal.SIGCONT)
    assert stage.writers.wait(zombie) == FENCED, stage.reports()[-1]
    row.recovered(2 + of_the_zombie)

"""Raw resume (Kafka facts 3.5): EndTxn with a saved identity and no InitProducerId, as Flink does it. Rows R1 to R18.

Each row says what a saved (producer id, epoch) is told by EndTxn v4 and by v5. It has to be the version that the
transaction was meant to be ended with, and 90 means "unknown" unless DescribeTransactions still shows the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from semel.errors import ErrorCode
from tests.broker.core import Core
from tests.broker.test_transactions import Writer, committed_values

E = ErrorCode
DONE, STATE, FENCED, UNKNOWN = 0, E.INVALID_TXN_STATE, E.PRODUCER_FENCED, E.INVALID_PRODUCER_ID_MAPPING
V4, V5 = 4, 5


class Saved:
    """A transaction with one record, and the identity that somebody saved to end it later."""

    def __init__(self, core: Core, version: int) -> None:
        self.core = core
        self.version = version
        if core.node.topics.get("orders") is None:
            core.create("orders")
        self.writer = Writer(core, "w", 2 if version == V5 else 1)
        self.identity = self.writer.producer_id, self.writer.epoch
        assert self.writer.write("orders", b"saved") == 0

    def end(self, commit: bool, version: int | None = None, epoch: int = 0) -> int:
        producer_id, saved = self.identity
        answer = self.core.end("w", producer_id, saved + epoch, commit, version or self.version)
        self.answered = getattr(answer, "producer_id", -1), getattr(answer, "producer_epoch", -1)
        return int(answer.error_code)

    def next(self) -> None:
        """The producer goes on under the identity that it has now."""
        if self.version == V5:
            self.writer.producer_id, self.writer.epoch = self.answered
            self.writer.sequence.clear()
        assert self.writer.write("orders", b"next") == 0


def beside(core: Core, name: str) -> Core:
    """Another broker."""
    folder = core.data / f"beside-{name}"
    folder.mkdir()
    return Core(folder)


def nothing(saved: Saved) -> None:
    """R1"""


def committed(saved: Saved) -> None:
    """R2, R3"""
    assert saved.end(True) == DONE


def committed_before_a_restart(saved: Saved) -> None:
    """R2 after kill -9"""
    committed(saved)
    saved.core.restart()


def aborted(saved: Saved) -> None:
    """R4"""
    assert saved.end(False) == DONE


def timed_out(saved: Saved) -> None:
    """R5"""
    saved.core.pass_time(11_000)
    saved.core.node.sweep()


def taken_over(saved: Saved) -> None:
    """R6, R7: the first call aborts and gives the identity here; Kafka needs two."""
    assert saved.core.init("w").error_code == 0


def committed_and_taken_over(saved: Saved) -> None:
    """R8"""
    committed(saved)
    taken_over(saved)


def next_is_open(saved: Saved) -> None:
    """R9"""
    committed(saved)
    saved.next()


def next_is_committed(saved: Saved) -> None:
    """R10"""
    next_is_open(saved)
    assert saved.writer.end(True) == DONE


def next_is_aborted(saved: Saved) -> None:
    """R10"""
    next_is_open(saved)
    assert saved.writer.end(False) == DONE


def expired(saved: Saved) -> None:
    """R11"""
    committed(saved)
    saved.core.pass_time(8 * 86_400_000)
    saved.core.node.sweep()


@pytest.mark.parametrize(
    ("situation", "version", "commit", "abort"),
    [
        (nothing, V4, DONE, DONE),
        (nothing, V5, DONE, DONE),
        (committed, V4, DONE, STATE),
        (committed, V5, DONE, STATE),
        (committed_before_a_restart, V4, DONE, STATE),
        (committed_before_a_restart, V5, DONE, STATE),
        (aborted, V4, STATE, DONE),
        (aborted, V5, FENCED, DONE),  # As trunk (KAFKA-20785); 4.3.1 says INVALID_TXN_STATE.
        (timed_out, V4, FENCED, FENCED),
        (timed_out, V5, FENCED, DONE),
        (taken_over, V4, FENCED, FENCED),
        (taken_over, V5, FENCED, FENCED),
        (committed_and_taken_over, V4, FENCED, FENCED),
        (committed_and_taken_over, V5, FENCED, FENCED),
        (next_is_open, V4, DONE, DONE),  # It ends the NEXT transaction: with V1, raw resume is unsafe.
        (next_is_open, V5, FENCED, FENCED),
        (next_is_committed, V4, DONE, STATE),
        (next_is_committed, V5, FENCED, FENCED),
        (next_is_aborted, V4, STATE, DONE),
        (next_is_aborted, V5, FENCED, FENCED),
        (expired, V4, UNKNOWN, UNKNOWN),
        (expired, V5, UNKNOWN, UNKNOWN),
    ],
)
def test_what_a_saved_identity_is_told(
    core: Core, situation: Callable[[Saved], None], version: int, commit: int, abort: int
) -> None:
    for decision, code in ((True, commit), (False, abort)):
        fresh = beside(core, str(decision))
        saved = Saved(fresh, version)
        situation(saved)
        before = committed_values(fresh, "orders")
        assert saved.end(decision) == code, f"{situation.__doc__}, commit={decision}"
        if situation in (committed, committed_before_a_restart) and code == DONE and version == V5:
            assert saved.answered == (saved.identity[0], saved.identity[1] + 1)
        if situation is nothing:
            assert committed_values(fresh, "orders") == ([b"saved"] if decision else [])
        elif not (situation is next_is_open and version == V4):
            assert committed_values(fresh, "orders") == before, "an answer to an old identity changed something"
        fresh.node.close()


@pytest.mark.parametrize("commit", [True, False])
def test_r12_at_the_last_epoch_the_retry_gives_the_new_producer_id_again(core: Core, commit: bool) -> None:
    writer = Writer(core, "w")
    coordinator = core.node.transactions.coordinator
    current = coordinator.get("w")
    assert current is not None
    core.node.transactions._persist(coordinator._propose(replace(current, producer_epoch=32_766)), core.now_ms)
    core.create("orders")
    writer.epoch = 32_766
    assert writer.write("orders", b"saved") == 0
    first = core.end("w", writer.producer_id, 32_766, commit)
    again = core.end("w", writer.producer_id, 32_766, commit)
    assert (first.error_code, first.producer_epoch, first.producer_id != writer.producer_id) == (0, 0, True)
    assert (again.error_code, again.producer_id, again.producer_epoch) == (0, first.producer_id, 0)


@pytest.mark.parametrize("version", [V4, V5])
def test_r13_of_a_commit_and_an_abort_at_once_one_wins_and_the_other_is_told(core: Core, version: int) -> None:
    saved = Saved(core, version)
    assert [saved.end(True), saved.end(False)] == [DONE, STATE]
    assert committed_values(core, "orders") == [b"saved"]


def test_r14_to_r17_the_two_protocols_mixed(core: Core) -> None:
    """Why the version has to be the same: R16's abort succeeds although the transaction is committed."""
    v1 = Saved(beside(core, "r14"), V4)
    assert v1.end(True, V5) == DONE
    assert v1.answered == (v1.identity[0], v1.identity[1] + 1)
    v2 = Saved(beside(core, "r15"), V5)
    assert v2.end(True, V4) == DONE
    found = v2.core.node.transactions.coordinator.get("w")
    assert found is not None
    assert (found.state, found.identity) == ("CompleteCommit", v2.identity)
    assert v2.end(True, V5) == STATE, "R16"
    assert v2.end(False, V5) == DONE, "R16: an empty abort of the next transaction"
    assert committed_values(v2.core, "orders") == [b"saved"]
    ended = Saved(beside(core, "r17"), V5)
    assert ended.end(True) == DONE
    assert (ended.end(True, V4), ended.end(True, V4, epoch=1)) == (FENCED, DONE)


@pytest.mark.parametrize(("version", "commit", "abort"), [(V4, STATE, STATE), (V5, STATE, DONE)])
def test_r18_where_nothing_was_ever_produced(core: Core, version: int, commit: int, abort: int) -> None:
    answer = core.init("w")
    for decision, code in ((True, commit), (False, abort)):
        assert core.end("w", answer.producer_id, answer.producer_epoch, decision, version).error_code == code


@pytest.mark.parametrize("version", [V4, V5])
def test_r11_an_id_that_never_was_and_another_producer_id(core: Core, version: int) -> None:
    saved = Saved(core, version)
    assert core.end("nobody", *saved.identity, True, version).error_code == UNKNOWN
    assert core.end("w", saved.identity[0] + 5, saved.identity[1], True, version).error_code == UNKNOWN


def test_a_saved_identity_is_fenced_by_keep_and_says_so(core: Core) -> None:
    """Who recovers by KIP-939 takes the right to end the transaction from everybody who saved it."""
    saved = Saved(core, V5)
    nobody = {"producer_id": -1, "producer_epoch": -1}
    kept = core.ask(22, 6, transactional_id="w", transaction_timeout=1_000, keep_prepared_txn=True, **nobody)
    assert (kept.ongoing_txn_producer_id, kept.ongoing_txn_producer_epoch) == saved.identity
    assert [saved.end(True), saved.end(False), saved.end(True, V4)] == [FENCED] * 3
    assert core.end("w", kept.producer_id, kept.producer_epoch, True).error_code == DONE
    assert committed_values(core, "orders") == [b"saved"]

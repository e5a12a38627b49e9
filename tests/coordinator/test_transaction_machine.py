"""Any order of requests, duplicates, time-outs, failed writes and crashes under TV2: what must hold at every moment.

The model knows every identity that was handed out, the one transaction that each one wrote or was given to end
(KIP-939), and how that one was decided.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from semel.coordinator.transaction import EPOCH_MAX, NO_TIMEOUT_MS, Answer, TransactionMetadata, TransactionState
from semel.coordinator.transaction_log import encode_transaction
from semel.errors import ErrorCode

from .drivers import ID, P0, P1, Transactions

Identity = tuple[int, int]
FATES = st.sampled_from(["durable", "durable", "durable", "cancelled", "crash before", "crash after"])
IDLE = (TransactionState.EMPTY, TransactionState.COMPLETE_COMMIT, TransactionState.COMPLETE_ABORT)
PREPARED = (TransactionState.PREPARE_COMMIT, TransactionState.PREPARE_ABORT)
FENCED = (ErrorCode.INVALID_PRODUCER_EPOCH, ErrorCode.PRODUCER_FENCED)


class TransactionMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.txn = Transactions()
        self.handed_out: list[Identity] = []
        """In the order in which they became valid; clients may hold any of them, whether the answer arrived or not."""
        self.transaction_of: dict[Identity, int] = {}
        """The transaction that each identity wrote, or was given to end."""
        self.decided: dict[Identity, bool] = {}
        self.transactions = 0
        self.superseded: set[Identity] = set()
        """Identities before an answer to InitProducerId."""
        self.repeatable: Identity | None = None
        """Whose InitProducerId came last; asking again gives the same answer."""

    @initialize(epochs_left=st.integers(0, 4))
    def begin(self, epochs_left: int) -> None:
        answer = self.txn.init()
        assert answer.transition is not None
        # Close to the rotation, where the rules are hardest to keep.
        nearly = TransactionMetadata(
            ID, answer.producer_id, EPOCH_MAX - epochs_left, last_update_ms=self.txn.now, timeout_ms=60_000
        )
        self.txn.place(nearly)
        self.handed_out.append(nearly.identity)

    # -- The shell ----------------------------------------------------------------------------------------------

    def carry_out(self, transition: TransactionMetadata | None, fate: str) -> bool:
        """Write a transition, or fail to. True when it took effect and an answer goes out."""
        if transition is None:
            return True
        before = self.txn.coordinator.get(ID)
        assert before is not None
        if transition.state in PREPARED or transition.is_kept:
            assert self.txn.produce(*before.identity) is not ErrorCode.NONE, "written while the decision is"
        if fate == "cancelled":
            self.txn.coordinator.cancel(transition)
            return False
        if fate != "crash before":
            self.txn.log.append(encode_transaction(transition))
            self.took_effect(before, transition)
        if fate.startswith("crash"):
            self.txn.restart()
            return False
        self.txn.coordinator.complete(transition)
        return True

    def took_effect(self, before: TransactionMetadata, after: TransactionMetadata) -> None:
        if after.state is TransactionState.ONGOING and before.state in IDLE:
            self.transactions += 1
        if after.state is TransactionState.ONGOING:
            for mine in (after.identity, after.client_identity):
                previous = self.transaction_of.setdefault(mine, self.transactions)
                assert previous == self.transactions, f"{mine} stands for two transactions"
        if after.state in PREPARED:
            for mine in {before.identity, before.client_identity}:
                assert mine not in self.decided, f"{mine} is decided twice"
                self.decided[mine] = after.state is TransactionState.PREPARE_COMMIT
        identity = after.client_identity
        if identity not in self.handed_out:
            self.handed_out.append(identity)

    # -- Requests, from anybody who ever had an identity --------------------------------------------------------

    def pick(self, data: st.DataObject) -> Identity:
        recent = st.sampled_from(self.handed_out[-3:])
        return data.draw(recent | st.sampled_from(self.handed_out), label="identity")

    @rule(data=st.data(), known=st.booleans(), two_phase=st.booleans(), fate=FATES)
    def init_producer_id(self, data: st.DataObject, known: bool, two_phase: bool, fate: str) -> None:
        identity = self.pick(data) if known else (-1, -1)
        answer = self.txn.coordinator.init_producer_id(
            ID, 60_000, *identity, self.txn.now, 6, enable_two_phase=two_phase
        )
        answered = self.carry_out(answer.transition, fate)
        if answer.error is ErrorCode.NONE and (answered or fate == "crash after"):
            self.repeatable = identity
        if answered and answer.error is ErrorCode.NONE:
            assert answer.transition is not None
            mine = answer.producer_id, answer.producer_epoch
            assert mine not in self.decided
            self.superseded |= set(self.handed_out) - {mine}

    @rule(two_phase=st.booleans(), fate=FATES)
    def take_over(self, two_phase: bool, fate: str) -> None:
        """InitProducerId that keeps what is open."""
        before = self.txn.current
        answer = self.txn.coordinator.init_producer_id(
            ID, 60_000, -1, -1, self.txn.now, 6, enable_two_phase=two_phase, keep_prepared=True
        )
        if answer.error is not ErrorCode.NONE:
            assert answer.transition is None, "an open transaction was ended"
            return
        is_open = before.state is TransactionState.ONGOING
        assert answer.ongoing == (before.identity if is_open else (-1, -1))
        answered = self.carry_out(answer.transition, fate)
        if answered or fate == "crash after":
            self.repeatable = (-1, -1)
        if answered:
            mine = answer.producer_id, answer.producer_epoch
            assert mine not in self.decided
            assert self.txn.produce(*mine) is not ErrorCode.NONE, "a kept transaction takes data"
            self.superseded |= set(self.handed_out) - {mine}

    @rule(data=st.data(), partition=st.sampled_from([P0, P1]), fate=FATES)
    def produce(self, data: st.DataObject, partition, fate: str) -> None:
        identity = self.pick(data)
        answer = self.txn.coordinator.add_partitions(
            ID, *identity, [partition], self.txn.now, api_version=12, implicit=True
        )
        if not self.carry_out(answer.transition, fate):
            return
        error = self.txn.produce(*identity, partition)
        assert (error is ErrorCode.NONE) == (answer.error is ErrorCode.NONE)
        if error is ErrorCode.NONE:
            assert identity not in self.superseded, "a fenced producer wrote"
            assert identity not in self.decided, "written after the decision"

    @rule(data=st.data(), commit=st.booleans(), fate=FATES)
    def end_transaction(self, data: st.DataObject, commit: bool, fate: str) -> None:
        identity = self.pick(data)
        answer = self.txn.coordinator.end_transaction(ID, *identity, commit, self.txn.now, 5)
        if self.carry_out(answer.transition, fate) and answer.error is ErrorCode.NONE:
            assert self.decided[identity] is commit, "the answer says what did not happen"
            assert (answer.producer_id, answer.producer_epoch) in self.handed_out
            assert identity not in self.superseded

    @precondition(lambda self: self.txn.coordinator.unfinished())
    @rule(fate=FATES)
    def finish(self, fate: str) -> None:
        self.carry_out(self.txn.coordinator.finish(ID, self.txn.now), fate)

    @precondition(lambda self: self.txn.current.state is TransactionState.ONGOING)
    @rule(fate=FATES)
    def time_out(self, fate: str) -> None:
        self.txn.now += 60_001
        if self.txn.current.timeout_ms == NO_TIMEOUT_MS:
            assert self.txn.coordinator.expired(self.txn.now) == []
            return
        assert self.txn.coordinator.expired(self.txn.now) == [ID]
        answer: Answer = self.txn.coordinator.time_out(ID, self.txn.now)
        self.carry_out(answer.transition, fate)

    @rule()
    def crash(self) -> None:
        before = self.txn.current
        self.txn.restart()
        assert self.txn.current == before

    # -- At every moment ----------------------------------------------------------------------------------------

    @invariant()
    def every_earlier_identity_is_refused(self) -> None:
        if not self.handed_out:
            return
        current = self.txn.current
        for identity in self.superseded:
            # A producer id that was rotated away is unknown, as in Kafka; while a transaction is kept, it is fenced.
            refused = FENCED if current.is_kept else (*FENCED, ErrorCode.INVALID_PRODUCER_ID_MAPPING)
            assert self.txn.produce(*identity) in refused
            assert self.txn.add(*identity).error in refused
            for commit in (True, False):
                ended = self.txn.decide(*identity, commit)
                assert ended.error in refused
                assert ended.transition is None
            if identity != self.repeatable:
                again = self.txn.init(*identity)
                assert again.error is not ErrorCode.NONE
                assert again.transition is None, "a zombie aborted its successor's transaction"

    @invariant()
    def epochs_stay_in_range(self) -> None:
        if self.handed_out:
            assert 0 <= self.txn.current.producer_epoch <= EPOCH_MAX + 1
            assert all(0 <= epoch <= EPOCH_MAX for _, epoch in self.handed_out)

    @invariant()
    def only_one_identity_can_write(self) -> None:
        able = [identity for identity in self.handed_out if self.txn.produce(*identity) is ErrorCode.NONE]
        assert len(able) <= 1


TransactionMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestTransactionMachine = TransactionMachine.TestCase

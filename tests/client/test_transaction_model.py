"""The transactional protocol against a model broker and a network that loses, delays and doubles.

Whatever the network does: a reader of committed records sees exactly the transactions that the caller was told are
committed, those of unknown outcome whole or not at all, each once, in order, and with the offset of the same
transaction.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from semel.client.batches import Batch, Identity
from semel.client.transaction import TransactionProtocol
from semel.client.transaction_state import Kind, Request, State, TransactionView
from semel.errors import AbortTransaction, ErrorCode, Fenced, OutcomeUnknown
from semel.types import GroupMetadata, TopicPartition
from tests.client.model_broker import Copy, ModelBroker

INPUT = TopicPartition("input", 0)
GROUP = GroupMetadata("group", 1, "member")
FATES = ("answered", "answer lost", "lost", "late", "not sent", "slow", "refused in doubt")


@dataclass(frozen=True)
class Records:
    label: str
    count: int
    size: int = 100

    def build(self, **ids: int) -> bytes:
        return self.label.encode()


@dataclass
class Network:
    """Takes copies to the broker as the script says; without a script left it is a good network."""

    broker: ModelBroker
    fates: list[tuple[str, int]]
    late: list[tuple[int, object]] = field(default_factory=list)
    hold: Kind | None = None
    """The first request of this kind is withheld, for `hold_steps`."""
    hold_steps: int = 0
    step: int = 0

    def fate(self, copy: object) -> tuple[str, int]:
        if self.hold is (Kind.Produce if isinstance(copy, Copy) else copy.kind):
            self.hold = None
            return "late", self.hold_steps
        return self.fates.pop(0) if self.fates else ("answered", 0)

    def tick(self) -> None:
        self.step += 1
        due = [copy for at, copy in self.late if at <= self.step]
        self.late = [item for item in self.late if item[0] > self.step]
        for copy in due:
            self.deliver(copy)

    def deliver(self, copy: object) -> object:
        return self.broker.produce(copy) if isinstance(copy, Copy) else self.broker.handle(copy)

    def take(self, copy: object, fate_and_delay: tuple[str, int] | None = None) -> tuple[str, object]:
        """What the sender sees of a copy: answered (with the answer), unanswered or not sent."""
        fate, delay = fate_and_delay or self.fate(copy)
        if fate == "not sent":
            return "not sent", None
        if fate == "late":
            self.late.append((self.step + delay, copy))
            return "unanswered", None
        if fate == "lost":
            return "unanswered", None
        answer = self.deliver(copy)
        if fate == "refused in doubt" and not isinstance(copy, Copy) and copy.kind is Kind.EndTxn:
            # The decision is written, its sync or replication failed, and a coordinator that reads the log carries it
            # out all the same.
            return "answered", (ErrorCode.COORDINATOR_NOT_AVAILABLE, Identity())
        return ("unanswered", None) if fate == "answer lost" else ("answered", answer)


class Driver:
    """The shell without I/O: writes what the protocol asks for, reports what came of it."""

    def __init__(self, version: int, fates: list[tuple[str, int]], first_epoch: int = 0, patience: int = 60) -> None:
        self.version = version
        self.patience = patience
        self.broker = ModelBroker(version, first_epoch)
        self.network = Network(self.broker, fates)
        self.restarts = 0
        self.slow: list[tuple[int, Batch, Copy]] = []
        self.restart()

    def restart(self) -> None:
        self.network.late += [(self.network.step + at, copy) for at, (_, _, copy) in enumerate(self.slow)]
        self.slow.clear()
        self.protocol = TransactionProtocol("id")
        self._initialize()

    def _initialize(self) -> None:
        self.protocol.initialize(self.version)
        for _ in range(2_000):
            if self.protocol.is_idle and not (self.protocol.state is State.Ready and self.protocol.needs_init):
                return
            self.round()
        raise AssertionError(f"{self.protocol} never became ready")

    def round(self) -> None:
        self.network.tick()
        protocol = self.protocol
        request = protocol.next_request()
        if request is not None:
            self._control(request)
        self._slow_answers()
        for partition in protocol.sendable():
            while (batch := protocol.take_batch(partition, "node")) is not None:
                self._produce(batch, self._copy(batch))

    def _slow_answers(self) -> None:
        """Batches on a slow connection reach the broker, and their answers us, in order when their time has come."""
        while self.slow and self.slow[0][0] <= self.network.step:
            _, batch, copy = self.slow.pop(0)
            self.protocol.batch_answered(batch, int(self.network.deliver(copy)))

    def _produce(self, batch: Batch, copy: Copy) -> None:
        if self.slow:  # Behind others on the same connection.
            self.slow.append((self.slow[-1][0], batch, copy))
            return
        fate, delay = self.network.fate(copy)
        if fate == "slow":
            self.slow.append((self.network.step + delay, batch, copy))
            return
        seen, answer = self.network.take(copy, (fate, delay))
        if seen == "answered":
            self.protocol.batch_answered(batch, int(answer))
        elif seen == "not sent":
            self.protocol.batch_not_sent(batch, "no connection")
        else:
            self.protocol.batch_unanswered(batch, "connection lost")

    def _copy(self, batch: Batch) -> Copy:
        assert batch.identity is not None
        label = batch.encode(transactional=True).decode()
        return Copy(batch.partition, batch.identity, batch.base_sequence, batch.count, label, self.protocol.protocol)

    def _control(self, request: Request) -> None:
        protocol = self.protocol
        if request.kind is Kind.DescribeTransactions:
            protocol.diagnosed(request, TransactionView(self.broker.identity, self.broker.state, 10_000))
            return
        seen, answer = self.network.take(request)
        if seen == "not sent":
            protocol.not_sent(request)
        elif seen == "unanswered":
            protocol.unanswered(request)
        else:
            code, identity = answer
            match request.kind:
                case Kind.InitProducerId:
                    protocol.init_answered(request, code, identity)
                case Kind.AddPartitionsToTxn:
                    protocol.partitions_answered(request, dict.fromkeys(request.partitions, int(code)))
                case Kind.AddOffsetsToTxn:
                    protocol.offsets_added(request, code)
                case Kind.TxnOffsetCommit:
                    protocol.offsets_answered(request, dict.fromkeys(request.offsets, int(code)))
                case Kind.EndTxn:
                    protocol.end_answered(request, code, identity)

    def transaction(self, batches: list[tuple[TopicPartition, Records]], offset: int | None, commit: bool) -> str:
        """Run one transaction as a caller would; what the caller was told."""
        try:
            self.protocol.begin(self.version)
            for partition, records in batches:
                self.protocol.produce(Batch(partition, records, deadline=1e9))
                if records.count % 2:
                    self.round()
            if offset is not None:
                self.protocol.send_offsets({INPUT: offset}, GROUP)
            return self._finish(commit)
        except AbortTransaction:
            return self._clean_up()
        except Fenced:
            return self._take_over()

    def _finish(self, commit: bool) -> str:
        self.protocol.end(commit=commit)
        for _ in range(self.patience):
            if self.protocol.is_idle:
                break
            self.round()
        if not self.protocol.is_idle:
            given_up = self.protocol.give_up(1.0)
            if isinstance(given_up, OutcomeUnknown):
                self._initialize()
                if self.protocol.state is State.Fenced:
                    return self._take_over("unknown" if commit else "aborted")
                if self.protocol.state is State.Abortable:
                    self._clean_up()
                return "unknown" if commit else "aborted"
            raise given_up
        if self.protocol.state is not State.Ready:
            raise self.protocol.error()
        return "committed" if commit else "aborted"

    def _clean_up(self) -> str:
        self.patience = 3_000
        try:
            self._finish(commit=False)
        except Fenced:
            return self._take_over()
        return "aborted"

    def _take_over(self, told: str = "") -> str:
        """A fenced process ends; the next one takes the id over."""
        doubt = self.protocol._end_in_doubt and self.protocol._commit
        self.restarts += 1
        self.restart()
        return told or ("unknown" if doubt else "aborted")


one_fate = st.tuples(st.sampled_from(FATES), st.integers(0, 12))


def spread(faults: dict[int, tuple[str, int]]) -> list[tuple[str, int]]:
    """A few faults in a good network."""
    return [faults.get(at, ("answered", 0)) for at in range(max(faults, default=-1) + 1)]


fates = st.dictionaries(st.integers(0, 25), one_fate, max_size=3).map(spread) | st.lists(one_fate, max_size=40)
transactions = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4)), max_size=8),
        st.booleans(),
        st.booleans(),
    ),
    min_size=1,
    max_size=5,
)


def check(
    version: int, script: list[tuple[str, int]], plan: list, first_epoch: int, patience: int, hold=(None, 0)
) -> Driver:
    driver = Driver(version, list(script), first_epoch, patience)
    driver.network.hold, driver.network.hold_steps = hold
    told: list[tuple[str, dict[TopicPartition, list[str]], int | None]] = []
    for number, (batches, with_offset, commit) in enumerate(plan):
        records = [
            (TopicPartition("out", partition), Records(f"{number}.{index}", count))
            for index, (partition, count) in enumerate(batches)
        ]
        expected: dict[TopicPartition, list[str]] = {}
        for partition, item in records:
            expected.setdefault(partition, []).append(item.label)
        offset = number + 1 if with_offset else None
        driver.patience = patience
        outcome = driver.transaction(records, offset, commit)
        assert commit or outcome == "aborted"
        told.append((outcome, expected, offset))
    for _ in range(100):  # Whatever is still on the way arrives.
        driver.round()
    _judge(driver.broker, told)
    return driver


def _judge(broker: ModelBroker, told: list[tuple[str, dict[TopicPartition, list[str]], int | None]]) -> None:
    visible = {label for labels in broker.committed.values() for label in labels}
    want: dict[TopicPartition, list[str]] = {}
    offsets = [0]
    for outcome, expected, offset in told:
        labels = {label for items in expected.values() for label in items}
        happened = outcome == "committed"
        if outcome == "unknown":
            assert labels <= visible or not labels & visible, f"torn: {labels & visible} of {labels}"
            happened = labels <= visible if labels else broker.offset == offset
        if happened:
            for partition, items in expected.items():
                want.setdefault(partition, []).extend(items)
            if offset is not None:
                offsets.append(offset)
    assert broker.committed == want
    assert broker.offset == offsets[-1]


@pytest.mark.parametrize("version", [1, 2])
@given(script=fates, plan=transactions, first_epoch=st.sampled_from([0, 32_763]), patience=st.sampled_from([8, 3_000]))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_committed_is_what_the_caller_was_told(version, script, plan, first_epoch, patience) -> None:
    driver = check(version, script, plan, first_epoch, patience)
    first_init_was_answered = not script or script[0][0] == "answered"
    if version == 2 and first_init_was_answered:  # A late copy of the first InitProducerId looks like a new owner.
        assert driver.restarts == 0, "transactions V2 fenced its own producer"


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("commit_first", [True, False])
@pytest.mark.parametrize("kind", [Kind.EndTxn, Kind.Produce, Kind.TxnOffsetCommit, Kind.AddPartitionsToTxn])
@pytest.mark.parametrize("delay", range(1, 20))
def test_one_late_copy_into_the_next_transaction(version, commit_first, kind, delay) -> None:
    """C1: one request withheld, its retry answered, and the copy delivered at every moment of what follows."""
    if version == 2 and kind is Kind.AddPartitionsToTxn:
        return
    batches = [(0, 2), (0, 3), (1, 1), (0, 1), (0, 3)]
    plan = [([(0, 1), (1, 1)], True, commit_first), (batches, True, not commit_first), (batches, True, True)]
    driver = check(version, [], plan, 0, 3_000, hold=(kind, delay))
    assert driver.network.hold is None, "nothing was withheld"


@given(plan=transactions, script=fates, at=st.lists(st.integers(0, 60), max_size=3), version=st.sampled_from([1, 2]))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example(plan=[([(0, 1), (0, 2)], True, True)], script=[], at=[3], version=2)
def test_the_coordinators_time_out_is_never_reported_as_a_commit(plan, script, at, version) -> None:
    class TimingOut(Network):
        def tick(self) -> None:
            super().tick()
            if self.step in at:
                self.broker.time_out()

    original = Network
    globals()["Network"] = TimingOut
    try:
        check(version, script, plan, 0, 3_000)
    finally:
        globals()["Network"] = original


def test_v2_recovers_from_a_time_out_and_v1_names_it() -> None:
    for version in (1, 2):
        driver = Driver(version, [])
        driver.protocol.begin(version)
        driver.protocol.produce(Batch(TopicPartition("out", 0), Records("a", 1), deadline=1e9))
        for _ in range(4):
            driver.round()
        driver.broker.time_out()
        driver.protocol.produce(Batch(TopicPartition("out", 0), Records("b", 1), deadline=1e9))
        for _ in range(4):
            driver.round()
        failure = driver.protocol.failure
        assert isinstance(failure, AbortTransaction if version == 2 else Fenced)
        assert "time-out of 10000 ms" in str(failure)
        assert "'id'" in str(failure)


@pytest.mark.parametrize("version", [1, 2])
def test_a_commit_that_was_refused_in_doubt_is_never_called_aborted(version: int) -> None:
    """The log had the decision, its sync failed; after the broker's restart it was carried out."""
    driver = Driver(version, [])
    driver.protocol.begin(version)
    driver.protocol.produce(Batch(TopicPartition("out", 0), Records("a", 1), deadline=1e9))
    driver.round()
    driver.round()
    driver.protocol.end(commit=True)
    refused = (ErrorCode.COORDINATOR_NOT_AVAILABLE, Identity())
    for _ in range(3):
        request = driver.protocol.next_request()
        assert request is not None
        assert request.kind is Kind.EndTxn
        driver.protocol.end_answered(request, *refused)
    assert isinstance(driver.protocol.give_up(1.0), OutcomeUnknown)
    driver._initialize()
    assert driver.protocol.state is State.Ready
    assert driver.broker.committed == {TopicPartition("out", 0): ["a"]}


def test_a_new_owner_is_named() -> None:
    """C6, C15: fenced at once, with the name of the id and who has it, and nothing is sent any more."""
    for version in (1, 2):
        driver = Driver(version, [])
        driver.protocol.begin(version)
        driver.protocol.produce(Batch(TopicPartition("out", 0), Records("a", 1), deadline=1e9))
        driver.broker.handle(Request(Kind.InitProducerId, Identity(), version))
        code, newer = driver.broker.handle(Request(Kind.InitProducerId, Identity(), version))
        assert code == 0
        for _ in range(4):
            driver.round()
        assert driver.protocol.state is State.Fenced
        assert isinstance(driver.protocol.failure, Fenced)
        assert "'id'" in str(driver.protocol.failure)
        assert str(newer) in str(driver.protocol.failure)
        assert driver.protocol.next_request() is None
        with pytest.raises(Fenced):
            driver.protocol.initialize(version)

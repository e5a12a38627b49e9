"""KIP-939 through the whole broker: what each identity may do on every API, what readers see, what a crash leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import semel.failpoints
from semel.broker.config import BrokerConfig
from semel.client.describe import decode_described
from semel.errors import ErrorCode
from semel.failpoints import FailpointRaised, arm_failpoints
from tests.broker.core import Core, batch
from tests.broker.test_transactions import Writer, committed_values, offset_of

E = ErrorCode
NO_TIMEOUT_MS = 2**31 - 1
DAY_MS = 86_400_000


@pytest.fixture(autouse=True)
def disarm() -> Any:
    yield
    semel.failpoints.arm_failpoints("")


def init(core: Core, name: str | None, *ids: int, two_phase: bool = True, keep: bool = False, timeout: int = 0) -> Any:
    producer_id, epoch = ids or (-1, -1)
    return core.ask(
        22,
        6,
        transactional_id=name,
        transaction_timeout=timeout,
        producer_id=producer_id,
        producer_epoch=epoch,
        enable2_pc=two_phase,
        keep_prepared_txn=keep,
    )


def identities(answer: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """The client's identity, and the one of the transaction that it was handed."""
    assert answer.error_code == 0, answer
    return (answer.producer_id, answer.producer_epoch), (
        answer.ongoing_txn_producer_id,
        answer.ongoing_txn_producer_epoch,
    )


class TwoPhaseWriter(Writer):
    """A producer whose transactions never time out."""

    def __init__(self, core: Core, transactional_id: str) -> None:
        super().__init__(core, transactional_id)
        self.producer_id, self.epoch = identities(init(core, transactional_id))[0]


def described(core: Core, name: str = "w") -> tuple[str, tuple[int, int], int]:
    frame = core.send(65, 0, transactional_ids=[name])
    assert isinstance(frame, bytes)
    [found] = decode_described(frame)
    return found.state, (found.producer_id, found.producer_epoch), found.timeout_ms


def prepared(core: Core) -> TwoPhaseWriter:
    """A producer that wrote a record and an offset, and then is gone."""
    core.create("orders", 1, retention_ms="-1")
    core.create("in", 1)
    writer = TwoPhaseWriter(core, "w")
    assert writer.write("orders", b"a") == 0
    assert writer.commit_offset("g", "in", 7) == 0
    return writer


@pytest.mark.parametrize("restarted", [True, False])
@pytest.mark.parametrize("commit", [True, False])
def test_a_recovering_process_ends_what_its_predecessor_prepared(core: Core, commit: bool, restarted: bool) -> None:
    writer = prepared(core)
    client, ongoing = identities(init(core, "w", keep=True))
    assert ongoing == (writer.producer_id, writer.epoch)
    if restarted:
        core.restart()
    assert described(core) == ("Ongoing", ongoing, NO_TIMEOUT_MS)
    assert core.fetch("orders", 0, committed=True).last_stable_offset == 0
    assert offset_of(core, "g", "in") == (E.UNSTABLE_OFFSET_COMMIT, -1)
    answer = core.end("w", *client, commit)
    assert (answer.error_code, answer.producer_id, answer.producer_epoch) == (0, client[0], client[1] + 1)
    assert committed_values(core, "orders") == ([b"a"] if commit else [])
    assert offset_of(core, "g", "in") == (0, 7 if commit else -1)
    core.restart()
    assert core.end("w", *client, commit).error_code == 0, "the retry after the crash"
    assert committed_values(core, "orders") == ([b"a"] if commit else [])
    writer.producer_id, writer.epoch = client[0], client[1] + 1
    writer.sequence.clear()
    assert writer.write("orders", b"b") == 0
    assert writer.end(True) == 0
    assert committed_values(core, "orders") == ([b"a"] if commit else []) + [b"b"]


def test_every_api_refuses_who_wrote_a_kept_transaction_and_everybody_writes_into_it_in_vain(core: Core) -> None:
    writer = prepared(core)
    old = identities(init(core, "w", keep=True))[0]
    client = identities(init(core, "w", keep=True))[0]
    before = core.node.transactions.coordinator.get("w")
    for identity in ((writer.producer_id, writer.epoch), old, client):
        own = identity == client
        writer.producer_id, writer.epoch = identity
        writer.sequence["orders", 0] = 1 if identity[1] == 0 else 0
        coordinator_code = E.INVALID_TXN_STATE if own else E.PRODUCER_FENCED
        write_code = E.INVALID_TXN_STATE if own else E.INVALID_PRODUCER_EPOCH
        for version in (1, 2):
            writer.version = version
            assert writer.write("orders", b"x", add=False) == write_code
        assert writer.commit_offset("g", "in", 9) == write_code
        assert writer.add("orders") == coordinator_code
        answer = core.ask(25, 3, group_id="g", **writer.ids)
        assert answer.error_code == coordinator_code
        for version in range(5):
            word = coordinator_code if own or version > 1 else E.INVALID_PRODUCER_EPOCH
            assert core.end("w", *identity, True, version).error_code == word
        if not own:
            assert core.end("w", *identity, True).error_code == E.PRODUCER_FENCED
            assert core.end("w", *identity, False).error_code == E.PRODUCER_FENCED
            assert core.init("w", *identity).error_code == E.PRODUCER_FENCED
    assert core.node.transactions.coordinator.get("w") == before
    assert core.end("w", *client, True).error_code == 0
    assert committed_values(core, "orders") == [b"a"]
    assert offset_of(core, "g", "in") == (0, 7)


def test_a_prepared_transaction_outlives_every_time_out_and_a_restart(core: Core) -> None:
    writer = prepared(core)
    core.pass_time(30 * DAY_MS)
    core.node.sweep()
    core.node.expire()
    core.restart()
    core.node.sweep()
    assert described(core) == ("Ongoing", (writer.producer_id, writer.epoch), NO_TIMEOUT_MS)
    assert writer.end(True) == 0
    assert committed_values(core, "orders") == [b"a"]


def test_an_operator_ends_a_forgotten_transaction(core: Core, caplog: pytest.LogCaptureFixture) -> None:
    """Admin.forceTerminateTransaction is an InitProducerId v5 of nobody."""
    writer = prepared(core)
    identities(init(core, "w", keep=True))
    core.pass_time(DAY_MS)
    listed = core.ask(66, 2, state_filters=["Ongoing"], producer_id_filters=[], duration_filter=DAY_MS)
    assert [item.transactional_id for item in listed.transaction_states] == ["w"]
    assert core.init("w", version=5).error_code == 0
    assert f"transaction {writer.producer_id}:{writer.epoch} of w, which had no time-out, is aborted" in caplog.text
    assert described(core)[0] == "Empty"
    assert committed_values(core, "orders") == []
    assert offset_of(core, "g", "in") == (0, -1)
    assert writer.end(True) == E.PRODUCER_FENCED
    core.pass_time(8 * DAY_MS)
    core.node.sweep()
    assert core.node.transactions.coordinator.get("w") is None, "the id is forgotten like any other"


@pytest.mark.parametrize("keep", [True, False])
def test_switched_off_two_phase_commit_is_refused(tmp_path: Path, keep: bool) -> None:
    core = Core(tmp_path, BrokerConfig(two_phase_commit=False))
    assert init(core, "w", keep=keep).error_code == E.TRANSACTIONAL_ID_AUTHORIZATION_FAILED
    assert core.node.transactions.coordinator.get("w") is None
    assert init(core, "w", two_phase=False, keep=keep, timeout=1_000).error_code == 0
    assert init(core, None, keep=keep).error_code == 0, "the idempotent producer has nothing to do with it"


def test_with_transactions_v1_nothing_is_kept(tmp_path: Path) -> None:
    core = Core(tmp_path, BrokerConfig(transaction_version=1))
    assert init(core, "w", keep=True).error_code == E.UNSUPPORTED_VERSION
    assert init(core, "w", keep=False).error_code == 0


@pytest.mark.parametrize("first_epoch", range(32_760, 32_767))
def test_a_crash_loop_around_the_last_epoch(core: Core, first_epoch: int) -> None:
    """Producer id rotation by commits, by keeps and by both; the data is there once and no identity comes twice."""
    core.create("orders", 1)
    writer = TwoPhaseWriter(core, "w")
    coordinator = core.node.transactions.coordinator
    current = coordinator.get("w")
    assert current is not None
    core.node.transactions._persist(coordinator._propose(replace(current, producer_epoch=first_epoch)), core.now_ms)
    writer.epoch = first_epoch
    given = {(writer.producer_id, writer.epoch)}
    for number in range(8):
        assert writer.write("orders", b"%d" % number) == 0
        ongoing = (writer.producer_id, writer.epoch)
        for _ in range(number % 3):
            core.restart()
            client, named = identities(init(core, "w", keep=True))
            assert named == ongoing
            assert client not in given
            given.add(client)
            writer.producer_id, writer.epoch = client
        assert writer.end(number % 4 != 1) == 0
        assert (writer.producer_id, writer.epoch) not in given
        given.add((writer.producer_id, writer.epoch))
    assert committed_values(core, "orders") == [b"%d" % number for number in range(8) if number % 4 != 1]


def test_a_crash_after_the_new_identity_is_durable_names_the_same_transaction_again(core: Core) -> None:
    writer = prepared(core)
    ongoing = (writer.producer_id, writer.epoch)
    arm_failpoints("broker.after_init:raise:1")
    with pytest.raises(FailpointRaised):
        init(core, "w", keep=True)
    core.restart()
    client, named = identities(init(core, "w", keep=True))
    assert (named, client) == (ongoing, (ongoing[0], ongoing[1] + 2)), "the lost identity is not given out again"
    assert core.end("w", ongoing[0], ongoing[1] + 1, True).error_code == E.PRODUCER_FENCED
    assert core.end("w", *client, True).error_code == 0
    assert committed_values(core, "orders") == [b"a"]


@pytest.mark.parametrize("point", ["before_prepare", "after_prepare", "between_markers", "after_markers"])
@pytest.mark.parametrize("commit", [True, False])
def test_a_crash_inside_the_end_of_a_kept_transaction(core: Core, point: str, commit: bool) -> None:
    prepared(core)
    client = identities(init(core, "w", keep=True))[0]
    arm_failpoints(f"broker.{point}:raise:1")
    with pytest.raises(FailpointRaised):
        core.end("w", *client, commit)
    core.restart()
    again, ongoing = identities(init(core, "w", keep=True))
    decided = point != "before_prepare"
    assert (ongoing == (-1, -1)) is decided
    if not decided:
        assert core.end("w", *again, commit).error_code == 0
    assert committed_values(core, "orders") == ([b"a"] if commit else [])
    assert offset_of(core, "g", "in") == (0, 7 if commit else -1)


def test_a_late_batch_of_the_dead_process_is_not_in_the_transaction_that_it_prepared(core: Core) -> None:
    """The log alone still has its transaction open: only the coordinator knows that somebody took it over."""
    writer = prepared(core)
    ids = {"producer_id": writer.producer_id, "producer_epoch": writer.epoch}
    client = identities(init(core, "w", keep=True))[0]
    late = batch(b"late", base_sequence=1, transactional=True, **ids)
    for version in (9, 11, 12, 13):
        assert (
            core.produce("orders", late, version=version, transactional_id="w").error_code == E.INVALID_PRODUCER_EPOCH
        )
    assert core.end("w", *client, True).error_code == 0
    assert committed_values(core, "orders") == [b"a"]

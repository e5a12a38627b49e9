"""kafka_facts 2.2: sequences, epochs and duplicates, as measured on Apache Kafka 4.3.1."""

from __future__ import annotations

from pathlib import Path

import pytest

from semel.errors import ErrorCode
from semel.log.log import LogError, PartitionLog
from tests.log.builders import NOW, batch, open_log

MAX = 2**31 - 1
OUT_OF_ORDER = ErrorCode.OUT_OF_ORDER_SEQUENCE_NUMBER
OLD_EPOCH = ErrorCode.INVALID_PRODUCER_EPOCH


def six(log: PartitionLog) -> None:
    """Offsets 0..5: six batches of one record, epoch 3, sequences 0..5."""
    for seq in range(6):
        log.append(batch(pid=9, epoch=3, seq=seq), NOW)


# (records, epoch, sequence) -> offset of the batch, whether it is a duplicate; or the refusal.
AFTER_SIX = {
    "resend of the last": ((1, 3, 5), (5, True)),
    "resend of the fifth back": ((1, 3, 1), (1, True)),
    "resend of the sixth back": ((1, 3, 0), OUT_OF_ORDER),
    "the next": ((1, 3, 6), (6, False)),
    "gap": ((1, 3, 7), OUT_OF_ORDER),
    "overlap 5..6": ((2, 3, 5), OUT_OF_ORDER),
    "two remembered ones as one": ((2, 3, 4), OUT_OF_ORDER),
    "higher epoch at 3": ((1, 4, 3), OUT_OF_ORDER),
    "higher epoch at 6": ((1, 4, 6), OUT_OF_ORDER),
    "higher epoch at 0": ((1, 4, 0), (6, False)),
    "old epoch": ((1, 2, 6), OLD_EPOCH),
    "old epoch, exact range": ((1, 2, 5), OLD_EPOCH),
    "old epoch at 0": ((1, 2, 0), OLD_EPOCH),
}


@pytest.mark.parametrize("reopened", [False, True])
@pytest.mark.parametrize("name", AFTER_SIX)
def test_answers_after_six_batches(tmp_path: Path, name: str, reopened: bool) -> None:
    (count, epoch, seq), expected = AFTER_SIX[name]
    log = open_log(tmp_path)
    six(log)
    if reopened:
        log.close()
        log = open_log(tmp_path)
        assert log.recovery.read_bytes == 0  # From the snapshot alone, which has all five batches.
    sent = batch(count, pid=9, epoch=epoch, seq=seq)
    if isinstance(expected, ErrorCode):
        with pytest.raises(LogError) as refused:
            log.append(sent, NOW)
        assert refused.value.code == expected
        assert log.log_end_offset == 6
    else:
        result = log.append(sent, NOW)
        assert (result.base_offset, result.duplicate) == expected
        assert log.log_end_offset == (6 if result.duplicate else 7)


def test_half_of_a_batch_is_not_a_duplicate(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.append(batch(2, pid=9, seq=0), NOW)
    with pytest.raises(LogError) as refused:
        log.append(batch(1, pid=9, seq=0), NOW)
    assert refused.value.code == OUT_OF_ORDER
    assert log.append(batch(2, pid=9, seq=0), NOW) == (0, 1, -1, 0, True)


def test_a_duplicate_has_the_time_of_its_first_append(tmp_path: Path) -> None:
    log = open_log(tmp_path, timestamp_type="LogAppendTime")
    log.append(batch(pid=9), NOW)
    assert log.append(batch(pid=9), NOW + 500).log_append_time_ms == NOW


def test_sequences_wrap(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    assert log.append(batch(5, pid=9, seq=MAX - 2), NOW).base_offset == 0
    assert log.append(batch(5, pid=9, seq=MAX - 2), NOW).duplicate
    with pytest.raises(LogError):
        log.append(batch(pid=9, seq=3), NOW)
    assert log.append(batch(pid=9, seq=2), NOW).base_offset == 5


def test_zero_follows_the_largest_sequence(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.append(batch(pid=9, seq=MAX), NOW)
    assert not log.append(batch(pid=9, seq=0), NOW).duplicate


@pytest.mark.parametrize(
    ("transactional", "version", "seq", "code"),
    [
        (False, 1, 5, None),
        (False, 2, 5, None),
        (True, 1, 5, None),
        (True, 2, 0, None),
        (True, 2, 5, OUT_OF_ORDER),
    ],
)
def test_an_unknown_producer_may_start_anywhere_except_in_a_v2_transaction(
    tmp_path: Path, transactional: bool, version: int, seq: int, code: ErrorCode | None
) -> None:
    log = open_log(tmp_path)
    sent = batch(pid=9, seq=seq, txn=transactional)
    if code is None:
        assert log.append(sent, NOW, transaction_version=version).base_offset == 0
    else:
        with pytest.raises(LogError) as refused:
            log.append(sent, NOW, transaction_version=version)
        assert refused.value.code == code
        assert log.log_end_offset == 0


def test_nothing_outside_the_open_transaction(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.append(batch(pid=9, txn=True), NOW)
    with pytest.raises(LogError) as refused:
        log.append(batch(pid=9, seq=1), NOW)
    assert refused.value.code == ErrorCode.INVALID_TXN_STATE
    # The epoch comes first: a fenced producer is told so, or it would treat this as fatal (KAFKA-19690).
    with pytest.raises(LogError) as refused:
        log.append(batch(pid=9, epoch=-1, seq=1), NOW)
    assert refused.value.code == OLD_EPOCH


def test_v1_sequences_go_on_across_transactions(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.append(batch(2, pid=9, txn=True), NOW)
    log.append_marker(9, 0, True, 0, NOW)
    assert log.append(batch(pid=9, seq=2, txn=True), NOW).base_offset == 3
    assert log.append(batch(2, pid=9, seq=0, txn=True), NOW).duplicate


def test_v2_sequences_start_again_behind_the_marker_which_fences_the_old_epoch(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.append(batch(2, pid=9, txn=True), NOW, transaction_version=2)
    log.append_marker(9, 1, True, 0, NOW)
    for seq, epoch, code in ((2, 0, OLD_EPOCH), (0, 0, OLD_EPOCH), (2, 1, OUT_OF_ORDER)):
        with pytest.raises(LogError) as refused:
            log.append(batch(pid=9, epoch=epoch, seq=seq, txn=True), NOW, transaction_version=2)
        assert refused.value.code == code
    assert log.append(batch(pid=9, epoch=1, txn=True), NOW, transaction_version=2).base_offset == 3


def test_expiry_goes_by_the_brokers_clock_and_spares_open_transactions(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    day = 86_400_000
    log.append(batch(pid=1, ts=0), NOW)  # Sends event times of 1970.
    log.append(batch(pid=2, txn=True, ts=0), NOW - day)
    log.append(batch(pid=3, ts=0), NOW - day)
    assert log.expire_producers(NOW + 1) == 1
    assert [producer.producer_id for producer in log.producers()] == [1, 2]
    assert log.append(batch(pid=1, ts=0), NOW).duplicate

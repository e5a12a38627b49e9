"""The fetcher against a model of a broker: every committed record once, in order, whatever happens in between."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semel.client import fetcher as module
from semel.client.chunks import Chunk
from semel.client.fetcher import Fetcher, FetchLimits, FetchRequest
from semel.errors import CorruptBatch, ErrorCode, Fatal
from semel.types import Record, TopicPartition
from semel.wire.records import BatchBuilder, control_batch, iter_batches, patch_base_offset

AT, OTHER = TopicPartition("t", 0), TopicPartition("t", 1)
TOPIC_ID = UUID(int=7)
NODE = 1


class Log:
    """One partition of a broker: batches as bytes, transactions that were aborted."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, int, bytes]] = []
        """(first offset, next offset, bytes)"""
        self.end = 0
        self.aborted: list[tuple[int, int, int]] = []
        """(producer id, first offset, last offset with the marker)"""
        self.committed: list[tuple[int, bytes]] = []
        self.open: dict[int, tuple[int, list[tuple[int, bytes]]]] = {}
        self.epoch = 0

    def append(self, count: int, producer_id: int = -1, *, codec: int = 0, transactional: bool = False) -> None:
        builder = BatchBuilder(codec)
        records = [(self.end + number, b"v%d" % (self.end + number)) for number in range(count)]
        for _, value in records:
            builder.append(b"k", value, 1_700_000_000_000)
        if transactional:
            self.open.setdefault(producer_id, (self.end, []))[1].extend(records)
        else:
            self.committed += records
        self._add(
            builder.build(
                producer_id=producer_id,
                producer_epoch=0 if producer_id >= 0 else -1,
                base_sequence=0 if producer_id >= 0 else -1,
                transactional=transactional,
            ),
            count,
        )

    def finish(self, producer_id: int, commit: bool) -> None:
        first, records = self.open.pop(producer_id)
        if commit:
            self.committed = sorted(self.committed + records)
        else:
            self.aborted.append((producer_id, first, self.end))
        self._add(
            control_batch(
                producer_id=producer_id, producer_epoch=0, commit=commit, coordinator_epoch=0, timestamp_ms=1
            ),
            1,
        )

    def _add(self, data: bytes, count: int) -> None:
        buffer = bytearray(data)
        patch_base_offset(buffer, 0, self.end, self.epoch)
        self.batches.append((self.end, self.end + count, bytes(buffer)))
        self.end += count

    @property
    def stable_end(self) -> int:
        return min((first for first, _ in self.open.values()), default=self.end)

    def read(self, offset: int, max_bytes: int) -> SimpleNamespace:
        data, last = b"", offset
        for first, after, batch in self.batches:
            if after <= offset or first >= self.stable_end:
                continue
            if data and len(data) + len(batch) > max_bytes:
                data += batch[: max_bytes - len(data)]  # Brokers cut at the limit.
                break
            data, last = data + batch, after
        aborted = [
            SimpleNamespace(producer_id=producer_id, first_offset=first)
            for producer_id, first, marker in self.aborted
            if first < last and marker >= offset
        ]
        code = ErrorCode.NONE if 0 <= offset <= self.end else ErrorCode.OFFSET_OUT_OF_RANGE
        return SimpleNamespace(
            error_code=code, last_stable_offset=self.stable_end, records=data or None, aborted_transactions=aborted
        )


class Broker:
    """One broker with fetch sessions, as KIP-227 has them: it answers for what is new or moved, and remembers."""

    def __init__(self, logs: dict[TopicPartition, Log]) -> None:
        self.logs = logs
        self.sessions: dict[int, dict[str, Any]] = {}
        self.requests: list[FetchRequest] = []
        self._number = 0

    def fetch(self, request: FetchRequest) -> SimpleNamespace:
        self.requests.append(request)
        fields = request.fields
        session_id, epoch = fields["session_id"], fields["session_epoch"]
        if epoch == 0:
            self.sessions.pop(session_id, None)
            self._number += 1
            session_id = self._number
            self.sessions[session_id] = {"epoch": 1, "partitions": {}, "told": {}}
        elif session_id not in self.sessions:
            return self._error(ErrorCode.FETCH_SESSION_ID_NOT_FOUND)
        elif self.sessions[session_id]["epoch"] != epoch:
            return self._error(ErrorCode.INVALID_FETCH_SESSION_EPOCH)
        else:
            self.sessions[session_id]["epoch"] += 1
        session = self.sessions[session_id]
        for topic in fields["topics"]:
            for item in topic["partitions"]:
                session["partitions"][TopicPartition("t", item["partition"])] = item
        for topic in fields["forgotten_topics_data"]:
            for number in topic["partitions"]:
                session["partitions"].pop(TopicPartition("t", number), None)
                session["told"].pop(TopicPartition("t", number), None)
        found = []
        for at, item in session["partitions"].items():
            answer = self.logs[at].read(item["fetch_offset"], item["partition_max_bytes"])
            state = (answer.last_stable_offset, self.logs[at].end)
            if answer.records or answer.error_code or session["told"].get(at) != state:
                answer.partition_index = at.partition
                session["told"][at] = state
                found.append(answer)
        topic_id = fields["topics"][0].get("topic_id", TOPIC_ID) if fields["topics"] else TOPIC_ID
        return SimpleNamespace(
            error_code=ErrorCode.NONE,
            session_id=session_id,
            responses=[SimpleNamespace(topic_id=topic_id, topic="t", partitions=found)] if found else [],
        )

    def _error(self, code: ErrorCode) -> SimpleNamespace:
        return SimpleNamespace(error_code=code, session_id=0, responses=[])


def led(fetcher: Fetcher, *numbers: int, epoch: int = 0, node: int = NODE, now: float = 0.0) -> None:
    fetcher.led_by("t", TOPIC_ID, dict.fromkeys(numbers or (0, 1), (node, epoch)), now)


def exchange(fetcher: Fetcher, broker: Broker, newest: int = 17) -> bool:
    request = fetcher.next_request(NODE, newest)
    if request is None:
        return False
    fetcher.answered(request, broker.fetch(request), 0.0)
    return True


def values(records: Iterable[Record]) -> list[tuple[int, bytes]]:
    return [(record.offset, record.value or b"") for record in records]


@st.composite
def logs(draw: st.DrawFn) -> Log:
    log = Log()
    for step in draw(st.lists(st.sampled_from(("plain", "p1", "p2", "commit", "abort")), max_size=25)):
        if step == "plain":
            log.append(draw(st.integers(1, 4)), codec=draw(st.sampled_from((0, 1))))
        elif step in ("p1", "p2"):
            log.append(draw(st.integers(1, 3)), int(step[1]), transactional=True)
        elif log.open:
            log.finish(draw(st.sampled_from(sorted(log.open))), step == "commit")
    return log


@settings(max_examples=80, deadline=None)
@given(st.data(), st.lists(logs(), min_size=2, max_size=2), st.sampled_from((12, 17)))
def test_whatever_is_paused_sought_and_lost_every_committed_record_comes_once_and_in_order(
    data: st.DataObject, found: list[Log], newest: int
) -> None:
    by_partition = dict(zip((AT, OTHER), found, strict=True))
    broker = Broker(by_partition)
    fetcher = Fetcher(FetchLimits(partition_bytes=data.draw(st.sampled_from((100, 300, 10_000)))))
    fetcher.assign({AT: 0, OTHER: 0})
    got: dict[TopicPartition, list[tuple[int, bytes]]] = {AT: [], OTHER: []}
    in_flight: list[tuple[FetchRequest, Any]] = []
    paused: set[TopicPartition] = set()
    now = 0.0
    steps = data.draw(
        st.lists(st.sampled_from(("send", "answer", "lose", "forget", "take", "pause", "resume", "seek")), max_size=40)
    )
    for step in [*steps, "resume", *["answer", "lead", "send", "answer", "take"] * 60]:
        now += 2.0
        if fetcher.unled(now):
            led(fetcher, now=now)
        one = data.draw(st.sampled_from((AT, OTHER))) if step in ("pause", "seek") else AT
        if step == "send" and not in_flight:
            request = fetcher.next_request(NODE, newest)
            if request is not None:
                in_flight.append((request, broker.fetch(request)))
        elif step == "answer" and in_flight:
            fetcher.answered(*in_flight.pop(), now)
        elif step == "lose" and in_flight:
            fetcher.failed(in_flight.pop()[0], now)
        elif step == "forget":
            broker.sessions.clear()
        elif step == "take":
            records, ends = fetcher.take(3)
            assert not paused & {*ends, *(TopicPartition(item.topic, item.partition) for item in records)}
            for record in records:
                got[TopicPartition(record.topic, record.partition)].append((record.offset, record.value or b""))
            for at, end in ends.items():
                assert end <= by_partition[at].stable_end
                assert got[at] == [item for item in by_partition[at].committed if item[0] < end]
        elif step == "pause":
            fetcher.pause([one])
            paused.add(one)
        elif step == "resume":
            fetcher.resume([AT, OTHER])
            paused.clear()
        elif step == "seek":
            to = got[one][-1][0] if got[one] and data.draw(st.booleans()) else 0
            fetcher.seek({one: to})
            got[one] = [item for item in got[one] if item[0] < to]
    assert fetcher.failure is None
    for at, log in by_partition.items():
        assert got[at] == [item for item in log.committed if item[0] < log.stable_end]
        assert fetcher.positions[at] == log.stable_end
    assert fetcher._buffered == 0


def test_an_end_is_told_once_and_again_after_a_seek() -> None:
    log = Log()
    log.append(2)
    broker, fetcher = Broker({AT: log}), Fetcher()
    fetcher.assign({AT: 0})
    led(fetcher, 0)
    exchange(fetcher, broker)
    assert fetcher.take(10)[1] == {AT: 2}
    exchange(fetcher, broker)
    assert fetcher.take(10) == ([], {})
    fetcher.seek({AT: 2})
    exchange(fetcher, broker)
    assert fetcher.take(10) == ([], {AT: 2})
    log.append(1, 1, transactional=True)
    log.finish(1, commit=False)
    exchange(fetcher, broker)
    assert fetcher.take(10) == ([], {AT: 4}), "what was aborted moves the end, too"


def test_the_first_question_for_a_position_does_not_wait_for_data() -> None:
    broker, fetcher = Broker({AT: Log()}), Fetcher()
    fetcher.assign({AT: 0})
    led(fetcher, 0)
    exchange(fetcher, broker)
    exchange(fetcher, broker)
    assert [request.fields["max_wait"] for request in broker.requests] == [0, fetcher.limits.wait_ms]


def test_a_session_names_only_what_moved() -> None:
    first, second = Log(), Log()
    first.append(1)
    broker, fetcher = Broker({AT: first, OTHER: second}), Fetcher()
    fetcher.assign({AT: 0, OTHER: 0})
    led(fetcher)
    for _ in range(3):
        exchange(fetcher, broker)
    named = [
        [item["partition"] for topic in request.fields["topics"] for item in topic["partitions"]]
        for request in broker.requests
    ]
    assert named == [[0, 1], [0], []]
    fetcher.pause([OTHER])
    exchange(fetcher, broker)
    (forgotten,) = broker.requests[-1].fields["forgotten_topics_data"]
    assert forgotten["partitions"] == [1]


def test_what_waits_in_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PARTITION_BUFFER_BYTES", 1_000)
    monkeypatch.setattr(module, "BUFFER_BYTES", 1_500)
    first, second = Log(), Log()
    for log in (first, second):
        for _ in range(60):
            log.append(5)
    broker, fetcher = Broker({AT: first, OTHER: second}), Fetcher(FetchLimits(partition_bytes=400))
    fetcher.assign({AT: 0, OTHER: 0})
    led(fetcher)
    while exchange(fetcher, broker):
        assert fetcher._buffered <= 1_500 + 2 * 400
    got = 0
    while got < 600:
        records, _ = fetcher.take(7)
        assert records, "the fetcher stands still with room in its buffer"
        got += len(records)
        exchange(fetcher, broker)
    assert fetcher._buffered == 0


def test_an_answer_for_a_revoked_partition_is_dropped() -> None:
    log = Log()
    log.append(3)
    broker, fetcher = Broker({AT: log}), Fetcher()
    fetcher.assign({AT: 0})
    led(fetcher, 0)
    request = fetcher.next_request(NODE, 17)
    assert request is not None
    fetcher.revoke([AT])
    fetcher.assign({AT: 2})
    fetcher.answered(request, broker.fetch(request), 0.0)
    assert fetcher.take(10) == ([], {})
    led(fetcher, 0)
    exchange(fetcher, broker)
    assert values(fetcher.take(10)[0]) == [(2, b"v2")]


def test_an_answer_for_a_position_that_was_left_is_dropped() -> None:
    log = Log()
    log.append(2)
    broker, fetcher = Broker({AT: log}), Fetcher()
    fetcher.assign({AT: 0})
    led(fetcher, 0)
    exchange(fetcher, broker)
    log.append(2)
    request = fetcher.next_request(NODE, 17)
    assert request is not None
    fetcher.seek({AT: 1})
    fetcher.answered(request, broker.fetch(request), 0.0)
    assert fetcher.take(10) == ([], {})
    exchange(fetcher, broker)
    assert values(fetcher.take(10)[0]) == [(1, b"v1"), (2, b"v2"), (3, b"v3")]


def test_a_position_that_is_gone_is_the_end_and_says_so() -> None:
    fetcher = Fetcher()
    fetcher.assign({AT: 5})
    led(fetcher, 0)
    exchange(fetcher, Broker({AT: Log()}))
    assert isinstance(fetcher.failure, Fatal)
    assert "t-0" in str(fetcher.failure)
    assert "offset 5" in str(fetcher.failure)
    assert fetcher.next_request(NODE, 17) is None


def test_a_topic_that_was_made_anew_is_the_end() -> None:
    fetcher = Fetcher()
    fetcher.assign({AT: 0})
    led(fetcher, 0)
    fetcher.lost(NODE, 0.0)
    fetcher.led_by("t", UUID(int=8), {0: (NODE, 0)}, 10.0)
    assert "made anew" in str(fetcher.failure)


def leader_changes(fetcher: Fetcher, epoch: int) -> None:
    fetcher.lost(NODE, 0.0)
    led(fetcher, 0, epoch=epoch, node=2, now=10.0)


def read_one(log: Log) -> Fetcher:
    fetcher = Fetcher()
    fetcher.assign({AT: 0})
    led(fetcher, 0, epoch=log.epoch)
    exchange(fetcher, Broker({AT: log}))
    return fetcher


def test_a_new_leader_is_asked_whether_its_log_has_what_we_read_before_it_is_read() -> None:
    log = Log()
    log.append(3)
    fetcher = read_one(log)
    leader_changes(fetcher, epoch=4)
    assert fetcher.next_request(2, 17) is None
    assert fetcher.unchecked() == {2: {AT: (4, 0)}}
    fetcher.checked(AT, (4, 0), ErrorCode.NONE, 0, 3, 10.0)
    request = fetcher.next_request(2, 17)
    assert request is not None
    (topic,) = request.fields["topics"]
    assert topic["partitions"][0]["current_leader_epoch"] == 4
    assert fetcher.unchecked() == {}


@pytest.mark.parametrize(("epoch", "end"), [(0, 2), (-1, -1)])
def test_a_log_that_was_cut_below_our_position_is_the_end(epoch: int, end: int) -> None:
    log = Log()
    log.append(3)
    fetcher = read_one(log)
    leader_changes(fetcher, epoch=4)
    fetcher.checked(AT, (4, 0), ErrorCode.NONE, epoch, end, 10.0)
    assert isinstance(fetcher.failure, Fatal)
    assert "up to offset 3" in str(fetcher.failure)


def test_a_check_that_a_newer_leader_made_worthless_is_made_again() -> None:
    log = Log()
    log.append(3)
    fetcher = read_one(log)
    leader_changes(fetcher, epoch=4)
    fetcher.checked(AT, (4, 0), ErrorCode.FENCED_LEADER_EPOCH, -1, -1, 10.0)
    assert fetcher.failure is None
    led(fetcher, 0, epoch=5, node=3, now=20.0)
    assert fetcher.unchecked() == {3: {AT: (5, 0)}}
    fetcher.checked(AT, (4, 0), ErrorCode.NONE, 0, 3, 20.0)
    assert fetcher.unchecked() == {3: {AT: (5, 0)}}, "an answer under the old epoch says nothing"


@pytest.mark.parametrize(
    "code", [ErrorCode.NOT_LEADER_OR_FOLLOWER, ErrorCode.FENCED_LEADER_EPOCH, ErrorCode.UNKNOWN_TOPIC_ID]
)
def test_an_error_that_passes_costs_a_pause_and_a_look_for_the_leader(code: ErrorCode) -> None:
    fetcher = Fetcher()
    fetcher.assign({AT: 0})
    led(fetcher, 0)
    request = fetcher.next_request(NODE, 17)
    assert request is not None
    refused = SimpleNamespace(partition_index=0, error_code=code, last_stable_offset=-1, records=None)
    answer = SimpleNamespace(
        error_code=ErrorCode.NONE,
        session_id=1,
        responses=[SimpleNamespace(topic_id=TOPIC_ID, topic="t", partitions=[refused])],
    )
    assert fetcher.answered(request, answer, 0.0) == [(AT, code)]
    assert fetcher.next_request(NODE, 17) is None
    assert fetcher.unled(0.0) == set(), "at once would be a storm"
    assert fetcher.unled(1.0) == {"t"}


def test_a_batch_that_is_damaged_ends_the_reading_before_it() -> None:
    log = Log()
    log.append(2)
    log.append(2)
    first, after, data = log.batches[1]
    log.batches[1] = (first, after, data[:-1] + bytes([data[-1] ^ 1]))
    fetcher = read_one(log)
    assert values(fetcher.take(2)[0]) == [(0, b"v0"), (1, b"v1")]
    fetcher.take(10)
    assert isinstance(fetcher.failure, Fatal)
    assert "offset 2" in str(fetcher.failure)
    assert fetcher.positions[AT] == 2


def test_a_chunk_gives_records_in_portions_and_stands_behind_what_it_gave() -> None:
    log = Log()
    log.append(3)
    log.append(2, 1, transactional=True)
    log.finish(1, commit=False)
    log.append(1)
    data = b"".join(batch for _, _, batch in log.batches)
    assert len(list(iter_batches(data))) == 4
    chunk = Chunk(AT, 1, data, [(3, 1)])
    assert [(record.offset, chunk.position) for record in chunk.take(1)] == [(1, 2)]
    assert values(chunk.take(10)) == [(2, b"v2"), (6, b"v6")]
    assert chunk.position == 7
    assert chunk.is_empty


def test_a_chunk_with_impossible_lengths_is_refused() -> None:
    with pytest.raises(CorruptBatch):
        Chunk(AT, 0, b"\0" * 100)

"""Fetch sessions: what a reader over many requests is told, and what the broker keeps for it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer

from semel.broker import EmbeddedBroker, fetch_sessions
from semel.broker.config import BrokerConfig
from semel.broker.fetch_sessions import KEPT_MS, FetchSessions, Session
from semel.errors import ErrorCode
from semel.wire.messages import decode_response
from semel.wire.records import iter_batches
from tests.broker.core import Core, Pending, batch
from tests.broker.test_transactions import Writer
from tests.services.kafka import KafkaNode


class Consumer:
    """Reads as a Java consumer does: offsets that moved are sent, others are left to the session."""

    def __init__(self, core: Core, *topics: str, version: int = 12, committed: bool = False) -> None:
        self.core = core
        self.version = version
        self.committed = committed
        self.id = self.epoch = 0
        self.values: dict[tuple[str, int], int] = {}
        self.names: dict[Any, str] = {}
        self.moved: dict[tuple[Any, int], int] = {}
        for name in topics:
            topic = core.node.topics.get(name)
            assert topic is not None
            key = topic.info.topic_id if version >= 13 else name
            self.names[key] = name
            for index in range(len(topic.partitions)):
                self.moved[key, index] = 0

    def send(self, *, wait_ms: int = 0, forget: tuple[tuple[str, int], ...] = (), min_bytes: int = 1) -> Any:
        field = "topic_id" if self.version >= 13 else "topic"
        topics: dict[Any, list[dict[str, int]]] = {}
        for (key, index), offset in self.moved.items():
            item = {"partition": index, "fetch_offset": offset, "partition_max_bytes": 200}
            topics.setdefault(key, []).append(item)
        self.moved = {}
        fields = {
            "max_wait": wait_ms,
            "min_bytes": min_bytes,
            "max_bytes": 1000,
            "isolation_level": int(self.committed),
            "session_id": self.id,
            "session_epoch": self.epoch,
            "topics": [{field: key, "partitions": items} for key, items in topics.items()],
            "forgotten_topics_data": [{field: key, "partitions": [index]} for key, index in forget],
        }
        if self.version < 15:
            fields["replica_id"] = -1
        answer = self.core.send(1, self.version, **fields)
        if isinstance(answer, Pending):
            return answer
        assert answer is not None
        return self.take(decode_response(1, self.version, answer))

    def take(self, answer: Any) -> dict[tuple[str, int], tuple[int, int, int]]:
        """(error, high watermark, batches) of each partition in the response."""
        assert answer.error_code == 0, answer
        self.id = answer.session_id
        self.epoch += 1
        told = {}
        for topic in answer.responses:
            key = topic.topic_id if self.version >= 13 else topic.topic
            for item in topic.partitions:
                headers = [header for _, header in iter_batches(item.records or b"")]
                name = (self.names[key], item.partition_index)
                told[name] = (int(item.error_code), item.high_watermark, len(headers))
                self.values[name] = self.values.get(name, 0) + len(headers)
                if headers:
                    self.moved[key, item.partition_index] = headers[-1].next_offset
        return told


def sessions(core: Core) -> dict[int, Session]:
    return core.node.fetch_sessions._sessions


@pytest.mark.parametrize("version", [7, 12, 13, 17])
def test_only_what_moved_is_told(core: Core, version: int) -> None:
    core.create("orders", 50)
    reader = Consumer(core, "orders", version=version)
    assert len(reader.send()) == 50
    assert reader.id > 0
    assert reader.send() == {}
    core.produce("orders", batch(b"a"), partition=7)
    assert reader.send() == {("orders", 7): (0, 1, 1)}
    assert reader.send() == {}


def test_a_fetch_touches_only_what_moved(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    core.create("orders", 200)
    reader = Consumer(core, "orders")
    reader.send()
    looked: list[int] = []
    topic = core.node.topics.get("orders")
    assert topic is not None
    find = type(topic).partition
    monkeypatch.setattr(type(topic), "partition", lambda self, index: looked.append(index) or find(self, index))
    core.produce("orders", batch(b"a"), partition=3)
    looked.clear()
    for _ in range(3):
        reader.send()
    assert looked == [3, 3], "once for the batch, once for the offset behind it"


def test_a_parked_fetch_is_woken_by_any_partition_and_by_time(core: Core) -> None:
    core.create("orders", 5)
    reader = Consumer(core, "orders")
    reader.send()
    parked = reader.send(wait_ms=500)
    assert isinstance(parked, Pending)
    core.produce("orders", batch(b"a"), partition=4)
    assert reader.take(parked.response) == {("orders", 4): (0, 1, 1)}
    parked = reader.send(wait_ms=500)
    assert not parked.answered
    core.pass_time(500)
    assert reader.take(parked.response) == {}


def test_what_did_not_fit_comes_with_the_next_request(core: Core) -> None:
    """Nothing moves in between: the broker has to remember that there was more."""
    core.create("orders", 4)
    for number in range(20):
        core.produce("orders", batch(bytes(60)), partition=number % 4)
    reader = Consumer(core, "orders")
    for _ in range(30):
        reader.send()
    assert reader.values == {("orders", index): 5 for index in range(4)}
    assert reader.send() == {}


def test_no_partition_starves_the_others(core: Core) -> None:
    core.create("orders", 3)
    reader = Consumer(core, "orders")
    reader.send()
    for index in range(3):
        for _ in range(9):
            core.produce("orders", batch(bytes(700)), partition=index)  # One batch fills a response.
    first = [next(iter(reader.send())) for _ in range(3)]
    assert sorted(index for _, index in first) == [0, 1, 2]


@pytest.mark.parametrize("version", [12, 13])
def test_read_committed_goes_on_when_the_transaction_ends(core: Core, version: int) -> None:
    core.create("orders")
    reader = Consumer(core, "orders", version=version, committed=True)
    reader.send()
    writer = Writer(core, "w")
    writer.write("orders", b"a")
    assert reader.send() == {("orders", 0): (0, 1, 0)}
    assert reader.send() == {}
    parked = reader.send(wait_ms=500)
    writer.end(True)
    assert reader.take(parked.response) == {("orders", 0): (0, 2, 2)}


def test_a_change_of_isolation_looks_at_everything_again(core: Core) -> None:
    core.create("orders")
    reader = Consumer(core, "orders", committed=True)
    reader.send()
    Writer(core, "w").write("orders", b"a")
    reader.send()
    reader.committed = False
    assert reader.send() == {("orders", 0): (0, 1, 1)}


@pytest.mark.parametrize("version", [12, 13])
def test_a_topic_that_is_deleted_and_made_again(core: Core, version: int) -> None:
    core.create("orders")
    core.create("other")
    core.produce("orders", batch(b"a"))
    reader = Consumer(core, "orders", "other", version=version)
    reader.send()
    reader.send()
    parked = reader.send(wait_ms=500)
    core.ask(20, 6, topics=[{"name": "orders", "topic_id": None}], timeout=1000)
    gone = {("orders", 0): (int(ErrorCode.UNKNOWN_TOPIC_OR_PARTITION), -1, 0)}
    assert reader.take(parked.response) == gone
    assert reader.send(wait_ms=500) == gone, "an error is told until the reader does something about it"
    core.create("orders")
    core.produce("orders", batch(b"b"))
    if version >= 13:
        assert reader.send() == gone, "another topic of that name is not the one that was read"
        return
    reader.moved["orders", 0] = 0
    assert reader.send() == {("orders", 0): (0, 1, 1)}
    core.produce("orders", batch(b"c"))
    assert reader.send() == {("orders", 0): (0, 2, 1)}


def test_a_partition_of_an_unknown_topic_begins_when_the_topic_does(core: Core) -> None:
    core.create("orders")
    reader = Consumer(core, "orders")
    reader.moved["later", 0] = 0
    reader.names["later"] = "later"
    assert reader.send()["later", 0][0] == ErrorCode.UNKNOWN_TOPIC_OR_PARTITION
    core.create("later")
    assert reader.send() == {("later", 0): (0, 0, 0)}
    parked = reader.send(wait_ms=500)
    core.produce("later", batch(b"a"))
    assert reader.take(parked.response) == {("later", 0): (0, 1, 1)}


def test_what_retention_deletes_is_told(tmp_path: Path) -> None:
    core = Core(tmp_path, BrokerConfig(segment_bytes=100))
    core.create("orders", retention_ms="1000")
    for _ in range(3):
        core.produce("orders", batch(b"a", timestamp_ms=core.now_ms))
    reader = Consumer(core, "orders")
    reader.moved["orders", 0] = 3
    reader.send()
    assert reader.send() == {}
    core.pass_time(10_000)
    core.node.expire()
    assert reader.send() == {("orders", 0): (0, 3, 0)}


def test_forgotten_partitions_are_told_no_more_and_nobody_watches_them(core: Core) -> None:
    core.create("orders", 2)
    reader = Consumer(core, "orders")
    reader.send()
    reader.send(forget=(("orders", 1),))
    core.produce("orders", batch(b"a"), partition=1)
    assert reader.send() == {}
    partition = core.node.topics.partition("orders", 1)
    assert partition is not None
    assert not partition.waiters


def test_a_session_that_ends_leaves_nothing_behind(core: Core) -> None:
    core.create("orders")
    partition = core.node.topics.partition("orders", 0)
    assert partition is not None
    reader = Consumer(core, "orders")
    reader.send()
    parked = reader.send(wait_ms=500)
    assert partition.waiters
    Consumer(core, "orders").send()
    core.node.fetch_sessions.close(reader.id)
    assert parked.answered, "who waits is not left waiting"
    assert len(partition.waiters) == 1, "the other session's"

    first = Consumer(core, "orders")
    waiting = first.send(wait_ms=500)
    assert len(sessions(core)) == 2
    waiting.later.close()
    assert len(sessions(core)) == 1, "a session whose id nobody learnt"


def _filled(slots: int, size: int, now_ms: int, **limits: int) -> tuple[FetchSessions, list[int]]:
    found = FetchSessions(random.Random(1), slots=slots, **limits)
    return found, [_begin(found, size, now_ms) for _ in range(slots)]


class _Item:
    def __init__(self, partition: int) -> None:
        self.partition = partition
        self.fetch_offset = 0
        self.partition_max_bytes = 1


def _begin(found: FetchSessions, size: int, now_ms: int) -> int:
    reader = found.full(0, 0, False, [("t", _Item(index)) for index in range(size)], now_ms)
    return reader.id if isinstance(reader, Session) else 0


def test_slots_are_bounded_and_nobody_young_loses_one() -> None:
    found, ids = _filled(3, 5, 0)
    assert _begin(found, 100, KEPT_MS) == 0, "the others are too young"
    found.incremental(ids[0], 1, False, [], [], KEPT_MS)
    found.incremental(ids[1], 1, False, [], [], KEPT_MS)
    assert _begin(found, 1, KEPT_MS + 1) > 0, "one was not used for too long"
    assert set(found._sessions) >= {ids[0], ids[1]}
    assert ids[2] not in found._sessions
    assert _begin(found, 5, KEPT_MS + 1) == 0, "it would save no more than the smallest"
    assert _begin(found, 6, KEPT_MS + 1) > 0
    assert len(found._sessions) == 3


def test_partitions_of_all_sessions_are_bounded() -> None:
    found, ids = _filled(3, 5, 0, max_entries=18)
    assert _begin(found, 4, 1) == 0
    found.close(ids[0])
    kept = _begin(found, 8, 1)
    assert kept > 0
    with pytest.raises(fetch_sessions.SessionError):
        found.incremental(kept, 1, False, [("u", _Item(0))], [], 1)
    assert kept not in found._sessions
    assert found._entries == 10


def test_epochs_wrap_to_one() -> None:
    found, (session_id,) = _filled(1, 1, 0)
    found._sessions[session_id].epoch = (1 << 31) - 1
    found.incremental(session_id, (1 << 31) - 1, False, [], [], 0)
    assert found._sessions[session_id].epoch == 1


@pytest.mark.parametrize("version", [12, 13])
def test_readers_with_and_without_session_see_the_same(core: Core, version: int) -> None:
    """Random writes, deletions and moves; at the end both have read everything that is there."""
    rng = random.Random(version)
    core.create("orders", 8)
    reader = Consumer(core, "orders", version=version)
    written = dict.fromkeys(range(8), 0)
    for _ in range(400):
        index = rng.randrange(8)
        if rng.random() < 0.5:
            core.produce("orders", batch(bytes(rng.randrange(150))), partition=index)
            written[index] += 1
        else:
            answer = reader.send(wait_ms=rng.choice([0, 10]), min_bytes=rng.choice([1, 300]))
            if isinstance(answer, Pending):
                core.pass_time(10)
                reader.take(answer.response)
    while reader.send():
        pass
    assert {index: reader.values.get(("orders", index), 0) for index in range(8)} == written


@pytest.mark.peers
def test_the_java_consumer_reads_in_one_session(kafka: KafkaNode, tmp_path: Path) -> None:
    """It begins a session, goes on in it, and ends it when it closes."""
    with EmbeddedBroker(tmp_path) as broker:
        kept = broker._broker.node.fetch_sessions
        producer = Producer({"bootstrap.servers": broker.address, "log_level": 0})
        for number in range(500):
            producer.produce("orders", b"%d" % number)
        assert producer.flush(20) == 0
        epochs: list[int] = []
        serve = kept.incremental
        kept.incremental = lambda *asked: epochs.append(asked[1]) or serve(*asked)  # type: ignore[method-assign,func-returns-value]
        arguments = ["--bootstrap-server", broker.address, "--topic", "orders", "--from-beginning"]
        done = kafka.tool("org.apache.kafka.tools.consumer.ConsoleConsumer", *arguments, "--timeout-ms", "15000")
        assert sorted(map(int, done.stdout.split())) == list(range(500))
        assert epochs[:3] == [1, 2, 3]
        assert not kept._sessions

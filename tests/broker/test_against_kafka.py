"""The same requests to Apache Kafka 4.3.1 and to the embedded broker: the same answers, but for what is said here."""

from __future__ import annotations

import socket
import time
import uuid
from functools import partial
from typing import Any

import pytest

from semel.client.describe import decode_described
from semel.wire.messages import decode_response, encode_request
from semel.wire.records import BatchBuilder
from tests.broker import core
from tests.conftest import Address
from tests.moment import NOW_MS
from tests.services.kafka import KafkaNode

batch = partial(core.batch, timestamp_ms=NOW_MS)

ON_PURPOSE = {
    # A record is refused as soon as EndTxn was decided; in Kafka a late one may become part of the transaction.
    "late produce after EndTxn",
    # Kafka lets a zombie abort the transaction of its successor and fences it only when it asks again.
    "zombie init",
    # Kafka aborts one partition of a transaction that its coordinator goes on with.
    "marker into a live transaction",
    # One node has one coordinator; Kafka believes any later one and refuses its own from then on.
    "marker of a later coordinator",
}
"""Steps whose answers differ by design (semel.coordinator.transaction says why)."""


class Probe:
    """One raw connection, and names that no other test uses."""

    def __init__(self, bootstrap: str) -> None:
        host, _, port = bootstrap.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), 30)
        self.mark = uuid.uuid4().hex[:8]
        self.answers: dict[str, Any] = {}
        self.identity = (-1, -1)
        for key_type in (0, 1):  # Kafka makes its internal topics when somebody asks for a coordinator.
            self.ask(10, 4, key_type=key_type, coordinator_keys=[self.mark])

    def close(self) -> None:
        self._socket.close()

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            got = self._socket.recv(size - len(data))
            assert got, "the broker closed the connection"
            data += got
        return data

    def ask_raw(self, key: int, version: int, /, **fields: Any) -> bytes:
        self._socket.sendall(encode_request(key, version, 1, "probe", **fields))
        return self._exactly(int.from_bytes(self._exactly(4), "big"))

    def ask(self, key: int, version: int, /, **fields: Any) -> Any:
        """The answer; 51, 14, 15 and 16 are asked again, as clients do, because Kafka works in the background."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            answer = decode_response(key, version, self.ask_raw(key, version, **fields))
            if _first_code(answer) not in (51, 14, 15, 16):
                return answer
            time.sleep(0.02)
        raise AssertionError(f"api {key} never got past {_first_code(answer)}")

    def note(self, step: str, answer: Any) -> None:
        assert step not in self.answers, step
        self.answers[step] = answer

    def topic(self, name: str) -> str:
        return f"{name}-{self.mark}"

    # --- Requests, each giving what can be compared ---

    def create(self, name: str, partitions: int = 1, configs: dict[str, str] | None = None, **changed: Any) -> int:
        items = [{"name": key, "value": value} for key, value in (configs or {}).items()]
        topic = {
            "name": self.topic(name),
            "num_partitions": partitions,
            "replication_factor": 1,
            "assignments": [],
            "configs": items,
        } | changed
        code = int(self.ask(19, 7, topics=[topic], timeout=10_000, validate_only=False).topics[0].error_code)
        if code == 0:
            self._await_leader(name)
        return code

    def _await_leader(self, name: str) -> None:
        """Apache Kafka answers CreateTopics before the partition has its leader."""
        asked = {"partition_index": 0, "current_leader_epoch": -1, "timestamp": -1}
        topics = [{"name": self.topic(name), "partitions": [asked]}]
        deadline = time.monotonic() + 30
        while self.ask(2, 7, replica_id=-1, isolation_level=0, topics=topics).topics[0].partitions[0].error_code:
            assert time.monotonic() < deadline, f"{name} never got a leader"
            time.sleep(0.02)

    def produce(
        self, name: str, data: bytes | None, version: int = 9, transactional_id: str | None = None, acks: int = -1
    ) -> tuple[int, int]:
        partitions = [{"index": 0, "records": data}]
        answer = self.ask(
            0,
            version,
            transactional_id=transactional_id,
            acks=acks,
            timeout=10_000,
            topic_data=[{"name": self.topic(name), "partition_data": partitions}],
        )
        item = answer.responses[0].partition_responses[0]
        return int(item.error_code), int(item.base_offset)

    def init(self, transactional_id: str | None, identity: tuple[int, int] = (-1, -1), **changed: Any) -> int:
        fields = {
            "transactional_id": transactional_id,
            "transaction_timeout": 20_000,
            "producer_id": identity[0],
            "producer_epoch": identity[1],
        } | changed
        answer = self.ask(22, 5, **fields)
        if answer.error_code == 0:
            self.identity = (answer.producer_id, answer.producer_epoch)
        return int(answer.error_code)

    def end(self, transactional_id: str, commit: bool, version: int, identity: tuple[int, int] | None = None) -> int:
        producer_id, epoch = identity or self.identity
        answer = self.ask(
            26,
            version,
            transactional_id=transactional_id,
            producer_id=producer_id,
            producer_epoch=epoch,
            committed=commit,
        )
        if version >= 5 and answer.error_code == 0:
            self.identity = (answer.producer_id, answer.producer_epoch)
        return int(answer.error_code)

    def add(self, transactional_id: str, *names: str, epoch: int | None = None) -> list[int]:
        answer = self.ask(
            24,
            3,
            v3_and_below_transactional_id=transactional_id,
            v3_and_below_producer_id=self.identity[0],
            v3_and_below_producer_epoch=self.identity[1] if epoch is None else epoch,
            v3_and_below_topics=[{"name": self.topic(name), "partitions": [0]} for name in names],
        )
        found = {
            topic.name: int(topic.results_by_partition[0].partition_error_code)
            for topic in answer.results_by_topic_v3_and_below
        }
        return [found[self.topic(name)] for name in names]

    def data(self, *values: bytes, sequence: int = 0, identity: tuple[int, int] | None = None, **ids: Any) -> bytes:
        producer_id, epoch = identity or self.identity
        return batch(*(values or (b"v",)), producer_id=producer_id, producer_epoch=epoch, base_sequence=sequence, **ids)

    def offsets(self, name: str, *timestamps: int, isolation: int = 0, version: int = 11) -> list[tuple[int, int]]:
        found = []
        for timestamp in timestamps:
            partitions = [{"partition_index": 0, "timestamp": timestamp}]
            topics = [{"name": self.topic(name), "partitions": partitions}]
            answer = self.ask(2, version, replica_id=-1, isolation_level=isolation, topics=topics, timeout=10_000)
            item = answer.topics[0].partitions[0]
            found.append((int(item.error_code), int(item.offset)))
        return found

    def commit_txn(self, group: str, name: str, version: int, **changed: Any) -> int:
        item = {"partition_index": 0, "committed_offset": 5, "committed_metadata": "m"}
        fields = {
            "transactional_id": self.topic("txn"),
            "group_id": self.topic(group),
            "producer_id": self.identity[0],
            "producer_epoch": self.identity[1],
            "topics": [{"name": self.topic(name), "partitions": [item]}],
        } | changed
        return int(self.ask(28, version, **fields).topics[0].partitions[0].error_code)

    def fetch_offset(self, group: str, name: str, *, stable: bool = True) -> tuple[int, int]:
        topics = [{"name": self.topic(name), "partition_indexes": [0]}]
        answer = self.ask(9, 8, groups=[{"group_id": self.topic(group), "topics": topics}], require_stable=stable)
        item = answer.groups[0].topics[0].partitions[0]
        return int(item.error_code), int(item.committed_offset)


def _first_code(value: Any) -> int:
    """The first error code that stands in an answer."""
    for name in getattr(value, "__dataclass_fields__", ()):
        field = getattr(value, name)
        if name.endswith("error_code") and int(field):
            return int(field)
        for item in field if isinstance(field, tuple) else ():
            code = _first_code(item)
            if code:
                return code
    return 0


def settled(probe: Probe) -> tuple[int, int]:
    """The group's offset, once Kafka has written the markers of the last transaction."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = probe.fetch_offset("g", "a")
        if found[0] != 88:
            return found
        time.sleep(0.02)
    raise AssertionError("the offset never became stable")


def topics(probe: Probe) -> None:
    probe.note("create", probe.create("a", 3))
    probe.note("create again", probe.create("a", 3))
    probe.note("no partitions", probe.create("b", 0))
    probe.note("replication", probe.create("b", replication_factor=3))
    probe.note("unknown setting", probe.create("b", configs={"nonsense": "1"}))
    probe.note("bad setting", probe.create("b", configs={"retention.ms": "soon"}))
    probe.note("bad name", probe.create("a b"))
    fields = {"include_cluster_authorized_operations": False, "include_topic_authorized_operations": False}
    for step, topic in (
        ("unknown name", {"name": probe.topic("none"), "topic_id": None}),
        ("unknown id", {"name": None, "topic_id": uuid.uuid4()}),
    ):
        answer = probe.ask(3, 13, topics=[topic], allow_auto_topic_creation=False, **fields)
        probe.note(step, int(answer.topics[0].error_code))
    resource = {"resource_type": 2, "resource_name": probe.topic("a"), "configuration_keys": None}
    answer = probe.ask(32, 4, resources=[resource], include_synonyms=False, include_documentation=False)
    shown = {item.name: (item.value, int(item.config_type)) for item in answer.results[0].configs}
    wanted = ("cleanup.policy", "max.message.bytes", "retention.ms", "message.timestamp.type", "segment.bytes")
    probe.note("settings", {name: shown[name] for name in wanted})
    item = {"name": probe.topic("a"), "count": 2, "assignments": None}
    answer = probe.ask(37, 3, topics=[item], timeout=10_000, validate_only=False)
    probe.note("fewer partitions", int(answer.results[0].error_code))


def batches(probe: Probe) -> None:
    probe.create("a")
    probe.create("time", configs={"message.timestamp.type": "LogAppendTime"})
    probe.create("keys", configs={"cleanup.policy": "compact"})
    good = batch(b"a", b"b")
    for step, name, data, acks in (
        ("good", "a", good, -1),
        ("empty", "a", b"", -1),
        ("cut", "a", good[:-1], -1),
        ("two batches", "a", good + good, -1),
        ("bytes behind it", "a", good + b"\0\0\0", -1),
        ("base offset", "a", batch(b"a", base_offset=3), -1),
        ("checksum", "a", good[:-1] + b"x", -1),
        ("magic", "a", good[:16] + b"\x01" + good[17:], -1),
        ("too large", "a", batch(b"x" * 1_100_000), -1),
        ("no sequence", "a", batch(b"a", producer_id=5, producer_epoch=0), -1),
        ("future", "a", batch(b"a", timestamp_ms=4_000_000_000_000), -1),
        ("acks", "a", good, 3),
        ("append time", "time", batch(b"a", timestamp_ms=4_000_000_000_000), -1),
        ("no key", "keys", good, -1),
        ("unknown topic", "none", good, -1),
    ):
        probe.note(step, probe.produce(name, data, acks=acks))
    builder = BatchBuilder()
    for key in (b"1", None, b"2", None):
        builder.append(key, b"v", NOW_MS)
    for version in (7, 8, 9, 12):
        partitions = [{"index": 0, "records": bytes(builder.build())}]
        topic_data = [{"name": probe.topic("keys"), "partition_data": partitions}]
        answer = probe.ask(0, version, transactional_id=None, acks=-1, timeout=10_000, topic_data=topic_data)
        item = answer.responses[0].partition_responses[0]
        faulty = [record.batch_index for record in getattr(item, "record_errors", ())]
        probe.note(f"some without key, v{version}", (int(item.error_code), faulty))
    probe.note("offsets", probe.offsets("a", -1, -2, -3, -4, -5, 0, 5_000_000_000_000))
    probe.note("undefined", probe.offsets("a", -7))
    probe.note("undefined here", probe.offsets("a", -3, version=6))


def sequences(probe: Probe) -> None:
    probe.create("a")
    probe.init(None)
    producer_id, epoch = probe.identity
    for sequence in range(6):
        probe.note(f"batch {sequence}", probe.produce("a", probe.data(sequence=sequence)))
    for sequence in range(6):
        probe.note(f"again {sequence}", probe.produce("a", probe.data(sequence=sequence)))
    probe.note("gap", probe.produce("a", probe.data(sequence=9)))
    probe.note("overlap", probe.produce("a", probe.data(b"1", b"2", sequence=5)))
    newer = (producer_id, epoch + 1)
    probe.note("epoch not from 0", probe.produce("a", probe.data(sequence=3, identity=newer)))
    probe.note("epoch from 0", probe.produce("a", probe.data(sequence=0, identity=newer)))
    probe.note("old epoch", probe.produce("a", probe.data(sequence=6)))
    probe.note("unknown producer", probe.produce("a", probe.data(sequence=5, identity=(producer_id + 70_000, 0))))


def transactions_v1(probe: Probe) -> None:
    name = probe.topic("txn")
    probe.create("a")
    probe.create("b")
    probe.note("timeout 0", probe.init(name, transaction_timeout=0))
    probe.note("timeout too long", probe.init(name, transaction_timeout=900_001))
    probe.note("empty id", probe.init(""))
    probe.note("half an identity", probe.init(name, (5, -1)))
    probe.note("init", probe.init(name))
    old = probe.identity
    probe.note("end of nothing", [probe.end(name, commit, 3) for commit in (True, False)])
    probe.note("not added, v9", probe.produce("a", probe.data(transactional=True), 9, name))
    probe.note("not added, v11", probe.produce("a", probe.data(transactional=True), 11, name))
    probe.note("unknown topic", probe.add(name, "a", "none"))
    probe.note("stale add", probe.add(name, "a", epoch=9))
    probe.note("add", probe.add(name, "a"))
    probe.note("append", probe.produce("a", probe.data(transactional=True), 9, name))
    probe.note("append outside", probe.produce("a", probe.data(sequence=1), 9))
    probe.note("no id", probe.produce("a", probe.data(sequence=1, transactional=True), 9))
    probe.note("open", probe.offsets("a", -1, isolation=1))
    probe.note("stale end", probe.end(name, True, 3, (old[0], old[1] + 3)))
    probe.note("other producer's end", probe.end(name, True, 3, (old[0] + 70_000, old[1])))
    probe.note("commit", probe.end(name, True, 3))
    probe.note("commit again", probe.end(name, True, 3))
    probe.note("abort after commit", probe.end(name, False, 3))
    probe.note("committed", probe.offsets("a", -1, isolation=1))
    probe.note("offsets not added", probe.commit_txn("g", "a", 3))
    answer = probe.ask(
        25, 3, transactional_id=name, producer_id=old[0], producer_epoch=old[1], group_id=probe.topic("g")
    )
    probe.note("add offsets", int(answer.error_code))
    probe.note("staged", probe.commit_txn("g", "a", 3))
    probe.note("unstable", [probe.fetch_offset("g", "a"), probe.fetch_offset("g", "a", stable=False)])
    probe.note("commit offsets", probe.end(name, True, 3))
    probe.note("stable", settled(probe))


def transactions_v2(probe: Probe) -> None:
    name = probe.topic("txn")
    probe.create("a")
    probe.note("init", probe.init(name))
    first = probe.identity
    probe.note("commit of nothing", probe.end(name, True, 5))
    probe.note("abort of nothing", probe.end(name, False, 5))
    probe.note("it bumps", probe.identity[1] - first[1])
    probe.note("sequence not from 0", probe.produce("a", probe.data(sequence=4, transactional=True), 12, name))
    probe.note("unknown id", probe.produce("a", probe.data(transactional=True), 12, probe.topic("other")))
    probe.note("append", probe.produce("a", probe.data(transactional=True), 12, name))
    second = probe.identity
    probe.note("commit", probe.end(name, True, 5))
    probe.note("commit bumps", probe.identity[1] - second[1])
    third = probe.identity
    probe.note("commit again", probe.end(name, True, 5, second))
    probe.note("same identity", probe.identity == third)
    probe.note("abort after commit", probe.end(name, False, 5, second))
    late = probe.data(sequence=1, identity=second, transactional=True)
    probe.note("late produce after EndTxn", probe.produce("a", late, 12, name))
    probe.note("staged", probe.commit_txn("g", "a", 5))
    probe.note("stale staging", probe.commit_txn("g", "a", 5, producer_epoch=second[1]))
    probe.note("wrong generation", probe.commit_txn("g", "a", 5, generation_id=4))
    probe.note("unknown partition", probe.commit_txn("g", "none", 5))
    probe.note("unstable", probe.fetch_offset("g", "a"))
    probe.note("abort", probe.end(name, False, 5))
    probe.note("nothing", settled(probe))
    probe.note("append again", probe.produce("a", probe.data(transactional=True), 12, name)[0])
    open_identity = probe.identity
    probe.note("zombie init", probe.init(name, first))
    probe.note("successor", probe.init(name))
    probe.note("fenced", probe.produce("a", probe.data(identity=open_identity, transactional=True), 12, name)[0])
    probe.note("fenced end", probe.end(name, True, 5, open_identity))
    frame = probe.ask_raw(65, 0, transactional_ids=[name, probe.topic("none"), ""])
    described = [(int(item.error), item.state, item.start_ms) for item in decode_described(frame)]
    probe.note("described", sorted(described))


def groups(probe: Probe) -> None:
    probe.create("a")
    join = {
        "group_id": probe.topic("g"),
        "session_timeout": 10_000,
        "rebalance_timeout": 10_000,
        "member_id": "",
        "group_instance_id": None,
        "protocol_type": "consumer",
        "protocols": [{"name": "range", "metadata": b"x"}],
        "reason": None,
    }
    probe.note("no group", int(probe.ask(11, 9, **(join | {"group_id": ""})).error_code))
    probe.note("session", int(probe.ask(11, 9, **(join | {"session_timeout": 2_000_000_000})).error_code))
    probe.note("stranger", int(probe.ask(11, 9, **(join | {"member_id": "nobody"})).error_code))
    answer = probe.ask(11, 9, **join)
    probe.note("id required", int(answer.error_code))
    member = answer.member_id
    answer = probe.ask(11, 9, **(join | {"member_id": member}))
    probe.note("joined", (int(answer.error_code), answer.protocol_name, answer.leader == member, len(answer.members)))
    generation = answer.generation_id
    other = join | {"protocols": [{"name": "other", "metadata": b""}]}
    probe.note("protocol", int(probe.ask(11, 9, **other).error_code))

    def commit(step: str, version: int = 9, **changed: Any) -> None:
        item = {"partition_index": 0, "committed_offset": 3, "committed_metadata": None}
        fields = {
            "group_id": probe.topic("g"),
            "generation_id_or_member_epoch": generation,
            "member_id": member,
            "topics": [{"name": probe.topic("a"), "partitions": [item]}],
        } | changed
        probe.note(step, int(probe.ask(8, version, **fields).topics[0].partitions[0].error_code))

    commit("commit before sync")
    sync = {
        "group_id": probe.topic("g"),
        "generation_id": generation,
        "member_id": member,
        "protocol_type": "consumer",
        "protocol_name": "range",
        "assignments": [{"member_id": member, "assignment": b"all"}],
    }
    probe.note("sync of another generation", int(probe.ask(14, 5, **(sync | {"generation_id": 99})).error_code))
    answer = probe.ask(14, 5, **sync)
    probe.note("synced", (int(answer.error_code), answer.assignment))
    beat = {"group_id": probe.topic("g"), "generation_id": generation, "member_id": member}
    probe.note("heartbeat", int(probe.ask(12, 4, **beat).error_code))
    probe.note("old heartbeat", int(probe.ask(12, 4, **(beat | {"generation_id": 99})).error_code))
    probe.note("stranger's heartbeat", int(probe.ask(12, 4, **(beat | {"member_id": "x"})).error_code))
    commit("commit")
    commit("old commit", generation_id_or_member_epoch=99)
    commit("stranger's commit", member_id="x")
    commit("commit without a member", generation_id_or_member_epoch=-1, member_id="")
    commit("unknown group, v8", 8, group_id=probe.topic("none"))
    commit("unknown group, v9", 9, group_id=probe.topic("none"))
    probe.note("delete", int(probe.ask(42, 2, groups_names=[probe.topic("g")]).results[0].error_code))
    answer = probe.ask(15, 6, groups=[probe.topic("g"), probe.topic("none")], include_authorized_operations=False)
    probe.note("described", sorted((int(i.error_code), i.group_state) for i in answer.groups))
    leaving = [{"member_id": member, "group_instance_id": None, "reason": None}]
    answer = probe.ask(13, 5, group_id=probe.topic("g"), members=[*leaving, leaving[0] | {"member_id": "x"}])
    probe.note("leave", [int(item.error_code) for item in answer.members])
    probe.note("offset", probe.fetch_offset("g", "a"))
    probe.note("delete empty", int(probe.ask(42, 2, groups_names=[probe.topic("g")]).results[0].error_code))
    probe.note("delete unknown", int(probe.ask(42, 2, groups_names=[probe.topic("g")]).results[0].error_code))


def replicas(probe: Probe) -> None:
    probe.create("a", 2)
    a, none = probe.topic("a"), probe.topic("none")
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:  # Kafka makes the logs in the background.
        directory = probe.ask(35, 5, topics=[{"topic": a, "partitions": [0, 1, 7]}]).results[0]
        if directory.topics and len(directory.topics[0].partitions) == 2:
            break
    found = {item.partition_index: (item.partition_size, item.offset_lag) for item in directory.topics[0].partitions}
    probe.note("sizes", found)
    volume = 0 < directory.usable_bytes <= directory.total_bytes
    probe.note("directory", (int(directory.error_code), volume, directory.is_cordoned))
    probe.note("sizes of none", [item.name for item in probe.ask(35, 5, topics=[]).results[0].topics])
    for step, path, topic in (("stay", directory.log_dir, a), ("nowhere", "/none", a), ("no topic", "/none", none)):
        item = {"path": path, "topics": [{"name": topic, "partitions": [0]}]}
        moved = probe.ask(34, 2, dirs=[item]).results[0]
        probe.note(step, (moved.topic_name == topic, int(moved.partitions[0].error_code)))
    for kind in (0, 1):
        wanted = [{"topic": a, "partitions": [0, 7]}, {"topic": none, "partitions": [0]}]
        elected = probe.ask(43, 2, election_type=kind, topic_partitions=wanted, timeout=10_000)
        codes = {
            (item.topic, partition.partition_id): int(partition.error_code)
            for item in elected.replica_election_results
            for partition in item.partition_result
        }
        probe.note(f"election {kind}", [codes[place] for place in ((a, 0), (a, 7), (none, 0))])
    elected = probe.ask(43, 2, election_type=0, topic_partitions=None, timeout=10_000)
    results = {item.topic: item.partition_result for item in elected.replica_election_results}
    probe.note("election of all", (int(elected.error_code), results[a]))
    for plan in ([1], [2], [], [1, 1], None):
        wanted = [
            {"name": name, "partitions": [{"partition_index": index, "replicas": plan}]}
            for name, index in ((a, 0), (a, 7), (none, 0))
        ]
        answer = probe.ask(45, 1, topics=wanted, timeout=10_000, allow_replication_factor_change=True)
        codes = {
            (item.name, partition.partition_index): int(partition.error_code)
            for item in answer.responses
            for partition in item.partitions
        }
        probe.note(f"plan {plan}", (int(answer.error_code), sorted(codes.values())))
    probe.note("reassignments", probe.ask(46, 0, topics=None, timeout=10_000).topics)
    for name, index in (("__cluster_metadata", 0), ("__cluster_metadata", 1), (a, 0)):
        wanted = [{"topic_name": name, "partitions": [{"partition_index": index}]}]
        answer = probe.ask(55, 2, topics=wanted)
        if not answer.topics:  # Kafka says no in one error for the whole request.
            probe.note(f"quorum of {name[:2]} {index}", int(answer.error_code))
            continue
        shown = answer.topics[0].partitions[0]
        voters = [voter.replica_id for voter in shown.current_voters]
        probe.note(f"quorum of {name[:2]} {index}", (int(shown.error_code), shown.leader_id, voters, shown.observers))


class Session:
    """Fetches of one session; each note is (error, whether there is a session, what came of each partition)."""

    def __init__(self, probe: Probe, version: int) -> None:
        self.probe = probe
        self.version = version
        self.id = 0
        self.ids: dict[str, uuid.UUID] = {}

    def learn(self, *names: str) -> None:
        """Topic ids of now."""
        fields = {"include_cluster_authorized_operations": False, "include_topic_authorized_operations": False}
        asked = [{"name": self.probe.topic(name), "topic_id": None} for name in names]
        answer = self.probe.ask(3, 12, topics=asked, allow_auto_topic_creation=False, **fields)
        self.ids |= {name: topic.topic_id for name, topic in zip(names, answer.topics, strict=True)}

    def _key(self, name: str, field: str) -> dict[str, Any]:
        return {"topic_id": self.ids[name]} if self.version >= 13 else {field: self.probe.topic(name)}

    def fetch(
        self,
        step: str | None,
        epoch: int,
        *asked: tuple[str, int, int],
        forget: tuple[tuple[str, int], ...] = (),
        **changed: Any,
    ) -> Any:
        topics = [
            self._key(name, "topic")
            | {"partitions": [{"partition": index, "fetch_offset": offset, "partition_max_bytes": 1 << 20}]}
            for name, index, offset in asked
        ]
        fields = {
            "replica_id": -1,
            "max_wait": 0,
            "min_bytes": 1,
            "max_bytes": 1 << 20,
            "isolation_level": 0,
            "session_id": self.id,
            "session_epoch": epoch,
            "topics": topics,
            "forgotten_topics_data": [self._key(name, "topic") | {"partitions": [index]} for name, index in forget],
            "rack_id": "",
        } | changed
        frame = self.probe.ask_raw(1, self.version, **{k: v for k, v in fields.items() if self._has(k)})
        answer = decode_response(1, self.version, frame)
        if epoch == 0:
            self.id = answer.session_id
        labels = {topic_id: name for name, topic_id in self.ids.items()} if self.version >= 13 else {}
        came = sorted(
            (
                labels[topic.topic_id] if labels else topic.topic.removesuffix(f"-{self.probe.mark}"),
                item.partition_index,
                int(item.error_code),
                item.high_watermark,
                item.log_start_offset,
                len(item.records or b""),
            )
            for topic in answer.responses
            for item in topic.partitions
        )
        found = (int(answer.error_code), bool(answer.session_id), came)
        if step is not None:
            self.probe.note(f"{step}, v{self.version}", found)
        return found

    def _has(self, field: str) -> bool:
        return not (field == "replica_id" and self.version >= 15)


def fetch_sessions(probe: Probe) -> None:
    for name in ("a", "b", "gone7", "gone12", "gone13"):
        probe.create(name, 2)
        _produce_first(probe, name)
    for version in (7, 12, 13):
        session = Session(probe, version)
        session.learn("a", "b", f"gone{version}")
        session.ids["none"] = uuid.uuid4()
        end = probe.produce("a", batch(b"more"))[1] + 1
        session.fetch("begun", 0, ("a", 0, 0), ("a", 1, 0), ("b", 1, 0))
        session.fetch("the same again, which was not read", 1)
        session.fetch("read", 2, ("a", 0, end))
        session.fetch("a repeated request", 2)
        session.fetch("nothing", 3)
        probe.produce("a", batch(b"next"))
        session.fetch("something", 4)
        session.fetch("read again", 5, ("a", 0, end + 1))
        session.fetch("a partition more", 6, ("b", 0, 0))
        session.fetch("one less", 7, forget=(("b", 0),))
        session.fetch("one that is not there", 8, ("none", 0, 0))
        session.fetch("and is still not there", 9)
        session.fetch("out of range", 10, ("a", 1, 77), forget=(("none", 0),))
        session.fetch("in range again", 11, ("a", 1, 0))
        probe.ask(
            *(21, 2),
            topics=[{"name": probe.topic("a"), "partitions": [{"partition_index": 0, "offset": 1}]}],
            timeout=9000,
        )
        session.fetch("records deleted", 12)
        session.fetch("a wrong epoch", 20)
        session.fetch("an unknown session", 13, session_id=session.id ^ 1)
        session.fetch("all forgotten", 13, forget=(("a", 0), ("a", 1), ("b", 1)))
        session.fetch("and so it ended", 14)
        session.fetch("begun with nothing", 0, session_id=0)
        session.fetch("nothing at all", 1)
        session.fetch("begun again", 0, ("a", 1, 0), session_id=0)
        kept = session.id
        session.fetch("ended by a request without session", -1, ("a", 1, 0))
        session.fetch("it is over", 1, session_id=kept)
        session.fetch("one for two protocols", 0, ("a", 1, 0), session_id=0)
        session.version = 12 if version == 13 else 13
        session.fetch(f"names and ids mixed after v{version}", 1)
        session.version = version
        _deleted_topic(probe, session, f"gone{version}")


def _produce_first(probe: Probe, name: str) -> None:
    while probe.produce(name, batch(b"first"))[0]:  # Kafka answers CreateTopics before the partition has its leader.
        time.sleep(0.02)


def _deleted_topic(probe: Probe, session: Session, name: str) -> None:
    session.fetch("a topic that goes", 0, (name, 0, 1), ("a", 1, 0), session_id=0)
    probe.ask(20, 5, topic_names=[probe.topic(name)], timeout=10_000)
    epoch = 1
    while session.fetch(None, epoch)[2] == []:
        epoch += 1
    session.fetch("it is gone", epoch + 1)
    if session.version < 13:
        probe.create(name, 2)
        while session.fetch(None, epoch + 2)[2][0][2] == 3:
            epoch += 1
        _produce_first(probe, name)
        session.fetch("come again", epoch + 3, (name, 0, 0))


def markers(probe: Probe) -> None:
    """What an operator's tools ask (KIP-664): producers of a partition, and markers against hanging transactions."""
    probe.create("a")

    def mark(
        name: str, producer_id: int, epoch: int, coordinator: int = 0, version: int = 0, commit: bool = False
    ) -> int:
        marker = {
            "producer_id": producer_id,
            "producer_epoch": epoch,
            "transaction_result": commit,
            "topics": [{"name": probe.topic(name), "partition_indexes": [0]}],
            "coordinator_epoch": coordinator,
            "transaction_version": version,
        }
        answer = probe.ask(27, 2, markers=[marker])
        return int(answer.markers[0].topics[0].partitions[0].error_code)

    def producers(name: str) -> Any:
        answer = probe.ask(61, 0, topics=[{"name": probe.topic(name), "partition_indexes": [0]}])
        item = answer.topics[0].partitions[0]
        first = probe.identity[0]
        return int(item.error_code), sorted(
            (
                found.producer_id - first,
                found.producer_epoch,
                found.last_sequence,
                found.coordinator_epoch,
                found.current_txn_start_offset,
            )
            for found in item.active_producers
        )

    probe.note("producers of nothing", producers("nowhere"))
    probe.note("marker into nothing", mark("nowhere", 1, 1))
    probe.note("init", probe.init(None))
    probe.note("plain", [probe.produce("a", probe.data(b"1", b"2")), producers("a")])
    producer_id, epoch = probe.identity
    for step, arguments in {
        "marker of the same epoch": (epoch,),
        "the same again": (epoch,),
        "a commit of the same epoch": (epoch, 0, 0, True),
        "marker of a higher epoch": (epoch + 3,),
        "marker of a lower epoch": (epoch + 2,),
        "marker of an earlier coordinator": (epoch + 3, -1),
        "V2 marker of the same epoch": (epoch + 3, 0, 2),
        "V2 marker of a lower epoch": (epoch + 1, 0, 2),
        "V2 marker of a higher epoch": (epoch + 4, 0, 2),
    }.items():
        probe.note(step, [mark("a", producer_id, *arguments), producers("a")])
    probe.note("marker of an unknown producer", [mark("a", producer_id + 10**6, 7), producers("a")])
    probe.note("marker of a later coordinator", mark("a", producer_id + 10**6, 8, 5))
    probe.create("b")
    txn = probe.topic("txn")
    probe.init(txn)
    probe.note("open", [probe.produce("b", probe.data(transactional=True), 12, txn)[0], producers("b")])
    probe.note("marker into a live transaction", mark("b", *probe.identity))
    probe.end(txn, False, 5)


@pytest.mark.kafka
@pytest.mark.parametrize(
    "script", [topics, batches, sequences, transactions_v1, transactions_v2, groups, replicas, markers, fetch_sessions]
)
def test_both_brokers_answer_alike(script: Any, kafka: KafkaNode, embedded: Address) -> None:
    answers = []
    for bootstrap in (kafka.bootstrap, embedded.bootstrap):
        probe = Probe(bootstrap)
        try:
            script(probe)
        finally:
            probe.close()
        answers.append({step: answer for step, answer in probe.answers.items() if step not in ON_PURPOSE})
    real, ours = answers
    assert ours == real

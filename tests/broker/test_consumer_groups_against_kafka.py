"""The same heartbeats to Apache Kafka 4.3.1 and to the embedded broker: the same answers (KIP-848)."""

from __future__ import annotations

import struct
from typing import Any
from uuid import UUID

import pytest

from tests.broker.test_against_kafka import Probe
from tests.conftest import Address
from tests.services.kafka import KafkaNode


class Groups(Probe):
    """A probe of one group, with topics `a` of four partitions and `b` of two."""

    def __init__(self, bootstrap: str) -> None:
        super().__init__(bootstrap)
        self.ids: dict[str, UUID] = {}
        self.group = ""
        for name, partitions in (("a", 4), ("b", 2)):
            assert self.create(name, partitions) == 0
            topics = [{"topic_id": None, "name": self.topic(name)}]
            answer = self.ask(
                3, 12, topics=topics, allow_auto_topic_creation=False, include_topic_authorized_operations=False
            )
            self.ids[name] = answer.topics[0].topic_id

    def begin(self, name: str) -> None:
        """Another group, whose assignments are made at once on both brokers."""
        self.group = f"{name}-{self.mark}"
        configs = [{"name": "consumer.assignment.interval.ms", "config_operation": 0, "value": "0"}]
        resource = {"resource_type": 32, "resource_name": self.group, "configs": configs}
        assert self.ask(44, 1, resources=[resource], validate_only=False).responses[0].error_code == 0

    def beat(self, step: str, member: str, epoch: int, **changed: Any) -> dict[str, list[int]] | None:
        topics, owned = changed.pop("topics", None), changed.pop("owned", None)
        fields: dict[str, Any] = {
            "group_id": self.group,
            "member_id": member,
            "member_epoch": epoch,
            "instance_id": None,
            "rack_id": None,
            "rebalance_timeout": -1,
            "subscribed_topic_regex": None,
            "server_assignor": None,
            "subscribed_topic_names": None if topics is None else [self.topic(name) for name in topics],
            "topic_partitions": (
                None
                if owned is None
                else [{"topic_id": self.ids[name], "partitions": indexes} for name, indexes in owned.items()]
            ),
        }
        answer = self.ask(68, 1, **(fields | changed))
        assignment = None
        if answer.assignment is not None:
            names = {topic_id: name for name, topic_id in self.ids.items()}
            assignment = {names[item.topic_id]: list(item.partitions) for item in answer.assignment.topic_partitions}
        text = (answer.error_message or "").replace(self.mark, "")
        self.note(step, (int(answer.error_code), text, answer.member_id, answer.member_epoch, assignment))
        return assignment

    def join(self, step: str, member: str, **changed: Any) -> dict[str, list[int]] | None:
        wanted = {"rebalance_timeout": 5_000, "topics": ["a"], "owned": {}} | changed
        return self.beat(step, member, 0, **wanted)

    def describe(self, step: str) -> None:
        [group] = self.ask(69, 1, group_ids=[self.group], include_authorized_operations=False).groups

        def parts(assignment: Any) -> list[tuple[str, tuple[int, ...]]]:
            return sorted((item.topic_name[0], item.partitions) for item in assignment.topic_partitions)

        members = sorted(
            (
                *(item.member_id, item.instance_id, item.member_epoch, item.subscribed_topic_regex, item.member_type),
                *(len(item.subscribed_topic_names), parts(item.assignment), parts(item.target_assignment)),
            )
            for item in group.members
        )
        epochs = (group.group_epoch, group.assignment_epoch, group.assignor_name)
        self.note(step, (int(group.error_code), group.group_state, *epochs, members))

    def commit(self, step: str, member: str, epoch: int, index: int = 0, *, name: str = "a", version: int = 9) -> None:
        item = {"partition_index": index, "committed_offset": 5, "committed_leader_epoch": -1, "committed_metadata": ""}
        topic = {"topic_id": self.ids[name]} if version >= 10 else {"name": self.topic(name)}
        answer = self.ask(
            8,
            version,
            group_id=self.group,
            generation_id_or_member_epoch=epoch,
            member_id=member,
            group_instance_id=None,
            topics=[topic | {"partitions": [item]}],
        )
        self.note(step, int(answer.topics[0].partitions[0].error_code))

    def commit_in_transaction(self, step: str, member: str, epoch: int) -> None:
        item = {"partition_index": 0, "committed_offset": 5, "committed_leader_epoch": -1, "committed_metadata": ""}
        answer = self.ask(
            28,
            5,
            transactional_id=self.group,
            group_id=self.group,
            producer_id=self.identity[0],
            producer_epoch=self.identity[1],
            generation_id=epoch,
            member_id=member,
            group_instance_id=None,
            topics=[{"name": self.topic("a"), "partitions": [item]}],
        )
        self.note(step, int(answer.topics[0].partitions[0].error_code))

    def fetch(self, step: str, member: str | None, epoch: int) -> None:
        topics = [{"name": self.topic("a"), "partition_indexes": [0]}]
        group = {"group_id": self.group, "member_id": member, "member_epoch": epoch, "topics": topics}
        [found] = self.ask(9, 9, groups=[group], require_stable=True).groups
        offsets = [(item.committed_offset, int(item.error_code)) for topic in found.topics for item in topic.partitions]
        self.note(step, (int(found.error_code), offsets))

    def classic_join(self, step: str, protocol_type: str) -> None:
        name = self.topic("a").encode()
        subscription = struct.pack(">hih", 1, 1, len(name)) + name + struct.pack(">ii", 0, 0)
        answer = self.ask(
            11,
            9,
            group_id=self.group,
            session_timeout=10_000,
            rebalance_timeout=10_000,
            member_id="",
            group_instance_id=None,
            protocol_type=protocol_type,
            protocols=[{"name": "range", "metadata": subscription}],
            reason=None,
        )
        self.note(step, int(answer.error_code))

    def listed(self, step: str) -> None:
        found = self.ask(16, 5, states_filter=[], types_filter=["consumer"]).groups
        mine = [(item.protocol_type, item.group_state) for item in found if item.group_id == self.group]
        [classic] = self.ask(15, 6, groups=[self.group], include_authorized_operations=False).groups
        text = (classic.error_message or "").replace(self.mark, "")
        self.note(step, (mine, int(classic.error_code), text, classic.group_state))


def refusals(probe: Groups) -> None:
    probe.begin("refused")
    probe.beat("unknown group", "m1", 1)
    probe.beat("leave of an unknown group", "m1", -1)
    probe.join("no time to let go", "m1", rebalance_timeout=-1)
    probe.join("no subscription", "m1", topics=None)
    probe.join("null partitions", "m1", owned=None)
    probe.join("partitions", "m1", owned={"a": [0]})
    probe.join("no member id", "")
    probe.join("unknown assignor", "m1", server_assignor="nope")
    probe.join("empty instance", "m1", instance_id="")
    probe.beat("bad epoch", "m1", -3)
    probe.beat("static leave without instance", "m1", -2)
    probe.describe("nobody is there")


def rebalances(probe: Groups) -> None:
    probe.begin("moving")
    probe.join("m1 joins", "m1")
    probe.describe("one member")
    probe.commit("commit", "m1", 2)
    probe.commit("commit, newer epoch", "m1", 3)
    probe.commit("commit, v8", "m1", 2, version=8)
    probe.commit("commit, v10", "m1", 2, version=10)
    probe.commit("commit, stranger", "x", 2)
    probe.commit("commit, nobody", "", -1)
    for step, member, epoch in (("own", "m1", 2), ("stale", "m1", 1), ("stranger", "x", 2), ("nobody", None, -1)):
        probe.fetch(f"fetch, {step}", member, epoch)
    probe.join("m2 joins", "m2")
    kept = probe.beat("m1 is told", "m1", 2)
    assert kept is not None
    probe.describe("moving")
    probe.beat("m1 still has all", "m1", 2, owned={"a": [0, 1, 2, 3]})
    probe.beat("m2 waits", "m2", 3)
    probe.beat("m1 let go", "m1", 2, owned=kept)
    given = next(index for index in range(4) if index not in kept["a"])
    probe.commit("commit, kept since before", "m1", 2, kept["a"][0])
    probe.commit("commit, given up", "m1", 2, given)
    probe.commit("commit, before it came", "m1", 1, kept["a"][0])
    probe.commit("commit, another topic", "m1", 2, name="b")
    probe.beat("m1 lost the answer", "m1", 2, owned=kept)
    probe.beat("m1 is a zombie", "m1", 2, owned={"a": [0, 1, 2, 3]})
    probe.beat("m2 gets the rest", "m2", 3)
    probe.describe("stable")
    probe.join("m1 begins anew", "m1")
    probe.beat("m2 leaves", "m2", -1)
    probe.describe("assigning")
    probe.beat("m1 gets all", "m1", 3)
    probe.beat("m1 wants more", "m1", 4, topics=["a", "b"])
    probe.beat("m1 wants nothing", "m1", 5, topics=[], owned={})
    probe.describe("wanting nothing")
    probe.listed("listed")
    probe.classic_join("a classic member of another kind", "connect")


def static_members(probe: Groups) -> None:
    probe.begin("static")
    probe.join("s1 joins", "s1", instance_id="i")
    probe.join("a twin", "s2", instance_id="i")
    probe.join("s1 again", "s1", instance_id="i")
    probe.beat("fenced", "s2", 2, instance_id="i")
    probe.beat("unknown instance", "s1", 2, instance_id="j")
    probe.beat("no instance given", "s1", 2)
    probe.beat("a twin goes", "s2", -2, instance_id="i")
    probe.beat("s1 goes", "s1", -2, instance_id="i")
    probe.describe("away")
    probe.commit("commit of one who is away", "s1", 2)
    probe.join("s3 comes", "s3", instance_id="i")
    probe.describe("back")
    probe.beat("s1 is over", "s1", 2, instance_id="i")
    probe.beat("s3 leaves for good", "s3", -1, instance_id="i")
    probe.describe("empty")
    probe.commit("commit by an administrator", "", -1)


def in_transactions(probe: Groups) -> None:
    probe.begin("transactions")
    probe.join("member", "m1")
    assert probe.init(probe.group) == 0
    for step, member, epoch in (
        ("right", "m1", 2),
        ("stale", "m1", 1),
        ("newer", "m1", 3),
        ("stranger", "x", 2),
        ("no member", "", -1),
        ("no epoch", "m1", -1),
        ("no id", "", 2),
    ):
        probe.commit_in_transaction(f"transaction, {step}", member, epoch)


@pytest.mark.kafka
def test_the_same_answers(kafka: KafkaNode, embedded: Address) -> None:
    answers = []
    for bootstrap in (kafka.bootstrap, embedded.bootstrap):
        probe = Groups(bootstrap)
        try:
            for part in (refusals, rebalances, static_members, in_transactions):
                part(probe)
        finally:
            probe.close()
        answers.append(probe.answers)
    theirs, ours = answers
    assert len(theirs) > 60
    assert theirs == ours

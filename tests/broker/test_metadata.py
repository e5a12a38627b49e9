"""The metadata store: what was acknowledged is there after a crash, and damage is named."""

from __future__ import annotations

import contextlib
from pathlib import Path
from uuid import uuid4

import pytest

from semel.broker.metadata import PRODUCER_ID_BLOCK, MetadataStore, TopicInfo
from semel.errors import ConfigurationError
from semel.failpoints import FailpointRaised, arm_failpoints


def test_topics_survive_and_a_deleted_one_stays_deleted(tmp_path: Path) -> None:
    path = tmp_path / "metadata.log"
    store = MetadataStore(path, "cluster")
    orders, gone = TopicInfo("orders", uuid4(), 4, {"cleanup.policy": "compact"}), TopicInfo("gone", uuid4(), 1)
    store.put_topic(orders)
    store.put_topic(gone)
    store.set_partitions("orders", 6)
    store.delete_topic("gone")
    again = MetadataStore(path, "another cluster")
    assert again.cluster_id == "cluster"
    assert again.topics == {"orders": TopicInfo("orders", orders.topic_id, 6, {"cleanup.policy": "compact"})}


def test_producer_ids_never_repeat_over_restarts(tmp_path: Path) -> None:
    path = tmp_path / "metadata.log"
    given: list[int] = []
    for _ in range(4):
        store = MetadataStore(path, "cluster")
        given += [store.new_producer_id() for _ in range(PRODUCER_ID_BLOCK + 3)]
    assert len(set(given)) == len(given)


def test_a_change_that_was_being_written_is_dropped_and_the_rest_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metadata.log"
    MetadataStore(path, "cluster").put_topic(TopicInfo("orders", uuid4(), 4))
    whole = path.read_bytes()
    MetadataStore(path, "cluster").put_topic(TopicInfo("late", uuid4(), 1))
    grown = path.read_bytes()
    for end in range(len(whole), len(grown) - 1):
        path.write_bytes(grown[:end])
        assert set(MetadataStore(path, "cluster").topics) == {"orders"}


def test_damage_before_the_end_is_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "metadata.log"
    store = MetadataStore(path, "cluster")
    store.put_topic(TopicInfo("orders", uuid4(), 4))
    store.put_topic(TopicInfo("more", uuid4(), 4))
    data = bytearray(path.read_bytes())
    data[data.index(b"orders")] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConfigurationError, match="damaged in line 3"):
        MetadataStore(path, "cluster")


@pytest.mark.parametrize("hit", [1, 3])
def test_a_durable_change_that_was_interrupted_is_not_there(tmp_path: Path, hit: int) -> None:
    """A file that says more than the broker knows once got a second deletion of one topic: no broker started on it."""
    path = tmp_path / "metadata.log"
    store = MetadataStore(path, "a cluster")
    arm_failpoints(f"broker.after_metadata:raise:{hit}")
    try:
        for change in (lambda: store.put_topic(TopicInfo("orders", uuid4(), 1)), lambda: store.delete_topic("orders")):
            for _ in range(2):
                with contextlib.suppress(FailpointRaised, KeyError):
                    change()
    finally:
        arm_failpoints("")
    assert not store.topics
    store.put_topic(TopicInfo("after", uuid4(), 1))
    store.close()
    again = MetadataStore(path, "another")
    assert list(again.topics) == ["after"]
    again.close()

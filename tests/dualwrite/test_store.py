"""What every store of decisions holds to: the fence is raised and read in one step, and old owners change nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from semel.databases import connect
from semel.dualwrite.sql import MARK
from semel.dualwrite.store import Claim, Store
from semel.errors import ConfigurationError, Fatal
from tests.dualwrite.conftest import open_store

Stores = Callable[[], Store]


def test_a_slot_is_claimed_by_one_owner_after_the_other(new_store: Stores) -> None:
    store, other = new_store(), new_store()
    row = store.add("ann")
    assert (row.slot, row.owner) == ("bank.dual.database.0", "ann")
    assert store.claim(row.slot, "ann") == Claim(1, "")
    assert other.claim(row.slot, "bob") == Claim(2, "")
    found = store.decided(row.slot)
    assert found is not None
    assert tuple(found) == ("bob", 2, "")
    assert other.add("bob").slot == "bank.dual.database.1"


def test_a_released_slot_is_reserved_once_and_its_fence_stays(new_store: Stores) -> None:
    store, other = new_store(), new_store()
    slot = store.add("ann").slot
    store.claim(slot, "ann")
    store.release(slot, "bob")  # It is not his.
    assert [row.owner for row in store.slots()] == ["ann"]
    store.release(slot, "ann")
    [released] = other.slots()
    assert released.owner == ""
    assert other.reserve(released, "bob")
    assert not store.reserve(released, "ann")
    assert [(row.owner, row.owner_epoch) for row in store.slots()] == [("bob", 1)]


def test_a_beat_is_of_its_owner(new_store: Stores) -> None:
    store = new_store()
    slot = store.add("ann").slot
    before = store.slots()[0].beat
    store.beat({slot: "bob"})
    assert store.slots()[0].beat == before
    store.beat({slot: "ann"})
    assert store.slots()[0].beat != before


def test_another_kafka_cluster_is_refused(new_store: Stores, store_url: str) -> None:
    """A copy of the store for another environment would decide about transactions that are none of its own."""
    new_store()
    with pytest.raises(ConfigurationError, match="belongs to the Kafka cluster 'cluster-a'"):
        open_store(store_url, environment="cluster-b")


def test_a_slot_that_is_not_there_is_decided_by_nobody(new_store: Stores) -> None:
    store = new_store()
    with pytest.raises(Fatal, match=r"is gone from .*Nothing is decided"):
        store.claim("bank.dual.database.7", "ann")
    assert store.decided("bank.dual.database.7") is None


def test_a_number_does_not_come_again(new_sql_store: Stores, url: str) -> None:
    """Kafka may hold a transaction under the name of a slot that was deleted."""
    store = new_sql_store()
    slot = store.add("ann").slot
    database = connect(url)
    database.execute("DELETE FROM semel_txn")
    database.close()
    assert store.add("ann").slot != slot
    with pytest.raises(Fatal, match=r"is gone from .*Nothing is decided"):
        store.claim(slot, "ann")
    assert store.decided(slot) is None


def test_a_claim_waits_for_a_commit_under_way_and_sees_it(new_sql_store: Stores, url: str) -> None:
    """The zombie has written its decision and not committed: whoever raises the fence must not miss it."""
    store, other = new_sql_store(), new_sql_store()
    slot = store.add("ann").slot
    epoch = store.claim(slot, "ann").owner_epoch
    zombie = connect(url)
    zombie.begin()
    assert zombie.execute(MARK, ("7:1", slot, epoch, "ann")) == 1
    found: list[Claim] = []
    claiming = threading.Thread(target=lambda: found.append(other.claim(slot, "bob")))
    claiming.start()
    claiming.join(0.2)
    assert not found
    zombie.commit()
    claiming.join(20)
    assert found == [Claim(2, "7:1")]
    # And from now on the zombie decides nothing.
    zombie.begin()
    assert zombie.execute(MARK, ("7:2", slot, epoch, "ann")) == 0
    zombie.close()

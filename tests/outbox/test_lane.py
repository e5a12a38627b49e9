"""The rules of the manifest protocol alone: a database and a Kafka as values, relays that act in any order of steps."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import pytest

from semel.outbox.lane import DEPTH, Lane, LaneRow, take_over
from semel.outbox.manifest import Manifest, Published, RowId
from semel.outbox.rows import OutboxRow

KEYS = 4


@dataclass
class Table:
    """The lane in the database."""

    rows: dict[int, OutboxRow] = field(default_factory=dict)
    epoch: int = 0
    batch: int = 0
    seq: int = 0


@dataclass
class Relay:
    """One relay: what it knows, and which step comes next."""

    lane: Lane
    fence: int


class World:
    """One lane. Each step is atomic where the database or Kafka make it so."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.table = Table()
        self.backup: Table | None = None
        self.log: list[bytes] = []
        self.topic: list[OutboxRow] = []
        self.fence = 0
        self.incarnation = "first"
        self.relays: list[Relay] = []
        self.number = 0

    def write(self) -> None:
        """Some rows; a number may be taken long before its row is committed."""
        for _ in range(self.rng.randrange(1, 4)):
            self.table.seq += self.rng.randrange(1, 3)
            self.number += 1
            key = b"k%d" % self.rng.randrange(KEYS)
            row = OutboxRow(0, self.table.seq, f"m{self.number}", "t", key, b"", "[]", self.number)
            self.table.rows[row.seq] = row

    def write_late(self) -> None:
        """A row whose number is lower than others that are there, of a key of its own."""
        free = [seq for seq in range(1, self.table.seq) if seq not in self.table.rows and seq not in self.used()]
        if free:
            self.number += 1
            row = OutboxRow(0, self.rng.choice(free), f"m{self.number}", "t", b"late%d" % self.number, b"", "[]", 0)
            self.table.rows[row.seq] = row

    def used(self) -> set[int]:
        return {row.seq for row in self.topic}

    def start(self) -> None:
        """A relay takes the lane over; who had it may not have noticed."""
        self.table.epoch += 1
        row = LaneRow(0, self.table.epoch, self.table.batch, None)
        self.fence += 1
        last = Manifest.decode(self.log[-1]) if self.log else None
        found = take_over(row, self.incarnation, last)
        lane = Lane(0, "db", self.incarnation, row.owner_epoch, found.batch)
        relay = Relay(lane, self.fence)
        self.delete(found.delete)
        if found.reconcile:
            ids = {item.msg_id for item in self.topic}
            self.delete([RowId(0, item.seq, item.msg_id) for item in self.table.rows.values() if item.msg_id in ids])
            if self.rng.random() < 0.3:
                return  # It dies; the next one does it again.
            self.log.append(lane.begin_empty().encode())
            lane.committed()
        else:
            self.table.batch = found.batch
        self.relays.append(relay)

    def delete(self, rows: list[RowId]) -> None:
        for row in rows:
            if row.seq in self.table.rows and self.table.rows[row.seq].msg_id == row.msg_id:
                del self.table.rows[row.seq]

    def read(self, relay: Relay) -> None:
        if relay.lane.has_room:
            rows = [self.table.rows[seq] for seq in sorted(self.table.rows)]
            relay.lane.read(rows[: self.rng.randrange(1, 8)], 0)

    def publish(self, relay: Relay) -> None:
        begun = relay.lane.begin()
        if begun is None:
            return
        batch, manifest = begun
        if relay.fence != self.fence:
            self.relays.remove(relay)
            return
        if self.rng.random() < 0.2:
            if self.rng.random() < 0.5:
                relay.lane.aborted()
            else:
                relay.lane.aborted(is_refused=True)
            return
        self.topic += batch.rows
        self.log.append(manifest.encode())
        if self.rng.random() < 0.2:
            self.relays.remove(relay)  # It never hears of it.
        else:
            relay.lane.committed()

    def settle(self, relay: Relay) -> None:
        done = list(relay.lane.undeleted)[: self.rng.randrange(1, DEPTH + 1)]
        if not done:
            return
        self.delete([row for batch in done for row in batch.ids])
        if self.table.epoch == relay.lane.owner_epoch:
            self.table.batch = done[-1].number
            relay.lane.settled(done[-1].number)
        else:
            self.relays.remove(relay)

    def restore(self) -> None:
        """Every session ends; what was sent to Kafka was committed or not."""
        if self.backup is not None:
            self.table = replace(self.backup, rows=dict(self.backup.rows))
            self.relays.clear()

    def step(self) -> None:
        relay = self.rng.choice(self.relays) if self.relays else None
        chance = self.rng.random()
        if chance < 0.25:
            self.write()
        elif chance < 0.3:
            self.write_late()
        elif chance < 0.36 or relay is None:
            self.start()
        elif chance < 0.38:
            self.relays.remove(relay)
        elif chance < 0.6:
            self.read(relay)
        elif chance < 0.8:
            self.publish(relay)
        else:
            self.settle(relay)

    def finish(self) -> None:
        self.start()
        while not self.relays:
            self.start()
        relay = self.relays[-1]
        while self.table.rows or relay.lane.in_hand:
            self.read(relay)
            self.publish(relay)
            self.settle(relay)
            if relay not in self.relays:
                self.finish()
                return

    def check(self) -> None:
        ids = [row.msg_id for row in self.topic]
        assert len(ids) == len(set(ids)), "something is there twice"
        for key in range(KEYS):
            own = [int(row.msg_id[1:]) for row in self.topic if row.key == b"k%d" % key]
            assert own == sorted(own), "a key lost its order"


@pytest.mark.parametrize("part", range(4))
def test_relays_in_any_order_lose_and_double_nothing(part: int) -> None:
    for seed in range(part * 100, part * 100 + 40):
        world = World(seed)
        for _ in range(150):
            world.step()
        world.finish()
        world.check()
        assert len(world.topic) == world.number, f"seed {seed}: something is lost"


@pytest.mark.parametrize("part", range(4))
def test_a_restored_database_doubles_nothing(part: int) -> None:
    """What was written after the backup is lost with it, and published all the same: the numbers come again."""
    for seed in range(part * 100, part * 100 + 40):
        world = World(seed)
        for number in range(200):
            if number == 50 + seed % 40:
                world.backup = replace(world.table, rows=dict(world.table.rows))
            if number == 140:
                world.restore()
            world.step()
        world.finish()
        ids = [row.msg_id for row in world.topic]
        assert len(ids) == len(set(ids)), f"seed {seed}: something is there twice"


def manifest(*numbers: int, epoch: int = 1, incarnation: str = "first") -> Manifest:
    batches = [Published(number, [RowId(0, number, f"m{number}")]) for number in numbers]
    return Manifest(1, "db", incarnation, 0, epoch, batches)


@pytest.mark.parametrize(
    ("batch", "last", "is_lost", "deletes", "says"),
    [
        (0, None, False, 0, ""),
        (0, manifest(1), False, 1, ""),
        (1, manifest(1, 2), False, 2, ""),
        (2, manifest(1, 2), False, 0, ""),
        (2, None, False, 0, ""),
        (2, None, True, 0, "is not in Kafka any more"),
        (0, manifest(2), False, 1, "batches 1 to 1 were deleted once"),
        (3, manifest(1, 2), False, 2, "but Kafka's last is 2"),
        (1, manifest(2, epoch=9), False, 1, "written by owner 9"),
        (1, manifest(2, incarnation="second"), False, 1, "declared restored"),
    ],
)
def test_what_a_new_owner_does(batch: int, last: Manifest | None, is_lost: bool, deletes: int, says: str) -> None:
    found = take_over(LaneRow(0, 2, batch, None), "first", last, is_lost=is_lost)
    assert len(found.delete) == deletes
    assert (says in found.reconcile) if says else not found.reconcile
    assert found.batch == max(batch, last.last if last is not None else 0)


def test_the_fault_of_one_row_is_found_in_few_steps() -> None:
    lane = Lane(0, "db", "first", 1, 0)
    rows = [OutboxRow(0, number, f"m{number}", "t", b"k%d" % number, b"", "[]", 0) for number in range(1, 1_001)]
    lane.read(rows, 0)
    tries, sent = 0, []
    while (begun := lane.begin()) is not None:
        batch, _ = begun
        if any(row.seq == 700 for row in batch.rows):
            tries += 1
            if (culprit := lane.aborted(is_refused=True)) is not None:
                break
        else:
            sent += batch.rows
            lane.committed()
            lane.settled(batch.number)
    assert [row.seq for row in culprit.rows] == [700]
    assert tries <= 12
    assert [row.seq for row in sent] == list(range(1, 700)), "what comes before it in the batch is published"


def test_a_manifest_of_another_kind_is_refused() -> None:
    assert Manifest.decode(manifest(1, 2).encode()) == manifest(1, 2)
    with pytest.raises(ValueError, match="no manifest"):
        Manifest.decode(b"[1]")
    with pytest.raises(ValueError, match="reads version 1"):
        Manifest.decode(Manifest(2, "db", "i", 0, 1, [Published(1, [])]).encode())

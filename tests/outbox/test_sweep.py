"""The ways through the outbox: every row is read, those of one key in their order, whatever happens meanwhile."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest

from semel.outbox.lane import Lane
from semel.outbox.rows import SHARDS, OutboxRow, lane_of
from semel.outbox.sweep import Ask, Sweep, shards_of

LANES = 4
LIMIT = 4
KEYS = 8
HELD = b"held"
"""A key that somebody holds back: its rows are marked, and not asked for again."""


class World:
    """A table, a relay with some lanes, and a topic. A SELECT sees one moment; its answer comes later."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.chance = self.rng.choice([0.2, 0.7])
        """That a row is held, and that a transaction is aborted."""
        self.table: dict[int, OutboxRow] = {}
        self.seq = 0
        self.open: dict[int, int] = {}
        """Keys whose lock a transaction holds that wrote its row and is not committed, each with the row's number."""
        self.count: defaultdict[bytes, int] = defaultdict(int)
        self.lanes = {number: self.lane(number) for number in range(LANES)}
        self.sweep = Sweep()
        self.sweep.restart(self.lanes)
        self.under_way: tuple[Ask, dict[int, tuple[Lane, int]], list[OutboxRow]] | None = None
        self.topic: defaultdict[bytes, list[int]] = defaultdict(list)
        self.steps = 2 * [self.write, self.begin, self.end, self.look, self.answer]
        self.steps += [self.commit, self.settle, self.abort, self.change_hands]

    def lane(self, number: int) -> Lane:
        return Lane(number, "db", "first", 1, 0)

    def insert(self, seq: int, key: bytes, shard: int) -> None:
        self.table[seq] = OutboxRow(shard, seq, f"m{seq}", "t", key, b"", "[]", self.count[key])
        self.count[key] += 1
        self.sweep.add(self.lanes)  # The writer calls.

    def write(self) -> None:
        for _ in range(self.rng.randrange(1, 6)):
            self.seq += self.rng.randrange(1, 3)
            key = self.rng.randrange(KEYS)
            held = self.rng.random() < self.chance
            if held or key not in self.open:
                self.insert(self.seq, HELD if held else b"k%d" % key, key % 4 * 19)

    def begin(self) -> None:
        """A row has its number now, and is committed later. The next one of its key waits for that."""
        key = self.rng.randrange(KEYS)
        if key not in self.open:
            self.seq += 1
            self.open[key] = self.seq

    def end(self) -> None:
        if self.open:
            key, seq = self.open.popitem()
            self.insert(seq, b"k%d" % key, key % 4 * 19)

    def look(self) -> None:
        ready = [number for number, lane in self.lanes.items() if lane.has_room]
        if self.under_way is None and (ask := self.sweep.ask(ready, LANES)) is not None:
            without = set().union(*(self.lanes[number].numbers(ask.shards[0]) for number in ask.lanes))
            seen = sorted(row for row in self.table.values() if row.shard in ask.shards and row.seq not in without)
            found = seen[:LIMIT]
            self.under_way = (
                ask,
                {number: (self.lanes[number], self.lanes[number].aborts) for number in ask.lanes},
                found,
            )

    def answer(self) -> None:
        if self.under_way is None:
            return
        (ask, readers, found), self.under_way = self.under_way, None
        if self.rng.random() < 0.1:
            self.sweep.failed(ask)
            return
        last, is_full, is_whole = (found[-1].shard if found else 0), len(found) == LIMIT, True
        if found and self.rng.random() < 0.1:  # Something is wrong with one of them: its key is left for now.
            found, is_whole = [row for row in found if row.key != found[0].key], False
        for row in found:
            if row.key == HELD:
                del self.table[row.seq]
        for number, (lane, aborts) in readers.items():
            rows = [row for row in found if lane_of(row.shard, LANES) == number and row.key != HELD]
            if self.lanes.get(number) is lane and lane.aborts == aborts:
                lane.read(rows, 0)
            elif rows:
                is_whole = False
        self.sweep.answered(ask, last, is_full=is_full, is_whole=is_whole)

    def commit(self) -> None:
        lane = self.lanes[self.rng.randrange(LANES)]
        if lane.under_way is not None or lane.begin() is not None:
            assert lane.under_way is not None
            for row in lane.under_way.rows:
                self.topic[row.key or b""].append(row.created_at)
            lane.committed()

    def settle(self) -> None:
        lane = self.lanes[self.rng.randrange(LANES)]
        for row in [row for batch in lane.undeleted for row in batch.rows]:
            del self.table[row.seq]
        lane.settled(lane.batch)

    def abort(self) -> None:
        """Its rows, and those behind them, are to be read again."""
        lane = self.lanes[self.rng.randrange(LANES)]
        if self.rng.random() < self.chance and lane.begin() is not None:
            lane.aborted(is_refused=self.rng.random() < 0.3)
            self.sweep.restart([lane.number])

    def change_hands(self) -> None:
        """The lane is lost, and taken over anew: what was in Kafka is deleted, all else is in the table."""
        if self.rng.random() < 0.2:
            number = self.rng.randrange(LANES)
            for row in [row for batch in self.lanes[number].undeleted for row in batch.rows]:
                del self.table[row.seq]
            self.lanes[number] = self.lane(number)
            self.sweep.restart([number])


@pytest.mark.parametrize("seed", range(200))
def test_every_row_is_read_and_each_key_in_its_order(seed: int) -> None:
    world = World(seed)
    for _ in range(300):
        world.rng.choice(world.steps)()
    while world.open:
        world.end()
    for _ in range(20_000):
        world.rng.choice([world.look, world.answer, world.commit, world.settle])()
        if not world.table:
            break
    assert not world.table, "nobody calls any more, and rows are left"
    assert world.topic == {key: list(range(count)) for key, count in world.count.items() if key != HELD}


def test_a_backlog_is_read_without_stepping_over_it_again() -> None:
    sweep = Sweep()
    sweep.add(range(LANES))
    first = sweep.ask(range(LANES), LANES)
    assert first is not None
    assert (first.shards, first.is_all) == (list(range(SHARDS)), True)
    sweep.answered(first, 20, is_full=True, is_whole=True)
    second = sweep.ask([0, 1], LANES)
    assert second is not None
    assert second.shards == [shard for shard in shards_of([0, 1], LANES) if shard >= 20]
    assert not second.is_all
    sweep.answered(second, 0, is_full=False, is_whole=True)
    third = sweep.ask(range(LANES), LANES)
    assert third is not None
    assert third.is_all, "what was committed meanwhile under lower numbers"
    sweep.answered(third, 0, is_full=False, is_whole=True)
    assert sweep.ask(range(LANES), LANES) is None


def test_a_select_that_was_under_way_does_not_pass_over_what_was_put_back() -> None:
    """It may have ended with rows that are held, of the shard in which the others wait again."""
    sweep = Sweep()
    sweep.add(range(LANES))
    ask = sweep.ask(range(LANES), LANES)
    assert ask is not None
    sweep.restart([1])
    sweep.answered(ask, 20, is_full=True, is_whole=True)
    again = sweep.ask(range(LANES), LANES)
    assert again is not None
    assert again.is_all

"""The relay against a real broker: what is committed in the database is in Kafka once and in order, and only that."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from semel.env import comes
from semel.errors import ConfigurationError
from semel.outbox.verbs import Operator, Selection, declare_restored, release
from tests.conftest import Address
from tests.outbox.world import Outbox, asynchronous, msg_id, running, until

_ROWS = "shard, seq, msg_id, topic, record_key, record_value, headers, created_at"


def snapshot(outbox: Outbox) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """What a backup would hold of the outbox."""
    rows = outbox.database.query(f"SELECT {_ROWS} FROM semel_outbox ORDER BY seq")
    return rows, outbox.database.query("SELECT owner_epoch, batch, positions, lane FROM semel_outbox_lane")


def restore(outbox: Outbox, rows: list[tuple[Any, ...]], lanes: list[tuple[Any, ...]]) -> None:
    """Put it back."""
    override = " OVERRIDING SYSTEM VALUE" if outbox.database.title == "PostgreSQL" else ""
    outbox.database.execute("DELETE FROM semel_outbox")
    outbox.database.executemany(f"INSERT INTO semel_outbox ({_ROWS}){override} VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
    outbox.database.executemany(
        "UPDATE semel_outbox_lane SET owner_epoch = ?, batch = ?, positions = ? WHERE lane = ?", lanes
    )


@pytest.fixture
def outbox(url: str, embedded: Address) -> Iterator[Outbox]:
    made = Outbox(url, embedded.bootstrap)
    yield made
    made.close()


@asynchronous
async def test_rows_are_published_once_and_in_order(outbox: Outbox, tmp_path: Path) -> None:
    await outbox.make_topic()
    outbox.write(500)
    relay = outbox.relay(tmp_path)
    async with running(relay) as tasks:
        await until(lambda: outbox.left() == 0, beside=tasks)
        for _ in range(20):
            outbox.write(7)
            relay.wake()
        await until(lambda: outbox.left() == 0, beside=tasks)
    await outbox.check()


@asynchronous
async def test_what_is_in_hand_is_ended_when_it_drains(outbox: Outbox, tmp_path: Path) -> None:
    """Its transactions are committed and their rows deleted, although the other tasks have no more to do."""
    await outbox.make_topic()
    relay = outbox.relay(tmp_path)
    entered, go_on = asyncio.Event(), asyncio.Event()
    write = relay._link.write

    async def slowly(*given: Any) -> None:
        entered.set()
        await go_on.wait()
        await write(*given)

    relay._link.write = slowly  # type: ignore[method-assign]
    async with running(relay):
        outbox.write(500)
        relay.wake()
        await comes(entered, 60)
        await relay.drain()
        relay._claims.set()  # A lane came in this moment.
        for _ in range(20):
            await asyncio.sleep(0)
        go_on.set()
    assert len(await outbox.records()) == 500 - outbox.left() > 0


@asynchronous
async def test_a_row_that_cannot_be_published_holds_its_key_and_nothing_else(outbox: Outbox, tmp_path: Path) -> None:
    await outbox.make_topic(configs={"max.message.bytes": "2000"})
    large = b"v" * 5_000
    bad = outbox.write(1, keys=1, value=large)  # Key k0: what comes after it of k0 waits, too.
    outbox.write(10, keys=5)
    unknown = outbox.write(2, keys=2, topic=f"{outbox.app}.nowhere")
    relay = outbox.relay(tmp_path)
    async with running(relay) as tasks:
        await until(lambda: outbox.left() == 5, beside=tasks)
        outbox.write(5, keys=5)
        relay.wake()
        await until(lambda: outbox.left() == 6, beside=tasks)
        found = [record.key for record in await outbox.records()]
        assert sorted(found) == sorted([b"k1", b"k2", b"k3", b"k4"] * 3)
        [(reason,)] = outbox.database.query("SELECT held FROM semel_outbox WHERE msg_id = ?", (bad[0],))
        assert "takes batches of 2000" in reason
        [(reason,)] = outbox.database.query("SELECT held FROM semel_outbox WHERE msg_id = ?", (unknown[0],))
        assert "there is no topic" in reason
        # Mended: everything goes, each key in its order.
        await outbox.make_topic(f"{outbox.app}.nowhere")
        outbox.database.execute("UPDATE semel_outbox SET record_value = ? WHERE msg_id = ?", (b"small", bad[0]))
        operator = Operator("me", "it is mended", 0)
        assert release(outbox.database, Selection(key=b"k0", topic=outbox.topic), operator) == 4
        assert release(outbox.database, Selection(topic=f"{outbox.app}.nowhere"), operator) == 2
        relay.wake()
        await until(lambda: outbox.left() == 0, beside=tasks)
    for key, ids in outbox.written.items():
        outbox.written[key] = [item for item in ids if item not in unknown]
    await outbox.check()
    assert sorted(map(msg_id, await outbox.records(f"{outbox.app}.nowhere"))) == sorted(unknown)


@pytest.mark.parametrize("is_told", [False, True])
@asynchronous
async def test_a_restored_database_sends_nothing_again(outbox: Outbox, tmp_path: Path, is_told: bool) -> None:
    """The backup has rows that were published since, in several batches: the last manifest does not list them all."""
    await outbox.make_topic()
    outbox.write(40)
    async with running(outbox.relay(tmp_path)) as tasks:
        await until(lambda: outbox.left() == 0, beside=tasks)
    _, lanes = snapshot(outbox)
    resurrected: list[tuple[Any, ...]] = []
    for _ in range(2):
        outbox.write(60)
        resurrected += snapshot(outbox)[0]
        async with running(outbox.relay(tmp_path)) as tasks:
            await until(lambda: outbox.left() == 0, beside=tasks)
    if is_told:
        # By its numbers nothing is wrong.
        lanes = [(epoch + 1_000, batch + 1_000, positions, lane) for epoch, batch, positions, lane in lanes]
    restore(outbox, resurrected, lanes)
    if is_told:
        declare_restored(outbox.database, Operator("me", "restored", 0))
    outbox.write(20)
    async with running(outbox.relay(tmp_path)) as tasks:
        await until(lambda: outbox.left() == 0, beside=tasks)
    await outbox.check()


@asynchronous
async def test_two_relays_share_the_lanes_out(outbox: Outbox, tmp_path: Path) -> None:
    await outbox.make_topic()
    first, second = outbox.relay(tmp_path), outbox.relay(tmp_path, slot=1)
    async with running(first, second) as tasks:
        await until(lambda: len(first._owned) == len(second._owned) == 8, beside=tasks)
        for _ in range(10):
            outbox.write(50)
            first.wake()
        await until(lambda: outbox.left() == 0, beside=tasks)
    await outbox.check()


@asynchronous
async def test_an_outbox_of_another_app_is_refused_and_not_touched(outbox: Outbox, tmp_path: Path) -> None:
    outbox.database.execute("UPDATE semel_outbox_meta SET app = 'other', environment = 'elsewhere'")
    before = outbox.database.query("SELECT * FROM semel_outbox_meta")
    with pytest.raises(ConfigurationError, match="belongs to app 'other'"):
        await outbox.relay(tmp_path).run()
    assert outbox.database.query("SELECT * FROM semel_outbox_meta") == before


@asynchronous
async def test_few_statements_at_a_backlog(outbox: Outbox, tmp_path: Path) -> None:
    await outbox.make_topic()
    count = 3_000
    outbox.write(count, keys=500)
    relay = outbox.relay(tmp_path)
    async with running(relay) as tasks:
        await until(lambda: outbox.left() == 0, beside=tasks)
        assert relay.statements <= 0.1 * count
    await outbox.check()

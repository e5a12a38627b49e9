"""`semel park` from the operator's side: what is listed, and commands that running workers carry out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from semel.app import App
from semel.env import Env
from semel.errors import ConfigurationError
from semel.ops.parking import Item, Request, ask, chosen, groups, open_shelves, rows, wait_for
from semel.processing.engine import Engine
from semel.processing.faults import Fault
from semel.processing.metrics import Metrics
from semel.settings import Settings
from semel.sinks.engine import SinkEngine
from semel.testing import BrokerForTests
from tests.processing.running import feed, prepare, read_all
from tests.sinks import ledger


def item(offset: int, key: str | None, group: str = "", component: str = "shop.a") -> Item:
    lane = offset if key is None else key.encode()
    fault = Fault("ValueError", "bad", "app.py:handle", group, "1") if group else None
    return Item(component, "orders", 0, offset, None if key is None else key.encode(), lane, fault)


ITEMS = [item(1, "k", "g1"), item(2, "k"), item(3, "j", "g2"), item(4, None, "g1"), item(5, "k", "g1", "shop.b")]


@pytest.mark.parametrize(
    ("names", "offsets"),
    [
        ({"ids": ["shop.a:orders-0@3"]}, [3]),
        ({"keys": ["k"]}, [1, 2, 5]),
        ({"keys": ["k"], "component": "a"}, [1, 2]),
        ({"group": ["g1"], "component": "shop.a"}, [1, 2, 4]),
        ({"group": ["g2"], "ids": ["shop.b:orders-0@5"]}, [3, 5]),
        ({"everything": True}, [1, 2, 3, 4, 5]),
    ],
)
def test_records_are_named_by_id_key_or_cause(names: Any, offsets: list[int]) -> None:
    assert [found.offset for found in chosen(ITEMS, **names)] == offsets


def test_nothing_is_done_about_what_is_not_named_or_not_there() -> None:
    with pytest.raises(ConfigurationError, match="Which records"):
        chosen(ITEMS)
    with pytest.raises(ConfigurationError, match=r"shop\.a:orders-0@9"):
        chosen(ITEMS, ids=["shop.a:orders-0@9"])


def test_causes_are_counted_with_everything_that_they_hold_up() -> None:
    found = {(row["component"], row["group"]): (row["keys"], row["records"]) for row in groups(ITEMS)}
    assert found == {("shop.a", "g1"): (2, 3), ("shop.a", "g2"): (1, 1), ("shop.b", "g1"): (1, 1)}
    assert [row["error"] for row in rows(ITEMS)][:2] == ["ValueError", "waits behind an earlier record of its key"]


def test_running_workers_carry_out_commands_in_topic_and_database(semel_broker: BrokerForTests, tmp_path: Path) -> None:
    app = App("parks")
    source = app.topic("parks.in", key=str, value=int, partitions=4)
    target = app.topic("parks.out", key=str, value=int, partitions=1)
    store = app.database(f"sqlite:///{tmp_path}/parks.db", schema=ledger.SCHEMA)
    is_mended = [False]

    @app.processor(source, name="copy")
    def copy(record: Any) -> Any:
        if record.value < 0 and not is_mended[0]:
            raise ValueError(f"cannot do {record.value}")
        yield target.record(record.key, abs(record.value))

    @app.sink(source, store, name="totals")
    def totals(records: Any, db: Any) -> None:
        (ledger.count_all if is_mended[0] else ledger.count)(records, db)

    bootstrap = semel_broker.bootstrap_servers
    settings = Settings(
        kafka=bootstrap, data=tmp_path, instance="test", session_timeout_ms=6_000, commit_interval_ms=20, build="7"
    )

    async def until(condition: Callable[[], Any], what: str) -> None:
        async with asyncio.timeout(60):
            while not await condition():
                await asyncio.sleep(0.05)
        assert what

    async def main() -> None:
        await prepare(bootstrap, app)
        await feed(bootstrap, "parks.in", [("k", 1), ("k", -2), ("k", 3), ("j", 4)])
        engine = Engine(app.components()[0], bootstrap, settings, Env(), Metrics())
        sink = SinkEngine("parks", app.sinks["totals"], bootstrap, settings, Env(), Metrics())
        tasks = [asyncio.create_task(engine.run()), asyncio.create_task(sink.run())]
        async with open_shelves(app, settings) as shelves:

            async def items() -> list[Item]:
                return [found for shelf in shelves for found in await shelf.items()]

            async def all_parked() -> bool:
                return len(await items()) == 4

            await until(all_parked, "two records in the topic and two in the database")
            found = await items()
            assert {(each.component, each.key) for each in found} == {("parks.totals", b"k"), ("copy", b"k")}
            heads = [each for each in found if each.fault is not None]
            assert {(each.fault.build, each.fault.error) for each in heads if each.fault} == {("7", "ValueError")}
            for shelf in shelves:
                [head, _] = await shelf.items()
                record = await shelf.record(head)
                assert record is not None
                assert record.value == b"-2"
            is_mended[0] = True
            asked = await ask(shelves, chosen(found, keys=["k"]), Request("retry", "me"), Env())
            result = await wait_for(asked, 60, Env())
            assert {row["component"]: (row["state"], row["released"], row["failed"]) for row in result} == {
                "parks.totals": ("done", 2, 0),
                "copy": ("done", 2, 0),
            }
            assert await items() == []
        await engine.drain()
        await sink.drain()
        await asyncio.gather(*tasks)
        values = [
            int(record.value or b"") for record in await read_all(bootstrap, "parks.out", 1) if record.key == b"k"
        ]
        assert values == [1, 2, 3], "in order, once"

    asyncio.run(main())
    assert ledger.totals(f"sqlite:///{tmp_path}/parks.db") == {"k": (3, 6), "j": (1, 4)}

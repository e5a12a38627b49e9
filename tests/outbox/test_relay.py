"""The relay against a real broker: what is committed in the database is in Kafka once and in order, and only that."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Address
from tests.outbox.world import Outbox, asynchronous, running, until


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

"""`semel broker --seed-topics`: there at the start, left alone when they are there already."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from semel.broker.broker import Broker
from semel.broker.seed import SeedTopic
from semel.errors import ConfigurationError


def test_topics_are_made_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def start(text: str) -> dict[str, tuple[int, dict[str, str]]]:
        broker = Broker(tmp_path)
        await broker.start()
        try:
            for topic in SeedTopic.parse(text):
                topic.create(broker.node.topics)
            return {
                topic.info.name: (len(topic.partitions), dict(topic.info.configs))
                for topic in broker.node.topics
                if not topic.info.name.startswith("__")
            }
        finally:
            await broker.stop()

    first = asyncio.run(start("orders:3, prices:1:compact,events"))
    assert first == {"orders": (3, {}), "prices": (1, {"cleanup.policy": "compact"}), "events": (4, {})}
    assert asyncio.run(start("orders:5,prices")) == first
    assert "orders has 3 partitions, not 5: it is left as it is" in caplog.text


@pytest.mark.parametrize("text", ["orders:x", ":3", "orders:1:squash", "orders:1:compact:2"])
def test_what_cannot_be_read_is_named(text: str) -> None:
    with pytest.raises(ConfigurationError, match="NAME:PARTITIONS"):
        SeedTopic.parse(text)


def test_what_cannot_be_made_is_named(tmp_path: Path) -> None:
    async def start() -> None:
        broker = Broker(tmp_path)
        await broker.start()
        try:
            SeedTopic("no spaces").create(broker.node.topics)
        finally:
            await broker.stop()

    with pytest.raises(ConfigurationError, match=r"--seed-topics: Topic name 'no spaces' is illegal"):
        asyncio.run(start())

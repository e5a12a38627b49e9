"""Outputs are compressed as their topics say, and read by everybody."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from semel.app import App
from semel.errors import ConfigurationError
from semel.prove.check.scan import scan_logs
from semel.wire import compression
from semel.wire.compression import CODECS
from tests.conftest import Address
from tests.processing.running import PARTITIONS, drained, engine_for, feed, prepare, read_all, while_running
from tests.processing.test_engine_kafka import items_of, new_name


def test_outputs_are_written_as_their_topics_say(embedded: Address, tmp_path: Path) -> None:
    name, bootstrap = new_name(), embedded.bootstrap
    app = App(name)
    source = app.topic(f"{name}.in", key=str, value=int, partitions=PARTITIONS)
    targets = {
        codec: app.topic(f"{name}.{codec}", key=str, value=str, partitions=2, compression=codec)  # type: ignore[arg-type]
        for codec in CODECS
    }

    @app.processor(source)
    def count(record: Any) -> Any:
        for target in targets.values():
            yield target.record(record.key, f"{record.value} {'x' * 500}")

    items = items_of(80, seed=2)

    async def run() -> tuple[dict[str, list[Any]], list[Any]]:
        await prepare(bootstrap, app)
        await feed(bootstrap, f"{name}.in", items)
        await while_running([engine_for(bootstrap, app)], lambda: drained(bootstrap, f"{name}.count", f"{name}.in"))
        read = {codec: await read_all(bootstrap, target.name, 2) for codec, target in targets.items()}
        return read, await scan_logs(bootstrap, [target.name for target in targets.values()], tmp_path, settings={})

    read, logs = asyncio.run(run())
    wanted = sorted(f"{value} {'x' * 500}".encode() for _, value in items)
    for codec in CODECS:
        assert sorted(record.value for record in read[codec]) == wanted
    for log in logs:
        codec = log.topic.rpartition(".")[2]
        batches = [batch for batch in log.batches() if not batch.header.is_control]
        assert {CODECS[batch.header.codec] for batch in batches} == {codec}
        size = sum(batch.header.batch_length for batch in batches)
        records = sum(batch.header.record_count for batch in batches)
        assert (size < 500 * records) == (codec != "none"), (codec, size, records)


def test_a_codec_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="compressed with none, gzip, snappy, lz4, zstd"):
        App("a").topic("out", value=int, compression="brotli")  # type: ignore[arg-type]


def test_a_codec_whose_package_is_not_there_is_refused_when_it_is_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    compression._cramjam.cache_clear()
    monkeypatch.setitem(sys.modules, "cramjam", None)
    with pytest.raises(ConfigurationError, match=r"semel\[compression\]"):
        App("a").topic("out", value=int, compression="zstd")
    App("a").topic("out", value=int, compression="gzip")
    compression._cramjam.cache_clear()

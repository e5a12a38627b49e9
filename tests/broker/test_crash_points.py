"""kill -9 at every write to any log, before it, in its middle and after it: the broker opens, with all or nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from semel.broker.config import BrokerConfig
from semel.disk import disk
from tests.broker.core import Core
from tests.broker.test_transactions import Writer, committed_values, offset_of

TOPICS = ("a", "b", "c")


class _Images:
    """Copies of the data directory at every write; each with what had been acknowledged by then."""

    def __init__(self, data: Path, into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: list[tuple[Path, int, int]] = []
        self.decided = 0
        self.begun = 0
        self._data = data
        self._into = into
        self._pwrite = disk.pwrite
        monkeypatch.setattr(disk, "pwrite", self._write)

    def take(self) -> None:
        copy = self._into / str(len(self.found))
        shutil.copytree(self._data, copy)
        self.found.append((copy, self.decided, self.begun))

    def _write(self, file: int, data: Any, position: int) -> int:
        self.take()
        self._pwrite(file, bytes(data)[: len(data) // 2], position)
        self.take()
        written = self._pwrite(file, data, position)
        self.take()
        return written


@pytest.mark.parametrize(
    ("snapshots", "version"),
    [(1, 1), (10_000, 2), pytest.param(1, 2, marks=pytest.mark.soak), pytest.param(10_000, 1, marks=pytest.mark.soak)],
)
def test_a_kill_at_every_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, snapshots: int) -> None:
    monkeypatch.setattr("semel.log.log.SNAPSHOT_BATCHES", snapshots)
    config = BrokerConfig(transaction_version=version, segment_bytes=400)
    (tmp_path / "data").mkdir()
    core = Core(tmp_path / "data", config)
    for topic in TOPICS:
        core.create(topic)
    writer = Writer(core, "w", version)
    with monkeypatch.context() as patch:
        images = _Images(core.data, tmp_path, patch)
        for number in range(3):
            images.begun = number + 1
            for topic in TOPICS:
                assert writer.write(topic, b"%d" % number) == 0
            assert writer.commit_offset("g", "a", number + 1) == 0
            assert writer.end(number != 1) == 0
            images.decided = number + 1
    assert len(images.found) > 60
    committed = {0: [], 1: [b"0"], 2: [b"0"], 3: [b"0", b"2"]}
    for data, decided, begun in images.found:
        again = Core(data, config)
        values = {topic: committed_values(again, topic) for topic in TOPICS}
        offset = offset_of(again, "g", "a")
        if offset[0]:  # The transaction is still open: its writer may come back. A new owner ends it.
            assert again.init("w").error_code == 0
            offset = offset_of(again, "g", "a")
        outcomes = [committed[decided], committed[begun]]
        assert values["a"] in outcomes
        assert values == dict.fromkeys(TOPICS, values["a"]), f"{data.name}: a part of a transaction is there"
        assert offset == (0, {0: -1, 1: 1, 2: 3}[len(values["a"])]), f"{data.name}: offsets and records differ"
        owner = Writer(again, "w", version)
        for topic in TOPICS:
            assert owner.write(topic, b"next") == 0
        assert owner.end(True) == 0
        assert all(committed_values(again, topic) == [*values[topic], b"next"] for topic in TOPICS)
        again.node.close()

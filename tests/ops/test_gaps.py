"""semel accept-gap: what stands still for missing records goes on when an operator says so, and not otherwise."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from semel.app import App
from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.env import Env
from semel.errors import ConfigurationError
from semel.ops.audit import audit_topic
from semel.ops.cli import main
from semel.ops.gaps import accept_gaps
from semel.processing.watermarks import Watermarks
from semel.settings import Settings
from semel.sinks.contract import Claim, Stop, StopReason
from semel.sinks.sql import SqlSink
from semel.types import GroupMetadata, TopicPartition
from tests.conftest import Address
from tests.processing.running import engine_for, feed, read_all, while_running
from tests.processing.test_engine_kafka import items_of, new_name

PARTITIONS = 4


def app_of(name: str, folder: Path) -> App:
    app = App(name)
    source = app.topic(f"{name}.in", key=str, value=int, partitions=PARTITIONS)
    app.processor(source, name="count")(lambda record: None)
    app.sink(source, app.database(f"sqlite:///{folder}/x.db"), name="rows")(lambda records, db: None)
    return app


class Scene:
    """A topic with records, a processor and a sink that stand at offset 0 of it, and a host's folder."""

    def __init__(self, bootstrap: str, folder: Path) -> None:
        self.name = new_name()
        self.topic = f"{self.name}.in"
        self.app = app_of(self.name, folder)
        self.settings = Settings(kafka=bootstrap, data=folder)
        self.client = KafkaClient(bootstrap)
        self.admin = Admin(self.client)
        self.places = [TopicPartition(self.topic, number) for number in range(PARTITIONS)]

    async def begin(self) -> None:
        await self.client.start()
        parks = [component.parks[self.topic] for component in self.app.components()]
        await self.admin.create_topics({topic: TopicSpec(PARTITIONS) for topic in (self.topic, *parks)})
        await feed(self.settings.kafka, self.topic, items_of(60, seed=1))
        await self.admin.commit_offsets(GroupMetadata(f"{self.name}.count"), dict.fromkeys(self.places, 0))
        watermarks = Watermarks(self.settings.data, "worker-0")
        async with watermarks.written():
            for at in self.places:
                watermarks.note(f"{self.name}.count", await self.identity(), at.partition, 0)
        assert await self.sink() == dict.fromkeys(self.places, 0)

    async def identity(self) -> str:
        await self.client.refresh_metadata(self.topic)
        topic = await self.client.topic(self.topic)
        return f"{self.client.cluster_id}/{self.topic}/{topic.topic_id}"

    async def sink(self) -> dict[TopicPartition, int | Stop]:
        """Where the sink would go on."""
        await self.client.refresh_metadata(self.topic)
        topic = await self.client.topic(self.topic)
        starts = await self.admin.list_offsets(self.places, at="earliest")
        spec = self.app.sinks["rows"]
        sink = SqlSink(spec, f"{self.name}.rows", self.client.cluster_id, env=Env(), create_tables=True)
        sink.open()
        try:
            return sink.take_over([Claim(at, topic.topic_id, starts[at]) for at in self.places])
        finally:
            sink.close()

    async def committed(self) -> dict[TopicPartition, int]:
        found = await self.admin.committed_offsets(f"{self.name}.count", self.places, require_stable=True)
        return dict(found)

    async def accept(self, **changes: Any) -> list[dict[str, Any]]:
        given: dict[str, Any] = {"component": "", "partitions": (), "reason": "backups are gone", "dry_run": False}
        return await accept_gaps(self.app, self.settings, **(given | changes))

    async def audit(self) -> list[dict[str, Any]]:
        records = await read_all(self.settings.kafka, audit_topic(self.name), 1)
        return [json.loads(record.value or b"") for record in records]


def played(bootstrap: str, folder: Path, play: Any) -> None:
    async def run() -> None:
        scene = Scene(bootstrap, folder)
        try:
            await scene.begin()
            await play(scene)
        finally:
            await scene.client.close()

    asyncio.run(run())


def test_deleted_records_are_skipped_when_somebody_says_why_and_not_before(embedded: Address, tmp_path: Path) -> None:
    async def play(scene: Scene) -> None:
        gone = scene.places[0]
        assert await scene.accept() == [], "nothing stands still"
        starts = await scene.admin.delete_records({gone: 5})
        assert starts[gone] == 5
        with pytest.raises(ConfigurationError, match="--reason"):
            await scene.accept(reason="")
        with pytest.raises(ConfigurationError, match="nothing stands still"):
            await scene.accept(partitions=(str(scene.places[1]),))
        shown = await scene.accept(dry_run=True, reason="")
        wanted = [(name, "DATA_GAP", 0, 5, 5, "would go on") for name in ("count", "rows")]
        assert [
            tuple(row[key] for key in ("component", "problem", "was", "now", "skipped", "outcome")) for row in shown
        ] == wanted
        assert (await scene.committed())[gone] == 0
        assert (await scene.sink())[gone] == 0

        done = await scene.accept()
        assert [row["outcome"] for row in done] == ["goes on", "goes on"]
        assert await scene.committed() == {at: 5 if at == gone else 0 for at in scene.places}
        assert await scene.sink() == {at: 5 if at == gone else 0 for at in scene.places}
        told = await scene.audit()
        assert [item["state"] for item in told] == ["asked", "done"] * 2
        assert {item["reason"] for item in told} == {"backups are gone"}
        assert told[0]["gap"]["skipped"] == 5
        assert told[0]["by"]
        assert await scene.accept() == [], "nothing is left to accept"

    played(embedded.bootstrap, tmp_path, play)


def test_a_topic_that_was_made_again_is_read_from_its_start(embedded: Address, tmp_path: Path) -> None:
    async def play(scene: Scene) -> None:
        await scene.admin.delete_topics([scene.topic])
        await scene.admin.create_topics({scene.topic: TopicSpec(PARTITIONS)})
        stops = await scene.sink()
        assert {item.reason for item in stops.values() if isinstance(item, Stop)} == {StopReason.TOPIC_RECREATED}
        group, identity = f"{scene.name}.count", await scene.identity()
        assert "TOPIC_RECREATED" in Watermarks(scene.settings.data).recreated(group, identity)
        done = await scene.accept()
        assert [(row["problem"], row["outcome"]) for row in done] == [("TOPIC_RECREATED", "goes on")] * 2 * PARTITIONS
        assert Watermarks(scene.settings.data).recreated(group, identity) == ""
        assert await scene.sink() == dict.fromkeys(scene.places, 0)
        assert await scene.committed() == dict.fromkeys(scene.places, 0)

    played(embedded.bootstrap, tmp_path, play)


def test_nothing_is_changed_under_workers_that_run(embedded: Address, tmp_path: Path) -> None:
    async def play(scene: Scene) -> None:
        def away(record: Any) -> None:
            raise ConnectionError("so its position stays where it is")

        group = f"{scene.name}.count"
        scene.app.processors["count"] = replace(scene.app.processors["count"], handler=away)

        async def body() -> None:
            async with asyncio.timeout(60):
                while (group, "Stable") not in {(item[0], item[2]) for item in await scene.admin.list_groups()}:
                    await asyncio.sleep(0.05)
            await scene.admin.delete_records(dict.fromkeys(scene.places, 1))
            with pytest.raises(ConfigurationError, match="stop the workers"):
                await scene.accept()
            assert set((await scene.sink()).values()) == {0}

        await while_running([engine_for(scene.settings.kafka, scene.app)], body)

    played(embedded.bootstrap, tmp_path, play)


def test_the_command_says_what_it_would_do(embedded: Address, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(scene: Scene) -> None:
        await scene.admin.delete_records({scene.places[2]: 3})
        monkeypatch.setattr("semel.ops.loading.load_app", lambda name: scene.app)
        monkeypatch.setenv("SEMEL_DATA", str(scene.settings.data))
        command = ["accept-gap", "x:app", "--kafka", scene.settings.kafka]
        shown = await asyncio.to_thread(CliRunner().invoke, main, [*command, "--dry-run", "--format", "json"])
        assert shown.exit_code == 0, shown.output
        assert [row["now"] for row in json.loads(shown.output)] == [3, 3]
        refused = await asyncio.to_thread(CliRunner().invoke, main, command)
        assert refused.exit_code == 2
        done = await asyncio.to_thread(CliRunner().invoke, main, [*command, "--reason", "old", "--component", "rows"])
        assert done.exit_code == 0, done.output
        assert (await scene.sink())[scene.places[2]] == 3
        assert (await scene.committed())[scene.places[2]] == 0

    played(embedded.bootstrap, tmp_path, play)

"""The readers must give the checker what is really there, on both kinds of broker and database."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.client.producer import TransactionalProducer
from semel.databases import connect
from semel.prove.check import Evidence, Log, Position, check
from semel.prove.check.bodies import bodies, entries_of
from semel.prove.check.ledgers import read_ledger, read_parked, read_prepared, read_sink_positions
from semel.prove.check.scan import Consumer, open_scan, read_in_doubt, read_positions, scan_logs
from semel.sinks.sql import migrate
from semel.types import GroupMetadata, TopicPartition
from semel.wire.records import BatchBuilder, decode_records, empty_batch, rewrite_batch
from tests.moment import NOW_MS
from tests.prove.histories import RESPONSES, World


def batch(*values: bytes, proof: str = "") -> BatchBuilder:
    builder = BatchBuilder()
    for value in values:
        builder.append(b"k", value, NOW_MS, (("semel-proof", proof.encode()),) if proof else ())
    return builder


@pytest.mark.parametrize("broker", ["embedded", "kafka"])
def test_a_scan_has_every_batch_with_its_header_and_every_marker(
    broker: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    address = request.getfixturevalue(broker)
    topic = f"scan-{uuid.uuid4().hex[:8]}"

    async def run() -> tuple[list[Log], list[Position], list[Any]]:
        async with KafkaClient(address.bootstrap) as client:
            admin = Admin(client)
            compacted = TopicSpec(1, {"cleanup.policy": "compact"})
            await admin.create_topics({topic: TopicSpec(2), f"{topic}-state": compacted})
            producer = TransactionalProducer(client, f"id-{topic}")
            await producer.init_transactions()
            for number in range(12):
                producer.begin()
                for part in (0, 1):
                    await producer.produce(topic, part, batch(*[b"x" * 40_000] * 10, proof=f"a-{number}"))
                await producer.produce(f"{topic}-state", 0, batch(b"s"))
                await producer.send_offsets({TopicPartition(topic, 0): number + 1}, GroupMetadata(f"group-{topic}"))
                await producer.flush()  # An abort leaves out what was not sent yet.
                await producer.end_transaction(number % 3 != 2)
            logs = await scan_logs(address.bootstrap, [topic, f"{topic}-state"], tmp_path, settings={})
            consumer = Consumer("c", f"group-{topic}", [topic])
            positions = await read_positions(address.bootstrap, [consumer], settings={})
            doubts = await read_in_doubt(address.bootstrap, f"id-{topic}", settings={})
            producer.begin()
            await producer.produce(topic, 1, batch(b"open"))
            await producer.flush()
            doubts += await read_in_doubt(address.bootstrap, f"id-{topic}", settings={})
            unsettled = await scan_logs(address.bootstrap, [topic], tmp_path / "open", settle=0.1, settings={})
            await producer.end_transaction(False)
            await producer.close()
        assert check(Evidence(events=list, logs=unsettled, changelogs=frozenset())).counts["L15"] == 1
        return logs, positions, doubts

    logs, positions, doubts = asyncio.run(run())
    assert [(log.topic, log.partition, log.is_compacted) for log in logs] == [
        (topic, 0, False),
        (topic, 1, False),
        (f"{topic}-state", 0, True),
    ]
    for log in logs[:2]:
        assert (log.start, log.end, log.stable) == (0, 12 * 11, 12 * 11)
        found = list(entries_of(log))
        ends = [commits for _, _, commits in found if commits is not None]
        assert ends == [number % 3 != 2 for number in range(12)]
        offsets = [entry[0].header.base_offset for entry in found]
        assert offsets == sorted(set(offsets))
        data = [entry for entry in found if entry[2] is None]
        assert sum(len(proofs) for _, proofs, _ in data) == 120
        assert all(entry[0].header.is_transactional and entry[0].header.producer_id >= 0 for entry in found)
        assert {proof for _, proofs, _ in data for proof in proofs} == {b"a-%d" % number for number in range(12)}
        assert all(body[1] == b"x" * 40_000 for entry in data for body in bodies(entry[0]))
    assert [str(log) for log in open_scan(tmp_path)] == [str(log) for log in logs]
    assert positions == [Position("c", topic, 0, 11), Position("c", topic, 1, 0)]
    assert [item.state for item in doubts] == ["Ongoing"]
    findings = check(Evidence(events=list, logs=logs))
    assert set(findings.counts) == {"E3"}, (
        "nobody's history names these records, and nothing else is wrong with the logs"
    )


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def test_what_sinks_left_is_read_whole_and_in_order(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path}/x.db" if kind == "sqlite" else request.getfixturevalue("postgres").new_database()
    assert list(read_ledger(url)) == []
    assert read_sink_positions(url) == []
    assert read_parked(url) == []
    migrate(url, audit=True)
    monkeypatch.setattr("semel.prove.check.ledgers.ROWS_AT_ONCE", 7)
    database = connect(url)
    database.begin()
    for number in range(20):
        database.execute(
            "INSERT INTO semel_audit (sink, topic, part, owner_epoch, attempt, offsets) VALUES (?, ?, ?, ?, ?, ?)",
            ("s", "t", number % 2, 3, f"a-{number}", f"[{number},{number + 1}]"),
        )
    database.execute(
        "INSERT INTO semel_position (sink, cluster_id, topic_id, topic, part, next_offset, owner_epoch, owner, "
        "applied) VALUES ('s', 'c', 'i', 't', 1, 2147483648123, 3, 'o', 9)"
    )
    database.execute(
        "INSERT INTO semel_parked (sink, cluster_id, topic_id, topic, part, record_offset, record_timestamp, headers, "
        "parked_at) VALUES ('s', 'c', 'i', 't', 1, 77, 0, '[]', 0)"
    )
    database.commit()
    database.close()
    assert [(row.attempt, row.partition, list(row.offsets)) for row in read_ledger(url)] == [
        (f"a-{number}", number % 2, [number, number + 1]) for number in range(20)
    ]
    begin = {("s", TopicPartition("t", 1)): 5}
    assert read_sink_positions(url, begin) == [Position("s", "t", 1, 2147483648123, 5, True)]
    assert [tuple(row) for row in read_parked(url)] == [("s", "t", 1, 77)]
    assert read_prepared(url) == []


# --- What retention and compaction took ---


def test_outputs_that_retention_took_are_not_called_lost() -> None:
    for seed in range(20):
        world = World(f"cut:{seed}").run(200)
        evidence = world.evidence()
        log = world.logs[RESPONSES, 0]
        if log.end < 6:
            continue
        start = log.end // 2
        chunks = [chunk for chunk in log.chunks if last_offset(chunk) >= start]
        logs = [
            replace(item, start=start, chunks=lambda chunks=chunks: chunks) if item.topic == RESPONSES else item
            for item in evidence.logs
        ]
        findings = check(replace(evidence, logs=logs))
        assert findings.clean, findings.summary()
        assert any("could not be judged" in note for note in findings.notes)


def test_records_that_compaction_took_are_not_called_lost() -> None:
    looked_at = 0
    for seed in range(20):
        world = World(f"compact:{seed}").run(200)
        evidence = world.evidence()
        log = world.logs["enriched", 0]
        chunks = [compacted(chunk) if number % 3 == 1 else chunk for number, chunk in enumerate(log.chunks)]
        looked_at += chunks != log.chunks
        logs = [
            replace(item, is_compacted=True, chunks=lambda chunks=chunks: chunks)
            if (item.topic, item.partition) == ("enriched", 0)
            else item
            for item in evidence.logs
        ]
        events = [event for event in world.events if type(event).__name__ != "Read"]
        findings = check(replace(evidence, logs=logs, events=lambda events=events: events))
        assert findings.clean, (seed, findings.summary())
    assert looked_at > 10


def last_offset(chunk: bytes) -> int:
    from semel.wire.records import read_header

    return read_header(chunk).last_offset


def compacted(chunk: bytes) -> bytes:
    """Without its last record, or without any; a marker stays."""
    from semel.wire.records import read_header

    header = read_header(chunk)
    if header.is_control:
        return chunk
    records = decode_records(chunk, 0, header, "", 0)[:-1]
    return bytes(rewrite_batch(header, records) if records else empty_batch(header))


def test_a_rest_that_is_no_batch_is_a_damaged_log() -> None:
    world = World("rest").run(100)
    evidence = world.evidence()
    logs = [
        replace(log, chunks=lambda log=log: [*log.chunks(), b"\0" * 70]) if log.topic == "orders" else log
        for log in evidence.logs
    ]
    findings = check(replace(evidence, logs=logs))
    assert set(findings.counts) == {"L16"}

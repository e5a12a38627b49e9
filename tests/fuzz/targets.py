"""What is fuzzed: everything that reads bytes of a client, of a broker, or of a file that was not closed in order."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple
from uuid import UUID

from crc32c import crc32c

from semel.broker.apis import APIS
from semel.broker.apis.hotpath import read_produce_request
from semel.broker.metadata import MetadataStore, TopicInfo
from semel.client.describe import decode_described
from semel.coordinator.group_log import decode_group, decode_key, decode_offset, encode_group_key, encode_offset_key
from semel.coordinator.transaction_log import decode_transaction, decode_transactional_id
from semel.disk import disk
from semel.errors import ConfigurationError, CorruptBatch, ProtocolError
from semel.log.log import LogConfig, LogError, PartitionLog
from semel.log.validation import validate
from semel.types import TopicPartition
from semel.wire.compression import compress, decompress
from semel.wire.frames import FrameReader
from semel.wire.messages import decode_request, decode_request_header, decode_response, encode_request, is_flexible
from semel.wire.records import BatchBuilder, control_batch, decode_records, iter_batches, read_control
from tests.fuzz.broker import LiveNode
from tests.wire.random_messages import random_message

__all__ = ["TARGETS", "Target"]

NOW_MS = 1_750_000_000_000
TOPIC_ID = UUID(int=7)
MAX_DECOMPRESSED = 1 << 20


class Target(NamedTuple):
    """`run` takes any bytes, and may raise `refusals` and nothing else. `share` of all executions are its own."""

    name: str
    run: Callable[[bytes], None]
    refusals: tuple[type[Exception], ...]
    seeds: Callable[[], list[bytes]]
    share: int


# --- Messages ---


def _frames(data: bytes) -> None:
    reader = FrameReader(1 << 16)
    half = len(data) // 2
    frames = reader.receive_data(data[:half]) + reader.receive_data(data[half:])
    assert sum(4 + len(frame) for frame in frames) <= len(data)


def _encoded(entity: Any, rng: Random) -> bytes:
    from io import BytesIO

    from kio.serial import entity_writer

    buffer = BytesIO()
    entity_writer(entity)(buffer, random_message(entity, rng))
    return buffer.getvalue()


@functools.cache
def _messages(kind: str) -> list[bytes]:
    """A request or response of every API and version that is served, as a frame without its length."""
    from semel.wire.messages import _entity

    rng = Random(1)
    found = []
    for api in APIS.values():
        for version in range(api.min_version, api.max_version + 1):
            body = _encoded(_entity(api.key, version, kind), rng)  # type: ignore[arg-type]
            flexible = is_flexible(api.key, version)
            ids = api.key.to_bytes(2, "big") + version.to_bytes(2, "big") + b"\0\0\0\7"
            if kind == "request":
                found.append(ids + b"\0\4fuzz" + (b"\0" if flexible else b"") + body)
            else:
                found.append(ids[:4] + b"\0\0\0\7" + (b"\0" if flexible and api.key != 18 else b"") + body)
    return found


def _requests(data: bytes) -> None:
    decode_request(decode_request_header(data), data)


def _responses(data: bytes) -> None:
    """The first four bytes say what was asked; the rest is the answer."""
    if len(data) < 8:
        return
    key, version = int.from_bytes(data[:2], "big"), int.from_bytes(data[2:4], "big")
    if key == 65:
        decode_described(data[4:])
    decode_response(key, version, data[4:])


def _produce_requests() -> list[bytes]:
    batch = BatchBuilder()
    batch.append(b"k", b"v", NOW_MS)
    parts = [{"index": 0, "records": batch.build()}, {"index": 1, "records": None}]
    found = []
    for version in range(3, 14):
        key = {"topic_id": TOPIC_ID} if version >= 13 else {"name": "orders"}
        frame = encode_request(
            0, version, 7, "f", transactional_id="t", acks=-1, timeout=1, topic_data=[key | {"partition_data": parts}]
        )
        header = decode_request_header(frame[4:])
        found.append(bytes([version]) + frame[4 + header.body :])
    return found


def _produce(data: bytes) -> None:
    if data:
        read_produce_request(memoryview(data), 1, 3 + data[0] % 11)


# --- Record batches ---


def _batch(codec: int, **ids: Any) -> bytes:
    builder = BatchBuilder(codec)
    for number in range(3):
        builder.append(b"key" if number else None, b"value" * 20, NOW_MS + number, (("h", b"1"), ("n", None)))
    return builder.build(**ids)


def _batch_seeds() -> list[bytes]:
    marker = control_batch(producer_id=5, producer_epoch=1, commit=True, coordinator_epoch=0, timestamp_ms=NOW_MS)
    transactional = _batch(0, producer_id=5, producer_epoch=1, base_sequence=0, transactional=True)
    return [*(_batch(codec) for codec in range(5)), transactional, marker, _batch(0) + _batch(4)]


def _batches(data: bytes) -> None:
    """Once as they are, which the checksum refuses, and once with a right checksum, so that the rest is looked at."""
    sealed = bytearray(data)
    for at, header in iter_batches(sealed):
        sealed[at + 17 : at + 21] = crc32c(memoryview(sealed)[at + 21 : at + header.size]).to_bytes(4, "big")
    for config in (LogConfig(), LogConfig(cleanup_policy="compact", timestamp_type="LogAppendTime")):
        for batch in (bytearray(data), bytearray(sealed)):
            try:
                validate(batch, config, NOW_MS)
            except LogError:
                continue
    for at, header in iter_batches(data):
        if header.is_control:
            read_control(data, at, header)
        records = decode_records(data, at, header, "t", 0, MAX_DECOMPRESSED)
        assert len(records) == header.record_count


def _compression_seeds() -> list[bytes]:
    plain = b"value" * 3000
    bombs = [bytes([codec]) + compress(codec, bytes(1 << 22)) for codec in range(1, 5)]
    return [bytes([codec]) + compress(codec, plain) for codec in range(1, 5)] + bombs


def _compression(data: bytes) -> None:
    if data:
        codec = 1 + data[0] % 4 if data[0] > 4 or not data[0] else data[0]
        assert len(decompress(codec, data[1:], MAX_DECOMPRESSED)) <= MAX_DECOMPRESSED


# --- A broker that goes on ---


@functools.cache
def _live() -> LiveNode:
    return LiveNode()


def _node(data: bytes) -> None:
    _live().handle(data)


def _node_seeds() -> list[bytes]:
    return _live().seeds() + _messages("request")


# --- Files ---


def _folder() -> Path:
    """Where files are written, in memory where that is possible."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="semel-fuzz-", dir=memory if memory.is_dir() else None))


@functools.cache
def _log_folder() -> Path:
    return _folder()


@functools.cache
def _log_files() -> list[tuple[str, bytes]]:
    """Every file of a log with snapshots, indexes and a moved start, by name."""
    directory = _folder() / "t-0"
    log = PartitionLog.open(directory, "t", 0, TOPIC_ID, LogConfig(segment_bytes=400), NOW_MS)
    for sequence in range(6):
        ids = {"producer_id": 5, "producer_epoch": 1, "base_sequence": sequence * 3}
        log.append(bytearray(_batch(sequence % 5, transactional=True, **ids)), NOW_MS)
    log.append_marker(5, 1, False, 0, NOW_MS)
    log.delete_before(2)
    log.close()
    found = [(path.name, path.read_bytes()) for path in sorted(directory.iterdir()) if path.is_file()]
    shutil.rmtree(directory.parent)
    return found


def _log_seeds() -> list[bytes]:
    """The first byte says which file the rest stands in for."""
    return [bytes([number]) + content for number, (_, content) in enumerate(_log_files())]


def _log(data: bytes) -> None:
    """One file of a log is anything: the log opens, or says what is wrong; what opened takes a batch and reads."""
    files = _log_files()
    chosen = data[0] % len(files) if data else 0
    directory = _log_folder() / "t-0"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for number, (name, content) in enumerate(files):
        (directory / name).write_bytes(data[1:] if number == chosen else content)
    log = PartitionLog.open(directory, "t", 0, TOPIC_ID, LogConfig(segment_bytes=400), NOW_MS)
    try:
        placed = log.append(bytearray(_batch(0)), NOW_MS)
        read = log.read_bytes(placed.base_offset, 1 << 20, log.high_watermark)
        assert next(iter_batches(read))[1].base_offset == placed.base_offset
        for offset in (log.log_start_offset, log.log_end_offset // 2):
            if log.log_start_offset <= offset <= log.log_end_offset:
                log.read_bytes(offset, 1 << 20, log.high_watermark)
    finally:
        log.close()


@functools.cache
def _metadata_path() -> Path:
    return _folder() / "metadata.log"


def _metadata_seeds() -> list[bytes]:
    path = _metadata_path()
    path.unlink(missing_ok=True)
    store = MetadataStore(path, "cluster")
    store.put_topic(TopicInfo("orders", TOPIC_ID, 3, {"cleanup.policy": "compact"}))
    store.new_producer_id()
    store.close()
    return [disk.read(path)]


def _metadata(data: bytes) -> None:
    """With right checksums too: what a line says is looked at behind its checksum."""
    import zlib

    sealed = b"\n".join(b"%08x %b" % (zlib.crc32(line[9:]), line[9:]) for line in data.split(b"\n"))
    for content in (data, sealed):
        path = _metadata_path()
        path.write_bytes(content)
        try:
            MetadataStore(path, "cluster").close()
        except ConfigurationError:
            continue


def _coordinator_seeds() -> list[bytes]:
    from semel.coordinator.group_log import StoredGroup, encode_group, encode_offset
    from semel.coordinator.offsets import CommittedOffset
    from semel.coordinator.transaction import TransactionMetadata
    from semel.coordinator.transaction_log import encode_transaction

    partition = TopicPartition("orders", 0)
    transaction = encode_transaction(TransactionMetadata("t", 5, 1, 60_000))
    pairs: list[tuple[bytes, bytes | None]] = [transaction]
    pairs.append(encode_offset("g", partition, CommittedOffset(3, 0, "m", NOW_MS)))
    pairs.append(encode_group(StoredGroup("g", "consumer", 1, "range", None, NOW_MS, ())))
    pairs += [(encode_offset_key("g", partition), b""), (encode_group_key("g"), b"")]
    return [len(key).to_bytes(2, "big") + key + (value or b"") for key, value in pairs]


def _coordinators(data: bytes) -> None:
    """A key and a value, for every reader of the coordinators' logs."""
    size = int.from_bytes(data[:2], "big")
    key, value = data[2 : 2 + size], data[2 + size :]
    readers: Sequence[Callable[[], object]] = (
        lambda: decode_transactional_id(key),
        lambda: decode_transaction(key, value),
        lambda: decode_key(key),
        lambda: decode_offset(value),
        lambda: decode_group("g", value),
    )
    for read in readers:
        try:
            read()
        except CorruptBatch:
            continue


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("frames", _frames, (ProtocolError,), lambda: [b"\0\0\0\3abc\0\0\0\0\0\0\0\1x"], 4),
        Target("requests", _requests, (ProtocolError,), lambda: _messages("request"), 24),
        Target("responses", _responses, (ProtocolError,), lambda: _messages("response"), 16),
        Target("produce", _produce, (ProtocolError,), _produce_requests, 8),
        Target("batches", _batches, (CorruptBatch, ConfigurationError), _batch_seeds, 16),
        Target("compression", _compression, (CorruptBatch,), _compression_seeds, 10),
        Target("node", _node, (ProtocolError,), _node_seeds, 14),
        Target("log", _log, (LogError,), _log_seeds, 2),
        Target("metadata", _metadata, (), _metadata_seeds, 2),
        Target("coordinators", _coordinators, (), _coordinator_seeds, 4),
    )
}
"""Shares are of a hundred."""
assert sum(target.share for target in TARGETS.values()) == 100

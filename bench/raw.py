"""A client of raw sockets and requests made beforehand: it costs so little that the broker is the limit."""

from __future__ import annotations

import multiprocessing
import os
import socket
import struct
import threading
import time
from typing import Any

from semel.wire.messages import decode_response, encode_request
from semel.wire.records import BatchBuilder

__all__ = ["consume", "fairness", "idle_connections", "produce", "small_produce", "synced_produce", "wide_fetch"]

PARTITIONS = 4
RECORD_BYTES = 1024
BATCH_RECORDS = 1000
IN_FLIGHT = 5
FETCH_BYTES = 1 << 20


class Wire:
    """One connection; `exactly` reads into one buffer that is used again and again."""

    def __init__(self, bootstrap: str) -> None:
        host, _, port = bootstrap.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), 30)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._memory = bytearray(4096)

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def exactly(self, size: int) -> memoryview:
        if size > len(self._memory):
            self._memory = bytearray(size)
        view, at = memoryview(self._memory), 0
        while at < size:
            got = self.socket.recv_into(view[at:size])
            if not got:
                raise ConnectionError("the broker closed the connection")
            at += got
        return view[:size]

    def frame(self) -> memoryview:
        return self.exactly(int.from_bytes(self.exactly(4), "big"))

    def ask(self, key: int, version: int, /, **fields: Any) -> Any:
        self.socket.sendall(encode_request(key, version, 1, "bench", **fields))
        return decode_response(key, version, bytes(self.frame()))


def produce_request(topic: str, partition: int, records: int, size: int) -> bytes:
    """One Produce v8 request with one batch."""
    builder = BatchBuilder()
    now_ms = time.time_ns() // 1_000_000
    for number in range(records):
        builder.append(b"key-%06d" % number, os.urandom(8) * (size // 8), now_ms)
    data = {"index": partition, "records": builder.build()}
    topics = [{"name": topic, "partition_data": [data]}]
    return encode_request(0, 8, 1, "bench", transactional_id=None, acks=-1, timeout=30_000, topic_data=topics)


def _check_produced(frame: memoryview) -> None:
    """Only what a benchmark needs to trust its figure: the error code of the one partition."""
    name_length = int.from_bytes(frame[8:10], "big")
    error = int.from_bytes(frame[10 + name_length + 8 : 10 + name_length + 10], "big")
    if error:
        raise RuntimeError(f"Produce was answered with error {error}")


def _until_produced(wire: Wire, request: bytes) -> None:
    """Kafka answers CreateTopics before a thousand partitions have their leader."""
    deadline = time.monotonic() + 30
    while True:
        wire.socket.sendall(request)
        try:
            return _check_produced(wire.frame())
        except RuntimeError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _pipelined(wire: Wire, requests: list[bytes], count: int) -> None:
    """Send `count` requests in turn with five in flight. A thread sends, so that answers are read meanwhile."""
    room = threading.Semaphore(IN_FLIGHT)

    def send() -> None:
        for number in range(count):
            room.acquire()
            wire.socket.sendall(requests[number % len(requests)])

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    for _ in range(count):
        _check_produced(wire.frame())
        room.release()
    sender.join()


def produce(bootstrap: str, topic: str, records: int) -> float:
    """1 MB requests of 1 KB records, five in flight; records per second."""
    requests = [produce_request(topic, partition, BATCH_RECORDS, RECORD_BYTES) for partition in range(PARTITIONS)]
    with Wire(bootstrap) as wire:
        began = time.monotonic()
        _pipelined(wire, requests, records // BATCH_RECORDS)
        return records / (time.monotonic() - began)


def consume(bootstrap: str, topic: str, records: int) -> float:
    """Fetch v11, 1 MB from each of four partitions, one request at a time; records per second."""
    offsets = [0] * PARTITIONS
    with Wire(bootstrap) as wire:
        began = time.monotonic()
        while sum(offsets) < records:
            items = [
                {"partition": number, "fetch_offset": offset, "partition_max_bytes": FETCH_BYTES}
                for number, offset in enumerate(offsets)
            ]
            topics = [{"topic": topic, "partitions": items}]
            wire.socket.sendall(
                encode_request(
                    *(1, 11, 1, "bench"),
                    replica_id=-1,
                    max_wait=500,
                    min_bytes=1,
                    max_bytes=64 << 20,
                    isolation_level=1,
                    session_id=0,
                    session_epoch=-1,
                    topics=topics,
                    forgotten_topics_data=[],
                    rack_id="",
                )
            )
            _follow(wire.frame(), offsets)
        return records / (time.monotonic() - began)


def wide_fetch(bootstrap: str, topic: str, partitions: int, count: int) -> dict[str, float]:
    """A consumer of many partitions of which one moves between two fetches: with and without a session (KIP-227)."""
    found = {}
    with Wire(bootstrap) as wire, Wire(bootstrap) as writer:
        everything = [
            {"partition": n, "fetch_offset": 0, "partition_max_bytes": FETCH_BYTES} for n in range(partitions)
        ]

        def fetch(session_id: int, epoch: int, items: list[dict[str, int]]) -> Any:
            fields = {"replica_id": -1, "max_wait": 500, "min_bytes": 1, "max_bytes": 1 << 20, "isolation_level": 0}
            topics = [{"topic": topic, "partitions": items}] if items else []
            return wire.ask(
                *(1, 12), **fields, session_id=session_id, session_epoch=epoch, topics=topics, forgotten_topics_data=[]
            )

        for name, is_full in (("full_ms", True), ("incremental_ms", False)):
            session_id = fetch(0, 0, everything).session_id
            epoch, moved, times = 1, list[dict[str, int]](), []
            for number in range(count):
                partition = number % partitions
                _until_produced(writer, produce_request(topic, partition, 1, 200))
                items = everything if is_full else moved
                began = time.monotonic()
                answer = fetch(0, -1, items) if is_full else fetch(session_id, epoch, items)
                times.append((time.monotonic() - began) * 1000)
                epoch += 1
                item = next(item for item in answer.responses[0].partitions if item.records)
                moved = [everything[item.partition_index]]
                moved[0]["fetch_offset"] = item.high_watermark
            found[name] = _percentile(times, 0.5)
    return found


def _follow(frame: memoryview, offsets: list[int]) -> None:
    """Walk a Fetch v11 response of one topic and move `offsets` behind what came."""
    at = 4 + 4 + 2 + 4 + 4
    at += 2 + int.from_bytes(frame[at : at + 2], "big")
    count = int.from_bytes(frame[at : at + 4], "big")
    at += 4
    for _ in range(count):
        partition, error = struct.unpack_from(">ih", frame, at)
        if error:
            raise RuntimeError(f"Fetch of partition {partition} was answered with error {error}")
        aborted = struct.unpack_from(">i", frame, at + 30)[0]
        at += 34 + 16 * max(aborted, 0) + 4
        size = struct.unpack_from(">i", frame, at)[0]
        at += 4
        end = at + size
        while end - at >= 61:
            base, length = struct.unpack_from(">qi", frame, at)
            if at + 12 + length > end:
                break
            offsets[partition] = base + struct.unpack_from(">i", frame, at + 23)[0] + 1
            at += 12 + length
        at = end


def small_produce(bootstrap: str, topic: str, seconds: float) -> dict[str, float]:
    """Requests of one record of 200 bytes: one at a time, then five in flight."""
    requests = [produce_request(topic, partition, 1, 200) for partition in range(PARTITIONS)]
    with Wire(bootstrap) as wire:
        times = _one_by_one(wire, requests, seconds)
        count = int(3 * len(times))
        began = time.monotonic()
        _pipelined(wire, requests, count)
        rate = count / (time.monotonic() - began)
    return {
        "p50_ms": _percentile(times, 0.5),
        "p99_ms": _percentile(times, 0.99),
        "requests_per_second": rate,
        "requests": float(len(times) + count),
    }


def _one_by_one(wire: Wire, requests: list[bytes], seconds: float, pause: float = 0.0) -> list[float]:
    times = []
    end = time.monotonic() + seconds
    while (began := time.monotonic()) < end:
        wire.socket.sendall(requests[len(times) % len(requests)])
        _check_produced(wire.frame())
        times.append((time.monotonic() - began) * 1000)
        if pause:
            time.sleep(pause)
    return times


def _percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def _flat_out(bootstrap: str, topic: str, seconds: float, sent: Any) -> None:
    requests = [produce_request(topic, partition, BATCH_RECORDS, RECORD_BYTES) for partition in range(PARTITIONS)]
    end = time.monotonic() + seconds
    with Wire(bootstrap) as wire:
        while time.monotonic() < end:
            _pipelined(wire, requests, 20)
            with sent.get_lock():
                sent.value += 20 * BATCH_RECORDS


def fairness(bootstrap: str, topic: str, producers: int, seconds: float) -> dict[str, float]:
    """A small Produce every half millisecond beside producers that send 1 MB requests without end."""
    sent = multiprocessing.Value("q", 0)
    others = [
        multiprocessing.Process(target=_flat_out, args=(bootstrap, topic, seconds + 1, sent)) for _ in range(producers)
    ]
    for other in others:
        other.start()
    with Wire(bootstrap) as wire:
        requests = [produce_request(topic, partition, 1, 200) for partition in range(PARTITIONS)]
        time.sleep(0.5)
        times = _one_by_one(wire, requests, seconds, pause=0.0005)
    for other in others:
        other.join()
    return {
        "p50_ms": _percentile(times, 0.5),
        "p99_ms": _percentile(times, 0.99),
        "max_ms": max(times),
        "mb_per_second": sent.value * RECORD_BYTES / 1e6 / (seconds + 1),
    }


def synced_produce(bootstrap: str, topic: str, producers: int, seconds: float) -> float:
    """Connections that each send one record of 200 bytes at a time; acknowledgements per second in all."""
    counts = [0] * producers

    def one(number: int) -> None:
        request = produce_request(topic, number % PARTITIONS, 1, 200)
        with Wire(bootstrap) as wire:
            counts[number] = len(_one_by_one(wire, [request], seconds))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(producers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / seconds


def idle_connections(bootstrap: str, count: int) -> float:
    """Open connections that each ask for ApiVersions once; the seconds until all were answered. Closes them on exit."""
    host, _, port = bootstrap.rpartition(":")
    began = time.monotonic()
    for _ in range(count):
        connection = socket.create_connection((host, int(port)), 30)
        connection.sendall(bytes.fromhex("0000000a 0012 0000 00000001 ffff"))
        size = int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "big")
        connection.recv(size, socket.MSG_WAITALL)
        _held.append(connection)
    return time.monotonic() - began


def let_go() -> None:
    """Close what `idle_connections` opened."""
    for connection in _held:
        connection.close()
    _held.clear()


_held: list[socket.socket] = []

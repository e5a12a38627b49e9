"""The listener under clients that misbehave: bad frames, slow readers, too many connections."""

from __future__ import annotations

import os
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from semel.broker import BrokerConfig, EmbeddedBroker
from semel.wire.messages import decode_response, encode_request
from tests.broker.core import batch


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[EmbeddedBroker]:
    config = BrokerConfig(max_frame_bytes=32 << 20, max_connections=20)
    with EmbeddedBroker(tmp_path / "data", config=config) as running:
        yield running


class Wire:
    """A raw client connection."""

    def __init__(self, broker: EmbeddedBroker) -> None:
        host, _, port = broker.address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), 20)

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            got = self.socket.recv(size - len(data))
            if not got:
                raise ConnectionError("the broker closed the connection")
            data += got
        return bytes(data)

    def frame(self) -> bytes:
        return self.exactly(int.from_bytes(self.exactly(4), "big"))

    def ask(self, key: int, version: int, /, **fields: Any) -> Any:
        self.socket.sendall(encode_request(key, version, 1, "raw", **fields))
        return decode_response(key, version, self.frame())

    def is_closed(self) -> bool:
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True


def _versions(correlation_id: int = 1) -> bytes:
    return encode_request(18, 3, correlation_id, "raw", client_software_name="t", client_software_version="1")


def _produce(data: bytes, correlation_id: int = 1) -> bytes:
    topic = {"name": "orders", "partition_data": [{"index": 0, "records": data}]}
    return encode_request(0, 9, correlation_id, "raw", transactional_id=None, acks=-1, timeout=9, topic_data=[topic])


def _create(wire: Wire, name: str = "orders") -> None:
    topic = {"name": name, "num_partitions": 1, "replication_factor": 1, "assignments": [], "configs": []}
    wire.ask(19, 7, topics=[topic], timeout=1000, validate_only=False)


def _fetch(offset: int, wait_ms: int, correlation_id: int = 1, size: int = 1 << 25) -> bytes:
    item = {"partition": 0, "fetch_offset": offset, "partition_max_bytes": size}
    return encode_request(
        1,
        12,
        correlation_id,
        "raw",
        replica_id=-1,
        max_wait=wait_ms,
        min_bytes=1,
        max_bytes=size,
        isolation_level=0,
        topics=[{"topic": "orders", "partitions": [item]}],
        forgotten_topics_data=[],
    )


@pytest.mark.parametrize(
    "sent",
    [
        b"\x7f\xff\xff\xff",
        b"\xff\xff\xff\xff",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0\0\0\0",
        b"\0\0\0\x04\0\x12\0\0",
        b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(40),
        b"\0\0\0\x0c" + b"\0\x12\0\x03" + bytes(4) + b"\x40\0xx",
        encode_request(10, 3, 1, "raw", key="g", key_type=0)[:-4] + b"\xff\xff\xff\xff",
    ],
)
def test_bytes_that_are_no_request_close_only_their_connection(broker: EmbeddedBroker, sent: bytes) -> None:
    with Wire(broker) as good, Wire(broker) as bad:
        bad.socket.sendall(sent)
        assert bad.is_closed()
        assert good.ask(18, 3, client_software_name="t", client_software_version="1").error_code == 0


def test_random_bytes_never_stop_the_broker(broker: EmbeddedBroker) -> None:
    rng = random.Random(4)
    valid = [_versions(), _produce(batch(b"a")), _fetch(0, 0)]
    for _ in range(300):
        frame = bytearray(rng.choice(valid))
        for _ in range(rng.randint(1, 4)):
            frame[rng.randrange(4, len(frame))] = rng.randrange(256)
        with Wire(broker) as wire:
            wire.socket.sendall(frame)
            wire.socket.shutdown(socket.SHUT_WR)
            wire.socket.settimeout(5)
            while wire.socket.recv(65536):
                continue
    with Wire(broker) as wire:
        assert wire.ask(18, 3, client_software_name="t", client_software_version="1").error_code == 0


def test_requests_split_at_every_byte(broker: EmbeddedBroker) -> None:
    frame = _versions()
    with Wire(broker) as wire:
        wire.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(1, len(frame)):
            wire.socket.sendall(frame[:at])
            threading.Event().wait(0.0005)
            wire.socket.sendall(frame[at:])
            assert len(wire.frame()) > 20


def test_pipelined_answers_keep_the_order_also_behind_a_waiting_fetch(broker: EmbeddedBroker) -> None:
    with Wire(broker) as wire, Wire(broker) as writer:
        _create(wire)
        wire.socket.sendall(_versions(1) + _fetch(0, 20_000, 2) + _versions(3) * 200 + _versions(4))
        assert int.from_bytes(wire.frame()[:4], "big") == 1
        writer.socket.sendall(_produce(batch(b"a")))
        writer.frame()
        seen = [int.from_bytes(wire.frame()[:4], "big") for _ in range(202)]
        assert seen == [2] + [3] * 200 + [4]


def test_large_frames_go_in_and_out_while_the_reader_is_slow(broker: EmbeddedBroker) -> None:
    """20 MB are stored and fetched by a client that reads late; the broker serves others meanwhile."""
    values = [os.urandom(1_000_000) for _ in range(20)]
    with Wire(broker) as wire, Wire(broker) as other:
        _create(wire)
        for number, value in enumerate(values):
            wire.socket.sendall(_produce(batch(value), number))
        for number in range(len(values)):
            assert int.from_bytes(wire.frame()[:4], "big") == number
        wire.socket.sendall(_fetch(0, 0, 77) + _versions(78))
        for _ in range(50):
            assert other.ask(18, 3, client_software_name="t", client_software_version="1").error_code == 0
        answer = decode_response(1, 12, wire.frame())
        records = answer.responses[0].partitions[0].records
        at = 0
        for value in values:
            at = records.index(value, at) + len(value)
        assert int.from_bytes(wire.frame()[:4], "big") == 78


def test_a_frame_above_the_limit_costs_no_memory(broker: EmbeddedBroker) -> None:
    with Wire(broker) as wire:
        wire.socket.sendall((33 << 20).to_bytes(4, "big") + b"x")
        assert wire.is_closed()


def test_connections_above_the_limit_are_refused_and_the_others_served(broker: EmbeddedBroker) -> None:
    wires = [Wire(broker) for _ in range(20)]
    try:
        for wire in wires:
            assert wire.ask(18, 3, client_software_name="t", client_software_version="1").error_code == 0
        with Wire(broker) as refused:
            assert refused.is_closed()
        wires.pop().socket.close()
        for _ in range(100):
            with Wire(broker) as again:
                again.socket.sendall(_versions())
                if not again.is_closed():
                    break
        else:
            pytest.fail("the place of a closed connection was never free again")
    finally:
        for wire in wires:
            wire.socket.close()


def test_idle_connections_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("semel.broker.broker.IDLE_CHECK_SECONDS", 0.05)
    with EmbeddedBroker(tmp_path, config=BrokerConfig(connection_idle_seconds=0.3)) as broker, Wire(broker) as wire:
        assert wire.ask(18, 3, client_software_name="t", client_software_version="1").error_code == 0
        assert wire.is_closed()


def test_a_topic_deleted_while_it_is_sent_arrives_whole(broker: EmbeddedBroker) -> None:
    value = os.urandom(1_000_000)
    with Wire(broker) as wire, Wire(broker) as other:
        _create(wire)
        for number in range(20):
            wire.socket.sendall(_produce(batch(value), number))
            wire.frame()
        wire.socket.sendall(_fetch(0, 0))
        size = int.from_bytes(wire.exactly(4), "big")
        other.ask(20, 6, topics=[{"name": "orders", "topic_id": None}], timeout=1000)
        records = decode_response(1, 12, wire.exactly(size)).responses[0].partitions[0].records
        assert records.count(value) == 20


def test_connections_leave_file_descriptors_for_the_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With none left, segments could not be opened and Produce would be refused for as long as the clients stay."""
    monkeypatch.setattr("semel.broker.server.resource.getrlimit", lambda _: (10, 10))
    with EmbeddedBroker(tmp_path) as broker:
        wires = [Wire(broker) for _ in range(5)]
        try:
            for wire in wires:
                assert wire.ask(18, 3, client_software_name="t", client_software_version="1").error_code == 0
            with Wire(broker) as refused:
                assert refused.is_closed()
        finally:
            for wire in wires:
                wire.socket.close()


def test_a_reader_that_has_stopped_for_good_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection would hold memory and a place among the connections for as long as its process is suspended."""
    monkeypatch.setattr("semel.broker.broker.IDLE_CHECK_SECONDS", 0.05)
    with EmbeddedBroker(tmp_path, config=BrokerConfig(connection_idle_seconds=0.3)) as broker:
        with Wire(broker) as wire:
            _create(wire)
            for number in range(20):
                wire.socket.sendall(_produce(batch(os.urandom(1_000_000)), number))
                wire.frame()
        with Wire(broker) as stopped:
            stopped.socket.sendall(_fetch(0, 0))
            server = broker._broker._server
            assert server is not None
            for _ in range(100):
                if not server._connections:
                    break
                threading.Event().wait(0.05)
            assert not server._connections

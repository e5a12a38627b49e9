"""A broker without sockets that is sent anything, and a client that must be served all the same."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from semel.broker.config import BrokerConfig
from semel.broker.exchange import Later, Peer
from semel.wire.messages import encode_request
from semel.wire.records import decode_records, iter_batches
from tests.broker.core import Core, batch

__all__ = ["LiveNode"]

CHECK_EVERY = 250
"""Executions between two visits of the good client."""
LIFETIME = 10_000
"""Executions of one node: then its folder is thrown away, after a restart on what the fuzzer left there."""
_PEER = Peer("127.0.0.1", "127.0.0.1", 9092)


class LiveNode:
    """Made again and again; `handle` raises what the node raises."""

    def __init__(self) -> None:
        self._folder = Path()
        self._visits = 0
        self._begin()

    def _begin(self) -> None:
        memory = Path("/dev/shm")
        self._folder = Path(tempfile.mkdtemp(prefix="semel-fuzz-", dir=memory if memory.is_dir() else None))
        self._core = Core(self._folder, BrokerConfig(max_topic_partitions=200))
        self._executions = 0
        self._core.create("orders", 2)

    def seeds(self) -> list[bytes]:
        """Requests of a program that means well, with what this node has."""
        good = batch(b"1", b"2", producer_id=0, producer_epoch=0, base_sequence=0, transactional=True)
        data = [{"name": "orders", "partition_data": [{"index": 0, "records": good}]}]
        item = {"partition_index": 0, "committed_offset": 1, "committed_metadata": "m"}
        protocols = [{"name": "range", "metadata": b""}]
        ids = {"transactional_id": "t", "producer_id": 0, "producer_epoch": 0}
        frames = [
            encode_request(22, 5, 7, "f", transaction_timeout=1000, **ids | {"producer_id": -1, "producer_epoch": -1}),
            encode_request(0, 12, 7, "f", transactional_id="t", acks=-1, timeout=1000, topic_data=data),
            encode_request(26, 5, 7, "f", committed=True, **ids),
            encode_request(
                28, 3, 7, "f", group_id="g", topics=[{"name": "orders", "partitions": [item]}], **ids
            ),
            encode_request(
                11, 3, 7, "f", group_id="g", session_timeout=10_000, rebalance_timeout=10_000, member_id="",
                protocol_type="consumer", protocols=protocols,
            ),
            encode_request(65, 0, 7, "f", transactional_ids=["t"]),
        ]  # fmt: skip
        return [frame[4:] for frame in frames]

    def handle(self, data: bytes) -> None:
        """One request; now and then the good client, and a restart. Raises `ProtocolError` as the node does."""
        self._executions += 1
        if self._executions % CHECK_EVERY == 0:
            self.visit()
        if self._executions > LIFETIME:
            self._core.restart()
            self.visit()
            shutil.rmtree(self._folder)
            self._begin()
        answer = self._core.node.handle(memoryview(bytearray(data)), _PEER)
        if isinstance(answer, Later):
            answer.deliver = lambda _: None
            answer.close()  # The client is gone.
        self._core.node.outbox.drain()
        self._core.pass_time(5)

    def visit(self) -> None:
        """The good client: a topic, a transaction, and all of it read back, whatever else is in the broker."""
        core = self._core
        self._visits += 1
        name = f"good-{self._visits}"
        core.node.sweep()
        core.create(name)
        writer = core.init(name)
        assert writer.error_code == 0, writer
        ids: dict[str, Any] = {"producer_id": writer.producer_id, "producer_epoch": writer.producer_epoch}
        data = batch(b"a", b"b", base_sequence=0, transactional=True, **ids)
        assert core.produce(name, data, version=12, transactional_id=name).error_code == 0
        assert core.end(name, *ids.values(), True).error_code == 0
        read = core.fetch(name, 0, committed=True).records
        values = [
            record.value
            for at, header in iter_batches(read)
            if not header.is_control
            for record in decode_records(read, at, header, name, 0)
        ]
        assert values == [b"a", b"b"], values
        topic = core.node.topics.get(name)
        assert topic is not None
        core.node.topics.delete(topic)

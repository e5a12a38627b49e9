"""The broker without sockets: requests in, decoded responses out, with a clock and timers in the test's hand."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from semel.broker.commit import Background, at_once
from semel.broker.config import BrokerConfig
from semel.broker.exchange import ANONYMOUS, Later, Parts, Peer
from semel.broker.node import Node
from semel.env import Env
from semel.log.log import Slice
from semel.types import Header
from semel.wire.messages import decode_response, encode_request
from semel.wire.records import BatchBuilder
from tests.moment import NOW_MS

__all__ = ["Core", "Pending", "batch"]


class Pending:
    """A request whose answer has not come yet."""

    def __init__(self, core: Core, later: Later) -> None:
        self._core = core
        self.later = later
        self.parts: Parts | None = None
        later.deliver = self._deliver

    def _deliver(self, answer: Any) -> None:
        self.parts = self._core.node.encode(self.later, answer)

    @property
    def answered(self) -> bool:
        self._core.node.outbox.drain()
        return self.parts is not None

    @property
    def response(self) -> Any:
        assert self.answered, "no answer has come"
        assert self.parts is not None
        header = self.later.header
        return decode_response(header.api_key, header.api_version, _frame(self.parts))


class _Timer:
    def __init__(self, at_ms: float, callback: Callable[[], None]) -> None:
        self.at_ms = at_ms
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Core:
    """A node in `data`; open again after `close` to see what a restart finds."""

    def __init__(self, data: Path, config: BrokerConfig | None = None, background: Background = at_once) -> None:
        self.data = data
        self.background = background
        self.config = config or BrokerConfig()
        self.now_ms = 1_700_000_000_000
        self.clock_is_off_by_ms = 0
        """How far somebody has set the wall clock; time itself goes on."""
        self.principal = ANONYMOUS
        """Who sends the requests."""
        self._timers: list[_Timer] = []
        self.open()

    def open(self) -> None:
        env = Env(wall_ms=lambda: self.now_ms + self.clock_is_off_by_ms, monotonic=lambda: self.now_ms / 1000)
        self.node = Node(self.data, self.config, env, self._call_later, self.background)
        self.node.open()

    def restart(self) -> None:
        """As after kill -9: nothing is closed in order."""
        self._timers.clear()
        self.open()

    def _call_later(self, seconds: float, callback: Callable[[], None]) -> _Timer:
        timer = _Timer(self.now_ms + seconds * 1000, callback)
        self._timers.append(timer)
        return timer

    def pass_time(self, ms: int) -> None:
        """Move the clock; timers that are due are called, in order."""
        end = self.now_ms + ms
        while True:
            due = [timer for timer in self._timers if not timer.cancelled and timer.at_ms <= end]
            if not due:
                break
            timer = min(due, key=lambda item: item.at_ms)
            self._timers.remove(timer)
            self.now_ms = max(self.now_ms, int(timer.at_ms))
            timer.callback()
        self.now_ms = end

    def send(self, key: int, version: int, /, **fields: Any) -> Pending | bytes | None:
        """The raw answer: a frame without its length, None for no response, or what is still to come."""
        frame = bytearray(encode_request(key, version, 7, "test", **fields))
        answer = self.node.handle(memoryview(frame)[4:], Peer("127.0.0.1", "127.0.0.1", 9092, principal=self.principal))
        if isinstance(answer, Later):
            return Pending(self, answer)
        return None if answer is None else _frame(answer)

    def ask(self, key: int, version: int, /, **fields: Any) -> Any:
        """The decoded response to a request that is answered at once, or within its handler."""
        answer = self.send(key, version, **fields)
        if isinstance(answer, Pending):
            return answer.response
        assert answer is not None, "there is no response"
        return decode_response(key, version, answer)

    # --- Shorthands ---

    def create(self, name: str, partitions: int = 1, **configs: str) -> None:
        items = [{"name": key.replace("_", "."), "value": value} for key, value in configs.items()]
        topic = {
            "name": name,
            "num_partitions": partitions,
            "replication_factor": 1,
            "assignments": [],
            "configs": items,
        }
        answer = self.ask(19, 7, topics=[topic], timeout=1000, validate_only=False)
        assert answer.topics[0].error_code == 0, answer

    def produce(
        self,
        topic: str,
        data: bytes | None,
        *,
        version: int = 9,
        partition: int = 0,
        transactional_id: str | None = None,
    ) -> Any:
        """The one partition's answer."""
        answer = self.ask(
            0,
            version,
            transactional_id=transactional_id,
            acks=-1,
            timeout=1000,
            topic_data=[
                self.topic_key(topic, version, 13) | {"partition_data": [{"index": partition, "records": data}]}
            ],
        )
        return answer.responses[0].partition_responses[0]

    def topic_key(self, name: str, version: int, by_id_from: int) -> dict[str, Any]:
        if version < by_id_from:
            return {"name": name}
        found = self.node.topics.get(name)
        return {"topic_id": None if found is None else found.info.topic_id}

    def fetch(self, topic: str, offset: int, *, version: int = 12, committed: bool = False, wait_ms: int = 0) -> Any:
        """The one partition's answer, or what is pending."""
        key = self.topic_key(topic, version, 13)
        item = {"partition": 0, "fetch_offset": offset, "partition_max_bytes": 1 << 20}
        answer = self.send(
            1,
            version,
            replica_id=-1,
            max_wait=wait_ms,
            min_bytes=1,
            max_bytes=1 << 20,
            isolation_level=int(committed),
            topics=[{"topic": key["name"]} | {"partitions": [item]} if "name" in key else key | {"partitions": [item]}],
            forgotten_topics_data=[],
        )
        if isinstance(answer, Pending):
            return answer
        assert answer is not None
        return decode_response(1, version, answer).responses[0].partitions[0]

    def init(self, transactional_id: str | None, producer_id: int = -1, epoch: int = -1, version: int = 5) -> Any:
        return self.ask(
            22,
            version,
            transactional_id=transactional_id,
            transaction_timeout=10_000,
            producer_id=producer_id,
            producer_epoch=epoch,
        )

    def end(self, transactional_id: str, producer_id: int, epoch: int, commit: bool, version: int = 5) -> Any:
        return self.ask(
            26,
            version,
            transactional_id=transactional_id,
            producer_id=producer_id,
            producer_epoch=epoch,
            committed=commit,
        )


def _frame(parts: Parts) -> bytes:
    data = b"".join(
        os.pread(part.file, part.length, part.position) if isinstance(part, Slice) else part for part in parts
    )
    assert int.from_bytes(data[:4], "big") == len(data) - 4, "the length prefix is wrong"
    return data[4:]


def batch(
    *values: bytes,
    key: bytes | None = None,
    timestamp_ms: int = 1_700_000_000_000,
    headers: tuple[Header, ...] = (),
    **ids: Any,
) -> bytes:
    """A record batch; `ids` are those of `BatchBuilder.build`."""
    builder = BatchBuilder()
    for value in values:
        builder.append(key, value, timestamp_ms, headers)
    return builder.build(**ids)


def leave_open(
    node: Node, topic: str, partition: int, producer: tuple[int, int], value: bytes = b"late", now_ms: int = NOW_MS
) -> None:
    """Put a transactional record of (producer id, epoch) where no coordinator knows that its marker is missing."""
    found = node.topics.partition(topic, partition)
    assert found is not None
    pid, epoch = producer
    data = batch(value, producer_id=pid, producer_epoch=epoch, base_sequence=0, transactional=True)
    found.log.append(bytearray(data), now_ms)

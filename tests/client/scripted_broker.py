"""A broker that does what a test says: it answers well by default, and each request can be given another fate.

`script[api_key]` is a queue of actions, one for each request of that API: a dict replaces fields of the good answer, an
`ErrorCode` puts that error where it belongs, `"close"` closes the connection before the request has any effect,
`"close after"` after it had, `"silent"` never answers. One process can run several nodes of one cluster.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Mapping
from typing import Any
from uuid import UUID

from semel.errors import ErrorCode
from semel.types import TopicPartition
from semel.wire.frames import FrameReader
from semel.wire.messages import decode_request, decode_request_header, encode_response
from semel.wire.records import read_header

PRODUCE, METADATA, FIND_COORDINATOR, API_VERSIONS, INIT, ADD_PARTITIONS = 0, 3, 10, 18, 22, 24
ADD_OFFSETS, END_TXN, TXN_OFFSET_COMMIT, DESCRIBE = 25, 26, 28, 65
VERSIONS = {
    PRODUCE: (0, 13),
    2: (1, 7),
    METADATA: (0, 12),
    9: (1, 8),
    FIND_COORDINATOR: (0, 4),
    API_VERSIONS: (0, 4),
    INIT: (0, 5),
    ADD_PARTITIONS: (0, 5),
    ADD_OFFSETS: (0, 4),
    END_TXN: (0, 5),
    TXN_OFFSET_COMMIT: (0, 5),
}
TOPIC_ID = UUID(int=1)
Action = Mapping[str, Any] | ErrorCode | str


class ScriptedBroker:
    """One node; `cluster` shares topics, leaders and the log of requests between nodes."""

    def __init__(self, transaction_version: int = 2, node_id: int = 1, cluster: ScriptedBroker | None = None) -> None:
        self.node_id = node_id
        self.transaction_version = transaction_version
        self.nodes: dict[int, ScriptedBroker] = cluster.nodes if cluster else {}
        self.nodes[node_id] = self
        self.topics: dict[str, int] = cluster.topics if cluster else {"t": 2}
        self.leaders: dict[TopicPartition, int] = cluster.leaders if cluster else {}
        self.epochs: dict[TopicPartition, int] = cluster.epochs if cluster else {}
        """Leader epochs, 0 where there is none."""
        self.script: dict[int, deque[Action]] = defaultdict(deque)
        self.requests: list[tuple[int, Any]] = []
        """(api key, decoded request), in the order of their arrival at this node."""
        self.written: dict[TopicPartition, list[tuple[int, int, int]]] = defaultdict(list)
        """(epoch, base sequence, records) of each batch that this node appended."""
        self.producer = (1000, -1)
        self.versions = dict(VERSIONS)
        """What ApiVersions says; a test may change it before a client connects."""
        self.port = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def then(self, api_key: int, *actions: Action) -> None:
        """What happens to the next requests of this API."""
        self.script[api_key].extend(actions)

    def asked(self, api_key: int) -> list[Any]:
        """The requests of this API so far."""
        return [body for key, body in self.requests if key == api_key]

    async def __aenter__(self) -> ScriptedBroker:
        self._server = await asyncio.start_server(self._accepted, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Close every connection."""
        for writer in self._writers:
            writer.transport.abort()

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames = FrameReader()
        self._writers.add(writer)
        try:
            while data := await reader.read(1 << 16):
                for frame in frames.receive_data(data):
                    if not self._handle(frame, writer):
                        writer.transport.abort()
                        return
        except ConnectionError:
            return
        finally:
            self._writers.discard(writer)
            writer.close()

    def _handle(self, frame: bytes, writer: asyncio.StreamWriter) -> bool:
        header = decode_request_header(frame)
        body = decode_request(header, frame)
        self.requests.append((header.api_key, body))
        queue = self.script[header.api_key]
        action = queue.popleft() if queue else {}
        if action == "close":
            return False
        if action == "silent":
            return True
        answer = self._answer(header.api_key, header.api_version, body, action)
        if action == "close after":
            return False
        if isinstance(action, Mapping):
            answer |= action
        writer.write(encode_response(header.api_key, header.api_version, header.correlation_id, **answer))
        return True

    def _answer(self, api_key: int, version: int, body: Any, action: Action) -> dict[str, Any]:
        code = int(action) if isinstance(action, ErrorCode) else 0
        match api_key:
            case 18:
                return self._api_versions()
            case 3:
                return self._metadata(body, code)
            case 10:
                item = {"node_id": self.node_id, "host": "127.0.0.1", "port": self.port, "error_code": code}
                item |= {"error_message": None}
                return {"coordinators": [item | {"key": key} for key in body.coordinator_keys]}
            case 22:
                if getattr(body, "keep_prepared_txn", False) and body.producer_id >= 0:
                    code = code or ErrorCode.INVALID_REQUEST
                if not code:
                    self.producer = (1000, self.producer[1] + 1)
                return {"error_code": code, "producer_id": self.producer[0], "producer_epoch": self.producer[1]}
            case 0:
                return {"responses": [self._topic_written(topic, code) for topic in body.topic_data]}
            case 24:
                partitions = [
                    {"name": topic.name, "results_by_partition": [_result(item, code) for item in topic.partitions]}
                    for topic in body.v3_and_below_topics
                ]
                return {"results_by_topic_v3_and_below": partitions}
            case 26:
                if not code and version >= 5:
                    self.producer = (1000, self.producer[1] + 1)
                return {"error_code": code, "producer_id": self.producer[0], "producer_epoch": self.producer[1]}
            case 28:
                items = [
                    {
                        "name": topic.name,
                        "partitions": [
                            {"partition_index": item.partition_index, "error_code": code} for item in topic.partitions
                        ],
                    }
                    for topic in body.topics
                ]
                return {"topics": items}
            case _:
                return {"error_code": code}

    def _api_versions(self) -> dict[str, Any]:
        features = [{"name": "transaction.version", "max_version_level": self.transaction_version}]
        return {
            "error_code": 0,
            "api_keys": [
                {"api_key": key, "min_version": low, "max_version": high} for key, (low, high) in self.versions.items()
            ],
            "supported_features": [{"name": "transaction.version", "min_version": 0, "max_version": 2}],
            "finalized_features_epoch": 1,
            "finalized_features": [item | {"min_version_level": 1} for item in features],
        }

    def _metadata(self, body: Any, code: int) -> dict[str, Any]:
        names = self.topics if body.topics is None else [topic.name for topic in body.topics]
        topics = []
        for name in names:
            error = code or (0 if name in self.topics else ErrorCode.UNKNOWN_TOPIC_OR_PARTITION)
            partitions = [
                {
                    "error_code": 0,
                    "partition_index": number,
                    "leader_id": self.leaders.get(TopicPartition(name, number), 1),
                    "leader_epoch": self.epochs.get(TopicPartition(name, number), 0),
                    "replica_nodes": (1,),
                    "isr_nodes": (1,),
                    "offline_replicas": (),
                }
                for number in range(0 if error else self.topics[name])
            ]
            topics.append({"error_code": error, "name": name, "topic_id": TOPIC_ID, "partitions": partitions})
        brokers = [
            {"node_id": node.node_id, "host": "127.0.0.1", "port": node.port, "rack": None}
            for node in self.nodes.values()
        ]
        return {"brokers": brokers, "cluster_id": "scripted", "controller_id": 1, "topics": topics}

    def _topic_written(self, topic: Any, code: int) -> dict[str, Any]:
        results = []
        for item in topic.partition_data:
            where = TopicPartition(topic.name, item.index)
            error, base = code, -1
            if not error and self.leaders.get(where, 1) != self.node_id:
                error = ErrorCode.NOT_LEADER_OR_FOLLOWER
            if not error:
                header = read_header(item.records)
                batch = (header.producer_epoch, header.base_sequence, header.record_count)
                log = self.written[where]
                same = log.index(batch) if batch in log[-5:] else len(log)
                base = sum(count for _, _, count in log[:same])
                if same == len(log):
                    expected = sum(count for epoch, _, count in self.written[where] if epoch == header.producer_epoch)
                    if header.base_sequence != expected:
                        error = ErrorCode.OUT_OF_ORDER_SEQUENCE_NUMBER
                    else:
                        self.written[where].append(batch)
            results.append(
                {
                    "index": item.index,
                    "error_code": int(error),
                    "base_offset": base if not error else -1,
                    "log_append_time": -1,
                    "record_errors": (),
                }
            )
        return {"name": topic.name, "partition_responses": results}


def _result(partition: int, code: int) -> dict[str, Any]:
    return {"partition_index": partition, "partition_error_code": code}

"""Make the golden files anew: the batches that other clients build from the records in `cases.py`.

    python -m tests.wire.golden.make [java] [aiokafka] [confluent]

Each line of `<client>.txt` is `batch CASE CODEC HEX`, `marker NAME HEX`, `murmur2 KEY HASH` or
`partition KEY PARTITION`; keys are `x` and hex. An uncompressed batch of more than 20,000 bytes is given as
`sha256:DIGEST`. The Java client is run from the jars of Apache Kafka 4.3.1; confluent-kafka sends to a socket of ours.
"""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aiokafka.record.default_records import DefaultRecordBatchBuilder
from confluent_kafka import Producer

from semel.wire.compression import CODECS
from semel.wire.frames import FrameReader
from semel.wire.messages import decode_request, decode_request_header, encode_response
from semel.wire.records import decode_records, read_header
from tests.services.kafka import kafka_jars
from tests.wire.golden.cases import BASE_SEQUENCE, CASES, KEYS, PARTITIONS, PRODUCER_EPOCH, PRODUCER_ID, as_text

FOLDER = Path(__file__).parent
PRODUCE, FETCH, METADATA, FIND_COORDINATOR, API_VERSIONS, INIT_PRODUCER_ID = 0, 1, 3, 10, 18, 22


def batch_line(case: str, batch: bytes) -> str:
    codec = read_header(batch).codec
    long = codec == 0 and len(batch) > 20_000
    content = "sha256:" + hashlib.sha256(batch).hexdigest() if long else batch.hex()
    return f"batch {case} {CODECS[codec]} {content}\n"


def java() -> Iterator[str]:
    text = as_text(CASES) + "".join(f"key x{key.hex()}\n" for key in KEYS)
    command = ["java", "-cp", f"{kafka_jars()}/*", str(FOLDER / "WriteBatches.java")]
    for line in subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout.splitlines():
        kind, *rest = line.split(" ")
        yield batch_line(rest[0], bytes.fromhex(rest[2])) if kind == "batch" else line + "\n"


def aiokafka() -> Iterator[str]:
    for case, records in CASES.items():
        for codec in range(len(CODECS)):
            builder = DefaultRecordBatchBuilder(2, codec, True, PRODUCER_ID, PRODUCER_EPOCH, BASE_SEQUENCE, 1 << 20)
            for offset, (key, value, timestamp, headers) in enumerate(records):
                assert builder.append(offset, timestamp, key, value, list(headers)) is not None
            yield batch_line(case, bytes(builder.build()))


class Sink:
    """A broker that takes what an idempotent producer sends and keeps the batches, by topic and partition."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, int, bytes]] = []
        self.port = 0

    async def __aenter__(self) -> Sink:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames = FrameReader()
        while data := await reader.read(65_536):
            for frame in frames.receive_data(data):
                writer.write(self._answer(frame))
        writer.close()

    def _answer(self, frame: bytes) -> bytes:
        head = decode_request_header(frame)
        if head.api_key == API_VERSIONS and head.api_version > 3:
            return encode_response(API_VERSIONS, 0, head.correlation_id, error_code=35, api_keys=[])
        request = decode_request(head, frame)
        answer = {
            API_VERSIONS: self._api_versions,
            METADATA: self._metadata,
            INIT_PRODUCER_ID: self._init_producer_id,
            PRODUCE: self._produce,
        }[head.api_key]
        return encode_response(head.api_key, head.api_version, head.correlation_id, **answer(request))

    def _api_versions(self, request: Any) -> dict[str, Any]:
        # librdkafka writes batches of version 2 and lz4 only for brokers that have Fetch and FindCoordinator too.
        ranges = {PRODUCE: (0, 9), FETCH: (0, 11), METADATA: (0, 9), FIND_COORDINATOR: (0, 2)}
        ranges |= {API_VERSIONS: (0, 3), INIT_PRODUCER_ID: (0, 4)}
        keys = [{"api_key": key, "min_version": low, "max_version": high} for key, (low, high) in ranges.items()]
        return {"error_code": 0, "api_keys": keys}

    def _metadata(self, request: Any) -> dict[str, Any]:
        partitions = [
            {
                "error_code": 0,
                "partition_index": index,
                "leader_id": 1,
                "leader_epoch": 0,
                "replica_nodes": [1],
                "isr_nodes": [1],
                "offline_replicas": [],
            }
            for index in range(PARTITIONS)
        ]
        return {
            "brokers": [{"node_id": 1, "host": "127.0.0.1", "port": self.port, "rack": None}],
            "controller_id": 1,
            "topics": [
                {"error_code": 0, "name": topic.name, "is_internal": False, "partitions": partitions}
                for topic in request.topics or ()
            ],
        }

    def _init_producer_id(self, request: Any) -> dict[str, Any]:
        return {"error_code": 0, "producer_id": PRODUCER_ID, "producer_epoch": PRODUCER_EPOCH}

    def _produce(self, request: Any) -> dict[str, Any]:
        for topic in request.topic_data:
            for data in topic.partition_data:
                self.batches.append((topic.name, data.index, bytes(data.records)))
        return {
            "responses": [
                {
                    "name": topic.name,
                    "partition_responses": [
                        {"index": data.index, "error_code": 0, "base_offset": 0, "record_errors": []}
                        for data in topic.partition_data
                    ],
                }
                for topic in request.topic_data
            ]
        }


def _send_cases(port: int, codec: str) -> None:
    producer = Producer(
        {
            "bootstrap.servers": f"127.0.0.1:{port}",
            "enable.idempotence": True,
            "compression.type": codec,
            "linger.ms": 5_000,
            "message.timeout.ms": 10_000,
            "partitioner": "murmur2_random",
        }
    )
    for case, records in CASES.items():
        for key, value, timestamp, headers in records:
            producer.produce(case, value, key, partition=0, timestamp=timestamp, headers=list(headers))
        producer.flush()
    if codec == "none":
        for key in KEYS:
            producer.produce("keys", b"", key)
        producer.flush()


async def _capture(codec: str) -> list[tuple[str, int, bytes]]:
    async with Sink() as sink:
        await asyncio.to_thread(_send_cases, sink.port, codec)
        return sink.batches


def confluent() -> Iterator[str]:
    for codec in CODECS:
        batches = asyncio.run(_capture(codec))
        for case, partition, batch in batches:
            if case == "keys":
                for record in decode_records(batch, 0, read_header(batch), case, partition):
                    yield f"partition x{(record.key or b'').hex()} {partition}\n"
            else:
                yield batch_line(case, batch)
        sent = [case for case, _, _ in batches if case != "keys"]
        assert sent == list(CASES), f"librdkafka did not send one batch a case: {sent}"


def main(clients: list[str]) -> None:
    for name, lines in (("java", java), ("aiokafka", aiokafka), ("confluent", confluent)):
        if not clients or name in clients:
            (FOLDER / f"{name}.txt").write_text("".join(lines()))


if __name__ == "__main__":
    main(sys.argv[1:])

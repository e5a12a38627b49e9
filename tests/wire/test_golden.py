"""Our batches against those of the Java client, librdkafka and aiokafka: byte for byte, and record for record."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest
from aiokafka.record.default_records import DefaultRecordBatch

from semel.wire.compression import CODECS
from semel.wire.records import (
    BatchBuilder,
    check_crc,
    control_batch,
    decode_records,
    patch_base_offset,
    read_control,
    read_header,
)
from tests.conftest import unavailable
from tests.services.kafka import kafka_jars, missing_tools
from tests.wire.golden import Line, expected_records, lines
from tests.wire.golden.cases import BASE_SEQUENCE, CASES, PRODUCER_EPOCH, PRODUCER_ID, as_text

pytestmark = pytest.mark.usefixtures("each_codec")

BATCHES = lines("batch")
WHOLE = [line for line in BATCHES if not line.content.startswith("sha256:")]


def build(case: str, codec: int = 0, transactional: bool = True) -> bytes:
    builder = BatchBuilder(codec)
    for record in CASES[case]:
        builder.append(*record)
    return builder.build(
        producer_id=PRODUCER_ID,
        producer_epoch=PRODUCER_EPOCH,
        base_sequence=BASE_SEQUENCE,
        transactional=transactional,
    )


def test_every_client_and_codec_is_there() -> None:
    seen = {(line.client, line.codec) for line in BATCHES}
    assert seen == {(client, codec) for client in ("java", "aiokafka", "confluent") for codec in CODECS}


@pytest.mark.parametrize("line", [line for line in BATCHES if line.codec == "none"], ids=str)
def test_we_write_the_same_bytes(line: Line) -> None:
    batch = bytearray(build(line.name, transactional=line.client != "confluent"))
    if line.client == "confluent":
        patch_base_offset(batch, 0, 0, 0)  # librdkafka writes leader epoch 0, the others -1.
    if line.content.startswith("sha256:"):
        assert line.content == "sha256:" + hashlib.sha256(batch).hexdigest()
    else:
        assert batch.hex() == line.content


@pytest.mark.parametrize("line", WHOLE, ids=str)
def test_we_read_the_same_records(line: Line) -> None:
    batch = bytes.fromhex(line.content)
    header = read_header(batch)
    assert header.size == len(batch)
    assert check_crc(batch, 0, header)
    assert CODECS[header.codec] == line.codec
    assert header.is_transactional == (line.client != "confluent")
    assert (header.producer_id, header.producer_epoch) == (PRODUCER_ID, PRODUCER_EPOCH)
    assert decode_records(batch, 0, header, "t", 0) == expected_records(line.name)


@pytest.mark.parametrize("line", lines("marker"), ids=str)
def test_markers_are_those_of_the_java_client(line: Line) -> None:
    commit = line.name == "COMMIT"
    marker = bytearray(
        control_batch(
            producer_id=PRODUCER_ID,
            producer_epoch=PRODUCER_EPOCH + 1,
            commit=commit,
            coordinator_epoch=77,
            timestamp_ms=1_780_000_000_000,
        )
    )
    patch_base_offset(marker, 0, 123_456_789_012, 0)
    assert marker.hex() == line.content
    assert read_control(marker, 0, read_header(marker)) == (commit, 77)


@pytest.mark.parametrize("codec", range(5), ids=CODECS)
@pytest.mark.parametrize("case", CASES)
def test_aiokafka_reads_what_we_write(case: str, codec: int) -> None:
    batch = bytearray(build(case, codec))
    patch_base_offset(batch, 0, 1_000, 5)
    theirs = DefaultRecordBatch(bytes(batch))
    assert theirs.validate_crc()
    read = [(r.offset, r.timestamp, r.key, r.value, tuple(r.headers)) for r in theirs]
    ours = [(r.offset, r.timestamp_ms, r.key, r.value, r.headers) for r in expected_records(case, base_offset=1_000)]
    assert read == ours


@pytest.mark.kafka
def test_the_java_client_reads_what_we_write() -> None:
    tools = missing_tools()
    if tools:
        unavailable("the Java client", f"{' and '.join(tools)} not found")
    given: list[bytes] = []
    expected: list[str] = []
    for case in CASES:
        for codec in range(len(CODECS)):
            batch = bytearray(build(case, codec))
            patch_base_offset(batch, 0, 1_000, 5)
            for index, text in enumerate(as_text({case: CASES[case]}).splitlines()):
                expected.append(f"{len(given)} {1_000 + index} {text.split(' ', 1)[1]}")
            given.append(batch)
    for commit in (True, False):
        expected.append(f"{len(given)} marker {'COMMIT' if commit else 'ABORT'} 9 {2**40} 32767")
        given.append(
            control_batch(
                producer_id=2**40,
                producer_epoch=32767,
                commit=commit,
                coordinator_epoch=9,
                timestamp_ms=1_780_000_000_000,
            )
        )
    program = Path(__file__).parent / "golden" / "ReadBatches.java"
    done = subprocess.run(
        ["java", "-cp", f"{kafka_jars()}/*", str(program)],
        input="".join(batch.hex() + "\n" for batch in given),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == expected

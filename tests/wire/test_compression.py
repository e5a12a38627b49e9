"""The codecs: round trips, both snappy framings, bounded output, and a clear word when the package is missing."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import tracemalloc

import cramjam
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semel.errors import CorruptBatch
from semel.wire.compression import CODECS, compress, decompress

PACKED = range(1, len(CODECS))
SAMPLES = [
    b"",
    b"x",
    b"abc" * 7,
    bytes(65_536),
    b"ab" * 32_769,
    os.urandom(65_537),
    os.urandom(300_000),
    b"words " * 99_999,
]


@pytest.mark.parametrize("codec", range(len(CODECS)), ids=CODECS)
@pytest.mark.parametrize("data", SAMPLES, ids=lambda data: str(len(data)))
def test_round_trip(codec: int, data: bytes) -> None:
    packed = compress(codec, data)
    assert decompress(codec, packed, len(data) + 1) == data
    assert decompress(codec, packed, max(len(data), 1)) == data


@given(st.binary(max_size=2_000), st.integers(1, 200), st.integers(0, 4))
@settings(max_examples=100, deadline=None)
def test_any_bytes_round_trip(unit: bytes, times: int, codec: int) -> None:
    assert decompress(codec, compress(codec, unit * times)) == unit * times


@pytest.mark.parametrize("codec", range(len(CODECS)), ids=CODECS)
def test_one_byte_above_the_limit_is_refused(codec: int) -> None:
    for data in (b"x" * 100_000, os.urandom(100_000)):
        assert len(decompress(codec, compress(codec, data), 100_000)) == 100_000
        with pytest.raises(CorruptBatch, match=CODECS[codec]):
            decompress(codec, compress(codec, data), 99_999)


@pytest.mark.parametrize("codec", [1, 2])
def test_a_bomb_is_stopped_before_it_is_unpacked(codec: int) -> None:
    bomb = compress(codec, bytes(200_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(CorruptBatch):
            decompress(codec, bomb, 1_000_000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 30_000_000


@pytest.mark.parametrize("codec", PACKED, ids=CODECS[1:])
def test_foreign_and_damaged_bytes_are_corrupt(codec: int) -> None:
    packed = compress(codec, b"some text that is long enough to be packed " * 20)
    for bad in (b"\xff" * 40, packed[:-1], packed[: len(packed) // 2], packed[:5], b"\0" + packed):
        with pytest.raises(CorruptBatch):
            decompress(codec, bad, 1_000_000)


@pytest.mark.parametrize("codec", PACKED, ids=CODECS[1:])
@given(st.binary(max_size=60), st.data())
@settings(max_examples=60, deadline=None)
def test_nothing_but_corrupt_batch_comes_out_of_hostile_bytes(codec: int, noise: bytes, data) -> None:
    packed = bytearray(compress(codec, b"a text " * 30))
    packed[data.draw(st.integers(0, len(packed) - 1))] ^= data.draw(st.integers(1, 255))
    for hostile in (noise, bytes(packed), bytes(packed) + noise, b"\x82SNAPPY\x00" + noise):
        try:
            assert len(decompress(codec, hostile, 100_000)) <= 100_000
        except CorruptBatch:
            continue


def test_an_unknown_codec() -> None:
    with pytest.raises(CorruptBatch, match="codec 7"):
        decompress(7, b"")
    with pytest.raises(ValueError, match="codec 5"):
        compress(5, b"")


def test_snappy_without_framing_as_librdkafka_writes_it() -> None:
    assert decompress(2, bytes(cramjam.snappy.compress_raw(b"raw block " * 50))) == b"raw block " * 50


def test_gzip_of_several_members() -> None:
    assert decompress(1, gzip.compress(b"one ") + gzip.compress(b"two")) == b"one two"


def test_lz4_with_dependent_blocks_as_aiokafka_writes_it() -> None:
    data = b"block after block " * 20_000
    assert decompress(3, bytes(cramjam.lz4.compress(data))) == data


def test_our_lz4_is_a_standard_frame() -> None:
    for data in SAMPLES:
        if data:
            assert bytes(cramjam.lz4.decompress(compress(3, data))) == data


def test_without_cramjam_gzip_works_and_the_others_name_the_extra() -> None:
    program = """
import sys
sys.modules["cramjam"] = None
from semel.errors import ConfigurationError
from semel.wire.compression import compress, decompress
assert decompress(1, compress(1, b"x" * 99)) == b"x" * 99
for codec in (2, 3, 4):
    for action in (compress, decompress):
        try:
            action(codec, b"x" * 99)
        except ConfigurationError as error:
            assert "semel[compression]" in str(error)
        else:
            raise SystemExit(f"codec {codec} worked")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr + done.stdout

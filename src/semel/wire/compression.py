"""The codecs of record batches: none 0, gzip 1, snappy 2, lz4 3, zstd 4.

gzip is in Python's standard library; the others come from `cramjam`, the optional extra `semel[compression]`, which
is imported when the first such batch appears. Output is bounded: a small batch cannot fill the memory.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

from semel.errors import ConfigurationError, CorruptBatch

__all__ = ["CODECS", "MAX_DECOMPRESSED_BYTES", "compress", "decompress"]

CODECS = ("none", "gzip", "snappy", "lz4", "zstd")
"""Names by number, as in `compression.type`."""
MAX_DECOMPRESSED_BYTES = 128 * 1024 * 1024
"""A batch of Kafka's default limit of 1 MiB that compresses a hundredfold fits; a decompression bomb does not."""

_BLOCK_BYTES = 64 * 1024
"""Unit of snappy and lz4 blocks. Java writes 64 KiB lz4 blocks, and its reader allocates what the frame announces."""
_XERIAL_MAGIC = b"\x82SNAPPY\x00"
_XERIAL_HEADER = _XERIAL_MAGIC + b"\0\0\0\x01\0\0\0\x01"
_LZ4_HEADER = b"\x04\x22\x4d\x18\x60\x40\x82"
"""Magic; version 1 with independent blocks and no checksums; blocks of 64 KiB; the checksum of these two bytes.
Java reads independent blocks only."""
_LZ4_STORED = 0x80000000
_BUFFER_FULL = "failed to write whole buffer"
"""What cramjam says when the output does not fit; damaged input must not be tried again with more memory."""


@cache
def _cramjam(codec: int) -> tuple[Any, type[Exception]]:
    """The package's functions for this codec, and what they raise for bytes that are not of it."""
    try:
        import cramjam
    except ImportError:
        raise ConfigurationError(
            f"A record batch is compressed with {CODECS[codec]}, which needs the package cramjam: "
            "pip install 'semel[compression]'."
        ) from None
    return getattr(cramjam, CODECS[codec]), cramjam.DecompressionError


def _too_large(codec: int, max_bytes: int) -> CorruptBatch:
    return CorruptBatch(f"a {CODECS[codec]} batch has more than {max_bytes} bytes once decompressed")


def _unreadable(codec: int, problem: object) -> CorruptBatch:
    return CorruptBatch(f"a {CODECS[codec]} batch cannot be decompressed: {problem}")


def _blocks(data: bytes) -> list[bytes]:
    return [data[at : at + _BLOCK_BYTES] for at in range(0, len(data), _BLOCK_BYTES)]


# --- Compressing ---


def _compress_gzip(data: bytes) -> bytes:
    return zlib.compress(data, wbits=31)


def _compress_snappy(data: bytes) -> bytes:
    """Blocks in the framing of snappy-java, which every client reads."""
    raw = _cramjam(2)[0].compress_raw
    parts = [_XERIAL_HEADER]
    for block in _blocks(data):
        packed = bytes(raw(block))
        parts += (len(packed).to_bytes(4, "big"), packed)
    return b"".join(parts)


def _compress_lz4(data: bytes) -> bytes:
    raw = _cramjam(3)[0].compress_block
    parts = [_LZ4_HEADER]
    for block in _blocks(data):
        packed = bytes(raw(block, store_size=False))
        size = len(packed)
        if size >= len(block):
            packed, size = block, len(block) | _LZ4_STORED
        parts += (size.to_bytes(4, "little"), packed)
    parts.append(b"\0\0\0\0")
    return b"".join(parts)


def _compress_zstd(data: bytes) -> bytes:
    return bytes(_cramjam(4)[0].compress(data))


_COMPRESS: tuple[Callable[[bytes], bytes], ...] = (
    lambda data: data,
    _compress_gzip,
    _compress_snappy,
    _compress_lz4,
    _compress_zstd,
)


def compress(codec: int, data: bytes) -> bytes:
    """`data` in this codec. Raises `ConfigurationError` when its package is missing, `ValueError` for no codec."""
    if not 0 <= codec < len(CODECS):
        raise ValueError(f"codec {codec} is not one of 0 to {len(CODECS) - 1}")
    return _COMPRESS[codec](data)


# --- Decompressing ---


def _decompress_gzip(data: bytes, max_bytes: int) -> bytes:
    parts: list[bytes] = []
    room = max_bytes
    while data:
        stream = zlib.decompressobj(wbits=31)
        try:
            part = stream.decompress(data, room + 1)
        except zlib.error as problem:
            raise _unreadable(1, problem) from problem
        room -= len(part)
        if room < 0:
            raise _too_large(1, max_bytes)
        if not stream.eof:
            raise _unreadable(1, "it is cut short")
        parts.append(part)
        data = stream.unused_data
    return b"".join(parts)


def _decompress_snappy(data: bytes, max_bytes: int) -> bytes:
    """Either framing: the Java client writes snappy-java's, librdkafka one raw block."""
    if not data.startswith(_XERIAL_MAGIC):
        return _snappy_block(data, max_bytes, max_bytes)
    parts: list[bytes] = []
    at, room = len(_XERIAL_HEADER), max_bytes
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        at += 4
        if size > len(data) - at:
            raise _unreadable(2, "it is cut short")
        part = _snappy_block(data[at : at + size], room, max_bytes)
        parts.append(part)
        room -= len(part)
        at += size
    return b"".join(parts)


def _snappy_block(block: bytes, room: int, max_bytes: int) -> bytes:
    snappy, refused = _cramjam(2)
    try:
        if snappy.decompress_raw_len(block) > room:
            raise _too_large(2, max_bytes)
        return bytes(snappy.decompress_raw(block))
    except refused as problem:
        raise _unreadable(2, problem) from problem


def _decompress_frames(codec: int, data: bytes, max_bytes: int) -> bytes:
    """lz4 and zstd frames do not have to say how much is in them: try buffers of growing size, up to the limit."""
    functions, refused = _cramjam(codec)
    size = min(max(4 * len(data), _BLOCK_BYTES), max_bytes)
    while True:
        output = bytearray(size)
        try:
            filled = functions.decompress_into(data, output)
        except refused as problem:
            if _BUFFER_FULL not in str(problem):
                raise _unreadable(codec, problem) from problem
            if size == max_bytes:
                raise _too_large(codec, max_bytes) from problem
            size = min(4 * size, max_bytes)
        else:
            return bytes(memoryview(output)[:filled])


def decompress(codec: int, data: bytes, max_bytes: int = MAX_DECOMPRESSED_BYTES) -> bytes:
    """What was compressed. Never makes more than `max_bytes` bytes of it.

    Raises `CorruptBatch` when `data` is not of this codec, is cut short or is too large once decompressed;
    `ConfigurationError` when the codec's package is missing.
    """
    if codec == 0:
        if len(data) > max_bytes:
            raise _too_large(0, max_bytes)
        return data
    if codec == 1:
        return _decompress_gzip(data, max_bytes)
    if codec == 2:
        return _decompress_snappy(data, max_bytes)
    if codec in (3, 4):
        return _decompress_frames(codec, data, max_bytes)
    raise CorruptBatch(f"a batch is compressed with codec {codec}, which does not exist")

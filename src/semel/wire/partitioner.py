"""Which partition a key belongs to, as Kafka's Java client decides it.

Every client that writes to one topic must agree, or the records of one key end up in two partitions and lose their
order. librdkafka agrees when `partitioner` is `murmur2_random`.
"""

from __future__ import annotations

from functools import lru_cache
from struct import unpack_from

__all__ = ["murmur2", "partition_for"]

_SEED = 0x9747B28C
_M = 0x5BD1E995
_MASK = 0xFFFFFFFF


def murmur2(key: bytes) -> int:
    """MurmurHash2 with Kafka's seed, as an unsigned 32-bit number (`Utils.murmur2` in Java gives the signed one)."""
    length = len(key)
    h = _SEED ^ length
    words = length // 4
    for k in unpack_from(f"<{words}I", key):
        k = k * _M & _MASK
        k ^= k >> 24
        h = (h * _M ^ k * _M) & _MASK
    tail = key[words * 4 :]
    if tail:
        h = (h ^ int.from_bytes(tail, "little")) * _M & _MASK
    h ^= h >> 13
    h = h * _M & _MASK
    return h ^ (h >> 15)


@lru_cache(maxsize=65_536)
def partition_for(key: bytes, partitions: int) -> int:
    """The partition (from 0) of a record with this key; cached, because keys repeat."""
    return (murmur2(key) & 0x7FFFFFFF) % partitions

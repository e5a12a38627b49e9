"""Which partition a key belongs to, as Kafka's Java client decides it.

Every client that writes to one topic must agree, or the records of one key end up in two partitions and lose their
order. librdkafka agrees when `partitioner` is `murmur2_random`.
"""

from __future__ import annotations

from semel.wire import codec

__all__ = ["murmur2", "partition_for"]


def murmur2(key: bytes) -> int:
    """MurmurHash2 with Kafka's seed, as an unsigned 32-bit number (`Utils.murmur2` in Java gives the signed one)."""
    return codec.in_use.murmur2(key)


def partition_for(key: bytes, partitions: int) -> int:
    """The partition (from 0) of a record with this key. For many records at once see `records.encode_batches`."""
    return codec.in_use.partition(key, partitions)

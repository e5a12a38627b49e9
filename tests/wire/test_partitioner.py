"""Records of one key must land where every other client puts them, or their order is lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semel.wire.partitioner import murmur2, partition_for
from tests.wire.golden import Line, lines
from tests.wire.golden.cases import KEYS, PARTITIONS

pytestmark = pytest.mark.usefixtures("each_codec")


def key_of(line: Line) -> bytes:
    return bytes.fromhex(line.name.removeprefix("x"))


@pytest.mark.parametrize("line", lines("murmur2"), ids=str)
def test_murmur2_is_that_of_the_java_client(line: Line) -> None:
    signed = int(line.content)
    assert murmur2(key_of(line)) == signed % 2**32
    assert partition_for(key_of(line), PARTITIONS) == (signed & 0x7FFFFFFF) % PARTITIONS


def test_partitions_are_those_of_librdkafka() -> None:
    theirs = {key_of(line): int(line.content) for line in lines("partition")}
    assert theirs == {key: partition_for(key, PARTITIONS) for key in KEYS}


@given(st.binary(max_size=300), st.integers(1, 1_000))
def test_every_key_has_a_partition(key: bytes, partitions: int) -> None:
    assert 0 <= partition_for(key, partitions) < partitions

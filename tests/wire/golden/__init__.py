"""Batches, markers and hashes that other clients made, as `make.py` stored them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

from semel.types import Record
from tests.wire.golden.cases import CASES

__all__ = ["CLIENTS", "Line", "expected_records", "lines"]

CLIENTS = ("java", "aiokafka", "confluent")


class Line(NamedTuple):
    """One line: what it is, its name, and its last field; `codec` for batches."""

    client: str
    kind: str
    name: str
    codec: str
    content: str

    def __str__(self) -> str:
        return "-".join(filter(None, (self.client, self.name, self.codec)))


@cache
def lines(kind: str) -> tuple[Line, ...]:
    """All lines of a kind (batch, marker, murmur2, partition) of all clients."""
    found = []
    for client in CLIENTS:
        for text in (Path(__file__).parent / f"{client}.txt").read_text().splitlines():
            fields = text.split(" ")
            if fields[0] == kind:
                found.append(Line(client, kind, fields[1], fields[2] if kind == "batch" else "", fields[-1]))
    return tuple(found)


def expected_records(case: str, topic: str = "t", partition: int = 0, base_offset: int = 0) -> list[Record]:
    """What a consumer must get from a batch of this case."""
    return [
        Record(topic, partition, base_offset + index, timestamp, key, value, headers)
        for index, (key, value, timestamp, headers) in enumerate(CASES[case])
    ]

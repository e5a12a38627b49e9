"""The answer of DescribeTransactions v0, read by hand.

kio cannot read a start time of -1, which is what every transaction that is not open has.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from semel.errors import ErrorCode, ProtocolError
from semel.types import TopicPartition

__all__ = ["DescribedTransaction", "decode_described"]


class DescribedTransaction(NamedTuple):
    """One transactional id at its coordinator; `start_ms` is -1 while no transaction is open."""

    error: ErrorCode
    transactional_id: str
    state: str
    timeout_ms: int
    start_ms: int
    producer_id: int
    producer_epoch: int
    partitions: tuple[TopicPartition, ...]


class _Fields:
    """A cursor over flexible-version fields (KIP-482)."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data = data
        self._at = at

    def number(self, form: str) -> int:
        value: int
        (value,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return value

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._data[self._at]
            self._at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 28:
                raise ProtocolError("a number in a DescribeTransactions response has more than five bytes")

    def text(self) -> str:
        size = self.varint() - 1
        start = self._at
        self._at += size
        return self._data[start : self._at].decode()

    def skip_tags(self) -> None:
        for _ in range(self.varint()):
            self.varint()
            size = self.varint()
            self._at += size


def decode_described(frame: bytes) -> list[DescribedTransaction]:
    """Read a DescribeTransactions v0 response frame. Raises `ProtocolError`."""
    fields = _Fields(frame, 4)
    try:
        fields.skip_tags()
        fields.number(">i")  # throttle time
        return [_transaction(fields) for _ in range(fields.varint() - 1)]
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise ProtocolError(f"DescribeTransactions v0 response cannot be read: {error}") from error


def _transaction(fields: _Fields) -> DescribedTransaction:
    code = fields.number(">h")
    error = ErrorCode(code) if code in ErrorCode._value2member_map_ else ErrorCode.UNKNOWN_SERVER_ERROR
    transactional_id, state = fields.text(), fields.text()
    timeout_ms, start_ms = fields.number(">i"), fields.number(">q")
    producer_id, producer_epoch = fields.number(">q"), fields.number(">h")
    partitions = []
    for _ in range(fields.varint() - 1):
        topic = fields.text()
        partitions += [TopicPartition(topic, fields.number(">i")) for _ in range(fields.varint() - 1)]
        fields.skip_tags()
    fields.skip_tags()
    return DescribedTransaction(
        error, transactional_id, state, timeout_ms, start_ms, producer_id, producer_epoch, tuple(partitions)
    )

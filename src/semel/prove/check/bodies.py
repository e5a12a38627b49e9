"""What stands in a batch, from its bytes: keys, values, where each record came from, what a marker says.

Where a record came from stands in its last header, which is found from the record's end: nothing before it is decoded.
"""

from __future__ import annotations

from collections.abc import Iterator

from semel.errors import CorruptBatch
from semel.history import PROOF
from semel.prove.check.evidence import Log, LogBatch
from semel.types import Record
from semel.wire.records import BATCH_OVERHEAD, decode_records

__all__ = ["bodies", "ends_committed", "entries_of", "proof_of", "proofs"]

_NAME = bytes((len(PROOF) << 1,)) + PROOF.encode()
_AFTER_NAME = len(_NAME)
_ABORT, _COMMIT = b"\0\0\0\0", b"\0\0\0\1"


def proofs(batch: LogBatch) -> list[bytes | None]:
    """Where each record of a batch came from: the value of its header `semel-proof`. Raises `CorruptBatch`."""
    data = batch.data()
    found: list[bytes | None] = []
    add = found.append
    at, size = 0, len(data)
    rfind = data.rfind
    for _ in range(batch.header.record_count):
        raw = data[at]
        if raw < 0x80:
            begin = at + 1
        elif (high := data[at + 1]) < 0x80:
            raw, begin = raw & 0x7F | high << 7, at + 2
        else:
            raw, begin = _varint(data, at)
        stop = begin + (raw >> 1)
        if stop > size:
            raise CorruptBatch("a record runs past the end of its batch")
        name = rfind(_NAME, begin, stop)
        if name < 0:
            add(None)
        else:
            value = name + _AFTER_NAME + 1
            length = data[value - 1]
            if length >= 0x80:
                length = length & 0x7F | data[value] << 7
                value += 1
            if value + (length >> 1) != stop:
                return _decoded(batch)
            add(data[value:stop])
        at = stop
    return found


def bodies(batch: LogBatch) -> list[tuple[bytes | None, bytes | None, bytes | None]]:
    """Key, value and where it came from of each record of a batch. Raises `CorruptBatch`."""
    data, found = batch.data(), []
    at, size = 0, len(data)
    for _ in range(batch.header.record_count):
        raw, begin = (data[at], at + 1) if data[at] < 0x80 else _varint(data, at)
        stop = begin + (raw >> 1)
        if stop > size:
            raise CorruptBatch("a record runs past the end of its batch")
        at = begin + 2 if data[begin + 1] < 0x80 else _varint(data, begin + 1)[1]  # attributes, time
        at = at + 1 if data[at] < 0x80 else _varint(data, at)[1]  # offset
        raw, at = (data[at], at + 1) if data[at] < 0x80 else _varint(data, at)
        key = value = proof = None
        if not raw & 1:
            key = data[at : at + (raw >> 1)]
            at += raw >> 1
        raw, at = (data[at], at + 1) if data[at] < 0x80 else _varint(data, at)
        if not raw & 1:
            value = data[at : at + (raw >> 1)]
            at += raw >> 1
        name = data.rfind(_NAME, at, stop)
        if name >= 0:
            length, begin = _varint(data, name + _AFTER_NAME)
            if begin + (length >> 1) != stop:
                records = decode_records(batch.buffer, batch.at, batch.header, "", 0)
                return [(record.key, record.value, proof_of(record)) for record in records]
            proof = data[begin:stop]
        found.append((key, value, proof))
        at = stop
    return found


def ends_committed(batch: LogBatch) -> bool:
    """What a marker says. Raises `CorruptBatch`."""
    at = batch.at + BATCH_OVERHEAD + 5  # As every broker writes it: length, attributes, time, offset, a key of 4 bytes.
    key = batch.buffer[at : at + 4] if batch.buffer[at - 1] == 8 else bodies(batch)[0][0]
    if key not in (_ABORT, _COMMIT):
        raise CorruptBatch("a control record is not a transaction marker")
    return key == _COMMIT


def _varint(data: bytes, at: int) -> tuple[int, int]:
    raw = shift = 0
    while True:
        byte = data[at]
        at += 1
        raw |= (byte & 0x7F) << shift
        if byte < 0x80:
            return raw, at
        shift += 7


def _decoded(batch: LogBatch) -> list[bytes | None]:
    """As `proofs`, for records whose last header is another one."""
    return [proof_of(record) for record in decode_records(batch.buffer, batch.at, batch.header, "", 0)]


def proof_of(record: Record) -> bytes | None:
    """Where one record came from."""
    return next((value for name, value in reversed(record.headers) if name == PROOF), None)


def entries_of(log: Log) -> Iterator[tuple[LogBatch, list[bytes | None], bool | None]]:
    """Each batch of a log with where its records came from, and for a marker whether it commits."""
    for batch in log.batches():
        if batch.header.is_control:
            yield batch, [], ends_committed(batch)
        else:
            yield batch, proofs(batch), None

"""Kafka's field encodings for the records of the internal topics: enough of the protocol's types, nothing else.

kio generates no classes for coordinator records, so their layouts are written out by hand on these primitives
(names as in Kafka's protocol guide). A reader raises `CorruptBatch` where the bytes end too early or say nonsense.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from semel.errors import CorruptBatch

__all__ = ["FieldReader", "FieldWriter", "LogRecord"]

LogRecord = tuple[bytes, bytes | None]
"""Key and value of one record of an internal topic; a value of None says that the key is gone."""

_INT8, _INT16, _INT32, _INT64 = (struct.Struct(code) for code in (">b", ">h", ">i", ">q"))


class FieldWriter:
    """Collects encoded fields; every method returns the writer, so that a layout reads as one chain."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def __repr__(self) -> str:
        return f"<FieldWriter {sum(map(len, self._parts))} bytes>"

    def done(self) -> bytes:
        return b"".join(self._parts)

    def int8(self, value: int) -> FieldWriter:
        self._parts.append(_INT8.pack(value))
        return self

    def int16(self, value: int) -> FieldWriter:
        self._parts.append(_INT16.pack(value))
        return self

    def int32(self, value: int) -> FieldWriter:
        self._parts.append(_INT32.pack(value))
        return self

    def int64(self, value: int) -> FieldWriter:
        self._parts.append(_INT64.pack(value))
        return self

    def string(self, value: str | None) -> FieldWriter:
        if value is None:
            return self.int16(-1)
        data = value.encode()
        self.int16(len(data))
        self._parts.append(data)
        return self

    def bytes_(self, value: bytes) -> FieldWriter:
        self.int32(len(value))
        self._parts.append(value)
        return self

    def uvarint(self, value: int) -> FieldWriter:
        out = bytearray()
        while value > 0x7F:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        out.append(value)
        self._parts.append(bytes(out))
        return self

    def compact_string(self, value: str | None) -> FieldWriter:
        return self.compact_bytes(None if value is None else value.encode())

    def compact_bytes(self, value: bytes | None) -> FieldWriter:
        if value is None:
            return self.uvarint(0)
        return self.uvarint(len(value) + 1).raw(value)

    def raw(self, value: bytes) -> FieldWriter:
        """Bytes of a size that the layout fixes: a UUID, or what was encoded before."""
        self._parts.append(value)
        return self

    def count(self, value: int) -> FieldWriter:
        """The number of items of a compact array."""
        return self.uvarint(value + 1)

    def tags(self, fields: Mapping[int, bytes]) -> FieldWriter:
        """Tagged fields (KIP-482): a count, then number, size and bytes of each in ascending order."""
        self.uvarint(len(fields))
        for tag in sorted(fields):
            self.uvarint(tag).uvarint(len(fields[tag]))
            self._parts.append(fields[tag])
        return self


class FieldReader:
    """Reads fields one after another from one key or value."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __repr__(self) -> str:
        return f"<FieldReader at {self._at} of {len(self._data)} bytes>"

    def take(self, size: int) -> bytes:
        end = self._at + size
        if size < 0 or end > len(self._data):
            raise CorruptBatch(
                f"a coordinator record ends at byte {len(self._data)}; {size} bytes wanted at {self._at}"
            )
        data = self._data[self._at : end]
        self._at = end
        return data

    def int8(self) -> int:
        return int(_INT8.unpack(self.take(1))[0])

    def int16(self) -> int:
        return int(_INT16.unpack(self.take(2))[0])

    def int32(self) -> int:
        return int(_INT32.unpack(self.take(4))[0])

    def int64(self) -> int:
        return int(_INT64.unpack(self.take(8))[0])

    def string(self) -> str:
        value = self.nullable_string()
        if value is None:
            raise CorruptBatch("a coordinator record has null where a string belongs")
        return value

    def nullable_string(self) -> str | None:
        size = self.int16()
        return None if size < 0 else self._text(size)

    def bytes_(self) -> bytes:
        return self.take(self.int32())

    def uvarint(self) -> int:
        value = 0
        for shift in range(0, 35, 7):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise CorruptBatch("a coordinator record has a number of more than five bytes")

    def compact_string(self) -> str:
        return self._text(self.uvarint() - 1)

    def compact_nullable_string(self) -> str | None:
        size = self.uvarint() - 1
        return None if size < 0 else self._text(size)

    def compact_bytes(self) -> bytes:
        return self.take(self.uvarint() - 1)

    def count(self) -> int:
        """The number of items of a compact array; a null one has none."""
        return max(self.uvarint() - 1, 0)

    def tags(self) -> dict[int, bytes]:
        found = {}
        for _ in range(self.uvarint()):
            tag = self.uvarint()
            found[tag] = self.take(self.uvarint())
        return found

    def _text(self, size: int) -> str:
        try:
            return self.take(size).decode()
        except UnicodeDecodeError as error:
            raise CorruptBatch(f"a coordinator record has a string that is not UTF-8: {error}") from None

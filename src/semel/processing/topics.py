"""Topics and stores as an app declares them: names, types, and how their keys and values become bytes.

`bytes` travel raw and `str` as UTF-8; everything else is JSON through msgspec, checked against its type when read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import msgspec

from semel.errors import ConfigurationError, SemelError
from semel.processing.effects import Delete, Produce, Put
from semel.processing.limits import OUTPUT_BYTES_MAX
from semel.types import Header, Record
from semel.wire.compression import CODECS, compress

__all__ = [
    "Bound",
    "DataError",
    "Format",
    "InputRecord",
    "Serde",
    "State",
    "StateOptions",
    "StateReader",
    "StateView",
    "Topic",
    "UndecodableKey",
    "check_name",
    "serde",
]

K = TypeVar("K")
V = TypeVar("V")

NAME_CHARACTERS_MAX = 200
"""Kafka allows 249; the rest is for what Semel puts around a name (`<app>.semel.park.<topic>`)."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_KEY_TYPES = (str, bytes, int)


class DataError(SemelError):
    """The data is at fault, not the world: trying the same record again would fail again."""


class UndecodableKey(DataError):
    """The key's bytes cannot be read, so nobody can say which records belong together."""


class Serde(NamedTuple):
    """How one type becomes bytes and comes back. Both functions raise `DataError`."""

    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]
    read: Callable[[bytes], Any]
    """As `decode`, at the price of one call in C, with the errors of whoever reads."""

    def read_all(self, found: Iterable[bytes | None]) -> list[Any]:
        """Each of them; None stays None. Raises whatever `read` does."""
        read = self.read
        return [None if data is None else read(data) for data in found]


class Bound:
    """A format that belongs to one topic now. It may put a part of the value into the record's headers."""

    def write(self, value: Any, headers: Sequence[Header]) -> tuple[bytes, Sequence[Header]]:
        """The value as bytes, and the record's headers with what it adds. Raises `DataError` and `Retriable`."""
        raise NotImplementedError

    def read(self, data: bytes, headers: Sequence[Header]) -> Any:
        """The value of bytes and headers. Raises `DataError` and `Retriable`."""
        raise NotImplementedError


class Format(Generic[V]):
    """How a topic's values travel, where that is more than a type says: `Avro(Order)` in the place of `Order`."""

    kind: Any
    """What a handler gets and gives."""
    content_type: str
    """The data's media type."""

    def bind(self, topic: str) -> Bound:
        """The format for this topic. Raises `ConfigurationError` for what cannot work."""
        raise NotImplementedError


class InputRecord(NamedTuple, Generic[K, V]):
    """What a handler sees: a record with its key and value decoded. A tombstone's value is None."""

    key: K
    value: V
    headers: tuple[Header, ...]
    topic: str
    partition: int
    offset: int
    timestamp_ms: int


def check_name(name: str, what: str) -> str:
    """The name itself; raises `ConfigurationError` for one that Kafka or the file system would not take."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > NAME_CHARACTERS_MAX:
        raise ConfigurationError(
            f"{name!r} cannot name {what}: use letters, digits, '.', '_' and '-', "
            f"beginning with a letter or digit, at most {NAME_CHARACTERS_MAX} characters."
        )
    return name


def _text(what: str) -> Serde:
    def encode(value: Any) -> bytes:
        if not isinstance(value, str):
            raise DataError(f"{what} is declared as str, got {type(value).__name__} {value!r:.80}")
        try:
            return value.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{what} {value!r:.80} is not valid text: {error.reason}") from error

    def decode(data: bytes) -> Any:
        try:
            return str(data, "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{what} {data[:40]!r} is not UTF-8") from error

    return Serde(encode, decode, bytes.decode)


def _raw(what: str) -> Serde:
    def encode(value: Any) -> bytes:
        if not isinstance(value, bytes | bytearray | memoryview):
            raise DataError(f"{what} is declared as bytes, got {type(value).__name__} {value!r:.80}")
        return bytes(value)

    return Serde(encode, bytes, bytes)


def _json(kind: Any, what: str) -> Serde:
    to_bytes = msgspec.json.Encoder().encode
    from_bytes = msgspec.json.Decoder(kind).decode
    # Only plain classes are compared here: the reader checks every other shape by decoding.
    plain = kind if isinstance(kind, type) and getattr(kind, "__origin__", None) is None else None
    if isinstance(plain, type) and not (issubclass(plain, msgspec.Struct) or plain is int):
        plain = None

    def encode(value: Any) -> bytes:
        if plain is not None and not isinstance(value, plain):
            raise DataError(f"{what} is declared as {plain.__name__}, got {type(value).__name__} {value!r:.80}")
        try:
            return to_bytes(value)
        except (TypeError, ValueError, OverflowError, msgspec.MsgspecError, RecursionError) as error:
            raise DataError(f"{what} cannot be written as JSON: {error}") from error

    def decode(data: bytes) -> Any:
        try:
            return from_bytes(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise DataError(f"{what} is not a valid {_type_name(kind)}: {error}") from error

    return Serde(encode, decode, from_bytes)


def _type_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)


def _unsupported(info: Any, seen: set[int]) -> Any:
    """The first type inside `info` that msgspec knows nothing about, or None."""
    if isinstance(info, msgspec.inspect.CustomType):
        return info.cls
    if id(info) in seen:
        return None
    seen.add(id(info))
    for name in getattr(info, "__struct_fields__", ()):
        inner = getattr(info, name)
        for item in inner if isinstance(inner, tuple) else (inner,):
            if isinstance(item, msgspec.inspect.Type | msgspec.inspect.Field):
                found = _unsupported(item, seen)
                if found is not None:
                    return found
    return None


def serde(kind: Any, what: str, *, key: bool = False) -> Serde:
    """The serde of a declared type; `what` names the declaration in errors.

    Raises `ConfigurationError` for a type that cannot be written and read back.
    """
    if key and kind not in _KEY_TYPES:
        raise ConfigurationError(
            f"{what}: a key is str, bytes or int, not {_type_name(kind)}. "
            "Equal keys must be equal bytes, or their order is lost."
        )
    if isinstance(kind, Format):
        raise ConfigurationError(f"{what}: {kind!r} is a form of a topic's values only.")
    if kind is bytes:
        return _raw(what)
    if kind is str:
        return _text(what)
    try:
        found = _unsupported(msgspec.inspect.type_info(kind), set())
        if found is None:
            return _json(kind, what)
    except (TypeError, NameError) as error:
        raise ConfigurationError(f"{what}: {_type_name(kind)} cannot be read from JSON: {error}.") from error
    raise ConfigurationError(
        f"{what}: {_type_name(found)} cannot be read from JSON. "
        "Use a msgspec.Struct, a dataclass, a TypedDict, or built-in types."
    )


class Topic(Generic[K, V]):
    """A topic of an app: made by `app.topic(...)`.

    `partitions` None leaves the count to the settings. `record` makes an effect for a handler to yield.
    """

    def __init__(
        self,
        name: str,
        key: type[K],
        value: type[V] | Format[V],
        partitions: int | None = None,
        compression: str = "none",
    ) -> None:
        self.name = check_name(name, "a topic")
        if partitions is not None and (not isinstance(partitions, int) or partitions < 1):
            raise ConfigurationError(
                f"topic {name}: partitions={partitions!r}, but a topic has a whole number of them, from 1."
            )
        self.partitions = partitions
        if compression not in CODECS:
            raise ConfigurationError(
                f"topic {name}: compression={compression!r}, but batches are compressed with {', '.join(CODECS)}."
            )
        self.codec = CODECS.index(compression)
        """The codec of the batches that are written to it, as record batches number them."""
        compress(self.codec, b"")  # Says now if its package is not there.
        self.key_type = key
        self.value_type = value
        self._key = serde(key, f"the key of topic {name}", key=True)
        self.bound = value.bind(name) if isinstance(value, Format) else None
        """The values' format, where they have one beyond their type."""
        self._value = serde(value, f"the value of topic {name}") if self.bound is None else None

    def __repr__(self) -> str:
        return f"<Topic {self.name} key={_type_name(self.key_type)} value={_type_name(self.value_type)}>"

    def record(self, key: K | None, value: V | None, *, headers: Sequence[Header] = ()) -> Produce:
        """An effect: append this record. Records with one key stay in order; a value of None is a tombstone."""
        return Produce(self, key, value, tuple(headers)) if headers else Produce(self, key, value)

    def encode_key(self, key: K | None) -> bytes | None:
        """Bytes of a key; None stays None. Raises `DataError`."""
        return None if key is None else self._key.encode(key)

    def encode_value(self, value: V | None) -> bytes | None:
        """Bytes of a value whose form is its type alone; None, a tombstone, stays None. Raises `DataError`."""
        assert self._value is not None, "a format may add headers: use `write`"
        return None if value is None else self._value.encode(value)

    def write(self, value: V | None, headers: Sequence[Header]) -> tuple[bytes | None, Sequence[Header]]:
        """Bytes of a value of any form, and the record's headers, to which its form may add.

        Raises `DataError`, and `Retriable` while its format cannot work.
        """
        if value is None or self.bound is None:
            return self.encode_value(value) if value is not None else None, headers
        return self.bound.write(value, headers)

    def decode(self, record: Record) -> InputRecord[K, V]:
        """The record as a handler sees it. Raises `UndecodableKey`, `DataError` for the value, and `Retriable`."""
        key: Any = record.key
        if key is not None:
            try:
                key = self._key.decode(key)
            except DataError as error:
                raise UndecodableKey(str(error)) from error
        value: Any = record.value
        if value is not None:
            if self._value is not None:
                value = self._value.decode(value)
            elif self.bound is not None:
                value = self.bound.read(value, record.headers)
        return InputRecord(
            key, value, record.headers, record.topic, record.partition, record.offset, record.timestamp_ms
        )

    def decode_all(self, records: Sequence[Record]) -> list[InputRecord[K, V]]:
        """As `decode` for each of them, at a third of the price where nothing is wrong with any."""
        if self._value is None or not records:
            return [self.decode(record) for record in records]
        topics, partitions, offsets, timestamps, keys, values, headers = zip(*records, strict=True)
        try:
            found = self._key.read_all(keys), self._value.read_all(values)
        except Exception:  # Which one it is, and whose fault, `decode` says.
            return [self.decode(record) for record in records]
        fields = zip(*found, headers, topics, partitions, offsets, timestamps, strict=True)
        return list(map(tuple.__new__, repeat(InputRecord), fields))


class StateOptions(NamedTuple):
    """Limits of a store; see `App.state`."""

    ttl_ms: int | None = None
    value_bytes_max: int = OUTPUT_BYTES_MAX
    bytes_max: int | None = None


class State(Generic[K, V]):
    """A store of an app: made by `app.state(...)`, kept by the partition of the records that change it.

    A handler gets a view of it (`get`); `put` and `delete` are effects to yield.
    """

    def __init__(
        self,
        name: str,
        key: type[K],
        value: type[V],
        *,
        ttl_seconds: float | None = None,
        value_bytes_max: int | None = None,
        bytes_max: int | None = None,
    ) -> None:
        self.name = check_name(name, "a store")
        if ttl_seconds is not None and not ttl_seconds >= 0.001:
            raise ConfigurationError(f"state {name}: ttl_seconds={ttl_seconds!r}, but it is a time in seconds.")
        largest = OUTPUT_BYTES_MAX if value_bytes_max is None else value_bytes_max
        if not 1 <= largest <= OUTPUT_BYTES_MAX:
            raise ConfigurationError(
                f"state {name}: value_bytes_max={value_bytes_max!r}, but a key and its value have 1 to "
                f"{OUTPUT_BYTES_MAX} bytes, which is what Kafka takes."
            )
        if bytes_max is not None and bytes_max < 1:
            raise ConfigurationError(f"state {name}: bytes_max={bytes_max!r}, but it is a number of bytes, from 1.")
        ttl_ms = None if ttl_seconds is None else int(ttl_seconds * 1000)
        self.options = StateOptions(ttl_ms, largest, bytes_max)
        self.key_type = key
        self.value_type = value
        self.key_serde = serde(key, f"the key of state {name}", key=True)
        self.value_serde = serde(value, f"the value of state {name}")

    def __repr__(self) -> str:
        return f"<State {self.name} key={_type_name(self.key_type)} value={_type_name(self.value_type)}>"

    def put(self, key: K, value: V) -> Put:
        """An effect: from now on `key` has this value."""
        return Put(self, key, value)

    def delete(self, key: K) -> Delete:
        """An effect: from now on `key` has no value."""
        return Delete(self, key)


class StateReader(Protocol):
    """Reads the stores of the partition that the record at hand is in, as bytes."""

    def get(self, store: str, key: bytes) -> bytes | None:
        """The value of a key: what this record changed, else what this unit of work changed, else what is committed."""

    def items(self, store: str) -> Iterator[tuple[bytes, bytes]]:
        """Every key and value, those that were written longest ago first. Do not yield effects while iterating."""

    def prefixed(self, store: str, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        """The keys that begin with `prefix` and their values, in the order of keys."""


class StateView(Generic[K, V]):
    """What a handler sees of a store: the committed values, and over them what this unit of work has changed."""

    __slots__ = ("_state", "_stores")

    def __init__(self, state: State[K, V], stores: StateReader) -> None:
        self._state = state
        self._stores = stores

    def get(self, key: K, default: V | None = None) -> V | None:
        """The value of `key`, or `default`. Raises `DataError` when the stored bytes are not of the declared type."""
        state = self._state
        data = self._stores.get(state.name, state.key_serde.encode(key))
        return default if data is None else state.value_serde.decode(data)

    def __contains__(self, key: K) -> bool:
        return self._stores.get(self._state.name, self._state.key_serde.encode(key)) is not None

    def items(self, prefix: str | bytes = b"") -> Iterator[tuple[K, V]]:
        """Keys that begin with `prefix` and their values, in the order of the keys' bytes.

        They are those of the partition of the record at hand, as they are when this begins: what the handler changes
        meanwhile is not among them. Keys of type int are ordered as text and have no prefix.
        """
        state = self._state
        if prefix and state.key_type is int:
            raise DataError(f"state {state.name} has keys of type int, which have no prefix")
        start = prefix.encode() if isinstance(prefix, str) else prefix
        for key, value in self._stores.prefixed(state.name, start):
            yield state.key_serde.decode(key), state.value_serde.decode(value)

    def put(self, key: K, value: V) -> Put:
        """An effect for the handler to yield: from now on `key` has this value."""
        return Put(self._state, key, value)

    def delete(self, key: K) -> Delete:
        """An effect for the handler to yield: from now on `key` has no value."""
        return Delete(self._state, key)

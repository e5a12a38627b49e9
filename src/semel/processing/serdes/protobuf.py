"""`Protobuf(OrderPb)`: a topic's values as messages of a generated class. Needs `semel[protobuf]` and a registry.

The registry gets the file of the message and the files that it imports, each under its own name; Google's well-known
types are known to it.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any, Generic, TypeVar
from uuid import UUID

from semel.errors import ConfigurationError
from semel.processing.serdes.formats import Registered, guarded, imported
from semel.processing.serdes.registry import Reference, Registry, Schema
from semel.processing.topics import DataError, Format

__all__ = ["Protobuf"]

V = TypeVar("V")
_WELL_KNOWN = ("google/protobuf/", "google/type/", "confluent/")
"""Files that a registry knows by itself."""


class Protobuf(Format[V], Generic[V]):
    """Values of a message class that protoc generated.

    `register=False`: the schema has to be in the registry already. `subject` is `<topic>-value` unless it is given.
    With `guid` the schema is named in the header `__value_schema_id` and not in front of the value.
    """

    content_type = "application/protobuf"

    def __init__(self, kind: type[V], *, subject: str | None = None, register: bool = True, guid: bool = False) -> None:
        self.kind, self._guid = kind, guid
        self._subject, self._register = subject, register

    def __repr__(self) -> str:
        return f"Protobuf({getattr(self.kind, '__name__', self.kind)})"

    def bind(self, topic: str) -> Registered:
        """See `Format`. Raises `ConfigurationError` for what is no message class."""
        bound = _Protobuf(topic, self.kind, subject=self._subject or f"{topic}-value", register=self._register)
        bound.by_guid = self._guid
        return bound


class _Protobuf(Registered):
    def __init__(self, topic: str, kind: Any, *, subject: str, register: bool) -> None:
        super().__init__(topic, subject=subject, register=register)
        self._kind: Any = kind
        message = imported("google.protobuf.message", "protobuf")
        if not (isinstance(kind, type) and issubclass(kind, message.Message)):
            raise ConfigurationError(f"{self.what}: {kind!r} is no message class that protoc generated.")
        self._descriptor: Any = self._kind.DESCRIPTOR
        self.indexes = _way_to(self._descriptor)
        self.schema = Schema(_text(self._descriptor.file), "PROTOBUF")
        self._names: dict[tuple[int | UUID, tuple[int, ...]], str] = {}

    def _resolved(self, registry: Registry) -> Schema:
        self.schema = self.schema._replace(references=tuple(self._imports(registry, self._descriptor.file)))
        return self.schema

    def _imports(self, registry: Registry, file: Any) -> Iterator[Reference]:
        """Register what a file imports, innermost first."""
        for needed in file.dependencies:
            if needed.name.startswith(_WELL_KNOWN):
                continue
            schema = Schema(_text(needed), "PROTOBUF", tuple(self._imports(registry, needed)))
            registry.register(needed.name, schema)
            yield Reference(needed.name, needed.name, registry.version_of(needed.name, schema))

    def encode(self, value: Any) -> bytes:
        if not isinstance(value, self._kind):
            raise DataError(
                f"{self.what} is declared as {self._kind.__name__}, got {type(value).__name__} {value!r:.80}"
            )
        data: bytes = guarded(f"{self.what} cannot be written", value.SerializeToString)
        return data

    def decode(self, schema: int | UUID, indexes: tuple[int, ...], data: bytes) -> Any:
        if indexes != self.indexes or schema != self._id:
            self._check_message(schema, indexes)
        message = self._kind()
        guarded(f"{self.what} is no {self._descriptor.full_name}", lambda: message.ParseFromString(data))
        return message

    def _check_message(self, schema: int | UUID, indexes: tuple[int, ...]) -> None:
        """Any bytes may parse as any message: so another message of the file must not pass for ours.

        In a file of another version the same place is another message only if somebody put one before it; the
        registry tells, if it gives files in their serialized form.
        """
        name = self._names.get((schema, indexes))
        if name is None:
            name = self._names[schema, indexes] = self._name_of(schema, indexes)
        if name not in ("", self._descriptor.full_name):
            raise DataError(f"{self.what} is a {name}, and the topic is declared as {self._descriptor.full_name}")

    def _name_of(self, schema: int | UUID, indexes: tuple[int, ...]) -> str:
        """The full name of a message; empty where only its place tells, and it is the same as ours."""
        file = self._file_of(schema)
        if file is None:
            if indexes != self.indexes:
                place, ours = (".".join(map(str, item)) for item in (indexes, self.indexes or ()))
                return f"message at place {place} of schema {schema} (ours is at {ours})"
            return ""
        found: Any = file
        names = [file.package] if file.package else []
        for depth, index in enumerate(indexes):
            inner = found.message_type if depth == 0 else found.nested_type
            if not 0 <= index < len(inner):
                raise DataError(f"{self.what} names a message that schema {schema} does not have")
            found = inner[index]
            names.append(found.name)
        return ".".join(names)

    def _file_of(self, schema: int | UUID) -> Any:
        """The FileDescriptorProto of a schema; None when the registry has it as text. Raises `Retriable`."""
        if schema == self._id:
            text = self.schema.text
        else:
            found = self._find(schema)
            if found.kind != "PROTOBUF":
                raise DataError(f"{self.what}: schema {schema} is {found.kind}")
            text = found.text
        descriptors = imported("google.protobuf.descriptor_pb2", "protobuf")
        try:
            return descriptors.FileDescriptorProto.FromString(base64.b64decode(text, validate=True))
        except Exception:  # It is the text of a .proto file.
            return None


def _text(file: Any) -> str:
    """A file as registries take it: its descriptor in base64."""
    return base64.b64encode(file.serialized_pb).decode()


def _way_to(descriptor: Any) -> tuple[int, ...]:
    """Where a message stands in its file, outermost first."""
    if descriptor.containing_type is None:
        names = [item.name for item in descriptor.file.message_types_by_name.values()]
        return (names.index(descriptor.name),)
    outer = descriptor.containing_type
    names = [item.name for item in outer.nested_types]
    return (*_way_to(outer), names.index(descriptor.name))

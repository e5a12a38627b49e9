"""What the formats of a schema registry have in common: a subject, a schema's id, and what is done at the start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

from semel.errors import ConfigurationError, Retriable
from semel.processing.serdes.framing import VALUE_HEADER, frame, header, unframe
from semel.processing.serdes.registry import Registry, Schema
from semel.processing.topics import Bound, DataError
from semel.types import Header

__all__ = ["Registered", "guarded", "imported"]

_SAID_CHARACTERS_MAX = 500
"""Of what a codec says: some quote both schemas whole."""


class Registered(Bound):
    """One topic's values in a form that a schema describes, framed as `semel.processing.serdes.framing` says.

    Nothing can be written or read before `attach`: until then whoever tries is told to try again.
    """

    schema: Schema
    """What this app writes, and how it reads."""
    indexes: tuple[int, ...] | None = None
    """Protobuf only: which message of the schema."""

    def __init__(self, topic: str, *, subject: str, register: bool) -> None:
        self.what = f"the value of topic {topic}"
        self.subject = subject
        self._register = register
        self._registry: Registry | None = None
        self._prefix: bytes | None = None
        self.by_guid = False
        """Whether a header says which schema it is, by its GUID, and the value is only the data."""
        self._header: Header | None = None
        self._id: int | None = None

    @property
    def is_attached(self) -> bool:
        """Whether a registry was asked."""
        return self._registry is not None

    def attach(self, registry: Registry, *, register: bool = True) -> None:
        """Register the schema, or with `register=False` only find it, and use this registry from now on.

        Raises `Incompatible`: its subject has versions that this schema does not go with; `ConfigurationError`;
        `Retriable`: the registry does not answer.
        """
        schema = self._resolved(registry)
        if register and self._register:
            number: int | None = registry.register(self.subject, schema)
        else:
            number = registry.look_up(self.subject, schema)
        named = header(registry.guid_of(self.subject, schema), self.indexes) if self.by_guid and number else None
        self._registry, self._id, self._header = registry, number, named
        self._prefix = None if number is None else frame(number, self.indexes)

    def _resolved(self, registry: Registry) -> Schema:  # noqa: ARG002
        """The schema with its references, which are registered before it."""
        return self.schema

    def _find(self, schema: int | UUID) -> Schema:
        if self._registry is None:
            raise self._not_attached()
        return self._registry.find(schema)

    def _not_attached(self) -> Exception:
        return Retriable(
            f"{self.what} goes by a schema registry, which was not asked yet. `semel run` does that at its start, and "
            "so does semel.testing."
        )

    # --- Bound ---

    def write(self, value: Any, headers: Sequence[Header]) -> tuple[bytes, Sequence[Header]]:
        """See `Bound`. Raises `DataError` for a value that the schema does not take, and `Retriable`."""
        prefix = self._prefix
        if prefix is None:
            if self._registry is None:
                raise self._not_attached()
            raise Retriable(
                f"{self.what} cannot be written: its schema is not registered under subject {self.subject}, and this "
                "app does not register it (register=False). Register it, and start again."
            )
        if self._header is not None:
            return self.encode(value), (*(item for item in headers if item[0] != VALUE_HEADER), self._header)
        return prefix + self.encode(value), headers

    def read(self, data: bytes, headers: Sequence[Header]) -> Any:
        """See `Bound`. Raises `DataError` for bytes that nobody can read, and `Retriable`."""
        framed = unframe(data, headers, self.what, is_protobuf=self.indexes is not None)
        return self.decode(framed.schema, framed.indexes, framed.data)

    # --- For each format ---

    def encode(self, value: Any) -> bytes:
        """The data alone. Raises `DataError`."""
        raise NotImplementedError

    def decode(self, schema: int | UUID, indexes: tuple[int, ...], data: bytes) -> Any:
        """The value of data that this schema wrote. Raises `DataError` and `Retriable`."""
        raise NotImplementedError


def imported(module: str, extra: str) -> Any:
    """An optional package. Raises `ConfigurationError` when it is not installed."""
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigurationError(f"{module} is not installed: pip install 'semel[{extra}]'.") from error


def guarded(what: str, work: Callable[[], Any]) -> Any:
    """What a codec gives; whatever it raises is the data's fault."""
    try:
        return work()
    except DataError:
        raise
    except Exception as error:  # Codecs raise what they stumble over: KeyError, struct.error, EOFError, ...
        raise DataError(f"{what}: {(str(error) or type(error).__name__)[:_SAID_CHARACTERS_MAX]}") from error

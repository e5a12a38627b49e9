"""Which record codec is at work: the one in C where it was built, the one in pure Python otherwise.

Both do the same with the same errors (tests/wire runs on both, and one against the other). `SEMEL_CODEC=python` or
`native` insists on one; `semel --version` says which it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple, Protocol

from semel.errors import ConfigurationError
from semel.settings import codec_choice
from semel.types import Header, Record
from semel.wire import pycodec
from semel.wire.pycodec import Body, Buffer, Output

__all__ = ["Choice", "Codec", "choose", "chosen", "in_use"]


class Codec(Protocol):
    """What an implementation has; `semel.wire.pycodec` says what each function does and raises."""

    def decode(
        self,
        buffer: Buffer,
        start: int,
        stop: int,
        count: int,
        base_offset: int,
        base_timestamp: int,
        append_time: int | None,
        last_offset_delta: int,
        topic: str,
        partition: int,
        /,
    ) -> list[Record]: ...
    def encode(self, records: list[Output], partitions: int, limit: int, /) -> list[Body]: ...
    def encode_record(
        self,
        timestamp_delta: int,
        offset_delta: int,
        key: bytes | None,
        value: bytes | None,
        headers: Sequence[Header],
        /,
    ) -> bytes: ...
    def murmur2(self, key: bytes, /) -> int: ...
    def partition(self, key: bytes, partitions: int, /) -> int: ...


class Choice(NamedTuple):
    """An implementation, and how it came to be the one."""

    codec: Codec
    name: str
    """`native` or `python`."""
    why: str
    """What it says of itself in `semel --version`."""


def choose(wish: str) -> Choice:
    """The implementation that `wish` names, or the faster there is. Raises `ConfigurationError` if it is not there."""
    if wish == "python":
        return Choice(pycodec, "python", "python, as SEMEL_CODEC says")
    try:
        return Choice(import_module("semel.wire._codec"), "native", "native")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        why = "it was installed without a C compiler" if missing else f"it cannot be loaded: {error}"
    if wish == "native":
        raise ConfigurationError(
            f"SEMEL_CODEC=native, but there is no codec in C: {why}. "
            "Install semel again where a C compiler and Python's headers are, or unset SEMEL_CODEC."
        )
    return Choice(pycodec, "python", f"python; the one in C is faster, but {why}")


chosen = choose(codec_choice())
in_use: Codec = chosen.codec
"""Read it from the module at each call (`codec.in_use.decode`): tests put another one in its place."""

"""What a handler gets as `cache`: it notes commands, which become the arguments of one script."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Final

from semel.errors import SemelError

__all__ = ["ARGUMENTS_MAX", "EFFECTS_MAX", "EFFECT_BYTES_MAX", "CacheEffects", "EffectRefused", "Key", "Value"]

Key = str | bytes
Value = str | bytes | int | float

EFFECTS_MAX: Final = 20_000
"""Commands in one script: the server serves nobody else meanwhile, for some ten milliseconds."""
EFFECT_BYTES_MAX: Final = 16 * 1024 * 1024
"""Bytes of their keys and values; the server holds them about three times while the script runs."""
ARGUMENTS_MAX: Final = 1_000
"""Arguments of one command; Lua's stack takes some thousands. Longer ones are cut into several commands."""
INTEGER_MAX: Final = 9 * 10**18
"""The largest step of a counter; the server counts in 64 bits."""


class EffectRefused(SemelError):
    """An effect that cannot be carried out as it was noted."""


class CacheEffects:
    """Commands that change one key each, in the order in which they will be done. Nothing is read here.

    Valid while the handler runs. Keys and text are written as UTF-8, numbers in decimal.
    """

    __slots__ = ("_bytes", "_open", "commands")

    def __init__(self) -> None:
        self._open = True
        self._bytes = 0
        self.commands: list[tuple[bytes, ...]] = []
        """Each as name, key, arguments."""

    def __repr__(self) -> str:
        return f"<CacheEffects {len(self.commands)} commands, {self._bytes} bytes>"

    # Strings and counters.

    def set(self, key: Key, value: Value, *, ttl_seconds: float | None = None) -> None:
        """Set a string, whatever the key held before; with `ttl_seconds` it is gone after that time."""
        self._note("SET", key, value, *(() if ttl_seconds is None else ("PX", _milliseconds(ttl_seconds))))

    def incrby(self, key: Key, by: int = 1) -> None:
        """Count; a key that is not there counts from 0."""
        self._note("INCRBY", key, _step(by))

    def delete(self, *keys: Key) -> None:
        """Delete keys, of whatever kind."""
        for key in keys:
            self._note("DEL", key)

    def expire(self, key: Key, ttl_seconds: float) -> None:
        """Let a key be gone after that time, if it is there."""
        self._note("PEXPIRE", key, _milliseconds(ttl_seconds))

    # Hashes.

    def hset(self, key: Key, fields: Mapping[Key, Value]) -> None:
        """Set fields of a hash."""
        self._note_many("HSET", key, [part for pair in fields.items() for part in pair])

    def hdel(self, key: Key, *fields: Key) -> None:
        """Delete fields of a hash."""
        self._note_many("HDEL", key, fields)

    def hincrby(self, key: Key, field: Key, by: int = 1) -> None:
        """Count in a field of a hash."""
        self._note("HINCRBY", key, field, _step(by))

    # Sets, sorted sets, lists.

    def sadd(self, key: Key, *members: Value) -> None:
        """Put members into a set."""
        self._note_many("SADD", key, members)

    def srem(self, key: Key, *members: Value) -> None:
        """Take members out of a set."""
        self._note_many("SREM", key, members)

    def zadd(self, key: Key, scores: Mapping[Key, int | float]) -> None:
        """Put members with scores into a sorted set."""
        self._note_many("ZADD", key, [part for member, score in scores.items() for part in (_number(score), member)])

    def zincrby(self, key: Key, member: Key, by: int | float = 1) -> None:
        """Add to a member's score."""
        self._note("ZINCRBY", key, _number(by), member)

    def zrem(self, key: Key, *members: Value) -> None:
        """Take members out of a sorted set."""
        self._note_many("ZREM", key, members)

    def lpush(self, key: Key, *items: Value) -> None:
        """Put items at the head of a list, one after the other."""
        self._note_many("LPUSH", key, items)

    def rpush(self, key: Key, *items: Value) -> None:
        """Put items at the end of a list."""
        self._note_many("RPUSH", key, items)

    def ltrim(self, key: Key, start: int, stop: int) -> None:
        """Keep the items from `start` to `stop` only; negative ones count from the end."""
        self._note("LTRIM", key, _step(start), _step(stop))

    @property
    def noted(self) -> list[tuple[bytes, ...]]:
        """The commands."""
        return self.commands

    def end(self) -> None:
        """The handler returned or raised: nothing can be noted any more."""
        self._open = False

    def _note_many(self, name: str, key: Key, arguments: Iterable[Value]) -> None:
        found = list(arguments)
        for at in range(0, len(found), ARGUMENTS_MAX):
            self._note(name, key, *found[at : at + ARGUMENTS_MAX])

    def _note(self, name: str, key: Key, *arguments: Value) -> None:
        if not self._open:
            raise EffectRefused(
                "commands are noted after the handler ended, or the transaction: the script is made up. Note them "
                "inside only."
            )
        if not isinstance(key, str | bytes) or not key:
            raise EffectRefused(f"{name}: a key is text or bytes, and not empty; this is {key!r:.100}.")
        raw = tuple(_bytes(name, part) for part in (name, key, *arguments))
        if raw[1].startswith(b"semel:"):
            raise EffectRefused(f"{name} {key!r}: keys that begin with 'semel:' are Semel's own.")
        self._bytes += sum(map(len, raw))
        if len(self.commands) >= EFFECTS_MAX or self._bytes > EFFECT_BYTES_MAX:
            raise EffectRefused(
                f"the effects are more than {EFFECTS_MAX} commands or {EFFECT_BYTES_MAX} bytes, which is what one "
                "script may hold."
            )
        self.commands.append(raw)


def _bytes(name: str, value: Value) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise EffectRefused(f"{name}: values are text, bytes, int or float; this is {value!r:.100}. Encode it.")
    return (str(value) if isinstance(value, int) else _number(value)).encode()


def _number(value: int | float) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise EffectRefused(f"{value!r:.100} is no number that can be stored.")
    return repr(value)


def _step(value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > INTEGER_MAX:
        raise EffectRefused(f"{value!r:.100} is no whole number of at most {INTEGER_MAX}.")
    return value


def _milliseconds(seconds: float) -> int:
    found = round(seconds * 1000)
    if not 0 < found < 10**14:
        raise EffectRefused(f"a time to live of {seconds!r} s: it has to be between 1 ms and some thousand years.")
    return found

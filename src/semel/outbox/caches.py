"""`app.transaction(cache)`: commands on a Valkey or Redis, and the records that they send, all of it or nothing.

What is read comes from the server at once, and is watched; what is changed is noted, and done in one script when the
block ends. So a transaction does not see its own changes, and one that read what somebody else changed meanwhile is
told so by `Conflict`, and happened in no part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from semel.databases.valkey.effects import CacheEffects, EffectRefused, Key, Value
from semel.dualwrite.steps import StepSession
from semel.dualwrite.valkey.session import READS, Condition, ValkeySession, Work
from semel.outbox.transaction import Block, Sending, finished

if TYPE_CHECKING:
    from semel.outbox.writer import AnySession, Writer

__all__ = ["AsyncCacheTransaction", "CacheBlock", "CacheTransaction"]

CONDITIONS_MAX: Final = 1_000
"""Conditions of one transaction: they are looked at while the server serves nobody else."""
_LEAST_MAX: Final = 9 * 10**18


class _InCache(Sending, CacheEffects):
    """What both colours share: commands that are noted, and conditions."""

    _session: StepSession[Work]

    def __init__(self, writer: Writer, session: AnySession) -> None:
        Sending.__init__(self, writer, session)
        CacheEffects.__init__(self)
        self._conditions: list[Condition] = []

    def require(self, key: Key, *, at_least: int, field: Key | None = None) -> None:
        """Let the transaction happen only if the integer at `key`, or in `field` of the hash there, is `at_least` this
        when the block ends; what is not there counts as 0. Otherwise the end raises `ConditionFailed`.

        The server looks in the step that does everything, so nothing has to be read, and others that change the same
        counter are in nobody's way: right for a balance, a stock, a quota.
        """
        self._check_open("states a condition")
        if isinstance(at_least, bool) or not isinstance(at_least, int) or abs(at_least) > _LEAST_MAX:
            raise EffectRefused(f"at_least={at_least!r:.100} is no whole number of at most {_LEAST_MAX}.")
        if len(self._conditions) >= CONDITIONS_MAX:
            raise EffectRefused(f"one transaction has at most {CONDITIONS_MAX} conditions.")
        self._conditions.append(Condition(_raw(key), at_least, None if field is None else _raw(field)))

    def _read(self, name: str, key: Key, arguments: Iterable[Value]) -> Any:
        self._check_open("reads")
        name = name.upper()
        if name not in READS:
            raise EffectRefused(
                f"{name} is none of the commands that a transaction reads with: {', '.join(sorted(READS))}."
            )
        target = self._session.target
        assert isinstance(target, ValkeySession)
        return target.read(name, _raw(key), *(_argument(item) for item in arguments))

    def _commit(self) -> None:
        self.end()
        self._writer.commit(self._session, self._outgoing.rows, Work(self.commands, self._conditions))


class CacheTransaction(_InCache):
    """The inside of `with app.transaction(cache) as tx:`. Beside what is here it has the commands of `CacheEffects`."""

    def get(self, key: Key) -> bytes | None:
        """The string at a key; None where there is none. The key is watched from here on."""
        found: bytes | None = self._read("GET", key, ())
        return found

    def hget(self, key: Key, field: Key) -> bytes | None:
        """One field of a hash. The key is watched from here on."""
        found: bytes | None = self._read("HGET", key, (field,))
        return found

    def hgetall(self, key: Key) -> dict[bytes, bytes]:
        """All fields of a hash. The key is watched from here on."""
        return _pairs(self._read("HGETALL", key, ()))

    def read(self, command: str, key: Key, *arguments: Value) -> Any:
        """What another command that reads answers, as the driver gives it. The key is watched from here on."""
        return self._read(command, key, arguments)


class AsyncCacheTransaction(_InCache):
    """The inside of `async with app.transaction(cache) as tx:`. Beside what is here it has the commands of
    `CacheEffects`, which are only noted, and not awaited."""

    async def get(self, key: Key) -> bytes | None:
        """The string at a key; None where there is none. The key is watched from here on."""
        found: bytes | None = await self.read("GET", key)
        return found

    async def hget(self, key: Key, field: Key) -> bytes | None:
        """One field of a hash. The key is watched from here on."""
        found: bytes | None = await self.read("HGET", key, field)
        return found

    async def hgetall(self, key: Key) -> dict[bytes, bytes]:
        """All fields of a hash. The key is watched from here on."""
        return _pairs(await self.read("HGETALL", key))

    async def read(self, command: str, key: Key, *arguments: Value) -> Any:
        """What another command that reads answers, as the driver gives it. The key is watched from here on."""
        return await finished(self._writer.submit(self._read, command, key, arguments))


class CacheBlock(Block[CacheTransaction, AsyncCacheTransaction]):
    """`app.transaction(cache)`. The end may raise `Conflict` (run it again) and `ConditionFailed`."""

    _colours = (CacheTransaction, AsyncCacheTransaction)


def _raw(key: Key) -> bytes:
    if not isinstance(key, str | bytes) or not key:
        raise EffectRefused(f"a key is text or bytes, and not empty; this is {key!r:.100}.")
    raw = key if isinstance(key, bytes) else key.encode()
    if raw.startswith(b"semel:"):
        raise EffectRefused(f"{key!r:.100}: keys that begin with 'semel:' are Semel's own.")
    return raw


def _argument(value: Value) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


def _pairs(found: Any) -> dict[bytes, bytes]:
    if isinstance(found, Mapping):
        return dict(found)
    return dict(zip(found[::2], found[1::2], strict=True))

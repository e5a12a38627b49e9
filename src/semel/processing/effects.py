"""Effects: what a handler wants to happen, as values.

A handler yields effects and does nothing itself, so a test can look at them, and all of them are known before the
transaction that makes them real is opened. `Produce`, `Put` and `Delete` carry the app's types; `Write` and `Change`
are the same with bytes, for components that know no types.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Awaitable, Callable, Generator, Iterable
from inspect import isasyncgen, isawaitable
from types import GeneratorType
from typing import TYPE_CHECKING, Any

import msgspec

from semel.failpoints import failpoint
from semel.types import Header

if TYPE_CHECKING:
    from semel.processing.topics import State, Topic

__all__ = ["Change", "Delete", "Effect", "Produce", "Put", "Write", "begin", "lower", "perform", "take"]


class Produce(msgspec.Struct, frozen=True):
    """Append one record to a topic; its key decides the partition."""

    topic: Topic[Any, Any]
    key: Any
    value: Any
    headers: tuple[Header, ...] = ()


class Put(msgspec.Struct, frozen=True):
    """Give a key of a store a value."""

    state: State[Any, Any]
    key: Any
    value: Any


class Delete(msgspec.Struct, frozen=True):
    """Take a key out of a store."""

    state: State[Any, Any]
    key: Any


class Write(msgspec.Struct, frozen=True):
    """Append bytes to a topic. `partition` None: the key decides, as Kafka's default partitioner does."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: tuple[Header, ...] = ()
    partition: int | None = None


class Change(msgspec.Struct, frozen=True):
    """Give a key of a store bytes, or with None take it out."""

    store: str
    key: bytes
    value: bytes | None


Effect = Produce | Put | Delete | Write | Change
_EFFECTS = (Produce, Put, Delete, Write, Change)


def lower(effect: Effect) -> Write | Change:
    """The effect in bytes. Raises `DataError` when a key or value is not of its declared type."""
    if isinstance(effect, Produce):
        topic = effect.topic
        if topic.bound is None:
            return Write(topic.name, topic.encode_key(effect.key), topic.encode_value(effect.value), effect.headers)
        value, headers = topic.write(effect.value, effect.headers)
        return Write(topic.name, topic.encode_key(effect.key), value, tuple(headers))
    if isinstance(effect, Put):
        state = effect.state
        return Change(state.name, state.key_serde.encode(effect.key), state.value_serde.encode(effect.value))
    if isinstance(effect, Delete):
        return Change(effect.state.name, effect.state.key_serde.encode(effect.key), None)
    return effect


def take(effect: Any, emit: Callable[[Effect], None]) -> None:
    """Hand one effect over. Raises `TypeError` for what is none."""
    if not isinstance(effect, _EFFECTS):
        raise TypeError(
            f"a handler yielded {type(effect).__name__} {effect!r:.80}, which is not an effect: "
            "yield topic.record(...), state.put(...) or state.delete(...)"
        )
    emit(effect)
    failpoint("handler.between_effects")


async def _run_async_generator(result: AsyncIterable[Any], emit: Callable[[Effect], None]) -> Any:
    answer = None
    async for effect in result:
        if isinstance(effect, _EFFECTS):
            take(effect, emit)
        elif answer is None:
            answer = effect
        else:
            raise TypeError("an async generator may yield one answer, and this one yielded a second")
    return answer


def _run_generator(result: Generator[Any, None, Any], emit: Callable[[Effect], None]) -> Any:
    step = result.__next__
    while True:
        try:
            effect = step()
        except StopIteration as end:
            return end.value
        take(effect, emit)


def begin(result: Any, emit: Callable[[Effect], None]) -> Any:
    """Perform what a handler's call gave back as far as that goes without waiting: most handlers to their end.

    Returns None at the end, else what `perform` is to go on with. Raises what the handler raises, and `TypeError` for a
    generator that returns something.
    """
    if type(result) is GeneratorType:
        answer = _run_generator(result, emit)
        if answer is not None:
            raise TypeError(f"the handler returned {answer!r:.80}, which is not an effect")
        return None
    if isinstance(result, _EFFECTS):
        emit(result)
        return None
    return result


async def perform(result: Any, emit: Callable[[Effect], None]) -> Any:
    """Run what a handler's call gave back, and hand every effect to `emit` as it comes.

    `result` is a generator, an async generator, an awaitable of any of these, an iterable of effects, one effect, or
    None. Returns the answer: what a generator returned, what an async generator yielded besides effects (it cannot
    return a value), or a result that is none of the above. Raises whatever the handler raises.
    """
    if isinstance(result, GeneratorType):
        return _run_generator(result, emit)
    if result is None:
        return None
    if isinstance(result, _EFFECTS):
        emit(result)
        return None
    if isasyncgen(result):
        return await _run_async_generator(result, emit)
    if isawaitable(result):
        awaited: Awaitable[Any] = result
        return await perform(await awaited, emit)
    if isinstance(result, Iterable) and not isinstance(result, str | bytes | dict):
        for effect in result:
            take(effect, emit)
        return None
    return result

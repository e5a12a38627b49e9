"""The quick way for records with nothing special about them: the inner loop in C (`_quick.c`), where it was built.

It is for processors without state, batches or concurrency, whose handler is a plain function and whose topics have
keys of str or bytes and values that msgspec reads. It works on the neighbouring records of one partition and stops at
the first that needs more: damaged data, an effect with headers or without a key, a topic that is seen for the first
time, something to await. `handling.py` goes on from there, and does everything itself where there is no extension.

Whoever watches the general way sees the same here: the loop passes the failpoints of a record, and gives outputs the
headers of a history and the history their inputs. What proves the engine therefore proves this, too.
`SEMEL_QUICK=off` does without it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple, get_origin

import msgspec

from semel.errors import Fenced
from semel.processing.component import Component
from semel.processing.effects import Produce
from semel.processing.inputs import Input
from semel.processing.limits import OUTPUT_BYTES_MAX
from semel.processing.topics import Topic
from semel.processing.unit import UnitOfWork
from semel.settings import quick_choice
from semel.types import Record
from semel.wire.codec import chosen

__all__ = ["Quick", "Unfinished", "quick_way"]


class Unfinished(NamedTuple):
    """A call of the handler that needs more than the quick way has: what it gave so far, and what goes on with it."""

    effects: Sequence[Any] = ()
    """The last one was not taken: it may be anything."""
    result: Any = None
    error: Exception | None = None
    """What the handler raised."""


def _native() -> Callable[..., Any] | None:
    if not quick_choice() or chosen.name != "native":  # Nobody wants it, or wants Python alone, or has no compiler.
        return None
    try:
        found: Callable[..., Any] = import_module("semel.processing._quick").run
    except ImportError:
        return None
    return found


_run = _native()


def _value_class(kind: Any) -> type | None:
    """The class of a value that the quick way reads and writes as the topic itself does."""
    if get_origin(kind) in (dict, list):
        found: type = get_origin(kind)
        return found
    if isinstance(kind, type) and (kind in (bytes, str, int) or issubclass(kind, msgspec.Struct)):
        return kind
    return None


def _input_plan(topic: Topic[Any, Any], handler: Callable[[Any], Any]) -> tuple[Any, ...] | None:
    """Handler, class of keys, and bytes, str or a function that makes a value."""
    kind = topic.value_type
    if topic.key_type not in (str, bytes) or _value_class(kind) is None:
        return None
    return handler, topic.key_type, kind if kind in (bytes, str) else msgspec.json.Decoder(kind).decode


def _output_plan(topic: Topic[Any, Any]) -> tuple[Any, ...] | None:
    """Name, class of keys, class of values, and a function that makes bytes of a value."""
    found = _value_class(topic.value_type)
    if topic.key_type not in (str, bytes) or found is None:
        return None
    return topic.name, topic.key_type, found, str.encode if found is str else msgspec.json.Encoder().encode


def quick_way(component: Component, monotonic: Callable[[], float]) -> Quick | None:
    """The quick way of a component, if it has one."""
    if _run is None or component.plain is None:
        return None
    plan = _input_plan(*component.plain)
    return None if plan is None else Quick(_run, plan, monotonic)


class Quick:
    """One component's quick way; it learns how the topics that its handler writes to are written."""

    def __init__(self, run: Callable[..., Any], plan: tuple[Any, ...], monotonic: Callable[[], float]) -> None:
        self._run = run
        self._plan = plan
        self._monotonic = monotonic
        self._plans: dict[Topic[Any, Any], tuple[Any, ...] | None] = {}

    def work(
        self,
        pending: deque[Record],
        held: Input,
        unit: UnitOfWork,
        partitions: Mapping[str, int],
        until: float,
        most: int,
        reached: Callable[[str], None] | None,
    ) -> Unfinished | bool:
        """Take the first records of `pending` into the unit, which are of one partition, up to the time `until`.

        A unit of `most` records is looked at before it takes more. `reached` is called at each failpoint, if somebody
        watches them.

        True when nothing is left to do for the first that is still pending, False when it was not begun. Raises
        `Fenced` if the handler does, and what `reached` raises outside of it.
        """
        topic, partition = pending[0][:2]
        position = held.position
        records_max, bytes_max = unit.room
        if unit.records < most:
            records_max = min(records_max, most - unit.records)
        bounds = (self._monotonic, until, records_max, bytes_max, OUTPUT_BYTES_MAX, unit.now_ms)
        proof = () if unit.provenance is None else unit.provenance.quick(topic, partition)
        progress: list[Any] = [0, position, 0, None, False]
        try:
            rest = self._run(
                *(pending, topic, partition, position, self._plan, self._plans),
                *(partitions, unit.outputs, bounds, reached, proof, progress),
            )
        except Fenced:
            raise
        except Exception as error:
            if not progress[4]:  # Not the handler's.
                raise
            return Unfinished(error=error)
        finally:
            count, held.position, size, last, _ = progress
            unit.passed(count, size, last)
        if rest is None:
            return bool(count)
        return Unfinished(*rest) if rest else False

    def learn(self, effects: Sequence[Any]) -> None:
        """Know how these are written the next time."""
        for effect in effects:
            if isinstance(effect, Produce) and effect.topic not in self._plans:
                self._plans[effect.topic] = _output_plan(effect.topic)

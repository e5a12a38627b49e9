"""Distributed traces: what a handler yields belongs to the trace of its input (W3C Trace Context).

Without OpenTelemetry the headers `traceparent` and `tracestate` go from the input to its outputs as they are. Where its
API is installed every call of a handler is a span of its own, current while the handler runs, and the outputs name it;
an API without an SDK records nothing and gives the input's context, which is the same again.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from importlib import import_module
from inspect import isasyncgen, isawaitable
from types import GeneratorType
from typing import Any, NamedTuple

import msgspec

from semel.processing.effects import Produce
from semel.types import Header

__all__ = ["TRACEPARENT", "follow"]

TRACEPARENT = "traceparent"
TRACESTATE = "tracestate"
STATE_BYTES_MAX = 8_192
"""Of a tracestate that is passed on; the specification asks for 512 at least."""
_PARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
"""W3C Trace Context, section 3.2: what is not of this form starts no trace and is not passed on."""


def follow(call: Callable[[], Any], inputs: Sequence[Sequence[Header]], name: str) -> Any:
    """What `call` gives, with the trace of its inputs on every record that it yields and that names none itself.

    `inputs` are the headers of each record that is handed over. Of several with different traces the outputs belong to
    none, unless OpenTelemetry makes a span that has links to all of them.
    """
    step = _begin({_carrier(headers) for headers in inputs} - {()}, name)
    if step is None:
        return call()
    try:
        with step.active():
            result = call()
    except BaseException as error:
        step.end(error)
        raise
    return step.wrap(result)


def _carrier(headers: Sequence[Header]) -> tuple[tuple[str, str], ...]:
    """The trace context of one record; empty when it has none that is valid."""
    parent = state = ""
    for name, value in headers:
        if name == TRACEPARENT:
            parent = (value or b"").decode("latin-1")
        elif name == TRACESTATE:
            state = (value or b"").decode("latin-1")
    if not _PARENT.fullmatch(parent):
        return ()
    if not state or len(state) > STATE_BYTES_MAX:
        return ((TRACEPARENT, parent),)
    return ((TRACEPARENT, parent), (TRACESTATE, state))


class _Api(NamedTuple):
    """OpenTelemetry's API."""

    trace: Any
    propagate: Any


@cache
def _api() -> _Api | None:
    try:
        return _Api(import_module("opentelemetry.trace"), import_module("opentelemetry.propagate"))
    except ImportError:
        return None


def _begin(carriers: set[tuple[tuple[str, str], ...]], name: str) -> _Step | None:
    """The step of a trace that a call of a handler is; None when there is nothing to follow."""
    api = _api()
    if api is None:
        if len(carriers) != 1:
            return None
        return _Step(tuple((key, text.encode("latin-1")) for key, text in carriers.pop()))
    contexts = [api.propagate.extract(dict(carrier)) for carrier in sorted(carriers)]
    parent = contexts[0] if len(contexts) == 1 else None
    links = [api.trace.Link(api.trace.get_current_span(item).get_span_context()) for item in contexts[1:] and contexts]
    tracer = api.trace.get_tracer("semel")
    span = tracer.start_span(f"process {name}", parent, kind=api.trace.SpanKind.CONSUMER, links=links)
    found: dict[str, str] = {}
    api.propagate.inject(found, api.trace.set_span_in_context(span))
    return _Spanned(tuple((key, text.encode("latin-1")) for key, text in found.items()), api, span)


class _Step:
    """One call of a handler, and the headers of what it yields."""

    def __init__(self, headers: tuple[Header, ...]) -> None:
        self._headers = headers

    def active(self) -> AbstractContextManager[Any]:
        """Around every piece of the handler's run."""
        return nullcontext()

    def end(self, error: BaseException | None = None) -> None:
        """The run is over."""

    def wrap(self, result: Any) -> Any:
        """What the handler gave back, of the same kind, with marked effects."""
        if isinstance(result, GeneratorType):
            return self._generator(result)
        if isasyncgen(result):
            return self._async_generator(result)
        if isawaitable(result):
            return self._awaited(result)
        self.end()
        if isinstance(result, Iterable) and not isinstance(result, str | bytes | dict | msgspec.Struct):
            return [self._marked(effect) for effect in result]
        return self._marked(result)

    def _marked(self, effect: Any) -> Any:
        if not isinstance(effect, Produce) or any(name == TRACEPARENT for name, _ in effect.headers):
            return effect
        return Produce(effect.topic, effect.key, effect.value, (*effect.headers, *self._headers))

    @contextmanager
    def _to_its_end(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.end(error)
            raise
        self.end()

    def _generator(self, result: Generator[Any, None, Any]) -> Generator[Any, None, Any]:
        with self._to_its_end():
            while True:
                with self.active():
                    try:
                        effect = next(result)
                    except StopIteration as end:
                        return end.value
                yield self._marked(effect)

    async def _async_generator(self, result: AsyncIterator[Any]) -> AsyncIterator[Any]:
        with self._to_its_end():
            while True:
                with self.active():
                    try:
                        effect = await anext(result)
                    except StopAsyncIteration:
                        return
                yield self._marked(effect)

    async def _awaited(self, result: Awaitable[Any]) -> Any:
        try:
            with self.active():
                found = await result
        except BaseException as error:
            self.end(error)
            raise
        return self.wrap(found)


class _Spanned(_Step):
    """The same as a span of OpenTelemetry."""

    def __init__(self, headers: tuple[Header, ...], api: _Api, span: Any) -> None:
        super().__init__(headers)
        self._api, self._span = api, span

    def active(self) -> AbstractContextManager[Any]:
        used: AbstractContextManager[Any] = self._api.trace.use_span(
            self._span, record_exception=False, set_status_on_exception=False
        )
        return used

    def end(self, error: BaseException | None = None) -> None:
        if error is not None and not isinstance(error, GeneratorExit):
            self._span.record_exception(error)
            self._span.set_status(self._api.trace.StatusCode.ERROR, str(error))
        self._span.end()

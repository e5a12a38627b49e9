"""A user's handler under a test: what it raises is kept for the test, and on demand it runs twice for every input.

The second run gets what the first one got: the same record, and from stores and databases the same answers. What it
does then must be the same; where it is not, a retry after a crash would do something else than the first try.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable, Iterator
from functools import wraps
from types import GeneratorType
from typing import Any

from semel.errors import OutcomeUnknown, Retriable
from semel.processing.answers import Problem, Response
from semel.processing.effects import Change, Delete, Effect, Produce, Put, Write, lower
from semel.processing.topics import InputRecord, StateView

__all__ = ["NotDeterministic", "watch"]

_EFFECTS = (Produce, Put, Delete, Write, Change)
_LATER = (Retriable, OutcomeUnknown, ConnectionError, TimeoutError)
_REPR_CHARACTERS_MAX = 2_000

Report = Callable[[BaseException], None]


class NotDeterministic(AssertionError):
    """A handler that was run twice with the same input did two different things."""


class _Run:
    """What one run of a handler did, line by line, and what it read."""

    def __init__(self, before: _Run | None) -> None:
        self.lines: list[str] = []
        self.answers: list[tuple[str, Any]] = []
        self._before = before
        self._at = 0

    def effect(self, effect: Any) -> None:
        self.lines.append(f"yield {_show_effect(effect)}")

    def end(self, answer: Any) -> None:
        if answer is not None:
            self.lines.append(f"return {_show_answer(answer)}")

    def error(self, error: BaseException) -> None:
        if isinstance(error, Problem):
            self.lines.append(f"raise Problem({error.status}, {error.body()!r})")
        else:
            self.lines.append(f"raise {error!r}")

    def ask(self, question: str, really: Callable[[], Any]) -> Any:
        """The answer: the real one in the first run, the same one in the second."""
        self.lines.append(question)
        if self._before is None:
            answer = _kept(really())
            self.answers.append((question, answer))
        else:
            known = self._before.answers[self._at : self._at + 1]
            self._at += 1
            if not known or known[0][0] != question:
                raise _Astray
            answer = known[0][1]
        return iter(answer) if isinstance(answer, _Items) else answer


class _Astray(BaseException):
    """The second run asks what the first one did not: it is not the same, and nobody has the answer."""


class _Items(list[Any]):
    """What an iterator gave."""


def _kept(answer: Any) -> Any:
    return _Items(answer) if isinstance(answer, Iterator) else answer


class _Asked:
    """In the place of a store's view or of a database: every question goes through the run."""

    def __init__(self, target: Any, name: str, run: _Run) -> None:
        self._target, self._name, self._run = target, name, run

    def __getattr__(self, attribute: str) -> Any:
        found = getattr(self._target, attribute)
        if not callable(found) or attribute in ("put", "delete"):  # These two only make effects.
            return found

        def call(*args: Any, **named: Any) -> Any:
            args = tuple(_kept(item) for item in args)
            shown = [_show(item) for item in args] + [f"{key}={_show(item)}" for key, item in named.items()]
            question = f"{self._name}.{attribute}({', '.join(shown)})"
            return self._run.ask(question, lambda: found(*args, **named))

        return call

    def __contains__(self, key: Any) -> bool:
        return bool(self._run.ask(f"{key!r} in {self._name}", lambda: key in self._target))


def watch(handler: Callable[..., Any], what: str, report: Report, *, replay: bool) -> Callable[..., Any]:
    """The handler, of the same kind as it is. `report` gets what it raises; `what` names it in errors.

    With `replay` every call runs it twice and raises `NotDeterministic` where the two runs differ.
    """
    watched = _Watched(handler, what, report, replay)
    if inspect.isasyncgenfunction(handler):

        @wraps(handler)
        async def as_async_generator(*args: Any, **named: Any) -> Any:
            async for effect in watched.run_async(args, named):
                yield effect

        return as_async_generator
    if inspect.iscoroutinefunction(handler):

        @wraps(handler)
        async def as_coroutine(*args: Any, **named: Any) -> Any:
            return await watched.run_awaitable(args, named)

        return as_coroutine
    if inspect.isgeneratorfunction(handler):

        @wraps(handler)
        def as_generator(*args: Any, **named: Any) -> Any:
            return (yield from watched.run_generator(args, named))

        return as_generator

    @wraps(handler)
    def as_function(*args: Any, **named: Any) -> Any:
        return watched.run_function(args, named)

    return as_function


class _Watched:
    """One handler. The four kinds differ in how they are driven; what is seen of them is the same."""

    def __init__(self, handler: Callable[..., Any], what: str, report: Report, replay: bool) -> None:
        self._handler, self._what, self._report, self._replay = handler, what, report, replay

    def _begin(self, args: tuple[Any, ...], before: _Run | None) -> tuple[_Run, tuple[Any, ...]]:
        run = _Run(before)
        if not self._replay:
            return run, args
        return run, (args[0], *(_Asked(item, _name_of(item), run) if _is_asked(item) else item for item in args[1:]))

    def _raised(self, args: tuple[Any, ...], error: BaseException) -> None:
        if isinstance(error, (*_LATER, Problem)) or not isinstance(error, Exception):
            return
        error.add_note(f"raised by {self._what} {_at(args[0])}")
        self._report(error)

    def run_generator(self, args: tuple[Any, ...], named: dict[str, Any]) -> Generator[Any, None, Any]:
        run, given = self._begin(args, None)
        try:
            answer = yield from _seen(self._handler(*given, **named), run)
        except BaseException as error:
            self._failed(args, named, run, error)
            raise
        self._again(args, named, run)
        return answer

    def run_function(self, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        run, given = self._begin(args, None)
        try:
            result = self._handler(*given, **named)
            if isinstance(result, GeneratorType):
                return self._drive(result, args, named, run)
            result = _taken(result, run)
        except BaseException as error:
            self._failed(args, named, run, error)
            raise
        self._again(args, named, run)
        return result

    def _drive(self, result: Any, args: tuple[Any, ...], named: dict[str, Any], run: _Run) -> Generator[Any, None, Any]:
        """A function that gave back somebody else's generator."""
        try:
            answer = yield from _seen(result, run)
        except BaseException as error:
            self._failed(args, named, run, error)
            raise
        self._again(args, named, run)
        return answer

    async def run_awaitable(self, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        run, given = self._begin(args, None)
        try:
            result = _taken(await self._handler(*given, **named), run)
        except BaseException as error:
            await self._failed_async(args, named, run, error)
            raise
        await self._again_async(args, named, run)
        return result

    async def run_async(self, args: tuple[Any, ...], named: dict[str, Any]) -> AsyncIterator[Any]:
        run, given = self._begin(args, None)
        try:
            async for effect in self._handler(*given, **named):
                _note(effect, run)
                yield effect
        except BaseException as error:
            await self._failed_async(args, named, run, error)
            raise
        await self._again_async(args, named, run)

    # --- The second run ---

    def _failed(self, args: tuple[Any, ...], named: dict[str, Any], run: _Run, error: BaseException) -> None:
        run.error(error)
        self._raised(args, error)
        if isinstance(error, Exception) and not isinstance(error, _LATER):
            self._again(args, named, run)

    async def _failed_async(
        self, args: tuple[Any, ...], named: dict[str, Any], run: _Run, error: BaseException
    ) -> None:
        run.error(error)
        self._raised(args, error)
        if isinstance(error, Exception) and not isinstance(error, _LATER):
            await self._again_async(args, named, run)

    def _again(self, args: tuple[Any, ...], named: dict[str, Any], first: _Run) -> None:
        if not self._replay:
            return
        run, given = self._begin(args, first)
        try:
            result = self._handler(*given, **named)
            if isinstance(result, GeneratorType):
                for _ in _seen(result, run):
                    pass
            else:
                _taken(result, run)
        except (Exception, _Astray) as error:
            _ended(run, error)
        self._compare(args, first, run)

    async def _again_async(self, args: tuple[Any, ...], named: dict[str, Any], first: _Run) -> None:
        if not self._replay:
            return
        run, given = self._begin(args, first)
        try:
            result = self._handler(*given, **named)
            if isinstance(result, Awaitable):
                _taken(await result, run)
            else:
                async for effect in result:
                    _note(effect, run)
        except (Exception, _Astray) as error:
            _ended(run, error)
        self._compare(args, first, run)

    def _compare(self, args: tuple[Any, ...], first: _Run, second: _Run) -> None:
        if first.lines == second.lines:
            return
        diff = difflib.unified_diff(first.lines, second.lines, "first run", "second run", lineterm="", n=2)
        error = NotDeterministic(
            f"{self._what} did two different things {_at(args[0])}:\n" + "\n".join(diff) + "\nAfter a crash a handler "
            "runs again. Take times and ids from the record (timestamp_ms, topic-partition-offset, key), not from a "
            "clock, random numbers or what the process remembers."
        )
        self._report(error)
        raise error


def _ended(run: _Run, error: BaseException) -> None:
    if not isinstance(error, _Astray):
        run.error(error)


def _seen(result: Iterable[Any], run: _Run) -> Generator[Any, None, Any]:
    """Everything that a generator yields, and what it returns."""
    iterator = iter(result)
    while True:
        try:
            effect = next(iterator)
        except StopIteration as end:
            run.end(end.value)
            return end.value
        _note(effect, run)
        yield effect


def _taken(result: Any, run: _Run) -> Any:
    """What a function returned: effects, or an answer. Iterators are read here, so that they can be read again."""
    if isinstance(result, _EFFECTS):
        _note(result, run)
    elif isinstance(result, Iterable) and not isinstance(result, str | bytes | dict | Response):
        result = list(result)
        for effect in result:
            _note(effect, run)
    else:
        run.end(result)
    return result


def _note(effect: Any, run: _Run) -> None:
    """Take down an effect; one that cannot be written raises here, in the handler's own frame."""
    if isinstance(effect, _EFFECTS):
        lower(effect)
        run.effect(effect)
    else:
        run.lines.append(f"yield {_show(effect)}")


# --- Words ---


def _is_asked(argument: Any) -> bool:
    return isinstance(argument, StateView) or hasattr(argument, "executemany")


def _name_of(argument: Any) -> str:
    return "state" if isinstance(argument, StateView) else "db"


def _at(argument: Any) -> str:
    """Which input it was."""
    if isinstance(argument, InputRecord):
        where = f"{argument.topic}-{argument.partition}@{argument.offset}"
        return f"for record {where}, key {argument.key!r}, value {_show(argument.value)}"
    if isinstance(argument, list | tuple) and argument and isinstance(argument[0], InputRecord):
        first, last = argument[0], argument[-1]
        where = f"{first.topic}-{first.partition}@{first.offset}"
        end = "" if len(argument) == 1 else f" to {last.topic}-{last.partition}@{last.offset}"
        return f"for {len(argument)} records, {where}{end}"
    return f"for request {_show(argument)}"


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _REPR_CHARACTERS_MAX else f"{text[:_REPR_CHARACTERS_MAX]}... ({len(text)} characters)"


def _show_effect(effect: Effect) -> str:
    if isinstance(effect, Produce):
        headers = f", headers={effect.headers!r}" if effect.headers else ""
        return f"{effect.topic.name}.record({_show(effect.key)}, {_show(effect.value)}{headers})"
    if isinstance(effect, Put):
        return f"{effect.state.name}.put({_show(effect.key)}, {_show(effect.value)})"
    if isinstance(effect, Delete):
        return f"{effect.state.name}.delete({_show(effect.key)})"
    return _show(effect)


def _show_answer(answer: Any) -> str:
    if isinstance(answer, Response):
        return f"{type(answer).__name__}({answer.status}, {_show(answer.body)}, {answer.headers!r})"
    return _show(answer)

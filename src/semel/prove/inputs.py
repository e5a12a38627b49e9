"""What goes into the app: from its proof plan, or made up from the types of its endpoints and source topics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from random import Random
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple
from zlib import crc32

import msgspec

from semel.app import App
from semel.errors import ConfigurationError
from semel.ingress.spec import EndpointSpec
from semel.processing.topics import DataError, Topic
from semel.prove.clients import request_bytes
from semel.prove.plan import Input, ProofPlan, Request, SourceRecord
from semel.prove.values import made_up

__all__ = ["InputSource", "Job", "checksum", "source_topics"]

_KEYS = 64
"""Made-up records have so many keys, so that keys come again and their order can be seen."""


class Job(NamedTuple):
    """An input as it is sent. `data` is the whole HTTP request, or a record's value."""

    number: int
    route: str
    """The endpoint's route, empty for a record."""
    key: str
    """The Idempotency-Key, or the id of the record."""
    data: bytes
    body: bytes
    checksum: int
    topic: str = ""
    record_key: bytes | None = None


class InputSource:
    """The inputs of one campaign, the same ones for the same seed. `chosen` says in words where they come from."""

    def __init__(self, app: App, plan: ProofPlan | None, seed: int, *, name: str = "") -> None:
        self._app = app
        self._plan = plan
        self._seed = seed
        if plan is not None:
            self.chosen = [f"inputs: the proof plan {name}".rstrip()]
            return
        topics = source_topics(app)
        if not app.endpoints and not topics:
            raise ConfigurationError(
                f"{app!r} has no endpoint, and every topic that it reads is one that its handlers write: it is not "
                "clear what comes in from outside. Write a proof plan that yields inputs: see docs/howto.md."
            )
        self.chosen = [f"inputs: made up for {spec.route} ({_name(spec.request)})" for spec in app.endpoints.values()]
        self.chosen += [f"inputs: made up for topic {topic.name} ({_name(topic.value_type)})" for topic in topics]
        self.chosen.append("a proof plan would send better inputs and compare totals: see docs/howto.md")
        self._makers: list[EndpointSpec | Topic[Any, Any]] = [*app.endpoints.values(), *topics]

    def inputs(self) -> Iterator[Input]:
        """Every input, from the first one. Raises `ConfigurationError` when the plan fails."""
        rng = Random(f"{self._seed}:inputs")
        if self._plan is None:
            while True:
                yield _make(rng.choice(self._makers), rng)
        number = 0
        try:
            for number, item in enumerate(self._plan.inputs(rng), 1):  # noqa: B007 - it is in the error
                yield item
        except Exception as error:
            raise ConfigurationError(
                f"the proof plan failed after {number} inputs: {type(error).__name__}: {error}"
            ) from error

    def jobs(self, run: str) -> Iterator[Job]:
        """The inputs as they are sent. `run` makes their keys differ from those of other campaigns."""
        for number, item in enumerate(self.inputs()):
            try:
                yield self._job(number, item, f"{run}-{number}")
            except (DataError, TypeError, ValueError, msgspec.MsgspecError) as error:
                raise ConfigurationError(
                    f"input {number} of the proof plan cannot be sent: {error}: {item!r:.200}"
                ) from error

    def _job(self, number: int, item: Input, name: str) -> Job:
        if isinstance(item, Request):
            body = item.body if isinstance(item.body, bytes) else msgspec.json.encode(item.body)
            key = item.key if item.key is not None else name
            data = request_bytes(item.method, item.path, key, body, item.headers)
            return Job(number, self._route(item), key, data, body, checksum(item))
        if not isinstance(item, SourceRecord):
            raise TypeError("it is neither a Request nor a SourceRecord")
        topic = self._app.topics.get(item.topic)
        if topic is None:
            raise ValueError(f"the app has no topic {item.topic!r}")
        if topic.bound is not None:
            raise ValueError(f"values of topic {topic.name} go by {topic.value_type!r}: send inputs to an endpoint")
        value = topic.encode_value(item.value) or b""
        return Job(number, "", name, value, value, checksum(item), topic.name, topic.encode_key(item.key))

    def _route(self, item: Request) -> str:
        path = item.path.partition("?")[0]
        for spec in self._app.endpoints.values():
            if spec.method == item.method and spec.pattern.fullmatch(path):
                return spec.route
        raise ValueError(f"the app has no endpoint {item.method} {path}")


def checksum(item: Input) -> int:
    """CRC-32 of an input, to see that it is the same one again."""
    if isinstance(item, Request):
        return crc32(msgspec.json.encode((item.method, item.path, item.body, item.key, item.headers)))
    return crc32(msgspec.json.encode((item.topic, item.key, item.value)))


def _make(maker: EndpointSpec | Topic[Any, Any], rng: Random) -> Input:
    if isinstance(maker, Topic):
        key: Any = rng.randrange(_KEYS)
        if maker.key_type is not int:
            key = f"key-{key}" if maker.key_type is str else b"key-%d" % key
        value = maker.value_type
        plain = value in (bytes, str)
        made: Any = rng.randbytes(16) if value is bytes else made_up(value, rng)
        return SourceRecord(maker.name, key, made if plain else msgspec.convert(made, value))
    path = maker.path
    for parameter in maker.parameters:
        path = path.replace(f"{{{parameter}}}", str(rng.randrange(_KEYS)))
    return Request(maker.method, path, rng.randbytes(16) if maker.is_raw else made_up(maker.request, rng))


def _name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)


# --- Which topics get their records from outside ---


def source_topics(app: App) -> list[Topic[Any, Any]]:
    """Topics that the app reads and that none of its handlers names.

    What a handler yields is not known before it runs; but a topic that it yields records for is one that its code, or
    a function that its code calls, has by name. A topic in a container or behind an attribute is not seen: then a proof
    plan must say what comes in.
    """
    read = {spec.topic.name for spec in app.processors.values()} | {spec.topic.name for spec in app.sinks.values()}
    handlers = [spec.handler for spec in app.endpoints.values()] + [spec.handler for spec in app.processors.values()]
    written = {topic.name for topic in _topics_named_by(handlers)}
    return [topic for name, topic in app.topics.items() if name in read - written]


def _topics_named_by(handlers: Iterable[Any]) -> Iterator[Topic[Any, Any]]:
    waiting = [getattr(handler, "__wrapped__", handler) for handler in handlers]
    seen: set[int] = set()
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Topic):
            yield item
        function = getattr(item, "__func__", item)
        if isinstance(function, FunctionType):
            waiting += _values_named_by(function)


def _values_named_by(function: FunctionType) -> Iterator[Any]:
    """Globals, closure variables and defaults that a function's code may use, and functions of modules it names."""
    names = set(_names(function.__code__))
    scope: Mapping[str, Any] = function.__globals__
    for name in names & scope.keys():
        value = scope[name]
        yield value
        if isinstance(value, ModuleType):
            yield from (vars(value)[inner] for inner in names & vars(value).keys())
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:
            continue  # A variable that has no value yet.
    yield from function.__defaults__ or ()


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)

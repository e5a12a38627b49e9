"""A trace goes on from an input to its outputs, with OpenTelemetry's API and without it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import trace

from semel import App
from semel.processing import tracing
from semel.testing import TestApp

PARENT = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
OTHER = b"00-11f7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
STATE = ("tracestate", b"congo=t61rcWkgMzE")


class FakeTracer(trace.Tracer):
    """Makes spans with ids that can be told, and remembers them."""

    def __init__(self) -> None:
        self.spans: list[FakeSpan] = []

    def start_span(self, name: str, context: Any = None, *args: Any, links: Any = (), **options: Any) -> trace.Span:
        parent = trace.get_current_span(context).get_span_context()
        trace_id = parent.trace_id if parent.is_valid else 0xABC
        made = trace.SpanContext(trace_id, 0x100 + len(self.spans), False, trace.TraceFlags(1), parent.trace_state)
        self.spans.append(FakeSpan(made, name, parent, list(links)))
        return self.spans[-1]

    @contextlib.contextmanager
    def start_as_current_span(self, *args: Any, **options: Any) -> Iterator[Any]:
        raise NotImplementedError
        yield


class FakeSpan(trace.NonRecordingSpan):
    def __init__(self, context: Any, name: str, parent: Any, links: list[Any]) -> None:
        super().__init__(context)
        self.name, self.parent, self.links = name, parent, links
        self.errors: list[BaseException] = []
        self.ends = 0

    def record_exception(self, exception: BaseException, *args: Any, **options: Any) -> None:
        self.errors.append(exception)

    def end(self, end_time: Any = None) -> None:
        self.ends += 1


@pytest.fixture(params=["no api", "api", "sdk"])
def world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What is installed: nothing, the API alone, or something that records."""
    tracing._api.cache_clear()
    tracer = FakeTracer()
    if request.param == "no api":
        monkeypatch.setattr(tracing, "_api", lambda: None)
    elif request.param == "sdk":
        monkeypatch.setattr(trace, "get_tracer", lambda *_: tracer)
    return request.param, tracer


def app_of(kind: str, **options: Any) -> tuple[App, Any, Any]:
    app = App("shop", trace=True)
    orders, done = app.topic("orders", value=str, partitions=1), app.topic("done", value=str, partitions=1)

    if kind == "generator":

        @app.processor(orders, **options)
        def copy(item: Any) -> Iterator[Any]:
            yield done.record(item.key, item.value)
            yield done.record(item.key, "own", headers=[("traceparent", b"mine")])

    elif kind == "function":

        @app.processor(orders, name="copy", **options)
        def function(item: Any) -> Any:
            return [done.record(item.key, item.value), done.record(item.key, "own", headers=[("traceparent", b"mine")])]

    elif kind == "coroutine":

        @app.processor(orders, name="copy", **options)
        async def coroutine(item: Any) -> Any:
            return [done.record(item.key, item.value), done.record(item.key, "own", headers=[("traceparent", b"mine")])]

    else:

        @app.processor(orders, name="copy", **options)
        async def async_generator(item: Any) -> Any:
            yield done.record(item.key, item.value)
            yield done.record(item.key, "own", headers=[("traceparent", b"mine")])

    return app, orders, done


@pytest.mark.parametrize("kind", ["generator", "function", "coroutine", "async generator"])
def test_outputs_belong_to_the_trace_of_their_input(kind: str, world: Any) -> None:
    name, tracer = world
    app, orders, done = app_of(kind)
    with TestApp(app) as t:
        t.send(orders, "a", "traced", headers=[("traceparent", PARENT), STATE, ("else", b"1")])
        found, own = t.sent(done)
    headers = dict(found.headers)
    assert dict(own.headers)["traceparent"] == b"mine", "what a handler says itself stays"
    assert headers["tracestate"] == STATE[1]
    assert "else" not in headers
    if name == "sdk":
        [span] = tracer.spans
        assert headers["traceparent"] == b"00-0af7651916cd43dd8448eb211c80319c-0000000000000100-01"
        assert (span.name, span.ends, span.parent.span_id) == ("process shop.copy", 1, 0xB7AD6B7169203331)
    else:
        assert headers["traceparent"] == PARENT


def test_what_is_no_trace_is_not_passed_on(world: Any) -> None:
    name, _ = world
    app, orders, done = app_of("generator")
    zero = b"00-" + b"0" * 32 + b"-b7ad6b7169203331-01"
    with TestApp(app) as t:
        for parent in (b"", b"nonsense", zero, b"ff" + PARENT[2:], PARENT[:-3], PARENT.upper()):
            t.send(orders, "a", "x", headers=[("traceparent", parent), STATE])
        t.send(orders, "a", "x")
        found = [dict(item.headers).get("traceparent") for item in t.sent(done) if item.value == "x"]
    assert len(found) == 7
    if name == "sdk":
        assert all(item is not None and item.startswith(b"00-" + b"0" * 29 + b"abc-") for item in found), "new traces"
    else:
        assert found == [None] * 7


def test_a_batch_of_several_traces(world: Any) -> None:
    name, tracer = world
    app = App("shop", trace=True)
    orders, done = app.topic("orders", value=str, partitions=1), app.topic("done", value=str, partitions=1)

    @app.processor(orders, batch=True)
    def count(records: Any) -> Iterator[Any]:
        yield done.record("n", str(len(records)))

    with TestApp(app) as t:
        t.send_many(orders, [("a", "1"), ("a", "2")], headers=[("traceparent", PARENT)])
        same = [dict(item.headers).get("traceparent") for item in t.sent(done)]
        assert all(item == PARENT for item in same) or name == "sdk"
    calls = tracing.follow(lambda: done.record("k", "v"), [[("traceparent", PARENT)], [("traceparent", OTHER)]], "x")
    if name == "sdk":
        assert [link.context.trace_id for link in tracer.spans[-1].links] == [
            int(item[3:35], 16) for item in (PARENT, OTHER)
        ]
        assert dict(calls.headers)["traceparent"].startswith(b"00-")
    else:
        assert calls.headers == ()


def test_the_span_is_current_and_knows_of_the_error(world: Any) -> None:
    name, tracer = world
    app = App("shop", trace=True)
    orders = app.topic("orders", value=str)
    seen: list[Any] = []

    @app.processor(orders)
    def fail(item: Any) -> Iterator[Any]:
        seen.append(trace.get_current_span().get_span_context().span_id)
        raise ValueError("no")
        yield

    with TestApp(app) as t, pytest.raises(ValueError, match="no"):
        t.send(orders, "a", "x", headers=[("traceparent", PARENT)])
    if name == "sdk":
        assert seen == [0x100]
        assert [str(error) for error in tracer.spans[0].errors] == ["no"]
        assert tracer.spans[0].ends == 1
    assert not trace.get_current_span().get_span_context().is_valid, "nothing of it stays"


def test_without_trace_nothing_is_added(world: Any) -> None:
    app = App("shop")
    orders, done = app.topic("orders", value=str), app.topic("done", value=str)

    @app.processor(orders)
    def copy(item: Any) -> Iterator[Any]:
        yield done.record(item.key, item.value)

    with TestApp(app) as t:
        t.send(orders, "a", "x", headers=[("traceparent", PARENT)])
        assert [item.headers for item in t.sent(done)] == [()]
    assert world[1].spans == []


def test_from_the_http_request_to_the_last_topic(world: Any) -> None:
    name, tracer = world
    app, orders, done = app_of("generator")

    @app.post("/orders", request=str)
    def place(text: str) -> Iterator[Any]:
        yield orders.record("a", text)

    with TestApp(app) as t:
        t.post("/orders", "x", headers={"traceparent": PARENT.decode(), "tracestate": "congo=t61rcWkgMzE"})
        [placed] = t.sent(orders)
        found = next(item for item in t.sent(done) if item.value == "x")
    if name == "sdk":
        assert [span.name for span in tracer.spans] == ["process POST /orders", "process shop.copy"]
        assert tracer.spans[1].parent.span_id == 0x100
    else:
        for item in (placed, found):
            assert dict(item.headers)["traceparent"] == PARENT
            assert dict(item.headers)["tracestate"] == STATE[1]

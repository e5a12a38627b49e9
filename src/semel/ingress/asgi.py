"""The ASGI shell: HTTP requests to records, replies to HTTP answers.

Endpoints are answered by a plain ASGI callable, because every request runs through it; starlette serves the rest:
`/operations/{id}`, `/errors/{name}`, `/livez`, `/readyz`, `/metrics`. Refused here is what cannot be a request (no key,
no JSON, wrong type, too large); everything about a key's history is the owner's to decide.

Run alone (`ingress/server.py`) or mounted in any ASGI app. Most frameworks do not hand lifespan events to a mounted
app: then the first request starts it, and `await ingress.close()` belongs into the parent's shutdown.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import parse_qsl

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response as HTTPResponse
from starlette.routing import Route

from semel.env import Env
from semel.errors import OutcomeUnknown, SemelError
from semel.failpoints import failpoint
from semel.ingress import rules
from semel.ingress.bodies import Bodies, ClientGone
from semel.ingress.gateway import Compose, Gateway, Link, NotTaken
from semel.ingress.limits import Limits
from semel.ingress.link import KafkaLink
from semel.ingress.requests import LookUp, Reply, Request
from semel.ingress.rules import Answer, failure, problem_answer
from semel.ingress.spec import EndpointSpec
from semel.processing.answers import Problem
from semel.processing.metrics import Metrics
from semel.settings import Settings

__all__ = ["Ingress", "create"]

log = logging.getLogger("semel.ingress")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_CLOSE = (b"connection", b"close")
_DESCRIBED = ("Link", '</errors/idempotency-key-missing>; rel="describedby"')


class Declared(Protocol):
    """What the ingress needs of an `App`."""

    name: str
    endpoints: dict[str, EndpointSpec]
    request_partitions: int | None


def create(
    app: Declared,
    settings: Settings,
    *,
    limits: Limits | None = None,
    env: Env | None = None,
    metrics: Metrics | None = None,
    show_metrics: Callable[[], str] | None = None,
) -> Ingress:
    """The ASGI app of an app's endpoints over the Kafka at `settings.kafka`; nothing is opened before it starts.

    `show_metrics` gives the text for `/metrics`, where it is more than this process' own registry.
    Raises `ConfigurationError` when the settings name no Kafka.
    """
    env = env or Env()
    partitions = app.request_partitions or settings.partitions
    link = KafkaLink(app.name, settings.kafka, partitions, env, settings.kafka_client)
    endpoints = list(app.endpoints.values())
    return Ingress(
        app.name,
        endpoints,
        link,
        limits=limits,
        env=env,
        metrics=metrics,
        show_metrics=show_metrics,
        drain_seconds=settings.drain_seconds,
    )


@dataclass(slots=True)
class _Headers:
    """The headers that matter, picked in one pass."""

    content_type: bytes = b""
    content_length: bytes = b""
    keys: Sequence[bytes] = ()
    prefer: Sequence[bytes] = ()
    trace: tuple[tuple[str, str], ...] = ()

    @classmethod
    def pick(cls, headers: Iterable[tuple[bytes, bytes]]) -> _Headers:
        picked = cls()
        for name, value in headers:
            if name == b"idempotency-key":
                picked.keys = (*picked.keys, value)
            elif name == b"content-type":
                picked.content_type = value
            elif name == b"content-length":
                picked.content_length = value
            elif name == b"prefer":
                picked.prefer = (*picked.prefer, value)
            elif name == b"traceparent" or name == b"tracestate":
                picked.trace = (*picked.trace, (name.decode(), value.decode("latin-1")))
        return picked


class Ingress:
    """The ASGI app of an app's endpoints. `app` is its name; `link` its way to the log."""

    def __init__(
        self,
        app: str,
        endpoints: Sequence[EndpointSpec],
        link: Link,
        *,
        limits: Limits | None = None,
        env: Env | None = None,
        metrics: Metrics | None = None,
        show_metrics: Callable[[], str] | None = None,
        drain_seconds: float = 25.0,
    ) -> None:
        self.limits = limits or Limits()
        self.metrics = metrics or Metrics()
        self._show_metrics = show_metrics or self.metrics.render
        self._app = app
        self._env = env or Env()
        self._drain_seconds = drain_seconds
        self.gateway = Gateway(link, self._env)
        self._bodies = Bodies(self.limits)
        self._by_route = {endpoint.route: endpoint for endpoint in endpoints}
        self._exact = {(e.method, e.path): e for e in endpoints if not e.parameters}
        self._templates = [e for e in endpoints if e.parameters]
        self._answers = self.metrics.counter(
            "semel_http_answers_total", "Answers of endpoints; replayed: the outcome was known.", ("status", "replayed")
        )
        gauge = self.metrics.gauge("semel_http_in_flight", "HTTP requests that wait for their append or their reply.")
        gauge.watch(lambda: self.gateway.in_flight)
        held = self.metrics.gauge("semel_http_held_bytes", "Request bodies that are arriving or wait for the log.")
        held.watch(lambda: self._bodies.held_bytes)
        self._rest = self._make_rest()

    def __repr__(self) -> str:
        return f"<Ingress {self._app} {len(self._by_route)} endpoints {self.gateway!r}>"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        else:
            await send({"type": "websocket.close", "code": 1000})

    # --- Life ---

    async def start(self) -> None:
        """Open the log; returns when requests are taken or, after a while, goes on trying in the background.

        Raises what can never work as it is set up, for instance `ConfigurationError`.
        """
        self.gateway.start()
        if not await self.gateway.wait_open(self.limits.start_seconds):
            log.warning("not ready yet, and trying on: %s", self.gateway.trouble)
        if self.gateway.fatal is not None:
            raise self.gateway.fatal

    async def close(self) -> None:
        """Take no more requests, wait for the replies that are due (at most `drain_seconds`), let go of the log."""
        await self.gateway.close(self._drain_seconds)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await self.start()
        except SemelError as error:
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.close()
        await send({"type": "lifespan.shutdown.complete"})

    # --- Endpoints: the hot path ---

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        root = scope.get("root_path", "")
        if root and path.startswith(root):
            path = path[len(root) :]
        endpoint = self._exact.get((scope["method"], path))
        values: tuple[str, ...] = ()
        if endpoint is None:
            for candidate in self._templates:
                match = candidate.pattern.fullmatch(path) if candidate.method == scope["method"] else None
                if match is not None:
                    endpoint, values = candidate, match.groups()
                    break
            else:
                await self._rest(scope, receive, send)
                return
        is_replayed = False
        try:
            answer, is_replayed = await self._take(endpoint, values, scope, receive, root)
        except Problem as problem:
            answer = problem_answer(problem)
        except ClientGone:
            return
        except Exception:
            # After the append this may be anything; before it, saying so costs the client one retry.
            log.exception("an HTTP request failed in an unforeseen way")
            answer = problem_answer(failure("outcome-unknown"))
        self._answers.add(status=str(answer.status), replayed="true" if is_replayed else "false")
        await _respond(send, answer, is_replayed=is_replayed)

    async def _take(
        self, endpoint: EndpointSpec, values: tuple[str, ...], scope: Scope, receive: Receive, root: str
    ) -> tuple[Answer, bool]:
        """The answer to one request, and whether it is a replayed one. Raises `Problem` for a refusal."""
        headers = _Headers.pick(scope["headers"])
        key = rules.parse_key(headers.keys)
        if key is None:
            if endpoint.key_required:
                raise failure("idempotency-key-missing", "", _DESCRIBED)
            key = self._env.new_id().hex
        content_type = rules.media_type(headers.content_type)
        if not endpoint.is_raw and not _is_json(content_type):
            raise failure("unsupported-media-type", f"Got {content_type or 'none'}.", ("Accept", "application/json"))
        await self._admit()
        body = await self._bodies.read(headers.content_length, receive)
        try:
            query = _query(scope["query_string"], endpoint.query)
            endpoint.decode(body)
            principal = None if endpoint.principal is None else await self._ask_principal(endpoint, scope, body)
            digest = rules.key_digest(key)
            wait = rules.parse_wait(headers.prefer, endpoint.wait_seconds) if headers.prefer else endpoint.wait_seconds

            def compose(instance: bytes, number: int, reply_partition: int) -> Request:
                return Request(
                    instance,
                    number,
                    reply_partition,
                    endpoint.route,
                    content_type,
                    body,
                    values,
                    query,
                    principal,
                    headers.trace,
                )

            reply = await self._submit(rules.scope_of(self._app, principal, endpoint.route, digest), compose, wait)
        finally:
            self._bodies.release(body)
        if reply is None:
            operation = rules.operation_id(endpoint.route, digest)
            return _still_running(f"{root}/operations/{operation}", operation), False
        return Answer(reply.status, reply.headers, reply.body), reply.is_replayed

    async def _admit(self) -> None:
        """Raise `Problem` 503 when nothing can be taken now; the first request of all starts the gateway."""
        gateway = self.gateway
        if not gateway.is_ready:
            if gateway.fatal is None and not gateway.is_started:
                gateway.start()
                await gateway.wait_open(self.limits.start_seconds)
            if not gateway.is_ready:
                raise failure("unavailable", f"{gateway.trouble}. Nothing was stored; send it again later.")
        if gateway.in_flight >= self.limits.in_flight:
            raise failure("overloaded")

    async def _submit(self, scope: bytes, compose: Compose, wait: float) -> Reply | None:
        try:
            return await self.gateway.submit(scope, compose, wait)
        except NotTaken as error:
            raise failure("unavailable", f"{error}. Nothing was stored; send it again later.") from None
        except OutcomeUnknown:
            raise failure("outcome-unknown") from None

    async def _ask_principal(self, endpoint: EndpointSpec, scope: Scope, body: bytes) -> str:
        """Who asks. Raises `Problem` as the app's function does, or 500 when it fails."""
        ask = endpoint.principal
        assert ask is not None

        async def replay_body() -> MutableMapping[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        try:
            principal: Any = ask(HTTPRequest(scope, replay_body))
            if inspect.isawaitable(principal):
                principal = await principal
        except Problem:
            raise
        except HTTPException as error:
            raise Problem(error.status_code, str(error.detail), headers=dict(error.headers or {})) from None
        except Exception:
            log.exception("the principal of %s could not be determined", endpoint.route)
            raise failure("principal-failed") from None
        if not isinstance(principal, str) or not principal or not _is_text(principal):
            log.error("principal= of %s gave no name; to refuse a request, raise Problem(401)", endpoint.route)
            raise failure("principal-failed")
        return principal

    # --- Everything else ---

    def _make_rest(self) -> Starlette:
        async def refused(request: HTTPRequest, error: Exception) -> HTTPResponse:
            assert isinstance(error, HTTPException)
            if error.status_code == 404:
                return _http_response(self._not_found(request))
            name = "method-not-allowed" if error.status_code == 405 else "malformed-request"
            return _http_response(problem_answer(failure(name, "", *dict(error.headers or {}).items())))

        routes = [
            Route("/operations/{id}", self._operation, methods=["GET"]),
            Route("/errors/{name}", self._explain, methods=["GET"]),
            Route("/livez", self._livez, methods=["GET"]),
            Route("/readyz", self._readyz, methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
        ]
        rest = Starlette(routes=routes, exception_handlers={HTTPException: refused})
        rest.router.redirect_slashes = False
        return rest

    def _not_found(self, request: HTTPRequest) -> Answer:
        root = request.scope.get("root_path", "")
        path = request.scope["path"].removeprefix(root)
        allowed = sorted({e.method for e in self._by_route.values() if e.pattern.fullmatch(path)})
        if allowed:
            return problem_answer(failure("method-not-allowed", "", ("Allow", ", ".join(allowed))))
        return problem_answer(failure("not-found"))

    async def _operation(self, request: HTTPRequest) -> HTTPResponse:
        """`GET /operations/{id}`: what became of a request. The question goes through the log like the request did."""
        try:
            return _http_response(await self._look_up(request))
        except Problem as problem:
            return _http_response(problem_answer(problem))

    async def _look_up(self, request: HTTPRequest) -> Answer:
        operation = request.path_params["id"]
        found = rules.read_operation_id(operation, self._by_route)
        if found is None:
            raise failure("operation-not-found")
        endpoint = self._by_route[found[0]]
        principal = None
        if endpoint.principal is not None:
            principal = await self._ask_principal(endpoint, request.scope, b"")
        await self._admit()
        wait = rules.parse_wait(_Headers.pick(request.scope["headers"]).prefer, endpoint.wait_seconds)
        scope = rules.scope_of(self._app, principal, endpoint.route, found[1])
        failpoint("ingress.before_look_up")
        reply = await self._submit(
            scope, lambda instance, number, partition: LookUp(instance, number, partition, operation), wait
        )
        failpoint("ingress.after_look_up")
        if reply is None:
            raise failure("no-answer-yet", "The owner is busy or away; ask again later.")
        return Answer(reply.status, reply.headers, reply.body)

    async def _explain(self, request: HTTPRequest) -> HTTPResponse:
        """`GET /errors/{name}`: what a problem type means and what to do about it."""
        name = request.path_params["name"]
        if name not in rules.ERRORS:
            return _http_response(problem_answer(failure("not-found")))
        status, title = rules.ERRORS[name]
        document = {"type": f"/errors/{name}", "title": title, "status": status}
        if name in rules.EXPLANATIONS:
            document["detail"] = rules.EXPLANATIONS[name]
        return HTTPResponse(msgspec.json.encode(document), media_type="application/json")

    async def _livez(self, _: HTTPRequest) -> HTTPResponse:
        """The process runs and its event loop turns."""
        return HTTPResponse("ok\n", media_type="text/plain")

    async def _readyz(self, _: HTTPRequest) -> HTTPResponse:
        """Requests are taken: the log can be reached and replies are read."""
        trouble = await self.gateway.check()
        return HTTPResponse(f"{trouble or 'ok'}\n", 503 if trouble else 200, media_type="text/plain")

    async def _metrics(self, _: HTTPRequest) -> HTTPResponse:
        return HTTPResponse(self._show_metrics(), media_type="text/plain; version=0.0.4")


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_json(content_type: str) -> bool:
    return content_type == "application/json" or (
        content_type.startswith("application/") and content_type.endswith("+json")
    )


def _query(query_string: bytes, names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """The allow-listed query parameters that were sent, sorted. Raises `Problem` 400 for one sent twice."""
    if not names or not query_string:
        return ()
    try:
        pairs = parse_qsl(query_string.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=100)
    except ValueError:
        raise failure("malformed-request", "The query string cannot be read.") from None
    found = sorted((name, value) for name, value in pairs if name in names)
    if len({name for name, _ in found}) < len(found):
        raise failure("malformed-request", "A query parameter was sent twice.")
    return tuple(found)


def _still_running(location: str, operation: str) -> Answer:
    """202: the request is in the log and will have its one outcome; the wait for it is over."""
    headers = (("content-type", "application/json"), ("Location", location), rules.RETRY_AFTER)
    return Answer(202, headers, msgspec.json.encode({"id": operation, "status": "accepted"}))


async def _respond(send: Send, answer: Answer, *, is_replayed: bool) -> None:
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in answer.headers]
    if is_replayed:
        headers.append((b"idempotency-replayed", b"true"))
    if answer.status not in (204, 304):
        headers.append((b"content-length", b"%d" % len(answer.body)))
    if answer.status in (408, 413):  # The rest of the body is still on its way; it must not be read as a request.
        headers.append(_CLOSE)
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})


def _http_response(answer: Answer) -> HTTPResponse:
    return HTTPResponse(answer.body, answer.status, headers=dict(answer.headers))

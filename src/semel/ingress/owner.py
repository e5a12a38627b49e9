"""The owner of a partition of requests: the only place where an Idempotency-Key is decided.

The processing engine hands it the records of `<app>.semel.requests` one after the other, together with the partition's
store of outcomes. What it gives back - the handler's effects, the outcome to store, the reply - becomes real in one
Kafka transaction with the position in the requests: there is no state "begun but not done" to clean up after a crash.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from itertools import islice
from typing import Any
from uuid import UUID

import msgspec

from semel.env import Env
from semel.errors import ConfigurationError
from semel.failpoints import failpoint
from semel.ingress import rules
from semel.ingress.answering import checked, response_answer
from semel.ingress.requests import (
    STORE,
    LookUp,
    Reply,
    Request,
    Stored,
    read_request,
    read_stored,
    requests_topic,
    responses_topic,
    write,
)
from semel.ingress.rules import Answer, Verdict
from semel.ingress.spec import EndpointSpec
from semel.processing.answers import Problem
from semel.processing.component import Component, StoreReader
from semel.processing.effects import Change, Effect, Write, lower, perform
from semel.processing.limits import RECORD_EFFECTS_MAX
from semel.processing.metrics import Metrics
from semel.processing.tracing import follow
from semel.types import Header, Record

__all__ = ["Owner", "owner_component"]

log = logging.getLogger("semel.ingress")

COMPONENT = "requests"
EFFECT_BYTES_MAX = 1_000_000
"""Kafka's max.message.bytes is 1,048,588 by default; a larger record would abort the transaction again and again."""
EFFECTS_BYTES_MAX = 8 * 1_048_576
"""All effects of one request together: half a unit of work."""
EXPIRED_PER_SWEEP = 1_000
EFFECTS_MAX = RECORD_EFFECTS_MAX - EXPIRED_PER_SWEEP - 2
"""The rest is for the outcome, the reply, and the outcomes whose time is over."""
SWEEP_PAUSE_MS = 1_000
"""With a thousand outcomes a second the store shrinks after a busy day, however many requests came on it."""
IDLE_SWEEP_PAUSE_MS = 60_000


def owner_component(app: str, endpoints: Iterable[EndpointSpec], **options: Any) -> Component:
    """What the engine runs for an app's endpoints; `options` are `Owner`'s."""
    owner = Owner(app, endpoints, **options)
    return Component(app=app, name=COMPONENT, inputs=(requests_topic(app),), handle=owner.handle, stores=(STORE,))


class Owner:
    """Takes request records in order and gives their effects."""

    def __init__(
        self,
        app: str,
        endpoints: Iterable[EndpointSpec],
        *,
        wall_ms: Callable[[], int] | None = None,
        retention_ms: int = rules.RETENTION_MS,
        metrics: Metrics | None = None,
        trace: bool = False,
    ) -> None:
        self._responses = responses_topic(app)
        self._endpoints: dict[str, EndpointSpec] = {}
        for endpoint in endpoints:
            if self._endpoints.setdefault(endpoint.route, endpoint) is not endpoint:
                raise ConfigurationError(f"{endpoint.route} is declared twice.")
        self._wall_ms = wall_ms or Env().wall_ms
        self._retention_ms = retention_ms
        self._trace = trace
        self._outcomes = (metrics or Metrics()).counter(
            "semel_requests_total", "Request records by what the owner did with them.", ("outcome",)
        )
        self._next_sweep_ms: dict[int, int] = {}

    async def handle(self, record: Record, stores: StoreReader) -> list[Effect]:
        """The effects of one request record.

        Raises `DataError` for a record or a stored outcome that cannot be read, which parks the key visibly.
        """
        request = read_request(record.value or b"")
        scope = record.key or b""
        known = stores.get(STORE, scope)
        stored = None if known is None else read_stored(known)
        effects = self._expire(record, stores)
        if isinstance(request, LookUp):
            self._outcomes.add(outcome="looked_up")
            try:
                failpoint("owner.before_look_up")
                answer = self._look_up(request, stored, record.timestamp_ms)
            except Exception:
                # A question changes nothing: parking its key would hold up the requests that it asks about.
                log.exception("looking up operation %s failed; whoever asks again asks anew", request.operation)
                answer = rules.problem_answer(rules.failure("look-up-failed"))
            return [*effects, self._reply(request, answer)]
        seen = rules.fingerprint(request.route, request.path, request.query, request.content_type, request.body)
        outcome = None if stored is None else stored.known(self._retention_ms)
        verdict = rules.judge(outcome, seen, record.timestamp_ms)
        if verdict is Verdict.RUN:
            failpoint("owner.before_handler")
            effects += await self._run(request, record, scope, seen)
            failpoint("owner.after_handler")
        elif verdict is Verdict.REUSED:
            self._outcomes.add(outcome="reused")
            effects.append(self._reply(request, rules.key_reused()))
        else:
            assert stored is not None
            failpoint("owner.before_replay")
            self._outcomes.add(outcome="replayed")
            effects.append(self._reply(request, stored.answer, is_replayed=True))
        return effects

    async def _run(self, request: Request, record: Record, scope: bytes, seen: bytes) -> list[Effect]:
        """Run the handler; its effects, the outcome and the reply."""
        endpoint = self._endpoints.get(request.route)
        if endpoint is None:
            self._outcomes.add(outcome="refused")
            detail = "The worker that owns this request does not know its route; its deployment may be under way."
            return self._refuse(request, record, scope, seen, rules.failure("unavailable", detail))
        try:
            body = endpoint.decode(request.body)
        except Problem as problem:  # The type was changed, or the HTTP instance has another build.
            self._outcomes.add(outcome="refused")
            return self._refuse(request, record, scope, seen, problem)
        effects: list[Effect] = []
        is_failed = False
        try:
            parameters = {**dict(request.query), **dict(zip(endpoint.parameters, request.path, strict=True))}
            if request.principal is not None:
                parameters["principal"] = request.principal
            emit = _collector(effects, message_ids(record))
            answer = response_answer(await perform(self._call(endpoint, request, body, parameters), emit))
        except Problem as problem:
            effects, (answer, is_failed) = [], _refusal(problem)
        except Exception:
            log.exception("the handler of %s failed; nothing of it is kept, the next request runs again", request.route)
            effects, is_failed = [], True
            answer = rules.problem_answer(rules.failure("handler-failed"))
        self._outcomes.add(outcome="failed" if is_failed else "run")
        return [*effects, self._keep(record, scope, seen, answer, is_failed), self._reply(request, answer)]

    def _call(self, endpoint: EndpointSpec, request: Request, body: Any, parameters: Mapping[str, str | None]) -> Any:
        """What the handler gives back; with `trace` its effects belong to the trace of the HTTP request."""
        if not self._trace:
            return endpoint.call(body, parameters)
        headers = [(name, value.encode("latin-1")) for name, value in request.trace]
        return follow(lambda: endpoint.call(body, parameters), [headers], request.route)

    def _refuse(self, request: Request, record: Record, scope: bytes, seen: bytes, problem: Problem) -> list[Effect]:
        """Answer without having run the handler. Whoever was told 202 meanwhile finds this at the operation."""
        answer = rules.problem_answer(problem)
        return [self._keep(record, scope, seen, answer, True), self._reply(request, answer)]

    def _keep(self, record: Record, scope: bytes, seen: bytes, answer: Answer, is_failed: bool) -> Change:
        completed_ms = max(record.timestamp_ms, self._wall_ms())  # A request may have waited long before it was run.
        kept = Stored(seen, is_failed, completed_ms, answer.status, answer.headers, answer.body)
        return Change(STORE, scope, write(kept))

    def _reply(self, request: Request | LookUp, answer: Answer, *, is_replayed: bool = False) -> Write:
        reply = Reply(request.number, answer.status, answer.headers, answer.body, is_replayed)
        return Write(self._responses, request.instance, write(reply), partition=request.reply_partition)

    def _look_up(self, request: LookUp, stored: Stored | None, now_ms: int) -> Answer:
        """The operation resource. Its request was appended before the question, so nothing found means no such one."""
        if stored is None or stored.completed_ms + self._retention_ms <= now_ms:
            return rules.problem_answer(rules.failure("operation-not-found"))
        headers = dict(stored.headers)
        document: dict[str, Any] = {
            "id": request.operation,
            "status": "succeeded" if stored.status < 400 else "failed",
            "response": {"status": stored.status, "headers": headers, "body": _as_json(headers, stored.body)},
        }
        if stored.is_failed:
            document["retriable"] = True
        return Answer(200, (("content-type", "application/json"),), msgspec.json.encode(document))

    def _expire(self, record: Record, stores: StoreReader) -> list[Effect]:
        """Take out a few outcomes whose time is over. `judge` does not rely on it: this only bounds the store."""
        now_ms = record.timestamp_ms
        due_ms = self._next_sweep_ms.get(record.partition, 0)
        if now_ms < due_ms <= now_ms + IDLE_SWEEP_PAUSE_MS:  # Farther away it was another topic's or clock's time.
            return []
        expired: list[Effect] = []
        pause_ms = IDLE_SWEEP_PAUSE_MS
        for key, value in islice(stores.items(STORE), EXPIRED_PER_SWEEP):
            expires_ms = read_stored(value).completed_ms + self._retention_ms
            if expires_ms > now_ms:
                pause_ms = min(pause_ms, expires_ms - now_ms)
                break
            expired.append(Change(STORE, key, None))
        if expired:
            pause_ms = min(pause_ms, SWEEP_PAUSE_MS)
        self._next_sweep_ms[record.partition] = now_ms + pause_ms
        return expired


def message_ids(record: Record) -> Callable[[int], bytes]:
    """Ids of a request's outputs by their ordinal: UUIDv7 of the append time, the rest fixed by the request's position.

    A handler that runs again after a crash writes the same ids, so whoever keeps ids sees that nothing is new.
    """
    seed = b"%b|%b|%d|%d|" % (record.topic.encode(), record.key or b"", record.partition, record.offset)

    def message_id(ordinal: int) -> bytes:
        raw = bytearray(record.timestamp_ms.to_bytes(6, "big") + sha256(seed + b"%d" % ordinal).digest()[:10])
        raw[6] = raw[6] & 0x0F | 0x70  # RFC 9562, section 5.7: version 7 and the variant.
        raw[8] = raw[8] & 0x3F | 0x80
        return str(UUID(bytes=bytes(raw))).encode()

    return message_id


def _collector(effects: list[Effect], message_id: Callable[[int], bytes]) -> Callable[[Effect], None]:
    """Takes effects as bytes, so that what cannot be written fails inside the handler's run, not in the engine."""
    total = 0

    def emit(effect: Effect) -> None:
        nonlocal total
        lowered = lower(effect)
        if isinstance(lowered, Change):
            raise TypeError(
                f"an endpoint cannot change state {lowered.store!r}: requests are spread by Idempotency-Key, not "
                "by the state's key. Yield a record and let a processor of its topic change the state."
            )
        size = len(lowered.key or b"") + len(lowered.value or b"") + _headers_size(lowered.headers)
        total += size
        if size > EFFECT_BYTES_MAX or total > EFFECTS_BYTES_MAX or len(effects) >= EFFECTS_MAX:
            raise ValueError(
                f"a record of {size} bytes for {lowered.topic!r} after {len(effects)} others of {total - size} bytes; "
                f"the limits are {EFFECT_BYTES_MAX} bytes a record, {EFFECTS_MAX} records and {EFFECTS_BYTES_MAX} bytes"
            )
        headers = (*lowered.headers, ("semel-id", message_id(len(effects))))
        effects.append(Write(lowered.topic, lowered.key, lowered.value, headers, lowered.partition))

    return emit


def _headers_size(headers: Iterable[Header]) -> int:
    """Bytes of a record's headers. Raises `TypeError` or `ValueError` for what is none."""
    size = 0
    for name, value in headers:
        if not isinstance(name, str) or not (value is None or isinstance(value, bytes)):
            raise TypeError(f"a record's header {name!r:.80} is not a pair of str and bytes")
        size += len(name.encode()) + len(value or b"")
    return size


def _refusal(problem: Problem) -> tuple[Answer, bool]:
    """The outcome of a raised problem, and whether it is one: a problem that cannot be written is a failure."""
    try:
        return checked(rules.problem_answer(problem)), False
    except Exception:
        log.exception("a Problem that the handler raised cannot be written")
        return rules.problem_answer(rules.failure("handler-failed")), True


def _as_json(headers: dict[str, str], body: bytes) -> Any:
    """A stored body inside a JSON document: JSON as it is, anything else as base64."""
    if not body:
        return None
    kind = next((value for name, value in headers.items() if name.lower() == "content-type"), "")
    if kind.partition(";")[0].strip().lower().endswith("json"):
        try:
            msgspec.json.decode(body, type=msgspec.Raw)
        except msgspec.DecodeError:
            return body
        return msgspec.Raw(body)
    return body

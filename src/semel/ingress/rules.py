"""The rules of Idempotency-Key [sans-IO]: what a key is, whose it is, and which answer a request gets.

Follows draft-ietf-httpapi-idempotency-key-header; problem answers are RFC 9457. A key belongs to a scope: application,
principal, method, route and key. Under one scope at most one request has an outcome; every retry of it gets that
outcome, and another request with the same key is refused. Only the owner of the scope's partition decides; an HTTP
instance refuses what cannot be a request at all, and says honestly what it does not know.
"""

from __future__ import annotations

import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable, Sequence
from enum import Enum
from hashlib import sha256
from typing import NamedTuple

import msgspec

from semel.processing.answers import Problem

__all__ = [
    "ERRORS",
    "Answer",
    "KnownOutcome",
    "Verdict",
    "failure",
    "fingerprint",
    "judge",
    "key_digest",
    "key_reused",
    "media_type",
    "operation_id",
    "parse_key",
    "parse_wait",
    "problem_answer",
    "read_operation_id",
    "scope_of",
]

KEY_BYTES_MAX = 255
"""As Stripe and the draft's examples have it: room for any UUID or composite id, and bounded state."""

RESPONSE_BYTES_MAX = 64 * 1024
"""Stored for every key for a day, so bounded; larger results belong into a topic or a database."""

RETENTION_MS = 24 * 3_600_000
"""A stored response answers retries for 24 h after completion (Stripe's window); then its key is new again."""

RETRY_AFTER = ("Retry-After", "1")

_ROUTE_TAG_BYTES = 6
_KEY_DIGEST_BYTES = 30
"""240 bits cannot collide by chance; with the route's tag an operation id is 48 characters without padding."""

_SF_STRING = re.compile(
    r'"((?:[\x20\x21\x23-\x5b\x5d-\x7e]|\\["\\])*)"'  # RFC 9651, section 3.3.3
    r"(?:; *[a-z*][a-z0-9_.*-]*(?:=[A-Za-z0-9_.:/?*+-]+)?)*"  # Parameters, which the draft tells nobody to read.
)
_BARE = re.compile(r"[A-Za-z0-9!#$%&'*+\-.^_`|~:/=@]+")
_ESCAPE = re.compile(r"\\(.)")
_WAIT = re.compile(r"(?:^|[,;])\s*wait\s*=\s*\"?(\d{1,6})\"?\s*(?=$|[,;])", re.IGNORECASE)
_RESPOND_ASYNC = re.compile(r"(?:^|,)\s*respond-async\s*(?=$|[,;])", re.IGNORECASE)


class Answer(NamedTuple):
    """An HTTP answer, ready to be sent or stored. `headers` holds no length and nothing about the connection."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


ERRORS: dict[str, tuple[int, str]] = {
    "idempotency-key-missing": (400, "The Idempotency-Key header is missing"),
    "idempotency-key-invalid": (400, "The Idempotency-Key header is not usable"),
    "idempotency-key-reused": (422, "The Idempotency-Key was used with another request"),
    "idempotency-key-in-use": (409, "A request with this Idempotency-Key is in progress"),
    "malformed-json": (400, "The request body is not valid JSON"),
    "malformed-request": (400, "The request cannot be read"),
    "validation": (422, "The request does not fit its type"),
    "unsupported-media-type": (415, "The content type is not application/json"),
    "body-too-large": (413, "The request body is too large"),
    "receive-timeout": (408, "The request did not arrive in time"),
    "not-found": (404, "There is nothing here"),
    "method-not-allowed": (405, "The method is not allowed here"),
    "operation-not-found": (404, "No such operation is known"),
    "handler-failed": (500, "The handler failed; nothing was done"),
    "look-up-failed": (500, "The outcome could not be read; nothing was changed"),
    "principal-failed": (500, "Who asks could not be determined; nothing was done"),
    "overloaded": (503, "Too many requests are in progress; nothing was stored"),
    "unavailable": (503, "The service cannot take requests now; nothing was stored"),
    "outcome-unknown": (503, "The outcome is unknown"),
    "no-answer-yet": (503, "The owner of this operation has not answered yet"),
}
"""Every problem type that Semel itself answers with: its status and title."""

EXPLANATIONS: dict[str, str] = {
    "idempotency-key-missing": (
        "Send an Idempotency-Key header: a quoted string of 1 to 255 bytes that is new for every new request and the "
        'same for every retry of one, for example "8e03978e-40d5-43e8-bc93-6894a57f9324".'
    ),
    "idempotency-key-invalid": "The key is a structured-field string of 1 to 255 visible ASCII bytes, sent once.",
    "idempotency-key-reused": "Method, path, body and content type of a retry must equal those of the first request.",
    "idempotency-key-in-use": "Send it again with the same key: the answer is that of the request in progress.",
    "outcome-unknown": "The request may or may not have been taken. Send it again with the same Idempotency-Key.",
    "overloaded": "Send it again later with the same Idempotency-Key.",
    "unavailable": "Send it again later with the same Idempotency-Key.",
    "handler-failed": "No effect of it was kept. The next request with the same Idempotency-Key runs again.",
}


def failure(name: str, detail: str = "", *headers: tuple[str, str]) -> Problem:
    """One of `ERRORS` as a problem, with the detail of this occurrence."""
    status, title = ERRORS[name]
    detail = detail or EXPLANATIONS.get(name, "")
    extra = (RETRY_AFTER,) if status == 503 else ()
    return Problem(status, detail, title=title, type=f"/errors/{name}", headers=dict((*extra, *headers)))


def problem_answer(problem: Problem) -> Answer:
    """A problem as `application/problem+json`. Raises what msgspec raises for an extension that is not JSON."""
    headers = (("content-type", "application/problem+json"), *problem.headers.items())
    return Answer(problem.status, headers, msgspec.json.encode(problem.body()))


# --- Reading headers ---


def parse_key(values: Sequence[bytes]) -> str | None:
    """The key in the Idempotency-Key headers of one request; None when there is none.

    A structured-field string (`"abc"`) or, because most clients send it so, a bare token (`abc`): both are the same
    key. Raises `Problem` 400 for anything else, more than 255 bytes, or two headers.
    """
    if not values:
        return None
    if len(values) > 1:
        raise failure("idempotency-key-invalid", "The Idempotency-Key header was sent more than once.")
    raw = values[0].strip(b" \t")
    if len(raw) > 4 * KEY_BYTES_MAX or not raw.isascii():
        raise failure("idempotency-key-invalid")
    text = raw.decode("ascii")
    quoted = _SF_STRING.fullmatch(text)
    if quoted:
        key = _ESCAPE.sub(r"\1", quoted[1])
    elif _BARE.fullmatch(text):
        key = text
    else:
        raise failure("idempotency-key-invalid")
    if not 1 <= len(key) <= KEY_BYTES_MAX:
        raise failure("idempotency-key-invalid")
    return key


def parse_wait(values: Iterable[bytes], limit_seconds: float) -> float:
    """How long this request waits for its answer: `Prefer: wait=N` (RFC 7240), at most the route's limit."""
    for value in values:
        text = value.decode("latin-1")
        if _RESPOND_ASYNC.search(text):
            return 0.0
        found = _WAIT.search(text)
        if found:
            return min(float(found[1]), limit_seconds)
    return limit_seconds


def media_type(value: bytes) -> str:
    """The media type in a Content-Type header, without parameters, in lower case."""
    return value.partition(b";")[0].strip().lower().decode("latin-1")


# --- Identity ---


def _digest(*parts: bytes) -> bytes:
    """sha256 over parts that cannot run into each other: each stands behind its length."""
    return sha256(b"".join([part for item in parts for part in (len(item).to_bytes(4, "big"), item)])).digest()


def key_digest(key: str) -> bytes:
    """What stands for a key in scopes and operation ids: keys themselves are never stored or logged."""
    return sha256(key.encode("ascii")).digest()[:_KEY_DIGEST_BYTES]


def scope_of(app: str, principal: str | None, route: str, digest: bytes) -> bytes:
    """Whose key this is, 32 bytes: the key of the state store and, by murmur2, the partition of the requests topic.

    No principal and an empty one are different: nobody's name must open what belongs to everybody.
    """
    who = b"" if principal is None else b"=" + principal.encode("utf-8", "surrogatepass")
    return _digest(app.encode(), who, route.encode(), digest)


def _route_tag(route: str) -> bytes:
    return sha256(route.encode()).digest()[:_ROUTE_TAG_BYTES]


def operation_id(route: str, digest: bytes) -> str:
    """The name of an operation in its Location: it tells route and key, but only together with who asks a scope.

    So an id that gets into wrong hands opens nothing: for another principal it is another, unknown operation.
    """
    return urlsafe_b64encode(_route_tag(route) + digest).decode()


def read_operation_id(text: str, routes: Iterable[str]) -> tuple[str, bytes] | None:
    """The route and the key digest in an operation id, or None when it is none of these routes'."""
    try:
        raw = urlsafe_b64decode(text.encode("ascii"))
    except (ValueError, UnicodeEncodeError):
        return None
    if len(raw) != _ROUTE_TAG_BYTES + _KEY_DIGEST_BYTES:
        return None
    for route in routes:
        if _route_tag(route) == raw[:_ROUTE_TAG_BYTES]:
            return route, raw[_ROUTE_TAG_BYTES:]
    return None


FINGERPRINT_VERSION = 1


def fingerprint(
    route: str, path: Sequence[str], query: Sequence[tuple[str, str]], content_type: str, body: bytes
) -> bytes:
    """What makes two requests the same one, 33 bytes: the rule's version, then sha256.

    Date, trace context, signatures and ids per attempt are no part of it. The version is stored, so that a later rule
    can judge old keys by the rule they were stored under.
    """
    names = [item.encode("utf-8", "surrogatepass") for pair in query for item in pair]
    values = [item.encode("utf-8", "surrogatepass") for item in path]
    counts = b"%d %d" % (len(values), len(names))
    return bytes([FINGERPRINT_VERSION]) + _digest(route.encode(), counts, *values, *names, content_type.encode(), body)


# --- The decision table ---


class Verdict(Enum):
    """What the owner does with a request."""

    RUN = "run the handler"
    REPLAY = "answer what is stored"
    REUSED = "refuse: the key belongs to another request"


class KnownOutcome(NamedTuple):
    """What is stored under a key, as far as the decision needs it. `expires_ms` is in the time of appends."""

    fingerprint: bytes
    is_failed: bool
    expires_ms: int


def judge(known: KnownOutcome | None, request: bytes, now_ms: int) -> Verdict:
    """The decision table of an owner; `request` is the fingerprint, `now_ms` the append time of the request.

    There is no "in progress": the owner takes the requests of a key one after the other, and what it answers is in
    the log together with the effects, so a request finds either an outcome or nothing. A handler that failed left no
    effects, hence the next request with the key runs again; but it must be the same request.
    """
    if known is None or known.expires_ms <= now_ms:
        return Verdict.RUN
    if known.fingerprint != request:
        return Verdict.REUSED
    return Verdict.RUN if known.is_failed else Verdict.REPLAY


def key_reused() -> Answer:
    """The answer to `Verdict.REUSED`."""
    return problem_answer(failure("idempotency-key-reused"))

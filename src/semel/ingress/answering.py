"""What an endpoint says, as an answer that can be stored and sent again to anybody who has the key."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from semel.ingress import rules
from semel.ingress.rules import Answer
from semel.processing.answers import Problem, Response

__all__ = ["checked", "response_answer"]

_UNSAFE_HEADERS = frozenset(
    [
        *("connection", "content-length", "idempotency-replayed", "keep-alive", "set-cookie"),
        *("te", "trailer", "transfer-encoding", "upgrade"),
    ]
)
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")


def response_answer(result: Any) -> Answer:
    """What a handler answered, as it is stored and sent: a `Response`, a `Problem`, any other JSON value as 200,
    None as 204.

    Raises `ValueError` or `TypeError` for what cannot be an answer; that is the handler's failure.
    """
    if result is None:
        return Answer(204, (), b"")
    if isinstance(result, Problem):
        return checked(rules.problem_answer(result))
    response = result if isinstance(result, Response) else Response(200, result)
    if response.body is None:
        return checked(Answer(response.status, tuple(response.headers.items()), b""))
    if isinstance(response.body, bytes):
        content_type, body = "application/octet-stream", response.body
    else:
        content_type, body = "application/json", msgspec.json.encode(response.body)
    headers: Sequence[tuple[str, str]] = tuple(response.headers.items())
    if not any(name.lower() == "content-type" for name, _ in headers):
        headers = (("content-type", content_type), *headers)
    return checked(Answer(response.status, tuple(headers), body))


def checked(answer: Answer) -> Answer:
    """The answer itself. Raises `ValueError` for one that is too large, or cannot be stored and replayed."""
    if len(answer.body) > rules.RESPONSE_BYTES_MAX:
        raise ValueError(f"a response of {len(answer.body)} bytes; the limit is {rules.RESPONSE_BYTES_MAX}")
    if answer.body and answer.status in (204, 304):
        raise ValueError(f"a response with status {answer.status} has no body")
    for name, value in answer.headers:
        if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
            raise ValueError(f"response header {name!r}={value!r:.80} is not valid in HTTP")
        if name.lower() in _UNSAFE_HEADERS:
            raise ValueError(f"response header {name!r} cannot be stored and replayed")
    return answer

"""Answers of an endpoint: a `Response` when the business said yes, a `Problem` when it said no.

Both are outcomes: they are stored under the request's idempotency key and replayed to every retry.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

__all__ = ["Accepted", "Created", "Ok", "Problem", "Response"]


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return f"Status {status}"


def _checked_headers(headers: Mapping[str, str] | None) -> dict[str, str]:
    checked = dict(headers or {})
    for name, value in checked.items():
        if not isinstance(name, str) or not isinstance(value, str) or "\n" in value or "\r" in value:
            raise ValueError(f"response header {name!r}={value!r:.80} must be text on one line")
    return checked


class Response:
    """An HTTP answer. `body` is None, bytes (sent as they are) or anything msgspec writes as JSON."""

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int, body: Any = None, headers: Mapping[str, str] | None = None) -> None:
        if not isinstance(status, int) or not 200 <= status <= 599:
            raise ValueError(f"response status {status!r} is not a final HTTP status (200 to 599)")
        self.status = status
        self.body = body
        self.headers = _checked_headers(headers)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.status} {self.body!r:.60}>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Response):
            return NotImplemented
        return (self.status, self.body, self.headers) == (other.status, other.body, other.headers)

    __hash__ = None  # type: ignore[assignment]


class Ok(Response):
    """200: it is done."""

    def __init__(self, body: Any = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(200, body, headers)


class Created(Response):
    """201: the thing in the body exists now."""

    def __init__(self, body: Any = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(201, body, headers)


class Accepted(Response):
    """202: the work is accepted and will be done."""

    def __init__(self, body: Any = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(202, body, headers)


class Problem(Exception):
    """A refusal by the business, as RFC 9457 problem details. Raised, it drops the handler's effects.

    `type` is a URI that names the kind of problem; `title` defaults to the status' phrase.
    """

    def __init__(
        self,
        status: int,
        detail: str = "",
        *,
        title: str | None = None,
        type: str = "about:blank",  # noqa: A002  # the member's name in RFC 9457
        headers: Mapping[str, str] | None = None,
        **extensions: Any,
    ) -> None:
        if not isinstance(status, int) or not 400 <= status <= 599:
            raise ValueError(f"problem status {status!r} is not an HTTP error status (400 to 599)")
        super().__init__(f"{status} {detail or title or _phrase(status)}")
        self.status = status
        self.detail = detail
        self.title = title or _phrase(status)
        self.type = type
        self.headers = _checked_headers(headers)
        self.extensions = extensions

    def body(self) -> dict[str, Any]:
        """The problem+json object (RFC 9457, section 3.1)."""
        document: dict[str, Any] = {"type": self.type, "title": self.title, "status": self.status}
        if self.detail:
            document["detail"] = self.detail
        return document | self.extensions

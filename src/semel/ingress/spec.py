"""Endpoints as an app declares them. They hold data and know no rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["EndpointSpec"]


@dataclass(frozen=True, slots=True)
class EndpointSpec:
    """An endpoint: `handler(request)` runs once for each idempotency key, at the owner of the request's partition.

    `request` is the type of the body (JSON). `principal` takes the HTTP request and names who asks; without it all
    callers share one space of keys. `timeout_seconds` is how long a caller waits for the outcome before it gets 202.
    """

    name: str
    method: str
    path: str
    request: Any
    handler: Callable[..., Any]
    principal: Callable[[Any], str] | None = None
    require_key: bool = True
    timeout_seconds: float = 5.0

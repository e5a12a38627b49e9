"""An endpoint as an app declares it. Holds data and checks it; knows no IO."""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from semel.errors import ConfigurationError
from semel.processing.answers import Problem
from semel.processing.topics import serde

__all__ = ["RESERVED", "EndpointSpec"]

RESERVED = ("operations", "errors", "livez", "readyz", "metrics")
"""First path segments that the ingress answers itself."""

WAIT_SECONDS_DEFAULT = 5.0
_PARAMETER = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class EndpointSpec:
    """One route, `method` and `path` (`/orders/{id}`), and the handler that runs once per Idempotency-Key.

    `request` is the type of the JSON body, or `bytes` for a body that is handed over as it came. `principal` maps the
    HTTP request to the name of who asks; a key of one principal is unknown to every other. `query` names the query
    parameters that belong to the request; all others are ignored. `wait_seconds` bounds how long an HTTP request waits
    for its answer before it gets 202. The handler is called with the decoded body, and by keyword with those path and
    query parameters, and `principal`, that it takes. Raises `ConfigurationError` for what cannot work.
    """

    path: str
    request: Any
    handler: Callable[..., Any]
    method: str = "POST"
    principal: Callable[[Any], str | Awaitable[str]] | None = None
    key_required: bool = True
    query: tuple[str, ...] = ()
    wait_seconds: float = WAIT_SECONDS_DEFAULT
    parameters: tuple[str, ...] = field(init=False)
    """Names of the path parameters, in the order of the path."""
    pattern: re.Pattern[str] = field(init=False, repr=False, compare=False)
    _decode: Callable[[bytes], Any] = field(init=False, repr=False, compare=False)
    _keywords: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.method not in ("POST", "PUT", "PATCH", "DELETE"):
            raise ConfigurationError(f"{self.method} {self.path}: an endpoint is POST, PUT, PATCH or DELETE.")
        if self.wait_seconds < 0:
            raise ConfigurationError(f"{self.route}: wait_seconds is {self.wait_seconds}, but must not be negative.")
        parameters, pattern = _compile(self.path)
        clash = (set(parameters) & set(self.query)) | ({"principal"} & {*parameters, *self.query})
        if clash:
            raise ConfigurationError(f"{self.route}: the parameter name {min(clash)!r} is used twice.")
        put = object.__setattr__
        put(self, "parameters", parameters)
        put(self, "pattern", pattern)
        put(self, "_decode", _decoder(self.request, self.route))
        put(self, "_keywords", _keywords(self.handler, {*parameters, *self.query, "principal"}, self.route))

    @property
    def route(self) -> str:
        """The route's name in records and scopes: method and path template."""
        return f"{self.method} {self.path}"

    @property
    def name(self) -> str:
        """The handler's name."""
        return str(getattr(self.handler, "__name__", type(self.handler).__name__))

    @property
    def is_raw(self) -> bool:
        """The body is handed over as it came: no content type is asked for and nothing is decoded."""
        return self.request is bytes

    def decode(self, body: bytes) -> Any:
        """The body as the handler's type. Raises `Problem` 400 (not JSON) or 422 (not the type)."""
        try:
            return self._decode(body)
        except msgspec.ValidationError as error:
            raise Problem(
                422, str(error), type="/errors/validation", title="The request does not fit its type"
            ) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            detail = "the JSON is nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise Problem(
                400, detail, type="/errors/malformed-json", title="The request body is not valid JSON"
            ) from None

    def call(self, request: Any, parameters: Mapping[str, str | None]) -> Any:
        """Call the handler with the decoded request and the parameters it takes; returns what it gives back."""
        return self.handler(request, **{name: parameters.get(name) for name in self._keywords})


def _compile(path: str) -> tuple[tuple[str, ...], re.Pattern[str]]:
    """The parameter names of a path template and the expression that matches its paths."""
    if not path.startswith("/") or not path.isascii() or any(c in path for c in " ?#%"):
        raise ConfigurationError(f"{path!r} is not a path: it begins with '/' and is plain ASCII without '?' or '%'.")
    if path.split("/")[1] in RESERVED:
        raise ConfigurationError(f"{path!r} cannot be a route: Semel answers /{path.split('/')[1]} itself.")
    names: list[str] = []
    parts: list[str] = []
    at = 0
    for match in _PARAMETER.finditer(path):
        name = match[1]
        if not name.isidentifier() or name in names:
            raise ConfigurationError(f"{path!r}: {{{name}}} is not a parameter name, or stands there twice.")
        names.append(name)
        parts += [re.escape(path[at : match.start()]), f"(?P<{name}>[^/]+)"]
        at = match.end()
    rest = path[at:]
    if "{" in "".join(parts[::2]) + rest or "}" in rest:
        raise ConfigurationError(f"{path!r} has a brace without its partner.")
    return tuple(names), re.compile("".join(parts) + re.escape(rest))


def _decoder(request: Any, route: str) -> Callable[[bytes], Any]:
    if request is bytes:
        return bytes
    if request is not str:  # A JSON string; as a topic's type it would be plain text.
        serde(request, f"the request of {route}")
    return msgspec.json.Decoder(request).decode


def _keywords(handler: Callable[..., Any], offered: set[str], route: str) -> frozenset[str]:
    """Which of the offered parameters the handler takes."""
    signature = inspect.signature(handler).parameters.values()
    positional = [p for p in signature if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
    if not positional:
        raise ConfigurationError(f"{route}: its handler takes no argument, but gets the request as the first one.")
    if any(p.kind is p.VAR_KEYWORD for p in signature):
        return frozenset(offered)
    taken = {p.name for p in signature if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - {positional[0].name}
    needed = {p.name for p in signature if p.default is p.empty and p.kind is not p.VAR_POSITIONAL}
    missing = needed - {positional[0].name} - offered
    if missing:
        raise ConfigurationError(
            f"{route}: its handler wants {', '.join(sorted(missing))}, which the path and query do not give."
        )
    return frozenset(taken & offered)

"""Faults as an interface: what a test lets happen to the n-th request of an API.

Rules are consulted where a request enters the node, so they work for every client and every API alike. Each does what
a network or a broker can do to a client: an error, another answer, an answer that comes late, or never.
A connection answers in order, so after a dropped request or response it stays silent, as behind a cut wire.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from semel.broker.exchange import Answer, Later, Request
from semel.errors import ConfigurationError, ErrorCode, ProtocolError
from semel.wire.messages import api_key_of, api_name, latest_version, response_entity
from semel.wire.refusal import can_refuse, refusal

if TYPE_CHECKING:
    from semel.broker.node import Node

__all__ = [
    "Action",
    "Answered",
    "Close",
    "Control",
    "Delay",
    "DropRequest",
    "DropResponse",
    "Error",
    "Hold",
    "Rule",
    "rule_for",
]

Handle = Callable[[Request], Answer | Later]
MAX_RULES = 1_000
"""A test that forgets to remove rules is told, before every request walks through thousands of them."""


@dataclass(frozen=True, slots=True)
class Error:
    """Answer this error code in every place that the response has for one; nothing happens."""

    code: ErrorCode


@dataclass(frozen=True, slots=True)
class Answered:
    """Answer these fields (names of Kafka's schema in snake_case) instead; nothing happens."""

    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Delay:
    """Carry the request out after so many seconds. It overtakes nothing on its own connection."""

    seconds: float


@dataclass(slots=True)
class Hold:
    """Keep the request until the rule is removed; then what was held is carried out in order."""

    _held: list[Callable[[], None]] = field(default_factory=list, repr=False)
    _released: bool = False

    def release(self) -> None:
        """Let them go, and hold no more."""
        self._released = True
        held, self._held = self._held, []
        for action in held:
            action()

    def keep(self, action: Callable[[], None]) -> None:
        """Hold one request, or let it go at once when released."""
        if self._released:
            action()
        else:
            self._held.append(action)


@dataclass(frozen=True, slots=True)
class DropRequest:
    """The request never arrives; the connection stays open and silent."""


@dataclass(frozen=True, slots=True)
class DropResponse:
    """The request is carried out and nobody learns of it; the connection stays open and silent."""


class Close(Enum):
    """Close the connection before the request is carried out, or after that without an answer."""

    BEFORE = "before"
    AFTER = "after"


Action = Error | Answered | Delay | Hold | DropRequest | DropResponse | Close


@dataclass(slots=True, eq=False)
class Rule:
    """An action for the `on`-th matching request of an API and `times` - 1 more behind it."""

    api_key: int
    action: Action
    on: int = 1
    times: int = 1
    when: Callable[[Any], bool] | None = None
    """Counts only requests for which this is true; it gets the decoded request."""
    seen: int = 0
    """Matching requests so far."""
    hits: int = 0
    """How often the action was taken."""
    on_hit: Callable[[], None] = field(default=lambda: None, repr=False)
    """Called after each hit, in the broker's thread."""

    def takes(self, request: Request) -> bool:
        """Count this request; whether the action is for it."""
        if self.when is not None and not self.when(request.body):
            return False
        self.seen += 1
        if not self.on <= self.seen < self.on + self.times:
            return False
        self.hits += 1
        self.on_hit()
        return True


class Control:
    """The rules of one broker; empty, it costs one truth test a request."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._rules: dict[int, list[Rule]] = {}

    def __repr__(self) -> str:
        return f"<Control {sum(map(len, self._rules.values()))} rules>"

    def __bool__(self) -> bool:
        return bool(self._rules)

    def add(self, rule: Rule) -> Rule:
        """Install a rule; the first that takes a request wins. Raises `ConfigurationError`."""
        if rule.on < 1 or rule.times < 1:
            raise ConfigurationError(f"A rule begins with the 1st request and acts at least once, not {rule!r}.")
        if isinstance(rule.action, Delay) and rule.action.seconds < 0:
            raise ConfigurationError(f"{rule.action!r} lies in the past.")
        if isinstance(rule.action, Error):
            response: Any = response_entity(rule.api_key, latest_version(rule.api_key))
            if not can_refuse(response):
                raise ConfigurationError(f"The response of {api_name(rule.api_key)} has no place for an error.")
        if sum(map(len, self._rules.values())) >= MAX_RULES:
            raise ConfigurationError(f"{MAX_RULES} rules are installed: remove those that are done with.")
        self._rules.setdefault(rule.api_key, []).append(rule)
        return rule

    def remove(self, rule: Rule) -> None:
        """Take a rule out; what it holds is let go."""
        rules = self._rules.get(rule.api_key, [])
        if rule in rules:
            rules.remove(rule)
        if not rules:
            self._rules.pop(rule.api_key, None)
        if isinstance(rule.action, Hold):
            rule.action.release()

    def clear(self) -> None:
        """Take every rule out."""
        for rule in [rule for rules in self._rules.values() for rule in rules]:
            self.remove(rule)

    def handle(self, request: Request, handle: Handle) -> Answer | Later:
        """Carry a request out, as its rule says."""
        for rule in self._rules.get(request.header.api_key, ()):
            if rule.takes(request):
                return self._act(rule.action, request, handle)
        return handle(request)

    def _act(self, action: Action, request: Request, handle: Handle) -> Answer | Later:
        key, version = request.header.api_key, request.version
        match action:
            case Error(code):
                return refusal(key, version, request.body, code)
            case Answered(values):
                return dict(values)
            case Delay(seconds):
                return self._put_off(request, handle, lambda go: self._node.call_later(seconds, go))
            case Hold():
                return self._put_off(request, handle, action.keep)
            case DropRequest():
                return Later(self._node.outbox, request)
            case DropResponse():
                handle(request)
                return Later(self._node.outbox, request)
            case Close.BEFORE:
                raise ProtocolError(f"a rule closes it before {api_name(key)}")
            case Close.AFTER:
                handle(request)
                raise ProtocolError(f"a rule closes it after {api_name(key)}")

    def _put_off(self, request: Request, handle: Handle, later: Callable[[Callable[[], None]], object]) -> Later:
        """Carry a copy of the request out when `later` says so, even if its connection is gone by then."""
        kept = Request(request.header, memoryview(bytes(request.frame)), request.peer, request.now_ms)
        outer = Later(self._node.outbox, kept)

        def go() -> None:
            kept.now_ms = self._node.env.wall_ms()
            try:
                answer = handle(kept)
            except ProtocolError:
                return  # The connection that it would have closed stays silent.
            if isinstance(answer, Later):
                answer.deliver = outer.answer
                outer.abandon = answer.close
            else:
                outer.answer(answer)

        later(go)
        return outer


def rule_for(api: str | int, action: Action, on: int, times: int, when: Callable[[Any], bool] | None) -> Rule:
    """A rule for an API by its name in any usual spelling (`EndTxn`, `end_txn`) or its key.

    Raises `ConfigurationError` for a name that does not exist.
    """
    key = api if isinstance(api, int) else api_key_of(api)
    if key is None:
        raise ConfigurationError(f"There is no API {api!r} in Kafka's protocol: EndTxn, for example, is one.")
    return Rule(key, action, on, times, when)

"""The broker without its sockets: state, and the dispatch of requests to their handlers.

One thread, no awaits: a handler runs to its end before the next one starts, so each request is one atomic step and no
state needs a lock. What cannot be answered at once becomes a `Later`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from semel.broker.apis import APIS
from semel.broker.cleaner import Cleaner
from semel.broker.commit import Background, GroupCommit, at_once
from semel.broker.config import BrokerConfig
from semel.broker.control import Control
from semel.broker.dynamic_config import DynamicConfig
from semel.broker.exchange import Answer, Later, Outbox, Parts, Peer, Request
from semel.broker.fetch_sessions import FetchSessions
from semel.broker.groups import Groups
from semel.broker.metadata import MetadataStore
from semel.broker.security.acls import Authorizer, Operation, Resource
from semel.broker.security.guard import guarded
from semel.broker.security.login import PASS
from semel.broker.security.users import Users
from semel.broker.topics import Topics
from semel.broker.transactions import Transactions
from semel.env import Env
from semel.errors import ConfigurationError, CorruptBatch, ProtocolError
from semel.log.log import LogError
from semel.wire.messages import RequestHeader, api_name, decode_request_header, encode_response

__all__ = ["Node", "Timer", "unusable"]

T = TypeVar("T")


_API_VERSIONS = 18


class Aside(Protocol):
    """Do `work` without holding up anybody, then call `done` with its result."""

    def __call__(self, work: Callable[[], T], done: Callable[[T], None]) -> None: ...


def _at_once(work: Callable[[], T], done: Callable[[T], None]) -> None:
    done(work())


class Timer(Protocol):
    """A call that was put off."""

    def cancel(self) -> None:
        """Do not make the call."""


class Node:
    """Everything behind the listener. `call_later(seconds, callback)` is the shell's timer, `background` its disk."""

    def __init__(
        self,
        data: Path,
        config: BrokerConfig,
        env: Env,
        call_later: Callable[[float, Callable[[], None]], Timer],
        background: Background = at_once,
    ) -> None:
        self.config = config
        self.env = env
        self.call_later = call_later
        self.outbox = Outbox()
        self.control = Control(self)
        self.commits = GroupCommit(background)
        self.fetch_sessions = FetchSessions(env.rng)
        self.metadata = MetadataStore(data / "metadata.log", str(env.new_id()))
        self.users = Users(self.metadata)
        self.authorizer: Authorizer | None = None
        if config.security.authorize:
            security = config.security
            self.authorizer = Authorizer(
                lambda: self.metadata.acls, security.super_users, allow_if_no_acl=security.allow_everyone_if_no_acl
            )
        self.aside: Aside = _at_once
        """Does long arithmetic elsewhere; set by the shell."""
        self.settings = DynamicConfig(self.metadata, config)
        self.topics = Topics(data / "topics", self.metadata, config, self.settings, env)
        self.cleaner = Cleaner(self.topics, env)
        self.transactions = Transactions(self.topics, self.metadata, config, env)
        self.groups = Groups(self.topics, config, self.settings, env, call_later, self.outbox)

    def __repr__(self) -> str:
        return f"<Node {self.metadata.cluster_id}, {self.topics!r}>"

    def open(self) -> None:
        """Recover logs and coordinators; finish transactions whose decision was durable, abort those of nobody.

        Raises `ConfigurationError` when files cannot be read or written, or are damaged.
        """
        try:
            self.users.ensure(self.config.security.users)
            self.topics.open()
            self.groups.open()
            self.transactions.open(self.groups)
        except (LogError, OSError, CorruptBatch) as problem:
            raise unusable(self.topics.directory.parent, problem) from problem

    def close(self) -> None:
        """Close every file."""
        self.cleaner.stop()
        self.groups.close()
        self.topics.close()
        self.metadata.close()

    def sweep(self) -> None:
        """What happens by the clock: transactions time out, offsets expire, the coordinators' logs are shortened."""
        try:
            self.transactions.sweep(self.env.wall_ms())
        finally:
            self.groups.sweep()

    def expire(self) -> None:
        """What happens by the calendar: old segments and silent producers go."""
        self.topics.expire(self.env.wall_ms())

    def handle(self, frame: memoryview, peer: Peer) -> Parts | Later | None:
        """Answer one request frame. Raises `ProtocolError` when the connection is to be closed."""
        if peer.login is not None:
            taken = peer.login.take(self, frame)
            if taken is not PASS:
                return taken
        header = decode_request_header(frame)
        request = Request(header, frame, peer, self.env.wall_ms())
        api = APIS.get(header.api_key)
        if api is None:
            raise ProtocolError(f"{api_name(header.api_key)} is not supported")
        if not api.min_version <= header.api_version <= api.max_version and header.api_key != _API_VERSIONS:
            raise ProtocolError(
                f"{api_name(header.api_key)} v{header.api_version} is outside {api.min_version}-{api.max_version}"
            )
        if self.authorizer is None and not self.control:
            answer = api.handle(self, request)
        else:
            answer = self._handle_with_care(request, partial(api.handle, self))
        return answer if isinstance(answer, Later) else _encode(header, answer)

    def _handle_with_care(self, request: Request, handle: Callable[[Request], Answer | Later]) -> Answer | Later:
        """With what stands between a request and its handler: injected faults, then rights."""
        permitted = handle if self.authorizer is None else partial(self._guarded, handle)
        return self.control.handle(request, permitted) if self.control else permitted(request)

    def _guarded(self, handle: Callable[[Request], Answer | Later], request: Request) -> Answer | Later:
        return guarded(self, request, handle)

    def denies(self, request: Request, operation: Operation, resource: Resource, name: str) -> bool:
        """Whether the client of this request may not do this. Every handler asks here; without an authorizer: no."""
        authorizer = self.authorizer
        if authorizer is None:
            return False
        peer = request.peer
        return not authorizer.allows(peer.principal, peer.client_host, operation, resource, name)

    def encode(self, later: Later, answer: Answer) -> Parts | None:
        """The bytes of an answer that came later."""
        return _encode(later.header, answer)


_REMEDIES = {
    errno.ENOSPC: "Free some space on its disk.",
    errno.EDQUOT: "Raise the quota of its disk, or free some space.",
    errno.EACCES: "Make it readable and writable for the user that the broker runs as.",
    errno.EPERM: "Make it readable and writable for the user that the broker runs as.",
    errno.EROFS: "Mount its disk so that it can be written.",
    errno.EMFILE: "Let the process open more files (ulimit -n).",
    errno.ENFILE: "Let the system open more files.",
    errno.EIO: "Its disk fails: copy what is readable, and restore the rest from a backup.",
}


def unusable(data: Path, problem: Exception) -> ConfigurationError:
    """Why the broker cannot start on this directory, and what to do."""
    cause = problem if isinstance(problem, OSError) else problem.__cause__
    code = cause.errno if isinstance(cause, OSError) else None
    what = f"The broker cannot start on {data}: {problem}".rstrip(".")
    if isinstance(problem, LogError) and code is None:
        return ConfigurationError(f"{what}.")  # Damage; the log has said what can be done.
    remedy = _REMEDIES.get(code or 0, "Put right what it names, or restore the directory from a backup.")
    return ConfigurationError(f"{what}. {remedy} Nothing that was acknowledged has been changed.")


def _encode(header: RequestHeader, answer: Answer) -> Parts | None:
    if isinstance(answer, dict):
        return [encode_response(header.api_key, header.api_version, header.correlation_id, **answer)]
    return answer

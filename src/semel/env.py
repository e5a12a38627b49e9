"""Everything that comes from outside the program: clocks, randomness, ids - and failpoints.

Sans-IO rooms get these as values or through `Env`, so that the same code runs in production and in a seeded
simulation. No safety decision reads a clock; time-outs and back-off do.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from semel.errors import ConfigurationError, SemelError

__all__ = ["FAILPOINTS", "Env", "FailpointRaised", "arm_failpoints", "failpoint", "listen"]


_BACKLOG = 1024


def listen(host: str, port: int) -> socket.socket:
    """A non-blocking listening socket. Raises `ConfigurationError` when the address cannot be had."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
    except OSError as error:
        raise ConfigurationError(f"Cannot listen on {host}:{port}: {error.strerror or error}.") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            hint = "Another process listens there: stop it, or choose another port (port 0 takes a free one)."
        else:
            hint = "Choose an address of this machine and a port that you may use."
        raise ConfigurationError(f"Cannot listen on {host}:{port}: {error.strerror}. {hint}") from error
    return sock


@dataclass(frozen=True, slots=True)
class Env:
    """The outside world. `monotonic` is seconds, `wall_ms` milliseconds since 1970 in UTC."""

    monotonic: Callable[[], float] = time.monotonic
    wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000
    rng: random.Random = field(default_factory=random.Random)
    new_id: Callable[[], uuid.UUID] = uuid.uuid4
    listen: Callable[[str, int], socket.socket] = listen
    """Where connections come in; connecting is the event loop's `create_connection`, files are `semel.disk`'s."""


class FailpointRaised(SemelError):
    """Raised by a failpoint with the action `raise`; stands for any unexpected exception at that line."""


FAILPOINTS: dict[str, str] = {
    "ingress.before_append": "an HTTP instance is about to append a request to the requests topic",
    "ingress.after_append": "the request is in the log, the client has no answer yet",
    "unit.before_produce": "handlers ran, nothing of the transaction was sent",
    "unit.after_produce": "outputs are in the log, the input offset is not in the transaction",
    "unit.before_end_transaction": "outputs and offset are in the transaction, EndTxn was not sent",
    "unit.after_end_transaction": "the transaction is committed, local state is not updated",
    "sink.before_effects": "the position row is locked and moved, no effect was written",
    "sink.before_db_commit": "all effects are written, COMMIT was not sent",
    "sink.after_db_commit": "the database committed, the sink does not know yet",
    "broker.before_append": "the broker is about to append a batch",
    "broker.after_append": "the batch is in the file, the producer has no answer",
    "broker.after_init": "a new identity is durable, the producer has no answer",
    "broker.before_prepare": "EndTxn arrived, its decision is not durable",
    "broker.after_prepare": "the decision is durable, no marker was written",
    "broker.between_markers": "some of the transaction's markers were written",
    "broker.after_markers": "all markers were written, the transaction is not complete in the log",
    "compaction.before_swap": "a compacted segment and its index are on the disk, the segments that it replaces count",
    "compaction.after_swap": "the compacted segment counts, the others that it replaces are still there",
    "compaction.between_deletions": "some of the segments that were replaced are deleted",
    "compaction.after_snapshot": "the compacted segment is in place, and the next start knows it",
}
"""Every failpoint: its name and what has and has not happened there."""

_armed: dict[str, tuple[str, int]] = {}
_hits: dict[str, int] = {}


def arm_failpoints(spec: str, *, profile: str = "dev") -> None:
    """Arm failpoints from `name:action:nth[,...]`; action is `kill`, `stop`, `raise` or `delay=SECONDS`.

    The nth hit acts, once. Raises `ConfigurationError` for an unknown name or action, and in a production profile.
    """
    _armed.clear()
    _hits.clear()
    for item in filter(None, spec.split(",")):
        if profile == "production":
            raise ConfigurationError(
                "SEMEL_FAILPOINT is set but SEMEL_PROFILE is production: failpoints kill processes on purpose. "
                "Unset one of the two."
            )
        name, _, rest = item.partition(":")
        action, _, nth = rest.partition(":")
        if name not in FAILPOINTS:
            raise ConfigurationError(
                f"SEMEL_FAILPOINT names {name!r}, which does not exist. Known: {', '.join(sorted(FAILPOINTS))}."
            )
        if action not in ("kill", "stop", "raise") and not action.startswith("delay="):
            raise ConfigurationError(
                f"SEMEL_FAILPOINT action {action!r} is not one of kill, stop, raise, delay=SECONDS."
            )
        if nth and (not nth.isdigit() or nth == "0"):
            raise ConfigurationError(f"SEMEL_FAILPOINT hit number {nth!r} is not a whole number from 1.")
        _armed[name] = (action, int(nth or 1))


def failpoint(name: str) -> None:
    """Do what was armed for this point, if anything; costs one truth test when nothing is armed."""
    if not _armed:
        return
    armed = _armed.get(name)
    if armed is None:
        return
    action, nth = armed
    _hits[name] = _hits.get(name, 0) + 1
    if _hits[name] != nth:
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "raise":
        raise FailpointRaised(f"failpoint {name} (hit {nth})")
    else:
        time.sleep(float(action.removeprefix("delay=")))  # Blocks the process on purpose, as a long pause would.

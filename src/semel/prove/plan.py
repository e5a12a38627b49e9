"""A proof plan: what an app's author knows and `semel prove` cannot guess - good inputs, and what must hold at the end.

It stands beside the app, as `plan` in the module `<app module>_proof`, or where `--plan MODULE:NAME` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

__all__ = ["Accepted", "Input", "ProofContext", "ProofPlan", "Request", "SourceRecord"]


@dataclass(frozen=True, slots=True)
class Request:
    """An HTTP request to an endpoint of the app. `body` is sent as JSON, bytes as they are.

    `key` is the Idempotency-Key; without one the campaign gives each input a key of its own. `headers` are for the
    endpoint's principal: `(("Authorization", "Bearer ..."),)`.
    """

    method: str
    path: str
    body: Any = None
    key: str | None = None
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """A record that the campaign appends to a topic of the app, as the world outside would."""

    topic: str
    key: Any
    value: Any


Input = Request | SourceRecord


@dataclass(frozen=True, slots=True)
class Accepted:
    """One input and what became of it.

    `status` is the final HTTP status, 200 for a record that was acknowledged; 0 says that no answer came, so the
    effects may be there or not.
    """

    input: Input
    status: int

    @property
    def is_done(self) -> bool:
        """The input was answered with success: its effects must be there, once."""
        return 200 <= self.status < 300


class ProofContext(Protocol):
    """What `check` may look at, when everything is drained and every process has stopped."""

    def inputs(self) -> Iterator[Accepted]:
        """Every input with its outcome, in the order in which `inputs` gave them; may be walked again."""
        ...

    def query(self, sql: str, parameters: Sequence[Any] = (), *, database: str = "database") -> list[tuple[Any, ...]]:
        """Rows of one of the app's databases. Raises the driver's error."""
        ...


@dataclass(frozen=True, slots=True)
class ProofPlan:
    """`inputs(rng)` yields inputs, for as long as it is asked; only `rng` may decide what they are.

    `check(context)` returns a sentence for each problem, with the ids; none means that all is as it must be. Totals
    are the best of it: what the inputs add up to against what the tables add up to.
    """

    inputs: Callable[[Random], Iterable[Input]]
    check: Callable[[ProofContext], Iterable[str]] | None = None

"""What every kind of fault is: it says whether it can be done here, strikes one target, and heals what it broke.

A campaign asks `refusal` of each kind once, and shows the answer: a kind that this machine cannot do is named in the
report, never dropped. It then picks kind, target and seed, and calls `inflict`, which strikes, holds and heals.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from semel import history
from semel.errors import SemelError
from semel.faultpage import FaultPage
from semel.history import Strike

if TYPE_CHECKING:
    from semel.prove.faults.intake import Intake
    from semel.prove.faults.links import Links

__all__ = ["Fault", "NotNow", "Outcome", "Targets", "inflict", "role_of"]


class NotNow(SemelError):
    """The target is not there at this moment (a process that is being started again): nothing was done."""


class Outcome(NamedTuple):
    """What a strike did, in words for the report, and for how long it is to last until it is healed."""

    done: str
    hold_seconds: float = 0.0


@dataclass(slots=True)
class Targets:
    """What there is to strike. What a deployment does not have stays at its default, and its faults are refused."""

    names: Sequence[str] = ()
    """Processes as `role-slot`; the role is `worker`, `http` or `broker`."""
    pid: Callable[[str], int | None] = lambda _name: None
    """The process id of one of them, None while it does not run. Whoever is killed is started again by its keeper."""
    armed: dict[str, str] = field(default_factory=dict)
    """By name: SEMEL_FAILPOINT for the next start. `environment` takes it out."""
    folder: Path = Path()
    """The data of the run; the broker's is in `broker` below it."""
    session_seconds: float = 6.0
    """After so much silence a member of a group is given up."""
    links: Links | None = None
    """The ways of the processes to Kafka and PostgreSQL, when they lead through proxies."""
    sqlite_files: Sequence[Path] = ()
    """The app's databases that are SQLite files."""
    pages: Mapping[str, FaultPage] = field(default_factory=dict)
    """By process: the page that it was started with; see `make_pages`."""
    copies: Callable[[int], None] | None = None
    """Tells the load to send every request so many times at once, until it is told 1 again."""
    intake: Intake | None = None
    """Where records and requests go into the app."""

    def make_pages(self) -> None:
        """Make a fault page for every process; `environment` hands them over."""
        self.pages = {name: FaultPage.make(self._page(name)) for name in self.names}

    def environment(self, name: str) -> dict[str, str]:
        """What a process is to be started with, so that it can be struck. An armed failpoint is used up by that."""
        found = {"SEMEL_FAILPOINT": self.armed.pop(name, "")}
        if name in self.pages:
            found["SEMEL_FAULT_PAGE"] = str(self._page(name))
        return found if self.links is None else found | self.links.environment(name)

    def _page(self, name: str) -> Path:
        return self.folder / "faults" / f"{name}.page"

    def of_role(self, *roles: str) -> list[str]:
        """The processes of these roles."""
        return [name for name in self.names if role_of(name) in roles]

    def running(self, name: str) -> int:
        """The process id of a process that runs. Raises `NotNow`."""
        pid = self.pid(name)
        if pid is None:
            raise NotNow(f"{name} does not run at this moment.")
        return pid


def role_of(name: str) -> str:
    """`worker` of `worker-1`."""
    return name.rpartition("-")[0]


class Fault(ABC):
    """One kind of fault, made for one strike: what it has to heal is in the object."""

    kind: ClassVar[str]
    """Its name for `--faults`."""
    does: ClassVar[str]
    """What is done, in one line for the report."""
    promise: ClassVar[str]
    """What Semel promises under it, in one line for the report."""

    def __init__(self, targets: Targets) -> None:
        self.targets = targets

    @classmethod
    def refusal(cls, targets: Targets) -> str:
        """Why this kind cannot be done here, as a sentence; empty when it can."""
        return "" if cls.aims(targets) else f"this deployment has nothing that {cls.kind} could strike."

    @classmethod
    @abstractmethod
    def aims(cls, targets: Targets) -> list[str]:
        """The targets by name; each can be given to `strike`."""

    @abstractmethod
    async def strike(self, target: str, rng: Random) -> Outcome:
        """Break something; `rng` decides what is open. Raises `NotNow` when the target is not there."""

    async def heal(self) -> None:  # noqa: B027 - what heals by itself has nothing to do here
        """Undo the strike. Harmless when there is nothing to undo, and when what was struck is gone."""


async def inflict(
    fault: Fault,
    target: str,
    rng: Random,
    tell: Callable[[Strike], None] = lambda _strike: None,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
) -> Outcome:
    """Strike, hold and heal; heals also when it is cancelled.

    Two events go into the history, and to `tell`: `invoke` before anything is done, then `ok` when it is healed, or
    `fail` if nothing was done. Raises `NotNow` when nothing was done.
    """
    attempt = history.attempt()

    def note(type_: history.Outcome, detail: str = "", outcome: str = "") -> None:
        event = Strike(type=type_, a=attempt, kind=fault.kind, target=target, detail=detail, outcome=outcome)
        history.note(event)
        tell(event)

    note("invoke")
    done = ""
    try:
        try:
            outcome = await fault.strike(target, rng)
            done = outcome.done
            await sleep(outcome.hold_seconds)
        finally:
            await fault.heal()
    except NotNow as error:
        note("fail", outcome=str(error))
        raise
    except BaseException as error:
        note("ok", done, f"ended early by {type(error).__name__}: {error}".rstrip(": "))
        raise
    note("ok", done, "healed")
    return outcome

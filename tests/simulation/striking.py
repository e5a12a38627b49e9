"""A world with a database and with faults that wait for a step: what Semel's own processes are struck in."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest import mock

from semel.failpoints import failpoint
from tests.simulation.actors import Actor
from tests.simulation.database import DatabaseHost
from tests.simulation.fibers import Fiber
from tests.simulation.loop import PROCESS, Crash, Process
from tests.simulation.plan import DATABASE_FAULTS, Fault, Plan
from tests.simulation.world import World

__all__ = ["StrikingWorld"]

_SESSION = {"idle_in_transaction_session_timeout": "2s", "statement_timeout": "4s"}
"""The database lets go of who stands still about as soon as the group does."""
POINTS = 12
"""A fault strikes at one of the next so many steps."""


class StrikingWorld(World):
    """The failpoints of its processes are steps; `zombie` and `kill at point` wait for one of them."""

    quiet_points: tuple[str, ...] = ()
    """Steps that are passed so often that hardly any fault would be left for the others."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.database = DatabaseHost(self)
        self._fibers: list[Fiber] = []
        self._armed: list[tuple[int, Fault]] = []
        """Faults that wait for so many more steps."""

    def fiber(self) -> Fiber:
        """A thread for the process that runs now."""
        self._fibers.append(Fiber(self.loop))
        return self._fibers[-1]

    def settings(self) -> AbstractContextManager[None]:
        return _instead(super().settings(), self)

    def strike(self, fault: Fault) -> None:
        if self._calm:
            return
        if fault.kind in DATABASE_FAULTS:
            self._strike_database(fault)
            return
        if fault.kind not in ("zombie", "kill at point"):
            super().strike(fault)
            return
        self.trace("fault", fault)
        # At once would most often be while it waits for a poll: at one of its next durable steps is more telling.
        self._armed.append((int(fault.draw * POINTS), fault))

    def _strike_database(self, fault: Fault) -> None:
        self.trace("fault", fault)
        if fault.kind == "end session":
            self.database.end_session(fault.draw)
        elif fault.kind == "cut database":
            self.database.cut(fault.draw)
        elif fault.kind == "restart database":
            self.database.restart(fault.seconds)
        elif fault.kind == "late COMMIT":
            self.database.commit_late = fault.seconds
        else:
            self.database.commit_fault = "before" if fault.draw < 0.5 else "after"

    def kill_client(self, actor: Actor, process: Process) -> None:
        super().kill_client(actor, process)
        self.database.process_ended(process)

    def end_life(self, actor: Actor, process: Process) -> None:
        super().end_life(actor, process)
        self.database.process_ended(process)

    def abandon(self) -> None:
        for fiber in self._fibers:
            fiber.end()
        super().abandon()

    def reached(self, name: str, *_: Any) -> None:
        """In the place of `failpoint`: what is armed for the steps of the processes strikes here."""
        if name in self.quiet_points:
            return
        process = PROCESS.get()
        if process is None or process is self.broker_process or not process.alive or process.paused or self._calm:
            return
        armed, self._armed = self._armed, []
        for left, fault in armed:
            if left:
                self._armed.append((left - 1, fault))
                continue
            self.trace("fault", fault.kind, process.name, "at", name)
            if fault.kind == "zombie":
                self._pause(process, 1.1 + fault.seconds)
            else:
                self.kill_client(next(actor for actor, life in self.lives if life is process), process)
                raise Crash(name)


@contextmanager
def _instead(settings: AbstractContextManager[None], world: StrikingWorld) -> Iterator[None]:
    with settings, ExitStack() as stack:
        stack.enter_context(mock.patch("semel.databases.postgres.psycopg.connect", world.database.connect))
        stack.enter_context(mock.patch.dict("semel.databases.postgres._SESSION", _SESSION))
        for name, module in sorted(sys.modules.items()):
            if name.startswith("semel.") and vars(module).get("failpoint") is failpoint and name != "semel.failpoints":
                stack.enter_context(mock.patch.object(module, "failpoint", world.reached))
        yield

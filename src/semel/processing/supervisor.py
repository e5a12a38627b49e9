"""The supervisor: starts processes and keeps them running.

A child that ends is started again in the same slot, with back-off. One that is silent on its heartbeat pipe is killed:
it may hang or be stopped, and its transaction must not hold up readers. One that was fenced twice within a minute has
a twin somewhere that holds the same identity; it is left alone, because two of them would fence each other for ever.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from semel.client.cluster import Backoff
from semel.env import Env, comes
from semel.processing import EXIT_CONFIGURATION, EXIT_FENCED, EXIT_OVERDUE
from semel.processing.files import replace_file
from semel.processing.heartbeat import HEARTBEAT_VARIABLE

__all__ = ["ChildSpec", "Supervisor"]

log = logging.getLogger("semel.supervisor")

START_SECONDS = 60.0
"""How long a child may take to its first beat: an import on a machine that is short of everything."""
RESTART_SECONDS = (0.1, 10.0)
STEADY_SECONDS = 10.0
"""A child that ran this long starts again without a wait."""
FENCED_WINDOW_SECONDS = 60.0
WATCH_SECONDS = 0.1

Environment = Mapping[str, str] | Callable[[], Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """One process to keep running. `argv` is never read by a shell.

    `environment` (a mapping, or a function that is asked at each start) replaces our own; `log` is a file that takes
    stdout and stderr. `is_first`: it needs the others while it drains, so they are told to stop when it is gone;
    `is_last`: the others need it.
    """

    name: str
    argv: Sequence[str]
    environment: Environment | None = None
    slot: int = 0
    log: Path | None = None
    is_last: bool = False
    is_first: bool = False

    @property
    def stop_order(self) -> int:
        """Children of a lower number are gone before those of a higher one are told to stop."""
        return 2 if self.is_last else 0 if self.is_first else 1


@dataclass(slots=True)
class _Child:
    spec: ChildSpec
    backoff: Backoff
    state: str = "waiting"
    process: asyncio.subprocess.Process | None = None
    restarts: int = -1
    started: float = 0.0
    last_beat: float | None = None
    fenced: list[float] = field(default_factory=list)
    task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process is not None and self.process.returncode is None else None


class Supervisor:
    """Keeps children running until `drain`.

    `silence_seconds` is how long a child's heartbeat may fail to come, `drain_seconds` how long a stop may take before
    children are killed, `restart_seconds` the first and the longest wait before a child is started again.
    `on_exit(name, returncode)` is called whenever a child ended; `status` is a JSON file for tools, replaced at every
    change.
    """

    def __init__(
        self,
        children: Sequence[ChildSpec],
        *,
        silence_seconds: float = 6.0,
        drain_seconds: float = 25.0,
        status: Path | None = None,
        on_exit: Callable[[str, int], None] | None = None,
        restart_seconds: tuple[float, float] = RESTART_SECONDS,
        env: Env | None = None,
    ) -> None:
        names = [spec.name for spec in children]
        assert len(set(names)) == len(names), f"children with one name: {names}"
        self._env = env or Env()
        self._children = {spec.name: _Child(spec, Backoff(self._env, *restart_seconds)) for spec in children}
        self._silence_seconds = silence_seconds
        self._drain_seconds = drain_seconds
        self._status = status
        self._on_exit = on_exit or (lambda _name, _returncode: None)
        self._draining = asyncio.Event()
        self._exit_code = 0
        self._drain_task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Supervisor {', '.join(f'{name}={child.state}' for name, child in self._children.items())}>"

    # --- Life ---

    async def run(self, *, handle_signals: bool = False) -> int:
        """Keep the children running until `drain`; returns the exit code for this process.

        With `handle_signals`, SIGTERM and SIGINT drain, and a second one kills.
        """
        loop = asyncio.get_running_loop()
        if handle_signals:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._signalled)
        watch = asyncio.create_task(self._watch(), name="supervisor watch")
        try:
            for child in self._children.values():
                child.task = asyncio.create_task(self._keep(child), name=f"child {child.spec.name}")
            await self._until_ended()
        finally:
            if handle_signals:
                for number in (signal.SIGTERM, signal.SIGINT):
                    loop.remove_signal_handler(number)
            await self._reap()
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
            self._write_status()
        return self._exit_code

    async def drain(self) -> None:
        """Stop everything: SIGTERM, then after `drain_seconds` SIGKILL. Returns when every child is gone."""
        if self._drain_task is None:
            self._draining.set()
            self._drain_task = asyncio.create_task(self._drain(), name="supervisor drain")
        await asyncio.shield(self._drain_task)

    def kill(self) -> None:
        """Stop everything at once."""
        self._draining.set()
        for child in self._children.values():
            _signal(child, signal.SIGKILL)

    def pid(self, name: str) -> int | None:
        """The process id of a child that runs, else None."""
        return self._children[name].pid

    def _signalled(self) -> None:
        if self._draining.is_set():
            log.warning("second signal: killing every child")
            self.kill()
        else:
            log.info("draining; a second signal kills")
            self._give_up(self._exit_code)

    async def _until_ended(self) -> None:
        """Wait until every child has ended for good; an exception of a keeper ends all."""
        tasks = [child.task for child in self._children.values() if child.task is not None]
        if tasks:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        if self._drain_task is not None:
            await self._drain_task

    async def _reap(self) -> None:
        """However we came here, leave no child behind."""
        self.kill()
        for child in self._children.values():
            if child.task is not None:
                child.task.cancel()
        await asyncio.gather(*(child.task for child in self._children.values() if child.task), return_exceptions=True)
        for child in self._children.values():
            if child.process is not None:
                await child.process.wait()

    async def _drain(self) -> None:
        deadline = self._env.monotonic() + self._drain_seconds
        for order in range(3):
            group = [child for child in self._children.values() if child.spec.stop_order == order]
            for child in group:
                _signal(child, signal.SIGTERM)
            tasks = [child.task for child in group if child.task is not None and not child.task.done()]
            if not tasks:
                continue
            seconds = max(1.0, deadline - self._env.monotonic())
            if order == 0:
                seconds /= 2  # The others are to have some of it, too.
            _, late = await asyncio.wait(tasks, timeout=seconds)
            if late:
                names = ", ".join(child.spec.name for child in group if child.task in late)
                log.warning("%s did not stop within %.1f s: killed", names, seconds)
                for child in group:
                    _signal(child, signal.SIGKILL)
                await asyncio.wait(late)

    # --- One child ---

    async def _keep(self, child: _Child) -> None:
        while not self._draining.is_set():
            returncode = await self._run_once(child)
            self._on_exit(child.spec.name, returncode)
            if self._draining.is_set() or not self._may_restart(child, returncode):
                break
            if self._env.monotonic() - child.started >= STEADY_SECONDS:
                child.backoff.reset()
            seconds = child.backoff.next()
            self._become(child, "waiting")
            log.warning("%s ended with %s; starting again in %.1f s", child.spec.name, _how(returncode), seconds)
            await comes(self._draining, seconds)
        if child.state not in ("fenced", "failed"):
            self._become(child, "stopped")

    async def _run_once(self, child: _Child) -> int:
        """Start the child and return its exit code."""
        read_end, write_end = os.pipe()
        os.set_blocking(read_end, False)
        loop = asyncio.get_running_loop()
        spec = child.spec
        given = spec.environment() if callable(spec.environment) else spec.environment
        environment = {**(os.environ if given is None else given), HEARTBEAT_VARIABLE: str(write_end)}
        try:
            output = spec.log.open("ab") if spec.log is not None else None
            try:
                process = await asyncio.create_subprocess_exec(
                    *spec.argv,
                    env=environment,
                    pass_fds=(write_end,),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=asyncio.subprocess.STDOUT if output is not None else None,
                    # Ctrl-C in a terminal reaches the supervisor alone, which then drains in order.
                    start_new_session=True,
                )
            finally:
                os.close(write_end)
                if output is not None:
                    output.close()
            child.process, child.started, child.last_beat = process, self._env.monotonic(), None
            child.restarts += 1
            self._become(child, "starting")
            loop.add_reader(read_end, self._beat, child, read_end)
            if self._draining.is_set():
                # The drain began while the process was being made, and could not see it.
                _signal(child, signal.SIGTERM)
            return await process.wait()
        finally:
            loop.remove_reader(read_end)
            os.close(read_end)

    def _beat(self, child: _Child, read_end: int) -> None:
        if not os.read(read_end, 4096):
            asyncio.get_running_loop().remove_reader(read_end)
            return
        child.last_beat = self._env.monotonic()
        if child.state == "starting":
            self._become(child, "running")

    def _may_restart(self, child: _Child, returncode: int) -> bool:
        name = child.spec.name
        if returncode == EXIT_CONFIGURATION:
            log.error("%s cannot run as it is set up; its own message says why. Stopping everything.", name)
            self._become(child, "failed")
            self._give_up(EXIT_CONFIGURATION)
            return False
        if returncode == EXIT_FENCED:
            now = self._env.monotonic()
            child.fenced = [at for at in child.fenced if now - at < FENCED_WINDOW_SECONDS] + [now]
            if len(child.fenced) >= 2:
                log.error(
                    "%s (slot %d) was fenced twice within a minute and is not started again: another process, maybe on "
                    "another host, runs with the same SEMEL_INSTANCE and slot; its own message names the id. Stop that "
                    "process, or give this host its own SEMEL_INSTANCE.",
                    name,
                    child.spec.slot,
                )
                self._become(child, "fenced")
                others = [other for other in self._children.values() if not other.spec.is_last]
                if all(other.state in ("fenced", "failed") for other in others):
                    self._give_up(EXIT_FENCED)
                return False
        return True

    def _give_up(self, exit_code: int) -> None:
        self._exit_code = self._exit_code or exit_code
        if self._drain_task is None:
            self._draining.set()
            self._drain_task = asyncio.create_task(self._drain(), name="supervisor drain")

    # --- Watching ---

    async def _watch(self) -> None:
        """Kill children that are silent. Beats that wait in the pipe are read before this looks."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            now = self._env.monotonic()
            for child in self._children.values():
                if child.pid is None:
                    continue
                since = child.started if child.last_beat is None else child.last_beat
                limit = START_SECONDS if child.last_beat is None else self._silence_seconds
                if now - since > limit:
                    log.error("%s (pid %d) was silent for %.1f s: killed", child.spec.name, child.pid, now - since)
                    _signal(child, signal.SIGKILL)

    # --- Status ---

    def _become(self, child: _Child, state: str) -> None:
        child.state = state
        self._write_status()

    def _write_status(self) -> None:
        """Replace the status file in one step, so that a reader never sees half of it."""
        if self._status is None:
            return
        rows = [
            {
                "name": child.spec.name,
                "slot": child.spec.slot,
                "pid": child.pid,
                "state": child.state,
                "restarts": max(0, child.restarts),
            }
            for child in self._children.values()
        ]
        try:
            text = json.dumps({"pid": os.getpid(), "children": rows}, indent=1) + "\n"
            replace_file(self._status, text.encode())
        except OSError as error:
            log.warning("the status file %s cannot be written: %s", self._status, error)


def _signal(child: _Child, number: signal.Signals) -> None:
    if child.process is not None and child.process.returncode is None:
        with suppress(ProcessLookupError):
            child.process.send_signal(number)


def _how(returncode: int) -> str:
    if returncode < 0:
        try:
            return signal.Signals(-returncode).name
        except ValueError:
            return f"signal {-returncode}"
    return {EXIT_FENCED: "EXIT_FENCED", EXIT_OVERDUE: "EXIT_OVERDUE"}.get(returncode, f"exit code {returncode}")

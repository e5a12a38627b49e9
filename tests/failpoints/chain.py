"""A chain of real processes - broker, HTTP instance, worker - in which case after case runs, each with fresh orders."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.client.consumer import Reader
from semel.env import Env
from semel.errors import OutcomeUnknown, Retriable, SemelError
from semel.failpoints import FAILPOINTS
from semel.ingress.requests import requests_topic
from semel.ingress.rules import key_digest, operation_id
from semel.ops.parking import Request, ask, open_shelves
from semel.processing.component import park_topic, state_topic
from semel.processing.parking import KIND
from semel.processing.ports import free_ports
from semel.prove.check.findings import Findings
from semel.prove.check.totals import Effect, check_effects, check_totals
from semel.settings import Settings
from semel.types import Record, TopicPartition
from tests.failpoints.children import ITEMS, PARTITIONS, SHORT_MS, make_app
from tests.failpoints.plan import PARKING, Case, Scene, scene_of
from tests.two_phase.writer import FENCED as WRITER_FENCED
from tests.two_phase.writer import TOPIC as DUAL
from tests.two_phase.writer import Database, Plan

ORDERS = 10
MANY_ORDERS = 80
CLIENTS = 4
ANSWER_SECONDS = 5.0
"""After this a client asks again; another instance may answer."""
PATIENCE_SECONDS = 150.0
"""A case that is not through by then has lost something, or hangs: both are findings."""
UNSTICK_SECONDS = 40.0
"""After this a process that goes on after `raise`, or stands still, is killed, as a supervisor or an operator would."""
BROKER_PAUSE_SECONDS = 0.6
JOIN_SECONDS = 20.0
_JOINERS = ("fp.ledger", "fp.count.chain.1", "fp.requests.chain.1")
JOIN_PACE_SECONDS = 0.3
"""Between two orders of one client while a second worker comes and goes."""
ZOMBIE_SECONDS = 15.0
ZOMBIE_ROUNDS_SECONDS = 0.5
STRIKE_SECONDS = 40.0
"""So long a process under load may take to the pass that is to strike it."""
AFTER_STRIKE_SECONDS = 0.5
ZOMBIE_REST_SECONDS = 3.0
_FENCED = re.compile(r"FENCED .*|[^\n]*was taken over by[^\n]*|[^\n]*was fenced[^\n]*")
_LOST = re.compile(
    r"FENCED .*|[^\n]*(?:was taken over by| lost (?!the)|was aborted|timed out|its session ended|gave back)[^\n]*"
)
WRITER_TRANSACTIONS = 4
PARKED_REQUESTS = park_topic("fp", requests_topic("fp"))
_RETRY = frozenset({202, 429, 500, 502, 503, 504})
_AWAY = (Retriable, OutcomeUnknown, ConnectionError, TimeoutError)


@dataclass
class Process:
    """One child: what it is, and since when it is what."""

    pid: int
    role: str
    slot: int
    armed: str
    log: Path
    hits: Path
    port: int = 0
    exit_code: int | None = None
    stopped_at: float = 0.0
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_stopped(self) -> bool:
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        except OSError:
            return False

    def says(self, since: int) -> str:
        """What it wrote to its log, from this byte on."""
        return self.log.read_bytes()[since:].decode(errors="replace")

    def last_words(self, since: int) -> str:
        """How it ended, and what it said of being fenced."""
        ended = "went on" if self.exit_code is None else f"ended with {self.exit_code}"
        words = [found for word in (_FENCED, _LOST) for found in [word.search(self.says(since))] if found]
        return f"{self.role} {ended}: {words[0][0][:300] if words else 'silent'}"

    def signal(self, number: signal.Signals) -> None:
        if self.exit_code is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def passed(self) -> dict[str, int]:
        """How often it came by each failpoint, if it could say so at its end."""
        return dict(json.loads(self.hits.read_text())) if self.hits.exists() else {}


class Nursery:
    """The process that forks."""

    def __init__(self, folder: Path) -> None:
        with (folder / "nursery.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.failpoints.children"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def ask(self, **order: Any) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.communicate()


@dataclass
class Result:
    """What a case came to."""

    case: str
    outcome: str = "clean"
    """`clean`, `anomaly`, `stuck`, `broken` by an error, or `unreached` when no process came by so often."""
    detail: str = ""
    seconds: float = 0.0
    hit: int = 0
    passed: int = 0
    """How often the struck process came by, as far as it could say."""
    restarted: bool = False
    """A process that went on after `raise` did its work again only after a restart."""
    zombie: str = ""
    """How the stopped process ended when it was continued, and what it said."""


@dataclass
class Batch:
    """The orders of one case and what clients were told."""

    orders: dict[int, str]
    answers: dict[int, tuple[int, bytes]] = field(default_factory=dict)
    told: Findings = field(default_factory=Findings)
    may_park: bool = False
    """An exception is raised where it is taken for a record's fault: what is parked is accounted for."""


class Chain:
    """Processes, and everything that comes out of them. Use it as an async context manager."""

    def __init__(self, folder: Path, *, dual: bool = False) -> None:
        self.folder = folder
        self._has_app = not dual
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.bootstrap = f"127.0.0.1:{free_ports(1)[0]}"
        self._rows = folder / "rows.db"
        self._nursery = Nursery(folder)
        self._count = 0
        self._running: dict[tuple[str, int], Process] = {}
        self._all: list[Process] = []
        self._zombies: list[Process] = []
        self._stop_successors = True
        self._tasks: set[asyncio.Task[None]] = set()
        self._records: dict[str, list[tuple[Record, Any]]] = {}
        """By topic: each record and its value, read once."""
        self._reader: Reader | None = None
        self._cases = 0
        self._carried: Batch | None = None
        self._is_enough = True
        self.batches: list[Batch] = []
        self._options: dict[str, Any] = {}
        self._driven: set[str] = set()
        """Roles whose processes are started by `stream`, not by their keeper."""

    async def __aenter__(self) -> Self:
        self.start("broker")
        dirty = {"cleanup.policy": "compact", "min.cleanable.dirty.ratio": "0.01"}
        trail = {"retention.bytes": "4000"}
        wanted = {
            "orders": TopicSpec(PARTITIONS),
            "items": TopicSpec(PARTITIONS),
            "trail": TopicSpec(1, trail),
            "latest": TopicSpec(1, dirty),
            state_topic("fp", "seen"): TopicSpec(PARTITIONS, dirty),
            park_topic("fp", "orders"): TopicSpec(PARTITIONS),
            PARKED_REQUESTS: TopicSpec(PARTITIONS),
            DUAL: TopicSpec(2, {"retention.ms": "-1"}),  # Its records are of 2023.
        }
        async with KafkaClient(self.bootstrap) as client:
            await Admin(client).create_topics(wanted)
        self._partitions = [
            TopicPartition(topic, number)
            for topic, partitions in (
                ("orders", 2),
                ("items", 2),
                (park_topic("fp", "orders"), 2),
                (PARKED_REQUESTS, 2),
                (DUAL, 2),
            )
            for number in range(partitions)
        ]
        self._reader = Reader(
            self.bootstrap, settings={"reconnect.backoff.ms": "10", "reconnect.backoff.max.ms": "100"}
        )
        await self._reader.start(dict.fromkeys(self._partitions, 0))
        self._database = Database(f"sqlite:///{self.folder / 'dual.db'}")
        self._database.create()
        if self._has_app:
            self.start("http")
            self.start("worker")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._running.clear()
        for process in self._all:
            process.signal(signal.SIGKILL)
        for process in self._all:
            await process.ended.wait()
        if self._reader is not None:
            await self._reader.close()
        self._database.close()
        self._nursery.close()

    # --- Processes ---

    def start(self, role: str, arm: str = "", slot: int = 0, **options: Any) -> Process:
        """Fork a role; whoever had its place is not touched."""
        self._count += 1
        name = self.folder / f"{self._count:04}-{role}-{slot}"
        port = free_ports(1)[0] if role == "http" else 0
        log, hits = name.with_suffix(".log"), name.with_suffix(".hits")
        log.touch()
        pid = self._nursery.ask(
            do="fork",
            role=role,
            slot=slot,
            arm=arm,
            port=port,
            kafka=self.bootstrap,
            folder=str(self.folder),
            log=str(log),
            hits=str(hits),
            **self._options,
            **options,
        )
        process = Process(pid, role, slot, arm, log, hits, port)
        self._running[role, slot] = process
        self._all.append(process)
        self._spawn(self._keep(process, options))
        return process

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _keep(self, process: Process, options: dict[str, Any]) -> None:
        """Supervise: whatever ends unbidden starts again, whatever stands still gets a successor."""
        loop = asyncio.get_running_loop()
        file = os.pidfd_open(process.pid)
        gone = loop.create_future()
        loop.add_reader(file, _settle, gone)
        place = (process.role, process.slot)
        try:
            while not gone.done():
                await asyncio.wait((gone,), timeout=0.05)
                if not gone.done() and process not in self._zombies and process.is_stopped:
                    process.stopped_at = time.monotonic()
                    self._zombies.append(process)
                    if self._running.get(place) is process and self._has_successor(process):
                        self._succeed(process, options)
        finally:
            loop.remove_reader(file)
            os.close(file)
        process.exit_code = self._nursery.ask(do="wait", pid=process.pid)
        process.ended.set()
        if self._running.get(place) is process and process.role not in self._driven:
            self.start(process.role, slot=process.slot, **options)

    def _has_successor(self, process: Process) -> bool:
        """Whether something is done at once for one that stands still."""
        return process.role == "broker" or (self._stop_successors and process.role not in self._driven)

    def _succeed(self, process: Process, options: dict[str, Any]) -> None:
        """A broker's directory is locked by the one that stands still, so that one has to go on."""
        if process.role == "broker":
            asyncio.get_running_loop().call_later(BROKER_PAUSE_SECONDS, process.signal, signal.SIGCONT)
        else:
            self.start(process.role, slot=process.slot, **options)

    async def end(
        self, role: str, slot: int = 0, *, kill: bool = False, leave: Sequence[Process] = ()
    ) -> Process | None:
        """End a process for good, unless it is to be left: SIGTERM, and SIGKILL if that takes long."""
        process = self._running.pop((role, slot), None)
        if process is None or process in leave:
            return None
        process.signal(signal.SIGKILL if kill else signal.SIGTERM)
        process.signal(signal.SIGCONT)
        try:
            await asyncio.wait_for(process.ended.wait(), 10)
        except TimeoutError:
            process.signal(signal.SIGKILL)
            await process.ended.wait()
        return process

    # --- Many cases ---

    async def stream(self, cases: list[Case]) -> list[Result]:
        """Run cases without scenes under one load that does not end: each process that is struck gives way to the next.

        Every role has its own row of cases, and they are struck at the same time. In the end everything that was
        ordered meanwhile is compared: an outcome that is not clean is that of all cases together.
        """
        if not self._has_app:
            return await self._stream_dual(cases)
        roles = sorted({FAILPOINTS[case.point].role for case in cases})
        for place in ("broker", "http", "worker"):
            if (place, 0) not in self._running:
                self.start(place)
        self._driven = set(roles)
        first = len(self.batches)
        load = self._spawn(self._load_on())
        results: list[Result] = []
        try:
            async with asyncio.timeout(PATIENCE_SECONDS + STRIKE_SECONDS * len(cases)):
                rows = [[case for case in cases if FAILPOINTS[case.point].role == role] for role in roles]
                for found in await asyncio.gather(*(self._strike(row) for row in rows)):
                    results += found
                self._is_enough = True
                await load
                await self._until(lambda: not self._zombies)
                while not all(self._is_there(batch) for batch in self.batches[first:]):
                    await self._read()
                await self._catch_up()
            findings = self.check(self.batches[first:])
            outcome, detail = ("clean", "") if findings.clean else ("anomaly", findings.summary())
        except TimeoutError:
            outcome, detail = "stuck", self._missing()
        finally:
            self._driven = set()
            load.cancel()
            await asyncio.gather(load, return_exceptions=True)
        struck = [result for result in results if result.outcome == "clean"]
        for result in struck:
            result.outcome, result.detail = outcome, detail
        return results or [Result(str(case), outcome, detail) for case in cases]

    async def _stream_dual(self, cases: list[Case]) -> list[Result]:
        """The same for the broker alone, under the dual write."""
        self._driven = {"broker"}
        writing = self._spawn(self._write_on())
        try:
            async with asyncio.timeout(PATIENCE_SECONDS + STRIKE_SECONDS * len(cases)):
                results = await self._strike(cases)
                self._is_enough = True
                await writing
                while (await self._write("", 2)).exit_code != 0:
                    continue
                await self._catch_up()
            findings = self._check_dual()
            outcome, detail = ("clean", "") if findings.clean else ("anomaly", findings.summary())
        except TimeoutError:
            return [Result(str(case), "stuck", "the dual write does not end") for case in cases]
        finally:
            self._driven = set()
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
        for result in results:
            if result.outcome == "clean":
                result.outcome, result.detail = outcome, detail
        return results

    async def _write_on(self) -> None:
        """Writer after writer; each ends when its broker does."""
        self._is_enough = False
        while not self._is_enough:
            await self._write("", 20)

    async def _load_on(self) -> None:
        """Order after order, until it is enough."""
        self._is_enough = False
        while not self._is_enough:
            await self._load(self._new_batch(), 0.02)

    async def _strike(self, row: list[Case]) -> list[Result]:
        """One role: start it armed, wait until it is struck, and put the next one in its place."""
        results = []
        for case in row:
            began = time.monotonic()
            role = FAILPOINTS[case.point].role
            await self.end(role, kill=True, leave=self._zombies)
            victim = self.start(role, case.spec)
            result = Result(str(case), hit=case.hit)
            results.append(result)
            acted = f"failpoint {case.point} acts"
            with suppress(TimeoutError):
                async with asyncio.timeout(STRIKE_SECONDS):
                    while acted not in victim.says(0) and not victim.ended.is_set():
                        await asyncio.sleep(0.03)
            if acted not in victim.says(0):
                result.outcome, result.detail = "unreached", f"within {STRIKE_SECONDS:g} s"
            elif case.action == "stop" and role != "broker":
                while victim not in self._zombies and not victim.ended.is_set():
                    await asyncio.sleep(0.03)
                del self._running[role, 0]
                self._spawn(self._wake(victim, result))
            elif case.action == "stop":
                await self._until(lambda: bool(self._zombies.count(victim)))  # noqa: B023
                await self._until(lambda: not victim.is_stopped)  # noqa: B023
                self._zombies.remove(victim)
            elif not case.action.startswith(("kill", "torn")):
                with suppress(TimeoutError):
                    await asyncio.wait_for(victim.ended.wait(), AFTER_STRIKE_SECONDS)
            result.seconds = round(time.monotonic() - began, 2)
        for role in {FAILPOINTS[case.point].role for case in row}:
            self._driven.discard(role)  # The other rows go on, and need it whole.
            await self.end(role, kill=True, leave=self._zombies)
            self.start(role)
        return results

    async def _wake(self, zombie: Process, result: Result) -> None:
        """Continue a process whose successors have been at work for a while."""
        await asyncio.sleep(ZOMBIE_REST_SECONDS)
        said = len(zombie.log.read_bytes())
        zombie.signal(signal.SIGCONT)
        with suppress(TimeoutError):
            await asyncio.wait_for(zombie.ended.wait(), 1.0 if zombie.role == "http" else ZOMBIE_SECONDS)
        result.zombie = zombie.last_words(said)
        zombie.signal(signal.SIGKILL)
        await zombie.ended.wait()
        self._zombies.remove(zombie)

    # --- One case ---

    async def run(self, case: Case, *, pause: float = 0.0, elsewhere: bool = False) -> Result:
        """Run a case. The chain is as good as new afterwards, unless the outcome is not clean.

        What stands still does so for `pause` seconds at least. Its successor takes its place at once; `elsewhere`: it
        has none, and another worker takes over when its session has ended.
        """
        began = time.monotonic()
        result = Result(str(case), hit=case.hit)
        scene = scene_of(case.point)
        role = FAILPOINTS[case.point].role
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                if role == "app" or scene.dual:
                    await self._run_writer(case, role, result)
                else:
                    await self._run_chain(case, scene, role, result, pause, elsewhere)
        except TimeoutError:
            result.outcome, result.detail = "stuck", f"{PATIENCE_SECONDS:g} s: {self._missing()}"
        except Exception as error:
            result.outcome, result.detail = "broken", repr(error)
        result.seconds = round(time.monotonic() - began, 2)
        return result

    async def _run_chain(
        self, case: Case, scene: Scene, role: str, result: Result, pause: float, elsewhere: bool
    ) -> None:
        self._options = {"doubt": scene.doubt, "short": scene.short or pause > 0}
        self._stop_successors = not elsewhere
        if elsewhere:
            self.start("worker", slot=1)
        await self._prepare(scene, role)
        arm = ",".join(filter(None, (case.spec if case.action else "*:count", scene.also)))
        others = {} if scene.stalls else dict(scene.others)
        if scene.stalls:
            others["worker"] = "producer.before_end:stop:2"
            self._stop_successors = False
        for other, spec in others.items():
            await self.end(other, kill=True)
            self.start(other, spec)
        await self.end(role, kill=True)
        victim = self.start(role, arm)
        for place in ("broker", "http", "worker"):
            if (place, 0) not in self._running:
                self.start(place)
        batch = self._new_batch(MANY_ORDERS if scene.much else ORDERS, releases=scene.releases)
        (self.folder / "closed").touch()
        batch.may_park = case.action == "raise" and case.point in PARKING
        load = self._spawn(self._load(batch, JOIN_PACE_SECONDS if scene.joins else 0.0))
        try:
            await self._drive(scene, batch, victim, load)
            await self._until_drained(batch, case, victim, result)
        finally:
            load.cancel()
            await asyncio.gather(load, return_exceptions=True)
        self._options, self._stop_successors = {}, True
        await self._bury(result, pause, elsewhere)
        await self._finish(case, victim, result)
        await self._catch_up()
        self._judge(batch, result)

    async def _prepare(self, scene: Scene, role: str) -> None:
        """What has to have happened before the process starts that is struck."""
        if scene.before:
            await self.end("broker", kill=True)
            dying = self.start("broker", scene.before)
            batch = self._new_batch()
            load = self._spawn(self._load(batch))
            self._running.pop(("broker", 0))
            await dying.ended.wait()
            load.cancel()
            await asyncio.gather(load, return_exceptions=True)
            # These orders go on with the case; nobody knows which of them are in the log.
            self._carried = batch
        elif scene.torn or scene.no_index or scene.forgotten:
            await self.end("broker", kill=True)
        logs = sorted(self.folder.glob("broker/topics/*/*"))
        if scene.torn:
            for folder in logs:
                active = max(folder.glob("*.log"), default=None)
                if active is not None and active.stat().st_size:
                    with active.open("ab") as file:
                        file.write(active.read_bytes()[:71])  # A whole header, and not the batch that it announces.
        if scene.no_index:
            for path in self.folder.glob("broker/topics/*/*/*.index"):
                path.unlink()
        if scene.forgotten:
            shutil.rmtree(self._log_of("__transaction_state"))
        if scene.old_state or scene.bad_state:
            await self._spoil_state(scene)

    async def _spoil_state(self, scene: Scene) -> None:
        """What the next worker finds of its tables of state is of no use to it."""
        for place in ("broker", "http", "worker"):
            if (place, 0) not in self._running:
                self.start(place)
        while not (tables := list(self.folder.glob("data/state/*/seen/*/*.db"))):
            await self._load(self._new_batch())
        await self.end("worker")
        for path in tables:
            if scene.bad_state:
                path.with_name(f"{path.name}-wal").unlink(missing_ok=True)
                path.write_bytes(b"no database" * 1_000)
            else:
                with suppress(sqlite3.OperationalError), closing(sqlite3.connect(path)) as db:  # One may be a zombie's.
                    db.execute("UPDATE mark SET boot = 'before'")
                    db.commit()

    def _log_of(self, topic: str) -> Path:
        """The folder of an internal topic's only partition."""
        for line in (self.folder / "broker" / "metadata.log").read_text().splitlines():
            found = re.search(rf'"topic":"{topic}","id":"([^"]+)"', line)
            if found:
                return self.folder / "broker" / "topics" / found[1]
        raise AssertionError(f"no topic {topic}")

    async def _drive(self, scene: Scene, batch: Batch, victim: Process, load: asyncio.Task[None]) -> None:
        """What the scene does to a chain under load."""
        half = lambda: len(batch.answers) >= len(batch.orders) // 3  # noqa: E731
        if scene.joins:
            await self._until(half)
            second = self.start("worker", slot=1)
            with suppress(TimeoutError):
                async with asyncio.timeout(JOIN_SECONDS):
                    await self._until(lambda: all(f"{name} took over" in second.says(0) for name in _JOINERS))
            await self.end("worker", 1)
        if scene.restarts:
            await self._until(half)
            process = self._running[scene.restarts, 0]
            process.signal(signal.SIGKILL)
            await process.ended.wait()
        if scene.topics:
            await self._make_topics(victim)
        if scene.releases:
            await self._release(batch)
        if scene.stalls:
            await self._until(lambda: bool(self._zombies))
            await asyncio.sleep(SHORT_MS / 1000 + 1)
            self._stop_successors = True
            self.start("worker")
        while not load.done():
            await self._read()
        await load

    async def _release(self, batch: Batch) -> None:
        """Wait until all that cannot be worked on at first is parked, let it be worked on, and ask for it."""
        late = {kind: {n for n, customer in batch.orders.items() if customer[0] == kind} for kind in "tu"}

        def is_parked() -> bool:
            topic = {value["id"] for _, value in self._values(park_topic("fp", "orders"))}
            return late["t"] <= topic and late["u"] <= {number for number, _ in self._parked_rows()}

        while not is_parked():
            await self._read()
        (self.folder / "closed").unlink(missing_ok=True)
        app, env = make_app(self._rows), Env()
        settings = Settings(kafka=self.bootstrap, kafka_client={"delivery.timeout.ms": "3000"})
        while True:
            with suppress(*_AWAY):
                async with open_shelves(app, settings) as shelves:
                    parked = [item for shelf in shelves for item in await shelf.items()]
                    mine = [item for item in parked if (item.key or b"")[:1] in (b"t", b"u")]
                    await ask(shelves, mine, Request("retry", "the scene"), env)
                return

    async def _make_topics(self, victim: Process) -> None:
        for number in range(3):
            name = f"passing-{self._cases}-{number}"
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                try:
                    async with KafkaClient(self.bootstrap, settings={"delivery.timeout.ms": "3000"}) as client:
                        await Admin(client).create_topics({name: TopicSpec(1)})
                        await Admin(client).delete_topics([name])
                    break
                except SemelError:
                    await asyncio.sleep(0.05)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await asyncio.sleep(0.02)

    async def _until_drained(self, batch: Batch, case: Case, victim: Process, result: Result) -> None:
        deadline = time.monotonic() + UNSTICK_SECONDS
        while not self._is_there(batch):
            await self._read()
            # One that stands still may hold the database: the write lock of SQLite is its process's until that ends.
            gave_up = case.action in ("raise", "cancel", "stop") and time.monotonic() > deadline
            if gave_up and not result.restarted:
                result.restarted = True
                victim.signal(signal.SIGKILL)

    async def _bury(self, result: Result, pause: float, elsewhere: bool) -> None:
        """Let what stood still go on, now that its successor has done its work, and hear what it says."""
        for zombie in self._zombies:
            if zombie.role == "broker":
                continue
            await asyncio.sleep(max(0.0, zombie.stopped_at + pause - time.monotonic()))
            said = len(zombie.log.read_bytes())
            zombie.signal(signal.SIGCONT)
            with suppress(TimeoutError):
                async with asyncio.timeout(1.0 if zombie.role == "http" else ZOMBIE_SECONDS):
                    while not zombie.ended.is_set() and not (elsewhere and _LOST.search(zombie.says(said))):
                        await asyncio.sleep(0.02)
            result.zombie = zombie.last_words(said)
            if zombie.exit_code is None:
                await asyncio.sleep(ZOMBIE_ROUNDS_SECONDS)  # Whatever it still does is done now.
            zombie.signal(signal.SIGKILL)
            await zombie.ended.wait()
        self._zombies.clear()

    async def _finish(self, case: Case, victim: Process, result: Result) -> None:
        """End the process that was struck, if it is there, and find out whether it was."""
        if self._running.get((victim.role, victim.slot)) is victim:
            await self.end(victim.role)
        if (("worker", 1)) in self._running:
            await self.end("worker", 1)
        await victim.ended.wait()
        if not case.action:
            return
        hits = result.passed = victim.passed().get(case.point, 0)
        struck = victim.exit_code == -signal.SIGKILL if case.action.startswith(("kill", "torn")) else hits >= case.hit
        if case.action == "stop":
            struck = bool(result.zombie) or hits >= case.hit
        if not struck:
            result.outcome, result.detail = "unreached", f"passed {hits} times"

    # --- Orders ---

    def _new_batch(self, orders: int = ORDERS, *, releases: bool = False) -> Batch:
        self._cases += 1
        first = self._cases * 1_000
        kinds = [f"c{number % 3}" for number in range(orders - 6)] + ["p", "q", "r", "p", "q", "c1"]
        kinds += ["t", "u", "t", "t", "u"] if releases else []
        batch = Batch({first + number: f"{kind}-{self._cases}" for number, kind in enumerate(kinds)})
        self.batches.append(batch)
        return batch

    async def _load(self, batch: Batch, pace: float = 0.0) -> None:
        """Post every order until it is answered; every fifth twice at once, every seventh again later."""
        carried, self._carried = self._carried, None
        work = [(batch, number) for number in batch.orders]
        if carried is not None:
            work += [(carried, number) for number in carried.orders]
        waiting = iter(work)

        async def client() -> None:
            for owner, number in waiting:
                await asyncio.sleep(pace)
                copies = 2 if number % 5 == 0 else 1
                await asyncio.gather(*(self._order(owner, number) for _ in range(copies)))
                if number % 7 == 0:
                    await self._order(owner, number)
                if number % 9 == 0:
                    await self._look_up(number)

        await asyncio.gather(*(client() for _ in range(CLIENTS)))

    async def _order(self, batch: Batch, number: int) -> None:
        body = json.dumps({"id": number, "customer": batch.orders[number]}).encode()
        head = "POST /orders HTTP/1.1\r\nHost: fp\r\nContent-Type: application/json\r\nConnection: close\r\n"
        head += f'Idempotency-Key: "order-{number}"\r\nContent-Length: {len(body)}\r\n\r\n'
        status, answer = await self._answered(head.encode() + body, number)
        if status == 0:
            return
        known = batch.answers.setdefault(number, (status, answer))
        if known != (status, answer):
            batch.told.add("E14", f"order {number}", f"it was answered {known} and {(status, answer)}")
        wanted = (422, None) if batch.orders[number].startswith("r") else (201, b'{"order":%d}' % number)
        if status != wanted[0] or wanted[1] not in (None, answer):
            batch.told.add("E17", f"order {number}", f"it was answered {status} {answer!r}")

    async def _look_up(self, number: int) -> None:
        operation = operation_id("POST /orders", key_digest(f"order-{number}"))
        head = f"GET /operations/{operation} HTTP/1.1\r\nHost: fp\r\nConnection: close\r\n\r\n"
        await self._answered(head.encode(), number)

    async def _answered(self, request: bytes, number: int) -> tuple[int, bytes]:
        """The final answer; status 0 when the key of the order's request is parked, and there will be none."""
        pause = 0.02
        while True:
            with suppress(OSError, EOFError, TimeoutError, ValueError, IndexError):
                async with asyncio.timeout(ANSWER_SECONDS):
                    status, answer = await self._exchange(request)
                if status not in _RETRY:
                    return status, answer
            if number in self._parked_requests():
                return 0, b""
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, 0.4)

    async def _exchange(self, request: bytes) -> tuple[int, bytes]:
        process = self._running.get(("http", 0))
        if process is None:
            raise ConnectionError("no HTTP instance")
        reader, writer = await asyncio.open_connection("127.0.0.1", process.port)
        try:
            writer.write(request)
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            return int(head[9:12]), body
        finally:
            writer.close()

    # --- What came out ---

    async def _read(self) -> None:
        assert self._reader is not None
        with suppress(*_AWAY):
            for record in (await self._reader.poll(5_000, 0.15)).records:
                if KIND in dict(record.headers):
                    continue  # A command, or what came of it.
                value = _value(record)
                self._records.setdefault(record.topic, []).append((record, value))

    def _values(self, topic: str) -> list[tuple[Record, Any]]:
        return self._records.get(topic, [])

    def _rows_of(self, sql: str) -> list[tuple[Any, ...]]:
        if not self._rows.exists():
            return []
        with suppress(sqlite3.OperationalError):
            connection = sqlite3.connect(self._rows, timeout=5)
            try:
                return connection.execute(sql).fetchall()
            finally:
                connection.close()
        return []

    def _parked_rows(self) -> Counter[tuple[int, int]]:
        values = [json.loads(value) for (value,) in self._rows_of("SELECT record_value FROM semel_parked")]
        return Counter((value["id"], value["position"]) for value in values)

    def _parked_requests(self) -> set[int]:
        return {number for _, number in self._values(PARKED_REQUESTS) if number is not None}

    def _expected(self, batches: Iterable[Batch]) -> dict[int, str]:
        """Orders and customers, by what is to come of them: what may be parked, and is, has no other effects."""
        parked = {value["id"] for _, value in self._values(park_topic("fp", "orders"))}
        placed = {value["id"] for _, value in self._values("orders")}
        found: dict[int, str] = {}
        for batch in batches:
            for number, customer in batch.orders.items():
                if batch.may_park and number in self._parked_requests() and number not in placed:
                    continue
                found[number] = f"p {customer}" if batch.may_park and number in parked else customer
        return found

    def _excused(self, batches: Iterable[Batch]) -> dict[int, set[int]]:
        """Items that the sink could take, by order, and parked because an exception was raised over them."""
        held = self._parked_rows()
        found: dict[int, set[int]] = {}
        for number, customer in self._expected(batch for batch in batches if batch.may_park).items():
            positions = {position for position in range(ITEMS) if held[number, position]}
            if positions and customer[0] in "ctu":
                found[number] = positions
        return found

    def _is_there(self, batch: Batch) -> bool:
        """Whether every effect is to be seen at least once: then a double would be, too."""
        return not self._lacking(batch)

    def _lacking(self, batch: Batch) -> str:
        unanswered = batch.orders.keys() - batch.answers.keys()
        if unanswered - (self._parked_requests() if batch.may_park else set()):
            return f"{len(unanswered)} answers"
        expected = self._expected([batch])

        def of(kinds: str) -> list[int]:
            return [number for number, customer in expected.items() if customer[0] in kinds]

        first, last = min(batch.orders), max(batch.orders)
        orders = {value["id"] for _, value in self._values("orders")}
        parked = {value["id"] for _, value in self._values(park_topic("fp", "orders"))}
        items = Counter(value["id"] for _, value in self._values("items"))
        for name, wanted, found in (
            ("orders", of("cpqtu"), orders),
            ("parked", of("pt"), parked),
            ("items", of("cqtu"), items),
        ):
            missing = [number for number in wanted if number not in found]
            if missing:
                return f"{len(missing)} {name}: {missing[:3]}"
        rows = self._rows_of(f"SELECT COUNT(*) FROM ledger WHERE id BETWEEN {first} AND {last}")
        due = ITEMS * len(of("ctu")) - sum(len(positions) for positions in self._excused([batch]).values())
        if not rows or rows[0][0] < due:
            return f"rows: {rows} of {due}"
        held = {number for number, _ in self._parked_rows()}
        missing = [number for number in of("q") if number not in held]
        return f"{len(missing)} parked rows" if missing else ""

    def _missing(self) -> str:
        return "; ".join(f"case {index}: {what}" for index, b in enumerate(self.batches) if (what := self._lacking(b)))

    async def _catch_up(self) -> None:
        """Read every topic to its end, once no transaction is open."""
        if ("broker", 0) not in self._running:
            self.start("broker")
        assert self._reader is not None
        while True:
            with suppress(*_AWAY):
                async with KafkaClient(self.bootstrap, settings={"delivery.timeout.ms": "3000"}) as client:
                    stable = await Admin(client).list_offsets(self._partitions, at="stable")
                    ends = await Admin(client).list_offsets(self._partitions, at="high_watermark")
                if stable == ends:
                    break
            await asyncio.sleep(0.02)
        while any(self._reader.positions.get(at, 0) < end for at, end in ends.items()):
            await self._read()

    def _judge(self, batch: Batch, result: Result) -> None:
        findings = self.check([batch])
        if not findings.clean:
            result.outcome, result.detail = "anomaly", findings.summary()

    def check(self, batches: list[Batch] | None = None) -> Findings:
        """Compare what came out with the orders of these cases, or of all of them."""
        chosen = self.batches if batches is None else batches
        findings = Findings()
        for batch in chosen:
            findings.merge(batch.told)
        orders = self._expected(chosen)
        findings.merge(self._check_topics(orders))
        findings.merge(self._check_rows(orders, self._excused(chosen)))
        return findings

    def _check_topics(self, orders: Mapping[int, str]) -> Findings:
        findings = Findings()
        where: dict[int, tuple[int, int]] = {}
        placed, counted, parked = [], [], []
        numbers: dict[str, list[tuple[tuple[int, int], int]]] = {}
        for record, value in self._values("orders"):
            if value["id"] in orders:
                where[value["id"]] = (record.partition, record.offset)
                placed.append(Effect(value["id"], 0, (record.partition, record.offset)))
        for record, value in self._values("items"):
            if value["id"] in orders:
                at, number = (record.partition, record.offset), value["id"]
                counted.append(Effect(number, value["position"], at, value["customer"], where.get(number)))
                if value["position"] == 0:
                    numbers.setdefault(value["customer"], []).append((where.get(number, (0, 0)), value["number"]))
        for record, value in self._values(park_topic("fp", "orders")):
            if value["id"] in orders:
                parked.append(Effect(value["id"], 0, (record.partition, record.offset)))
        kinds = {kind: {n for n, customer in orders.items() if customer[0] in kind} for kind in ("cpqtu", "cqtu", "pt")}
        findings.merge(check_effects(dict.fromkeys(kinds["cpqtu"], (0,)), placed))
        findings.merge(check_effects({number: range(ITEMS) for number in kinds["cqtu"]}, counted))
        findings.merge(check_effects(dict.fromkeys(kinds["pt"], (0,)), parked))
        for customer, seen in numbers.items():
            got = [number for _, number in sorted(seen)]
            if got != list(range(1, len(got) + 1)):
                findings.add("E8", f"state of {customer}", f"it counted {got}")
        return findings

    def _check_rows(self, orders: Mapping[int, str], excused: Mapping[int, set[int]]) -> Findings:
        findings = Findings()
        rows = [row for row in self._rows_of("SELECT id, position, rowid FROM ledger") if row[0] in orders]
        applied: dict[Hashable, Iterable[Hashable]] = {
            number: set(range(ITEMS)) - excused.get(number, set())
            for number, customer in orders.items()
            if customer[0] in "ctu"
        }
        findings.merge(check_effects(applied, [Effect(row[0], row[1], (0, row[2])) for row in rows]))
        totals = Counter(customer for customer in orders.values() if customer[0] in "ctu" for _ in range(ITEMS))
        totals -= Counter(orders[number] for number, positions in excused.items() for _ in positions)
        found = {customer: (n,) for customer, n in self._rows_of("SELECT * FROM totals") if customer in totals}
        findings.merge(check_totals("customer", {name: (n,) for name, n in totals.items()}, found))
        held = [
            Effect(number, position, (0, index))
            for (number, position), times in self._parked_rows().items()
            for index in range(times)
            if number in orders
        ]
        wanted: dict[Hashable, Iterable[Hashable]] = {
            number: range(ITEMS) for number, customer in orders.items() if customer[0] == "q"
        }
        findings.merge(check_effects({**wanted, **excused}, held))
        return findings

    # --- The dual write of KIP-939 ---

    async def _run_writer(self, case: Case, role: str, result: Result) -> None:
        """Transactions over Kafka and a database by processes that die anywhere; then one that recovers."""
        arm = case.spec if case.action else "*:count"
        if role == "broker":
            await self.end("broker", kill=True)
        broker = self._running.get(("broker", 0)) or self.start("broker", arm if role == "broker" else "")
        first = await self._write("" if role == "broker" else arm, WRITER_TRANSACTIONS)
        zombie = first if first.exit_code is None else None
        last = first
        while last is first or last.exit_code != 0:
            last = await self._write("", 2)
        if role == "broker":
            if self._running.get(("broker", 0)) is broker:
                await self.end("broker")
            await broker.ended.wait()
            self._zombies.clear()
            first = broker
        if zombie is not None:
            zombie.signal(signal.SIGCONT)
            await zombie.ended.wait()
            fenced = zombie.exit_code == WRITER_FENCED
            reason = [line for line in (self.folder / "writer.report").read_text().splitlines() if "fenced" in line]
            result.zombie = f"app ended with {zombie.exit_code}: {reason[-1] if fenced and reason else 'not fenced'}"
            self._zombies.clear()
        hits = result.passed = first.passed().get(case.point, 0)
        struck = first.exit_code == -signal.SIGKILL if case.action.startswith(("kill", "torn")) else hits >= case.hit
        if case.action and not (struck or result.zombie):
            result.outcome, result.detail = "unreached", f"passed {hits} times"
        await self._catch_up()
        findings = self._check_dual()
        if not findings.clean:
            result.outcome, result.detail = "anomaly", findings.summary()

    async def _write(self, arm: str, transactions: int) -> Process:
        """A writer until it ends or stands still."""
        plan = Plan(
            self.bootstrap, f"sqlite:///{self.folder / 'dual.db'}", str(self.folder / "writer.report"), transactions
        )
        process = self.start("writer", arm, plan=asdict(plan))
        del self._running["writer", 0]
        while not process.ended.is_set() and process not in self._zombies:
            await asyncio.sleep(0.02)
        return process

    def _check_dual(self) -> Findings:
        _, ledger = self._database.state()
        effects = [
            Effect(token, record.partition, (record.partition, record.offset))
            for record, token in self._records.get(DUAL, [])
        ]
        return check_effects({token: range(2) for token in ledger}, effects)

    # --- Counting ---

    async def count(self, point: str) -> dict[str, int]:
        """Run a point's scene undisturbed; how often its process came by each point."""
        role = FAILPOINTS[point].role
        case = Case(point, "", "counted", 0)
        before = len(self._all)
        result = await self.run(case)
        if result.outcome != "clean":
            raise AssertionError(f"{point} undisturbed: {result}")
        role = "writer" if role == "app" else role
        [victim, *_] = [item for item in self._all[before:] if item.role == role and "*:count" in item.armed]
        return victim.passed()


def _value(record: Record) -> Any:
    """A record's value as it is compared; of a parked request the order's number."""
    data = record.value or b"null"
    if record.topic == DUAL:
        return data.decode()
    if record.topic == PARKED_REQUESTS:
        found = re.search(rb'"id": (\d+)', data)
        return None if found is None else int(found[1])
    return json.loads(data)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)

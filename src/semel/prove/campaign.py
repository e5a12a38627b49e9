"""`semel prove`: an app under load and faults, then every log and table against everything that was tried.

The phases: start, until all is ready; load and faults; load alone, so that what was struck is seen to come back; drain;
stop; scan and check. The seed decides inputs and faults; which request a fault meets, the machine does.
"""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from semel import history
from semel.app import App
from semel.client.admin import Admin
from semel.client.cluster import KafkaClient
from semel.errors import ConfigurationError, SemelError
from semel.processing.ports import free_ports
from semel.processing.supervisor import ChildSpec, Supervisor
from semel.prove.check.evidence import Evidence
from semel.prove.collect import collect
from semel.prove.deployment import Progress, child_specs, until_ready
from semel.prove.drain import STALL_SECONDS, Drain
from semel.prove.driver import Driver
from semel.prove.faults.catalogue import kinds_named
from semel.prove.faults.contract import Fault, Targets
from semel.prove.faults.intake import Intake
from semel.prove.faults.links import Links
from semel.prove.inputs import InputSource
from semel.prove.plan import ProofPlan
from semel.prove.stores import check_empty, choose_databases, describe, sqlite_files
from semel.prove.striker import Striker, plan_strikes
from semel.settings import Settings
from semel.types import TopicPartition

__all__ = ["Campaign", "CampaignOptions", "Observed"]

T = TypeVar("T")

INSTANCE = "prove"
RESTART_SECONDS = (0.1, 1.0)
"""A process that the campaign killed is not to blame: it starts again sooner than one that fails by itself."""
SETTLE_SECONDS = 20.0
SETTLE_SHARE = 0.2
"""The end of the load is without new faults: the last ones are to be seen to be over."""
AFTER_SECONDS = 3.0
"""The load goes on for so long after the last fault is healed."""
ANSWER_SECONDS = 60.0
"""How long answers are waited for when the load is over. Who has none by then does not know: E16."""
SILENCE_SESSIONS = 4
"""A worker may be silent for so many sessions: a paused one must wake up as a zombie and find itself fenced."""
_SETUP = {"delivery.timeout.ms": 30_000}
_REACH = {"delivery.timeout.ms": 10_000}
"""How long a Kafka is looked for that is not ours."""


@dataclass(frozen=True, slots=True)
class CampaignOptions:
    """What the command line says."""

    app: str
    """module:attribute, as the processes are given it."""
    minutes: float = 3.0
    faults: str = "all"
    every: float = 1.4
    """Seconds between two faults, on average."""
    seed: int = 1
    workers: int = 2
    http: int = 2
    clients: int = 64
    rate: float | None = 400.0
    inputs: int | None = None
    """At most so many."""
    kafka: str | None = None
    databases: Mapping[str, str] = field(default_factory=dict)
    """URL by name of the app's database; under the empty name, of every one."""
    keep: Path | None = None
    session_timeout_ms: int = 6_000
    stall_seconds: float = STALL_SECONDS


@dataclass(slots=True)
class Observed:
    """What a campaign did and saw of itself, before anything is judged."""

    driver: Driver
    striker: Striker
    load_began: int
    """Nanoseconds of the monotonic clock."""
    load_seconds: float
    stalled: list[str]
    """Where it stood still when everything was over; empty when all was worked off."""
    refused: Mapping[str, str]
    """Kinds of faults that cannot be done here, and why."""
    exits: Counter[str]
    """Ends of processes with an exit code of their own, in words."""
    killed: int
    """Processes that SIGKILL ended: by a fault, at a failpoint, or by the supervisor because they were silent."""
    evidence: Evidence
    run_on: Mapping[str, str]
    """Broker and databases, with their versions."""


class Campaign:
    """One run. `say` gets progress for people; nothing else is printed."""

    def __init__(
        self, app: App, plan: ProofPlan | None, plan_name: str, options: CampaignOptions, say: Progress
    ) -> None:
        if options.minutes <= 0 or options.every <= 0:
            raise ConfigurationError("--minutes and --every must be above 0.")
        if options.workers < 1 or (app.endpoints and options.http < 1):
            raise ConfigurationError("Give --workers and --http at least 1.")
        self.app = app
        self.plan = plan
        self.plan_name = plan_name
        self.options = options
        self.source = InputSource(app, plan, options.seed, name=plan_name)
        self._say = say
        self._supervisors: dict[str, Supervisor] = {}
        self._scratch = tempfile.TemporaryDirectory(prefix="semel-prove-") if options.keep is None else None
        self.folder = Path(self._scratch.name if self._scratch else options.keep or ".").absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.own_broker = options.kafka is None
        environ = {key: value for key, value in os.environ.items() if not (self.own_broker and _is_kafkas(key))}
        self.settings = Settings.from_environment(environ, kafka=options.kafka, data=self.folder)
        self._databases = choose_databases(app, options.databases, self.folder)
        app.use_databases(self._databases)
        self._ports = free_ports(options.http + 1)
        self.http_ports = self._ports[: options.http] if app.endpoints else []
        self.bootstrap = options.kafka or f"127.0.0.1:{self._ports[-1]}"
        names = [spec.name for spec in self._specs()]
        links = Links(
            [name for name in names if not name.startswith("broker-")],
            self.bootstrap,
            self._databases,
            security=self.settings.kafka_client.get("security.protocol", "plaintext"),
        )
        self.targets = Targets(
            names=names,
            pid=self._pid,
            folder=self.folder,
            session_seconds=options.session_timeout_ms / 1000,
            links=links,
            sqlite_files=sqlite_files(app),
            copies=self._send_copies if app.endpoints else None,
            intake=Intake.of(app, self.bootstrap, self.settings.kafka_client, self._addresses),
        )
        self.targets.make_pages()
        self._driver: Driver | None = None
        self.kinds, self.refused = self._kinds(kinds_named(options.faults))
        self._exits: Counter[str] = Counter()
        self._killed = 0

    def _kinds(self, wanted: list[type[Fault]]) -> tuple[list[type[Fault]], dict[str, str]]:
        """Those that can be done here, and why the others cannot. Raises `ConfigurationError` when none can."""
        refused = {fault.kind: why for fault in wanted if (why := fault.refusal(self.targets))}
        able = [fault for fault in wanted if fault.kind not in refused]
        if not able:
            raise ConfigurationError("none of these faults can be done here: " + "; ".join(refused.values()))
        return able, refused

    @property
    def history(self) -> Path:
        """Where all processes write what they try."""
        return self.folder / "history"

    def close(self) -> None:
        """Remove the scratch folder, if it was ours."""
        if self._scratch is not None:
            self._scratch.cleanup()

    # --- Processes ---

    def _specs(self) -> list[ChildSpec]:
        return child_specs(
            self.options.app,
            self.folder,
            self._environment,
            broker=self.bootstrap if self.own_broker else None,
            http=self.http_ports,
            workers=self.options.workers,
        )

    def _environment(self, name: str) -> Mapping[str, str]:
        """Called at every start: an armed failpoint is used up by the start that it was laid for."""
        # Logins for another Kafka would keep the processes away from ours.
        inherited = {key: value for key, value in os.environ.items() if not (self.own_broker and _is_kafkas(key))}
        return {
            **inherited,
            **self.targets.environment(name),
            "SEMEL_DATA": str(self.folder),
            "SEMEL_INSTANCE": INSTANCE,
            "SEMEL_PROFILE": "dev",  # Production refuses what is done here on purpose.
            "SEMEL_SESSION_TIMEOUT_MS": str(self.options.session_timeout_ms),
            "SEMEL_HISTORY": str(self.history),
        }

    def _addresses(self) -> list[tuple[str, int]]:
        return [("127.0.0.1", port) for port in self.http_ports]

    def _send_copies(self, count: int) -> None:
        if self._driver is not None:
            self._driver.copies = count

    def _pid(self, name: str) -> int | None:
        supervisor = self._supervisors.get(name)
        return None if supervisor is None else supervisor.pid(name)

    def _ended(self, name: str, returncode: int) -> None:
        """A child ended. By signals they end in a campaign; exit codes are their own doing."""
        self._killed += returncode == -signal.SIGKILL
        if returncode > 0:
            self._exits[f"{name} ended with exit code {returncode}"] += 1

    @asynccontextmanager
    async def _supervised(self, specs: list[ChildSpec]) -> AsyncIterator[asyncio.Task[int]]:
        """These processes run; they are drained at the end, also when it is an error."""
        supervisor = Supervisor(
            specs,
            silence_seconds=self.targets.session_seconds * SILENCE_SESSIONS,
            restart_seconds=RESTART_SECONDS,
            on_exit=self._ended,
        )
        self._supervisors.update((spec.name, supervisor) for spec in specs)
        running = asyncio.create_task(supervisor.run())
        try:
            yield running
        finally:
            await supervisor.drain()
            await asyncio.gather(running, return_exceptions=True)

    # --- One run ---

    async def run(self) -> Observed:
        """Everything up to the moment when all processes have stopped."""
        if self.history.exists():
            raise ConfigurationError(f"{self.folder} holds an earlier campaign. Name another folder, or remove it.")
        await asyncio.to_thread(check_empty, self.app)
        if not self.own_broker:
            async with self._client(_REACH) as client:
                await self._check_no_records(client)
        specs = self._specs()
        brokers = [spec for spec in specs if spec.is_last]
        history.start(self.history, "campaign", 0)
        try:
            async with self._supervised(brokers), self._client(_SETUP) as client:
                async with self._supervised([spec for spec in specs if not spec.is_last]) as running:
                    self._say.line(
                        f"starting {', '.join(spec.name for spec in specs)} on Kafka at {self.bootstrap}; "
                        f"data in {self.folder}"
                    )
                    await until_ready(self.http_ports, running, self.folder)
                    admin = Admin(client)
                    drain = Drain(
                        self.app,
                        admin,
                        self.bootstrap,
                        self.settings.kafka_client,
                        stall_seconds=self.options.stall_seconds,
                    )
                    await self._guarded(drain.run(), running)  # All topics are there, and every position.
                    load = await self._break(client, running)
                    self._say.line("the load is over and everything is healed; waiting until all is worked off")
                    stalled = await self._guarded(drain.run(), running)
                self._say.line("the app's processes have stopped; reading every log and table")
                settings, logs = self.settings.kafka_client, self.folder / "logs"
                evidence = await collect(self.app, client, self.bootstrap, settings, self.history, logs)
                run_on = {"broker": self._broker(client)}
                databases = await asyncio.to_thread(describe, self.app)
                if databases:
                    run_on["database"] = ", ".join(databases)
                return Observed(*load, stalled, self.refused, self._exits, self._killed, evidence, run_on)
        finally:
            if self.targets.links is not None:
                await self.targets.links.close()
            history.stop()

    def _client(self, patience: Mapping[str, object]) -> KafkaClient:
        settings = {**self.settings.kafka_client, **patience}
        return KafkaClient(self.bootstrap, client_id="semel-prove", settings=settings)

    def _broker(self, client: KafkaClient) -> str:
        """What Kafka it was, without its address."""
        kind = "Semel's embedded broker" if self.own_broker else "Kafka"
        return f"{kind}, transactions V{max(1, client.transaction_version)}"

    async def _check_no_records(self, client: KafkaClient) -> None:
        """What is counted at the end must come from this campaign."""
        admin = Admin(client)
        there = await admin.list_topics()
        own = [
            TopicPartition(name, number)
            for name, info in there.items()
            if name in self.app.topics or name.startswith(f"{self.app.name}.semel.")
            for number in range(info.partitions)
        ]
        ends = await admin.list_offsets(own, at="high_watermark") if own else {}
        filled = sorted({at.topic for at, end in ends.items() if end > 0})
        if filled:
            raise ConfigurationError(
                f"Kafka at {self.bootstrap} has records of app {self.app.name} already, in {', '.join(filled[:5])}. A "
                "campaign needs topics of its own: delete these, or name another Kafka."
            )

    async def _break(self, client: KafkaClient, running: asyncio.Task[int]) -> tuple[Driver, Striker, int, float]:
        """Load and faults, then load alone until what was struck had its time to come back."""
        options = self.options
        seconds = options.minutes * 60
        driver = self._driver = Driver(
            self.source.jobs(f"prove-{options.seed}"),
            self._addresses,
            client,
            seed=options.seed,
            clients=options.clients,
            rate=options.rate,
            most=options.inputs,
        )
        settle = min(SETTLE_SECONDS, seconds * SETTLE_SHARE)
        planned = plan_strikes(self.kinds, self.targets, options.seed, seconds - settle, options.every)
        striker = Striker(planned, self.kinds, self.targets)
        began = time.monotonic_ns()
        load = asyncio.create_task(driver.run())
        strikes = asyncio.create_task(striker.run())
        showing = asyncio.create_task(self._show(driver, striker, seconds))
        try:
            await self._guarded(strikes, running, load)
            left = max(AFTER_SECONDS, seconds - (time.monotonic_ns() - began) / 1e9)
            await self._guarded(asyncio.sleep(left), running, load)
            driver.stop()
            load_seconds = (time.monotonic_ns() - began) / 1e9
            asyncio.get_running_loop().call_later(ANSWER_SECONDS, driver.give_up)
            await self._guarded(load, running)
        finally:
            for task in (load, strikes, showing):
                task.cancel()
            await asyncio.gather(load, strikes, showing, return_exceptions=True)
            await driver.close()
        return driver, striker, began, load_seconds

    async def _guarded(self, wanted: Awaitable[T], running: asyncio.Task[int], *others: asyncio.Task[None]) -> T:
        """Wait for `wanted`; an error of `others`, or a supervisor that ends, is seen at once."""
        task = asyncio.ensure_future(wanted)
        watched: set[asyncio.Future[Any]] = {task, running, *others}
        try:
            while not task.done():
                done, watched = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
                for other in done - {task}:
                    other.result()
                if running in done:
                    raise SemelError(f"the app's processes gave up: {self._why_gone()}")
            return await task
        finally:
            task.cancel()

    def _why_gone(self) -> str:
        """Which processes ended by themselves, and what the last of them said."""
        ends = "; ".join(f"{what} ({times} times)" for what, times in self._exits.items())
        logs = sorted(self.folder.glob("*.log"), key=lambda path: path.stat().st_mtime)
        last = logs[-1].read_text(errors="replace").splitlines()[-1:] if logs else []
        return f"{ends or 'nobody knows why'}. {' '.join(last)} (logs: {self.folder}/*.log, with --keep)"

    async def _show(self, driver: Driver, striker: Striker, seconds: float) -> None:
        last, before, began = 0, time.monotonic(), time.monotonic()
        while True:
            await asyncio.sleep(self._say.interval)
            now, done = time.monotonic(), len(driver.sent.answered_at)
            rate = (done - last) / (now - before)
            last, before = done, now
            breaking = ", ".join(
                f"{kind} {Path(target).name if target.startswith('/') else target}"
                for target, kind in striker.now.items()
            )
            self._say.progress(
                f"{now - began:>5.0f} of {seconds:.0f} s  {done:>8,} inputs answered {rate:>6,.0f}/s  "
                f"{striker.counts.total():>4} faults  {'breaking now: ' + breaking if breaking else ''}"
            )


def _is_kafkas(variable: str) -> bool:
    return variable.startswith("SEMEL_KAFKA")

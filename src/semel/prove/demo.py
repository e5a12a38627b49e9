"""The demo: the shop under real load and real kills, and a count at the end that proves or refutes exactly once.

It starts a broker, two HTTP instances and two workers as processes of their own under the supervisor, posts the
purchases as orders, sends a tenth of them again, kills and pauses processes meanwhile, and then compares the
database and the topics with the input, customer by customer and title by title.
"""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from semel.errors import ConfigurationError
from semel.examples.shop import sku
from semel.processing.ports import free_ports
from semel.processing.supervisor import ChildSpec, Supervisor
from semel.prove.deployment import Progress, before_the_supervisor, child_specs, until_ready
from semel.prove.load import LoadReport, plan_requests, run_load
from semel.prove.nemesis import Fault, plan_faults
from semel.prove.picture import Mark, throughput_svg
from semel.prove.purchases import expect, load_purchases
from semel.prove.verdict import Ledger, Verdict, Witness, judge

__all__ = ["BrokerControl", "Demo", "DemoOptions", "DemoResult"]

WORKERS = HTTP_INSTANCES = 2
APP = "semel.examples.shop:app"
_DRAIN_SECONDS = 180.0


class BrokerControl(Protocol):
    """A broker that is not the embedded one and that the demo may kill: `kill` with -9, `start` until it answers."""

    @property
    def bootstrap(self) -> str: ...

    def kill(self) -> None: ...

    def start(self) -> object: ...


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What the command line says."""

    orders: int | None = None
    seed: int = 1
    faults: bool = True
    keep: Path | None = None
    database: str | None = None
    kafka: str | None = None
    rate: float | None = None
    clients: int = 64
    session_timeout_ms: int = 6_000
    picture: Path | None = None


@dataclass(slots=True)
class DemoResult:
    """The figures of one run; `as_json` has the documented names."""

    verdict: Verdict
    load: LoadReport
    kills: int
    pauses: int
    broker_kills: int
    rebalances: int
    seconds: float
    database: str
    marks: list[Mark] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        return self.verdict.exact and not self.load.refused

    def as_json(self) -> dict[str, object]:
        """The last line of `semel demo --format json`."""
        found, expected = self.verdict.found, self.verdict.expected
        return {
            "orders": found.orders,
            "cds": found.cds,
            "dollars": found.cents / 100,
            "customers": found.customers,
            "items_taken": found.items_taken,
            "expected_orders": expected.orders,
            "expected_cds": expected.cds,
            "expected_dollars": expected.cents / 100,
            "expected_customers": len(expected.customers),
            "duplicate_requests": self.load.duplicate_requests,
            "replayed": self.load.replayed,
            "kills": self.kills,
            "pauses": self.pauses,
            "broker_kills": self.broker_kills,
            "rebalances": self.rebalances,
            "lost": self.verdict.findings.of("E1", "E4"),
            "duplicated": self.verdict.findings.of("E2", "E3"),
            "seconds": round(self.seconds, 1),
            "orders_per_second": round(self.load.orders_answered / self.seconds, 1) if self.seconds else 0.0,
            "p50_ms": round(self.load.percentile_ms(0.50), 1),
            "p99_ms": round(self.load.percentile_ms(0.99), 1),
            "database": self.database,
        }


class Demo:
    """One run. `say` gets progress lines for people; nothing else is printed."""

    def __init__(self, options: DemoOptions, say: Progress, broker: BrokerControl | None = None) -> None:
        if options.kafka and broker:
            raise ConfigurationError("Give the demo either an address of Kafka or a broker that it may kill, not both.")
        self._options = options
        self._say = say
        self._external = broker
        self._scratch = tempfile.TemporaryDirectory(prefix="semel-demo-") if options.keep is None else None
        self._folder = options.keep or Path(self._scratch.name if self._scratch else ".")
        self._folder.mkdir(parents=True, exist_ok=True)
        self._database = options.database or f"sqlite:///{self._folder / 'shop.db'}"
        self._ports = free_ports(HTTP_INSTANCES + 1)
        self._bootstrap = options.kafka or (broker.bootstrap if broker else f"127.0.0.1:{self._ports[-1]}")
        self._own_broker = options.kafka is None and broker is None
        self._armed: dict[str, str] = {}
        self._marks: list[Mark] = []
        self._kills = self._broker_kills = self._pauses = 0
        self._began = 0.0
        self._supervisor: Supervisor | None = None

    # --- Processes ---

    def _specs(self) -> list[ChildSpec]:
        return child_specs(
            APP,
            self._folder,
            self._environment,
            broker=self._bootstrap if self._own_broker else None,
            http=self._ports[:HTTP_INSTANCES],
            workers=WORKERS,
        )

    def _environment(self, name: str) -> Mapping[str, str]:
        """Called at every start: an armed failpoint is used up by the start that it was laid for."""
        return {
            **os.environ,
            "SEMEL_KAFKA": self._bootstrap,
            "SEMEL_DATA": str(self._folder),
            "SEMEL_INSTANCE": "demo",
            "SEMEL_SESSION_TIMEOUT_MS": str(self._options.session_timeout_ms),
            "SEMEL_FAILPOINT": self._armed.pop(name, ""),
            "SHOP_DATABASE": self._database,
        }

    def _on_exit(self, name: str, returncode: int) -> None:
        """The supervisor saw a child end: count it if it was killed, whoever did it."""
        if returncode == -signal.SIGKILL:
            self._struck(name)

    def _struck(self, name: str) -> None:
        self._kills += 1
        role = name.rpartition("-")[0]
        self._broker_kills += role == "broker"
        self._marks.append(Mark(time.monotonic() - self._began, role, f"{name} killed"))

    # --- One run ---

    async def run(self) -> DemoResult:
        """Start everything, run the load and the faults, drain, judge, stop everything."""
        purchases = load_purchases(self._options.orders)
        if not purchases:
            raise ConfigurationError("--orders must be at least 1.")
        await self._check_empty()
        self._supervisor = Supervisor(
            self._specs(),
            # Longer than any pause: a paused worker must wake up as a zombie and find itself fenced.
            silence_seconds=self._options.session_timeout_ms / 1000 * 4,
            on_exit=self._on_exit,
        )
        running = asyncio.create_task(self._supervisor.run())
        report = LoadReport()
        try:
            await self._until_ready(running)
            self._began = time.monotonic()
            async with Witness(self._bootstrap) as witness:
                plan = plan_requests(purchases, self._options.seed)
                load = asyncio.create_task(
                    run_load(
                        plan,
                        lambda: [("127.0.0.1", port) for port in self._ports[:HTTP_INSTANCES]],
                        report,
                        run=f"demo-{self._options.seed}",
                        seed=self._options.seed,
                        clients=self._options.clients,
                        rate=self._options.rate,
                    )
                )
                chaos = asyncio.create_task(self._strike(len(purchases), report))
                progress = asyncio.create_task(self._show(len(purchases), report))
                try:
                    await self._all_or_first_error(load, running)
                    seconds = time.monotonic() - self._began
                    await self._all_or_first_error(chaos, running)
                finally:
                    for task in (load, chaos, progress):
                        task.cancel()
                    await asyncio.gather(load, chaos, progress, return_exceptions=True)
                expected = expect(purchases, sku)
                self._say.line(
                    f"{report.orders_answered:,} orders answered in {seconds:.1f} s; waiting for the last effects"
                )
                ledger = Ledger(self._bootstrap, self._database)
                await ledger.drained(expected, _DRAIN_SECONDS)
                self._say.line("everything is drained; comparing file, topics and database")
                topics = await ledger.read_topics()
                seen = await witness.close()
        finally:
            await self._supervisor.drain()
            await asyncio.gather(running, return_exceptions=True)
        # The tables are read when no process is left that could still change them.
        verdict = judge(expected, purchases, sku, topics, seen, ledger.read_database())
        return DemoResult(
            verdict,
            report,
            self._kills,
            self._pauses,
            self._broker_kills,
            count_rebalances(self._folder),
            seconds,
            "sqlite" if self._database.startswith("sqlite") else "postgresql",
            sorted(self._marks),
        )

    async def _check_empty(self) -> None:
        """The demo counts from nothing; what an earlier run left would be counted too."""
        if (self._folder / "broker").exists():
            raise ConfigurationError(
                f"{self._folder} holds the data of an earlier run. Name another folder, or remove it."
            )
        ledger = Ledger(self._bootstrap, self._database)
        if await asyncio.to_thread(ledger.has_rows):
            raise ConfigurationError(
                "the database holds rows of the shop already. Name an empty one, or drop the tables customer_totals, "
                "stock and semel_position."
            )
        if not self._own_broker and await ledger.has_records():
            raise ConfigurationError(
                f"Kafka at {self._bootstrap} holds records of the shop already. Delete its topics orders, inventory "
                "and shop.semel.*, or name another Kafka."
            )

    def write_picture(self, result: DemoResult, path: Path) -> None:
        """The SVG of throughput over time."""
        rate = result.load.orders_answered / result.seconds
        title = f"{result.load.orders_answered:,} orders, {result.kills} kills: {result.verdict.findings.summary()}"
        subtitle = (
            f"{rate:,.0f} orders a second on average, faults included; {result.load.replayed:,} duplicate requests "
            f"replayed; database {result.database}"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(throughput_svg(result.load.finished, result.marks, title, subtitle), encoding="utf-8")

    def close(self) -> None:
        """Remove the scratch folder, if it was ours."""
        if self._scratch is not None:
            self._scratch.cleanup()

    async def _all_or_first_error(self, wanted: asyncio.Task[None], supervisor: asyncio.Task[int]) -> None:
        await before_the_supervisor(wanted, supervisor, self._folder)

    async def _until_ready(self, supervisor: asyncio.Task[int]) -> None:
        self._say.line(
            f"starting broker, {HTTP_INSTANCES} HTTP instances and {WORKERS} workers; data in {self._folder}"
        )
        await until_ready(self._ports[:HTTP_INSTANCES], supervisor, self._folder)

    # --- Faults ---

    async def _strike(self, orders: int, report: LoadReport) -> None:
        if not self._options.faults:
            return
        faults = plan_faults(orders, self._options.seed, slots=WORKERS, failpoints_in_broker=self._own_broker)
        if self._options.kafka:
            faults = [fault for fault in faults if fault.role != "broker"]
        pauses: list[asyncio.Task[None]] = []
        for fault in faults:
            while report.orders_answered < fault.after:
                await asyncio.sleep(0.01)
            if fault.action == "pause":
                pauses.append(asyncio.create_task(self._pause(f"worker-{fault.slot}")))
            elif fault.role == "broker" and self._external is not None:
                await self._bounce_external(self._external)
            else:
                await self._kill(fault)
        await asyncio.gather(*pauses)

    async def _kill(self, fault: Fault) -> None:
        assert self._supervisor is not None
        name = f"{fault.role}-{fault.slot}"
        if fault.failpoint:
            self._armed[name] = fault.failpoint
        while (pid := self._supervisor.pid(name)) is None:
            await asyncio.sleep(0.01)
        _signal(pid, signal.SIGKILL)

    async def _bounce_external(self, broker: BrokerControl) -> None:
        await asyncio.to_thread(broker.kill)
        self._struck("broker-0")
        await asyncio.to_thread(broker.start)

    async def _pause(self, name: str) -> None:
        """Stop a worker for longer than its session, then let it run: it wakes up as a zombie."""
        assert self._supervisor is not None
        while (pid := self._supervisor.pid(name)) is None:
            await asyncio.sleep(0.01)
        if not _signal(pid, signal.SIGSTOP):
            return
        self._pauses += 1
        self._marks.append(Mark(time.monotonic() - self._began, "pause", f"{name} paused"))
        await asyncio.sleep(self._options.session_timeout_ms / 1000 * 1.4)
        _signal(pid, signal.SIGCONT)

    async def _show(self, orders: int, report: LoadReport) -> None:
        last, before = 0, time.monotonic()
        while True:
            await asyncio.sleep(self._say.interval)
            now = time.monotonic()
            rate = (report.orders_answered - last) / (now - before)
            last, before = report.orders_answered, now
            self._say.progress(
                f"{report.orders_answered:>7,} of {orders:,} orders  {rate:>6,.0f}/s  kills {self._kills} "
                f"(broker {self._broker_kills})  pauses {self._pauses}  duplicates replayed {report.replayed:,}"
            )


def count_rebalances(folder: Path) -> int:
    """Rebalances of all groups after the first assignment, from the workers' logs.

    The engine and the sinks log `group G generation N assigned ...` whenever their assignment changes; each further
    generation of a group is one rebalance.
    """
    generations: dict[str, set[str]] = {}
    for path in folder.glob("worker-*.log"):
        for line in path.read_text(errors="replace").splitlines():
            words = line.split()
            if "generation" in words and "assigned" in words:
                at = words.index("generation")
                generations.setdefault(words[at - 1], set()).add(words[at + 1])
    return sum(len(seen) - 1 for seen in generations.values())


def _signal(pid: int, number: signal.Signals) -> bool:
    """Signal a process; False when it is already gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True

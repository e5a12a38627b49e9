"""One run: the broker, its clients, and everything that goes wrong, in one loop, from one plan."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import sys
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from semel.broker import topics
from semel.broker.broker import Broker
from semel.broker.config import BrokerConfig
from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.coordinator.transaction import TransactionMetadata
from semel.disk import disk
from semel.env import Env
from semel.errors import ConfigurationError, Fatal, Fenced, OutcomeUnknown, Retriable, SemelError
from semel.log.errors import LogError
from semel.log.log import LogConfig
from tests.simulation.actors import (
    GROUP,
    INPUTS,
    OUTPUT,
    TARGETS,
    Actor,
    Administrator,
    IdempotentWriter,
    Processor,
    Reader,
    Writer,
    read_whole,
)
from tests.simulation.disk import SimulatedDisk
from tests.simulation.history import History, Violation
from tests.simulation.loop import PROCESS, Crash, Process, SimulatedLoop
from tests.simulation.network import Network
from tests.simulation.plan import LATE, Fault, Plan, stream

__all__ = ["Outcome", "World", "run"]

EPOCH_MS = 1_700_000_000_000
CLOCK_BACK_MAX_MS = -50 * 60_000
"""The broker's clock against its clients': when a record is more than an hour ahead of it, it is refused for good."""
LIVENESS_SECONDS = 60.0
"""Virtual time in which everybody must have ended, once nothing goes wrong any more."""
STEPS_MAX = 400_000
"""Steps of the loop; a run has about ten thousand."""
TRACE_KEPT = 60
DATA = Path("/data")


class Outcome(NamedTuple):
    """What came of one run."""

    plan: Plan
    problem: Violation | None
    digest: str
    """Hash of every event, in order: equal for equal plans."""
    trace: list[str]
    """The last events."""
    steps: int
    seconds: float
    restarts: int
    transactions: int
    records: int
    zombies: int


class World:
    """Everything of one run; `run` makes it and takes it apart."""

    calm_seconds = 1.0
    """How long after the last fault nothing goes wrong any more."""
    calms_early = True
    """Whether nothing goes wrong any more once everybody is done."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.history = History()
        self._digest = hashlib.sha256()
        self.kept: deque[str] = deque(maxlen=TRACE_KEPT)
        disk_rng = self.stream("disk latency")
        self.loop = SimulatedLoop(lambda: 0.0005 * disk_rng.random())
        self.loop.set_exception_handler(self._on_exception)
        self.network = Network(self.loop, self.stream("network"), self.trace)
        self.network.base_latency = plan.knobs["latency"]
        self.network.jitter = plan.knobs["jitter"]
        self.network.split = plan.knobs["split"]
        self.network.window = plan.knobs["window"]
        self.disk = SimulatedDisk(self.stream("disk"), self.trace, self._crashed_at_operation)
        self.broker: Broker | None = None
        self.broker_process: Process | None = None
        self.restarts = -1
        self.clock_jump_ms = 0
        self.is_over = False
        self.inputs_ended = False
        self.actors: list[Actor] = []
        self.lives: list[tuple[Actor, Process]] = []
        self._marks: dict[tuple[Any, str, int], tuple[int, int]] = {}
        self._envs: dict[Process, Env] = {}
        self._calm = False
        self.zombies = 0
        """Processes that ran again after their work had been taken over."""

    def stream(self, name: str) -> random.Random:
        return stream(self.plan.seed, name)

    def trace(self, *event: object) -> None:
        """One event: into the hash, and into what is shown of a failure."""
        line = f"{self.loop.now:.6f} {' '.join(map(str, event))}"
        self._digest.update(line.encode())
        self.kept.append(line)

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()

    def client_ms(self) -> int:
        return EPOCH_MS + int(self.loop.now * 1000)

    def _env(self, name: str, wall_ms: Callable[[], int]) -> Env:
        rng = self.stream(f"env of {name}")
        return Env(
            monotonic=self.loop.time,
            boot_seconds=self.loop.time,
            wall_ms=wall_ms,
            rng=rng,
            new_id=lambda: uuid.UUID(int=rng.getrandbits(128), version=4),
            listen=self.network.listen,
        )

    def _on_exception(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, Crash) or not context["message"].startswith("Exception in callback"):
            return
        self.history.fail("unexpected exception", f"{context['message']}: {error!r}")

    # --- The broker ---

    async def _run_broker(self, process: Process) -> None:
        plan = self.plan
        config = BrokerConfig(
            transaction_version=plan.transaction_version,
            fsync="always" if plan.fsync == "always" else "os",
            transaction_sweep_seconds=0.1,
            auto_create_topics=False,
        )
        env = self._env(process.name, lambda: EPOCH_MS + self.clock_jump_ms + int(self.loop.now * 1000))
        broker = Broker(DATA, Network.host, Network.port, config=config, env=env)
        try:
            await broker.start()
        except (ConfigurationError, LogError, OSError) as error:
            self.trace("broker", "cannot start:", type(error).__name__, error)
            if not (self.disk.full or self.disk.faults_seen):
                self.history.fail("broker does not start", repr(error))
            self._kill_broker(abruptly=False, power=False)
            return
        except Exception as error:
            self.history.fail("broker does not start", repr(error))
            return
        if plan.knobs["markers late"]:
            self._make_markers_late(broker, process)
        self.trace("broker", "serves")
        self.broker = broker

    def _make_markers_late(self, broker: Broker, process: Process) -> None:
        """As Apache Kafka does it: EndTxn is answered when the decision is durable; markers and offsets follow.

        So those of two transactional ids may come in another order than their transactions.
        """
        transactions, rng = broker.node.transactions, self.stream(f"markers of {process.name}")
        carry_out = transactions._carry_out

        def carry_out_later(prepared: TransactionMetadata, now_ms: int, *, first_time: bool) -> None:
            def carry_out_now() -> None:
                if process.alive and prepared in transactions.coordinator.unfinished():
                    carry_out(prepared, now_ms, first_time=False)

            if first_time:
                self.loop.call_later(rng.uniform(0.0, self.plan.knobs["markers late"]), carry_out_now)
            else:
                carry_out(prepared, now_ms, first_time=False)

        transactions._carry_out = carry_out_later  # type: ignore[method-assign]

    def start_broker(self) -> None:
        if self.broker_process is not None and self.broker_process.alive:
            return
        self.restarts += 1
        self.disk.faults_seen = False
        self.broker_process = Process(f"broker-{self.restarts}")
        self.trace("broker", "starts")
        self.loop.spawn(self.broker_process, self._run_broker(self.broker_process))

    def _kill_broker(self, *, abruptly: bool, power: bool) -> None:
        process = self.broker_process
        if process is None or not process.alive:
            return
        process.alive = False
        self.broker = None
        self.trace("fault", "broker dies", "with its machine" if power else "")
        self.disk.crash_in = 0
        self.network.process_ended(process, abruptly=abruptly)
        if power:
            self.disk.lose_power()
        self._at(0.001 + 0.05 * self.network.rng.random(), self.start_broker)

    def _crashed_at_operation(self) -> None:
        process = PROCESS.get()
        assert process is None or process is self.broker_process
        power = self.plan.fsync == "always" and self.network.rng.random() < 0.7
        # Not the bytes of the operation itself: the caller of the disk dies first, then the machine.
        self._kill_broker(abruptly=power, power=power)

    def _at(self, seconds: float, act: Callable[[], None]) -> None:
        self.loop.call_later(seconds, act, context=self.network.context)

    # --- Clients ---

    bootstrap = f"{Network.host}:{Network.port}"

    @staticmethod
    def client_settings(timeout: int) -> dict[str, str]:
        settings = {
            "socket.timeout.ms": timeout,
            "request.timeout.ms": timeout,
            "socket.connection.setup.timeout.ms": timeout,
            "delivery.timeout.ms": 4 * timeout,
            "reconnect.backoff.max.ms": 100,
            "retry.backoff.max.ms": 50,
        }
        return {name: str(value) for name, value in settings.items()}

    def client(self, process: Process, timeout: int) -> KafkaClient:
        return KafkaClient(
            self.bootstrap,
            client_id=process.name,
            env=self.env(process),
            settings=self.client_settings(timeout),
        )

    def env(self, process: Process) -> Env:
        """The outside world of a client's process, one for all that asks."""
        if process not in self._envs:
            self._envs[process] = self._env(process.name, self.client_ms)
        return self._envs[process]

    def begin_life(self, actor: Actor) -> None:
        """A new process for this actor, beside those that may still be there."""
        if actor.done or self.is_over:
            return
        actor.life += 1
        process = Process(f"{actor.name}#{actor.life}")
        self.lives.append((actor, process))
        self.trace("client", process.name, "starts")
        self.loop.spawn(process, self._live(actor, process, actor.life))

    async def _live(self, actor: Actor, process: Process, life: int) -> None:
        try:
            await actor.run(process, life)
        except Fenced as error:
            self.trace("client", process.name, "is fenced")
            self._end_life(actor, process)
            if not actor.has_twins:
                self.history.fail("fenced", f"{process.name}: {error}")
        except Fatal as error:
            self.history.fail("fatal error", f"{process.name}: {error!r}")
        except SemelError as error:
            self.trace("client", process.name, "ends:", type(error).__name__)
            self._end_life(actor, process)
        except Exception as error:
            self.history.fail("unexpected exception", f"{process.name}: {error!r}")
        finally:
            if process.alive:
                process.alive = False
                self.end_life(actor, process)

    def end_life(self, actor: Actor, process: Process) -> None:
        """What the kernel does when a process has ended by itself."""
        self.network.process_ended(process, abruptly=False)

    def abandon(self) -> None:
        """Take everything apart."""
        for _, process in self.lives:
            process.alive = False
        if self.broker_process is not None:
            self.broker_process.alive = False
        self.loop.abandon()

    def _end_life(self, actor: Actor, process: Process) -> None:
        if actor.life == int(process.name.split("#")[1]):
            self._at(0.01, lambda: self.begin_life(actor))

    def kill_client(self, actor: Actor, process: Process) -> None:
        if process.alive:
            self.trace("fault", process.name, "is killed")
            process.alive = False
            self.network.process_ended(process, abruptly=False)
            self._end_life(actor, process)

    # --- What goes wrong ---

    def strike(self, fault: Fault) -> None:
        if self._calm:
            return
        self.trace("fault", fault)
        alive = [(actor, process) for actor, process in self.lives if process.alive]
        links = list(self.network.links.values())
        link = links[int(fault.draw * len(links))] if links else None
        victim = alive[int(fault.draw * len(alive))] if alive else None
        kind = fault.kind
        if kind == "cut" and link is not None:
            link.cut(deliver_requests=fault.draw * 7 % 1 < 0.7, silent=False)
        elif kind == "hold" and link is not None:
            pipe = link.to_server if fault.draw * 7 % 1 < 0.5 else link.to_client
            pipe.held_until = self.loop.now + 3 * fault.seconds
        elif kind == "late request":
            # Just after its client gave it up, most often: in the middle of what that one does next.
            given_up = self.plan.knobs["socket timeout ms"] / 1000
            self.network.late = (LATE[int(fault.draw * len(LATE))], given_up + fault.seconds)
        elif kind == "swallow" and link is not None:
            link.cut(deliver_requests=fault.draw * 7 % 1 < 0.7, silent=True)
        elif kind == "refuse":
            self.network.refuses = True
            self._at(fault.seconds, lambda: setattr(self.network, "refuses", False))
        elif kind == "kill broker":
            self._kill_broker(abruptly=False, power=False)
        elif kind == "lose power":
            self._kill_broker(abruptly=True, power=True)
        elif kind == "crash at operation":
            self.disk.crash_in = 1 + int(fault.draw * 40)
        elif kind == "kill client" and victim is not None:
            self.kill_client(*victim)
        elif kind == "pause client" and victim is not None:
            self._pause(victim[1], fault.seconds)
        elif kind == "twin" and victim is not None and victim[0].has_twins:
            self._pause(victim[1], fault.seconds)
            self.begin_life(victim[0])
        elif kind == "jump clock":
            jumped_ms = self.clock_jump_ms + int((fault.draw - 0.5) * 3_600_000)
            self.clock_jump_ms = max(CLOCK_BACK_MAX_MS, jumped_ms)
        elif kind == "fill disk":
            self.disk.full = True
            self._at(fault.seconds, lambda: setattr(self.disk, "full", False))
        elif kind == "fail sync":
            self.disk.sync_fails = 1

    def _pause(self, process: Process, seconds: float) -> None:
        if not process.paused:
            process.paused = True
            self._at(seconds, lambda: self.resume(process))

    def resume(self, process: Process) -> None:
        self.loop.resume(process)

    def _calm_down(self) -> None:
        """From here on nothing goes wrong. A log that stopped after a failed sync needs a restart: that is its rule."""
        self._calm = True
        self.trace("world", "calms down")
        self.network.refuses = False
        self.network.late = None
        self.disk.full = False
        self.disk.sync_fails = self.disk.crash_in = 0
        for link in self.network.links.values():
            link.to_server.held_until = link.to_client.held_until = 0.0
        for _, process in self.lives:
            if process.paused:
                self.resume(process)
        if self.disk.sync_failed:
            self._kill_broker(abruptly=False, power=False)

    # --- The course of a run ---

    def _watch(self) -> None:
        """Offsets that readers may rely on never move back within one life of the broker."""
        if self.broker is not None and self.broker_process is not None:
            for topic in self.broker.node.topics:
                for partition in topic.partitions:
                    log = partition.log
                    now = (log.last_stable_offset, log.high_watermark)
                    key = (topic.info.topic_id, self.broker_process.name, log.partition)
                    before = self._marks.get(key, (0, 0))
                    if now[0] < before[0] or now[1] < before[1] or now[0] > now[1] or now[1] > log.log_end_offset:
                        self.history.fail("offset moved back", f"{log!r}: {before} then {now}")
                    self._marks[key] = now
        if not self.is_over:
            self._at(0.02, self._watch)

    async def main(self) -> None:
        """Set up, let clients and faults run, calm down, wait for everybody, read everything, check."""
        plan = self.plan
        self.start_broker()
        process = Process("world")
        client = self.client(process, 5000)
        work = self.loop.spawn(process, self._prepare(client))
        await work
        self.actors = [kind(self, f"{name}-{number}") for name, count, kind in self.cast() for number in range(count)]
        for actor in self.actors:
            self.begin_life(actor)
        for fault in plan.faults:
            self._at(fault.at, lambda fault=fault: self.strike(fault))  # type: ignore[misc]
        self._watch()
        calm_at = self.loop.now + (plan.faults[-1].at + self.calm_seconds if plan.faults else 0.0)
        while self.loop.now < calm_at and not (self.calms_early and self._all_done()):
            await self._breathe()
        self._calm_down()
        deadline = self.loop.now + LIVENESS_SECONDS
        while not self._all_done():
            await self._breathe()
            if self.loop.now > deadline:
                late = [actor.name for actor in self.actors if not actor.done and not actor.is_background]
                raise Violation("liveness", f"{LIVENESS_SECONDS:g} s after the last fault these have not ended: {late}")
        while self.network.has_legacies:
            await self._breathe()
        await self._watched(self.loop.spawn(process, self.settle(client, deadline)))
        await asyncio.sleep(0.1)  # What came last is on the disk and can be read.
        self.is_over = True
        await self.loop.spawn(process, self._judge(client, deadline))

    async def _watched(self, task: asyncio.Task[None]) -> None:
        """Wait for it, or for a broken promise."""
        while not task.done():
            await self._breathe()
        await task

    def _all_done(self) -> bool:
        self.inputs_ended = all(actor.done for actor in self.actors if isinstance(actor, Writer))
        return all(actor.done for actor in self.actors if not actor.is_background)

    async def _breathe(self) -> None:
        await asyncio.sleep(0.01)
        if self.history.problem is not None:
            raise self.history.problem
        if self.loop.steps > STEPS_MAX:
            raise Violation("livelock", f"{self.loop.steps} steps of the loop in {self.loop.now:.1f} s")

    # --- What differs between worlds ---

    def cast(self) -> list[tuple[str, int, type[Actor]]]:
        """Who takes part: (name, how many, class)."""
        plan = self.plan
        return [
            ("writer", plan.writers, Writer),
            ("idempotent", plan.idempotent, IdempotentWriter),
            ("processor", plan.processors, Processor),
            ("reader", plan.readers, Reader),
            ("admin", int(plan.admin), Administrator),
        ]

    def settings(self) -> AbstractContextManager[None]:
        """Small limits, and what stands in the places of real things, while the world runs."""
        return _settings(self.plan)

    async def settle(self, client: KafkaClient, deadline: float) -> None:
        """Everybody who has an end has come to it: let the others end."""

    async def _prepare(self, client: KafkaClient) -> None:
        await client.start()
        await Admin(client).create_topics(
            {"a": TopicSpec(2), "b": TopicSpec(1), "in": TopicSpec(2), "out": TopicSpec(1)}
        )

    async def _judge(self, client: KafkaClient, deadline: float) -> None:
        logs, committed, starts = {}, {}, {}
        partitions = [*TARGETS, *INPUTS, OUTPUT] if self.plan.processors else [*TARGETS]
        for partition in partitions:
            while True:
                try:
                    logs[partition], starts[partition] = await read_whole(self, client, partition, committed=False)
                    committed[partition], _ = await read_whole(self, client, partition, committed=True)
                    break
                except (Retriable, OutcomeUnknown) as error:
                    if self.loop.now > deadline:
                        raise Violation("liveness", f"{partition} cannot be read to its end: {error}") from error
                    await asyncio.sleep(0.1)
        history = self.history
        history.check(logs, committed, starts)
        if self.plan.transaction_version == 2:
            history.check_one_transaction_an_epoch(logs)
        if self.plan.processors:
            offsets = await Admin(client).committed_offsets(GROUP, INPUTS)
            inputs = {partition: committed[partition] for partition in INPUTS}
            history.check_processing(inputs, offsets, {OUTPUT: committed[OUTPUT]})
            for partition in INPUTS:
                if inputs[partition] and offsets.get(partition, 0) <= inputs[partition][-1].offset:
                    history.fail("liveness", f"{partition} was not processed to its end: {offsets}")
        if history.problem is not None:
            raise history.problem


class _Errors(logging.Handler):
    """What the broker and the clients log as a mistake of theirs is one."""

    def __init__(self, history: History) -> None:
        super().__init__(logging.ERROR)
        self._history = history

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            if not isinstance(error, (OSError, LogError, Crash, *self._history.expected)):
                self._history.fail("unexpected exception", f"{record.getMessage()}: {error!r}")


def _with_small_segments(log_config: Callable[..., LogConfig], segment_bytes: int) -> Callable[..., LogConfig]:
    """Every topic's segments, also the internal ones', which no client may set so small."""
    return lambda *args: replace(log_config(*args), segment_bytes=segment_bytes)


@contextmanager
def _settings(plan: Plan) -> Iterator[None]:
    """Small limits, so that what is rare in production happens in every run."""
    knobs = plan.knobs
    with ExitStack() as stack:
        for target, value in (
            ("semel.log.log.SNAPSHOT_BATCHES", knobs["snapshot batches"]),
            ("semel.broker.internal.CHECKPOINT_BYTES", knobs["checkpoint bytes"]),
            ("semel.broker.topics.log_config", _with_small_segments(topics.log_config, knobs["segment bytes"])),
        ):
            stack.enter_context(mock.patch(target, value))
        for name, module in sorted(sys.modules.items()):
            if name.startswith("semel.") and "EPOCH_MAX" in vars(module):
                stack.enter_context(mock.patch.object(module, "EPOCH_MAX", knobs["epoch max"]))
        yield


def run(plan: Plan, make: Callable[[Plan], World] | None = None) -> Outcome:
    """Run a plan to its end or to the first broken promise."""
    world = (make or World)(plan)
    problem: Violation | None = None
    logger = logging.getLogger("semel")
    handler = _Errors(world.history)
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.ERROR)
    logger.propagate = False
    try:
        with disk.replaced_by(world.disk), world.settings():
            try:
                world.loop.run_until_complete(world.main())
            except Violation as violation:
                problem = violation
            except SemelError as error:
                problem = Violation("liveness", f"nothing goes wrong any more, but: {error!r}")
            except AssertionError as error:
                problem = Violation("assertion", repr(error))
            outcome = Outcome(
                plan,
                world.history.problem or problem,
                world.digest,
                list(world.kept),
                world.loop.steps,
                world.loop.now,
                world.restarts,
                len(world.history.transactions),
                sum(map(len, world.history.observed.values())),
                world.zombies,
            )
            world.abandon()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
    return outcome

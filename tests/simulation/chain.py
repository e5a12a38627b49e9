"""The chain in the simulated world: Semel's own workers on the simulated broker, and what must come of their inputs."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest import mock

from semel.client.admin import Admin
from semel.client.cluster import KafkaClient
from semel.client.consumer import Batch, Consumer, ConsumerEvents, Reader
from semel.env import Env
from semel.errors import OutcomeUnknown, Retriable
from semel.ingress.gateway import Gateway
from semel.ingress.link import topic_specs
from semel.ingress.owner import owner_component
from semel.ingress.requests import requests_topic
from semel.processing.component import Component
from semel.processing.topics import Topic
from semel.processing.topology import prepare_topics
from semel.processing.worker import Runnable
from semel.settings import Settings
from semel.types import TopicPartition
from tests.simulation.actors import Actor, read_whole
from tests.simulation.callers import Caller, GatewayActor, Purger, Trouble, check_asked, owner
from tests.simulation.copying import COPIED, COPY_GROUP, COPY_PARKED, copier, copies, quick_run
from tests.simulation.fibers import sleep
from tests.simulation.history import Seen, Violation
from tests.simulation.loop import PROCESS, Process
from tests.simulation.plan import Plan
from tests.simulation.sinking import SINK, check_database, positions, sink_engine
from tests.simulation.striking import StrikingWorld
from tests.simulation.workers import (
    APP,
    CHANGELOG,
    COUNTED,
    FED,
    FRESH,
    PARKED,
    PARTITIONS,
    Counting,
    Feeder,
    HostTable,
    Poison,
    WorkerActor,
    is_poison,
    step,
)

__all__ = ["ChainWorld"]

_LATER = (Retriable, OutcomeUnknown)
_POLL_TAKES_SECONDS = 0.0002
COUNT_GROUP = f"{APP}.count"


class ChainWorld(StrikingWorld):
    """Feeders write inputs, workers count them."""

    quiet_points = ("consume.before_poll",)  # Nearly all of the steps are this one.
    calm_seconds = 2.5
    calms_early = False

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.history.expected = (Poison, Trouble)
        self._runs = 0
        self.files: dict[tuple[str, int], list[HostTable]] = {}
        """The workers' state on their host's disk, by store and partition."""
        self.is_draining = False
        self._owners: dict[tuple[str, TopicPartition], Process] = {}
        self._held: dict[Process, set[tuple[str, TopicPartition]]] = {}

    def cast(self) -> list[tuple[str, int, type[Actor]]]:
        plan = self.plan
        return [
            ("feeder", plan.feeders, Feeder),
            ("worker", plan.workers, WorkerActor),
            ("gateway", plan.gateways, GatewayActor),
            ("caller", plan.callers, Caller),
            ("purger", min(1, plan.gateways), Purger),
        ]

    def components(self, process: Process) -> list[Component]:
        """What a worker runs, each with an engine of its own."""
        found = [Counting(self.plan.knobs, self.stream(f"handler of {process.name}")).component]
        if self.plan.copiers:
            found.append(copier(self, process.name))
        return [*found, owner(self, process)] if self.plan.gateways else found

    def sinks(self, settings: Settings, env: Env, slot: int) -> dict[str, Runnable]:
        """What a worker runs beside the components."""
        return {SINK: sink_engine(self, settings, env, slot)} if self.plan.sinks else {}

    def gateways(self) -> list[tuple[Process, Gateway]]:
        """Those that answer now, as a load balancer sees it."""
        return [
            (process, gateway)
            for actor in self.actors
            if isinstance(actor, GatewayActor)
            for process, gateway in actor.open.items()
            if process.alive and gateway.is_ready
        ]

    def next_run(self) -> int:
        """A number for one run of the endpoint's handler."""
        self._runs += 1
        return self._runs

    def settings(self) -> AbstractContextManager[None]:
        return _instead(super().settings(), self)

    async def _prepare(self, client: KafkaClient) -> None:
        await client.start()
        topics: list[Topic[Any, Any]] = [Topic(name, bytes, bytes) for name in (FED, COUNTED)]
        components = [Counting({}, self.stream("none")).component]
        if self.plan.copiers:
            topics.append(Topic(COPIED, bytes, bytes))
            components.append(copier(self))
        more = {}
        if self.plan.gateways:
            components.append(owner_component(APP, []))
            more = topic_specs(APP, PARTITIONS)
        await prepare_topics(Admin(client), topics, components, PARTITIONS, more=more)

    # --- Zombies ---

    def assigned(self, group: str, partitions: Sequence[TopicPartition]) -> None:
        """The group gave these to the process that runs now."""
        process = PROCESS.get()
        assert process is not None
        for at in partitions:
            self._owners[group, at] = process
        self.trace("group", group, process.name, "has", *partitions)

    def _pause(self, process: Process, seconds: float) -> None:
        self._held.setdefault(process, set()).update(at for at, owner in self._owners.items() if owner is process)
        super()._pause(process, seconds)

    def resume(self, process: Process) -> None:
        held = self._held.pop(process, set())
        if process.alive and any(self._owners[at] is not process for at in held):
            self.zombies += 1
            self.trace("world", process.name, "is a zombie")
        super().resume(process)

    # --- The end ---

    async def settle(self, client: KafkaClient, deadline: float) -> None:
        """Wait until the workers have done everything, then have them drain."""
        if self.plan.gateways:
            await self._answered(client, deadline)
        fed = await self._logs(client, deadline, FED, committed=True)
        await self._reach(client, deadline, COUNT_GROUP, _ends(fed))
        counted = _ends(await self._logs(client, deadline, COUNTED, committed=True))
        if self.plan.copiers:
            await self._reach(client, deadline, COPY_GROUP, dict(counted))
        if self.plan.sinks:
            await self._applied(counted, deadline)
        self.is_draining = True
        workers = [actor for actor in self.actors if isinstance(actor, (WorkerActor, GatewayActor))]
        for worker in workers:
            if isinstance(worker, WorkerActor):
                worker.drain()
        while not all(worker.done for worker in workers):
            if self.loop.now > deadline:
                raise Violation("liveness", f"these do not drain: {[item.name for item in workers if not item.done]}")
            await asyncio.sleep(0.05)

    async def _answered(self, client: KafkaClient, deadline: float) -> None:
        """Wait until the owners have read every request, also those whose callers are no more."""
        requests = [TopicPartition(requests_topic(APP), number) for number in range(PARTITIONS)]
        while True:
            try:
                ends = await Admin(client).list_offsets(requests, "high_watermark")
                break
            except _LATER:
                await asyncio.sleep(0.1)
        await self._reach(client, deadline, f"{APP}.requests", {at: end for at, end in ends.items() if end})

    async def _applied(self, due: dict[TopicPartition, int], deadline: float) -> None:
        """Wait until the sink's positions are behind these records."""
        while not all(positions(self).get(at, 0) >= end for at, end in due.items()):
            if self.loop.now > deadline:
                raise Violation("liveness", f"the sink is at {positions(self)} and does not reach {due}")
            await asyncio.sleep(0.1)

    async def _logs(
        self, client: KafkaClient, deadline: float, topic: str, *, committed: bool
    ) -> dict[TopicPartition, list[Seen]]:
        """Every record of a topic, once nothing is open in it any more."""
        found = {}
        for number in range(PARTITIONS):
            at = TopicPartition(topic, number)
            while True:
                try:
                    found[at], _ = await read_whole(self, client, at, committed=committed)
                    break
                except _LATER as error:
                    if self.loop.now > deadline:
                        raise Violation("liveness", f"{at} cannot be read to its end: {error}") from error
                    await asyncio.sleep(0.1)
        return found

    async def _reach(self, client: KafkaClient, deadline: float, group: str, due: dict[TopicPartition, int]) -> None:
        """Wait until a group has committed these offsets."""
        while due:
            try:
                found = await Admin(client).committed_offsets(group, list(due))
                due = {at: offset for at, offset in due.items() if found.get(at, -1) < offset}
            except _LATER:
                found = {}
            if due and self.loop.now > deadline:
                raise Violation("liveness", f"group {group} is at {dict(found)} and does not reach {due}")
            await asyncio.sleep(0.1)

    async def _judge(self, client: KafkaClient, deadline: float) -> None:
        history = self.history
        everything = await self._logs(client, deadline, FED, committed=False)
        fed = await self._logs(client, deadline, FED, committed=True)
        if self.plan.gateways:
            asked = [item for actor in self.actors if isinstance(actor, Caller) for item in actor.asked]
            check_asked(self, asked, [record.value for seen in fed.values() for record in seen])
        else:
            history.check(everything, fed, dict.fromkeys(fed, 0))
        counted = await self._logs(client, deadline, COUNTED, committed=True)
        parked = await self._logs(client, deadline, PARKED, committed=True)
        changes = await self._logs(client, deadline, CHANGELOG, committed=True)
        self._check_counting(fed, counted, parked)
        self._check_state(fed, changes)
        if self.plan.copiers:
            copied = await self._logs(client, deadline, COPIED, committed=True)
            self._check_copying(counted, copied, await self._logs(client, deadline, COPY_PARKED, committed=True))
        if self.plan.sinks:
            check_database(self, {at: [record.value for record in seen] for at, seen in counted.items()})
        if history.problem is not None:
            raise history.problem

    def _check_counting(
        self,
        fed: dict[TopicPartition, list[Seen]],
        counted: dict[TopicPartition, list[Seen]],
        parked: dict[TopicPartition, list[Seen]],
    ) -> None:
        """Each input's outputs once, in the order of its key; each input of a parked key parked once, in order."""
        outputs, waiting, _ = self._expected(fed)
        for what, due, logs in (("output", outputs, counted), ("parked record", waiting, parked)):
            got = _by_key(record.value for seen in logs.values() for record in seen)
            self._compare(what, due, got)

    def _check_copying(
        self,
        counted: dict[TopicPartition, list[Seen]],
        copied: dict[TopicPartition, list[Seen]],
        parked: dict[TopicPartition, list[Seen]],
    ) -> None:
        inputs = _by_key(record.value for seen in counted.values() for record in seen)
        due = {key: copies(values, self.plan.knobs["poison"]) for key, values in inputs.items()}
        for number, (what, logs) in enumerate((("copy", copied), ("parked copy", parked))):
            got = _by_key(record.value for seen in logs.values() for record in seen)
            self._compare(what, {key: made[number] for key, made in due.items() if made[number]}, got)

    def _compare(self, what: str, due: dict[str, list[str]], got: dict[str, list[str]]) -> None:
        for key in sorted({*due, *got}):
            wanted, found = due.get(key, []), got.get(key, [])
            if wanted == found:
                continue
            more, less = Counter(found) - Counter(wanted), Counter(wanted) - Counter(found)
            if less:
                self.history.fail(f"{what} lost", f"of key {key}: {dict(less)}, and too many are {dict(more)}")
            elif more:
                kind = "doubled" if set(found) == set(wanted) else "made up"
                self.history.fail(f"{what} {kind}", f"of key {key}: {dict(more)}")
            else:
                self.history.fail(f"{what} out of order", f"of key {key}: {found}, due is {wanted}")

    def _check_state(self, fed: dict[TopicPartition, list[Seen]], changes: dict[TopicPartition, list[Seen]]) -> None:
        """The last change of each key in the changelog is the fold of its inputs."""
        _, _, states = self._expected(fed)
        # Unlike the outputs, changes of a key within one unit are one change: its state after the last of them.
        got = {record.value for seen in changes.values() for record in seen}
        last: dict[str, str] = {}
        for seen in changes.values():
            for record in seen:
                key, value = record.value.split("=")
                last[key] = value
        if last != states:
            self.history.fail("state", f"the changelog ends with {last}, due is {states} (of {len(got)} changes)")

    def _expected(
        self, fed: dict[TopicPartition, list[Seen]]
    ) -> tuple[dict[str, list[str]], dict[str, list[str]], dict[str, str]]:
        """(outputs by key, parked records by key, states by key) of these inputs."""
        outputs: dict[str, list[str]] = {}
        parked: dict[str, list[str]] = {}
        states: dict[str, str] = {}
        for seen in fed.values():
            for record in seen:
                key = key_of(record.value)
                if key in parked or is_poison(record.value, self.plan.knobs["poison"]):
                    parked.setdefault(key, []).append(record.value)
                    continue
                written, states[key] = step(key, record.value, states.get(key, FRESH))
                outputs.setdefault(key, []).extend(written)
        return {key: items for key, items in outputs.items() if items}, parked, states


def _ends(logs: dict[TopicPartition, list[Seen]]) -> dict[TopicPartition, int]:
    """The offset behind the last record of each partition that has one."""
    return {at: seen[-1].offset + 1 for at, seen in logs.items() if seen}


def key_of(value: str) -> str:
    """The key of an input, an output or a parked record."""
    return value.split("|")[0] if "|" in value else value.rpartition("/")[2]


def _by_key(values: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for value in values:
        found.setdefault(key_of(value), []).append(value)
    return found


class _Consumer(Consumer):
    """A poll takes some time, so that time passes for whoever polls without waiting, too."""

    async def poll(self, max_records: int, timeout: float) -> Batch:
        await asyncio.sleep(_POLL_TAKES_SECONDS)
        return await super().poll(max_records, timeout)


class _Seen:
    """Events on their way to the owner, as the world sees them."""

    def __init__(self, world: ChainWorld, group: str, events: ConsumerEvents) -> None:
        self._world, self._group, self._events = world, group, events

    async def on_assigned(self, partitions: list[TopicPartition]) -> Mapping[TopicPartition, int]:
        self._world.assigned(self._group, partitions)
        return await self._events.on_assigned(partitions)

    async def on_revoked(self, partitions: list[TopicPartition]) -> None:
        await self._events.on_revoked(partitions)

    async def on_lost(self, partitions: list[TopicPartition]) -> None:
        await self._events.on_lost(partitions)


@contextmanager
def _instead(settings: AbstractContextManager[None], world: ChainWorld) -> Iterator[None]:
    """Consumers with the world's time and without threads, and what else stands in the place of the real thing."""

    def consumer(bootstrap: str, *, group: str, events: ConsumerEvents, **options: Any) -> _Consumer:
        process = PROCESS.get()
        assert process is not None
        seen = _Seen(world, group, events)
        return _Consumer(bootstrap, group=group, events=seen, env=world.env(process), in_thread=False, **options)

    def reader(bootstrap: str, **options: Any) -> Reader:
        process = PROCESS.get()
        assert process is not None
        return Reader(bootstrap, env=world.env(process), **options)

    with settings, ExitStack() as stack:
        stack.enter_context(mock.patch("semel.processing.seams.Consumer", consumer))
        stack.enter_context(mock.patch("semel.processing.seams.Reader", reader))
        stack.enter_context(mock.patch("semel.ingress.link.Reader", reader))
        stack.enter_context(mock.patch("semel.processing.quick._run", quick_run() if world.plan.quick else None))
        stack.enter_context(mock.patch("semel.processing.stores.STATE_FRESH_SECONDS", 0.05))
        stack.enter_context(mock.patch("semel.sinks.source.Consumer", consumer))
        stack.enter_context(mock.patch("semel.sinks.sql.sink.time.sleep", sleep))
        yield

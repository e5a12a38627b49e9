"""Reading records: `Consumer`, a member of a group, and `Reader`, of given partitions. Committed records only.

Fetching is `client/fetching.py` in the caller's event loop, membership `client/member.py` in a thread of its own. What
the group gives and takes is told to `ConsumerEvents` while somebody polls, and nothing of a new partition is delivered
before its owner has said where to start.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol, TypeVar

from semel.client.cluster import KafkaClient
from semel.client.connection import check_not_forked
from semel.client.fetcher import Fetcher
from semel.client.fetching import FetchLoop
from semel.client.heartbeating import HeartbeatMember
from semel.client.member import GroupMember, MemberThread
from semel.client.membership import GroupTimes, Member, Membership
from semel.client.outage import Outage
from semel.env import Env, comes
from semel.errors import Fatal, Retriable, SemelError
from semel.types import GroupMetadata, Record, TopicPartition

__all__ = ["Batch", "Consumer", "ConsumerEvents", "Reader"]

T = TypeVar("T")
log = logging.getLogger("semel.client.consumer")

_CLOSE_SECONDS = 10.0
"""How long `close` waits for a group and brokers that may be gone."""
_LOOK_TURNS = 3
"""Turns of the event loop in which an answer that lies in the socket becomes records."""


class Batch(NamedTuple):
    """What one poll gave. `end_offsets` are positions at the ends of partitions that were reached."""

    records: list[Record]
    end_offsets: dict[TopicPartition, int]


class ConsumerEvents(Protocol):
    """What the group does to us; awaited on the event loop while the consumer waits."""

    async def on_assigned(self, partitions: list[TopicPartition]) -> Mapping[TopicPartition, int]:
        """Take partitions over; returns the offset to start from for each of them."""

    async def on_revoked(self, partitions: list[TopicPartition]) -> None:
        """Finish or drop what is open of these partitions; afterwards they are another member's."""

    async def on_lost(self, partitions: list[TopicPartition]) -> None:
        """These partitions may be another member's already: drop what is open, commit nothing."""


class _Source:
    """What `Consumer` and `Reader` share: fetching, polling, positions."""

    def __init__(self, bootstrap: str, settings: Mapping[str, object] | None, env: Env | None, name: str) -> None:
        self._bootstrap = bootstrap
        self._settings = dict(settings or {})
        self._env = env or Env()
        self._client = self._new_client()
        self._own = self._client.settings.consumer
        self._fetcher = Fetcher(self._own.limits)
        self._name = name
        self._outage = Outage(name, self._env.monotonic)
        self._news = asyncio.Event()
        self._loop: FetchLoop | None = None
        self._fetching: asyncio.Task[None] | None = None
        self._polling: asyncio.Task[Batch] | None = None
        self._failure: SemelError | None = None
        self._closed = False
        self._pid = os.getpid()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._fetcher.positions)} partitions"
        return f"<{type(self).__name__} {self._name} [{state}]>"

    def _new_client(self) -> KafkaClient:
        return KafkaClient(self._bootstrap, client_id="semel-consumer", env=self._env, settings=self._settings)

    @property
    def positions(self) -> dict[TopicPartition, int]:
        """The next offset to be delivered, for each assigned partition."""
        return self._fetcher.positions

    async def poll(self, max_records: int, timeout: float) -> Batch:
        """Records that are there, or the first that come within `timeout` seconds; an empty batch else.

        A cancelled poll loses nothing: the next one gives what it found. Raises `Fenced` when another member took our
        instance id, `Fatal` when a position does not exist any more.
        """
        self._running()
        if self._polling is None:
            self._polling = asyncio.get_running_loop().create_task(self._poll(max_records, timeout))
        polling = self._polling
        try:
            return await asyncio.shield(polling)
        finally:
            if polling.done() and self._polling is polling:
                self._polling = None

    async def _poll(self, max_records: int, timeout: float) -> Batch:
        assert self._loop is not None
        deadline = self._env.monotonic() + timeout
        turns = _LOOK_TURNS
        while True:
            await self._serve()
            self._check()
            records, ends = self._fetcher.take(max_records)
            if records or ends or self._closed:
                self._loop.refill()
                return Batch(records, ends)
            left = deadline - self._env.monotonic()
            if left > 0:
                self._news.clear()
                await comes(self._news, left)
            elif turns and self._loop.is_waiting:
                turns -= 1
                await asyncio.sleep(0)
            else:
                return Batch([], {})

    async def _serve(self) -> None:
        """Let the owner know of what changed in the group."""

    async def seek(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Deliver these partitions from these offsets on; what was fetched of them already is dropped.

        Raises `Retriable` when one of them is not ours (any more); nothing changed then.
        """
        loop = self._running()
        if self._polling is not None and self._polling.done() and not self._polling.exception():
            # A poll that nobody waited for has found something.
            self._polling = asyncio.get_running_loop().create_task(_given(_without(self._polling.result(), offsets)))
        try:
            self._fetcher.seek(offsets)
        except KeyError as missing:
            raise Retriable(f"seeking {missing.args[0]}: it is not assigned to the consumer {self._name}") from None
        loop.stir()

    async def pause(self, partitions: Iterable[TopicPartition]) -> None:
        """Deliver nothing of these partitions until `resume`."""
        self._running()
        self._fetcher.pause(partitions)

    async def resume(self, partitions: Iterable[TopicPartition]) -> None:
        """Deliver these partitions again."""
        loop = self._running()
        self._fetcher.resume(partitions)
        self._news.set()
        loop.stir()

    async def close(self) -> None:
        """Leave and stop; returns within some seconds even when no broker is there."""
        if self._closed:
            return
        self._closed = True
        self._news.set()
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                if self._polling is not None:  # It may be in the middle of an event.
                    await asyncio.gather(self._polling, return_exceptions=True)
                await self._finish()
        except TimeoutError:
            log.warning("the consumer %s did not give its partitions back within %g s", self._name, _CLOSE_SECONDS)
        finally:
            if self._fetching is not None:
                self._fetching.cancel()
                await asyncio.gather(self._fetching, return_exceptions=True)
            await self._leave()  # Whatever went wrong before: a member that stays behind holds its partitions for ever.
            await self._client.close()

    async def _finish(self) -> None:
        """Have the owner finish what is open."""

    async def _leave(self) -> None:
        """Be no member any more."""

    def _begin(self) -> None:
        """Fetch what is assigned from now on."""
        self._loop = FetchLoop(self._client, self._fetcher, self._outage, self._env, self._news.set)
        self._fetching = asyncio.get_running_loop().create_task(self._loop.run(), name=f"fetching {self._name}")
        self._fetching.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A mistake of ours must not leave a consumer that stands still."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = Fatal(f"the consumer {self._name} cannot go on: {error!r}")
            self._failure.__cause__ = error
            self._news.set()

    def _running(self) -> FetchLoop:
        check_not_forked(self._pid, f"the consumer {self._name}")
        if self._closed or self._loop is None:
            raise Fatal(f"the consumer {self._name} is {'closed' if self._closed else 'not started'}.")
        if self._failure is not None:
            raise self._failure
        return self._loop

    def _check(self) -> None:
        self._failure = self._failure or self._fetcher.failure
        if self._failure is not None:
            raise self._failure


class Reader(_Source):
    """Reads given partitions from given offsets, committed records only, in no group."""

    def __init__(self, bootstrap: str, *, settings: Mapping[str, object] | None = None, env: Env | None = None) -> None:
        super().__init__(bootstrap, settings, env, "of given partitions")

    async def start(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Begin at these offsets."""
        self._name = f"of {', '.join(sorted({at.topic for at in offsets})) or 'nothing'}"
        self._outage = Outage(self._name, self._env.monotonic)
        self._fetcher.assign(offsets)
        self._begin()


class Consumer(_Source):
    """A member of a consumer group: static when it has an instance id, read_committed.

    `group.protocol` chooses the protocol as in librdkafka: `classic` (default), or `consumer` (KIP-848), in which the
    broker shares the partitions out and nobody stops who has nothing to give back. With the latter a static member
    that was killed gets its partitions back when its former session is over, not at once. `in_thread` is False where
    there are no threads (a simulation).
    """

    def __init__(
        self,
        bootstrap: str,
        *,
        group: str,
        topics: Sequence[str],
        instance_id: str | None,
        events: ConsumerEvents,
        session_timeout_ms: int,
        settings: Mapping[str, object] | None = None,
        env: Env | None = None,
        in_thread: bool = True,
    ) -> None:
        super().__init__(bootstrap, settings, env, f"of group {group!r}")
        self._protocol = self._new_member(group, topics, instance_id, session_timeout_ms / 1000)
        self._events = events
        self._in_thread = in_thread
        self._member: GroupMember | MemberThread | None = None
        self._serial = 0
        self._life = 0
        self._owned: set[TopicPartition] = set()

    def _new_member(self, group: str, topics: Sequence[str], instance_id: str | None, session: float) -> Member:
        times = GroupTimes(session, max(0.1, min(3.0, session / 4)), max(self._own.poll_interval, session))
        if self._own.group_protocol == "classic":
            return Membership(group, topics, instance_id, times)
        member_id = str(self._env.new_id())
        return HeartbeatMember(group, topics, instance_id, times, member_id, self._own.assignor)

    async def start(self) -> None:
        """Join the group. The first partitions come during `poll`."""

        def make(on_change: Callable[[], None]) -> GroupMember:
            return GroupMember(self._new_client(), self._protocol, self._env, on_change)

        self._member = MemberThread(make, self._news.set) if self._in_thread else make(self._news.set)
        self._member.start()
        self._begin()

    def group_metadata(self) -> GroupMetadata:
        """Our member id and generation, for TxnOffsetCommit (KIP-447). Raises `Retriable` while we are no member.

        A broker takes offsets with generation -1 and no member id from anybody while the group is empty, so a zombie
        that sent them could set the position back to where it stood.
        """
        view = None if self._member is None else self._member.view
        if view is None or view.metadata is None or view.life != self._life:
            raise Retriable(f"the consumer {self._name} is not a member of its group now")
        return view.metadata

    async def _poll(self, max_records: int, timeout: float) -> Batch:
        assert self._member is not None
        self._member.polling(True)
        try:
            return await super()._poll(max_records, timeout)
        finally:
            self._member.polling(False)

    async def _serve(self) -> None:
        """Make the view of the group true: give back first, take over then, until there is no newer one."""
        assert self._member is not None
        while True:
            view = self._member.view
            self._failure = self._failure or self._member.failure
            self._check()
            if view.serial == self._serial:
                return
            gone = self._owned if view.life != self._life else self._owned - view.wanted
            if gone:
                await self._give_up(gone, is_lost=view.life != self._life)
            self._life = view.life
            if self._member.view.serial != view.serial:
                continue
            new = view.wanted - self._owned
            if new:
                await self._take_over(new)
            self._serial = view.serial
            self._member.acknowledge(view.serial)

    async def _give_up(self, partitions: Iterable[TopicPartition], *, is_lost: bool) -> None:
        gone = sorted(partitions)
        self._fetcher.revoke(gone)
        self._owned.difference_update(gone)
        await self._tell((self._events.on_lost if is_lost else self._events.on_revoked)(gone))

    async def _take_over(self, partitions: Iterable[TopicPartition]) -> None:
        new = sorted(partitions)
        offsets = await self._tell(self._events.on_assigned(new))
        missing = [at for at in new if at not in offsets]
        assert not missing, f"on_assigned gave no offset for {missing}"
        self._fetcher.assign({at: offsets[at] for at in new})
        self._owned.update(new)
        self._running().stir()

    async def _tell(self, event: Coroutine[Any, Any, T]) -> T:
        """Run an event; what fails there is the end of this consumer, since nobody knows what is open."""
        try:
            return await event
        except SemelError as error:
            self._failure = self._failure or error
            raise
        except Exception as error:
            self._failure = self._failure or Fatal(
                f"taking over or giving up partitions failed: {type(error).__name__}: {error}"
            )
            raise self._failure from error

    async def _finish(self) -> None:
        """Have the owner give everything back while the group still knows us."""
        if self._member is None:
            return
        self._member.polling(True)
        if self._owned and self._failure is None and self._member.failure is None:
            with suppress(SemelError):
                await self._give_up(self._owned, is_lost=self._member.view.life != self._life)

    async def _leave(self) -> None:
        if self._member is not None:
            await self._member.close()


async def _given(batch: Batch) -> Batch:
    return batch


def _without(batch: Batch, partitions: Iterable[TopicPartition]) -> Batch:
    gone = set(partitions)
    return Batch(
        [record for record in batch.records if (record.topic, record.partition) not in gone],
        {partition: offset for partition, offset in batch.end_offsets.items() if partition not in gone},
    )

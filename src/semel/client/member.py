"""Keeps us a member of a group: the shell around `client/membership.py` and `client/heartbeating.py`.

A handler may keep the event loop for longer than a session, and the group must not take its partitions for that. So a
member lives in a thread with a loop, connections and time of its own (`MemberThread`); what it does there are some
requests a second. In a simulation it lives in the one loop there is.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from math import inf

from semel.client.cluster import GROUP, Backoff, KafkaClient
from semel.client.membership import GroupRequest, Member, TopicFacts, View
from semel.env import Env, comes
from semel.errors import Fatal, Fenced, OutcomeUnknown, Retriable, SemelError

__all__ = ["GroupMember", "MemberThread"]

log = logging.getLogger("semel.client.consumer")

_LATER = (Retriable, OutcomeUnknown)
_BACKOFF_SECONDS = (0.02, 1.0)
_LOOK_SECONDS = 1.0
"""How often a member looks whether its owner, who had not polled for too long, is back."""
_LEAVE_SECONDS = 2.0
"""How long a goodbye may take; a group that does not hear it waits for the end of our session."""


class GroupMember:
    """One member, in the running event loop. `on_change`: there is a new view, or a failure."""

    def __init__(self, client: KafkaClient, member: Member, env: Env, on_change: Callable[[], None]) -> None:
        self.failure: SemelError | None = None
        self._client = client
        self._member = member
        self._env = env
        self._on_change = on_change
        self._stirred = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._trouble = ""

    def __repr__(self) -> str:
        return f"<GroupMember {self._member!r}>"

    @property
    def view(self) -> View:
        """What the owner is to own."""
        return self._member.view

    def start(self) -> None:
        """Join, and stay."""
        self._member.polled(self._env.monotonic())
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"member of {self._member.group}")

    def acknowledge(self, serial: int) -> None:
        """The owner has made the view of this serial true."""
        self._member.acknowledged(serial)
        self._stirred.set()

    def polling(self, is_polling: bool) -> None:
        """The owner begins to ask for records, or has got an answer."""
        self._member.polled(inf if is_polling else self._env.monotonic())

    async def close(self) -> None:
        """Leave the group, as far as that can be said in time."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        request = self._member.leave()
        if request is not None and self.failure is None:
            with suppress(SemelError, TimeoutError):
                async with asyncio.timeout(_LEAVE_SECONDS):
                    await self._ask(request)
        await self._client.close()

    async def _run(self) -> None:
        backoff = Backoff(self._env, *_BACKOFF_SECONDS)
        while self.failure is None:
            self._stirred.clear()
            before = self._member.view
            try:
                busy, wait = await self._step(), 0.0
                if self._trouble and busy:
                    log.info("the member of group %s goes on", self._member.group)
                    self._trouble = ""
                if busy:
                    backoff.reset()
                else:
                    wait = self._until_wake()
            except _LATER as error:
                busy, wait = False, backoff.next()
                self._client.invalidate(group=self._member.group)
                self._say(str(error))
            except (Fenced, Fatal) as error:
                self.failure = error
            except SemelError as error:  # To a producer its class says what to do; here it is the end.
                self.failure = Fatal(f"group {self._member.group!r} cannot be joined: {error}")
                self.failure.code = error.code
            except Exception as error:
                log.exception("the member of group %s cannot go on", self._member.group)
                self.failure = Fatal(f"the member of group {self._member.group!r} cannot go on: {error!r}")
                self.failure.__cause__ = error
            if self._member.view != before or self.failure is not None:
                self._on_change()
            if not busy and self.failure is None:
                await self._wait(wait)

    async def _wait(self, seconds: float) -> None:
        """Sleep until then, or until there is news. Who sleeps for much longer was kept from running."""
        began = self._env.monotonic()
        await comes(self._stirred, seconds)
        late = self._env.monotonic() - began - seconds
        if late > self._member.times.session / 2:
            log.warning(
                "the member of group %s could not run for %.1f s, and the group gives up who is silent for %g s: "
                "native code kept Python's lock (GIL), or this process was stopped. Run such code in a process of its "
                "own, or raise SEMEL_SESSION_TIMEOUT_MS.",
                self._member.group,
                late,
                self._member.times.session,
            )

    def _until_wake(self) -> float:
        wake_at = self._member.wake_at()
        return _LOOK_SECONDS if wake_at is None else min(_LOOK_SECONDS, max(0.0, wake_at - self._env.monotonic()))

    def _say(self, trouble: str) -> None:
        """The same trouble is told once."""
        kind = trouble.split(":", 1)[0]
        if kind != self._trouble:
            self._trouble = kind
            log.info("the member of group %s: %s", self._member.group, trouble)

    async def _step(self) -> bool:
        """Do what is due; whether there was anything."""
        member = self._member
        topics = member.topics_to_look_up(self._env.monotonic())
        if topics:
            await self._look_up(topics)
        request = member.next_request(self._env.monotonic())
        if request is None:
            return False
        try:
            answer = await self._ask(request)
        except BaseException:
            member.unanswered()
            raise
        member.answered(request, answer, self._env.monotonic())
        return True

    async def _ask(self, request: GroupRequest) -> object:
        node_id = await self._client.coordinator(self._member.group, GROUP)
        return await self._client.call(request.api_key, node_id, patience=request.patience, **request.fields)

    async def _look_up(self, topics: list[str]) -> None:
        for topic in topics:
            self._client.invalidate(topic=topic)
        await self._client.refresh_metadata(*topics)
        found = {}
        for topic in topics:
            info = self._client.known_topic(topic)
            topic_id = None if info is None or not info.topic_id.int else info.topic_id
            found[topic] = TopicFacts(topic_id, 0 if info is None else info.partitions)
        self._member.looked_up(found, self._env.monotonic())


class MemberThread:
    """A `GroupMember` in a daemon thread with an event loop of its own; a thread that hangs holds up nobody's end.

    `make` is called in that thread; `on_change` in the loop that called `start`.
    """

    def __init__(self, make: Callable[[Callable[[], None]], GroupMember], on_change: Callable[[], None]) -> None:
        self._make = make
        self._on_change = on_change
        self._loop = asyncio.new_event_loop()
        self._owner: asyncio.AbstractEventLoop | None = None
        self._member: GroupMember | None = None
        self._stillborn: SemelError | None = None
        self._thread = threading.Thread(target=self._run, name="semel member", daemon=True)

    def __repr__(self) -> str:
        return f"<MemberThread {self._member!r}>"

    @property
    def view(self) -> View:
        """What the owner is to own, as it is now."""
        return View() if self._member is None else self._member.view

    @property
    def failure(self) -> SemelError | None:
        """Why there is no member any more."""
        return self._stillborn if self._member is None else self._member.failure

    def start(self) -> None:
        """Begin, from the loop that is to be told of changes."""
        self._owner = asyncio.get_running_loop()
        self._thread.start()

    def acknowledge(self, serial: int) -> None:
        """The owner has made the view of this serial true."""
        if self._member is not None:
            with suppress(RuntimeError):  # The loop is closed.
                self._loop.call_soon_threadsafe(self._member.acknowledge, serial)

    def polling(self, is_polling: bool) -> None:
        """The owner begins to ask for records, or has got an answer. One assignment: no need to wake the thread."""
        if self._member is not None:
            self._member.polling(is_polling)

    async def close(self) -> None:
        """Leave the group and let the thread end."""
        if self._owner is None:
            self._loop.close()
            return
        done = asyncio.Event()
        loop, owner = self._loop, self._owner

        async def leave() -> None:
            try:
                if self._member is not None:
                    await self._member.close()
            finally:
                loop.stop()
                with suppress(RuntimeError):
                    owner.call_soon_threadsafe(done.set)

        def begin() -> None:
            self._leaving = loop.create_task(leave())

        with suppress(RuntimeError):
            loop.call_soon_threadsafe(begin)
            await done.wait()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.call_soon(self._begin)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def _begin(self) -> None:
        try:
            self._member = self._make(self._changed)
        except Exception as error:
            self._stillborn = Fatal(f"no member of the group could be made: {error!r}")
            self._stillborn.__cause__ = error
            self._changed()
            return
        self._member.start()

    def _changed(self) -> None:
        assert self._owner is not None
        with suppress(RuntimeError):  # The owner's loop is closed: nobody wants to know.
            self._owner.call_soon_threadsafe(self._on_change)

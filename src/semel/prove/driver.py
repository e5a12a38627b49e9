"""The load of a campaign: sends inputs without end until it is told to stop, and never gives up on one that it sent.

Every attempt goes into the history before it is made, its outcome after it. A tenth of the requests is sent twice, half
of the copies at the same moment.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random

from semel import history
from semel.client.cluster import KafkaClient
from semel.client.idempotent import Producer
from semel.errors import OutcomeUnknown, Retriable
from semel.prove.clients import Address, Answer, Connection, until_answered
from semel.prove.inputs import Job
from semel.wire.partitioner import partition_for

__all__ = ["Driver", "Sent"]

_COPIES_SHARE = 0.1
_RECONNECT_SHARE = 0.1
_RECORD_DONE = 200
_DELIVERY_MS = 120_000
_AGAIN_SECONDS = 0.2
_EXAMPLES_MAX = 5


@dataclass(slots=True)
class Sent:
    """What was sent and what became of it; by number of the input where it is an array."""

    statuses: array[int] = field(default_factory=lambda: array("H"))
    """The final HTTP status, 200 for an acknowledged record, 0 for no answer."""
    checksums: array[int] = field(default_factory=lambda: array("L"))
    """Of what was sent."""
    answered_at: array[float] = field(default_factory=lambda: array("d"))
    """Seconds of the monotonic clock, one for each input with a final answer."""
    by_address: dict[Address, array[float]] = field(default_factory=dict)
    """Every final answer of each HTTP instance, also to copies."""
    attempts: int = 0
    replayed: int = 0
    refused: list[str] = field(default_factory=list)
    """A few inputs that were refused, for people."""

    @property
    def inputs(self) -> int:
        return len(self.statuses)

    def count(self, least: int, below: int) -> int:
        """Inputs whose status is in this range."""
        return sum(least <= status < below for status in self.statuses)


class Driver:
    """Runs `clients` clients at `rate` inputs a second at most (None: no limit)."""

    def __init__(
        self,
        jobs: Iterator[Job],
        addresses: Callable[[], Sequence[Address]],
        client: KafkaClient,
        *,
        seed: int,
        clients: int,
        rate: float | None,
        most: int | None = None,
    ) -> None:
        self._jobs = jobs
        self._kafka = client
        self._producer = Producer(client, delivery_timeout_ms=_DELIVERY_MS)
        self._clients = clients
        self._pause = 1 / rate if rate else 0.0
        self._most = most
        self._rng = Random(f"{seed}:copies")
        pick = Random(f"{seed}:instances")
        self._pick = lambda: pick.choice(list(addresses()))
        self._next_at = 0.0
        self._stopping = False
        self._gave_up = False
        self.sent = Sent()
        self.copies = 1
        """How often each request is posted at the same moment."""

    def __repr__(self) -> str:
        return f"<Driver {self.sent.inputs} inputs sent>"

    @property
    def done(self) -> bool:
        """As many inputs as were wanted were sent, or there are no more."""
        return self._stopping

    async def run(self) -> None:
        """Send until `stop`; returns when everything that was sent has its answer, or `give_up` was called."""
        self._next_at = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for _ in range(self._clients):
                group.create_task(self._client())

    def stop(self) -> None:
        """Send nothing new."""
        self._stopping = True

    def give_up(self) -> None:
        """What has no answer by now stays without one."""
        self._stopping = self._gave_up = True

    async def _client(self) -> None:
        connection, second = Connection(self._pick), Connection(self._pick)
        try:
            while not self._stopping:
                await self._turn()
                job = None if self._stopping else self._take()
                if job is None:
                    break
                await self._send(job, connection, second)
                if self._rng.random() < _RECONNECT_SHARE:
                    connection.close()  # As a load balancer spreads them: an instance that is back gets its share.
        finally:
            connection.close()
            second.close()

    async def close(self) -> None:
        """Let go of the connections to Kafka."""
        await self._producer.close()

    async def _turn(self) -> None:
        """Wait for the next place in the line that `rate` makes. What was missed is not made up for in a burst."""
        now = time.monotonic()
        self._next_at = max(self._next_at + self._pause, now - self._pause)
        if self._next_at > now:
            await asyncio.sleep(self._next_at - now)

    def _take(self) -> Job | None:
        job = None
        if self._most is None or self.sent.inputs < self._most:
            job = next(self._jobs, None)
        if job is None:
            self._stopping = True
            return None
        self.sent.statuses.append(0)
        self.sent.checksums.append(job.checksum)
        return job

    async def _send(self, job: Job, connection: Connection, second: Connection) -> None:
        if job.topic:
            await self._append(job)
            return
        if self.copies > 1:
            await self._send_at_once(job, self.copies)
            return
        copy = self._rng.random()
        if copy < _COPIES_SHARE / 2:
            answer, _ = await asyncio.gather(self._post(job, connection), self._post(job, second))
        else:
            answer = await self._post(job, connection)
        self._settled(job, answer)
        if _COPIES_SHARE / 2 <= copy < _COPIES_SHARE:
            await self._post(job, second)

    async def _send_at_once(self, job: Job, copies: int) -> None:
        connections = [Connection(self._pick) for _ in range(copies)]
        try:
            answers = await asyncio.gather(*(self._post(job, connection) for connection in connections))
        finally:
            for connection in connections:
                connection.close()
        self._settled(job, next((answer for answer in answers if answer.is_final), answers[0]))

    async def _post(self, job: Job, connection: Connection) -> Answer:
        return await until_answered(connection, job.data, _Attempts(job, self.sent), lambda: not self._gave_up)

    def _settled(self, job: Job, answer: Answer) -> None:
        if not answer.is_final:
            return
        self.sent.statuses[job.number] = answer.status
        self.sent.answered_at.append(time.monotonic())
        if answer.status >= 400 and len(self.sent.refused) < _EXAMPLES_MAX:
            self.sent.refused.append(f"{job.route} {job.body[:100]!r}: {answer.status} {answer.body[:200]!r}")

    async def _append(self, job: Job) -> None:
        while True:
            outcome = await self._append_once(job)
            if outcome is not None or self._gave_up:
                break
            await asyncio.sleep(_AGAIN_SECONDS)
        if outcome is not None and outcome >= 0:
            self.sent.statuses[job.number] = _RECORD_DONE
            self.sent.answered_at.append(time.monotonic())

    async def _append_once(self, job: Job) -> int | None:
        """The offset; -1 when nobody knows whether the record is there; None when it certainly is not.

        A record of unknown outcome is not sent again: that would be another record.
        """
        attempt = history.attempt()
        self.sent.attempts += 1
        note = partial(history.Send, a=attempt, id=job.key, topic=job.topic)
        history.note(note(type="invoke"))
        partitions = (await self._kafka.topic(job.topic)).partitions
        key = job.record_key
        partition = self._rng.randrange(partitions) if key is None else partition_for(key, partitions)
        headers = ((history.PROOF, attempt.encode()),)
        try:
            written = await self._producer.send(job.topic, partition, key, job.body, headers)
        except Retriable:
            history.note(note(type="fail"))
            return None
        except OutcomeUnknown:
            history.note(note(type="info"))
            return -1
        is_placed = written.offset >= 0  # Else the broker knows the record and has forgotten where it stands.
        history.note(note(type="ok" if is_placed else "info", partition=partition, offset=written.offset))
        return written.offset


class _Attempts:
    """Writes each attempt of one request into the history, and counts."""

    def __init__(self, job: Job, sent: Sent) -> None:
        self._job = job
        self._sent = sent
        self._body = history.digest(job.body)

    def sending(self) -> str:
        attempt = history.attempt()
        self._sent.attempts += 1
        job = self._job
        history.note(history.Http(type="invoke", a=attempt, key=job.key, route=job.route, body=self._body))
        return attempt

    def answered(self, attempt: str, answer: Answer, _seconds: float) -> None:
        kind: history.Outcome = "info" if not answer.is_final else "fail" if answer.status >= 400 else "ok"
        self._sent.replayed += answer.replayed
        if answer.is_final and answer.address is not None:
            self._sent.by_address.setdefault(answer.address, array("d")).append(time.monotonic())
        history.note(
            history.Http(
                type=kind,
                a=attempt,
                key=self._job.key,
                status=answer.status,
                reply=history.digest(answer.body),
                replayed=answer.replayed,
            )
        )

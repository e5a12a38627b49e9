"""The one seam to confluent-kafka: reading records, in a group or from given offsets.

librdkafka runs in one thread of its own, and only there is it called. What the group gives and takes is told to
`ConsumerEvents` on the event loop while that thread waits, so nothing of a new partition is delivered before its
owner has said where to start.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import struct
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import confluent_kafka

from semel.client.cluster import parse_bootstrap
from semel.client.config import DEFAULTS, ClientSettings
from semel.client.connection import check_not_forked
from semel.client.consumer import Batch, ConsumerEvents
from semel.client.outage import Outage
from semel.errors import ConfigurationError, ErrorCode, Fatal, Fenced, Retriable, SemelError
from semel.types import GroupMetadata, Record, TopicPartition

__all__ = ["Consumer", "Reader"]

log = logging.getLogger("semel.client.consumer")

T = TypeVar("T")
_EOF = confluent_kafka.KafkaError._PARTITION_EOF
_STATE = confluent_kafka.KafkaError._STATE
_ALL_BROKERS_DOWN = confluent_kafka.KafkaError._ALL_BROKERS_DOWN
_AUTHENTICATION = confluent_kafka.KafkaError._AUTHENTICATION
_SSL = confluent_kafka.KafkaError._SSL
_NO_RESET = (confluent_kafka.KafkaError._AUTO_OFFSET_RESET, confluent_kafka.KafkaError.OFFSET_OUT_OF_RANGE)
_CLOSE_SECONDS = 10.0
"""How long `close` waits for librdkafka, which may be waiting for a broker that is gone."""
_PROBE_SECONDS = 0.2
"""How long a poll may ask whether Kafka is back; it has nothing else to do."""

_BASE: dict[str, Any] = {
    "isolation.level": "read_committed",
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    "auto.offset.reset": "error",  # Every position is given; one that is gone must be seen, not skipped.
    "enable.partition.eof": True,  # Positions can pass trailing markers.
    "allow.auto.create.topics": False,
    "check.crcs": True,
    "fetch.queue.backoff.ms": 5,  # librdkafka's 1,000 starves a fast loop threefold.
    "fetch.error.backoff.ms": 50,
    "socket.timeout.ms": DEFAULTS["socket.timeout.ms"].value,
    "socket.connection.setup.timeout.ms": DEFAULTS["socket.connection.setup.timeout.ms"].value,
    # librdkafka 2.16 connects again twice in this time and never slower: with 20 that is 80 times a second.
    "reconnect.backoff.ms": 100,
    "reconnect.backoff.max.ms": DEFAULTS["reconnect.backoff.max.ms"].value,
    "socket.nagle.disable": True,
    "statistics.interval.ms": 0,
    "log.connection.close": False,
}
_PRODUCER_ONLY = frozenset(
    {
        "acks",
        "batch.size",
        "delivery.timeout.ms",
        "enable.idempotence",
        "message.timeout.ms",
        "queue.buffering.max.kbytes",
        "request.required.acks",
        "request.timeout.ms",
    }
)


class _Thread:
    """One daemon thread that runs calls in order; a call that hangs cannot keep the process alive."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()

    def call(self, function: Callable[[], T]) -> asyncio.Future[T]:
        """Run the function in the thread; the future belongs to the running loop."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def done(result: T | None, error: BaseException | None) -> None:
            if future.cancelled():
                return
            if error is not None:
                future.set_exception(error)
                future.exception()
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def run() -> None:
            result, error = None, None
            try:
                result = function()
            except BaseException as raised:
                error = raised
            with contextlib.suppress(RuntimeError):  # The loop is closed: nobody waits any more.
                loop.call_soon_threadsafe(done, result, error)

        self._calls.put(run)
        return future

    def stop(self) -> None:
        """Let the thread end after the calls that are queued."""
        self._calls.put(None)


class _LibrdkafkaLog:
    """librdkafka's own lines, for whoever looks for them: what matters of them comes as an error, too."""

    _log = logging.getLogger("semel.client.librdkafka")

    def log(self, _level: int, text: str, *arguments: object) -> None:
        """Called by confluent-kafka, in the consumer's thread."""
        self._log.debug(text, *arguments)


class _Source:
    """What `Consumer` and `Reader` share: the thread, polling, turning messages into records."""

    def __init__(self, config: dict[str, Any], name: str) -> None:
        self._config = config
        self._name = name
        self._thread: _Thread | None = None
        self._kafka: Any = None
        self._polling: asyncio.Future[Batch] | None = None
        self._failure: SemelError | None = None
        self._closed = False
        self._pid = os.getpid()
        self._positions: dict[TopicPartition, int] = {}
        self._dropped: set[TopicPartition] = set()
        self._paused: set[TopicPartition] = set()
        self._outage = Outage(name, time.monotonic)

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._positions)} partitions"
        return f"<{type(self).__name__} {self._name} [{state}]>"

    @property
    def positions(self) -> dict[TopicPartition, int]:
        """The next offset to be delivered, for each assigned partition."""
        return dict(self._positions)

    async def poll(self, max_records: int, timeout: float) -> Batch:
        """Records that are there, or the first that come within `timeout` seconds; an empty batch else.

        A cancelled poll loses nothing: the next one gives what it found. Raises `Fenced` when another member took our
        instance id, `Fatal` when a position does not exist any more.
        """
        thread = self._running()
        if self._polling is None:
            self._polling = thread.call(lambda: self._poll(max_records, timeout))
        polling = self._polling
        try:
            return await asyncio.shield(polling)
        finally:
            if polling.done() and self._polling is polling:
                self._polling = None

    async def seek(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Deliver these partitions from these offsets on; what was fetched of them already is dropped."""
        thread = self._running()
        if self._polling is not None:
            batch = await asyncio.shield(self._polling)
            kept = asyncio.get_running_loop().create_future()
            kept.set_result(_without(batch, offsets.keys()))
            self._polling = kept
        await thread.call(lambda: self._seek(offsets))

    async def pause(self, partitions: Iterable[TopicPartition]) -> None:
        """Deliver nothing of these partitions until `resume`."""
        wanted = set(partitions)
        await self._running().call(lambda: self._pause(wanted))

    async def resume(self, partitions: Iterable[TopicPartition]) -> None:
        """Deliver these partitions again."""
        wanted = set(partitions)
        await self._running().call(lambda: self._resume(wanted))

    async def close(self) -> None:
        """Leave and stop; returns within some seconds even when no broker is there."""
        if self._closed:
            return
        self._closed = True
        thread, self._thread = self._thread, None
        if thread is None:
            return
        closing = thread.call(self._close)
        thread.stop()
        done, _ = await asyncio.wait((closing,), timeout=_CLOSE_SECONDS)
        if not done:
            log.warning("%s: librdkafka did not close within %g s; it is left alone", self._name, _CLOSE_SECONDS)

    # --- In the thread ---

    def _running(self) -> _Thread:
        check_not_forked(self._pid, f"the consumer {self._name}")
        if self._closed or self._thread is None:
            raise Fatal(f"the consumer {self._name} is {'closed' if self._closed else 'not started'}.")
        if self._failure is not None:
            raise self._failure
        return self._thread

    def _make(self) -> None:
        try:
            self._kafka = confluent_kafka.Consumer(self._config | {"error_cb": self._failed}, logger=_LibrdkafkaLog())
        except confluent_kafka.KafkaException as error:
            raise ConfigurationError(f"the consumer {self._name}: {error.args[0].str()}") from error

    def _close(self) -> None:
        if self._kafka is not None:
            self._kafka.close()

    def _poll(self, max_records: int, timeout: float) -> Batch:
        self._dropped.clear()
        if self._outage.should_probe():
            self._probe()
        try:
            first = self._kafka.poll(timeout)
            messages = [] if first is None else [first, *self._kafka.consume(max_records - 1, 0)]
        except confluent_kafka.KafkaException as error:
            # Only a rebalance callback raises here. What was fetched with it is gone, though librdkafka's position has
            # passed it: going on would leave it out.
            self._failure = self._failure or Fatal(f"the consumer {self._name} cannot go on: {error.args[0].str()}")
            raise self._failure from error
        if self._failure is not None:
            raise self._failure
        batch = self._batch(messages)
        if self._dropped:
            batch = _without(batch, self._dropped)
            # One that came back within this poll may have had records in what was dropped: read those again.
            again = {partition: self._positions[partition] for partition in self._dropped & self._positions.keys()}
            if again:
                self._seek(again)
        for record in batch.records:
            self._positions[TopicPartition(record.topic, record.partition)] = record.offset + 1
        self._positions.update(batch.end_offsets)
        return batch

    def _batch(self, messages: list[Any]) -> Batch:
        records: list[Record] = []
        ends: dict[TopicPartition, int] = {}
        add, new = records.append, tuple.__new__
        for message in messages:
            error = message.error()
            if error is not None:
                self._judge(message, error, ends)
                continue
            headers = message.headers()
            add(
                new(
                    Record,
                    (
                        message.topic(),
                        message.partition(),
                        message.offset(),
                        message.timestamp()[1],
                        message.key(),
                        message.value(),
                        tuple(headers) if headers else (),
                    ),
                )
            )
        return Batch(records, ends)

    def _judge(self, message: Any, error: Any, ends: dict[TopicPartition, int]) -> None:
        """Sort an error that came in a message's place."""
        code = error.code()
        if code == _EOF:
            ends[TopicPartition(message.topic(), message.partition())] = message.offset()
        elif code in _NO_RESET:
            where = f"{message.topic()}-{message.partition()}"
            self._failure = Fatal(
                f"{where}: the position to read from is not in the log any more ({error.str()}). Records were deleted "
                "before they were read, or the topic was made anew; decide where to go on."
            )
            raise self._failure
        else:
            self._failed(error)
            if self._failure is not None:
                raise self._failure

    def _failed(self, error: Any) -> None:
        """Note an error of the whole consumer: fatal ones stop it, the others pass by themselves."""
        text = f"{error.name()}: {error.str()}"
        if error.code() == ErrorCode.FENCED_INSTANCE_ID or "fenced" in text.lower():
            self._fenced()
        elif error.fatal():
            self._failure = Fatal(f"the consumer {self._name} cannot go on: {text}")
        elif _is_refusal(error.code(), error.str()):
            self._failure = Fatal(
                f"the consumer {self._name} is refused by Kafka: {text}. Check sasl.username, sasl.password, "
                "sasl.mechanism and the ssl.* settings."
            )
        elif error.code() == _ALL_BROKERS_DOWN:
            self._outage.lost(f"no broker of {self._config['bootstrap.servers']} answers")
        else:
            self._outage.trouble(error.name(), text)

    def _fenced(self) -> None:
        instance = self._config.get("group.instance.id", "")
        self._failure = Fenced(
            f"the consumer {self._name} was fenced: another process joined with instance id {instance!r}. "
            "Stop this process; give every instance its own SEMEL_INSTANCE."
        )
        self._failure.code = ErrorCode.FENCED_INSTANCE_ID

    def _probe(self) -> None:
        """Ask the cluster for one of our topics: librdkafka does not say when a connection is there again."""
        with contextlib.suppress(confluent_kafka.KafkaException):
            self._kafka.list_topics(self._probe_topic(), timeout=_PROBE_SECONDS)
            self._outage.back()

    def _probe_topic(self) -> str | None:
        """A topic that we read; None for all, where there is none."""
        return next((at.topic for at in self._positions), None)

    def _pause(self, partitions: set[TopicPartition]) -> None:
        self._kafka.pause([confluent_kafka.TopicPartition(*item) for item in partitions])
        self._paused |= partitions

    def _resume(self, partitions: set[TopicPartition]) -> None:
        self._kafka.resume([confluent_kafka.TopicPartition(*item) for item in partitions])
        self._paused -= partitions

    def _seek(self, offsets: Mapping[TopicPartition, int]) -> None:
        for partition, offset in offsets.items():
            target = confluent_kafka.TopicPartition(*partition, offset)
            try:
                self._kafka.seek(target)
            except confluent_kafka.KafkaException as error:
                if error.args[0].code() != _STATE:
                    raise Retriable(f"seeking {partition} to {offset}: {error.args[0].str()}") from error
                # Its fetcher has not started yet: give everything again, this partition from its new offset.
                self._assign(self._positions | {partition: offset})
            self._positions[partition] = offset

    def _assign(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Read these partitions from these offsets, and no others; only what `_paused` names stands still.

        librdkafka remembers a pause over the end of an assignment, so it is told which ones are over.
        """
        self._kafka.assign([confluent_kafka.TopicPartition(*item, offset) for item, offset in offsets.items()])
        self._paused &= offsets.keys()
        self._kafka.pause([confluent_kafka.TopicPartition(*item) for item in self._paused])
        self._kafka.resume([confluent_kafka.TopicPartition(*item) for item in offsets.keys() - self._paused])


def _is_refusal(code: int, text: str) -> bool:
    """Whether the other side does not let us in, or is not to be trusted; not that it went away meanwhile."""
    return (code == _AUTHENTICATION and "Local:" not in text) or (code == _SSL and "certificate" in text)


class Consumer(_Source):
    """A member of a consumer group: static when it has an instance id, read_committed.

    Rebalances are eager: everybody gives everything back first. A cooperative one has two rounds, and between them a
    static member that is restarted gets what its predecessor was to keep (KIP-345); what the predecessor was to give
    up is then revoked by nobody and has no owner until somebody joins or leaves.
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
    ) -> None:
        config = {"fetch.wait.max.ms": 500} | _config(bootstrap, settings)
        config |= {
            "group.id": group,
            "session.timeout.ms": session_timeout_ms,
            "heartbeat.interval.ms": max(100, min(3_000, session_timeout_ms // 4)),
            "max.poll.interval.ms": max(300_000, session_timeout_ms),
            "partition.assignment.strategy": "range",
        }
        if instance_id is not None:
            config["group.instance.id"] = instance_id
        super().__init__(config, f"of group {group!r}")
        self._group = group
        self._instance_id = instance_id
        self._topics = list(topics)
        self._events = events
        self._loop: asyncio.AbstractEventLoop | None = None
        self._membership: bytes | None = None
        self._must_join_anew = False

    async def start(self) -> None:
        """Join the group. The first partitions come during `poll`."""
        self._loop = asyncio.get_running_loop()
        self._thread = _Thread(f"semel consumer {self._group}")
        await self._thread.call(self._open)

    def _open(self) -> None:
        self._make()
        self._kafka.subscribe(self._topics, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost)

    def group_metadata(self) -> GroupMetadata:
        """Our member id and generation, for TxnOffsetCommit (KIP-447). Raises `Retriable` while we are no member.

        librdkafka says generation -1 and no member id then. A broker takes offsets with these from anybody while the
        group is empty, so a zombie that sent them could set the position back to where it stood.
        """
        found = None if self._membership is None else parse_group_metadata(self._membership, self._instance_id)
        if found is None or found.generation_id < 0 or not found.member_id:
            raise Retriable(f"the consumer {self._name} is not a member of its group now")
        return found

    def _poll(self, max_records: int, timeout: float) -> Batch:
        if self._must_join_anew:
            self._join_anew()
        batch = super()._poll(max_records, timeout)
        self._remember_membership(self._kafka)
        return batch

    def _fenced(self) -> None:
        """Tell another process with our instance id from librdkafka, which fences itself (its issue 3437).

        It forgets its member id when the session is over, and if nobody polls then, it sends its next heartbeat
        without one. The broker refuses that as it refuses a stranger, and librdkafka is of no further use.
        """
        self._remember_membership(self._kafka)
        if self._membership is None or parse_group_metadata(self._membership, None).member_id:
            super()._fenced()
        else:
            self._must_join_anew = True

    def _join_anew(self) -> None:
        """Go on with a new librdkafka. Nobody else has our instance id, so there is nobody to fence by this."""
        log.info("the consumer %s joins its group anew: its session ended while Kafka was away", self._name)
        given, self._positions = list(self._positions), {}
        self._paused.clear()
        if given:
            self._tell(self._events.on_lost(given))
        old, self._kafka = self._kafka, None
        old.close()
        self._outage.back()
        self._open()
        self._must_join_anew = False

    # --- Rebalances, in the thread ---

    def _remember_membership(self, kafka: Any) -> None:
        """Ask librdkafka who we are while its thread is ours.

        Asked from another thread during a rebalance, it would wait for the callback, and the callback for whoever asks.
        An older generation than the group's is refused by the broker, so a memory is safe.
        """
        raw = kafka.consumer_group_metadata()
        self._membership = None if raw is None else bytes(raw)

    def _tell(self, event: Coroutine[Any, Any, T]) -> T | None:
        """Run an event on the loop and wait for its end; None when it failed or we are closing hard."""
        assert self._loop is not None
        try:
            future = asyncio.run_coroutine_threadsafe(event, self._loop)
        except RuntimeError:  # The loop is closed.
            event.close()
            return None
        while True:
            try:
                return future.result(timeout=0.5)
            except TimeoutError:
                if future.done() or self._loop.is_closed():
                    return None
            except SemelError as error:
                self._failure = self._failure or error
                return None
            except BaseException as error:
                failure = Fatal(f"taking over or giving up partitions failed: {type(error).__name__}: {error}")
                failure.__cause__ = error
                self._failure = self._failure or failure
                return None

    def _on_assign(self, kafka: Any, given: list[Any]) -> None:
        self._remember_membership(kafka)
        partitions = [TopicPartition(item.topic, item.partition) for item in given]
        offsets = self._tell(self._events.on_assigned(partitions)) if partitions else {}
        if offsets is None:
            kafka.assign([])
            return
        missing = [partition for partition in partitions if partition not in offsets]
        assert not missing, f"on_assigned gave no offset for {missing}"
        self._positions = {item: offsets[item] for item in partitions}
        self._assign(self._positions)

    def _on_revoke(self, kafka: Any, taken: list[Any]) -> None:
        self._give_up(kafka, taken, self._events.on_revoked)

    def _on_lost(self, kafka: Any, taken: list[Any]) -> None:
        self._give_up(kafka, taken, self._events.on_lost)

    def _give_up(
        self,
        kafka: Any,
        taken: list[Any],
        event: Callable[[list[TopicPartition]], Coroutine[Any, Any, None]],
    ) -> None:
        if self._kafka is None:  # The old one closes; its partitions were given up when it became useless.
            return
        partitions = [TopicPartition(item.topic, item.partition) for item in taken]
        for partition in partitions:
            self._positions.pop(partition, None)
            self._dropped.add(partition)
            self._paused.discard(partition)  # A pause ends with the ownership; the next owner, maybe we, starts afresh.
        self._remember_membership(kafka)
        if partitions:
            self._tell(event(partitions))
        kafka.unassign()


class Reader(_Source):
    """Reads given partitions from given offsets, committed records only, in no group."""

    def __init__(self, bootstrap: str, *, settings: Mapping[str, object] | None = None) -> None:
        # The end of a partition is told after an empty fetch, so a short one lets restoring end soon.
        config = {"fetch.wait.max.ms": 100} | _config(bootstrap, settings) | {"group.id": "semel-reader"}
        super().__init__(config, "of given partitions")

    async def start(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Begin at these offsets."""
        self._name = f"of {', '.join(sorted({at.topic for at in offsets})) or 'nothing'}"
        self._outage = Outage(self._name, time.monotonic)
        self._thread = _Thread("semel reader")
        await self._thread.call(lambda: self._open(offsets))

    def _open(self, offsets: Mapping[TopicPartition, int]) -> None:
        self._make()
        self._kafka.assign([confluent_kafka.TopicPartition(*item, offset) for item, offset in offsets.items()])
        self._positions.update(offsets)


def parse_group_metadata(raw: bytes, instance_id: str | None) -> GroupMetadata:
    """Read librdkafka's `CGMDv2:`: int32 generation in native order, group id and member id, each zero-ended."""
    magic = b"CGMDv2:"
    fields = raw[len(magic) + 4 :].split(b"\0")
    if not raw.startswith(magic) or len(fields) < 2:
        raise Fatal(f"librdkafka's group metadata has a form we do not know: {raw[:16]!r}. Pin confluent-kafka 2.x.")
    (generation,) = struct.unpack_from("=i", raw, len(magic))
    return GroupMetadata(fields[0].decode(), generation, fields[1].decode(), instance_id)


def _config(bootstrap: str, settings: Mapping[str, object] | None) -> dict[str, Any]:
    parse_bootstrap(bootstrap)
    ClientSettings.read(settings)  # Refuses what would weaken a promise.
    extra = {name: value for name, value in (settings or {}).items() if name not in _PRODUCER_ONLY}
    return _BASE | extra | {"bootstrap.servers": bootstrap}


def _without(batch: Batch, partitions: Iterable[TopicPartition]) -> Batch:
    gone = set(partitions)
    return Batch(
        [record for record in batch.records if (record.topic, record.partition) not in gone],
        {partition: offset for partition, offset in batch.end_offsets.items() if partition not in gone},
    )

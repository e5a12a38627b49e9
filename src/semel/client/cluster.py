"""The cluster as a client sees it: brokers, topics and their leaders, coordinators, and one connection to each broker.

`KafkaClient.call` sends one request once. Whoever may repeat a request does so with `KafkaClient.retry`, which knows
the back-off and the deadline; what is known about leaders and coordinators is thrown away by `invalidate`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Literal, NamedTuple, Self, TypeVar
from uuid import UUID

from semel.client.config import ClientSettings
from semel.client.connection import Connection, check_not_forked
from semel.env import Env
from semel.errors import ConfigurationError, ErrorCode, Fatal, OutcomeUnknown, Retriable, SemelError, kafka_error
from semel.types import TopicPartition

__all__ = ["Backoff", "KafkaClient", "TopicInfo"]

log = logging.getLogger("semel.client")

METADATA, FIND_COORDINATOR = 3, 10
GROUP: Final = 0
TRANSACTION: Final = 1
TRANSACTION_VERSION = "transaction.version"
T = TypeVar("T")


class TopicInfo(NamedTuple):
    """One topic: `partitions` is how many it has."""

    name: str
    topic_id: UUID
    partitions: int


class Backoff:
    """Growing waits between tries, with jitter: `first` seconds, doubled up to `largest`."""

    def __init__(self, env: Env, first: float, largest: float) -> None:
        self._env = env
        self._first = first
        self._largest = largest
        self._tries = 0

    def next(self) -> float:
        """Seconds to wait before the next try."""
        wait = min(self._largest, self._first * (1 << min(self._tries, 16)))
        self._tries += 1
        return wait * (0.8 + 0.4 * self._env.rng.random())

    def reset(self) -> None:
        """Start from the first wait again."""
        self._tries = 0


class KafkaClient:
    """One client of one cluster, for one event loop of one process. Settings have librdkafka's names."""

    def __init__(
        self,
        bootstrap: str,
        *,
        client_id: str = "semel",
        env: Env | None = None,
        settings: Mapping[str, object] | None = None,
    ) -> None:
        self._bootstrap = parse_bootstrap(bootstrap)
        self.client_id = client_id
        self.env = env or Env()
        self.settings = ClientSettings.read(settings)
        self._tls = self.settings.security.context()
        self.cluster_id = ""
        self._features: dict[str, int] = {}
        self._features_epoch = -1
        self._nodes: dict[int, tuple[str, int]] = {}
        self._connections: dict[int, Connection] = {}
        self._connecting: dict[int, asyncio.Lock] = {}
        self._reconnect: dict[int, tuple[float, Backoff]] = {}
        self._lost = 0
        self._seed: Connection | None = None
        self._seed_lock = asyncio.Lock()
        self._topics: dict[str, TopicInfo] = {}
        self._leaders: dict[TopicPartition, int] = {}
        self._epochs: dict[TopicPartition, tuple[UUID, int]] = {}
        """Topic id and the newest leader epoch heard of; a broker that says an older one is behind (KIP-320)."""
        self._coordinators: dict[tuple[str, int], int] = {}
        self._pid = os.getpid()
        self._closed = False

    def __repr__(self) -> str:
        addresses = ",".join(f"{host}:{port}" for host, port in self._bootstrap)
        state = "closed" if self._closed else f"{len(self._connections)} connections"
        return f"<KafkaClient {self.client_id} {addresses} cluster={self.cluster_id or '?'} [{state}]>"

    @property
    def transaction_version(self) -> int:
        """The finalized feature transaction.version: 2 and above means KIP-890's second part; 0 when absent."""
        return self._features.get(TRANSACTION_VERSION, 0)

    async def start(self) -> None:
        """Connect to the cluster; tries until `delivery.timeout.ms`. Raises `Retriable` naming the addresses."""
        await self.retry(self.refresh_metadata, f"connecting to Kafka at {self._addresses()}")

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every connection; requests in flight end as `OutcomeUnknown`."""
        self._closed = True
        connections = [*self._connections.values(), *([self._seed] if self._seed else [])]
        self._connections.clear()
        self._seed = None
        for connection in connections:
            connection.close()
        for connection in connections:
            await connection.wait_closed()

    # --- Requests ---

    async def call(
        self,
        api_key: int,
        node_id: int | None,
        /,
        version: int | None = None,
        *,
        patience: float | None = None,
        **fields: Any,
    ) -> Any:
        """Send one request once, to `node_id` or to any broker; returns the decoded answer.

        `patience`, in seconds, is for requests that a broker answers late on purpose; default `socket.timeout.ms`.

        Raises `Retriable` when the request was not written, `OutcomeUnknown` when it was and no answer came, `Fatal`
        when the broker does not know the API. Error codes inside the answer are the caller's to read.
        """
        connection = await self.connection(node_id)
        return await connection.send(api_key, connection.version_of(api_key, version), patience=patience, **fields)

    async def connection(self, node_id: int | None) -> Connection:
        """An open connection to that broker (any broker for None). Raises `Retriable`."""
        check_not_forked(self._pid, "the Kafka client")
        if self._closed:
            raise Fatal("the Kafka client is closed; make a new one.")
        if node_id is None:
            return await self._any_connection()
        found = self._connections.get(node_id)
        if found is not None and found.is_open:
            return found
        lock = self._connecting.setdefault(node_id, asyncio.Lock())
        async with lock:
            found = self._connections.get(node_id)
            if found is not None and found.is_open:
                return found
            return await self._connect_node(node_id)

    def open_connection(self, node_id: int) -> Connection | None:
        """The connection to that broker if it is open now; what is sent on it at once keeps its order."""
        found = self._connections.get(node_id)
        return found if found is not None and found.is_open else None

    @property
    def losses(self) -> int:
        """How many connections to brokers were lost so far: as long as it stays, every broker has been there."""
        return self._lost + sum(not connection.is_open for connection in self._connections.values())

    async def _connect_node(self, node_id: int) -> Connection:
        address = self._nodes.get(node_id)
        if address is None:
            raise Retriable(f"broker {node_id} is not in the cluster's metadata")
        now = self.env.monotonic()
        not_before, backoff = self._reconnect.get(node_id, (0.0, None))
        if backoff is None:
            backoff = Backoff(self.env, self.settings.reconnect_backoff, self.settings.reconnect_backoff_max)
        if not_before > now:
            await asyncio.sleep(not_before - now)
        try:
            connection = await self._open(*address)
        except Retriable:
            self._reconnect[node_id] = (self.env.monotonic() + backoff.next(), backoff)
            self._forget_node(node_id)
            self._lost += 1
            raise
        self._reconnect.pop(node_id, None)
        self._lost += node_id in self._connections
        self._connections[node_id] = connection
        return connection

    def _forget_node(self, node_id: int) -> None:
        """A broker that cannot be reached: whoever leads and coordinates in its place by now is asked for."""
        for at in [at for at, leader in self._leaders.items() if leader == node_id]:
            del self._leaders[at]
        for key in [key for key, coordinator in self._coordinators.items() if coordinator == node_id]:
            del self._coordinators[key]

    async def _any_connection(self) -> Connection:
        for connection in self._connections.values():
            if connection.is_open:
                return connection
        async with self._seed_lock:
            if self._seed is not None and self._seed.is_open:
                return self._seed
            self._seed = None
            addresses = dict.fromkeys([*self._bootstrap, *self._nodes.values()])
            reasons = []
            for host, port in addresses:
                try:
                    self._seed = await self._open(host, port)
                    return self._seed
                except Retriable as error:
                    reasons.append(str(error))
        raise Retriable("; ".join(reasons))

    async def _open(self, host: str, port: int) -> Connection:
        connection = await Connection.open(
            host,
            port,
            client_id=self.client_id,
            env=self.env,
            timeout=self.settings.socket_timeout,
            connect_timeout=self.settings.connect_timeout,
            security=self.settings.security,
            tls=self._tls,
        )
        if self._closed:
            connection.close()
            raise Retriable("the Kafka client was closed meanwhile")
        if connection.features_epoch >= self._features_epoch:
            self._features_epoch = connection.features_epoch
            self._features = connection.features
        return connection

    async def retry(self, call: Callable[[], Awaitable[T]], what: str, timeout: float | None = None) -> T:
        """Repeat a call that may be repeated while it raises `Retriable` or `OutcomeUnknown`.

        Ends after `timeout` seconds (default `delivery.timeout.ms`) with `Retriable`, which carries the last reason.
        """
        seconds = self.settings.delivery_timeout if timeout is None else timeout
        deadline = self.env.monotonic() + seconds
        backoff = Backoff(self.env, self.settings.retry_backoff, self.settings.retry_backoff_max)
        while True:
            try:
                return await call()
            except (Retriable, OutcomeUnknown) as error:
                wait = backoff.next()
                if self.env.monotonic() + wait >= deadline:
                    failure = Retriable(f"{what} did not succeed within {seconds:g} s; the last reason: {error}")
                    failure.code = error.code
                    raise failure from error
                await asyncio.sleep(wait)

    # --- Metadata ---

    async def refresh_metadata(self, *topics: str) -> None:
        """Ask for the brokers and these topics. Raises `Retriable` or `OutcomeUnknown` when nobody answers."""
        wanted = [{"topic_id": None, "name": name} for name in topics]
        answer = await self.call(
            METADATA,
            None,
            topics=wanted,
            allow_auto_topic_creation=False,
            include_topic_authorized_operations=False,
            include_cluster_authorized_operations=False,
        )
        self.cluster_id = answer.cluster_id or ""
        self._nodes = {broker.node_id: (broker.host, broker.port) for broker in answer.brokers}
        for node_id in [known for known in self._connections if known not in self._nodes]:
            self._connections.pop(node_id).close()
        for topic in answer.topics:
            if topic.error_code == ErrorCode.NONE and topic.partitions:
                self._learn_topic(topic)
            elif topic.error_code != ErrorCode.NONE:
                self._topics.pop(topic.name, None)
                error = kafka_error(topic.error_code, f"topic {topic.name!r}")
                if not isinstance(error, Retriable):
                    raise error

    def _learn_topic(self, topic: Any) -> None:
        topic_id = topic.topic_id or UUID(int=0)
        self._topics[topic.name] = TopicInfo(topic.name, topic_id, len(topic.partitions))
        for item in topic.partitions:
            at = TopicPartition(topic.name, item.partition_index)
            epoch = getattr(item, "leader_epoch", -1)  # Since version 7 of Metadata.
            known_id, known = self._epochs.get(at, (topic_id, -1))
            if known_id != topic_id or epoch >= known:
                self._leaders[at], self._epochs[at] = item.leader_id, (topic_id, epoch)

    async def topic(self, name: str, *, timeout: float = 5.0) -> TopicInfo:
        """What is known of a topic; waits up to `timeout` seconds for a new one. Raises `Fatal` when there is none."""
        found = self._topics.get(name)
        if found is not None:
            return found

        async def look() -> TopicInfo:
            await self.refresh_metadata(name)
            if name not in self._topics:
                error = Retriable(f"topic {name!r} is not there")
                error.code = ErrorCode.UNKNOWN_TOPIC_OR_PARTITION
                raise error
            return self._topics[name]

        try:
            return await self.retry(look, f"looking up topic {name!r}", timeout)
        except Retriable as error:
            if error.code is ErrorCode.UNKNOWN_TOPIC_OR_PARTITION:
                raise kafka_error(
                    error.code, f"topic {name!r} at {self._addresses()}", "Create it, or check its name.", Fatal
                ) from error
            raise

    def known_topic(self, name: str) -> TopicInfo | None:
        """What the cache has of a topic."""
        return self._topics.get(name)

    def known_leader(self, partition: TopicPartition) -> int | None:
        """The partition's leader if the cache has it."""
        leader = self._leaders.get(partition)
        return leader if leader is not None and leader in self._nodes else None

    def leader_epoch(self, partition: TopicPartition) -> int:
        """The newest leader epoch that was heard of, -1 for none."""
        return self._epochs[partition][1] if partition in self._epochs else -1

    async def leader(self, topic: str, partition: int) -> int:
        """The node that leads the partition. Raises `Retriable` while there is none."""
        key = TopicPartition(topic, partition)
        found = self.known_leader(key)
        if found is None:
            await self.refresh_metadata(topic)
            found = self.known_leader(key)
        if found is None:
            error = Retriable(f"{key} has no leader")
            error.code = ErrorCode.LEADER_NOT_AVAILABLE
            raise error
        return found

    def brokers(self) -> list[int]:
        """The node ids of the cluster's brokers."""
        return sorted(self._nodes)

    async def coordinator(self, key: str, key_type: Literal[0, 1]) -> int:
        """The node that coordinates a group (0) or a transactional id (1). Raises `Retriable` while there is none."""
        found = self._coordinators.get((key, key_type))
        if found is not None and found in self._nodes:
            return found
        kind = "group" if key_type == GROUP else "transactional id"
        connection = await self.connection(None)
        version = connection.version_of(FIND_COORDINATOR)
        fields: dict[str, Any] = {"key": key} if version < 4 else {"coordinator_keys": (key,)}
        answer = await connection.send(FIND_COORDINATOR, version, key_type=key_type, **fields)
        item = answer if version < 4 else answer.coordinators[0]
        if item.error_code != ErrorCode.NONE:
            raise kafka_error(item.error_code, f"finding the coordinator of {kind} {key!r}")
        if self._nodes.get(item.node_id) != (item.host, item.port):
            self._nodes[item.node_id] = (item.host, item.port)
        self._coordinators[key, key_type] = item.node_id
        return int(item.node_id)

    def invalidate(
        self, *, topic: str | None = None, group: str | None = None, transactional_id: str | None = None
    ) -> None:
        """Forget what is known of a topic's leaders or of a coordinator: the next look-up asks again."""
        if topic is not None:
            self._topics.pop(topic, None)
            for key in [known for known in self._leaders if known.topic == topic]:
                del self._leaders[key]
        if group is not None:
            self._coordinators.pop((group, GROUP), None)
        if transactional_id is not None:
            self._coordinators.pop((transactional_id, TRANSACTION), None)

    async def on_coordinator(
        self,
        key: str,
        key_type: Literal[0, 1],
        call: Callable[[int], Awaitable[T]],
        what: str,
        timeout: float | None = None,
    ) -> T:
        """Run a repeatable call against a coordinator, finding it again whenever it fails in a retriable way."""

        async def once() -> T:
            node_id = await self.coordinator(key, key_type)
            try:
                return await call(node_id)
            except SemelError:
                self._coordinators.pop((key, key_type), None)
                raise

        return await self.retry(once, what, timeout)

    def _addresses(self) -> str:
        return ",".join(f"{host}:{port}" for host, port in self._bootstrap)


def parse_bootstrap(text: str) -> list[tuple[str, int]]:
    """`host:port[,host:port]` as pairs; IPv6 hosts stand in brackets. Raises `ConfigurationError`."""
    found = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        host, colon, port = item.rpartition(":")
        if not colon:
            host, port = item, "9092"
        if not host or not port.isdigit() or not 0 < int(port) < 65_536:
            raise ConfigurationError(f"Kafka's address: {item!r} is not host:port, for example 127.0.0.1:9092.")
        found.append((host.strip("[]"), int(port)))
    if not found:
        raise ConfigurationError("bootstrap.servers is empty; give host:port[,host:port].")
    return found

"""Who uses the broker: our real clients, each life of them a process of its own that may end or pause at any await."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.client.producer import Producer, TransactionalProducer
from semel.errors import AbortTransaction, ErrorCode, Fatal, Fenced, OutcomeUnknown, Retriable, SemelError
from semel.types import GroupMetadata, TopicPartition
from semel.wire.records import BatchBuilder, decode_records, iter_batches, read_control
from tests.simulation.history import Entry, Seen, Transaction

if TYPE_CHECKING:
    from tests.simulation.loop import Process
    from tests.simulation.world import World

__all__ = ["Actor", "Administrator", "IdempotentWriter", "Processor", "Reader", "Writer", "read_on", "read_whole"]

FETCH = 1
GROUP = "processors"
TARGETS = (TopicPartition("a", 0), TopicPartition("a", 1), TopicPartition("b", 0))
INPUTS = (TopicPartition("in", 0), TopicPartition("in", 1))
OUTPUT = TopicPartition("out", 0)
LATER = (Retriable, OutcomeUnknown)
"""What passes: the same call again, in the same life."""


class Actor:
    """One client over all its lives. `done` when it has nothing left to do."""

    has_twins = False
    """Whether two lives may run at once, which the broker must keep apart."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.history = world.history
        self.name = name
        self.rng = world.stream(name)
        self.life = 0
        self.left = world.plan.operations
        self.done = False

    async def think(self) -> None:
        await asyncio.sleep(self.world.plan.knobs["think"] * self.rng.random())

    is_background = False
    """Whether it goes on until the end of the run."""

    async def run(self, process: Process, life: int) -> None:
        """One life; it may be repeated after any exception that is not a violation."""
        client = self.world.client(process, self.world.plan.knobs["socket timeout ms"])
        while True:
            try:
                await client.start()
                break
            except LATER:
                await asyncio.sleep(0.05)
        await self.live(client, life)
        await client.close()

    async def live(self, client: KafkaClient, life: int) -> None:
        """One life with a client of its own."""
        raise NotImplementedError


class Transactional(Actor):
    """What writers and processors share: a transactional id, and what each outcome means."""

    has_twins = True

    async def live(self, client: KafkaClient, life: int) -> None:
        producer = TransactionalProducer(
            client, self.name, transaction_timeout_ms=self.world.plan.knobs["transaction timeout ms"]
        )
        await self._until_done(producer.init_transactions)
        await self.ready(client)
        number = 0
        while self.left > 0:
            await self.think()
            number += 1
            transaction = self.history.begin(self.name, life, number)
            try:
                await self.transact(client, producer, transaction)
            except AbortTransaction:
                transaction.fate = "aborted"
                await self._until_done(producer.abort)
                await self.ready(client)
            except LATER:
                # Whether it was committed is not known, if that was asked for; the next call finds out and cleans up.
                await self._until_done(producer.abort)
                await self.ready(client)
        self.done = True
        await producer.close()

    async def ready(self, client: KafkaClient) -> None:
        """A clean state is reached: look where to go on."""

    async def transact(self, client: KafkaClient, producer: TransactionalProducer, transaction: Transaction) -> None:
        raise NotImplementedError

    async def end(self, producer: TransactionalProducer, transaction: Transaction, commit: bool) -> None:
        transaction.fate = "asked" if commit else "aborted"
        await producer.end_transaction(commit)
        transaction.fate = "committed" if commit else "aborted"
        self.world.trace("client", str(transaction))

    async def write(
        self, producer: TransactionalProducer, transaction: Transaction, partition: TopicPartition, count: int
    ) -> None:
        batch = BatchBuilder()
        for _ in range(count):
            value = f"{transaction.owner}/{transaction.life}/{transaction.number}/{len(transaction.records)}"
            transaction.records.append((partition, value))
            batch.append(b"k", value.encode(), self.world.client_ms())
        await producer.produce(*partition, batch)

    async def _until_done(self, call: Any) -> None:
        while True:
            try:
                await call()
                return
            except LATER:
                await asyncio.sleep(0.02)


class Writer(Transactional):
    """Transactions over up to three partitions, some of them aborted."""

    async def transact(self, client: KafkaClient, producer: TransactionalProducer, transaction: Transaction) -> None:
        producer.begin()
        targets = [*TARGETS, *INPUTS] if self.world.plan.processors else [*TARGETS]
        for partition in self.rng.sample(targets, self.rng.randint(1, 3)):
            await self.write(producer, transaction, partition, self.rng.randint(1, 3))
            if self.rng.random() < 0.3:
                await self.think()
        if self.rng.random() < 0.3:
            await producer.flush()
        await self.end(producer, transaction, self.rng.random() < 0.75)
        self.left -= 1


class Processor(Transactional):
    """Reads committed inputs and commits a result for each with the inputs' offsets, until there are no more inputs."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self.left = 1
        self._positions: dict[KafkaClient, dict[TopicPartition, int]] = {}

    async def ready(self, client: KafkaClient) -> None:
        admin = Admin(client)
        while True:
            try:
                found = await admin.committed_offsets(GROUP, INPUTS)
                break
            except LATER:
                await asyncio.sleep(0.02)
        self._positions[client] = {partition: found.get(partition, 0) for partition in INPUTS}

    async def transact(self, client: KafkaClient, producer: TransactionalProducer, transaction: Transaction) -> None:
        positions = self._positions[client]
        partition = self.rng.choice(INPUTS)
        before_end = self.world.inputs_ended
        records, position, _ = await read_on(self.world, client, partition, positions[partition], committed=True)
        if not records:
            if position == positions[partition] and before_end and await self._at_end(client, positions):
                self.left = 0
            positions[partition] = position
            transaction.fate = "aborted"
            return
        records = records[: self.rng.randint(1, 3)]
        producer.begin()
        await self.write(producer, transaction, OUTPUT, len(records))
        transaction.sources.extend((partition, record.offset) for record in records)
        await self.think()
        await producer.send_offsets({partition: records[-1].offset + 1}, GroupMetadata(GROUP))
        commit = self.rng.random() < 0.85
        await self.end(producer, transaction, commit)
        if commit:
            positions[partition] = records[-1].offset + 1

    async def _at_end(self, client: KafkaClient, positions: dict[TopicPartition, int]) -> bool:
        ends = await Admin(client).list_offsets(INPUTS, "high_watermark")
        return all(positions[partition] >= end for partition, end in ends.items())


class IdempotentWriter(Actor):
    """Single records without transactions, several on their way at once."""

    async def live(self, client: KafkaClient, life: int) -> None:
        producer = Producer(client, linger_ms=self.rng.choice((0, 5)))
        number = 0
        while self.left > 0:
            self.left -= 1
            await self.think()
            sends = []
            for _ in range(self.rng.randint(1, 5)):
                number += 1
                sends.append(self._send(producer, life, number, self.rng.choice(TARGETS)))
            await asyncio.gather(*sends)
        self.done = True
        await producer.close()

    async def _send(self, producer: Producer, life: int, number: int, partition: TopicPartition) -> None:
        value = f"{self.name}/{life}/{number}"
        entry = self.history.entries[value] = Entry(partition, self.name, life, number)
        try:
            done = await producer.send(*partition, b"k", value.encode(), timestamp_ms=self.world.client_ms())
        except Retriable:
            entry.fate = "refused"
        except OutcomeUnknown:
            pass
        else:
            entry.fate, entry.offset = "acknowledged", done.offset
            self.world.trace("client", value, done.offset)


class Reader(Actor):
    """Reads everything again and again, committed or not, and remembers every word."""

    is_background = True

    async def live(self, client: KafkaClient, life: int) -> None:
        while not self.world.is_over:
            partition = self.rng.choice((*TARGETS, OUTPUT))
            committed = self.rng.random() < 0.7
            position = 0
            try:
                for _ in range(self.rng.randint(1, 6)):
                    wait_ms = self.rng.choice((0, 20))
                    _, position, _ = await read_on(
                        self.world, client, partition, position, committed=committed, wait_ms=wait_ms
                    )
            except LATER:
                await asyncio.sleep(0.02)
            await self.think()


class Administrator(Actor):
    """Makes, fills and deletes a topic of the same name over and over; deletes the first records of another."""

    async def live(self, client: KafkaClient, life: int) -> None:
        admin = Admin(client)
        while self.left > 0:
            self.left -= 1
            await self.think()
            try:
                await self._scratch(client, admin)
                if self.rng.random() < 0.5:
                    await self._delete_records(admin)
                await admin.list_groups()
                await admin.describe_transactions(["writer-0"])
            except LATER:
                continue
        self.done = True

    async def _scratch(self, client: KafkaClient, admin: Admin) -> None:
        await admin.delete_topics(["scratch"])
        await admin.create_topics({"scratch": TopicSpec(1)})
        client.invalidate(topic="scratch")
        producer = Producer(client)
        try:
            done = await producer.send("scratch", 0, b"k", b"administrator", timestamp_ms=self.world.client_ms())
        finally:
            await producer.close()
        # Produce v12 names the topic, so a copy of a request that comes late lands in the next topic of this name, as
        # in Apache Kafka: nothing can be said where requests are sent again.
        if done.offset > 0 and self.world.plan.faults_are_within({"jump clock", "fill disk", "kill broker"}):
            self.history.fail("old topic came back", f"the first record of a new topic has offset {done.offset}")

    async def _delete_records(self, admin: Admin) -> None:
        partition = TARGETS[0]
        ends = await admin.list_offsets([partition], "high_watermark")
        target = min(ends[partition], self.rng.randint(0, 4))
        self.history.deleted_below[partition] = max(self.history.deleted_below.get(partition, 0), target)
        await admin.delete_records({partition: target})


# --- Reading ---


async def read_on(
    world: World, client: KafkaClient, partition: TopicPartition, offset: int, *, committed: bool, wait_ms: int = 0
) -> tuple[list[Seen], int, tuple[int, int, int]]:
    """One Fetch: (records from `offset` on, where to go on, (log start, last stable offset, high watermark))."""
    node_id = await client.leader(*partition)
    answer = await client.call(
        FETCH,
        node_id,
        12,
        replica_id=-1,
        max_wait=wait_ms,
        min_bytes=1,
        max_bytes=1 << 20,
        isolation_level=int(committed),
        topics=[
            {
                "topic": partition.topic,
                "partitions": [
                    {"partition": partition.partition, "fetch_offset": offset, "partition_max_bytes": 1 << 20}
                ],
            }
        ],
        forgotten_topics_data=[],
    )
    item = answer.responses[0].partitions[0]
    if item.error_code == ErrorCode.OFFSET_OUT_OF_RANGE:
        starts = await Admin(client).list_offsets([partition], "earliest")
        if offset >= starts[partition]:
            world.history.fail("log end moved back", f"{partition} has no offset {offset} any more: {item}")
        return [], starts[partition], (starts[partition], -1, -1)
    if item.error_code:
        client.invalidate(topic=partition.topic)
        raise Retriable(f"fetching {partition}: error {item.error_code}")
    bounds = (item.log_start_offset, item.last_stable_offset, item.high_watermark)
    limit = item.last_stable_offset if committed else item.high_watermark
    records, everything, position = _decode(bytes(item.records or b""), partition, offset, item.aborted_transactions)
    history = world.history
    if item.last_stable_offset > item.high_watermark or position > limit > offset:
        history.fail("beyond the limit", f"{partition}: read to {position}, bounds {bounds}, committed={committed}")
    history.served(partition, everything)
    if committed and position > offset:
        history.committed_reads[partition].append((offset, position, records))
    return records if committed else everything, position, bounds


def _decode(data: bytes, partition: TopicPartition, offset: int, aborted: Any) -> tuple[list[Seen], list[Seen], int]:
    """(committed records, all records, next offset): what a read_committed client does with the list of aborted."""
    starts = sorted(((item.first_offset, item.producer_id) for item in aborted or ()), reverse=True)
    skipped: set[int] = set()
    committed, everything = [], []
    position = offset
    for at, header in iter_batches(data):
        position = header.next_offset
        while starts and starts[-1][0] <= header.last_offset:
            skipped.add(starts.pop()[1])
        if header.is_control:
            commits, _ = read_control(data, at, header)
            if not commits:
                skipped.discard(header.producer_id)
            continue
        for record in decode_records(data, at, header, *partition):
            if record.offset < offset:
                continue
            seen = Seen(
                record.offset,
                (record.value or b"").decode(),
                header.producer_id,
                header.producer_epoch,
                header.is_transactional,
            )
            everything.append(seen)
            if not (header.is_transactional and header.producer_id in skipped):
                committed.append(seen)
    return committed, everything, position


async def read_whole(
    world: World, client: KafkaClient, partition: TopicPartition, *, committed: bool
) -> tuple[list[Seen], int]:
    """Every record of a partition and its log start; the last stable offset must have reached the end."""
    found: list[Seen] = []
    position = start = 0
    while True:
        records, after, (low, stable, end) = await read_on(world, client, partition, position, committed=committed)
        found += records
        start = max(start, low)
        if after == position:
            if end >= 0 and (stable != end or after < end):
                raise Retriable(f"{partition}: read to {after}, last stable offset {stable}, high watermark {end}")
            if end >= 0:
                return [record for record in found if record.offset >= start], start
        position = after


def is_expected(error: BaseException, *, newest: bool) -> bool:
    """Whether a life may end with this error."""
    if isinstance(error, Fenced):
        return True  # By a twin, or by a transaction that timed out; the next life goes on.
    return isinstance(error, SemelError) and not isinstance(error, Fatal) and not newest

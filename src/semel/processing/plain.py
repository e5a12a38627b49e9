"""Delivery without a transaction: outputs and position are written in two steps, and the order says what a crash costs.

`at-least-once` writes the outputs first: a crash between the steps does them again. `at-most-once` writes the position
first: a crash between the steps loses them. In both, only the group's generation keeps a process out that lost its
partitions, and only when it writes the position.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Mapping
from typing import Protocol

from semel.errors import AbortTransaction, Fatal, Fenced, OutcomeUnknown, SemelError
from semel.failpoints import failpoint
from semel.processing.component import Delivery
from semel.types import GroupMetadata, TopicPartition
from semel.wire.records import BatchBuilder

__all__ = ["BatchWriter", "OffsetWriter", "PlainProducer"]

log = logging.getLogger("semel.engine")


class BatchWriter(Protocol):
    """The idempotent producer, as far as it is needed here."""

    async def start(self) -> None: ...
    async def send_batch(self, topic: str, partition: int, batch: BatchBuilder) -> int: ...
    async def close(self) -> None: ...


class OffsetWriter(Protocol):
    """Writes positions of a group as one of its members."""

    async def commit_offsets(self, group: GroupMetadata, offsets: Mapping[TopicPartition, int]) -> None: ...


class PlainProducer:
    """`seams.ProducerSeam` for a component that does not need exactly-once. Nothing is sent before `end_transaction`.

    That one raises `AbortTransaction` when neither step was done, and `OutcomeUnknown` when one of them may have been.
    """

    def __init__(self, name: str, writer: BatchWriter, offsets: OffsetWriter, delivery: Delivery) -> None:
        self._name = name
        self._writer = writer
        self._offset_writer = offsets
        self._delivery = delivery
        self._is_started = False
        self._batches: list[tuple[TopicPartition, BatchBuilder]] = []
        self._offsets: Mapping[TopicPartition, int] = {}
        self._group: GroupMetadata | None = None

    def __repr__(self) -> str:
        return f"<PlainProducer {self._name} {self._delivery}, {len(self._batches)} batches in hand>"

    async def init_transactions(self) -> None:
        """Get a producer id. Fences nobody."""
        if not self._is_started:
            await self._writer.start()
            self._is_started = True

    @property
    def written(self) -> Mapping[TopicPartition, int]:
        """Nothing: without a fence others may write to the same changelog, so the next take-over reads it again."""
        return {}

    async def check_owner(self) -> None:
        """There is no owner to ask for."""

    def begin(self) -> None:
        """Start with another unit of work."""
        self._batches, self._offsets, self._group = [], {}, None

    async def produce(self, topic: str, partition: int, batches: BatchBuilder) -> None:
        """Take a batch; it is sent at the end."""
        if batches.count:
            self._batches.append((TopicPartition(topic, partition), batches))

    async def send_offsets(self, offsets: Mapping[TopicPartition, int], group: GroupMetadata) -> None:
        """Take the positions; they are written at the end."""
        self._offsets, self._group = offsets, group

    async def end_transaction(self, commit: bool) -> None:
        """Write what was taken, in the order of the delivery mode."""
        assert commit, "nothing was sent that could be taken back"
        if self._delivery == "at-most-once":
            await self._write_offsets()
            await self._certain(self._write_batches(), "their positions are written, so these outputs may be lost")
        else:
            await self._write_batches()
            await self._certain(self._write_offsets(), "its outputs are written and will be written again")

    async def abort(self) -> None:
        """What was not sent is dropped; what was sent stays."""
        self.begin()

    async def close(self) -> None:
        """Stop."""
        if self._is_started:
            await self._writer.close()

    async def _certain(self, step: Awaitable[None], meaning: str) -> None:
        """The second step: whatever it raises, the first one is done."""
        try:
            await step
        except (Fatal, Fenced):
            raise
        except SemelError as error:
            log.error("%s (%s): %s: %s", self._name, self._delivery, meaning, error)
            raise OutcomeUnknown(f"{error} {meaning}.") from error

    async def _write_offsets(self) -> None:
        assert self._group is not None
        failpoint("producer.before_offsets")
        await self._offset_writer.commit_offsets(self._group, self._offsets)
        failpoint("producer.after_offsets")

    async def _write_batches(self) -> None:
        sent = [self._writer.send_batch(at.topic, at.partition, batch) for at, batch in self._batches]
        results = await asyncio.gather(*sent, return_exceptions=True)
        errors = [result for result in results if isinstance(result, BaseException)]
        for error in errors:
            if not isinstance(error, SemelError):
                raise error
        if not errors:
            return
        for error in errors:
            if isinstance(error, Fatal):  # The broker refuses the data: the engine looks for the record.
                refused = AbortTransaction(str(error))
                refused.code = error.code
                raise refused from error
        raise OutcomeUnknown(f"{len(errors)} of {len(results)} batches were not acknowledged: {errors[0]}")

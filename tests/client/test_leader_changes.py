"""A partition that gets another leader, over real connections: reading goes on, or says that records are gone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from semel.client.consumer import Reader
from semel.errors import ErrorCode, Fatal
from semel.types import Record, TopicPartition
from tests.client.scripted_broker import ScriptedBroker
from tests.client.test_fetcher import Log

FETCH, OFFSET_FOR_LEADER_EPOCH = 1, 23
AT = TopicPartition("t", 0)


class Leader(ScriptedBroker):
    """A node with a copy of one partition: it serves it while it leads, and knows where its epochs end."""

    def __init__(self, log: Log, node_id: int, cluster: ScriptedBroker | None = None) -> None:
        super().__init__(node_id=node_id, cluster=cluster)
        self.log = log
        self.versions |= {FETCH: (4, 12), OFFSET_FOR_LEADER_EPOCH: (2, 4)}

    def _answer(self, api_key: int, version: int, body: Any, action: Any) -> dict[str, Any]:
        if api_key == FETCH:
            topics = [
                {"topic": topic.topic, "partitions": [*map(self._read, topic.partitions)]} for topic in body.topics
            ]
            return {"error_code": 0, "session_id": 0, "responses": topics}
        if api_key == OFFSET_FOR_LEADER_EPOCH:
            (topic,) = body.topics
            (asked,) = topic.partitions
            assert asked.current_leader_epoch == self.epochs[AT]
            ends = [after for _, after, batch in self.log.batches if batch[15] <= asked.leader_epoch]
            end = {"error_code": 0, "partition": 0, "leader_epoch": asked.leader_epoch, "end_offset": max(ends)}
            return {"topics": [{"topic": "t", "partitions": [end]}]}
        return super()._answer(api_key, version, body, action)

    def _read(self, asked: Any) -> dict[str, Any]:
        code, records = ErrorCode.NONE, None
        if self.leaders.get(AT, 1) != self.node_id:
            code = ErrorCode.NOT_LEADER_OR_FOLLOWER
        elif asked.current_leader_epoch != self.epochs.get(AT, 0):
            code = ErrorCode.FENCED_LEADER_EPOCH
        else:
            records = self.log.read(asked.fetch_offset, 1 << 20).records
        return {
            "partition_index": asked.partition,
            "error_code": int(code),
            "high_watermark": self.log.end,
            "last_stable_offset": self.log.end,
            "log_start_offset": 0,
            "aborted_transactions": (),
            "preferred_read_replica": -1,
            "records": records,
        }


def copy_of(log: Log, batches: int, epoch: int) -> Log:
    """The first batches of a log, and one of the new leader."""
    copy = Log()
    copy.batches = log.batches[:batches]
    copy.end = copy.batches[-1][1]
    copy.epoch = epoch
    copy.append(2)
    return copy


async def read_until(reader: Reader, count: int) -> list[Record]:
    found: list[Record] = []
    async with asyncio.timeout(30):
        while len(found) < count:
            found += (await reader.poll(100, 1.0)).records
    return found


def over_a_change(kept: int, rest: Any) -> None:
    """Read from one node, have the other one lead with `kept` of the three batches, and go on with `rest`."""

    async def main() -> None:
        log = Log()
        for _ in range(3):
            log.append(2)
        async with Leader(log, 1) as one, Leader(copy_of(log, kept, epoch=4), 2, one) as two:
            reader = Reader(one.address)
            await reader.start({AT: 0})
            try:
                assert len(await read_until(reader, 6)) == 6
                one.leaders[AT], one.epochs[AT] = 2, 4
                await rest(reader, two)
            finally:
                await reader.close()

    asyncio.run(main())


def test_reading_goes_on_at_a_new_leader_that_has_what_we_read() -> None:
    async def rest(reader: Reader, two: Leader) -> None:
        assert [record.offset for record in await read_until(reader, 2)] == [6, 7]
        (check,) = two.asked(OFFSET_FOR_LEADER_EPOCH)
        assert check.topics[0].partitions[0].leader_epoch == 0

    over_a_change(3, rest)


def test_a_new_leader_without_records_that_we_read_is_never_read_from() -> None:
    """Its offsets 4 and 5 are other records than those that were worked on."""

    async def rest(reader: Reader, two: Leader) -> None:
        with pytest.raises(Fatal, match="ends at offset 4"):
            await read_until(reader, 1)
        assert two.asked(FETCH) == []
        assert reader.positions == {AT: 6}

    over_a_change(2, rest)

"""A process that applies a fixed list of records and may die or stop anywhere: `python -m tests.sinks.child URL TOTAL`.

Failpoints come from SEMEL_FAILPOINT. Two partitions, records in batches of at most ten.
"""

from __future__ import annotations

import os
import sys
import uuid

from semel import Inbox, history
from semel.env import Env
from semel.failpoints import arm_failpoints
from semel.sinks.contract import Slice
from semel.sinks.sql import SqlSink
from semel.types import Record
from tests.sinks import ledger

NOW_MS = 1_700_000_000_000
PARTITIONS = 2
BATCH = 5


def all_records(part: int, total: int) -> list[Record]:
    """Every seventh record has no record behind its offset (a marker); every eleventh key is poison."""
    return [
        ledger.record(
            offset, f"k{offset % 7}" if offset % 11 else f"poison{offset % 3}", -1 if offset % 11 == 0 else 1, part
        )
        for offset in range(total)
        if offset % 7 != 3
    ]


def slices(positions: dict[int, int], total: int) -> list[Slice]:
    """The next batch of both partitions."""
    found = []
    for part, position in positions.items():
        if position < total:
            records = [record for record in all_records(part, total) if record.offset >= position][:BATCH]
            rest = len(records) < BATCH
            end = total if rest or records[-1].offset == total - 1 else records[-1].offset + 1
            found.append(Slice(ledger.partition(part), records, end))
    return found


def work(url: str, total: int) -> None:
    sink = ledger.sink(url, delivery=os.environ.get("DELIVERY", "exactly-once"))
    taken = sink.take_over([ledger.claim(part) for part in range(PARTITIONS)])
    print("taken", taken, flush=True)
    while batch := slices({part: sink.position(ledger.partition(part)) or 0 for part in range(PARTITIONS)}, total):
        sink.apply(batch)
    sink.close()


MESSAGES = 30


def copies(part: int) -> list[Record]:
    """Each message at three offsets, two of them in partition 0, in an order of its own in each."""
    numbers = [number // 2 if part == 0 else MESSAGES - 1 - number for number in range(MESSAGES * (2 - part))]
    return [
        ledger.record(offset, f"k{number}", 1, part)._replace(
            headers=(("semel-id", str(uuid.UUID(int=NOW_MS << 80 | 7 << 76 | 2 << 62 | number)).encode()),)
        )
        for offset, number in enumerate(numbers)
    ]


def work_copies(url: str) -> None:
    """Apply the copies of all messages, of which each is to have its effects once."""
    now_ms = int(os.environ.get("NOW_MS", NOW_MS))
    spec = ledger.spec(url, dedup=Inbox())
    sink = SqlSink(spec, "shop.totals", ledger.CLUSTER_ID, env=Env(wall_ms=lambda: now_ms), create_tables=True)
    sink.open()
    sink.take_over([ledger.claim(part) for part in range(PARTITIONS)])
    while True:
        batch = []
        for part in range(PARTITIONS):
            at = sink.position(ledger.partition(part)) or 0
            if records := copies(part)[at : at + BATCH]:
                batch.append(Slice(ledger.partition(part), records, records[-1].offset + 1))
        if not batch:
            break
        sink.apply(batch)
    sink.close()


def release(url: str) -> None:
    """Carry out what is asked for, with a handler that is mended."""
    sink = ledger.sink(url, ledger.count_all)
    sink.take_over([ledger.claim(part) for part in range(PARTITIONS)])
    sink.carry_out()
    sink.close()


if __name__ == "__main__":
    arm_failpoints(os.environ.get("SEMEL_FAILPOINT", ""))
    history.start(os.environ.get("SEMEL_HISTORY", ""), "worker", 0)
    if "IDLE_IN_TRANSACTION" in os.environ:
        from semel.databases import mariadb, postgres

        limit = os.environ["IDLE_IN_TRANSACTION"]
        postgres._SESSION["idle_in_transaction_session_timeout"] = limit
        mariadb._SESSION["idle_transaction_timeout"] = max(1, int(limit.removesuffix("ms")) // 1_000)
    if "RELEASE" in os.environ:
        release(sys.argv[1])
    elif os.environ.get("DEDUP") == "inbox":
        work_copies(sys.argv[1])
    else:
        work(sys.argv[1], int(sys.argv[2]))

"""A process that applies a fixed list of records and may die or stop anywhere: `python -m tests.sinks.child URL TOTAL`.

Failpoints come from SEMEL_FAILPOINT. Two partitions, records in batches of at most ten.
"""

from __future__ import annotations

import os
import sys

from semel import history
from semel.failpoints import arm_failpoints
from semel.sinks.contract import Slice
from semel.types import Record
from tests.sinks import ledger

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
    else:
        work(sys.argv[1], int(sys.argv[2]))

"""How fast is the checker, and how much memory does it take?

    python -m bench.check_speed --events 1000000 10000000

Makes up a valid run of that size (tests/prove/histories.py: HTTP requests to orders to inventory, a feed from outside,
two sinks, readers; retries, aborts, unknown ends, takeovers) as files, as a campaign leaves them: one line of JSON an
event, raw batches as they came from Fetch, ledger rows. Then a process of its own reads and checks them. An event is a
line of the history, a record or marker of a log, or a row of a ledger.

A run of more than a million events is made of copies of one: other attempts, topics and keys, the same offsets.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from crc32c import crc32c

from semel import history
from semel.prove.check import Evidence, Ingress, LedgerRow, Log, ParkedRow, Position, check
from semel.prove.check.evidence import file_chunks
from semel.wire.records import iter_batches

CELL = 1_000_000
RENAMED = ("app.semel.requests", "orders", "inventory", "feed", "enriched")
UNIT_RECORDS = 40
"""At most; a unit of work has 20 inputs on average, about what the demo has."""


def make(folder: Path, events: int) -> None:
    """Write a run of about so many events."""
    make_cell(folder, min(events, CELL))
    for number in range(1, min(10, round(events / CELL))):
        copy_cell(folder, str(number).encode())


def copy_cell(folder: Path, digit: bytes) -> None:
    """The run once more beside itself, under other names of the same length."""

    def renamed(data: bytes, before: bytes, after: bytes) -> bytes:
        data = data.replace(b"-0-4711-", b"-%b-4711-" % digit)
        for topic in RENAMED:
            name = topic.encode()
            data = data.replace(before + name + after, before + name[:-1] + digit + after)
        return data

    for path in sorted(folder.glob("*.batches")):
        topic, _, partition = path.stem.rpartition("-")
        if topic[-1].isdigit():
            continue
        data = bytearray(renamed(path.read_bytes(), b"|", b"|"))
        for at, header in iter_batches(data):
            data[at + 17 : at + 21] = crc32c(data[at + 21 : at + header.size]).to_bytes(4, "big")
        (folder / f"{topic[:-1]}{digit.decode()}-{partition}.batches").write_bytes(data)
    lines = renamed((folder / "history" / "all-0-1.jsonl").read_bytes(), b'"', b'"')
    lines = lines.replace(b'"key":"key-', b'"key":"ke%b-' % digit)
    (folder / "history" / f"all-{digit.decode()}-1.jsonl").write_bytes(lines)
    rows = renamed((folder / "ledger.jsonl").read_bytes(), b'"', b'"')
    (folder / f"ledger-{digit.decode()}.jsonl").write_bytes(rows)
    left = json.loads((folder / "left.json").read_bytes())
    more = json.loads(renamed(json.dumps(left["first"]).encode(), b'"', b'"'))
    for log in more["logs"]:
        log[0] = log[0][:-1] + digit.decode()
    for name, items in more.items():
        left[name] += items
    (folder / "left.json").write_bytes(msgspec.json.encode(left))


def make_cell(folder: Path, events: int) -> None:
    from tests.prove.histories import World

    encode = msgspec.json.Encoder().encode
    (folder / "history").mkdir(parents=True)
    with (folder / "history" / "all-0-1.jsonl").open("wb") as lines, (folder / "ledger.jsonl").open("wb") as rows:
        world = World(
            f"bench:{events}",
            unit_records=UNIT_RECORDS,
            folder=folder,
            note=lambda event: lines.write(encode(event) + b"\n"),
            ledger=lambda row: rows.write(encode(row) + b"\n"),
        )
        world.run_until(events)
        evidence = world.evidence()
    left = {
        "logs": [(log.topic, log.partition, log.start, log.stable, log.end) for log in evidence.logs],
        "positions": evidence.positions,
        "parked": evidence.parked,
    }
    (folder / "left.json").write_bytes(encode({**left, "first": left}))


def read_rows(folder: Path) -> Iterator[LedgerRow]:
    decode = msgspec.json.Decoder(LedgerRow).decode
    for path in sorted(folder.glob("ledger*.jsonl")):
        with path.open("rb") as file:
            yield from map(decode, file)


def judge(folder: Path) -> dict[str, Any]:
    """Check the run; events a second, and the most memory that this process had."""
    from tests.prove.histories import OUTCOMES, REQUESTS, RESPONSES, scope

    left = msgspec.json.decode((folder / "left.json").read_bytes())
    logs = [
        Log(topic, partition, start, stable, end, partial(file_chunks, folder / f"{topic}-{partition}.batches"))
        for topic, partition, start, stable, end in left["logs"]
    ]
    evidence = Evidence(
        events=partial(history.read_history, folder / "history"),
        logs=logs,
        positions=[Position(*item) for item in left["positions"]],
        ledger=partial(read_rows, folder),
        parked=[ParkedRow(*item) for item in left["parked"]],
        ingress=Ingress(REQUESTS, RESPONSES, OUTCOMES, lambda route, key: scope(route, f"key-{key.partition('-')[2]}")),
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    findings = check(evidence)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert findings.clean, findings.summary()
    events = sum(findings.checked[name] for name in ("history lines", "records", "ledger rows"))
    return {
        "events": events,
        "seconds": round(wall, 2),
        "cpu_seconds": round(cpu, 2),
        "events_per_second": round(events / wall),
        "events_per_cpu_second": round(events / cpu),
        "rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "rss_mib_before": round(before / 1024),
        "checked": dict(findings.checked),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--folder", type=Path, help="keep the runs here, and use those that are there")
    parser.add_argument("--step", choices=["make", "judge"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step is not None:
        (make(args.folder, args.events[0]) if args.step == "make" else print(json.dumps(judge(args.folder))))
        return
    with tempfile.TemporaryDirectory(prefix="semel-check-") as temporary:
        for events in args.events:
            folder = (args.folder or Path(temporary)) / str(events)
            step = [
                sys.executable,
                "-m",
                "bench.check_speed",
                "--events",
                str(events),
                "--folder",
                str(folder),
                "--step",
            ]
            if not (folder / "left.json").exists():
                subprocess.run([*step, "make"], check=True)
            subprocess.run([*step, "judge"], check=True)


if __name__ == "__main__":
    main()

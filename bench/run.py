"""Our broker beside Apache Kafka 4.3.1, in one run on one machine: `make bench`, or `python bench/run.py --help`.

Rates depend on the machine, and clients, broker and everything else share its cores; the ratios are what to compare.
Both brokers run all the time; in each round every workload runs on one broker and right after it on the other, and the
order changes from round to round. The table has the median over the rounds. CPU is the broker's user and system time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.services.kafka import missing_tools

from bench import clients, copying, latency, raw
from bench.servers import Kafka, Semel, Server, cpu_seconds, create_topic, drop_topic, memory_mb

Figures = dict[str, float]


class Options(NamedTuple):
    """How much is done in a round: records of a throughput run, seconds of a latency run."""

    records: int
    seconds: float
    copied: int
    loops: tuple[str, ...]

    def half(self) -> Options:
        """Half as much of everything."""
        return self._replace(records=self.records // 2, seconds=self.seconds / 2, copied=self.copied // 2)


SIZES = (200, 1000)
"""Bytes of a record's value in a read-process-write run."""


class Row(NamedTuple):
    """One line of the table. `goal` is what the ratio must reach; `more_is_better` says which way it is taken."""

    what: str
    unit: str
    more_is_better: bool = True
    goal: float | None = None


ROWS = {
    "produce": Row("produce 1 KB, librdkafka", "rec/s", goal=1.0),
    "produce_cpu": Row("  broker CPU", "us/rec", False),
    "consume": Row("consume 1 KB, librdkafka", "rec/s", goal=1.0),
    "consume_cpu": Row("  broker CPU", "us/rec", False),
    "raw_produce": Row("produce 1 KB, raw socket", "rec/s", goal=1.0),
    "raw_produce_cpu": Row("  broker CPU", "us/rec", False),
    "raw_consume": Row("consume 1 KB, raw socket", "rec/s", goal=1.0),
    "raw_consume_cpu": Row("  broker CPU", "us/rec", False),
    "small": Row("produce 200 B, raw socket, five in flight", "req/s"),
    "small_cpu": Row("  broker CPU, one by one and five in flight", "us/req", False),
    "small_p50": Row("  one by one, p50", "ms", False),
    "small_p99": Row("  one by one, p99", "ms", False),
    "own_txn": Row("transactions of one record, our producer (V2)", "tx/s", goal=2.0),
    "own_txn_cpu": Row("  broker CPU", "us/tx", False),
    "own_txn_offsets": Row("  the same with offsets", "tx/s", goal=2.0),
    "rd_txn": Row("transactions of one record, librdkafka (V1)", "tx/s", goal=2.0),
    "rd_txn_cpu": Row("  broker CPU", "us/tx", False),
    "rd_txn_offsets": Row("  the same with offsets", "tx/s", goal=2.0),
    "rd_txn_offsets_1": Row("  the same with offsets, retry.backoff.ms 1", "tx/s", goal=2.0),
    "own_txn_offsets_turns": Row("  with offsets, two transactional ids in turn, as workers do", "tx/s"),
    **{
        f"{loop}_{size}{suffix}": Row(f"{text} {loop}, {size} B" if text else what, unit, not suffix)
        for size in SIZES
        for loop in copying.LOOPS
        for suffix, text, what, unit in (
            ("", "read-process-write:", "", "rec/s"),
            ("_cpu", "", "  its CPU", "us/rec"),
            ("_mb", "", "  its memory", "MB"),
            ("_broker", "", "  broker CPU", "us/rec"),
        )
    },
    **{
        f"growth_{partitions}_{workers}{suffix}": Row(text, unit, not suffix or suffix == "_tx")
        for partitions in (4, 40, 400)
        for workers in (1, 2)
        for suffix, text, unit in (
            ("", f"read-process-write: {partitions} partitions, {workers} of our workers", "rec/s"),
            ("_tx", "  commits", "tx/s"),
            ("_cpu", "  CPU of the workers", "us/rec"),
            ("_mb", "  memory of the larger worker", "MB"),
        )
    },
    "late_p50": Row("our engine at 1,000 records/s, interval 10 ms, produce to visible: p50", "ms", False),
    "late_p99": Row("  p99", "ms", False),
    **{f"late_{rate}": Row(f'  latency="50ms" at {rate:,} records/s: p99', "ms", False) for rate in (100, 1000, 20000)},
    "wide_full": Row("fetch over 1,000 partitions, one moved: without session, p50", "ms", False),
    "wide_incremental": Row("  with a session (KIP-227), p50", "ms", False),
    "beside_0_p50": Row("small produce every 0.5 ms, alone, p50", "ms", False),
    "beside_0_p99": Row("  p99", "ms", False),
    "beside_1_p50": Row("small produce beside 1 flat-out producer, p50", "ms", False),
    "beside_1_p99": Row("  p99", "ms", False),
    "beside_1_max": Row("  max", "ms", False),
    "beside_1_mb": Row("  rate of the other", "MB/s"),
    "beside_4_p50": Row("small produce beside 4 flat-out producers, p50", "ms", False),
    "beside_4_p99": Row("  p99", "ms", False),
    "beside_4_max": Row("  max", "ms", False),
    "beside_4_mb": Row("  rate of the others", "MB/s"),
}


class Ratio(NamedTuple):
    """What must hold between two rows on one and the same broker; `over` None: the figure itself."""

    what: str
    row: str
    over: str | None
    goal: dict[str, float]
    """By broker; the least that will do."""


def _everywhere(goal: float) -> dict[str, float]:
    return {"semel": goal, "kafka": goal}


RATIOS = [
    *(
        Ratio(f"our {what} over {peer}, {size} B", f"{ours}_{size}", f"{peer}_{size}", _everywhere(goal))
        for size in SIZES
        for what, ours, peer, goal in (
            ("engine", "semel", "confluent", 1.2 if size == SIZES[0] else 1.1),
            ("engine with the codec in Python", "semel_python", "confluent", 0.6),
            ("engine", "semel", "quixstreams", 5.0),
            ("engine", "semel", "aiokafka", 4.0),
            ("engine", "semel", "streams", 3.0),
            ("exactly-once over our at-least-once:", "semel", "semel_alo", 0.97),
        )
    ),
    Ratio(
        "transactions of one record with offsets a second", "own_txn_offsets_turns", None, {"semel": 1500, "kafka": 250}
    ),
]


def _timed(server: Server, name: str, units: Callable[[float], float], work: Callable[[], float]) -> Figures:
    """Run `work`, which gives a rate; `units` of that rate are how many things were done."""
    cpu = cpu_seconds(server.pid)
    rate = work()
    spent = cpu_seconds(server.pid) - cpu
    return {name: rate, f"{name}_cpu": spent / units(rate) * 1e6}


def bulk(server: Server, options: Options) -> Figures:
    """1 KB records through librdkafka and through raw sockets: in, then out again."""
    figures: Figures = {}
    at, count = server.bootstrap, options.records
    for prefix, produce, consume in (
        ("", clients.rdkafka_produce, clients.rdkafka_consume),
        ("raw_", raw.produce, raw.consume),
    ):
        topic = create_topic(at, f"bulk-{time.time_ns()}")
        figures |= _timed(server, f"{prefix}produce", lambda _: count, partial(produce, at, topic, count))
        figures |= _timed(server, f"{prefix}consume", lambda _: count, partial(consume, at, topic, count))
        drop_topic(at, topic)
    return figures


def small(server: Server, options: Options) -> Figures:
    """Single small records."""
    topic = create_topic(server.bootstrap, f"small-{time.time_ns()}")
    cpu = cpu_seconds(server.pid)
    found = raw.small_produce(server.bootstrap, topic, options.seconds)
    spent = cpu_seconds(server.pid) - cpu
    drop_topic(server.bootstrap, topic)
    return {
        "small": found["requests_per_second"],
        "small_cpu": spent / found["requests"] * 1e6,
        "small_p50": found["p50_ms"],
        "small_p99": found["p99_ms"],
    }


def transactions(server: Server, options: Options) -> Figures:
    """Transactions of one record, one after the other."""
    figures: Figures = {}
    at, seconds = server.bootstrap, options.seconds

    def own(topic: str, offsets: bool, in_turn: bool = False) -> float:
        return asyncio.run(clients.own_transactions(at, topic, seconds, offsets=offsets, in_turn=in_turn))

    def rdkafka(topic: str, offsets: bool, backoff_ms: int | None = None) -> float:
        return clients.rdkafka_transactions(at, topic, seconds, offsets=offsets, backoff_ms=backoff_ms)

    for name, work in (
        ("own_txn", lambda topic: own(topic, False)),
        ("own_txn_offsets", lambda topic: own(topic, True)),
        ("own_txn_offsets_turns", lambda topic: own(topic, True, True)),
        ("rd_txn", lambda topic: rdkafka(topic, False)),
        ("rd_txn_offsets", lambda topic: rdkafka(topic, True)),
        ("rd_txn_offsets_1", lambda topic: rdkafka(topic, True, 1)),
    ):
        topic = create_topic(at, f"txn-{time.time_ns()}")
        figures |= _timed(server, name, lambda rate: rate * seconds, partial(work, topic))
        drop_topic(at, topic)
    return figures


def loops(server: Server, options: Options) -> Figures:
    """Everybody's exactly-once loop on the same topics, at 200 B and at 1 KB."""
    figures: Figures = {}
    for size in SIZES:
        source = copying.filled(server.bootstrap, size, options.copied)
        for loop in options.loops:
            slow = loop in ("aiokafka", "quixstreams", "streams")
            cpu = cpu_seconds(server.pid)
            found = copying.measure(loop, source, share=3 if slow else 1)
            spent = cpu_seconds(server.pid) - cpu
            name = f"{loop}_{size}"
            figures |= {name: found.rate, f"{name}_cpu": found.cpu_us, f"{name}_mb": found.memory_mb}
            figures[f"{name}_broker"] = spent / (options.copied // (3 if slow else 1)) * 1e6
        drop_topic(server.bootstrap, source.topic)
    return figures


def growth(server: Server, options: Options) -> Figures:
    """Our engine over more and more partitions, with one worker and with two."""
    figures: Figures = {}
    for partitions in (4, 40, 400):
        source = copying.filled(server.bootstrap, SIZES[0], options.copied, partitions)
        for workers in (1, 2):
            found = copying.measure("semel", source, workers=workers)
            name = f"growth_{partitions}_{workers}"
            figures |= {name: found.rate, f"{name}_tx": found.commits}
            figures |= {f"{name}_cpu": found.cpu_us, f"{name}_mb": found.memory_mb}
        drop_topic(server.bootstrap, source.topic)
    return figures


def late(server: Server, options: Options) -> Figures:
    """Our engine at a steady rate, from produce() to the committed output in a reader's hands."""
    found = latency.measure(server.bootstrap, 1_000, options.seconds, interval_ms=10)
    figures = {"late_p50": found["p50_ms"], "late_p99": found["p99_ms"]}
    for rate in (100, 1000, 20000):
        figures[f"late_{rate}"] = latency.measure(server.bootstrap, rate, options.seconds, objective="50ms")["p99_ms"]
    return figures


def fairness(server: Server, options: Options) -> Figures:
    """What one client feels of the others."""
    figures: Figures = {}
    for others in (0, 1, 4):
        topic = create_topic(server.bootstrap, f"fair-{time.time_ns()}")
        found = raw.fairness(server.bootstrap, topic, others, options.seconds)
        drop_topic(server.bootstrap, topic)
        for name, value in (("p50", "p50_ms"), ("p99", "p99_ms"), ("max", "max_ms"), ("mb", "mb_per_second")):
            if f"beside_{others}_{name}" in ROWS:
                figures[f"beside_{others}_{name}"] = found[value]
    return figures


def wide(server: Server, options: Options) -> Figures:
    """Fetches over 1,000 partitions of which one moves."""
    topic = create_topic(server.bootstrap, f"wide-{time.time_ns()}", 1000)
    found = raw.wide_fetch(server.bootstrap, topic, 1000, int(100 * options.seconds))
    drop_topic(server.bootstrap, topic)
    return {"wide_full": found["full_ms"], "wide_incremental": found["incremental_ms"]}


PARTS: dict[str, Callable[[Server, Options], Figures]] = {
    "bulk": bulk,
    "small": small,
    "transactions": transactions,
    "loops": loops,
    "growth": growth,
    "late": late,
    "fairness": fairness,
    "wide": wide,
}


def side_by_side(servers: list[Server], parts: list[str], rounds: int, options: Options) -> dict[str, dict[str, float]]:
    """Medians by row and broker. A round beforehand, half as long, warms both up and is not counted."""
    seen: dict[str, dict[str, list[float]]] = {}
    for number in range(rounds + 1):
        for part in parts:
            for server in servers if number % 2 else servers[::-1]:
                _tell(f"round {number} of {rounds}: {part} on {server.name}")
                share = options if number else options.half()
                for name, value in PARTS[part](server, share).items():
                    if number:
                        seen.setdefault(name, {}).setdefault(server.name, []).append(value)
    return {
        name: {server: statistics.median(values) for server, values in found.items()} for name, found in seen.items()
    }


def starts(count: int) -> Figures:
    """Our start to the first answer and the memory after it; medians of several starts with an empty folder."""
    seconds, memory = [], []
    Semel().stop()  # The first start after a change of the code compiles it.
    for _ in range(count):
        server = Semel()
        seconds.append(server.start_seconds)
        time.sleep(0.5)
        memory.append(memory_mb(server.pid))
        server.stop()
    return {"start_seconds": statistics.median(seconds), "idle_mb": statistics.median(memory)}


def idle_connections(count: int) -> Figures:
    """Memory of a broker of ours with so many connections that say nothing."""
    server = Semel()
    seconds = raw.idle_connections(server.bootstrap, count)
    figures = {"connections": count, "connect_seconds": seconds, "memory_mb": memory_mb(server.pid)}
    raw.let_go()
    server.stop()
    return figures


def group_commit(seconds: float) -> Figures:
    """Acknowledgements per second with `--fsync always`, by number of producers that wait for each."""
    figures: Figures = {}
    server = Semel("--fsync", "always")
    for producers in (1, 8, 64):
        topic = create_topic(server.bootstrap, f"sync-{producers}")
        figures[f"producers_{producers}"] = raw.synced_produce(server.bootstrap, topic, producers, seconds)
    server.stop()
    return figures


def _tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _print(medians: dict[str, dict[str, float]]) -> None:
    print("| what | unit | Semel | Apache Kafka 4.3.1 | ratio | goal |\n|---|---|---|---|---|---|")
    for name, row in ROWS.items():
        found = medians.get(name)
        if found is None:
            continue
        ours, theirs = found["semel"], found.get("kafka")
        cells = [row.what, row.unit, _number(ours), "", "", "" if row.goal is None else f">= {row.goal}"]
        if theirs is not None:
            found["ratio"] = (ours / theirs if row.more_is_better else theirs / ours) if ours and theirs else 0.0
            cells[3:5] = [_number(theirs), f"{found['ratio']:.2f}"]
        print(f"| {' | '.join(cells)} |")


def _print_ratios(medians: dict[str, dict[str, float]]) -> None:
    found = []
    for ratio in RATIOS:
        for server, goal in ratio.goal.items():
            figure, base = (medians.get(name or "", {}).get(server) for name in (ratio.row, ratio.over))
            if figure and (base or ratio.over is None):
                value = figure / base if base else figure
                found.append(f"| {ratio.what} | {server} | {_number(value)} | >= {goal:g} |")
                if base:
                    spent, theirs = (medians[f"{name}_cpu"][server] for name in (ratio.row, ratio.over))
                    found.append(f"|   by CPU a record | {server} | {_number(theirs / spent)} | |")
    if found:
        print("\n| what | broker | found | goal |\n|---|---|---|---|", *found, sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--records", type=int, default=500_000, help="1 KB records of a throughput run")
    parser.add_argument("--copied", type=int, default=150_000, help="records of a read-process-write run")
    parser.add_argument("--loops", default=",".join(copying.LOOPS), help="whose read-process-write loops to run")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a latency or transaction run")
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--parts", default=",".join([*PARTS, "start", "idle", "fsync"]), help="which workloads to run")
    parser.add_argument("--without-kafka", action="store_true", help="ours alone, without ratios")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    chosen = options.parts.split(",")
    result: dict[str, object] = {"cores": os.cpu_count(), "rounds": options.rounds}
    parts = [part for part in PARTS if part in chosen]
    if parts:
        result["side_by_side"] = medians = _compare(options, parts, result)
        _print(medians)
        _print_ratios(medians)
    for name, work in (
        ("start", lambda: starts(5)),
        ("idle", lambda: idle_connections(options.connections)),
        ("fsync", lambda: group_commit(options.seconds)),
    ):
        if name in chosen:
            _tell(name)
            result[name] = figures = work()
            print(f"\n{name}: " + ", ".join(f"{key} {_number(value)}" for key, value in figures.items()))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def _compare(options: argparse.Namespace, parts: list[str], result: dict[str, object]) -> dict[str, dict[str, float]]:
    servers: list[Server] = [Semel()]
    try:
        if options.without_kafka:
            pass
        elif missing_tools():
            _tell(f"Apache Kafka is not measured: {' and '.join(missing_tools())} not found")
        else:
            servers.append(Kafka())
        amount = Options(options.records, options.seconds, options.copied, tuple(options.loops.split(",")))
        medians = side_by_side(servers, parts, options.rounds, amount)
        for server in servers:
            result[f"{server.name}_peak_mb"] = peak = memory_mb(server.pid, "VmHWM")
            print(f"{server.name}: peak of resident memory {peak:.0f} MB")
    finally:
        for server in servers:
            server.stop()
    return medians


if __name__ == "__main__":
    main()

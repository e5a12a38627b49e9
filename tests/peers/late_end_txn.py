"""Does a late request tear the next transaction? One run: two transactions and one request that arrives too late.

    python -m tests.peers.late_end_txn --bootstrap 127.0.0.1:9092 --client semel --case commit-abort --runs 100

A proxy withholds one request of transaction 1. The client times out and repeats it over another connection, which
works; transaction 2 begins, and in its middle the withheld copy arrives. At the end the topic is read with
read_committed and compared with what the client told its caller. `--bootstrap embedded:2` (or `:1`) starts Semel's own
broker. Exit code 1 when an anomaly was found.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.prove.faults.kafka_proxy import KafkaProxy
from semel.prove.faults.rules import Hold, Rule
from semel.types import TopicPartition
from semel.wire.messages import RequestHeader, decode_request, decode_response
from tests.peers.clients import CLIENTS, PeerClient
from tests.reading import each

PRODUCE, END_TXN, TXN_OFFSET_COMMIT = 0, 26, 28
CASES = {
    "commit-abort": "a late commit of transaction 1 arrives in transaction 2, which is aborted",
    "abort-commit": "a late abort of transaction 1 arrives in transaction 2, which is committed",
    "produce": "a late batch of transaction 1 arrives in transaction 2, which is committed",
    "offsets": "late offsets of transaction 1 arrive in transaction 2, which is committed",
}
STEP_SECONDS = 15.0
HANGING_SECONDS = 40.0
"""The transaction time-out of 10 s, Kafka's sweep every 10 s, and as much again."""


@dataclass
class Told:
    """One transaction: its values, its offset, and what the client said of it."""

    values: list[str]
    offset: int | None = None
    outcome: str = "unknown"


@dataclass
class Findings:
    """What all runs of a case gave."""

    anomalies: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    late_answers: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def anomaly(self, kind: str, example: str) -> None:
        self.anomalies[kind] += 1
        if len(self.examples) < 5:
            self.examples.append(f"{kind}: {example}")


def _is_late(case: str) -> Any:
    """What to withhold: the first such request of transaction 1."""
    if case == "produce":
        return lambda header, frame: header.api_key == PRODUCE
    if case == "offsets":
        return lambda header, frame: header.api_key == TXN_OFFSET_COMMIT

    def matches(header: RequestHeader, frame: bytes) -> bool:
        return header.api_key == END_TXN and decode_request(header, frame).committed == (case == "commit-abort")

    return matches


class Lane:
    """One worker: its proxy, its client, its two partitions and its group; runs one after the other.

    The second value of a transaction goes to the second partition: after a late EndTxn a V1 client opens another
    transaction with it and notices nothing.
    """

    def __init__(self, number: int, settings: argparse.Namespace, topic: str, bootstrap: str) -> None:
        self.partitions = [TopicPartition(topic, 2 * number), TopicPartition(topic, 2 * number + 1)]
        self._input = TopicPartition("input", number)
        self._args = settings
        self._bootstrap = bootstrap
        self._name = f"late-{topic}-{number}"
        self._offset = 0
        self._proxy = KafkaProxy(bootstrap)
        self._client: PeerClient | None = None
        self.told: list[tuple[Told, Told]] = []
        self.findings = Findings()

    async def run_all(self, runs: Iterator[int], admin: Admin) -> None:
        await self._proxy.start()
        try:
            for run in runs:
                await self._one(run, admin)
        finally:
            await self._drop_client()
            await self._proxy.close()

    async def _ready_client(self) -> PeerClient:
        if self._client is None:
            make = CLIENTS[self._args.client]
            self._client = make(self._proxy.bootstrap, self._name, self._args.timeout_ms)
            await asyncio.wait_for(self._client.start(), 60)
        return self._client

    async def _drop_client(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(client.close(), STEP_SECONDS)

    async def _one(self, run: int, admin: Admin) -> None:
        case = self._args.case
        client = await self._ready_client()
        first = Told([f"{run}.a1"])
        second = Told([f"{run}.b1", f"{run}.b2"])
        if case == "offsets":
            first.offset, second.offset = self._offset + 1, self._offset + 2
            self._offset += 2
        before = self._offset - 2
        withheld = self._proxy.add(Rule(Hold(), when=_is_late(case)))
        try:
            await self._transaction(client, first, commit=case != "abort-commit")
            await self._transaction(client, second, commit=case != "commit-abort", late=withheld)
        except Exception as error:
            self.findings.outcomes[f"raised {type(error).__name__}"] += 1
            self.findings.examples[3:] = [f"raised: {error}"]
            await self._drop_client()
        if not withheld.struck.is_set():
            self.findings.anomaly("not withheld", f"run {run}: the request never came")
        self._proxy.remove(withheld)
        self.told.append((first, second))
        self.findings.outcomes[f"{first.outcome}, {second.outcome}"] += 1
        if case == "offsets":
            await self._check_offset(admin, run, before, first, second)

    async def _transaction(self, client: PeerClient, told: Told, *, commit: bool, late: Rule | None = None) -> None:
        """One transaction; `late` arrives between its records."""
        async with asyncio.timeout(STEP_SECONDS):
            await client.begin()
            await client.produce(self.partitions[0], told.values[0])
            if told.offset is not None:
                await client.send_offsets(self._input, told.offset, self._name)
            if late is not None:
                late.release()
                await late.answered.wait()
                self.findings.late_answers[_code(late)] += 1
                await client.produce(self.partitions[1], told.values[1])
            if commit:
                await client.commit()
                told.outcome = "committed"
            else:
                await client.abort()
                told.outcome = "aborted"

    async def _check_offset(self, admin: Admin, run: int, before: int, first: Told, second: Told) -> None:
        found = (await admin.committed_offsets(self._name, [self._input])).get(self._input, 0)
        if second.outcome == "committed":
            allowed = {second.offset}
        elif first.outcome == "committed":
            allowed = {first.offset, second.offset}
        else:
            allowed = {before, first.offset, second.offset}
        if found not in allowed:
            self.findings.anomaly("offset of another transaction", f"run {run}: {found}, allowed {allowed}")


def _code(late: Rule) -> str:
    """The error code in the broker's answer to the late copy."""
    if late.answer is None or late.header is None:
        return "connection closed"
    answer = decode_response(late.header.api_key, late.header.api_version, late.answer)
    if hasattr(answer, "error_code"):
        return str(answer.error_code.name)
    topics = answer.responses if hasattr(answer, "responses") else answer.topics
    items = topics[0].partition_responses if hasattr(topics[0], "partition_responses") else topics[0].partitions
    return str(items[0].error_code.name)


async def run_case(args: argparse.Namespace, bootstrap: str) -> dict[str, Any]:
    """All runs of one case with one client; the result as a row."""
    started = time.monotonic()
    topic = f"late-{args.case}-{uuid.uuid4().hex[:6]}"
    findings = Findings()
    async with KafkaClient(bootstrap) as client:
        admin = Admin(client)
        lanes = min(args.parallel, args.runs)
        topics = {topic: TopicSpec(2 * lanes)}
        if args.case == "offsets":
            topics["input"] = TopicSpec(64)
        await admin.create_topics(topics)
        runs = iter(range(args.runs))
        workers = [Lane(number, args, topic, bootstrap) for number in range(lanes)]
        await asyncio.gather(*(worker.run_all(runs, admin) for worker in workers))
        partitions = [partition for worker in workers for partition in worker.partitions]
        for partition in await hanging(admin, partitions):
            findings.anomaly("hanging transaction", f"{partition} holds a transaction that nobody ends")
        visible = await read_committed(admin, bootstrap, partitions)
        version = client.transaction_version
    for worker in workers:
        for name in ("anomalies", "outcomes", "late_answers"):
            getattr(findings, name).update(getattr(worker.findings, name))
        findings.examples += worker.findings.examples
        judge(worker.told, [value for partition in worker.partitions for value in visible[partition]], findings)
    return {
        "client": args.client,
        "case": args.case,
        "bootstrap": args.bootstrap,
        "transaction_version": version,
        "runs": args.runs,
        "anomalies": sum(findings.anomalies.values()),
        "kinds": dict(findings.anomalies),
        "outcomes": dict(findings.outcomes),
        "late_answers": dict(findings.late_answers),
        "examples": findings.examples[:5],
        "seconds": round(time.monotonic() - started, 1),
    }


async def hanging(admin: Admin, partitions: list[TopicPartition]) -> list[TopicPartition]:
    """Partitions whose last stable offset does not reach the end although every transaction had time to end."""
    ends = await admin.list_offsets(partitions, at="high_watermark")
    deadline = time.monotonic() + HANGING_SECONDS
    while True:
        stable = await admin.list_offsets(partitions, at="stable")
        open_ = [partition for partition in partitions if stable[partition] < ends[partition]]
        if not open_ or time.monotonic() > deadline:
            return open_
        await asyncio.sleep(0.2)


async def read_committed(
    admin: Admin, bootstrap: str, partitions: list[TopicPartition]
) -> dict[TopicPartition, list[str]]:
    """Every committed value that a reader can see."""
    ends = await admin.list_offsets(partitions, at="stable")
    found: dict[TopicPartition, list[str]] = {partition: [] for partition in partitions}
    async for record in each(bootstrap, ends):
        found[TopicPartition(record.topic, record.partition)].append((record.value or b"").decode())
    return found


def judge(told: list[tuple[Told, Told]], visible: list[str], findings: Findings) -> None:
    """Compare what a reader sees with what the client said."""
    seen = Counter(visible)
    for transaction in (item for pair in told for item in pair):
        there = [value for value in transaction.values if seen[value]]
        case = f"{transaction.values} were {transaction.outcome}, a reader sees {there}"
        if any(seen[value] > 1 for value in transaction.values):
            findings.anomaly("duplicate", case)
        if transaction.outcome == "aborted" and there:
            findings.anomaly("aborted read", case)
        elif transaction.outcome == "committed" and len(there) < len(transaction.values):
            findings.anomaly("lost write", case)
        if there and len(there) < len(transaction.values):
            findings.anomaly("torn", case)


@contextlib.contextmanager
def broker_at(bootstrap: str) -> Iterator[str]:
    """The address itself, or that of an embedded broker started for this run."""
    if not bootstrap.startswith("embedded:"):
        yield bootstrap
        return
    from semel.broker.config import BrokerConfig
    from semel.broker.embedded import EmbeddedBroker

    with tempfile.TemporaryDirectory(prefix="semel-late-") as folder:
        config = BrokerConfig(transaction_version=int(bootstrap.removeprefix("embedded:")))
        broker = EmbeddedBroker(Path(folder), config=config)
        broker.start()
        try:
            yield broker.address
        finally:
            broker.stop()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bootstrap", default="embedded:2", help="HOST:PORT, embedded:2 or embedded:1")
    parser.add_argument("--client", choices=sorted(CLIENTS), default="semel")
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--parallel", type=int, default=8, help="lanes with their own id, proxy and partition")
    parser.add_argument("--timeout-ms", type=int, default=150, help="the client's request time-out")
    parser.add_argument("--format", choices=["text", "json"], default="text")
    args = parser.parse_args(argv)
    cases = list(CASES) if args.case == "all" else [args.case]
    rows = []
    with broker_at(args.bootstrap) as bootstrap:
        for case in cases:
            row = asyncio.run(run_case(argparse.Namespace(**(vars(args) | {"case": case})), bootstrap))
            rows.append(row)
            if args.format == "json":
                print(json.dumps(row))
            else:
                print(f"{row['client']:16} {case:13} V{row['transaction_version']} {row['runs']} runs: ", end="")
                print(f"{row['anomalies']} anomalies {row['kinds']}; told {row['outcomes']}; ", end="")
                print(f"late copies answered {row['late_answers']}; {row['seconds']} s")
                for example in row["examples"]:
                    print(f"    {example}")
    return 1 if any(row["anomalies"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

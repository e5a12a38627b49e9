"""The demo's clients: they post orders over HTTP/1.1, send some of them again, and never give up on one.

Latency is from the first byte sent to the answer, per attempt.
"""

from __future__ import annotations

import asyncio
import random
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from semel.prove.clients import Answer, Connection, request_bytes, until_answered
from semel.prove.purchases import Purchase

__all__ = ["LoadReport", "Plan", "plan_requests", "run_load"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to send: for each purchase its request body, and how many extra copies go out at once or later."""

    purchases: Sequence[Purchase]
    at_once: dict[int, int]
    """Line to number of extra copies sent at the same moment as the first."""
    later: dict[int, int]
    """Line to number of extra copies sent after the first was answered."""

    @property
    def duplicates(self) -> int:
        return sum(self.at_once.values()) + sum(self.later.values())


def plan_requests(purchases: Sequence[Purchase], seed: int) -> Plan:
    """A tenth of the orders is sent two or three times, half of those copies at the same moment."""
    rng = random.Random(f"{seed}:duplicates")
    chosen = rng.sample(range(len(purchases)), -(-len(purchases) // 10))
    at_once: dict[int, int] = {}
    later: dict[int, int] = {}
    for number, index in enumerate(chosen):
        copies = 1 + number % 2
        (at_once if number % 4 < 2 else later)[purchases[index].line] = copies
    return Plan(purchases, at_once, later)


@dataclass(slots=True)
class LoadReport:
    """What the clients saw."""

    orders_answered: int = 0
    """Orders with a final answer."""
    duplicate_requests: int = 0
    """Requests sent beyond the first of each order: planned copies and retries."""
    replayed: int = 0
    retries: int = 0
    refused: list[str] = field(default_factory=list)
    """Final answers that are not 201, and bodies that do not fit their order."""
    latencies_ms: array[float] = field(default_factory=lambda: array("d"))
    finished: list[float] = field(default_factory=list)
    """Seconds since the start at which each order got its answer."""

    def sending(self) -> str:
        """One more attempt is made."""
        return ""

    def answered(self, _attempt: str, answer: Answer, seconds: float) -> None:
        """An attempt is over."""
        if answer.is_final:
            self.latencies_ms.append(seconds * 1000)
            self.replayed += answer.replayed
        else:
            self.retries += 1
            self.duplicate_requests += 1

    def percentile_ms(self, share: float) -> float:
        """The latency below which this share of the answers came, in milliseconds."""
        ordered = sorted(self.latencies_ms)
        return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0


def _request(purchase: Purchase, run: str) -> bytes:
    line, customer, cds, cents = purchase
    body = msgspec.json.encode({"id": line, "customer_id": customer, "cds": cds, "cents": cents})
    return request_bytes("POST", "/orders", f"{run}-{line}", body)


async def run_load(
    plan: Plan,
    addresses: Callable[[], Sequence[tuple[str, int]]],
    report: LoadReport,
    *,
    run: str,
    seed: int,
    clients: int = 64,
    rate: float | None = None,
) -> None:
    """Send the whole plan and return when every order, every copy included, has a final answer.

    `addresses` gives the HTTP instances as they are now; `rate` limits first sends per second (None: no limit).
    """
    started = time.monotonic()
    work: Iterator[tuple[int, Purchase]] = iter(enumerate(plan.purchases))
    rng = random.Random(f"{seed}:clients")

    def pick() -> tuple[str, int]:
        return rng.choice(list(addresses()))

    async def client() -> None:
        connection = Connection(pick)
        for number, purchase in work:
            if rate is not None:
                await asyncio.sleep(max(0.0, started + number / rate - time.monotonic()))
            request = _request(purchase, run)
            extra = [Connection(pick) for _ in range(plan.at_once.get(purchase.line, 0))]
            report.duplicate_requests += len(extra) + plan.later.get(purchase.line, 0)
            every = [connection, *extra]
            await asyncio.gather(*(_post(each, purchase, request, report) for each in every))
            for each in extra:
                each.close()
            report.orders_answered += 1
            report.finished.append(time.monotonic() - started)
            for _ in range(plan.later.get(purchase.line, 0)):
                await _post(connection, purchase, request, report)
        connection.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())


async def _post(connection: Connection, purchase: Purchase, request: bytes, report: LoadReport) -> None:
    answer = await until_answered(connection, request, report)
    if answer.status != 201 or answer.body != b'{"order":%d}' % purchase.line:
        report.refused.append(f"order {purchase.line}: {answer.status} {answer.body[:120]!r}")

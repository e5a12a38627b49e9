"""The demo's clients: they post orders over HTTP/1.1, send some of them again, and never give up on one.

A client that gets no answer does what any client must: it sends the same request with the same Idempotency-Key again.
Connections are kept alive; nothing is pipelined. Latency is from the first byte sent to the answer, per attempt.
"""

from __future__ import annotations

import asyncio
import random
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from semel.prove.purchases import Purchase

__all__ = ["LoadReport", "Plan", "plan_requests", "run_load"]

_RETRY_STATUS = frozenset({202, 429, 502, 503, 504, 500})
_ANSWER_SECONDS = 15.0


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

    answered: int = 0
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

    def percentile_ms(self, share: float) -> float:
        """The latency below which this share of the answers came, in milliseconds."""
        ordered = sorted(self.latencies_ms)
        return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0


class _Connection:
    """One keep-alive connection; opened when needed, thrown away on any trouble."""

    def __init__(self, pick: Callable[[], tuple[str, int]]) -> None:
        self._pick = pick
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def post(self, request: bytes) -> tuple[int, bool, bytes]:
        """Send and return (status, replayed, body). Raises OSError, EOFError or TimeoutError when unanswered."""
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection(*self._pick())
        reader, writer = self._reader, self._writer
        assert reader is not None
        writer.write(request)
        async with asyncio.timeout(_ANSWER_SECONDS):
            head = await reader.readuntil(b"\r\n\r\n")
            lowered = head.lower()
            status = int(head[9:12])
            at = lowered.find(b"content-length:")
            size = int(lowered[at + 15 : lowered.index(b"\r\n", at)]) if at >= 0 else 0
            body = await reader.readexactly(size) if size else b""
        if b"connection: close" in lowered:
            self.close()
        return status, b"idempotency-replayed: true" in lowered, body

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None


def _request(purchase: Purchase, run: str) -> bytes:
    line, customer, cds, cents = purchase
    body = msgspec.json.encode({"id": line, "customer_id": customer, "cds": cds, "cents": cents})
    head = (
        f"POST /orders HTTP/1.1\r\nHost: semel\r\nContent-Type: application/json\r\n"
        f'Idempotency-Key: "{run}-{line}"\r\nContent-Length: {len(body)}\r\n\r\n'
    )
    return head.encode() + body


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
        connection = _Connection(pick)
        for number, purchase in work:
            if rate is not None:
                await asyncio.sleep(max(0.0, started + number / rate - time.monotonic()))
            request = _request(purchase, run)
            extra = [_Connection(pick) for _ in range(plan.at_once.get(purchase.line, 0))]
            report.duplicate_requests += len(extra) + plan.later.get(purchase.line, 0)
            every = [connection, *extra]
            await asyncio.gather(*(_until_answered(each, purchase, request, report) for each in every))
            for each in extra:
                each.close()
            report.answered += 1
            report.finished.append(time.monotonic() - started)
            for _ in range(plan.later.get(purchase.line, 0)):
                await _until_answered(connection, purchase, request, report)
        connection.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())


async def _until_answered(connection: _Connection, purchase: Purchase, request: bytes, report: LoadReport) -> None:
    """Post one request until it has a final answer; back off a little longer each time."""
    delay = 0.02
    while True:
        began = time.monotonic()
        try:
            status, replayed, body = await connection.post(request)
        except (OSError, EOFError, TimeoutError, ValueError):
            connection.close()
            status, replayed, body = 0, False, b""
        if status == 0 or status in _RETRY_STATUS:
            report.retries += 1
            report.duplicate_requests += 1
            await asyncio.sleep(delay)
            delay = min(delay * 1.7, 1.0)
            continue
        report.latencies_ms.append((time.monotonic() - began) * 1000)
        report.replayed += replayed
        if status != 201 or body != b'{"order":%d}' % purchase.line:
            report.refused.append(f"order {purchase.line}: {status} {body[:120]!r}")
        return

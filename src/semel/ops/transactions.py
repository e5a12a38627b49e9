"""Open and prepared transactions by age, and what a Kafka offers of two-phase commit (KIP-939)."""

from __future__ import annotations

from typing import Any

import msgspec

from semel.client.admin import Admin, DescribedTransaction
from semel.client.two_phase import NO_TIMEOUT_MS, TwoPhaseMode
from semel.env import Env
from semel.ops.listings import tool_client
from semel.ops.tables import render
from semel.settings import Settings

__all__ = ["list_open", "render_open"]

OPEN = ("Ongoing", "PrepareCommit", "PrepareAbort")


async def list_open(settings: Settings) -> tuple[TwoPhaseMode, list[dict[str, Any]]]:
    """What the cluster offers, and one row an open transaction, the oldest first.

    `transaction` is the name that a database remembers a prepared one by. `ends_in_seconds` is None where nothing but
    its owner or an operator ends it.
    """
    now_ms = Env().wall_ms()
    async with tool_client(settings) as client:
        admin = Admin(client)
        mode = await admin.two_phase_mode()
        listed = await admin.list_transactions(states=list(OPEN))
        found = await admin.describe_transactions([item.transactional_id for item in listed])
    found = [item for item in found if item.state in OPEN]
    return mode, [_row(item, now_ms) for item in sorted(found, key=lambda item: item.start_ms)]


def _row(item: DescribedTransaction, now_ms: int) -> dict[str, Any]:
    ends = None if item.timeout_ms == NO_TIMEOUT_MS else round((item.start_ms + item.timeout_ms - now_ms) / 1000, 1)
    return {
        "transactional_id": item.transactional_id,
        "transaction": f"{item.producer_id}:{item.producer_epoch}",
        "state": item.state,
        "age_seconds": round((now_ms - item.start_ms) / 1000, 1),
        "ends_in_seconds": ends,
        "partitions": [f"{partition.topic}-{partition.partition}" for partition in item.partitions],
    }


async def render_open(settings: Settings, output: str) -> str:
    """`list_open` for people or, with `json`, as one object: mode, meaning, transactions."""
    mode, rows = await list_open(settings)
    if output == "json":
        return msgspec.json.encode({"mode": mode.name, "meaning": mode.meaning, "transactions": rows}).decode()
    columns = ["transactional_id", "transaction", "state", "age_seconds", "ends_in_seconds", "partitions"]
    shown = [
        row | {"ends_in_seconds": row["ends_in_seconds"] or "never", "partitions": len(row["partitions"])}
        for row in rows
    ]
    more = "\n\n`semel doctor txn list APP` says which of them is to end how, and why." if rows else ""
    return f"{mode}. {mode.meaning}\n\n{render(shown, columns, output)}{more}"

"""`semel demo` for people and for programs: progress on stderr, the comparison or one JSON object on stdout."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from semel.ops.terminal import Terminal
from semel.prove.demo import Demo, DemoOptions, DemoResult

__all__ = ["run_demo"]


async def run_demo(
    output: str,
    *,
    orders: int | None,
    seed: int,
    no_faults: bool,
    rate: float | None,
    clients: int,
    keep: Path | None,
    database: str | None,
    kafka: str | None,
    picture: Path | None,
) -> int:
    """Run the demo and print its outcome; the exit code: 0 only when everything was counted exactly once."""
    options = DemoOptions(
        orders=orders,
        seed=seed,
        faults=not no_faults,
        keep=keep,
        database=database,
        kafka=kafka,
        rate=rate,
        clients=clients,
    )
    terminal = Terminal()
    demo = Demo(options, terminal)
    try:
        result = await demo.run()
        where = picture or (keep / "demo.svg" if keep else Path("semel-demo.svg"))
        demo.write_picture(result, where)
        terminal.line(f"picture: {where}")
    finally:
        demo.close()
    if output == "json":
        click.echo(msgspec.json.encode(result.as_json()).decode())
    else:
        click.echo(_table(result))
    return 0 if result.exact else 1


def _table(result: DemoResult) -> str:
    expected, found, findings = result.verdict.expected, result.verdict.found, result.verdict.findings
    rows = [
        ("", "input file", "database"),
        ("orders", f"{expected.orders:,}", f"{found.orders:,}"),
        ("CDs", f"{expected.cds:,}", f"{found.cds:,}"),
        ("dollars", f"{expected.cents / 100:,.2f}", f"{found.cents / 100:,.2f}"),
        ("customers", f"{len(expected.customers):,}", f"{found.customers:,}"),
        ("items taken from stock", f"{expected.cds:,}", f"{found.items_taken:,}"),
    ]
    lines = [f"{name:<24}{left:>16}{right:>16}" for name, left, right in rows]
    figures = result.as_json()
    lines += [
        "",
        f"{result.kills} kills ({result.broker_kills} of the broker), {result.pauses} pauses, "
        f"{result.rebalances} rebalances",
        f"{result.load.duplicate_requests:,} requests were sent again; {result.load.replayed:,} answers were replays",
        f"{figures['orders_per_second']:,} orders a second over {figures['seconds']} s; "
        f"p50 {figures['p50_ms']} ms, p99 {figures['p99_ms']} ms from request to answer",
        f"compared: {len(expected.customers):,} customers, {len(expected.stock):,} titles and "
        f"{result.verdict.checked:,} records, one by one",
        "",
    ]
    if result.exact:
        lines.append("0 lost, 0 duplicated")
    else:
        lines.append(f"NOT EXACT: {findings.summary()}")
        lines += [f"  {anomaly}" for anomaly in findings.anomalies[:20]]
        lines += [f"  refused: {what}" for what in result.load.refused[:5]]
    return "\n".join(lines)

"""`semel prove` for people and for programs: progress on stderr, the verdict on stdout, the report in a file."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import msgspec

from semel.errors import ConfigurationError
from semel.ops.loading import load_app, load_plan
from semel.ops.terminal import Terminal
from semel.prove.campaign import Campaign, CampaignOptions
from semel.prove.check import CLASSES
from semel.prove.judge import judge
from semel.prove.proof import Proof
from semel.prove.report import report_html

__all__ = ["parse_databases", "run_prove"]

_SHOWN = 5


async def run_prove(output: str, options: CampaignOptions, *, plan: str | None, report: Path) -> int:
    """Run a campaign and print its outcome; the exit code: 0 only when there is no anomaly."""
    _stop_on_sigterm()
    logging.getLogger("semel.supervisor").setLevel(logging.ERROR)  # That processes end is what is done here.
    app = load_app(options.app)
    found, name = load_plan(options.app, plan)
    _check_writable(report)
    terminal = Terminal()
    campaign = Campaign(app, found, name, options, terminal)
    try:
        for line in campaign.source.chosen:
            terminal.line(line)
        for kind, why in campaign.refused.items():
            terminal.line(f"fault {kind} is left out: {why}")
        observed = await campaign.run()
        terminal.line("checking")
        proof = await asyncio.to_thread(judge, campaign, observed)
    finally:
        campaign.close()
    await asyncio.to_thread(report.write_text, report_html(proof), "utf-8")
    if output == "json":
        click.echo(msgspec.json.encode(proof.as_json(report)).decode())
    else:
        click.echo(_text(proof, report))
    return 0 if proof.clean else 1


def _stop_on_sigterm() -> None:
    """As Ctrl-C does: processes are stopped, faults are healed, what is temporary is removed."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)


def _check_writable(report: Path) -> None:
    """Raise `ConfigurationError` now rather than when there is something to write."""
    try:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.open("ab").close()
    except OSError as error:
        raise ConfigurationError(f"the report {report} cannot be written: {error.strerror}.") from None


def parse_databases(given: Sequence[str]) -> Mapping[str, str]:
    """`URL` for every database, `NAME=URL` for one. Raises `ConfigurationError` for one that is given twice."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, url = text.partition("=")
        if not equals or ":" in name:
            name, url = "", text
        if name in found:
            raise ConfigurationError(f"--database is given twice for {name or 'every database'}.")
        found[name] = url
    return found


def _text(proof: Proof, report: Path) -> str:
    figures = proof.as_json(report)
    faults = ", ".join(f"{count} {kind}" for kind, count in proof.faults.items() if count)
    p99 = figures["recovery_p99_seconds"]
    again = sum(runs.again for runs in proof.tally.runs.values())
    lines = [
        f"inputs     {figures['inputs']:,} ({figures['accepted']:,} accepted, {figures['refused']:,} refused, "
        f"{figures['unanswered']:,} without an answer)",
        f"effects    {figures['effects']:,}",
        f"faults     {figures['faults_total']:,}: {faults or 'none'}",
        f"recovery   p99 {'not measured' if p99 is None else f'{p99} s'}",
        f"handlers   ran again for {again:,} inputs; what they do besides yielding effects happens as often: "
        + (", ".join(name for name, runs in sorted(proof.tally.runs.items()) if runs.again) or "none"),
        f"report     {report}",
        "",
    ]
    if proof.clean:
        return "\n".join([*lines, "clean: nothing lost, nothing doubled"])
    lines.append(f"NOT CLEAN: {sum(proof.findings.counts.values()):,} anomalies")
    for kind, count in proof.findings.counts.items():
        lines.append(f"  {kind} {CLASSES[kind].name}, {count:,}: {CLASSES[kind].meaning}")
        shown = [anomaly for anomaly in proof.findings.anomalies if anomaly.kind == kind][:_SHOWN]
        lines += [f"    {', '.join(anomaly.ids)}: {anomaly.why}" for anomaly in shown]
    return "\n".join([*lines, f"again: {proof.reproduction}"])

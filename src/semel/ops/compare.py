"""`semel prove --compare` for people and for programs: progress on stderr, the table and the findings on stdout."""

from __future__ import annotations

import logging
from pathlib import Path

import click
import msgspec

from semel.prove.compare.run import compare
from semel.prove.compare.table import findings, markdown
from semel.prove.compare.trial import Trial

__all__ = ["run_compare"]


async def run_compare(
    output: str, peers: str, faults: str, *, seed: int, kafka: str | None = None, keep: Path | None = None
) -> int:
    """Compare, and print every trial as it ends; the exit code: 1 when ours was not clean, whatever others did."""
    logging.getLogger("semel").setLevel(logging.ERROR)  # That brokers and connections go away is what is done here.

    def done(trial: Trial) -> None:
        click.echo(
            f"{trial.peer}, {trial.fault}: {trial.verdict} ({trial.inputs} inputs, {trial.seconds:.0f} s)", err=True
        )
        if output == "json":
            click.echo(msgspec.json.encode(trial.as_json()).decode())

    trials = await compare(peers, faults, seed=seed, kafka=kafka, keep=keep, say=_say, done=done)
    if output != "json":
        versions = dict.fromkeys(f"{trial.peer}: {trial.versions}, promises {trial.promise}" for trial in trials)
        click.echo("\n".join([*versions, "", markdown(trials), "", findings(trials)]).rstrip())
    ours = [trial for trial in trials if trial.peer.startswith("semel")]
    return 0 if all(trial.verdict in ("clean", "not struck") for trial in ours) else 1


def _say(line: str) -> None:
    click.echo(f"  {line}", err=True)

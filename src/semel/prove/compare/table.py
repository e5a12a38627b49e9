"""The comparison for people: a table of what was found, and below it each finding with its reason and its command."""

from __future__ import annotations

from collections.abc import Sequence

from semel.prove.compare.reasons import reason_for
from semel.prove.compare.strikes import FAULTS
from semel.prove.compare.trial import Trial

__all__ = ["command", "findings", "markdown"]


def command(trial: Trial) -> str:
    """What runs this trial again."""
    kafka = "" if trial.kafka == "embedded" else f" --kafka {trial.kafka}"
    return f"semel prove --compare {trial.peer} --faults {trial.fault} --seed {trial.seed}{kafka}"


def markdown(trials: Sequence[Trial]) -> str:
    """One row a fault, one column a peer."""
    peers = list(dict.fromkeys(trial.peer for trial in trials))
    faults = list(dict.fromkeys(trial.fault for trial in trials))
    cells = {(trial.peer, trial.fault): trial.verdict for trial in trials}
    rows = [["fault", *peers], ["---"] * (len(peers) + 1)]
    rows += [[fault, *(cells.get((peer, fault), "-") for peer in peers)] for fault in faults]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def findings(trials: Sequence[Trial]) -> str:
    """Every trial that is not clean: what, an example, why, and how to see it again."""
    parts = [_finding(trial) for trial in trials if trial.verdict != "clean"]
    return "\n\n".join(parts)


def _finding(trial: Trial) -> str:
    lines = [f"{trial.peer}, {trial.fault} ({FAULTS[trial.fault].does}): {trial.verdict}, of {trial.inputs} inputs"]
    if trial.example:
        lines.append(f"  for example {trial.example}")
    if trial.unfinished:
        lines.append(f"  {trial.unfinished} orders were never passed; the loop's last words: {trial.last_words}")
    reason = reason_for(trial)
    if reason:
        lines.append(f"  why: {reason}")
    lines.append(f"  again: {command(trial)}")
    return "\n".join(lines)

"""What a campaign shows: the verdict, the figures, and what the claim does not cover."""

from __future__ import annotations

import platform
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from semel.prove.campaign import CampaignOptions
from semel.prove.check.findings import Findings
from semel.prove.driver import Sent
from semel.prove.faults.catalogue import KINDS
from semel.prove.tally import Recovery, Tally

__all__ = ["Proof", "limits_of"]


@dataclass(slots=True, kw_only=True)
class Proof:
    """The outcome of one campaign; everything that the report shows."""

    app: str
    options: CampaignOptions
    plan: str
    """Where the proof plan is, empty when there is none."""
    chosen: Sequence[str]
    sent: Sent
    load_began: int
    load_seconds: float
    faults: Mapping[str, int]
    missed: Mapping[str, int]
    refused: Mapping[str, str]
    failed: Sequence[str]
    exits: Mapping[str, int]
    killed: int
    targets: Sequence[str]
    findings: Findings
    tally: Tally
    run_on: Mapping[str, str]
    """What the campaign ran on: component to version."""
    timelines: Mapping[int, str] = field(default_factory=dict)
    """SVG by the number of the anomaly in `findings`."""

    @property
    def clean(self) -> bool:
        return self.findings.clean

    @property
    def verdict(self) -> str:
        return "clean" if self.clean else "anomalies"

    @property
    def recoveries(self) -> list[Recovery]:
        return self.tally.recoveries

    @property
    def reproduction(self) -> str:
        """The command that does this again: the same inputs, the same faults at the same times."""
        options, standard = self.options, CampaignOptions("")
        words = ["semel", "prove", options.app, "--seed", str(options.seed), "--minutes", f"{options.minutes:g}"]
        words += ["--faults", ",".join(kind for kind in KINDS if kind in {*self.faults, *self.missed})]
        for name in ("every", "workers", "http", "clients", "rate", "inputs"):
            value = getattr(options, name)
            if value != getattr(standard, name):
                words += [f"--{name}", "0" if value is None else f"{value:g}"]
        if self.plan and self.plan != standard_plan(options.app):
            words += ["--plan", self.plan]
        if options.kafka:
            words += ["--kafka", options.kafka]
        words += ["--database URL"] * bool(options.databases)
        return " ".join(word if word.endswith(" URL") else shlex.quote(word) for word in words)

    def as_json(self, report: Path | None) -> dict[str, object]:
        """The last line of `semel prove --format json`."""
        p99 = self.tally.recovery_seconds(0.99)
        return {
            "verdict": self.verdict,
            "app": self.app,
            "seed": self.options.seed,
            "inputs": self.sent.inputs,
            "accepted": self.sent.count(200, 300),
            "refused": self.sent.count(400, 600),
            "unanswered": self.sent.count(0, 1),
            "effects": self.tally.effects,
            "faults": dict(self.faults),
            "faults_total": sum(self.faults.values()),
            "processes_killed": self.killed,
            "faults_not_done": dict(self.refused),
            "anomalies": dict(self.findings.counts),
            "recovery_p99_seconds": None if p99 is None else round(p99, 2),
            "recovery_max_seconds": None if (most := self.tally.recovery_seconds(1.0)) is None else round(most, 2),
            "handlers": {
                name: {"inputs": runs.inputs, "executions": runs.executions, "again": runs.again}
                for name, runs in sorted(self.tally.runs.items())
            },
            "checked": dict(self.findings.checked),
            "seconds": round(self.load_seconds, 1),
            "reproduce": self.reproduction,
            "report": None if report is None else str(report),
        }


def standard_plan(app: str) -> str:
    """Where an app's proof plan is when nobody says otherwise."""
    return f"{app.partition(':')[0]}_proof:plan"


def versions() -> dict[str, str]:
    """What runs here, without addresses."""
    return {
        "Semel": version("semel"),
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
    }


def limits_of(proof: Proof) -> list[str]:
    """What this run does not show, as sentences."""
    limits = [f"{kind} was not done: {why}" for kind, why in proof.refused.items()]
    left = [kind for kind in KINDS if kind not in {*proof.faults, *proof.refused, *proof.missed}]
    if left:
        limits.append(f"These faults were not asked for: {', '.join(left)}.")
    limits += [f"{number} faults of kind {kind} found nothing to strike." for kind, number in proof.missed.items()]
    if not proof.plan:
        limits.append(
            "There is no proof plan: inputs were made up from types, and no totals were compared with the tables. "
            "Whether a handler computes the right thing was not looked at."
        )
    refused = proof.sent.count(400, 600)
    if refused:
        limits.append(f"{refused:,} inputs were refused by the app itself; they show that a refusal has no effects.")
    again = sum(runs.again for runs in proof.tally.runs.values())
    if again:
        limits.append(
            f"Handlers ran again for {again:,} inputs. Their effects happened once; anything else that they do - a "
            "call of another service, a mail - happens as often as they run."
        )
    limits += proof.findings.notes
    limits.append(
        "All processes were on one machine: no power was cut, no disk was lost, no second machine took over. A run "
        "shows what it met; it does not show that what it did not meet is harmless."
    )
    return limits


def by_kind(recoveries: Sequence[Recovery]) -> dict[str, list[float]]:
    """Recovery times by kind of fault, in order."""
    times: dict[str, list[float]] = {}
    for item in recoveries:
        times.setdefault(item.kind, [])
        if item.seconds is not None:
            times[item.kind].append(item.seconds)
    return {kind: sorted(found) for kind, found in times.items()}


def outcomes(sent: Sent) -> Counter[str]:
    """Inputs by what became of them."""
    return Counter(
        {"accepted": sent.count(200, 300), "refused": sent.count(400, 600), "without an answer": sent.count(0, 1)}
    )

"""The checker: everything that a run left behind, against everything that its processes said."""

from semel.prove.check.checker import check
from semel.prove.check.evidence import Evidence, InDoubt, Ingress, LedgerRow, Log, ParkedRow, Position
from semel.prove.check.findings import CLASSES, Anomaly, Findings
from semel.prove.check.timeline import Timeline, timelines

__all__ = [
    "CLASSES",
    "Anomaly",
    "Evidence",
    "Findings",
    "InDoubt",
    "Ingress",
    "LedgerRow",
    "Log",
    "ParkedRow",
    "Position",
    "Timeline",
    "check",
    "timelines",
]

"""The checker: everything that a run left behind, against everything that its processes said."""

from semel.prove.check.checker import check
from semel.prove.check.evidence import Evidence, InDoubt, Ingress, LedgerRow, Log, ParkedRow, Position
from semel.prove.check.findings import CLASSES, Anomaly, Findings

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
    "check",
]

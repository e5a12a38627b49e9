"""Every kind of fault by its name, as `semel prove --faults` takes them."""

from __future__ import annotations

from semel.errors import ConfigurationError
from semel.prove.faults.clock import Clock
from semel.prove.faults.contract import Fault
from semel.prove.faults.database import DatabaseFault
from semel.prove.faults.duplicate import Duplicate
from semel.prove.faults.limits import Descriptors, Memory
from semel.prove.faults.net import Net
from semel.prove.faults.poison import Poison
from semel.prove.faults.processes import Kill, Pause
from semel.prove.faults.rebalance import Rebalance
from semel.prove.faults.storage import Disk

__all__ = ["KINDS", "kinds_named"]

_ALL: tuple[type[Fault], ...] = (
    Kill,
    Pause,
    Net,
    Disk,
    DatabaseFault,
    Clock,
    Rebalance,
    Duplicate,
    Poison,
    Memory,
    Descriptors,
)
KINDS = {fault.kind: fault for fault in _ALL}


def kinds_named(text: str) -> list[type[Fault]]:
    """The kinds of `kill,pause,...` in that order, each once; `all` is every kind. Raises `ConfigurationError`."""
    names = list(KINDS) if text.strip() == "all" else [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in KINDS]
    if unknown or not names:
        what = f"there is no fault {unknown[0]!r}" if unknown else "no fault is named"
        raise ConfigurationError(f"--faults: {what}. Known: {', '.join(KINDS)}, or all.")
    return [KINDS[name] for name in dict.fromkeys(names)]

"""Tables of allowed state changes, and the picture they draw of themselves."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TypeVar

__all__ = ["Transitions", "mermaid"]

S = TypeVar("S", bound=StrEnum)
Transitions = Mapping[S, frozenset[S]]
"""From a state to the states it may become."""


def mermaid(transitions: Transitions[S], initial: S) -> str:
    """The table as a Mermaid state diagram, states and arrows in the order of the enumeration."""
    order = list(type(initial))
    lines = ["stateDiagram-v2", f"    [*] --> {initial}"]
    for state in order:
        targets = sorted(transitions.get(state, frozenset()), key=order.index)
        lines.extend(f"    {state} --> {target}" for target in targets)
    return "\n".join(lines) + "\n"

"""The checker: compares inputs with effects and names what is lost, doubled, torn or out of order.

All checks are single passes over hash tables: linear in the number of events. The definitions are those of
docs/guarantees.md: E1 lost, E2 doubled, E3 phantom, E4 torn, E7 order per key.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field

__all__ = ["Effect", "Findings", "check_effects", "check_totals"]


@dataclass(frozen=True, slots=True)
class Effect:
    """One effect as it was found in a log: which input caused it, which of its effects it is, and where it stands.

    `source` is the input's (partition, offset), where the effect's reader knows it; `target` is the effect's own.
    """

    input_id: Hashable
    index: Hashable
    target: tuple[int, int]
    key: Hashable = None
    source: tuple[int, int] | None = None


@dataclass(slots=True)
class Findings:
    """What is wrong, by kind; each entry names the ids. Empty lists everywhere mean exactly once."""

    lost: list[str] = field(default_factory=list)
    duplicated: list[str] = field(default_factory=list)
    phantom: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)
    out_of_order: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.lost or self.duplicated or self.phantom or self.torn or self.out_of_order)

    def merge(self, other: Findings) -> None:
        """Add what another check found."""
        self.lost += other.lost
        self.duplicated += other.duplicated
        self.phantom += other.phantom
        self.torn += other.torn
        self.out_of_order += other.out_of_order

    def summary(self) -> str:
        """One line for people."""
        if self.clean:
            return "0 lost, 0 duplicated"
        parts = {
            "lost": self.lost,
            "duplicated": self.duplicated,
            "phantom": self.phantom,
            "torn": self.torn,
            "out of order": self.out_of_order,
        }
        return ", ".join(f"{len(found)} {name} ({found[0]})" for name, found in parts.items() if found)


def check_effects(expected: Mapping[Hashable, Iterable[Hashable]], effects: Iterable[Effect]) -> Findings:
    """Compare each input's expected effect indexes with the effects that were found.

    `effects` come in the order of each target partition. An input with none of its effects is lost; with only some of
    them it is torn (and the missing ones are lost effects of a torn group); an index seen twice is duplicated.
    """
    findings = Findings()
    seen: dict[Hashable, Counter[Hashable]] = {}
    newest: dict[tuple[Hashable, int, int], int] = {}
    for effect in effects:
        if effect.input_id not in expected:
            findings.phantom.append(f"effect {effect.index} of unknown input {effect.input_id} at {effect.target}")
            continue
        counts = seen.setdefault(effect.input_id, Counter())
        counts[effect.index] += 1
        if counts[effect.index] > 1:
            findings.duplicated.append(f"effect {effect.index} of input {effect.input_id} again at {effect.target}")
        if effect.source is not None:
            lane = (effect.key, effect.source[0], effect.target[0])
            if effect.source[1] < newest.get(lane, -1):
                findings.out_of_order.append(f"input {effect.input_id} for key {effect.key} at {effect.target}")
            newest[lane] = max(newest.get(lane, -1), effect.source[1])
    for input_id, wanted in expected.items():
        want, got = set(wanted), set(seen.get(input_id, ()))
        for extra in got - want:
            findings.phantom.append(f"effect {extra} of input {input_id} should not exist")
        missing = want - got
        if missing and not got & want:
            findings.lost.append(f"input {input_id}")
        elif missing:
            findings.torn.append(f"input {input_id} lacks {sorted(map(str, missing))}")
    return findings


def check_totals(
    what: str, expected: Mapping[Hashable, tuple[int, ...]], found: Mapping[Hashable, tuple[int, ...]]
) -> Findings:
    """Compare accumulated rows, key by key: a row below its expectation lost effects, one above doubled some."""
    findings = Findings()
    for key, want in expected.items():
        got = found.get(key)
        if got is None:
            findings.lost.append(f"{what} {key}: no row, expected {want}")
        elif got != want:
            below = any(have < need for have, need in zip(got, want, strict=True))
            above = any(have > need for have, need in zip(got, want, strict=True))
            if below:
                findings.lost.append(f"{what} {key}: {got}, expected {want}")
            if above:
                findings.duplicated.append(f"{what} {key}: {got}, expected {want}")
    findings.phantom += [f"{what} {key}: {got}, expected no row" for key, got in found.items() if key not in expected]
    return findings

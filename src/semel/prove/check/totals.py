"""Comparisons with what the app should have done, for whoever knows that: the demo, and the proof plans of apps.

`checker` knows attempts and inputs and no app. These functions know what the input asks for: which effects each input
has (E1 to E4, E7), and what rows must add up to (E1 below, E2 above, E3 for rows that should not be, E8 for others).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

from semel.prove.check.findings import Findings

__all__ = ["Effect", "check_effects", "check_totals"]


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


def check_effects(expected: Mapping[Hashable, Iterable[Hashable]], effects: Iterable[Effect]) -> Findings:
    """Compare each input's expected effect indexes with the effects that were found.

    `effects` come in the order of each target partition. An input with none of its effects is lost; with only some of
    them it is torn (and the missing ones are lost effects of a torn group); an index seen twice is duplicated.
    """
    findings = Findings()
    seen: dict[Hashable, Counter[Hashable]] = {}
    newest: dict[tuple[Hashable, int, int], int] = {}
    for effect in effects:
        name = f"input {effect.input_id}"
        if effect.input_id not in expected:
            findings.add("E3", name, f"effect {effect.index} at {effect.target}, and there is no such input")
            continue
        counts = seen.setdefault(effect.input_id, Counter())
        counts[effect.index] += 1
        if counts[effect.index] > 1:
            findings.add("E2", name, f"effect {effect.index} again at {effect.target}")
        if effect.source is not None:
            lane = (effect.key, effect.source[0], effect.target[0])
            if effect.source[1] < newest.get(lane, -1):
                findings.add("E7", name, f"for key {effect.key} at {effect.target}, behind a later input's")
            newest[lane] = max(newest.get(lane, -1), effect.source[1])
    for input_id, wanted in expected.items():
        want, got = set(wanted), set(seen.get(input_id, ()))
        for extra in got - want:
            findings.add("E3", f"input {input_id}", f"effect {extra} should not exist")
        missing = want - got
        if missing and not got & want:
            findings.add("E1", f"input {input_id}", "none of its effects is there")
        elif missing:
            findings.add("E4", f"input {input_id}", f"it lacks {sorted(map(str, missing))}")
    return findings


def check_totals(
    what: str, expected: Mapping[Hashable, tuple[int, ...]], found: Mapping[Hashable, tuple[int, ...]]
) -> Findings:
    """Compare accumulated rows, key by key: a row below its expectation lost effects, one above has some twice."""
    findings = Findings()
    for key, want in expected.items():
        name = f"{what} {key}"
        got = found.get(key)
        if got is None:
            findings.add("E1", name, f"no row, expected {want}")
        elif got != want:
            below = any(have < need for have, need in zip(got, want, strict=True))
            above = any(have > need for have, need in zip(got, want, strict=True))
            findings.add("E8" if below and above else "E1" if below else "E2", name, f"{got}, expected {want}")
    for key, got in found.items():
        if key not in expected:
            findings.add("E3", f"{what} {key}", f"{got}, expected no row")
    return findings

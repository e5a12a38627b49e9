"""Comparisons with what the app should have done must name exactly what is wrong."""

from __future__ import annotations

import random

import pytest

from semel.prove.check.totals import Effect, check_effects, check_totals


def history(inputs: int = 200, seed: int = 1) -> tuple[dict[int, list[int]], list[Effect]]:
    """A valid history: every input has one to four effects, spread over four partitions, in order."""
    rng = random.Random(seed)
    expected = {number: list(range(rng.randint(1, 4))) for number in range(inputs)}
    effects: list[Effect] = []
    offsets = [0] * 4
    for number, indexes in expected.items():
        for index in indexes:
            lane = (number + index) % 4
            effects.append(Effect(number, index, (lane, offsets[lane]), key=lane, source=(number % 4, number // 4)))
            offsets[lane] += 1
    return expected, effects


def test_a_valid_history_is_clean() -> None:
    expected, effects = history()
    findings = check_effects(expected, effects)
    assert findings.clean
    assert findings.summary() == "0 lost, 0 duplicated"


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", ["E1", "E2", "E3", "E4", "E7"])
def test_one_planted_anomaly_is_named(kind: str, seed: int) -> None:
    expected, effects = history(seed=seed)
    rng = random.Random(seed)
    victim = rng.choice([number for number, indexes in expected.items() if len(indexes) >= 2])
    if kind == "E1":
        effects = [effect for effect in effects if effect.input_id != victim]
    elif kind == "E2":
        effects.append(next(effect for effect in effects if effect.input_id == victim))
    elif kind == "E3":
        effects.append(Effect(-1, 0, (0, 10_000)))
    elif kind == "E4":
        effects.remove(next(effect for effect in effects if effect.input_id == victim))
    else:
        first = next(effect for effect in effects if effect.source is not None and effect.source[1] == 3)
        effects.remove(first)
        effects.append(first)
    findings = check_effects(expected, effects)
    found = set(findings.counts)
    assert kind in found
    assert found <= {"E2", "E7"} if kind == "E2" else found == {kind}
    if kind in ("E1", "E2", "E4"):
        assert all(anomaly.ids == (f"input {victim}",) for anomaly in findings.anomalies if anomaly.kind == kind)


def test_totals_say_lost_below_doubled_above_and_phantom_for_unknown_keys() -> None:
    expected = {"a": (1, 10), "b": (2, 20), "c": (3, 30), "d": (4, 40)}
    assert check_totals("customer", expected, dict(expected)).clean
    findings = check_totals("customer", expected, {"a": (1, 9), "b": (3, 20), "d": (5, 39), "x": (1, 1)})
    assert findings.counts == {"E1": 2, "E2": 1, "E8": 1, "E3": 1}  # a is below, c is missing; d is neither
    assert "0 lost, 0 duplicated" not in findings.summary()

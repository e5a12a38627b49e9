"""A timeline must show who did what to the thing that is wrong, and be drawable."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from semel.history import Strike
from semel.prove.check import check, timelines
from tests.prove.histories import World
from tests.prove.sabotage import plant


@pytest.mark.parametrize("name", ["E2 in a unit", "L6", "L3", "E7 in a log", "E2 at a sink", "E6", "L12"])
def test_the_attempts_of_an_anomaly_are_shown_with_their_records_and_markers(name: str) -> None:
    evidence, planted = plant(name, 3)
    findings = check(evidence)
    told = timelines(evidence, findings)
    number = next(number for number, anomaly in enumerate(findings.anomalies) if anomaly.kind == planted.kind)
    story = told[number]
    text = story.text()
    assert text.startswith(f"{planted.kind} ")
    for attempt in findings.anomalies[number].attempts:
        assert attempt in text
    attempts = {bar.lane for bar in story.bars if not bar.is_fault}
    assert attempts
    if name in ("E2 in a unit", "E2 at a sink", "E6"):
        assert len(attempts) >= 2, "both who did it are shown"
    if name == "L6":
        assert "COMMIT" in text
        assert "ABORT" in text
    drawn = ElementTree.fromstring(story.svg())
    assert drawn.tag.endswith("svg")
    assert "style=" not in story.svg(), "the report's policy forbids styles inside"
    words = "".join(drawn.itertext())
    assert planted.kind in words


def test_faults_of_the_time_are_shown_and_text_is_escaped() -> None:
    evidence, planted = plant("L3", 1)
    begun = {event.a: event.t for event in evidence.events() if event.type == "invoke"}
    (attempt,) = next(iter(planted.ids))
    strikes = [
        Strike(t=begun[attempt] - 5_000_000, type="invoke", a="f1", kind="kill", target="broker <&>", detail="at once"),
        Strike(t=begun[attempt] + 1, type="ok", a="f1", kind="kill", target="broker <&>", outcome="it was gone"),
        Strike(t=begun[attempt] - 10**13, type="invoke", a="f0", kind="pause", target="long before"),
        Strike(t=begun[attempt] - 10**13 + 1, type="ok", a="f0", kind="pause", target="long before"),
    ]
    events = [*evidence.events(), *strikes]
    findings = check(evidence)
    from dataclasses import replace

    told = timelines(replace(evidence, events=lambda: events), findings)
    story = told[next(number for number, anomaly in enumerate(findings.anomalies) if anomaly.kind == "L3")]
    assert "kill strikes broker <&>" in story.text()
    assert "long before" not in story.text()
    ElementTree.fromstring(story.svg())


def test_a_clean_run_has_none() -> None:
    evidence = World(1).run(60).evidence()
    assert timelines(evidence, check(evidence)) == {}

"""The demo's input and the load plan: the counts are those of the data's own documentation."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from semel.prove.load import plan_requests
from semel.prove.picture import Mark, throughput_svg
from semel.prove.purchases import expect, load_purchases


def test_the_input_is_whole() -> None:
    expected = expect(load_purchases(), lambda line, position: f"cd-{(line + position) % 1000}")
    assert (expected.orders, expected.cds, expected.cents) == (69_659, 167_881, 250_031_563)
    assert len(expected.customers) == 23_570
    assert sum(expected.stock.values()) == 167_881
    assert expected.customers["14048"][0] == 217


def test_a_tenth_of_the_orders_is_sent_again_and_the_seed_decides_which() -> None:
    purchases = load_purchases()
    plan = plan_requests(purchases, seed=7)
    assert plan.duplicates >= 10_000
    assert len(plan.at_once) + len(plan.later) == 6_966
    assert plan.at_once
    assert plan.later
    assert plan == plan_requests(purchases, seed=7)
    assert plan != plan_requests(purchases, seed=8)


def test_the_picture_is_svg_and_marks_every_fault() -> None:
    marks = [Mark(1.0, "broker", "broker killed"), Mark(2.0, "pause", "worker <1> paused")]
    root = ElementTree.fromstring(throughput_svg([0.1 * i for i in range(50)], marks, "title & more", "subtitle"))
    titles = [element.text for element in root.iter("{http://www.w3.org/2000/svg}title")]
    assert titles == ["broker killed at 1.0 s", "worker <1> paused at 2.0 s"]

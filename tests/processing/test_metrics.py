"""Metrics: Prometheus' text format, byte for byte."""

from __future__ import annotations

import pytest

from semel.processing.metrics import Metrics


def test_the_text_format() -> None:
    metrics = Metrics()
    metrics.gauge("b", 'Back\\slash and\nnewline "quoted".', ("path",)).set(0.5, path='a"\\\n')
    counter = metrics.counter("a_total", "Things.", ("kind", "outcome"))
    counter.add(kind="x", outcome="ok")
    counter.add(2, kind="x", outcome="bad")
    metrics.gauge("c", "Plain.").set(1_700_000_000_123)
    assert metrics.render() == (
        "# HELP a_total Things.\n# TYPE a_total counter\n"
        'a_total{kind="x",outcome="bad"} 2\na_total{kind="x",outcome="ok"} 1\n'
        '# HELP b Back\\\\slash and\\nnewline "quoted".\n# TYPE b gauge\n'
        'b{path="a\\"\\\\\\n"} 0.5\n'
        "# HELP c Plain.\n# TYPE c gauge\nc 1700000000123\n"
    )


def test_a_watched_gauge_is_asked_and_a_removed_one_is_gone() -> None:
    metrics = Metrics()
    gauge = metrics.gauge("age", "Age.", ("who",))
    now = [1.0]
    gauge.watch(lambda: now[0], who="a")
    now[0] = 5
    assert 'age{who="a"} 5' in metrics.render()
    assert gauge.value(who="a") == 5
    gauge.remove(who="a")
    assert "who" not in metrics.render()


def test_one_name_is_one_metric() -> None:
    metrics = Metrics()
    metrics.counter("n", "N.", ("a",)).add(a="1")
    assert metrics.counter("n", "N.", ("a",)).value(a="1") == 1
    with pytest.raises(ValueError, match="exists as a counter"):
        metrics.gauge("n", "N.", ("a",))
    with pytest.raises(ValueError, match="has the labels"):
        metrics.counter("n", "N.", ("a",)).add(a="1", b="2")

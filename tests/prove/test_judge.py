"""The proof plan's part of the verdict: totals from inputs that are made again, and errors of the plan itself."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from itertools import count, islice
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import pytest

from semel.examples import shop
from semel.prove.campaign import Campaign
from semel.prove.check.findings import Findings
from semel.prove.driver import Sent
from semel.prove.inputs import InputSource
from semel.prove.judge import ask_the_plan
from semel.prove.plan import ProofContext, ProofPlan, Request


def inputs(rng: Random) -> Iterator[Request]:
    for number in count():
        yield Request("POST", "/orders", {"id": number, "customer_id": "a", "cds": 1, "cents": rng.randrange(100)})


def ask(check: Callable[[ProofContext], Any], made: Callable[[Random], Iterator[Request]] = inputs) -> Findings:
    plan = ProofPlan(made, check)
    source = InputSource(shop.app, plan, 3)
    jobs = list(islice(source.jobs("run"), 4))
    sent = Sent(statuses=array("H", [201, 422, 0, 201]), checksums=array("L", [job.checksum for job in jobs]))
    findings = Findings()
    ask_the_plan(cast(Campaign, SimpleNamespace(app=shop.app, plan=plan, source=source)), sent, findings)
    return findings


def test_a_check_sees_every_input_with_its_outcome_and_may_look_twice() -> None:
    seen: list[Any] = []

    def check(context: ProofContext) -> Iterator[str]:
        seen.append([(each.input.body["id"], each.status, each.is_done) for each in context.inputs()])  # type: ignore[union-attr]
        seen.append(len(list(context.inputs())))
        yield from ()

    assert ask(check).clean
    assert seen == [[(0, 201, True), (1, 422, False), (2, 0, False), (3, 201, True)], 4]


def test_each_problem_is_a_finding() -> None:
    found = ask(lambda _context: ["customer a: 3, expected 2", "customer b: none"])
    assert found.counts == {"E9": 2}
    assert found.anomalies[0].why == "customer a: 3, expected 2"


@pytest.mark.parametrize("lazy", [True, False])
def test_a_check_that_fails_shows_nothing_and_is_no_clean_verdict(lazy: bool) -> None:
    def check(_context: ProofContext) -> Any:
        if not lazy:
            raise KeyError("orders")
        return (1 // 0 for _ in range(1))

    found = ask(check)
    assert found.counts == {"E9": 1}
    assert "its check failed" in found.anomalies[0].why


def test_inputs_that_chance_decides_are_told_and_not_compared() -> None:
    numbers = count()

    def other_ones(_rng: Random) -> Iterator[Request]:
        while True:
            yield Request("POST", "/orders", {"id": next(numbers), "customer_id": "a", "cds": 1, "cents": 1})

    found = ask(lambda context: [str(len(list(context.inputs())))], other_ones)
    assert "something else than rng decides what inputs() yields" in found.anomalies[0].why

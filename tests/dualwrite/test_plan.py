"""Which way records go: by what the app declares and what the broker offers."""

from __future__ import annotations

import pytest

from semel import App
from semel.client.two_phase import TwoPhaseMode
from semel.dualwrite.plan import Plan, choose
from semel.errors import ConfigurationError, TwoPhaseCommitUnavailable

LESS = [mode for mode in TwoPhaseMode if mode is not TwoPhaseMode.FULL]


def test_a_broker_that_keeps_prepared_transactions_gets_the_dual_write() -> None:
    for outbox in (False, True):
        assert choose(outbox, True, TwoPhaseMode.FULL).plan is Plan.DUAL_WRITE
    assert choose(True, False, None).plan is Plan.OUTBOX


@pytest.mark.parametrize("mode", LESS)
def test_another_broker_gets_the_outbox_or_a_refusal_that_says_what_to_change(mode: TwoPhaseMode) -> None:
    choice = choose(True, True, mode)
    assert choice.plan is Plan.OUTBOX
    assert mode in choice.why
    with pytest.raises(TwoPhaseCommitUnavailable, match="declare the database with outbox=True") as raised:
        choose(False, True, mode)
    assert mode.meaning in str(raised.value)


def test_what_cannot_be_declared() -> None:
    app = App("bank")
    with pytest.raises(ConfigurationError, match="it is True, False or 'conditional'"):
        app.database("sqlite:///x.db", dual_write="perhaps")  # type: ignore[arg-type]
    quiet = app.database("sqlite:///x.db")
    with pytest.raises(ConfigurationError, match="outbox=True\\) or dual_write=True"):
        app.transaction(quiet)

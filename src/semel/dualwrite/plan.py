"""Which way records go from a database into Kafka: what the app asks for, and what the broker can do. Sans-IO."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, NamedTuple

from semel.client.two_phase import TwoPhaseMode
from semel.errors import TwoPhaseCommitUnavailable

__all__ = ["Choice", "DualWrite", "Plan", "choose"]

DualWrite = Literal["conditional"] | bool


class Plan(StrEnum):
    """The value is for people."""

    OUTBOX = "outbox"
    DUAL_WRITE = "dual write"
    CONDITIONAL = "conditional dual write"


class Choice(NamedTuple):
    """What is done, and why, in one sentence."""

    plan: Plan
    why: str


def choose(outbox: bool, dual_write: DualWrite, mode: TwoPhaseMode | None) -> Choice:
    """The plan of a database. `mode` is what the broker offers; None where it was not asked, because only the outbox
    is declared, or nothing else than the dual write.

    Raises `TwoPhaseCommitUnavailable` when the app wants the dual write alone and the broker cannot do it.
    """
    if not dual_write:
        return Choice(Plan.OUTBOX, "the app declares outbox=True")
    if dual_write == "conditional":
        return _conditional(outbox, mode)
    if mode is None or mode is TwoPhaseMode.FULL:
        return Choice(Plan.DUAL_WRITE, "the broker keeps prepared transactions (KIP-939)")
    if outbox:
        return Choice(Plan.OUTBOX, f"the broker cannot do the dual write ({mode}): {mode.meaning}")
    raise TwoPhaseCommitUnavailable(refusal(mode))


def _conditional(outbox: bool, mode: TwoPhaseMode | None) -> Choice:
    if mode is TwoPhaseMode.TRANSACTIONS_V1:
        if outbox:
            return Choice(Plan.OUTBOX, f"the broker cannot do a dual write: {mode.meaning}")
        raise TwoPhaseCommitUnavailable(refusal(mode))
    if mode in (TwoPhaseMode.FULL, TwoPhaseMode.NO_RECOVERY):
        return Choice(Plan.CONDITIONAL, "the app asks for it, and here no transaction times out: it has no condition")
    return Choice(
        Plan.CONDITIONAL,
        "the app asks for it: what the database commits is lost for Kafka when nobody recovers it within its time-out",
    )


def refusal(mode: TwoPhaseMode) -> str:
    """Why there is no dual write on such a broker, and what to change."""
    return (
        f"the dual write cannot be done on this Kafka, which offers: {mode}. {mode.meaning} Use a Kafka that keeps "
        "prepared transactions (the embedded broker does), or declare the database with outbox=True, which works on "
        "every Kafka; with outbox=True, dual_write=True Semel takes the dual write where it can be done."
    )

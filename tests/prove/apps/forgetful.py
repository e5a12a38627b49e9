"""The shop with one protection taken out: it does not look whether an Idempotency-Key was answered already.

A request that is sent twice has its effects twice, and the logs say so.
"""

from __future__ import annotations

from semel.examples.shop import app
from semel.ingress import rules

__all__ = ["app"]

_judge = rules.judge


def _forget(_known: rules.KnownOutcome | None, request: bytes, now_ms: int) -> rules.Verdict:
    return _judge(None, request, now_ms)


rules.judge = _forget

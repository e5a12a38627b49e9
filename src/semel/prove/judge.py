"""From what a campaign left behind to its verdict."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from semel.app import App
from semel.databases import connect
from semel.history import read_history
from semel.prove.campaign import Campaign, Observed
from semel.prove.check import Findings, check, timelines
from semel.prove.driver import Sent
from semel.prove.inputs import InputSource, checksum
from semel.prove.plan import Accepted
from semel.prove.proof import Proof, versions
from semel.prove.tally import tally

__all__ = ["ask_the_plan", "judge"]

_PROBLEMS_MAX = 1_000


def judge(campaign: Campaign, observed: Observed) -> Proof:
    """Check everything; takes as long as there is much. Raises what reading raises."""
    sent = observed.driver.sent
    findings = check(observed.evidence)
    if observed.stalled and not findings.of("E16"):
        for what in observed.stalled:
            findings.add("E16", what, "faults are over, and for a minute nothing moved")
    unanswered = sent.count(0, 1)
    if unanswered:
        findings.add("E16", f"{unanswered:,} inputs", "they got no final answer within a minute after the last fault")
    ask_the_plan(campaign, sent, findings)
    http = [("127.0.0.1", port) for port in campaign.http_ports]
    answered = {
        f"http-{slot}": array("q", (int(at * 1e9) for at in sent.by_address.get(address, ())))
        for slot, address in enumerate(http)
    }
    return Proof(
        app=campaign.options.app,
        options=campaign.options,
        plan=campaign.plan_name,
        chosen=campaign.source.chosen,
        sent=sent,
        load_began=observed.load_began,
        load_seconds=observed.load_seconds,
        faults={kind.kind: observed.striker.counts[kind.kind] for kind in campaign.kinds},
        missed=dict(observed.striker.missed),
        refused=observed.refused,
        failed=observed.striker.failed,
        exits=observed.exits,
        killed=observed.killed,
        targets=campaign.targets.names,
        findings=findings,
        timelines={number: story.svg() for number, story in timelines(observed.evidence, findings).items()},
        tally=tally(read_history(campaign.history), answered),
        run_on={**versions(), **observed.run_on},
    )


def ask_the_plan(campaign: Campaign, sent: Sent, findings: Findings) -> None:
    """E9: what the app's author says must hold, and does not."""
    if campaign.plan is None or campaign.plan.check is None:
        return
    context = _Context(campaign.app, campaign.source, sent)
    try:
        for number, problem in enumerate(campaign.plan.check(context)):
            findings.add("E9", "proof plan", str(problem))
            if number >= _PROBLEMS_MAX:
                break
    except Exception as error:  # The author's code; without it nothing is shown about totals.
        findings.add("E9", "proof plan", f"its check failed: {type(error).__name__}: {error}")


class _Context:
    """What a plan's check may look at: `semel.prove.plan.ProofContext`."""

    def __init__(self, app: App, source: InputSource, sent: Sent) -> None:
        self._app = app
        self._source = source
        self._sent = sent

    def inputs(self) -> Iterator[Accepted]:
        """The inputs are made again from the seed: so many need not be kept."""
        made = zip(self._source.inputs(), self._sent.statuses, self._sent.checksums, strict=False)
        for number, (item, status, sum_) in enumerate(made):
            if checksum(item) != sum_:
                raise ValueError(
                    f"input {number} is another one than was sent: something else than rng decides what inputs() yields"
                )
            yield Accepted(item, status)

    def query(self, sql: str, parameters: Sequence[Any] = (), *, database: str = "database") -> list[tuple[Any, ...]]:
        """Rows of one of the app's databases."""
        connection = connect(self._app.databases[database].url)
        try:
            return connection.query(sql, parameters)
        finally:
            connection.close()

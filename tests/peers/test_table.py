"""docs/broker.md says of the suites of others what their result files say."""

from __future__ import annotations

import json

import pytest

from tests.peers.outcomes import RESULTS, TITLES, Verdict, rendered, settle
from tests.services.kafka import ROOT

PAGE = ROOT / "docs" / "broker.md"
BEGIN, END = "<!-- results of make peers -->\n", "<!-- end of results -->"


def write_table() -> None:
    """Bring the page up to the result files."""
    text = PAGE.read_text()
    head, rest = text.split(BEGIN)
    PAGE.write_text(head + BEGIN + rendered() + "\n" + END + rest.split(END)[1])


def test_the_page_has_the_table_that_the_results_make() -> None:
    shown = PAGE.read_text().split(BEGIN)[1].split(END)[0]
    assert shown == rendered() + "\n", "run: python -m tests.peers.test_table"


def test_every_result_has_its_row() -> None:
    assert {path.stem for path in RESULTS.glob("*.json")} <= set(TITLES)
    for path in RESULTS.glob("*.json"):
        assert "unexplained" not in json.loads(path.read_text())["failed"].values()


def test_a_failure_without_a_reason_is_not_settled(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.peers.outcomes.RESULTS", tmp_path)
    with pytest.raises(AssertionError, match="test_new failed: boom"):
        settle("librdkafka", "here", {"test_new": Verdict("failed", "boom")})


if __name__ == "__main__":
    write_table()

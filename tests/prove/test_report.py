"""The report: one file, nothing loaded, nothing run, all text escaped - and it opens in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from array import array
from html.parser import HTMLParser
from pathlib import Path

import pytest

from semel.prove.campaign import CampaignOptions
from semel.prove.check.findings import Findings
from semel.prove.driver import Sent
from semel.prove.proof import Proof
from semel.prove.report import report_html
from semel.prove.tally import Recovery, Runs, Tally
from tests.conftest import unavailable

HOSTILE = "<script>document.title='owned'</script><img src=http://127.0.0.1:9/x onerror=alert(1)>\"'&"
SECOND = 1_000_000_000


def proof(findings: Findings | None = None) -> Proof:
    sent = Sent(
        statuses=array("H", [201] * 2_000 + [422]),
        answered_at=array("d", [100 + number * 0.015 for number in range(2_001)]),
        attempts=2_400,
        replayed=180,
        refused=[f"POST /orders {HOSTILE}"],
    )
    recoveries = [
        Recovery("kill", "worker-0", 104 * SECOND, 104 * SECOND, "killed", 106 * SECOND, 2.0),
        Recovery("pause", "worker-1", 108 * SECOND, 115 * SECOND, HOSTILE, None, None),
        Recovery("kill", "broker-0", 120 * SECOND, 120 * SECOND, "killed", 121 * SECOND, 1.0),
    ]
    return Proof(
        app="shop:app",
        options=CampaignOptions(
            "shop:app", minutes=0.5, seed=7, faults="kill,pause", databases={"": "postgresql://secret"}
        ),
        plan="shop_proof:plan",
        chosen=["inputs: the proof plan shop_proof:plan"],
        sent=sent,
        load_began=100 * SECOND,
        load_seconds=30.0,
        faults={"kill": 2, "pause": 1},
        missed={"pause": 1},
        refused={"net": f"because {HOSTILE}"},
        failed=[HOSTILE],
        exits={HOSTILE: 2},
        killed=3,
        targets=["broker-0", "http-0", "worker-0", "worker-1"],
        findings=findings or Findings(),
        tally=Tally(9_000, 2_000, 300, {"reserve": Runs(2_000, 12, 2_012)}, recoveries),
        run_on={"Semel": "0.1.0", "broker": HOSTILE},
    )


def broken() -> Proof:
    findings = Findings()
    findings.add("E2", ("reserve", "orders-0@17"), f"its effects stand there twice {HOSTILE}", ("worker-0-1-1",))
    findings.add("E1", ("stock", "inventory-1@3"), "it was passed and nothing was done for it")
    return proof(findings)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("made", [proof, broken])
def test_nothing_is_loaded_or_run_and_all_text_is_escaped(made: object) -> None:
    assert callable(made)
    page = Page(report_html(made()))
    assert not {"script", "img", "link", "iframe", "object", "form", "a"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not {name for name in names if name.startswith("on")} | names & {"src", "href", "style"}
    assert HOSTILE in page.text
    policies = [value for name, value in page.attributes if name == "content" and value and "-src" in value]
    assert len(policies) == 1
    assert policies[0].startswith("default-src 'none'; style-src 'sha256-")


def test_the_page_says_what_was_shown_and_what_was_not() -> None:
    text = Page(report_html(proof())).text
    assert "Nothing lost, nothing doubled" in text
    assert "2,001 inputs went into shop:app while 3 faults of 2 kinds" in text
    assert "11,000" in text
    assert "Handlers ran again for 12 of 2,000 inputs" in text
    assert "net was not done: because" in text
    assert "1 faults of kind pause found nothing to strike" in text
    command = "semel prove shop:app --seed 7 --minutes 0.5 --faults kill,pause --database URL"
    assert command in text
    assert "postgresql://secret" not in text


def test_anomalies_come_with_class_ids_and_reason() -> None:
    text = Page(report_html(broken())).text
    assert "2 anomalies: doubled 1, lost 1" in text
    assert "<h1>Nothing lost" not in report_html(broken())
    assert "E2 doubled" in text
    assert "reserve, orders-0@17" in text
    assert "its effects stand there twice" in text


def test_the_json_line_has_its_documented_names() -> None:
    figures = broken().as_json(Path("report.html"))
    assert figures["verdict"] == "anomalies"
    assert figures["anomalies"] == {"E2": 1, "E1": 1}
    assert figures["inputs"] == 2_001
    assert (figures["accepted"], figures["refused"], figures["unanswered"]) == (2_000, 1, 0)
    assert figures["effects"] == 11_000
    assert figures["faults"] == {"kill": 2, "pause": 1}
    assert figures["recovery_p99_seconds"] == 2.0
    assert figures["report"] == "report.html"


@pytest.mark.parametrize("made", [proof, broken])
def test_a_browser_shows_it_without_an_error_or_a_request(made: object, tmp_path: Path) -> None:
    """Headless Chromium; its log has every console message, and its network log every request."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        unavailable("Chromium", "not found: apt-get install chromium")
    assert callable(made)
    assert browser is not None
    page = tmp_path / "report.html"
    page.write_text(report_html(made()), encoding="utf-8")
    requests = tmp_path / "requests.json"
    done = subprocess.run(
        [
            browser,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
            "--no-first-run",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--log-net-log={requests}",
            "--enable-logging=stderr",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    shown = Page(done.stdout)
    assert {"svg", "table", "h1"} <= set(shown.tags)
    assert HOSTILE in shown.text
    assert "owned" not in re.findall(r"<title>(.*?)</title>", done.stdout)[0]
    assert "CONSOLE" not in done.stderr, done.stderr[-2_000:]
    assert "http://127.0.0.1:9" not in requests.read_text(errors="replace")

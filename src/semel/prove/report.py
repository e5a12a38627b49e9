"""The report of a campaign: one HTML file that needs no network and runs no script.

Everything that comes from outside this module is escaped; the page's own policy forbids everything but its one style
sheet, by its digest.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Sequence
from hashlib import sha256
from html import escape
from importlib.resources import files
from itertools import groupby

from semel.prove.chart import Bar, campaign_svg
from semel.prove.check.findings import CLASSES, Anomaly
from semel.prove.faults.catalogue import KINDS
from semel.prove.proof import Proof, by_kind, limits_of
from semel.prove.tally import Recovery, Runs

__all__ = ["report_html"]

_SLOWEST = 8
_ANOMALIES_SHOWN = 12
"""Of each class; the count says how many there are."""
_ORDER = sorted(CLASSES, key=lambda kind: kind in ("E8", "E9"))
"""Totals come last: mostly they follow from what stands before them."""
_YES = '<path d="M16 28l8 8 15-17" fill="none" stroke="currentColor" stroke-width="4" stroke-linecap="round"/>'
_NO = '<path d="M19 19l16 16M35 19L19 35" fill="none" stroke="currentColor" stroke-width="4" stroke-linecap="round"/>'


def report_html(proof: Proof) -> str:
    """The whole page."""
    style = files("semel.prove").joinpath("report.css").read_text(encoding="utf-8")
    digest = b64encode(sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    title = f"{proof.app}: {_headline(proof)}"
    body = "\n".join(
        [
            _header(proof),
            _tiles(proof),
            _picture(proof),
            _anomalies(proof),
            _faults(proof),
            _slowest(proof),
            _handlers(proof),
            _run(proof),
            _limits(proof),
            _again(proof),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n{body}\n"
        "<footer>Made by <code>semel prove</code>. This page is one file: it loads nothing and runs nothing.</footer>\n"
        "</main>\n</body>\n</html>\n"
    )


def _headline(proof: Proof) -> str:
    if proof.clean:
        return "nothing lost, nothing doubled"
    total = sum(proof.findings.counts.values())
    classes = ", ".join(f"{CLASSES[kind].name} {count:,}" for kind, count in proof.findings.counts.most_common(3))
    return f"{total:,} {'anomaly' if total == 1 else 'anomalies'}: {classes}"


def _header(proof: Proof) -> str:
    struck = sum(proof.faults.values())
    kinds = len([count for count in proof.faults.values() if count])
    text = (
        f"{proof.sent.inputs:,} inputs went into {proof.app} while {struck:,} faults of {_many(kinds, 'kind')} struck "
        "its processes. "
    )
    if proof.clean:
        text += (
            "Afterwards every record of every log, every row of the audit ledger and every position was held against "
            "what each process had written down before it tried it: each effect is there, once."
        )
    else:
        text += (
            "What was found afterwards does not fit what the processes had written down; each case is below, and the "
            "last section says how to run this again."
        )
    headline = _headline(proof)
    return (
        f'<header class="{proof.verdict}"><div class="top">'
        '<svg class="mark" viewBox="0 0 54 54" aria-hidden="true"><circle cx="27" cy="27" r="25" fill="none" '
        f'stroke="currentColor" stroke-width="3"/>{_YES if proof.clean else _NO}</svg>'
        f"<h1>{escape(headline[0].upper() + headline[1:])}</h1></div><p>{escape(text)}</p></header>"
    )


def _tiles(proof: Proof) -> str:
    sent, tally = proof.sent, proof.tally
    p99, most = tally.recovery_seconds(0.99), tally.recovery_seconds(1.0)
    tiles = [
        (f"{sent.inputs:,}", f"inputs in {proof.load_seconds / 60:.1f} minutes"),
        (f"{tally.effects:,}", "effects committed"),
        (f"{sum(proof.faults.values()):,}", f"faults of {_many(len(proof.faults), 'kind')}"),
        ("-" if p99 is None else f"{p99:.1f} s", f"recovery p99, at most {0.0 if most is None else most:.1f} s"),
        (f"{sent.attempts - sent.inputs:,}", f"requests sent again, {sent.replayed:,} answers replayed"),
        (f"{sum(proof.findings.counts.values()):,}", "anomalies"),
    ]
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{value}</b><span>{escape(label)}</span></div>' for value, label in tiles)
        + "</div>"
    )


def _short(target: str) -> str:
    """A file by its name; where it lay is of no use later."""
    return target.rpartition("/")[2] if target.startswith("/") else target


def _many(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _colours() -> dict[str, str]:
    return {kind: f"k{number % 12}" for number, kind in enumerate(KINDS)}


def _chip(kind: str) -> str:
    colour = _colours().get(kind, "k0")
    square = f'<rect class="{colour}" width="11" height="11" rx="2"/>'
    return f'<svg class="chip" viewBox="0 0 11 11" aria-hidden="true">{square}</svg>'


def _picture(proof: Proof) -> str:
    began = proof.load_began

    def seconds(at: float) -> float:
        return (at - began) / 1e9

    bars = []
    for item in proof.recoveries:
        back = None if item.back is None else seconds(item.back)
        after = "" if item.seconds is None else f"; back after {item.seconds:.2f} s"
        label = f"{item.kind} {_short(item.target)} at {seconds(item.began):.1f} s: {item.done}{after}"
        bars.append(Bar(_short(item.target), item.kind, seconds(item.began), seconds(item.ended), back, label))
    answered = [at - began / 1e9 for at in proof.sent.answered_at]
    end = max([proof.load_seconds, *(bar.ended for bar in bars)])
    svg = campaign_svg(answered, bars, proof.targets, _colours(), end)
    seen = [kind for kind in KINDS if proof.faults.get(kind)]
    legend = "".join(f"<span>{_chip(kind)}{escape(kind)}</span>" for kind in seen)
    return (
        "<h2>What happened</h2>\n"
        '<p class="note">Above: inputs answered a second. Below: what was being broken, a lane for each target; the '
        "pale part of a bar is the time until every partition that the struck process had worked on was committed to "
        "again. Point at a bar to read what was done.</p>\n"
        f'<div class="card">{svg}<div class="legend">{legend}</div></div>'
    )


def _faults(proof: Proof) -> str:
    times = by_kind(proof.recoveries)
    rows = []
    for kind, fault in KINDS.items():
        count = proof.faults.get(kind, 0)
        if not count:
            continue
        known = times.get(kind, [])
        rows.append(
            f'<tr><td class="k">{_chip(kind)}{escape(kind)}</td><td class="n">{count:,}</td>'
            f"<td>{escape(_sentence(fault.does))}</td><td>{escape(_sentence(fault.promise))}</td>"
            + "".join(f'<td class="n">{_at(known, share)}</td>' for share in (0.5, 0.99, 1.0))
            + "</tr>"
        )
    return (
        "<h2>Faults</h2>\n"
        '<p class="note">Recovery is from the end of the fault (a kill: from the kill) to the moment when every '
        "partition that was struck is committed to again; where faults overlap, from the end of the last one before "
        "that. A dash: it struck nothing that can be away, or the load ended first.</p>\n"
        '<div class="card"><table><tr><th>kind</th><th class="n">struck</th><th>what was done</th>'
        '<th>what is promised</th><th class="n">p50</th><th class="n">p99</th><th class="n">longest</th></tr>'
        + "".join(rows)
        + "</table></div>"
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _at(known: Sequence[float], share: float) -> str:
    return f"{known[min(len(known) - 1, int(len(known) * share))]:.1f} s" if known else "-"


def _slowest(proof: Proof) -> str:
    known: list[tuple[float, Recovery]] = [
        (item.seconds, item) for item in proof.recoveries if item.seconds is not None
    ]
    slowest = sorted(known, key=lambda item: -item[0])[:_SLOWEST]
    if not slowest:
        return ""
    rows = "".join(
        f'<tr><td class="n">{seconds:.2f} s</td><td class="n">{(item.began - proof.load_began) / 1e9:.1f} s</td>'
        f'<td class="k">{_chip(item.kind)}{escape(item.kind)}</td><td>{escape(_short(item.target))}</td>'
        f"<td>{escape(item.done)}</td></tr>"
        for seconds, item in slowest
    )
    return (
        "<h2>The slowest recoveries</h2>\n"
        '<div class="card"><table><tr><th class="n">took</th><th class="n">at</th><th>fault</th><th>target</th>'
        f"<th>what was done</th></tr>{rows}</table></div>"
    )


def _anomalies(proof: Proof) -> str:
    findings = proof.findings
    if findings.clean:
        checked = ", ".join(f"{count:,} {what}" for what, count in sorted(findings.checked.items()) if count)
        return (
            "<h2>Anomalies</h2>\n"
            f'<p class="note">None, of {len(CLASSES)} classes. Compared: {escape(checked or "nothing")}.</p>'
        )
    parts = ["<h2>Anomalies</h2>"]
    numbered = sorted(enumerate(findings.anomalies), key=lambda item: _ORDER.index(item[1].kind))
    for kind, group in groupby(numbered, key=lambda item: item[1].kind):
        found = list(group)
        more = findings.counts[kind] - len(found[:_ANOMALIES_SHOWN])
        parts.append(
            f'<div class="card anomaly"><h3>{escape(kind)} {escape(CLASSES[kind].name)}: {findings.counts[kind]:,}</h3>'
            f"<p>{escape(CLASSES[kind].meaning)}</p><table>"
            + "".join(
                _anomaly(anomaly, proof.timelines.get(number, "")) for number, anomaly in found[:_ANOMALIES_SHOWN]
            )
            + (f'<tr><td class="note" colspan="2">and {more:,} more</td></tr>' if more else "")
            + "</table></div>"
        )
    return "\n".join(parts)


def _anomaly(anomaly: Anomaly, timeline: str) -> str:
    """`timeline` is SVG of our own making, in which every text is escaped already."""
    row = f"<tr><td><code>{escape(', '.join(anomaly.ids))}</code></td><td>{escape(anomaly.why)}</td></tr>"
    return row + (f'<tr><td class="timeline" colspan="2">{timeline}</td></tr>' if timeline else "")


def _handlers(proof: Proof) -> str:
    runs = sorted(proof.tally.runs.items())
    if not runs:
        return ""
    rows = "".join(_handler(name, item) for name, item in runs)
    again = sum(item.again for _, item in runs)
    total = sum(item.inputs for _, item in runs)
    return (
        "<h2>What ran more than once</h2>\n"
        f'<p class="note">Handlers ran again for {again:,} of {total:,} inputs, at least. What they yield, and what a '
        "sink writes in its transaction, happened once. Anything else that they do - a call of another service, a mail "
        "- happens as often as they run: that is at-least-once, and Semel cannot change it.</p>\n"
        '<div class="card"><table><tr><th>component</th><th class="n">inputs</th><th class="n">executions</th>'
        f'<th class="n">inputs that ran again</th></tr>{rows}</table></div>'
    )


def _handler(name: str, runs: Runs) -> str:
    return (
        f'<tr><td class="k">{escape(name)}</td><td class="n">{runs.inputs:,}</td><td class="n">{runs.executions:,}</td>'
        f'<td class="n">{runs.again:,}</td></tr>'
    )


def _run(proof: Proof) -> str:
    options, sent = proof.options, proof.sent
    became = (
        f"{sent.count(200, 300):,} accepted, {sent.count(400, 600):,} refused by the app, "
        f"{sent.count(0, 1):,} without an answer"
    )
    facts = [
        *proof.run_on.items(),
        ("processes", ", ".join(name for name in proof.targets if "-" in name)),
        ("killed", f"{proof.killed:,} processes by SIGKILL, those that met a failpoint included"),
        ("seed", f"{options.seed}"),
        (
            "load",
            f"{options.clients} clients, {'no limit' if not options.rate else f'{options.rate:g} inputs a second'}",
        ),
        ("inputs", f"{became}; " + "; ".join(line.removeprefix("inputs: ") for line in proof.chosen)),
    ]
    facts += [("ended by itself", f"{what}, {times} times") for what, times in proof.exits.items()]
    facts += [("a fault that failed", what) for what in proof.failed]
    facts += [("refused, for example", what) for what in sent.refused[:3]]
    return (
        '<h2>What was run</h2>\n<div class="card"><table>'
        + "".join(f'<tr><td class="k">{escape(name)}</td><td>{escape(value)}</td></tr>' for name, value in facts)
        + "</table></div>"
    )


def _limits(proof: Proof) -> str:
    return "<h2>What this does not show</h2>\n<ul>" + _items(limits_of(proof)) + "</ul>"


def _items(lines: Iterable[str]) -> str:
    return "".join(f"<li>{escape(line)}</li>" for line in lines)


def _again(proof: Proof) -> str:
    return (
        '<h2>Run it again</h2>\n<p class="note">The seed decides the inputs and which fault strikes what at which '
        "time; which request a fault meets, the machine decides. An anomaly of a race may need several runs.</p>\n"
        f"<pre>{escape(proof.reproduction)}</pre>"
    )

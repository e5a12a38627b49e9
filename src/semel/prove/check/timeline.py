"""What happened around an anomaly: who tried what when, what faults struck, and what stands in the logs.

Data, text and SVG. Times are of the history (one monotonic clock), in milliseconds from the first thing that is shown.
Logs have no such time: their batches are shown in the order of offsets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from xml.sax.saxutils import escape

from semel.errors import CorruptBatch
from semel.history import Batch, Strike, Unit
from semel.prove.check.bodies import entries_of
from semel.prove.check.evidence import Evidence, Log
from semel.prove.check.findings import Anomaly, Findings
from semel.prove.check.model import OUTCOME_NAMES, OUTCOMES

__all__ = ["Bar", "Cell", "Timeline", "timelines"]

OF_A_CLASS_MAX = 3
"""Anomalies of one class that get a timeline: the next ones look the same."""
ATTEMPTS_MAX = 6
CELLS_MAX = 24
"""Batches of one partition in one timeline."""
FAULTS_MAX = 12
_OFFSETS_SHOWN = 6


class Bar(NamedTuple):
    """An attempt or a fault. `until_ms` is None where nobody wrote down how it ended."""

    lane: str
    from_ms: float
    until_ms: float | None
    what: str
    end: str
    is_fault: bool = False


class Cell(NamedTuple):
    """A batch or a marker in a log; `attempt` is empty for a marker."""

    first: int
    last: int
    what: str
    attempt: str = ""


@dataclass(slots=True)
class Timeline:
    """One anomaly's story."""

    title: str
    bars: list[Bar] = field(default_factory=list)
    logs: dict[str, list[Cell]] = field(default_factory=dict)

    def text(self) -> str:
        """For terminals and issue reports."""
        lines = [self.title]
        moments = [(bar.from_ms, bar.lane, bar.what) for bar in self.bars]
        moments += [(bar.until_ms, bar.lane, bar.end) for bar in self.bars if bar.until_ms is not None]
        lines += [f"  {at:>12,.3f} ms  {lane}: {what}" for at, lane, what in sorted(moments)]
        lines += [f"  {'?':>12} ms  {bar.lane}: {bar.end}" for bar in self.bars if bar.until_ms is None]
        for name, cells in self.logs.items():
            lines.append(f"  {name}")
            for cell in cells:
                place = f"@{cell.first}" if cell.first == cell.last else f"@{cell.first}..{cell.last}"
                lines.append(f"    {place:<16} {cell.what}" + (f"  of {cell.attempt}" if cell.attempt else ""))
        return "\n".join(lines)

    def svg(self) -> str:
        """For the report: bars over time above, logs in the order of offsets below. Attributes only, no styles."""
        return _Drawing(self).svg()


# --- Gathering ---


@dataclass(slots=True)
class _Story:
    """What is gathered for one anomaly."""

    anomaly: Anomaly
    attempts: set[str]
    places: set[tuple[str, str, int]]
    events: dict[str, list[Unit | Batch]] = field(default_factory=dict)


def timelines(evidence: Evidence, findings: Findings) -> dict[int, Timeline]:
    """Timelines of the first anomalies of each class, by their place in `findings.anomalies`.

    One more pass over the history and the logs; an anomaly that no attempt has to do with has none.
    """
    stories = _stories(findings.anomalies)
    if not stories:
        return {}
    strikes: list[Strike] = []
    by_attempt: dict[str, list[_Story]] = {}
    by_place: dict[tuple[str, str, int], list[_Story]] = {}
    for story in stories.values():
        for name in story.attempts:
            by_attempt.setdefault(name, []).append(story)
        for place in story.places:
            by_place.setdefault(place, []).append(story)
    inputs = {place[:2] for place in by_place}
    for event in evidence.events():
        if type(event) is Strike:
            strikes.append(event)
        elif type(event) is Unit or type(event) is Batch:
            if event.type == "invoke" and inputs:
                _follow(event, inputs, by_place, by_attempt)
            for story in by_attempt.get(event.a, ()):
                story.events.setdefault(event.a, []).append(event)
    cells = _cells(evidence.logs, set(by_attempt))
    told = {}
    for number, story in stories.items():
        if story.events or any(name in story.attempts for name in cells):
            told[number] = _tell(story, strikes, cells)
    return told


def _stories(anomalies: Sequence[Anomaly]) -> dict[int, _Story]:
    counts: dict[str, int] = {}
    found = {}
    for number, anomaly in enumerate(anomalies):
        places = set()
        if len(anomaly.ids) == 2 and "@" in anomaly.ids[1]:
            at, _, offset = anomaly.ids[1].rpartition("@")
            places.add((anomaly.ids[0], at, int(offset)))
        if not (anomaly.attempts or places):
            continue
        counts[anomaly.kind] = counts.get(anomaly.kind, 0) + 1
        if counts[anomaly.kind] <= OF_A_CLASS_MAX:
            found[number] = _Story(anomaly, set(anomaly.attempts), places)
    return found


def _follow(
    event: Unit | Batch,
    inputs: set[tuple[str, str]],
    by_place: Mapping[tuple[str, str, int], Sequence[_Story]],
    by_attempt: dict[str, list[_Story]],
) -> None:
    """Whoever worked on an input that is wrong belongs to its story."""
    for at, offsets in _worked_on(event):
        if (event.component, at) not in inputs:
            continue
        for offset in offsets:
            for story in by_place.get((event.component, at, offset), ()):
                if event.a not in story.attempts and len(story.attempts) < ATTEMPTS_MAX:
                    story.attempts.add(event.a)
                    by_attempt.setdefault(event.a, []).append(story)


def _worked_on(event: Unit | Batch) -> list[tuple[str, list[int]]]:
    """(partition, offsets) of an invoke."""
    if isinstance(event, Batch):
        return [(f"{part.topic}-{part.partition}", [*part.handed, *part.parked]) for part in event.parts]
    worked = [(f"{item.topic}-{item.partition}", item.offsets) for item in event.inputs]
    return worked + [(f"{topic}-{partition}", [offset]) for topic, partition, offset in event.parked]


def _cells(logs: Iterable[Log], wanted: set[str]) -> dict[str, dict[str, list[Cell]]]:
    """Attempt to log to what it has there, the markers that ended it included."""
    found: dict[str, dict[str, list[Cell]]] = {}
    for log in logs:
        open_: dict[int, set[str]] = {}
        try:
            for batch, proofs, commits in entries_of(log):
                header = batch.header
                who = f"producer {header.producer_id}, epoch {header.producer_epoch}"
                if commits is not None:
                    marker = Cell(header.base_offset, header.base_offset, f"{'COMMIT' if commits else 'ABORT'}, {who}")
                    for name in open_.pop(header.producer_id, ()):
                        found[name][str(log)].append(marker)
                    continue
                named = {proof.partition(b"|")[0].decode(errors="replace") for proof in proofs if proof is not None}
                for name in named & wanted:
                    count = header.record_count
                    what = f"{count} record{'s' if count > 1 else ''}" + (f", {who}" if header.producer_id >= 0 else "")
                    cells = found.setdefault(name, {}).setdefault(str(log), [])
                    if len(cells) < CELLS_MAX:
                        cells.append(Cell(header.base_offset, header.last_offset, what, name))
                    if header.is_transactional:
                        open_.setdefault(header.producer_id, set()).add(name)
        except (CorruptBatch, IndexError):
            continue  # It is a finding of its own; what came before it is shown.
    return found


def _tell(story: _Story, strikes: Sequence[Strike], cells: Mapping[str, Mapping[str, list[Cell]]]) -> Timeline:
    timeline = Timeline(str(story.anomaly))
    times = [event.t for events in story.events.values() for event in events]
    begin, end = (min(times), max(times)) if times else (0, 0)
    faults = _faults(strikes, begin, end)
    begin = min([begin, *(first.t for first, _ in faults)]) if times else begin

    def ms(t: int) -> float:
        return (t - begin) / 1e6

    for first, over in faults:
        what = f"{first.kind} strikes {first.target}" + (f" ({first.detail})" if first.detail else "")
        until = None if over is None else ms(over.t)
        timeline.bars.append(
            Bar("fault", ms(first.t), until, what, over.outcome if over and over.outcome else "over", True)
        )
    for name, events in sorted(story.events.items(), key=lambda item: item[1][0].t):
        invoke, last = events[0], events[-1]
        worked = ", ".join(f"{at} {_shown(offsets)}" for at, offsets in _worked_on(invoke)) or "nothing"
        if last.type == "invoke":
            timeline.bars.append(
                Bar(name, ms(invoke.t), None, f"{invoke.component} tries {worked}", "no outcome is known")
            )
        else:
            told = f"told {OUTCOME_NAMES[OUTCOMES[last.type]]}"
            timeline.bars.append(Bar(name, ms(invoke.t), ms(last.t), f"{invoke.component} tries {worked}", told))
    for name in sorted(story.attempts):
        for log, items in cells.get(name, {}).items():
            known = timeline.logs.setdefault(log, [])
            known += [item for item in items if item not in known]
    for items in timeline.logs.values():
        items.sort()
    return timeline


def _faults(strikes: Sequence[Strike], begin: int, end: int) -> list[tuple[Strike, Strike | None]]:
    """Faults that were there between these times, or up to a second before; beginning and end of each."""
    ends = {event.a: event for event in strikes if event.type != "invoke"}
    found = []
    for event in strikes:
        if event.type == "invoke" and event.t <= end:
            over = ends.get(event.a)
            if over is None or over.t >= begin - 1_000_000_000:
                found.append((event, over))
    return found[-FAULTS_MAX:]


def _shown(offsets: Sequence[int]) -> str:
    text = ",".join(map(str, offsets[:_OFFSETS_SHOWN]))
    return f"@{text},... ({len(offsets)})" if len(offsets) > _OFFSETS_SHOWN else f"@{text}"


# --- Drawing ---

_WIDTH, _LEFT, _RIGHT, _ROW, _HEAD = 960, 210, 24, 34, 34
_COLORS = ("#00798c", "#d1495b", "#edae49", "#7b2cbf", "#3a7d44", "#8d5524")
_FAULT, _INK, _LINE = "#b00020", "#1d2733", "#e4e7eb"
_SMALL = f'font-size="11" fill="{_INK}"'
_CELL = 26


class _Drawing:
    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        names = sorted({bar.lane for bar in timeline.bars if not bar.is_fault})
        names += sorted(
            {cell.attempt for cells in timeline.logs.values() for cell in cells if cell.attempt} - set(names)
        )
        self._colors = {name: _COLORS[number % len(_COLORS)] for number, name in enumerate(names)}
        times = [at for bar in timeline.bars for at in (bar.from_ms, bar.until_ms) if at is not None]
        self._begin, self._end = min(times, default=0.0), max(times, default=0.0)
        self._parts: list[str] = []

    def svg(self) -> str:
        bars, logs = self._timeline.bars, self._timeline.logs
        y = _HEAD
        for bar in bars:
            self._bar(bar, y)
            y += _ROW
        if bars:
            self._axis(y)
            y += 30
        for name, cells in logs.items():
            self._log(name, cells, y)
            y += _ROW + 8
        title = escape(self._timeline.title)
        short = title if len(title) < 130 else title[:127] + "..."
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y + 8}" role="img" '
            f'font-family="system-ui,sans-serif" font-size="12"><title>{title}</title>'
            f'<rect width="{_WIDTH}" height="{y + 8}" fill="#ffffff"/>'
            f'<text x="8" y="20" font-weight="600" fill="{_INK}">{short}</text>{"".join(self._parts)}</svg>'
        )

    def _x(self, at: float) -> float:
        width = _WIDTH - _LEFT - _RIGHT
        return _LEFT + width * (at - self._begin) / max(self._end - self._begin, 1e-6)

    def _bar(self, bar: Bar, y: int) -> None:
        color = _FAULT if bar.is_fault else self._colors[bar.lane]
        left = self._x(bar.from_ms)
        right = _WIDTH - _RIGHT if bar.until_ms is None else max(self._x(bar.until_ms), left + 3)
        dashes = ' stroke-dasharray="4 3"' if bar.until_ms is None else ""
        place = f'x="{left:.1f}" y="{y + 14}" width="{right - left:.1f}" height="10"'
        words = f"{bar.what}; {bar.end}"
        anchor, at = ("start", left) if left < _WIDTH * 0.55 else ("end", min(right, _WIDTH - _RIGHT))
        self._parts.append(
            f'<text x="{_LEFT - 10}" y="{y + 23}" text-anchor="end" fill="{color}">{_name(bar.lane)}</text>'
            f'<rect {place} fill="{color}" fill-opacity="0.35" stroke="{color}"{dashes}>'
            f"<title>{escape(words)}</title></rect>"
            f'<text x="{at:.1f}" y="{y + 10}" text-anchor="{anchor}" {_SMALL}>{_cut(words, 100)}</text>'
        )

    def _axis(self, y: int) -> None:
        for step in range(5):
            at = self._begin + (self._end - self._begin) * step / 4
            x = self._x(at) if self._end > self._begin else _LEFT
            label = f"{at:,.1f}" if self._end - self._begin > 10 else f"{at:,.3f}"
            self._parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_HEAD}" y2="{y}" stroke="{_LINE}"/>'
                f'<text x="{x:.1f}" y="{y + 14}" text-anchor="middle" {_SMALL}>{label} ms</text>'
            )

    def _log(self, name: str, cells: Sequence[Cell], y: int) -> None:
        room = (_WIDTH - _LEFT - _RIGHT) / max(len(cells), 1)
        self._parts.append(
            f'<text x="{_LEFT - 10}" y="{y + 18}" text-anchor="end" fill="{_INK}">{_name(name)}</text>'
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y + 14}" y2="{y + 14}" stroke="{_LINE}"/>'
        )
        for number, cell in enumerate(cells):
            x, width = _LEFT + number * room, min(room - 3, 150.0)
            color = self._colors.get(cell.attempt, _INK)
            place = f"@{cell.first}" if cell.first == cell.last else f"@{cell.first}-{cell.last}"
            label = f"{place} {cell.what.partition(',')[0]}"
            opacity = "0.25" if cell.attempt else "0.08"
            self._parts.append(
                f'<rect x="{x:.1f}" y="{y + 2}" width="{width:.1f}" height="{_CELL}" fill="{color}" '
                f'fill-opacity="{opacity}" stroke="{color}">'
                f"<title>{escape(f'{place}: {cell.what} {cell.attempt}')}</title></rect>"
            )
            if width > 6 * 6:
                text = _cut(label, int(width / 6.2))
                self._parts.append(f'<text x="{x + 4:.1f}" y="{y + 19}" {_SMALL}>{text}</text>')


def _name(text: str) -> str:
    return escape(text if len(text) <= 30 else "..." + text[-27:])


def _cut(text: str, size: int) -> str:
    return escape(text if len(text) <= size else text[: max(1, size - 1)] + "…")

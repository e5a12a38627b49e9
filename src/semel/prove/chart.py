"""The picture of a campaign as SVG: throughput over time, and below it what was broken when, a lane for each target.

Colours are classes of the page that it stands in. No library, no script.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import NamedTuple

__all__ = ["Bar", "campaign_svg", "round_up"]

_WIDTH, _LEFT, _RIGHT, _TOP = 1000, 132, 12, 14
_PLOT_HEIGHT, _LANE_HEIGHT, _GAP, _AXIS = 200, 19, 14, 24
_BAR_HEIGHT = 11
_NARROWEST = 2.5
_NAME_MAX = 20
_BUCKETS_MAX, _BUCKETS_MIN = 240, 30


class Bar(NamedTuple):
    """One fault: from `began` to `ended` it lasted, at `recovered` its partitions were committed to again. Seconds."""

    target: str
    kind: str
    began: float
    ended: float
    recovered: float | None
    label: str


def campaign_svg(
    answered: Sequence[float], bars: Sequence[Bar], targets: Sequence[str], colours: Mapping[str, str], seconds: float
) -> str:
    """`answered` are the moments at which inputs were answered; `colours` gives the class of each kind of fault."""
    seconds = max(seconds, 1.0)
    lanes = [target for target in targets if any(bar.target == target for bar in bars)]
    lanes += sorted({bar.target for bar in bars} - set(lanes))
    lanes_top = _TOP + _PLOT_HEIGHT + _GAP
    base = lanes_top + _LANE_HEIGHT * len(lanes)

    def x(at: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * min(max(at / seconds, 0.0), 1.0)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {base + _AXIS}" role="img" '
        'aria-label="Inputs answered per second over time, and the faults below">',
        *_throughput(answered, seconds, x),
    ]
    step = _tick(seconds)
    for number in range(int(seconds / step) + 1):
        at = x(number * step)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{base}"/>')
        anchor = "end" if at > _WIDTH - 30 else "middle"
        parts.append(
            f'<text class="tick" x="{at:.1f}" y="{base + 16}" text-anchor="{anchor}">{number * step:g} s</text>'
        )
    for number, target in enumerate(lanes):
        top = lanes_top + number * _LANE_HEIGHT
        parts.append(f'<rect class="lane" x="{_LEFT}" y="{top + 1}" width="{_WIDTH - _LEFT - _RIGHT}" height="17"/>')
        parts.append(f'<text class="name" x="{_LEFT - 8}" y="{top + 13}" text-anchor="end">{_name(target)}</text>')
        parts += [_bar(bar, top, x, colours) for bar in bars if bar.target == target]
    return "\n".join([*parts, "</svg>"])


def _throughput(answered: Sequence[float], seconds: float, x: Callable[[float], float]) -> list[str]:
    buckets = min(_BUCKETS_MAX, max(_BUCKETS_MIN, int(seconds * 2)))
    width = seconds / buckets
    counts = Counter(min(buckets - 1, max(0, int(at / width))) for at in answered)
    rates = [counts[index] / width for index in range(buckets)]
    top = round_up(max([*rates, 1.0]))

    def y(rate: float) -> float:
        return _TOP + _PLOT_HEIGHT * (1 - rate / top)

    parts = []
    for step in range(5):
        rate = top * step / 4
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(rate):.1f}" y2="{y(rate):.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y(rate) + 4:.1f}" text-anchor="end">{rate:,.0f}/s</text>')
    points = " ".join(f"{x((index + 0.5) * width):.1f},{y(rate):.1f}" for index, rate in enumerate(rates))
    ground = _TOP + _PLOT_HEIGHT
    parts.append(f'<polygon class="area" points="{x(0):.1f},{ground} {points} {x(seconds):.1f},{ground}"/>')
    parts.append(f'<polyline class="line" points="{points}"/>')
    return parts


def _bar(bar: Bar, top: float, x: Callable[[float], float], colours: Mapping[str, str]) -> str:
    left = x(bar.began)
    width = max(_NARROWEST, x(bar.ended) - left)
    y = top + (_LANE_HEIGHT - _BAR_HEIGHT) / 2
    tail = ""
    if bar.recovered is not None and x(bar.recovered) > left + width:
        tail = (
            f'<rect class="tail {colours.get(bar.kind, "k0")}" x="{left + width:.1f}" y="{y + 3.5:.1f}" '
            f'width="{x(bar.recovered) - left - width:.1f}" height="4"/>'
        )
    shape = f'x="{left:.1f}" y="{y:.1f}" width="{width:.1f}" height="{_BAR_HEIGHT}" rx="1.5"'
    return f'<g><title>{escape(bar.label)}</title>{tail}<rect class="{colours.get(bar.kind, "k0")}" {shape}/></g>'


def _name(target: str) -> str:
    return escape(target if len(target) <= _NAME_MAX else target[: _NAME_MAX - 1] + "…")


def _tick(seconds: float) -> float:
    """About eight ticks, at numbers that people count in."""
    steps = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1_800, 3_600)
    return next((float(step) for step in steps if seconds / step <= 9), round_up(seconds / 8))


def round_up(value: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten."""
    scale = 1.0
    while scale * 10 <= value:
        scale *= 10
    return next(scale * step for step in (1, 2, 2.5, 5, 10) if scale * step >= value)

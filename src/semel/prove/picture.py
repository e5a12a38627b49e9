"""The demo's picture: throughput over time as an SVG, every fault marked where it struck. No library, no script."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

from semel.prove.chart import round_up

__all__ = ["Mark", "throughput_svg"]

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 960, 340, 64, 16, 56, 64
_SMALL = 'font-size="11" fill="#52606d"'
_COLORS = {"worker": "#d1495b", "http": "#edae49", "broker": "#7b2cbf", "pause": "#00798c"}


class Mark(NamedTuple):
    """One fault: when (seconds since the start), what it hit (worker, http, broker) or `pause`, and its label."""

    at: float
    kind: str
    label: str


def throughput_svg(finished: Sequence[float], marks: Sequence[Mark], title: str, subtitle: str) -> str:
    """Orders answered per second over time, with the faults as vertical lines.

    `finished` holds the seconds at which orders were answered.
    """
    seconds = max([*finished, *(mark.at for mark in marks), 1.0])
    buckets = min(240, max(20, int(seconds * 2)))
    width = seconds / buckets
    counts = Counter(min(buckets - 1, int(at / width)) for at in finished)
    rates = [counts[index] / width for index in range(buckets)]
    top = round_up(max([*rates, 1.0]))
    plot_w, plot_h = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x(at: float) -> float:
        return _LEFT + plot_w * at / seconds

    def y(rate: float) -> float:
        return _TOP + plot_h * (1 - rate / top)

    points = " ".join(f"{x((index + 0.5) * width):.1f},{y(rate):.1f}" for index, rate in enumerate(rates))
    base = _TOP + plot_h
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="system-ui,sans-serif">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="24" font-size="17" font-weight="600" fill="#1d2733">{escape(title)}</text>',
        f'<text x="{_LEFT}" y="44" font-size="12.5" fill="#52606d">{escape(subtitle)}</text>',
    ]
    for step in range(5):
        rate = top * step / 4
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(rate):.1f}" y2="{y(rate):.1f}" stroke="#e4e7eb"/>'
            f'<text x="{_LEFT - 8}" y="{y(rate) + 4:.1f}" {_SMALL} text-anchor="end">{rate:,.0f}</text>'
        )
    parts += [
        f'<polygon points="{x(0):.1f},{base} {points} {x(seconds):.1f},{base}" fill="#9fb3c8" opacity="0.35"/>',
        f'<polyline points="{points}" fill="none" stroke="#334e68" stroke-width="1.6"/>',
    ]
    for mark in marks:
        color = _COLORS.get(mark.kind, "#52606d")
        parts.append(
            f'<line x1="{x(mark.at):.1f}" x2="{x(mark.at):.1f}" y1="{_TOP}" y2="{base}" stroke="{color}" '
            f'stroke-width="1.3" stroke-dasharray="3 2"><title>{escape(mark.label)} at {mark.at:.1f} s</title></line>'
        )
    for step in range(7):
        at = seconds * step / 6
        parts.append(f'<text x="{x(at):.1f}" y="{base + 18}" {_SMALL} text-anchor="middle">{at:.0f} s</text>')
    counted = Counter(mark.kind for mark in marks)
    names = {"worker": "worker killed", "http": "HTTP instance killed", "broker": "broker killed", "pause": "paused"}
    at_x = float(_LEFT)
    for kind, name in names.items():
        text = f"{name} ({counted[kind]})"
        parts.append(
            f'<rect x="{at_x}" y="{_HEIGHT - 24}" width="11" height="11" fill="{_COLORS[kind]}"/>'
            f'<text x="{at_x + 16}" y="{_HEIGHT - 14}" font-size="12" fill="#1d2733">{escape(text)}</text>'
        )
        at_x += 40 + 7 * len(text)
    parts.append(
        f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 14}" font-size="12" text-anchor="end" fill="#52606d">'
        "orders answered per second</text></svg>"
    )
    return "\n".join(parts) + "\n"

"""Curves as SVG: quiet axes, many points drawn as their mean within their range, values to hover over."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from clipscale.apps.quantities import count
from clipscale.apps.record import Points

WIDTH, HEIGHT = 400, 216  # of the drawing's own units: a page shows it about that wide, so text keeps its size
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 8, 24
MOST = 160  # points of a curve; of more, neighbours are drawn as one
DOTS = 48  # points of a curve that can be hovered over
TICKS = 4
USUAL, OUTLIER = 0.95, 4.0  # quantile of the values that an axis from 0 shows, and how far beyond it others may lie


@dataclass(frozen=True)
class Curve:
    """A line: its ``colour`` is the number of one of the page's; a dashed one is a level to compare with."""

    label: str
    points: Points
    colour: int = 0
    dashed: bool = False


def draw(curves: Sequence[Curve], tell: Callable[[float], str], zero: bool, marks: Sequence[tuple[float, str]]) -> str:
    """The drawing; ``tell`` writes values, ``zero`` asks for an axis from 0, ``marks`` are moments ``(x, what)``."""
    xs = [x for curve in curves for x, _ in curve.points] or [0.0]
    ys = sorted(y for curve in curves for _, y in curve.points if math.isfinite(y)) or [0.0]
    top = ys[-1]
    if zero and top > OUTLIER * (most := ys[int(USUAL * (len(ys) - 1))]) > 0:
        top = most * 1.5  # a few, such as a first step that compiles, would make all others one flat line
    low_x, high_x = min(0.0, min(xs)), max(xs) or 1.0
    steps = ticks(min(0.0, ys[0]) if zero else ys[0], top or (1.0 if zero else top))
    low, high = min(steps[0], ys[0]), max(steps[-1], top)

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)
        up = (min(y, high) - low) / (high - low)
        return round(across, 1), round(HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - TOP), 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    labels = list(map(tell, steps))
    if len(set(labels)) < len(labels) and steps[1] > steps[0]:  # they differ in digits that it leaves out
        digits = max(0, -math.floor(math.log10(steps[1] - steps[0])))
        labels = [f"{y:.{digits}f}" for y in steps]
    for y, label in zip(steps, labels, strict=True):
        _, down = place(low_x, y)
        parts.append(f'<path class="grid" d="M{LEFT} {down}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down + 4}" text-anchor="end">{escape(label)}</text>')
    for x in ticks(low_x, high_x):
        if x <= high_x:
            across, _ = place(x, low)
            # The last one would stand out of the picture.
            anchor = "end" if across > WIDTH - 24 else "middle"
            parts.append(f'<text x="{across}" y="{HEIGHT - 6}" text-anchor="{anchor}">{count(x)}</text>')
    for x, what in marks:
        across, _ = place(min(x, high_x), low)
        parts.append(
            f'<path class="event" d="M{across} {TOP}V{HEIGHT - BOTTOM}"><title>{escape(what)}, at {x:,.0f} samples'
            "</title></path>"
        )
    for curve in curves:
        parts += _line(curve, place, tell)
    return "".join([*parts, "</svg>"])


def _line(
    curve: Curve, place: Callable[[float, float], tuple[float, float]], tell: Callable[[float], str]
) -> list[str]:
    means, band = thinned(curve.points)
    parts = []
    if band:
        edge = [place(x, high) for x, _, high in band] + [place(x, low) for x, low, _ in reversed(band)]
        parts.append(f'<path class="band s{curve.colour}" d="M{_path(edge)}Z"/>')
    line = [place(x, y) for x, y in means]
    kind = " dashed" if curve.dashed else ""
    if len(line) > 1:
        parts.append(f'<path class="line s{curve.colour}{kind}" d="M{_path(line)}"/>')
    if curve.dashed:
        return parts
    every = -(-len(means) // DOTS)
    for i in sorted({*range(0, len(means), max(every, 1)), len(means) - 1} if means else ()):
        (x, y), (across, down) = means[i], line[i]
        name = f"{curve.label}: " if curve.label else ""
        small = "" if len(means) <= 12 else " quiet"
        parts.append(
            f'<circle class="dot s{curve.colour}{small}" cx="{across}" cy="{down}" r="{3 if not small else 5}">'
            f"<title>{escape(name + tell(y))} at {x:,.0f} samples</title></circle>"
        )
    return parts


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "L".join(f"{x:g} {y:g}" for x, y in points)


def thinned(points: Points) -> tuple[Points, list[tuple[float, float, float]]]:
    """Finite points, at most ``MOST``, and of those that stand for several ``(x, lowest, highest)``; else no range."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    if len(finite) <= MOST:
        return finite, []
    cuts = [round(i * len(finite) / MOST) for i in range(MOST + 1)]
    groups = [finite[a:b] for a, b in pairwise(cuts)]
    means = [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
    values = [[y for _, y in group] for group in groups]
    return means, [(x, min(ys), max(ys)) for (x, _), ys in zip(means, values, strict=True)]


def ticks(low: float, high: float) -> list[float]:
    """About ``TICKS`` round numbers that reach from ``low`` or below to ``high`` or above."""
    if not high > low:
        low, high = low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5)
    rough = (high - low) / TICKS
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * times for times in (1, 2, 2.5, 5, 10) if unit * times >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]

"""Plots of statistics: quiet histograms, medians marked, logarithmic axes where the range asks for them."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from clipscale.apps.data.describe import Summary
from clipscale.apps.data.examine import shown
from clipscale.apps.data.summaries import Spread, quantum
from clipscale.apps.quantities import number, size

BINS = 40
WIDE, TAIL = 30.0, 8.0  # 99th percentile over the first, or maximum over median: beyond, an axis is logarithmic
LINEAR = 100  # integers up to which an axis is linear all the same
NUMBERS = 6  # JSON fields that are plotted
MANY = 12  # distinct values below which a field holds classes rather than quantities
CLASSES = re.compile(r"(^|_)(label|class|cls|category|id|idx|index|uid|key)(e?s|$|_)", re.IGNORECASE)  # and so do these
COLUMNS = 3
# Colours of bars, of what is marked, of text and of lines, on a light and on a dark page.
LIGHT = {"bar": "#4a7fb5", "mark": "#c4661f", "text": "#40464d", "line": "#d5d9de", "page": "#ffffff"}
DARK = {"bar": "#6f9fd0", "mark": "#f0a35c", "text": "#b9c0c8", "line": "#3a4048", "page": "#1c2024"}
COUNTED = {"fields": "samples"}  # what a bar counts, if it is not what the plot is called
PANELS = {  # per plot, what is shown of what: name of the distribution, label of its axis
    "captions": {"characters": "characters per caption", "words": "words per caption", "tokens": "tokens per caption"},
    "images": {"width": "width, pixels", "height": "height, pixels", "aspect_ratio": "aspect ratio, width / height",
               "megapixels": "megapixels", "bytes_per_image": "bytes per image"},
    "shards": {"samples_per_shard": "samples per shard", "bytes_per_shard": "bytes per shard"},
}  # fmt: skip


def plots(summary: Summary, context_length: int, dark: bool) -> dict[str, bytes]:
    """PNGs by name: ``captions images shards``, and ``fields`` where JSON holds quantities."""
    panels: dict[str, Mapping[str, str]] = dict(PANELS)
    if fields := _quantities(summary):
        panels["fields"] = fields
    marks = {"tokens": (context_length, "context length")}
    return {
        name: _figure(summary, COUNTED.get(name, name), labels, marks, DARK if dark else LIGHT)
        for name, labels in panels.items()
    }


def _quantities(summary: Summary) -> dict[str, str]:
    named = [name for name in summary.spreads if name.startswith("number:") and not CLASSES.search(name[7:])]
    wide = [name for name in named if len(summary.spreads[name].counts) >= MANY]
    often = sorted(wide, key=lambda name: (-len(summary.spreads[name]), name))[:NUMBERS]
    return {name: "json:" + shown(name.removeprefix("number:"), 30).replace("$", r"\$") for name in often}


def _figure(
    summary: Summary, counted: str, panels: Mapping[str, str], marks: Mapping[str, tuple[float, str]],
    colours: Mapping[str, str],
) -> bytes:  # fmt: skip
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    style: Any = {
        "font.size": 9, "text.color": colours["text"], "axes.labelcolor": colours["text"],
        "axes.edgecolor": colours["line"], "xtick.color": colours["line"], "ytick.color": colours["line"],
        "xtick.labelcolor": colours["text"], "ytick.labelcolor": colours["text"], "axes.grid": True,
        "axes.grid.axis": "y", "grid.color": colours["line"], "grid.linewidth": 0.6, "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "ytick.major.size": 0,
        "figure.facecolor": colours["page"], "axes.facecolor": colours["page"],
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(3.4 * columns, 2.5 * rows), layout="constrained")
        for place, (name, label) in enumerate(panels.items(), start=1):
            axes = figure.add_subplot(rows, columns, place)
            _histogram(axes, summary.spread(name), label, marks.get(name), colours, name.startswith("bytes_"))
            if place % columns == 1:
                axes.set_ylabel(counted)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def _histogram(
    axes: Any, spread: Spread, label: str, mark: tuple[float, str] | None, colours: Mapping[str, str], is_bytes: bool
) -> None:
    axes.set_xlabel(label)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    if not spread.counts:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "none", ha="center", transform=axes.transAxes)
        return
    told = size if is_bytes else number
    logarithmic = is_wide(spread)
    values = np.array(sorted(spread.counts), dtype=np.float64)
    counts = np.array([spread.counts[value] for value in sorted(spread.counts)])
    bins = edges(spread, logarithmic)
    heights, _ = np.histogram(values, bins, weights=counts)
    axes.bar(bins[:-1], heights, np.diff(bins), align="edge", color=colours["bar"], linewidth=0)
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(10, subs=(1.0,) if bins[-1] > 300 * bins[0] else (1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=bool((values == np.rint(values)).all())))
        if len(values) == 1:
            axes.set_xlim(bins[0] - 5 * (bins[1] - bins[0]), bins[1] + 5 * (bins[1] - bins[0]))
            axes.set_xticks(values)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: told(value)))
    axes.set_ylim(0, heights.max() * 1.25)
    _line(axes, spread.quantile(0.5), f"median {told(spread.quantile(0.5))}", colours, "mark", 0.98)
    if mark and mark[0] < bins[-1] * (1.5 if not logarithmic else 4):
        _line(axes, mark[0], f"{mark[1]} {mark[0]}", colours, "text", 0.86)


def _line(axes: Any, at: float, text: str, colours: Mapping[str, str], colour: str, height: float) -> None:
    axes.axvline(at, color=colours[colour], linestyle="-" if colour == "mark" else ":", linewidth=1.2)
    low, high = axes.get_xlim()
    if axes.get_xscale() == "log":
        low, high, place = math.log(low), math.log(high), math.log(at)
    else:
        place = at
    left = place > (low + high) / 2  # the text stands where there is room
    axes.annotate(text, (at, height), xycoords=("data", "axes fraction"), xytext=(-4 if left else 4, 0),
                  textcoords="offset points", ha="right" if left else "left", va="top", color=colours[colour],
                  fontsize=8, bbox={"facecolor": colours["page"], "edgecolor": "none", "pad": 1})  # fmt: skip


def is_wide(spread: Spread) -> bool:
    """Whether values span so much that a linear axis would show one bar."""
    low, middle, high = (spread.quantile(share) for share in (0.01, 0.5, 0.99))
    few = spread.high <= LINEAR and all(value == int(value) for value in spread.counts)
    return spread.low > 0 and not few and (high > WIDE * low or spread.high > TAIL * middle)


def edges(spread: Spread, logarithmic: bool) -> NDArray[np.float64]:
    """Edges of at most about forty bins, none finer than what a Spread tells apart; integers lie within bins."""
    whole = all(value == int(value) for value in spread.counts)
    low, high = min(spread.counts), max(spread.counts)
    if logarithmic and whole:
        return np.unique(np.append(np.floor(np.geomspace(low, high, BINS + 1)), math.floor(high) + 1)) - 0.5
    if logarithmic:
        return np.geomspace(low * 0.9999, high * 1.0001, BINS + 1)
    finest = max(quantum(max(abs(low), abs(high))), 1.0 if whole else 0.0)
    step = max(math.ceil((high - low) / BINS / finest), 1) * finest
    if low == high:
        return np.array([low - finest / 2, low + finest / 2])
    return np.arange(low - finest / 2, high + step, step)

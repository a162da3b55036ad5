"""Deletion and insertion curves as a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from clipscale.evals.faithful import Curves

COLOURS = {
    "integrated": "#2f6fb0",
    "attention": "#8a58b5",
    "gradcam": "#8a58b5",
    "edges": "#c4661f",
    "random": "#8b949e",
}
INK, SOFT, LINE = "#22272d", "#68717b", "#e3e5e8"
TITLES = {"deletion": ("Deletion", "low is faithful"), "insertion": ("Insertion", "high is faithful")}


def draw(found: Mapping[str, Curves], result: Mapping[str, Any]) -> bytes:
    """A PNG: the mean curve of each method, with a band of two standard errors of that mean."""
    figure = Figure(figsize=(9, 3.9), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    both = figure.subplots(1, 2, sharey=True)
    for axes, (kind, (title, hint)) in zip(both, TITLES.items(), strict=True):
        for name, of in found.items():
            _line(axes, name, getattr(of, kind), result["area"][name][kind]["mean"])
        verb = "deleted" if kind == "deletion" else "shown"
        axes.set_title(f"{title}: {hint}", loc="left", fontsize=11, color=INK)
        axes.set_xlabel(f"cells {verb}, in the order of the map", color=SOFT)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.tick_params(color=LINE, labelcolor=SOFT, labelsize=9)
        axes.grid(color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(LINE)
        axes.set_xlim(0, 1)
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    what = "similarity above the other captions'" if result["contrast"] else "cosine similarity"
    both[0].set_ylabel(what, color=SOFT)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _line(axes: Any, name: str, curve: torch.Tensor, area: float) -> None:
    share = torch.linspace(0, 1, curve.shape[1])
    mean, error = curve.mean(0), curve.std(0) / len(curve) ** 0.5
    axes.fill_between(share, mean - 2 * error, mean + 2 * error, color=COLOURS[name], alpha=0.15, linewidth=0)
    axes.plot(share, mean, color=COLOURS[name], linewidth=1.8, label=f"{name}, mean height {area:.3f}")

"""The few-shot curve beside zero-shot, as in figure 6 of the CLIP paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from clipscale.apps.writing import whole

BLUE, ORANGE, GREY, LINE = "#2f6fb0", "#c4661f", "#68717b", "#e3e5e8"
STYLE: Any = {
    "font.size": 10, "text.color": "#22272d", "axes.labelcolor": "#22272d", "axes.edgecolor": LINE,
    "xtick.color": LINE, "ytick.color": LINE, "xtick.labelcolor": "#22272d", "ytick.labelcolor": "#22272d",
    "axes.grid": True, "grid.color": LINE, "grid.linewidth": 0.6, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip


def plot_few_shot(
    path: Path, few: Sequence[Mapping[str, Any]], zeroshot: Mapping[str, Any] | None, full: Mapping[str, Any]
) -> None:
    """Write a PNG: accuracy over labelled images per class with its intervals, zero-shot as a star at none.

    ``few`` as of :class:`clipscale.evals.fewshot.Shots`. Raises ConfigError where it cannot be written.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.2, 4.2), layout="constrained")
        axes = figure.add_subplot()
        # Evenly spaced, as the paper has it: each step doubles the labels.
        places = range(1, len(few) + 1)
        means = [one["mean"] for one in few]
        axes.fill_between(places, [one["low"] for one in few], [one["high"] for one in few], color=BLUE, alpha=0.16,
                          linewidth=0, label="95 % interval, over draws and test images")  # fmt: skip
        axes.plot(places, means, "o-", color=BLUE, label="linear probe")
        for place, one in zip(places, few, strict=True):
            axes.plot([place] * len(one["draws"]), one["draws"], ".", color=BLUE, alpha=0.45, markersize=5)
        axes.axhline(full["top1"], color=GREY, linewidth=1, linestyle="--")
        axes.annotate(f"all training images {full['top1']:.1%}", (len(few), full["top1"]), xytext=(0, 3), ha="right",
                      va="bottom", textcoords="offset points", color=GREY, fontsize=9)  # fmt: skip
        if zeroshot is not None:
            low, high = zeroshot["top1"] - zeroshot["low"], zeroshot["high"] - zeroshot["top1"]
            axes.errorbar([0], [zeroshot["top1"]], [[low], [high]], color=ORANGE, linewidth=1.2)
            axes.plot([0], [zeroshot["top1"]], "*", color=ORANGE, markersize=17, label="zero-shot", clip_on=False)
            axes.axhline(zeroshot["top1"], color=ORANGE, linewidth=0.8, linestyle=":")
        axes.set_xticks([0, *places], ["0", *(str(one["shots"]) for one in few)])
        axes.set_xlim(-0.35, len(few) + 0.25)
        axes.set_ylim(0, min(1.0, 1.18 * max(full["top1"], *(one["high"] for one in few))))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        axes.set(xlabel="labelled training images per class", ylabel="accuracy on test images")
        axes.legend(loc="lower right", frameon=False, fontsize=9)
        with whole(path) as file:
            figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
